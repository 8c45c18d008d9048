"""Video to tokens and back: ``patchify3d`` and ``unpatchify3d``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stattn.grid import Grid, as_grid, is_int
from stattn.ops import _validate
from stattn.ops._dispatch import Implementation, Operation
from stattn.reference.patchify import patchify3d as reference_patchify
from stattn.reference.patchify import unpatchify3d as reference_unpatchify


class PatchifyCall(NamedTuple):
    """What the choice of an implementation depends on."""

    device: str
    dtype: torch.dtype
    channels: int
    patch: tuple[int, int, int]


PATCHIFY = Operation("patchify3d", (Implementation("reference", lambda call: None, reference_patchify),))
UNPATCHIFY = Operation("unpatchify3d", (Implementation("reference", lambda call: None, reference_unpatchify),))


def patchify3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos: Tensor | None = None,
    *,
    pad: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Project each patch of a video to a token: patch . weight + bias + pos.

    x: [B, C, T, H, W]. weight: [E, C, pt, ph, pw], the weight of an ``nn.Conv3d`` whose stride is its kernel,
    unchanged; bias: [E]; x and weight of one floating-point dtype. pos: [N, E], added to every sample. pad: let the
    last patches read zeros beyond the end of an axis that pt, ph or pw does not divide. impl: see ``stattn.explain``.

    Returns tokens [B, N, E] in x's dtype, N = t*h*w in (t, h, w) order. Products and sums are float32 (float64 for
    float64 inputs); the token is rounded once, after bias and pos. Differentiable in every tensor.
    Raises ValueError for an axis that the patch does not divide without ``pad``, or wrong shapes; TypeError for wrong
    dtypes. Equals the non-overlapping convolution of ViT (arXiv:2010.11929) on three axes.
    """
    x = _validate.tensor("x", x, "[B, C, T, H, W]")
    weight = _validate.tensor("weight", weight, "[E, C, pt, ph, pw]")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight of {weight.dtype} must have the dtype of x, {x.dtype}")
    patch = _validate.triple("patch (the last three axes of weight)", tuple(weight.shape[2:]))
    features, channels = weight.shape[:2]
    if channels != x.shape[1]:
        raise ValueError(f"weight of shape {tuple(weight.shape)} reads {channels} channels, x has {x.shape[1]}")
    if not _validate.flag("pad", pad):
        for name, size, p in zip("THW", x.shape[2:], patch, strict=True):
            if size % p:
                raise ValueError(f"x: {name}={size} is not a multiple of the patch's {p}; pad=True pads it with zeros")
    if bias is not None:
        _validate.shaped("bias", bias, "[E]", (features,))
    if pos is not None:
        tokens = 1
        for size, p in zip(x.shape[2:], patch, strict=True):
            tokens *= -(-size // p)
        _validate.shaped("pos", pos, "[N, E]", (tokens, features))
    _validate.one_device("x", x, weight=weight, bias=bias, pos=pos)
    call = PatchifyCall(x.device.type, x.dtype, channels, patch)
    return PATCHIFY.choose(impl, call).run(x, weight, bias, pos)


def unpatchify3d(
    tokens: Tensor,
    grid: Grid | tuple[int, int, int],
    patch: tuple[int, int, int],
    channels: int,
    *,
    size: tuple[int, int, int] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Lay the patches that tokens hold out as a video: the inverse of patchify3d's gather.

    tokens: [B, N, pt*ph*pw*C] of any dtype, features ordered (pt, ph, pw, C) as the final layer of DiT, Wan and
    HunyuanVideo writes them. grid: (t, h, w), N = t*h*w, or a Grid, whose global tokens are skipped. patch: (pt, ph,
    pw). channels: C. size: (T, H, W) of the result, when padding is to be cut from the last patches.

    Returns [B, C, T, H, W], by default [B, C, t*pt, h*ph, w*pw], contiguous. Values are moved, none is rounded.
    Differentiable.
    Raises ValueError when the tokens do not fit the grid, patch and channels, or when size does not end in the last
    patch.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens of type {type(tokens).__name__} must be a tensor [B, N, pt*ph*pw*C]")
    grid, patch = as_grid(grid), _validate.triple("patch", patch)
    if not is_int(channels) or channels < 1:
        raise ValueError(f"channels={channels!r} must be a positive integer")
    features = patch[0] * patch[1] * patch[2] * channels
    if tokens.dim() != 3 or tuple(tokens.shape[1:]) != (grid.tokens, features):
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)} must be [B, N, pt*ph*pw*C] = (B, {grid.tokens}, {features}) "
            f"for {grid}, patch={patch} and channels={channels}"
        )
    full = (grid.t * patch[0], grid.h * patch[1], grid.w * patch[2])
    size = full if size is None else _validate.triple("size", size)
    if any(not most - p < each <= most for each, most, p in zip(size, full, patch, strict=True)):
        raise ValueError(f"size={size} must end in the last patch: the grid {grid.shape} of patches {patch} has {full}")
    call = PatchifyCall(tokens.device.type, tokens.dtype, channels, patch)
    return UNPATCHIFY.choose(impl, call).run(tokens, grid.shape, grid.before, patch, channels, size)
