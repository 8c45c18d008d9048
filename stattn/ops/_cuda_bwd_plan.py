"""Plans for dK and dV: which boxes of queries each tile of keys visits, and which queries of a box see each key.

They are made as those of the forward are, of masks turned round. Their layout is that of csrc/attention_bwd.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from stattn import plan
from stattn.ops import _cuda_plan
from stattn.ops._cuda_mask_table import MaskTable
from stattn.ops._cuda_plan import (
    AFTER,
    BEFORE,
    Line,
    _as_wide,
    _Entries,
    _geometry,
    _product_boxes,
)
from stattn.ops._cuda_tiles import (
    AXES,
    ROWS,
    Tiling,
    choose,
    common_steps,
    product_of,
    rows_of,
    tile_counts,
)
from stattn.problem import Problem
from stattn.tables import Product, whole

COLUMNS = 3  # tiles of keys that follow each other lie in columns of so many by so many in (h, w)
LONG = 4  # a list of so many times the mean is cut into pieces
SHORTEST = 256  # boxes of a list that is cut


@lru_cache(maxsize=512)
def why_not(problem: Problem) -> str | None:
    """Say what in the masks of a problem cannot be planned, or None."""
    masks = tuple(dict.fromkeys(problem.masks))
    reason = _cuda_plan.why_not(problem)
    if reason is not None:
        return reason
    _, _, products = _geometry(problem, masks)
    steps = common_steps([plan.transposed(each) for each in products])
    if steps is None:
        return f"mask {masks[0]}{' and others are' if len(masks) > 1 else ' is'} dilated in several ways for its keys"
    if steps[2] > 8:
        return f"mask {masks[0]} is dilated by {steps[2]} on its last axis, and the backward serves at most 8"
    return None


@lru_cache(maxsize=128)
def layout(problem: Problem, heads: int, head_dim: int) -> tuple[int, list[int], np.ndarray]:
    """Plan a problem: the kernel's configuration, its integers (AttentionPlan in csrc/stattn.h), the plan's array."""
    masks = tuple(dict.fromkeys(problem.masks))
    of_head = [masks.index(mask) for mask in problem.masks] if len(problem.masks) > 1 else [0] * heads
    q_box, k_box, products = _geometry(problem, masks)
    turned = [[plan.transposed([part]) for part in each] for each in products]
    tiling = choose(k_box, q_box, [list(chain.from_iterable(each)) for each in turned], head_dim, "kv")
    line = Line(
        problem.grid.before, problem.grid.after, q_box.video, problem.q_globals, problem.globals_see, valid=False
    )
    encoded = encode(tiling, turned, of_head, line)
    integers = [*q_box.extent, *k_box.extent, *tiling.slab, *tiling.box, *tiling.steps, tiling.stacked]
    integers += [encoded.tiles, line.before, line.after, int(line.queries), encoded.line_tiles, encoded.line_record]
    return tiling.config.number, [*integers, encoded.pieces, encoded.split_tiles, encoded.split_record], encoded.array


def boxes_lie_apart(problem: Problem, heads: int, head_dim: int) -> bool:
    """Say whether all boxes of queries of a plan begin at multiples of their extents, with no steps between rows."""
    _, integers, array = layout(problem, heads, head_dim)
    records, extents = array.reshape(-1, 4), np.array([*integers[9:12], 1])
    if any(step > 1 for step in integers[12:15]):
        return False
    tiles, line_tiles, line_record = integers[16], integers[20], integers[21]
    lists = [records[first : first + 2 * tiles : 2] for first in {*array[:heads] + 1}]
    for first, boxes, _, _ in np.concatenate([*lists, records[line_record + 1 : line_record + 2 * line_tiles : 2]]):
        found = records[first : first + boxes]
        in_video = found[:, 3] == 0
        if (found[in_video] % extents).any() or (found[~in_video, 2] % extents.prod()).any():
            return False
    return True


@lru_cache(maxsize=1024)  # captured graphs go on reading plans: few are ever given up
def on_device(problem: Problem, heads: int, head_dim: int, device: torch.device) -> tuple[int, list[int], torch.Tensor]:
    """Give the plan of a problem with its array on a device, copied there once."""
    number, integers, array = layout(problem, heads, head_dim)
    return number, integers, torch.from_numpy(array).to(device)


# The plan's array.


class Encoded(NamedTuple):
    """A plan's array, and its numbers as AttentionPlan names them."""

    array: np.ndarray
    tiles: int
    line_tiles: int
    line_record: int
    pieces: int
    split_tiles: int
    split_record: int


def encode(
    tiling: Tiling, products: Sequence[Sequence[Sequence[Product]]], of_head: Sequence[int], line: Line
) -> Encoded:
    """Lay a plan out as int32. products: of each mask, by its parts, those by key. of_head: the mask of each head."""
    table = MaskTable(tiling)
    corners = _video_corners(tiling)
    places = np.indices(tile_counts(tiling.q_box, tiling.steps, tiling.tile)).reshape(3, -1)
    lists = [_Boxes.of(_video_entries(tiling, each, table, places, line)) for each in products]
    line_corners = _line_corners(tiling, line)
    lists.append(_Boxes.of(_line_entries(tiling, table, len(line_corners), line)))

    counts = [each.counts(len(corners)) for each in lists[:-1]]
    longest = np.max(counts, axis=0, initial=0)
    line_counts = lists[-1].counts(len(line_corners))
    mean = float(np.mean(counts)) if counts and len(corners) else 0.0
    limit = max(SHORTEST, int(LONG * mean) // 2)
    parts, line_parts = (np.where(n > 2 * limit, -(-n // limit), 1) for n in (longest, line_counts))

    order = _compact_order(places)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    video = _Split(corners[order], parts[order], 0)
    lines = _Split(line_corners, line_parts, video.pieces)
    lists = [each.cut(rank, video) for each in lists[:-1]] + [lists[-1].cut(np.arange(len(line_corners)), lines)]
    splits = np.concatenate([video.table(), lines.table()])

    groups, numbers = table.combine(_as_wide([each.masks[each.masked] for each in lists]))
    records = np.concatenate([groups.reshape(-1), np.zeros(-groups.size % 4, np.int32)]).reshape(-1, 4)
    head_records = -(-len(of_head) // (4 * ROWS)) * ROWS  # groups of masks begin at multiples of their size
    found = [np.zeros((head_records, 4), np.int32), records, splits]
    split_record = head_records + len(records)
    start = split_record + len(splits)
    first_group = head_records * 4 // (groups.shape[2] * ROWS)
    offsets = []
    for each, mine in zip(lists, numbers, strict=True):
        offsets.append(start)
        found.append(each.records(lines if each is lists[-1] else video, start, mine + first_group))
        start += len(found[-1])
    if start * 4 >= 1 << 31:
        raise ValueError(f"a plan of {start} records of 16 bytes is too large")
    array = np.concatenate(found).astype(np.int32).reshape(-1)
    array[: len(of_head)] = np.array(offsets, np.int32)[list(of_head)]
    split_tiles = len(splits) // 2
    return Encoded(array, len(video.corners), len(lines.corners), offsets[-1], lines.last, split_tiles, split_record)


def _video_corners(tiling: Tiling) -> np.ndarray:
    """Give the first record of each tile of the video: [tiles, 4], row-major."""
    counts = tile_counts(tiling.q_box, tiling.steps, tiling.tile)
    places = np.indices(counts).reshape(3, -1)
    corners = []
    for axis in AXES:
        stop = tiling.q_box.origin[axis] + tiling.q_box.extent[axis]
        rows = rows_of(tiling.q_box, tiling.k_box, tiling.steps, whole(stop), axis, tiling.tile[axis])
        corners.append(rows.corner[places[axis]])
    return np.stack([*corners, 0 * corners[0]], 1)


def _line_corners(tiling: Tiling, line: Line) -> np.ndarray:
    """Give the first record of each tile of global keys."""
    step = ROWS * tiling.warpgroups
    sides = ((BEFORE, line.before), (AFTER, line.after))
    corners = [(0, 0, first, kind) for kind, tokens in sides for first in range(0, tokens, step)]
    return np.array(corners, np.int64).reshape(-1, 4)


def _compact_order(places: np.ndarray) -> np.ndarray:
    """Order tiles so that those which run together share boxes: in columns along t, these in squares of COLUMNS."""
    t, h, w = places
    return np.lexsort((t, w, h, w // COLUMNS, h // COLUMNS))


def _video_entries(
    tiling: Tiling, products: Sequence[Sequence[Product]], table: MaskTable, places: np.ndarray, line: Line
) -> list[_Entries]:
    """List what sees the keys of the video: queries of the video under a mask, and global ones."""
    entries = []
    for number, pieces in enumerate(products):  # no pair is in two pieces of a part
        earlier = list(chain.from_iterable(products[:number]))
        entries += [_product_boxes(tiling, piece, table, places, earlier) for piece in pieces]
    entries.append(_global_queries(tiling, table, places.shape[1], line if line.see == "all" else None))
    return entries


def _line_entries(tiling: Tiling, table: MaskTable, tiles: int, line: Line) -> list[_Entries]:
    """List what sees global keys: all queries."""
    return [_all_queries(tiling, table, tiles), _global_queries(tiling, table, tiles, line)]


def _global_queries(tiling: Tiling, table: MaskTable, tiles: int, line: Line | None) -> _Entries:
    """Cut the global queries into boxes, the same for each of ``tiles`` tiles; none without a line."""
    rows = product_of(tiling.box)
    boxes, masks = [], []
    sides = ((BEFORE, line.before), (AFTER, line.after)) if line is not None and line.queries else ()
    for kind, tokens in sides:
        for first in range(0, tokens, rows):
            count = min(rows, tokens - first)
            boxes.append((0, 0, first, kind, count))
            masks.append([table.line(axis, tiling.slab[axis], count) for axis in AXES])
    return _repeated(tiling, boxes, masks, tiles)


def _all_queries(tiling: Tiling, table: MaskTable, tiles: int) -> _Entries:
    """Cut the queries of the video into boxes, the same for each of ``tiles`` tiles."""
    cuts = []
    for axis in AXES:
        length, step, extent = tiling.k_box.extent[axis], tiling.steps[axis], tiling.box[axis]
        sizes = [-(-(length - first) // step) for first in range(min(step, length))]
        cuts.append(
            [
                (first + step * start, min(extent, size - start))
                for first, size in enumerate(sizes)
                for start in range(0, size, extent)
            ]
        )
    boxes, masks = [], []
    for t, h, w in np.ndindex(*map(len, cuts)):
        first, counts = zip(*(cut[at] for cut, at in zip(cuts, (t, h, w), strict=True)), strict=True)
        boxes.append((*first, 0, product_of(counts)))
        spans = [np.broadcast_to([0, n], (1, tiling.slab[axis], 2)) for axis, n in enumerate(counts)]
        masks.append([int(table.find(axis, each)[0]) for axis, each in enumerate(spans)])
    return _repeated(tiling, boxes, masks, tiles)


def _repeated(tiling: Tiling, boxes: Sequence[tuple[int, ...]], masks: Sequence[Sequence[int]], tiles: int) -> _Entries:
    """Give each of ``tiles`` tiles the same boxes. boxes: their records and how many queries fill each."""
    given = np.array(boxes, np.int64).reshape(-1, 5)
    sees = np.concatenate([np.array(masks, np.int64).reshape(-1, 3), np.zeros((len(boxes), 1), np.int64)], 1)
    return _Entries(
        np.repeat(np.arange(tiles), len(boxes)),
        np.tile(given[:, 4] < tiling.config.box, tiles),
        np.tile(given[:, :4], (tiles, 1)),
        np.tile(sees[:, None], (tiles, tiling.warpgroups, 1)),
    )


class _Split:
    """Tiles, some of them in pieces that are tiles themselves.

    corners: the first record of each piece. first: of each whole tile, its first piece. parts: how many each has.
    pieces, last: the number of the first piece of tiles in pieces, and that behind the last.
    """

    def __init__(self, whole_corners: np.ndarray, parts: np.ndarray, pieces: int) -> None:
        self.parts = parts
        self.first = np.cumsum(parts) - parts
        self._whole = whole_corners
        several = np.repeat(parts > 1, parts)
        number = pieces + np.cumsum(several)  # from 1 on
        self.corners = np.repeat(whole_corners, parts, axis=0)
        self.corners[:, 3] += np.where(several, 4 * number, 0)
        self._number = number - 1
        self.last = pieces + int(several.sum())

    @property
    def pieces(self) -> int:
        return self.last

    def table(self) -> np.ndarray:
        """Lay out what is in pieces: two records for each such tile."""
        several = self.parts > 1
        parts = self.parts[several]
        lists = np.stack([self._number[self.first[several]], parts, 0 * parts, 0 * parts], 1)
        return np.concatenate([self._whole[several], lists], 1).reshape(-1, 4)


class _Boxes(NamedTuple):
    """The boxes of a list of tiles, in the order in which these visit them."""

    tile: np.ndarray
    masked: np.ndarray
    box: np.ndarray
    masks: np.ndarray

    @classmethod
    def of(cls, entries: Sequence[_Entries]) -> _Boxes:
        tile, masked, box = (np.concatenate(each) for each in zip(*(each[:3] for each in entries), strict=True))
        return cls(tile, masked, box, np.concatenate(_as_wide([each.masks for each in entries])))._sorted()

    def _sorted(self) -> _Boxes:
        order = np.lexsort((~self.masked, self.tile))  # stable: those with masks first
        return _Boxes(*(each[order] for each in self))

    def counts(self, tiles: int) -> np.ndarray:
        return np.bincount(self.tile, minlength=tiles)

    def cut(self, rank: np.ndarray, split: _Split) -> _Boxes:
        """Give boxes to the pieces of their tiles. rank: the number of each tile among those of ``split``."""
        count = self.counts(len(rank))
        inside = np.arange(len(self.tile)) - (np.cumsum(count) - count)[self.tile]
        tile = rank[self.tile]
        size = -(-count[self.tile] // split.parts[tile])
        return self._replace(tile=split.first[tile] + inside // np.maximum(size, 1))._sorted()

    def records(self, split: _Split, start: int, groups: np.ndarray) -> np.ndarray:
        """Lay the list out in records of four, from record ``start`` on. groups: the numbers of the masks."""
        tiles, warpgroups = len(split.corners), self.masks.shape[1]
        count = self.counts(tiles)
        masked = np.bincount(self.tile[self.masked], minlength=tiles)
        first_box = start + 2 * tiles + np.cumsum(count) - count
        first_mask = start + 2 * tiles + len(self.box) + warpgroups * (np.cumsum(masked) - masked)
        header = np.concatenate([split.corners, np.stack([first_box, count, first_mask, masked], 1)], 1)
        # All boxes of a tile's first warpgroup, then those of its next.
        tile = self.tile[self.masked]
        inside = np.arange(len(tile)) - (np.cumsum(masked) - masked)[tile]
        at = warpgroups * (np.cumsum(masked) - masked)[tile] + inside
        found = np.zeros((warpgroups * len(tile), 4), np.int64)
        for group in range(warpgroups):
            found[at + group * masked[tile], 0] = groups[:, group]
            found[at + group * masked[tile], 3] = self.masks[self.masked][:, group, 3]
        return np.concatenate([header.reshape(-1, 4), self.box, found])
