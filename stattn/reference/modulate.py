"""Normalise tokens, then scale and shift them, in plain PyTorch.

layer:  n = (x - mean(x)) / sqrt(var(x) + eps)     rms:  n = x / sqrt(mean(x^2) + eps)
y = (n * weight + bias) * (1 + scale) + shift      mean and var over the channels of one token
"""

from __future__ import annotations

import torch
from torch import Tensor

from stattn.reference._precision import wide


def spread(vector: Tensor, tokens: int) -> Tensor:
    """Let vectors per sample [B, C], per group of tokens [B, G, C] or per token [B, N, C] broadcast over [B, N, C]."""
    if vector.dim() == 2:
        return vector.unsqueeze(1)
    groups = vector.shape[1]
    if groups == tokens:
        return vector
    return vector.unsqueeze(2).expand(-1, -1, tokens // groups, -1).flatten(1, 2)


def modulate(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalise each token of x [B, N, C] over its channels, then scale and shift it.

    norm "layer" or "rms"; scale, shift [B, C], [B, G, C] with N % G == 0, or [B, N, C]; weight, bias [C]; None leaves
    a factor or a term out. Computed in float32 (float64 when an input is), rounded once to x's dtype.
    """
    dtype = wide(x, scale, shift, weight, bias)
    y = x.to(dtype).contiguous()  # the order of a sum follows the strides: a result must not
    if norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    if scale is not None:
        y = y * (1 + spread(scale.to(dtype), x.shape[1]))
    if shift is not None:
        y = y + spread(shift.to(dtype), x.shape[1])
    return y.to(x.dtype)
