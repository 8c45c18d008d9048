"""Which key tiles each query tile should visit, from the products of their mean vectors, in plain PyTorch."""

from __future__ import annotations

import torch

from stattn.blocks import tile_count, tile_of
from stattn.grid import Grid, Triple
from stattn.masks import EMPTY, FULL


def tile_means(x: torch.Tensor, grid: Grid, tile: Triple) -> torch.Tensor:
    """Average the video tokens of each tile. x: [B, T*H*W, heads, D] -> [B, heads, tiles, D], fp32 (fp64 for fp64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    owner = tile_of(grid, tile, x.device)
    tiles = tile_count(grid.shape, tile)
    sums = x.new_zeros((x.shape[0], tiles, *x.shape[2:]), dtype=wide).index_add_(1, owner, x.to(wide))
    sizes = torch.bincount(owner, minlength=tiles).to(wide)
    return (sums / sizes[:, None, None]).transpose(1, 2)


def scores(
    q: torch.Tensor,
    k: torch.Tensor,
    grid: Grid,
    q_tile: Triple,
    k_tile: Triple,
    scale: float,
    k_means: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score every pair of tiles: scale * mean(q) . mean(k). [B, heads, q tiles, k tiles]. k_means: made before."""
    q_means = tile_means(q, grid, q_tile)
    k_means = tile_means(k, grid, k_tile) if k_means is None else k_means
    k_means = k_means.repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    return scale * q_means @ k_means.transpose(-1, -2)


def top_k(table: torch.Tensor, keep: int) -> torch.Tensor:
    """Mark the ``keep`` best key tiles of each row as FULL, the rest as EMPTY; the lower tile wins a tie."""
    chosen = table.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    kinds = torch.full(table.shape, EMPTY, dtype=torch.int8, device=table.device)
    return kinds.scatter_(-1, chosen, FULL)


def top_p(table: torch.Tensor, mass: float) -> torch.Tensor:
    """Mark the fewest key tiles whose softmax weights reach ``mass`` as FULL, at least one; the lower one wins ties."""
    weights, order = table.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = weights.cumsum(-1) - weights
    chosen = (before < mass) | (mass == 1)  # rounded sums may reach 1 before the last tile
    chosen[..., 0] = True
    kinds = torch.full(table.shape, EMPTY, dtype=torch.int8, device=table.device)
    return kinds.scatter_(-1, order, torch.where(chosen, FULL, EMPTY).to(torch.int8))
