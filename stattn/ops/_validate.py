"""Checks that the public element-wise operations share.

Each raises TypeError or ValueError naming the argument and its value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor

from stattn.grid import Triple, is_int

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(name: str, value: object, axes: str) -> Tensor:
    """Return value, a floating-point tensor with as many axes as ``axes`` names ("[B, N, C]")."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} of type {type(value).__name__} must be a tensor {axes}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} of {value.dtype} must be float16, bfloat16, float32 or float64")
    if value.dim() != axes.count(",") + 1:
        raise ValueError(f"{name} of shape {tuple(value.shape)} must be {axes}")
    return value


def shaped(name: str, value: object, axes: str, shape: tuple[int, ...]) -> Tensor:
    """Return value, a floating-point tensor of exactly this shape."""
    checked = tensor(name, value, axes)
    if tuple(checked.shape) != shape:
        raise ValueError(f"{name} of shape {tuple(checked.shape)} must be {axes} = {shape}")
    return checked


def one_device(name: str, value: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless the others are on value's device."""
    for other_name, other in others.items():
        if other is not None and other.device != value.device:
            raise ValueError(f"{other_name} is on {other.device}, {name} on {value.device}")


def number(name: str, value: object) -> float:
    """Return a finite number of the host. A tensor is refused: reading it would wait for the device."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} must be a number")
    try:
        result = float(value)
    except OverflowError:  # of an integer of more than 300 digits
        result = math.inf
    if not abs(result) < math.inf:  # torch.compile traces this comparison; it does not trace math.isfinite
        raise ValueError(f"{name}={value!r} must be finite")
    return result


def epsilon(value: object) -> float:
    """Return eps, a finite number that is not negative."""
    eps = number("eps", value)
    if eps < 0:
        raise ValueError(f"eps={value!r} must not be negative")
    return eps


def flag(name: str, value: object) -> bool:
    """Return a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False")
    return value


def device(name: str, value: object, present: bool = True) -> torch.device:
    """Return a device from a device or its name. present: it must be one of this machine, where it is a CUDA device."""
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"{name}={value!r} must be a torch.device or its name")
    try:
        found = torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{name}={value!r} is no device: {error}") from error
    if present and found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{name}={str(value)!r}: torch finds no CUDA device here")
    return found


def triple(name: str, value: object) -> Triple:
    """Return three positive integers."""
    if not isinstance(value, (tuple, list)) or len(value) != 3 or not all(is_int(each) and each > 0 for each in value):
        raise ValueError(f"{name}={value!r} must be three positive integers")
    t, h, w = (int(each) for each in value)
    return t, h, w


def unpack(values: Iterable[int]) -> Triple:
    """Return the three numbers of a list in a graph, which are right; sizes stay symbolic."""
    t, h, w = values
    return t, h, w


def per_token(x: Tensor, frames: int | None, **vectors: Tensor | None) -> None:
    """Check vectors that act on the tokens of x [B, N, C]: [B, C] per sample, [B, F, C] per frame, [B, N, C] per token.

    frames: F, which must divide N; None when no vector is per frame.
    """
    batch, tokens, channels = x.shape
    if frames is not None:
        if not is_int(frames) or frames < 1 or tokens % frames:
            raise ValueError(f"frames={frames!r} must be a positive integer that divides the {tokens} tokens of x")
        if not any(isinstance(each, Tensor) and each.dim() == 3 for each in vectors.values()):
            raise ValueError(f"frames={frames} has no effect: none of {', '.join(vectors)} is [B, F, C]")
    rows, axes = (tokens, "[B, N, C] without frames") if frames is None else (frames, "[B, F, C]")
    for name, vector in vectors.items():
        if vector is None:
            continue
        if isinstance(vector, Tensor) and vector.dim() == 2:
            shaped(name, vector, "[B, C]", (batch, channels))
        else:
            shaped(name, vector, axes, (batch, rows, channels))
    one_device("x", x, **vectors)
