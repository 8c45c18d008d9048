"""Gated residual connections: ``gate_residual``, and ``gate_residual_modulate`` with the norm that follows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stattn.ops import _validate
from stattn.ops._dispatch import Implementation, Operation
from stattn.ops.modulate import check_norm
from stattn.reference.gate import gate_residual as reference_residual
from stattn.reference.gate import gate_residual_modulate as reference_residual_modulate


class GateCall(NamedTuple):
    """What the choice of an implementation depends on. norm: None without the modulate that follows."""

    device: str
    dtype: torch.dtype
    channels: int
    norm: str | None


GATE_RESIDUAL = Operation("gate_residual", (Implementation("reference", lambda call: None, reference_residual),))
GATE_RESIDUAL_MODULATE = Operation(
    "gate_residual_modulate", (Implementation("reference", lambda call: None, reference_residual_modulate),)
)


def gate_residual(
    x: Tensor, y: Tensor, gate: Tensor | None, *, frames: int | None = None, impl: str = "auto"
) -> Tensor:
    """Add a gated branch to the residual stream: x + gate * y.

    x, y: [B, N, C]. gate: [B, C] per sample; [B, F, C] per frame, with frames=F and N % F == 0; [B, N, C] per token;
    or None for 1. Each tensor may have its own floating-point dtype. impl: see ``stattn.explain``.

    Returns [B, N, C] in x's dtype. Computed in float32 (float64 when an input is), rounded once. Differentiable in
    every tensor.
    Raises ValueError or TypeError for wrong shapes, dtypes, devices or frames. Follows adaLN-zero of DiT
    (arXiv:2212.09748).
    """
    x, y = _check_residual(x, y)
    _validate.per_token(x, frames, gate=gate)
    call = GateCall(x.device.type, x.dtype, x.shape[-1], None)
    return GATE_RESIDUAL.choose(impl, call).run(x, y, gate)


def gate_residual_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    frames: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream and modulate the sum: x' = x + gate * y, then ``modulate`` of x'.

    Arguments as in ``gate_residual`` and ``modulate``; frames describes every [B, F, C] among gate, scale and shift.

    Returns (x', modulated x'), both [B, N, C] in x's dtype. Computed in float32 (float64 when an input is). x' is
    rounded to x's dtype and the norm reads the rounded x'; the modulated x' is rounded once: the pair equals
    gate_residual followed by modulate.
    Differentiable in every tensor. Raises ValueError or TypeError for wrong shapes, dtypes, devices, norm, eps or
    frames.
    """
    x, y = _check_residual(x, y)
    _validate.per_token(x, frames, gate=gate, scale=scale, shift=shift)
    eps = check_norm(x, norm, weight, bias, eps)
    call = GateCall(x.device.type, x.dtype, x.shape[-1], norm)
    return GATE_RESIDUAL_MODULATE.choose(impl, call).run(x, y, gate, scale, shift, norm, weight, bias, eps)


def _check_residual(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = _validate.tensor("x", x, "[B, N, C]")
    y = _validate.shaped("y", y, "[B, N, C]", tuple(x.shape))
    _validate.one_device("x", x, y=y)
    return x, y
