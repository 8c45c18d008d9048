"""Adaptive layer norm: ``modulate``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stattn.ops import _validate
from stattn.ops._dispatch import Implementation, Operation
from stattn.reference.modulate import modulate as reference

NORMS = ("layer", "rms")


class ModulateCall(NamedTuple):
    """What the choice of an implementation depends on."""

    device: str
    dtype: torch.dtype
    channels: int
    norm: str


MODULATE = Operation("modulate", (Implementation("reference", lambda call: None, reference),))


def modulate(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    frames: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Normalise tokens over their channels, then scale and shift them: norm(x) * (1 + scale) + shift.

    x: [B, N, C]. scale, shift: [B, C] per sample; [B, F, C] per frame, with frames=F and the tokens of a frame
    contiguous (N % F == 0); [B, N, C] per token; or None to leave the factor or the term out. The two may differ in
    kind. norm: "layer" (mean and variance) or "rms" (root mean square). weight, bias: [C], applied to the norm's
    result. eps: added to the variance or mean square. Any of these tensors may have its own floating-point dtype.
    impl: see ``stattn.explain``.

    Returns [B, N, C] in x's dtype. Everything is computed in float32 (float64 when an input is), rounded once at the
    end.
    Differentiable in every tensor. Raises ValueError or TypeError for wrong shapes, dtypes, devices, norm, eps or
    frames.
    Follows adaLN of DiT (arXiv:2212.09748); RMSNorm is arXiv:1910.07467.
    """
    x = _validate.tensor("x", x, "[B, N, C]")
    _validate.per_token(x, frames, scale=scale, shift=shift)
    eps = check_norm(x, norm, weight, bias, eps)
    call = ModulateCall(x.device.type, x.dtype, x.shape[-1], norm)
    return MODULATE.choose(impl, call).run(x, scale, shift, norm, weight, bias, eps)


def check_norm(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> float:
    """Check the arguments of the norm of x [B, N, C] and return eps."""
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} must be 'layer' or 'rms'")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            _validate.shaped(name, vector, "[C]", (x.shape[-1],))
    _validate.one_device("x", x, weight=weight, bias=bias)
    return _validate.epsilon(eps)
