"""Block lists from the tokens themselves: top-k and top-p selection of key tiles."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from stattn.blocks import BlockList, block_list, tile_count
from stattn.grid import Grid, Triple, as_grid, check_triple, is_int
from stattn.ops import _validate
from stattn.ops._dispatch import Implementation, Operation
from stattn.reference import select as reference


class SelectCall(NamedTuple):
    """The metadata by which implementations say whether they serve a call."""

    device: str
    dtype: torch.dtype
    head_dim: int


OPERATION = Operation("select", (Implementation("reference", lambda call: None, reference.scores),))


def top_k(
    q: torch.Tensor,
    k: torch.Tensor,
    grid: Grid | Triple,
    q_tile: Triple,
    k_tile: Triple,
    keep: int,
    *,
    impl: str = "auto",
) -> BlockList:
    """Choose for each query tile the ``keep`` key tiles with the greatest product of mean vectors.

    q: [B, N, heads, D]. k: [B, N, key heads, D]; N counts the video tokens, with the grid's global tokens or without.
    q_tile, k_tile: tile extents (t, h, w) in tokens. keep: key tiles per query tile, at most their number.

    Means and scores are fp32 (fp64 for fp64); the lower tile wins a tie. Lists are made on q's device, without a word
    to the host, and in ascending order. Not differentiable: selection has no gradient. Raises TypeError or ValueError.
    """
    grid, q, k = _check(q, k, grid, q_tile, k_tile)
    tiles = tile_count(grid.shape, k_tile)
    if not is_int(keep):
        raise TypeError(f"keep={keep!r} must be an integer")
    if not 1 <= keep <= tiles:
        raise ValueError(f"keep={keep} must be between 1 and the {tiles} key tiles")
    table = _scores(q, k, grid, q_tile, k_tile, impl)
    return block_list(grid.shape, q_tile, k_tile, reference.top_k(table, keep), most=keep)


def top_p(
    q: torch.Tensor,
    k: torch.Tensor,
    grid: Grid | Triple,
    q_tile: Triple,
    k_tile: Triple,
    mass: float,
    *,
    impl: str = "auto",
) -> BlockList:
    """Choose for each query tile the fewest key tiles that hold ``mass`` of the softmax over tiles.

    Scores are those of ``top_k`` with scale 1/sqrt(D). mass: in (0, 1]. At least one tile is kept. Otherwise as
    ``top_k``. Follows the selection of NABLA (Mikhailov et al., arXiv:2507.13546).
    """
    grid, q, k = _check(q, k, grid, q_tile, k_tile)
    if not 0 < _validate.number("mass", mass) <= 1:
        raise ValueError(f"mass={mass!r} must be in (0, 1]")
    table = _scores(q, k, grid, q_tile, k_tile, impl)
    return block_list(grid.shape, q_tile, k_tile, reference.top_p(table, mass))


def _scores(q: torch.Tensor, k: torch.Tensor, grid: Grid, q_tile: Triple, k_tile: Triple, impl: str) -> torch.Tensor:
    chosen = OPERATION.choose(impl, SelectCall(q.device.type, q.dtype, q.shape[3]))
    with torch.no_grad():
        return chosen.run(q, k, grid, q_tile, k_tile, 1.0 / math.sqrt(q.shape[3]))


def _check(
    q: torch.Tensor, k: torch.Tensor, grid: Grid | Triple, q_tile: Triple, k_tile: Triple
) -> tuple[Grid, torch.Tensor, torch.Tensor]:
    """Check the arguments and leave the global tokens out."""
    grid = as_grid(grid)
    check_triple("q_tile", q_tile)
    check_triple("k_tile", k_tile)
    video = []
    for name, x in (("q", q), ("k", k)):
        _validate.tensor(name, x, "[B, N, heads, D]")
        if x.shape[1] not in (grid.video, grid.tokens):
            raise ValueError(
                f"{name} has {x.shape[1]} tokens, grid {grid.shape} has {grid.video} (with global ones {grid.tokens})"
            )
        video.append(x[:, grid.before : grid.before + grid.video] if x.shape[1] == grid.tokens else x)
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"k has shape {tuple(k.shape)}, q {tuple(q.shape)}: batch and D must be equal, heads divide")
    if k.dtype != q.dtype:
        raise TypeError(f"k has dtype {k.dtype}, q {q.dtype}: they must be equal")
    _validate.one_device("q", q, k=k)
    return grid, video[0], video[1]
