"""Rows of q, k and v gathered for the attention of the reference, and its results put back.

On a CPU keys are copied box by box, which strided views serve as well as whole tensors; and tiles whose keys lie one
behind the other along an axis share a *slab*, in which the keys of each are contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from stattn.reference.walk import Box

SLAB_BYTES = 64 << 20  # of keys and values that are gathered for several tiles
LEAST_SHARED = 2048  # keys of a tile: with fewer, many tiles at once are computed faster than one after the other


class Slab(NamedTuple):
    """A box of rows, from its corner on, that is gathered once for several tiles."""

    box: Box
    corner: int


class Job(NamedTuple):
    """Query rows and the key rows they see, for some samples and heads at once.

    batch: samples. heads: query heads. q: int64 [tiles, rows]. k: int64 [tiles, keys].
    mask: booleans [rows, keys], None when all rows see all keys. Every row sees a key.
    boxes: how the first keys of each tile lie, where they lie in boxes. corners: int64 [tiles, boxes], their first row.
    slab: where the keys of the only tile are found, from its row ``first`` on, None where they are not shared.
    """

    batch: torch.Tensor
    heads: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    mask: torch.Tensor | None
    boxes: tuple[Box, ...] = ()
    corners: np.ndarray | None = None
    slab: Slab | None = None
    first: int = 0

    def tiles(self, part: slice) -> Job:
        """Give the job of some of the tiles."""
        corners = None if self.corners is None else self.corners[part]
        return self._replace(q=self.q[part], k=self.k[part], corners=corners)

    def placed(self) -> Iterator[tuple[int, slice, Box, int]]:
        """List what lies in boxes: the tile, which of its keys they are, their box and its first row."""
        end = 0
        for number, box in enumerate(self.boxes):
            assert self.corners is not None
            start, end = end, end + math.prod(box.sizes)
            for tile, corner in enumerate(self.corners[:, number].tolist()):
                yield tile, slice(start, end), box, corner

    def boxed(self) -> int:
        """Count the keys of a tile that lie in boxes; they come first."""
        return sum(math.prod(box.sizes) for box in self.boxes)


class Scratch:
    """Memory for gathered rows that is used again, for fresh pages cost as much as the copy; and the slab it holds."""

    def __init__(self) -> None:
        self._held = torch.empty(0)
        self.slab: Slab | None = None

    def space(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """Return a tensor in the place of the one returned last; with the same shape, it holds the same."""
        size = math.prod(shape)
        if self._held.numel() < size:
            self._held = like.new_empty(size)
        return self._held[:size].view(shape)


class _Place(NamedTuple):
    """A tile of a job whose keys reach from ``start`` to before ``end`` along the outermost axis of their box."""

    start: int
    end: int
    tile: int
    job: Job


def share(jobs: Iterator[Job], row_bytes: int) -> Iterator[Job]:
    """Give the same work, with slabs for tiles whose keys lie alike but for a shift along their outermost axis.

    row_bytes: what a row of keys and values takes per head.
    """
    columns: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[_Place]] = {}
    for job in jobs:
        outer = next((axis for box in job.boxes for axis in range(3) if box.sizes[axis] > 1), None)
        if outer is None or len(job.boxes) > 1 or job.k.shape[1] < LEAST_SHARED:
            yield job
            continue
        assert job.corners is not None
        sizes, steps = ((*each[outer:], 1, 1)[:3] for each in job.boxes[0])
        for tile, corner in enumerate(job.corners[:, 0].tolist()):
            start, place = divmod(corner, steps[0])
            columns.setdefault((place, sizes[1:], steps), []).append(_Place(start, start + sizes[0], tile, job))
    for (place, (m, n), steps), tiles in columns.items():
        per_head = m * n * row_bytes
        for run in _runs(sorted(tiles, key=lambda each: each[:2]), SLAB_BYTES // per_head):
            first, extent = run[0].start, max(each.end for each in run) - run[0].start
            box = Box((extent, m, n), (steps[0], steps[1], steps[2]))
            for heads in run[0].job.heads.split(max(1, SLAB_BYTES // (per_head * extent))):
                slab = Slab(box, first * steps[0] + place)
                for start, _, tile, job in run:
                    one = job.tiles(slice(tile, tile + 1))
                    yield one._replace(heads=heads, slab=slab, first=(start - first) * m * n)


def _runs(tiles: list[_Place], most: int) -> Iterator[list[_Place]]:
    """Split tiles in order of their start into runs without gaps that span no more than so much, one tile at least."""
    run, end = tiles[:1], tiles[0].end
    for each in tiles[1:]:
        if each.start > end or max(each.end, end) - run[0].start > most:
            yield run
            run, end = [], each.end
        run.append(each)
        end = max(each.end, end)
    yield run


def take(
    x: torch.Tensor, batch: torch.Tensor, rows: torch.Tensor, heads: torch.Tensor, scratch: Scratch | None = None
) -> torch.Tensor:
    """Gather rows of x [B, N, heads, D] as [samples * tiles, heads, rows, D]; a view where they lie together."""
    x = _pick(_pick(_pick(x, 0, batch), 2, heads), 1, rows.reshape(-1), scratch)
    return x.unflatten(1, rows.shape).flatten(0, 1).transpose(1, 2)


def take_keys(x: torch.Tensor, job: Job, heads: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Gather the keys of a job as ``take`` does, into scratch where they lie in boxes."""
    if job.slab is not None:
        box, corner = job.slab
        found = scratch.space((len(job.batch), math.prod(box.sizes), len(heads), x.shape[3]), x)
        if scratch.slab is not job.slab:
            found.unflatten(1, box.sizes).copy_(_view(_pick(_pick(x, 0, job.batch), 2, heads), box, corner))
            scratch.slab = job.slab
        return found[:, job.first : job.first + job.k.shape[1]].transpose(1, 2)
    scratch.slab = None
    if not job.boxes or _consecutive(job.k.reshape(-1)):
        return take(x, job.batch, job.k, heads, scratch)
    x = _pick(_pick(x, 0, job.batch), 2, heads)
    found = scratch.space((len(x), *job.k.shape, *x.shape[2:]), x)
    for tile, keys, box, corner in job.placed():
        found[:, tile, keys].unflatten(1, box.sizes).copy_(_view(x, box, corner))
    boxed = job.boxed()
    if boxed < job.k.shape[1]:
        found[:, :, boxed:] = x[:, job.k[:, boxed:]]
    return found.flatten(0, 1).transpose(1, 2)


def put(total: torch.Tensor, job: Job, part: torch.Tensor) -> None:
    """Write rows [samples * tiles, heads, rows, D] into total [B, N, heads, D]; each row is written once."""
    part = part.transpose(1, 2).reshape(len(job.batch), job.q.numel(), len(job.heads), -1).to(total.dtype)
    total[job.batch[:, None, None], job.q.reshape(-1)[:, None], job.heads] = part


def put_lse(total: torch.Tensor, job: Job, part: torch.Tensor) -> None:
    """Write the LSE [samples * tiles, heads, rows] of rows into total [B, heads, N]."""
    part = part.transpose(1, 2).reshape(len(job.batch), job.q.numel(), len(job.heads)).to(total.dtype)
    total.transpose(1, 2)[job.batch[:, None, None], job.q.reshape(-1)[:, None], job.heads] = part


def add(total: torch.Tensor, job: Job, part: torch.Tensor, rep: int) -> None:
    """Add key rows [samples * tiles, heads, keys, D] to total [B, N, kv heads, D], in the same order every time.

    rep: how many query heads share a key head.
    """
    part = part.transpose(1, 2).reshape(len(job.batch), job.k.numel(), len(job.heads), -1)
    rows, heads = job.k.reshape(-1), job.heads // rep
    if len(rows) == total.shape[1] and len(job.batch) == total.shape[0] and rep == 1 and len(heads) == total.shape[2]:
        if bool((rows == torch.arange(len(rows), device=rows.device)).all()):
            total += part
            return
    if job.boxes and rep == 1 and _consecutive(job.batch) and _consecutive(heads):
        total, part = _pick(_pick(total, 0, job.batch), 2, heads), part.unflatten(1, job.k.shape)
        for tile, keys, box, corner in job.placed():
            _view(total, box, corner).add_(part[:, tile, keys].unflatten(1, box.sizes))
        for tile, others in enumerate(job.k[:, job.boxed() :]):
            total.index_add_(1, others, part[:, tile, job.boxed() :])
        return
    if total.device.type == "cpu":  # index_put_ would add fp32 from several threads in any order
        flat = (job.batch[:, None, None] * total.shape[1] + rows[:, None]) * total.shape[2] + heads
        total.view(-1, total.shape[3]).index_add_(0, flat.reshape(-1), part.reshape(-1, total.shape[3]))
        return
    total.index_put_((job.batch[:, None, None], rows[:, None], heads), part, accumulate=True)


def _view(x: torch.Tensor, box: Box, corner: int) -> torch.Tensor:
    """View a box of rows of x [B, N, heads, D] as [B, *sizes, heads, D]."""
    samples, rows, heads, dim = x.stride()
    strides = (samples, *(rows * step for step in box.steps), heads, dim)
    return x.as_strided((x.shape[0], *box.sizes, *x.shape[2:]), strides, x.storage_offset() + corner * rows)


def _pick(x: torch.Tensor, dim: int, index: torch.Tensor, scratch: Scratch | None = None) -> torch.Tensor:
    if _consecutive(index):
        return x.narrow(dim, int(index[0]), len(index))
    if not x.is_contiguous():
        return x[(slice(None),) * dim + (index,)]  # index_select would copy row by row
    if scratch is None:
        return x.index_select(dim, index)
    return torch.index_select(x, dim, index, out=scratch.space((*x.shape[:dim], len(index), *x.shape[dim + 1 :]), x))


def _consecutive(index: torch.Tensor) -> bool:
    return int(index[-1]) - int(index[0]) == len(index) - 1 and bool((index.diff() == 1).all())
