"""Layers for ``kernelize`` of Hugging Face's kernels: forward passes over what a model's own layers hold.

A class of the model whose ``forward`` has the same arguments is marked by ``@use_kernel_forward_from_hub`` with one of
these names, and keeps its parameters, its attributes and its own forward pass for other devices. Here is no state.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from stattn import masks
from stattn.masks import Mask
from stattn.ops.attention import attention
from stattn.ops.gate import gate_residual
from stattn.ops.modulate import modulate
from stattn.ops.patchify import patchify3d

_parsed = lru_cache(maxsize=64)(masks.parse)


@torch.compiler.assume_constant_result
def _mask(text: str) -> Mask:
    return _parsed(text)


class SpaceTimeAttention(nn.Module):
    """Attend under ``self.mask``, which is text: "sliding_tile((3, 8, 8), (3, 2, 3))", say."""

    can_torch_compile = True
    has_backward = True
    mask: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Return [B, T*H*W, heads, D], as q, k and v are; grid: (T, H, W)."""
        return attention(q, k, v, grid, _mask(self.mask))


class ModulatedLayerNorm(nn.Module):
    """LayerNorm of x [B, N, C] with ``self.eps`` and without parameters, then * (1 + scale) + shift, rounded once."""

    can_torch_compile = True
    has_backward = True
    eps: float

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Return [B, N, C]; scale, shift: [B, C], or per token [B, N, C]."""
        return modulate(x, scale, shift, eps=self.eps)


class GatedResidual(nn.Module):
    """x + gate * y, rounded once."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """Return [B, N, C] of x and y [B, N, C]; gate: [B, C], or per token [B, N, C]."""
        return gate_residual(x, y, gate)


class Patchify3D(nn.Module):
    """Embed patches as a Conv3d with ``self.weight`` and ``self.bias`` does whose stride is its kernel's size."""

    can_torch_compile = True
    has_backward = True
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [B, N, C] in (t, h, w) order from a video [B, channels, T, H, W]."""
        return patchify3d(x, self.weight, self.bias)
