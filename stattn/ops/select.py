"""Block lists from the tokens themselves: top-k and top-p selection of key tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from stattn.blocks import BlockList, block_list, tile_count
from stattn.grid import Grid, Triple, as_grid, check_triple, is_int
from stattn.ops import _triton, _validate
from stattn.ops._dispatch import Implementation, Operation, device_of, serves_all
from stattn.reference import select as reference


class SelectCall(NamedTuple):
    """The metadata by which implementations say whether they serve a call."""

    device: str
    capability: tuple[int, int]
    dtype: torch.dtype
    head_dim: int
    k_tiles: int = 1


Lists = tuple[torch.Tensor, torch.Tensor]  # count and index of a BlockList
MOST_TILES = 2**14  # as kernels/select.py says; it is not imported before it is needed
AT_ONCE = 2**24  # pairs of tiles that the reference sorts at a time


def _reference(
    q: torch.Tensor,
    k: torch.Tensor,
    shape: Triple,
    q_tile: Triple,
    k_tile: Triple,
    keep: int,
    mass: float,
    k_means: torch.Tensor | None,
) -> Lists:
    # Top-k takes the products as they are: a scale would only round what ties into what does not.
    scale = 1.0 if keep else 1.0 / math.sqrt(q.shape[3])
    table = reference.scores(q, k, Grid(*shape), q_tile, k_tile, scale, k_means)
    count = torch.empty(table.shape[:3], dtype=torch.int32, device=q.device)
    index = torch.empty((*table.shape[:3], keep or table.shape[3]), dtype=torch.int32, device=q.device)
    heads = max(1, AT_ONCE // max(1, table.shape[2] * table.shape[3]))
    for scores, counts, indices in zip(*(x.flatten(0, 1).split(heads) for x in (table, count, index)), strict=True):
        kinds = reference.top_k(scores, keep) if keep else reference.top_p(scores, mass)
        lists = block_list(shape, q_tile, k_tile, kinds[None], most=keep or None)
        counts.copy_(lists.count[0])
        indices.copy_(lists.index[0])
    return count, index


def _triton_why_not(call: SelectCall) -> str | None:
    reason = _triton.why_not(call.device, call.capability, call.dtype)
    if reason is None and call.k_tiles > MOST_TILES:
        reason = f"selects from at most {MOST_TILES} key tiles, not {call.k_tiles}"
    return reason


def _triton_run(
    q: torch.Tensor,
    k: torch.Tensor,
    shape: Triple,
    q_tile: Triple,
    k_tile: Triple,
    keep: int,
    mass: float,
    k_means: torch.Tensor | None,
) -> Lists:
    from stattn.kernels import select

    return select.select(q, k, shape, q_tile, k_tile, keep or None, None if keep else mass, k_means=k_means)


OPERATION = Operation(
    "select",
    (
        Implementation("triton", _triton_why_not, _triton_run),
        Implementation("reference", serves_all, _reference),
    ),
)


def top_k(
    q: torch.Tensor,
    k: torch.Tensor,
    grid: Grid | Triple,
    q_tile: Triple,
    k_tile: Triple,
    keep: int,
    *,
    k_means: torch.Tensor | None = None,
    impl: str = "auto",
) -> BlockList:
    """Choose for each query tile the ``keep`` key tiles that score highest: dot products of mean queries and keys.

    q: [B, N, heads, D]. k: [B, N, key heads, D]; N counts the video tokens, with the grid's global tokens or without.
    q_tile, k_tile: tile extents (t, h, w) in tokens. keep: key tiles per query tile, at most their number. k_means:
    [B, key heads, key tiles, D], the means of k's tiles if you have them (``qk_norm_rope_means``); k is then not read.

    Returns a BlockList for ``attention``, made on q's device without waiting for it, its tiles in ascending order.
    Means and scores are fp32 (fp64 for fp64); the lower tile wins a tie. Not differentiable: selection has no gradient.
    Raises TypeError or ValueError naming the argument that does not fit.
    """
    grid, q, k = _check(q, k, grid, q_tile, k_tile)
    tiles = tile_count(grid.shape, k_tile)
    if not is_int(keep):
        raise TypeError(f"keep={keep!r} must be an integer")
    if not 1 <= keep <= tiles:
        raise ValueError(f"keep={keep} must be between 1 and the {tiles} key tiles")
    return _select(q, k, grid, q_tile, k_tile, int(keep), 0.0, k_means, impl)


def top_p(
    q: torch.Tensor,
    k: torch.Tensor,
    grid: Grid | Triple,
    q_tile: Triple,
    k_tile: Triple,
    mass: float,
    *,
    k_means: torch.Tensor | None = None,
    impl: str = "auto",
) -> BlockList:
    """Choose for each query tile the fewest key tiles that hold a share ``mass`` of the softmax over tiles.

    mass: in (0, 1]. Scores are those of ``top_k`` times 1/sqrt(D). At least one tile is kept. Otherwise as ``top_k``.
    Follows the selection of NABLA (Mikhailov et al., arXiv:2507.13546).
    """
    grid, q, k = _check(q, k, grid, q_tile, k_tile)
    share = _validate.number("mass", mass)
    if not 0 < share <= 1:
        raise ValueError(f"mass={mass!r} must be in (0, 1]")
    return _select(q, k, grid, q_tile, k_tile, 0, share, k_means, impl)


def _select(
    q: torch.Tensor,
    k: torch.Tensor,
    grid: Grid,
    q_tile: Triple,
    k_tile: Triple,
    keep: int,
    mass: float,
    k_means: torch.Tensor | None,
    impl: str,
) -> BlockList:
    if k_means is not None:
        shape = (k.shape[0], k.shape[2], tile_count(grid.shape, k_tile), k.shape[3])
        _validate.shaped("k_means", k_means, "[B, key heads, key tiles, D]", shape)
        wide = torch.promote_types(k.dtype, torch.float32)
        if k_means.dtype != wide:
            raise TypeError(f"k_means of {k_means.dtype} must be {wide}")
        _validate.one_device("q", q, k_means=k_means)
        k_means = k_means.detach()
    chosen = OPERATION.choose(impl, _call(q, grid.shape, k_tile))
    sizes = (list(grid.shape), list(q_tile), list(k_tile), keep, mass, k_means, chosen.name)
    count, index = torch.ops.stattn.select(q.detach(), k.detach(), *sizes)
    return BlockList(grid.shape, q_tile, k_tile, count, index)


def _call(q: torch.Tensor, shape: Triple, k_tile: Triple) -> SelectCall:
    return SelectCall(*device_of(q), q.dtype, q.shape[3], tile_count(shape, k_tile))


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
    if q.shape[3] < 1:
        raise ValueError(f"q has head dimension {q.shape[3]}, expected at least 1")
    if k.dtype != q.dtype:
        raise TypeError(f"k has dtype {k.dtype}, q {q.dtype}: they must be equal")
    _validate.one_device("q", q, k=k)
    return grid, video[0], video[1]


# torch.library.

_LIBRARY = torch.library.Library("stattn", "FRAGMENT")
_LIBRARY.define(
    "select(Tensor q, Tensor k, SymInt[] shape, SymInt[] q_tile, SymInt[] k_tile, SymInt keep, float mass, "
    "Tensor? k_means, str impl) -> (Tensor, Tensor)"
)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    shape: Sequence[int],
    q_tile: Sequence[int],
    k_tile: Sequence[int],
    keep: int,
    mass: float,
    k_means: torch.Tensor | None,
    impl: str,
) -> Lists:
    sizes = [_validate.unpack(each) for each in (shape, q_tile, k_tile)]
    return OPERATION.choose(impl, _call(q, sizes[0], sizes[2])).run(q, k, *sizes, keep, mass, k_means)


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    shape: Sequence[int],
    q_tile: Sequence[int],
    k_tile: Sequence[int],
    keep: int,
    mass: float,
    k_means: torch.Tensor | None,
    impl: str,
) -> Lists:
    q_tiles, k_tiles = (tile_count(_validate.unpack(shape), _validate.unpack(each)) for each in (q_tile, k_tile))
    size = (q.shape[0], q.shape[2], q_tiles)
    return q.new_empty(size, dtype=torch.int32), q.new_empty((*size, keep or k_tiles), dtype=torch.int32)


_LIBRARY.impl("select", _run, "CompositeExplicitAutograd")
_LIBRARY.impl("select", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("stattn::select", _fake, lib=_LIBRARY)
