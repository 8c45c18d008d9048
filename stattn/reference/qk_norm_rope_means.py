"""``qk_norm_rope`` and the mean key of every tile, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from stattn.grid import Triple
from stattn.reference.qk_norm_rope import qk_norm_rope
from stattn.reference.select import tile_means
from stattn.rope import RopeTables


def qk_norm_rope_means(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: RopeTables,
    k_rope: RopeTables,
    across_heads: bool,
    eps: float,
    interleaved: bool,
    k_tile: Triple,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q', k' and the means of k' over the tiles of its video tokens, [B, kv_heads, tiles, D]; no gradient."""
    q, k = qk_norm_rope(q, k, q_weight, k_weight, rope, k_rope, across_heads, eps, interleaved)
    video = k.detach()[:, k_rope.before : k_rope.before + k_rope.grid.video]
    return q, k, tile_means(video, k_rope.grid, k_tile)
