"""Gated residual connections, alone or with the modulated norm that follows, in plain PyTorch: x' = x + gate * y."""

from __future__ import annotations

from torch import Tensor

from stattn.reference._precision import wide
from stattn.reference.modulate import modulate, spread


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """Add gate * y to x. x, y [B, N, C]; gate [B, C], [B, G, C] with N % G == 0, [B, N, C], or None for 1.

    Computed in float32 (float64 when an input is), rounded once to x's dtype.
    """
    dtype = wide(x, y, gate)
    update = y.to(dtype)
    if gate is not None:
        update = spread(gate.to(dtype), x.shape[1]) * update
    return (x.to(dtype) + update).to(x.dtype)


def gate_residual_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return x' = x + gate * y and modulate(x').

    Computed in float32 (float64 when an input is). x' is rounded to x's dtype, and the norm reads the rounded x': the
    pair equals gate_residual followed by modulate.
    """
    residual = gate_residual(x, y, gate)
    return residual, modulate(residual, scale, shift, norm, weight, bias, eps)
