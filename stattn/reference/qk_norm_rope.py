"""RMSNorm of queries and keys and their 3-D rotary position embedding, in plain PyTorch.

    n = x / sqrt(mean(x^2) + eps) * weight       mean over one head, or over all heads of a token
    (a, b) -> (a cos - b sin, a sin + b cos)     for the pairs of features (2i, 2i+1), or (i, i + D/2)

The angle of each pair and token comes from the tables of ``stattn.rope``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stattn.reference._precision import wide
from stattn.rope import RopeTables


def token_angles(rope: RopeTables) -> tuple[Tensor, Tensor]:
    """Expand the axis tables to cos and sin [N, D/2] of every token; global ones have cos 1 and sin 0."""
    tables = (rope.t[:, :, None, None], rope.h[:, None, :, None], rope.w[:, None, None, :])
    video = torch.cat([table.expand(2, *rope.grid.shape, table.shape[-1]) for table in tables], dim=-1).flatten(1, 3)
    cos, sin = (
        F.pad(each, (0, 0, rope.before, rope.after), value=still) for each, still in zip(video, (1.0, 0.0), strict=True)
    )
    return cos, sin


def norm_rope(
    x: Tensor, weight: Tensor | None, rope: RopeTables | None, across_heads: bool, eps: float, interleaved: bool
) -> Tensor:
    """Normalise x [B, N, heads, D] by its root mean square and rotate it.

    weight [D], or [heads*D] with across_heads; None leaves the norm out. rope None leaves the rotation out.
    Computed in float32 (float64 when an input is), rounded once to x's dtype.
    """
    y = x.to(wide(x, weight), copy=True, memory_format=torch.contiguous_format)
    if weight is not None:
        dims = (-2, -1) if across_heads else (-1,)
        y = y * torch.rsqrt(y.square().mean(dims, keepdim=True) + eps)
        y = y * weight.to(y.dtype).reshape(x.shape[-2:] if across_heads else x.shape[-1:])
    if rope is not None:
        cos, sin = (each[:, None].to(y.dtype) for each in token_angles(rope))  # [N, 1, D/2]
        half = x.shape[-1] // 2
        a, b = (y[..., ::2], y[..., 1::2]) if interleaved else (y[..., :half], y[..., half:])
        a, b = a * cos - b * sin, a * sin + b * cos
        y = torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)
    return y.to(x.dtype)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: RopeTables | None,
    k_rope: RopeTables | None,
    across_heads: bool,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate queries and keys: ``norm_rope`` of each, with rope for q and k_rope for k."""
    return (
        norm_rope(q, q_weight, rope, across_heads, eps, interleaved),
        norm_rope(k, k_weight, k_rope, across_heads, eps, interleaved),
    )


def qk_norm_rope_(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: RopeTables | None,
    across_heads: bool,
    eps: float,
    interleaved: bool,
) -> None:
    """Write ``qk_norm_rope`` of q and k, two views of one buffer, in their place."""
    q.copy_(norm_rope(q, q_weight, rope, across_heads, eps, interleaved))
    k.copy_(norm_rope(k, k_weight, rope, across_heads, eps, interleaved))
