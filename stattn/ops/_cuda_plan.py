"""Plans for the CUDA kernels: which boxes of keys each tile of queries visits, and what rows see of a box seen in part.

A plan is made once per problem, on the host, from the tables of its masks. Its layout is that of csrc/attention_fwd.h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from stattn import plan
from stattn.grid import Region, Triple
from stattn.masks import Mask
from stattn.problem import Problem
from stattn.tables import Product, Rule, whole

AXES = (0, 1, 2)
BEFORE, AFTER = 1, 2  # kinds of tiles
UNSEEN = -1  # marks a box of which a warpgroup sees nothing
ROWS = 64  # of a warpgroup's slab
WARPGROUPS = 3


class Config(NamedTuple):
    """An entry of csrc/attention_fwd.cu's list. cost: the time of a key box, in those of the first entry's."""

    number: int
    box: int  # rows of a key box
    cost: float


# Fitted to windows and sliding tiles on an H200, see benchmarks/NOTES.md.
CONFIGS = {128: (Config(0, 64, 1.0), Config(1, 80, 1.15)), 64: (Config(0, 128, 1.0),)}
MASKED = 0.38  # the cost of masking a box, in those of a box
LEFT_OUT = 0.5  # the saving by a box that a warpgroup leaves out, in its share of the box
TILE = 3.0  # the cost of beginning and ending a tile, in those of a box
CANDIDATES = 40  # of tile extents, the best of which are tried with every extent of boxes


class Tiling(NamedTuple):
    """How a problem is cut.

    steps: an axis with a step is cut within its residue classes, of which extents count the members. slab: a
    warpgroup's part of a query tile. stacked: the axis on which slabs lie in a row.
    """

    q_box: Region
    k_box: Region
    steps: Triple
    slab: Triple
    stacked: int
    box: Triple
    config: Config

    @property
    def tile(self) -> Triple:
        t, h, w = (n * (WARPGROUPS if axis == self.stacked else 1) for axis, n in enumerate(self.slab))
        return t, h, w


class Line(NamedTuple):
    """The line of all tokens, where global ones lie before and after the video.

    video: keys of the video. queries: whether q holds global tokens. see: what these see, "all" or "globals". valid:
    whether a call says which of them are real.
    """

    before: int
    after: int
    video: int
    queries: bool
    see: str
    valid: bool


class Rows(NamedTuple):
    """The rows of the tiles of one axis under a rule; keys are counted within the rows' residue class.

    corner, key: int64 [tiles], the first row and the first key of the class, in tokens of the axis. lo, hi: int64
    [tiles, extent], the first and the last key that a row sees, hi < lo where there is none. real: bool [tiles,
    extent], whether a row exists.
    """

    corner: np.ndarray
    key: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    real: np.ndarray


class Visits(NamedTuple):
    """What the tiles of an axis visit under a rule: int64 [tiles] each.

    first, length: the keys visited. whole_from, whole_to: those, counted from the first, that all rows of a tile see.
    """

    first: np.ndarray
    length: np.ndarray
    whole_from: np.ndarray
    whole_to: np.ndarray


class Boxes(NamedTuple):
    """Visits in boxes: their number, and those that all rows of a tile see whole."""

    number: np.ndarray
    whole_from: np.ndarray
    whole_to: np.ndarray


@lru_cache(maxsize=512)
def why_not(problem: Problem) -> str | None:
    """Say what in the masks of a problem cannot be planned, or None."""
    masks = tuple(dict.fromkeys(problem.masks))
    for mask in masks:
        if plan.geometry(mask, problem.grid, problem.q_box, problem.k_box).overlap:
            return f"mask {mask} is a union whose parts overlap on several axes"
    _, _, products = _geometry(problem, masks)
    if _steps(products) is None:
        return f"mask {masks[0]}{' and others are' if len(masks) > 1 else ' is'} dilated in several ways on one axis"
    return None


@lru_cache(maxsize=128)
def layout(problem: Problem, heads: int, head_dim: int, valid: bool = False) -> tuple[int, list[int], np.ndarray]:
    """Plan a problem: the kernel's configuration, its integers (AttentionPlan in csrc/stattn.h), the plan's array.

    valid: whether the call says which global tokens are real.
    """
    masks = tuple(dict.fromkeys(problem.masks))
    of_head = [masks.index(mask) for mask in problem.masks] if len(problem.masks) > 1 else [0] * heads
    q_box, k_box, products = _geometry(problem, masks)
    tiling = choose(q_box, k_box, products, head_dim)
    line = Line(problem.grid.before, problem.grid.after, k_box.video, problem.q_globals, problem.globals_see, valid)
    array, line_tiles, line_record = encode(tiling, products, of_head, line)
    integers = [*q_box.extent, *k_box.extent, *tiling.slab, *tiling.box, *tiling.steps, tiling.stacked]
    integers += [_tile_count(tiling), line.before, line.after, int(line.queries), line_tiles, line_record]
    return tiling.config.number, integers, array


@lru_cache(maxsize=128)
def on_device(
    problem: Problem, heads: int, head_dim: int, valid: bool, device: torch.device
) -> tuple[int, list[int], torch.Tensor]:
    """Give the plan of a problem with its array on a device, copied there once."""
    number, integers, array = layout(problem, heads, head_dim, valid)
    return number, integers, torch.from_numpy(array).to(device)


def _geometry(problem: Problem, masks: Sequence[Mask]) -> tuple[Region, Region, list[tuple[Product, ...]]]:
    """Lay the masks out on common axes: those of all, if they merge the same ones."""
    laid = [plan.geometry(mask, problem.grid, problem.q_box, problem.k_box) for mask in masks]
    if len({(each.shape, each.q_box, each.k_box) for each in laid}) == 1:
        return laid[0].q_box, laid[0].k_box, [each.products for each in laid]
    return problem.q_box, problem.k_box, [plan.disjoint(mask.products(problem.grid))[0] for mask in masks]


def _steps(products: Sequence[Sequence[Product]]) -> Triple | None:
    """Find the step of each axis, which all products must share: None if they do not."""
    steps = [1, 1, 1]
    for axis in AXES:
        rules = [product[axis] for each in products for product in each]
        step = steps[axis] = max((rule.step for rule in rules), default=1)
        for rule in rules:
            # A rule of single keys has no step of its own; its keys may lie in the classes of the others.
            x = np.arange(len(rule.lo))
            single = bool(((rule.lo >= rule.hi) & ((rule.lo > rule.hi) | ((rule.lo - x) % step == 0))).all())
            if rule.step != step and not single:
                return None
    return steps[0], steps[1], steps[2]


# --- the choice of tiles ----------------------------------------------------------------------------------------------


def choose(q_box: Region, k_box: Region, products: Sequence[Sequence[Product]], head_dim: int) -> Tiling:
    """Choose the extents of tiles and boxes: the least time by a count of boxes, of those with masks, and of tiles."""
    flat = [product for each in products for product in each]
    steps = _steps(products)
    assert steps is not None
    visits = _Memo(partial(_visits, q_box, k_box, steps))
    # A copy takes every eighth token at the least, of 256; rows further apart are copied one at a time.
    q_shape, k_shape = (
        _triple(1 if step > 8 else min(-(-n // step), 256 // step) for n, step in zip(box.extent, steps, strict=True))
        for box in (q_box, k_box)
    )
    candidates = []
    for slab in _extents(q_shape, ROWS):
        part = sum(_prod([float(visits(p[a], a, slab[a]).length.sum()) for a in AXES]) for p in flat) / WARPGROUPS
        for stacked in AXES:
            tile = _times(slab, stacked)
            visited = sum(_prod([float(visits(p[a], a, tile[a]).length.sum()) for a in AXES]) for p in flat)
            tiles = _prod(_tiles(q_box, steps, tile)) * len(products)
            share = part / visited if visited else 1.0
            guess = visited * (1 - LEFT_OUT * (1 - share)) / ROWS + TILE * tiles
            candidates.append((guess, slab[0], slab[1], stacked, slab))
    best: tuple[float, Tiling] | None = None
    for _, _, _, stacked, slab in sorted(candidates)[:CANDIDATES]:
        tile = _times(slab, stacked)
        tiles = _prod(_tiles(q_box, steps, tile)) * len(products)
        counts = _Memo(partial(_count, visits, tile))
        shares = _Memo(partial(_share, visits, slab, tile))
        for config in CONFIGS[head_dim]:
            for box in _extents(k_shape, config.box):
                if 2 * _prod(box) <= config.box < _prod(k_shape):
                    continue
                cost = TILE * tiles
                for product in flat:
                    each = [counts(product[axis], axis, box[axis]) for axis in AXES]
                    boxes, inside = _prod([count for count, _ in each]), _prod([full for _, full in each])
                    masked = boxes if _prod(box) < config.box else boxes - inside
                    # Boxes with masks are left out by a warpgroup that sees nothing of them.
                    share = shares(product[stacked], stacked, box[stacked]) if masked else 1.0
                    saved = LEFT_OUT * (1 - share)
                    cost += config.cost * (boxes - masked + (1 + MASKED) * (1 - saved) * masked)
                if best is None or (cost, -box[2], -box[1]) < (best[0], -best[1].box[2], -best[1].box[1]):
                    best = cost, Tiling(q_box, k_box, steps, slab, stacked, box, config)
    assert best is not None
    return best[1]


class _Memo:
    """A function of a rule, an axis and an extent that remembers its results, rules by identity."""

    def __init__(self, function: Callable[[Rule, int, int], Any]) -> None:
        self._function = function
        self._known: dict[tuple[int, int, int], Any] = {}

    def __call__(self, rule: Rule, axis: int, extent: int) -> Any:
        key = (id(rule), axis, extent)
        if key not in self._known:
            self._known[key] = self._function(rule, axis, extent)
        return self._known[key]


def _extents(shape: Triple, most: int) -> Iterator[Triple]:
    """List the extents of at most ``most`` tokens that fit a shape, the last axis as long as the others let it be."""
    for t in range(1, min(most, shape[0]) + 1):
        for h in range(1, min(most // t, shape[1]) + 1):
            longest = min(most // (t * h), shape[2])
            yield from ((t, h, w) for w in range(1, longest + 1))


def _count(visits: _Memo, tile: Triple, rule: Rule, axis: int, extent: int) -> tuple[int, int]:
    boxes = in_boxes(visits(rule, axis, tile[axis]), extent)
    return int(boxes.number.sum()), int((boxes.whole_to - boxes.whole_from).sum())


def _share(visits: _Memo, slab: Triple, tile: Triple, rule: Rule, axis: int, extent: int) -> float:
    """Give the share of the boxes of a stacked axis of which a warpgroup sees something."""
    all_rows, part = visits(rule, axis, tile[axis]), visits(rule, axis, slab[axis])
    boxes = int((-(-all_rows.length // extent)).sum())
    if boxes == 0 or len(part.first) < len(all_rows.first):
        return 1.0
    first = all_rows.first[np.minimum(np.arange(len(part.first)) // WARPGROUPS, len(all_rows.first) - 1)]
    from_box, to_box = (part.first - first) // extent, (part.first - first + part.length - 1) // extent
    return min(1.0, int(np.where(part.length > 0, to_box - from_box + 1, 0).sum()) / (WARPGROUPS * boxes))


def _times(slab: Triple, stacked: int) -> Triple:
    t, h, w = (n * (WARPGROUPS if axis == stacked else 1) for axis, n in enumerate(slab))
    return t, h, w


def _prod(values: Sequence[Any]) -> Any:
    return math.prod(values)


def _triple(values: Iterable[int]) -> Triple:
    t, h, w = values
    return t, h, w


def _tiles(q_box: Region, steps: Triple, tile: Triple) -> Triple:
    """Count the tiles of each axis."""
    return _triple(
        sum(-(-size // extent) for size in _class_sizes(n, step))
        for n, step, extent in zip(q_box.extent, steps, tile, strict=True)
    )


def _tile_count(tiling: Tiling) -> int:
    return math.prod(_tiles(tiling.q_box, tiling.steps, tiling.tile))


def _class_sizes(length: int, step: int) -> list[int]:
    """Count the members of each residue class of an axis."""
    return [-(-(length - first) // step) for first in range(min(step, length))]


def rows_of(q_box: Region, k_box: Region, steps: Triple, rule: Rule, axis: int, extent: int) -> Rows:
    """Cut an axis into tiles of ``extent`` rows, residue class after residue class."""
    step, origin, keys = steps[axis], k_box.origin[axis], k_box.extent[axis]
    corners, first_keys, los, his, reals = [], [], [], [], []
    for first, size in enumerate(_class_sizes(q_box.extent[axis], step)):
        tiles = -(-size // extent)
        x = q_box.origin[axis] + first + step * np.arange(size)
        key = (q_box.origin[axis] + first - origin) % step
        last = (keys - 1 - key) // step  # -1 if the class has no key
        lo = np.maximum(-((origin + key - rule.lo[x].astype(np.int64)) // step), 0)
        hi = np.minimum((rule.hi[x].astype(np.int64) - origin - key) // step, last)
        none = (lo > hi) | (rule.lo[x] > rule.hi[x])
        behind = (0, tiles * extent - size)
        corners.append(first + step * extent * np.arange(tiles))
        first_keys.append(np.full(tiles, key))
        los.append(np.pad(np.where(none, keys, lo), behind, constant_values=keys).reshape(tiles, extent))
        his.append(np.pad(np.where(none, -1, hi), behind, constant_values=-1).reshape(tiles, extent))
        reals.append((np.arange(tiles * extent) < size).reshape(tiles, extent))
    return Rows(*(np.concatenate(each) for each in (corners, first_keys, los, his, reals)))


def visit(rows: Rows) -> Visits:
    """Find what tiles visit."""
    first = rows.lo.min(1)
    length = np.maximum(rows.hi.max(1) - first + 1, 0)
    # Rows behind the end see what the others see: nothing of theirs is stored.
    most_lo = np.where(rows.real, rows.lo, -1).max(1)
    least_hi = np.where(rows.real, rows.hi, np.iinfo(np.int64).max // 2).min(1)
    whole_from = np.clip(most_lo - first, 0, length)
    return Visits(np.where(length > 0, first, 0), length, whole_from, np.clip(least_hi + 1 - first, whole_from, length))


def _visits(q_box: Region, k_box: Region, steps: Triple, rule: Rule, axis: int, extent: int) -> Visits:
    return visit(rows_of(q_box, k_box, steps, rule, axis, extent))


def in_boxes(visits: Visits, extent: int) -> Boxes:
    """Cut visits into boxes from their first key on."""
    count = -(-visits.length // extent)
    whole_from = np.minimum(-(-visits.whole_from // extent), count)
    return Boxes(count, whole_from, np.maximum(visits.whole_to // extent, whole_from))


# --- the plan's array -------------------------------------------------------------------------------------------------


def encode(
    tiling: Tiling, products: Sequence[Sequence[Product]], of_head: Sequence[int], line: Line
) -> tuple[np.ndarray, int, int]:
    """Lay a plan out as int32. products: of each mask. of_head: the mask of each head.

    Returns the array, the number of tiles of global queries and the record at which they begin.
    """
    table = _MaskTable(tiling)
    lists = [_video_list(tiling, each, table, line) for each in products]
    lists.append(_line_list(tiling, table, line))
    masks = table.array()  # [masks, words]
    per_record = 4 // masks.shape[1]
    records = np.concatenate([masks.reshape(-1), np.zeros(-masks.size % 4, np.int32)]).reshape(-1, 4)
    head_records = -(-len(of_head) // 4)
    parts = [np.zeros((head_records, 4), np.int32), records]
    start = head_records + len(records)
    offsets = []
    for each in lists:
        offsets.append(start)
        body = each.records(start, head_records * per_record)
        parts.append(body)
        start += len(body)
    if start * 4 >= 1 << 31:
        raise ValueError(f"a plan of {start} records of 16 bytes is too large")
    array = np.concatenate(parts).astype(np.int32).reshape(-1)
    array[: len(of_head)] = np.array(offsets, np.int32)[list(of_head)]
    return array, len(lists[-1].corners), offsets[-1]


def _stops(box: Region) -> Triple:
    """Give the ends of a box, where tables end that are just long enough for it."""
    return _triple(o + n for o, n in zip(box.origin, box.extent, strict=True))


class _MaskTable:
    """The masks of an axis for a slab's coordinates, equal ones kept once."""

    def __init__(self, tiling: Tiling) -> None:
        self._width = 64 if tiling.config.box <= 64 else 128
        self._known: dict[tuple[int, bytes], int] = {}
        self._masks: list[np.ndarray] = []
        self._length = 0
        rows = _prod(tiling.box)
        column = np.arange(tiling.config.box)
        _, h, w = tiling.box
        self._place = (column // (h * w), column // w % h, column % w)
        self._real = column < rows

    def find(self, axis: int, spans: np.ndarray) -> np.ndarray:
        """Give the number of the first mask of each group. spans: [groups, slab, 2], the keys seen, from and up to."""
        if not len(spans):
            return np.zeros(0, np.int64)
        different, inverse = np.unique(spans.reshape(len(spans), -1), axis=0, return_inverse=True)
        numbers = np.array([self._add(axis, each.reshape(-1, 2)) for each in different], np.int64)
        return numbers[inverse.reshape(-1)]

    def line(self, axis: int, slab: int, count: int) -> int:
        """Give the number of the first mask of a group by which all rows see the first ``count`` keys of a box."""
        key = (axis, f"line of {count}".encode())
        if key not in self._known:
            self._known[key] = self._append(np.broadcast_to(np.arange(self._width) < count, (slab, self._width)))
        return self._known[key]

    def _add(self, axis: int, spans: np.ndarray) -> int:
        key = (axis, spans.astype(np.int64).tobytes())
        if key not in self._known:
            place = self._place[axis]
            bits = (spans[:, :1] <= place) & (place < spans[:, 1:]) & self._real
            self._known[key] = self._append(np.pad(bits, ((0, 0), (0, self._width - bits.shape[1]))))
        return self._known[key]

    def _append(self, bits: np.ndarray) -> int:
        first = self._length
        self._masks.append(np.packbits(bits, axis=1, bitorder="little").view(np.int32))
        self._length += len(bits)
        return first

    def array(self) -> np.ndarray:
        """Lay all masks out, [masks, words]."""
        return np.concatenate([np.zeros((0, self._width // 32), np.int32), *self._masks])


class _Entries(NamedTuple):
    """Boxes of tiles.

    tile: [boxes]. masked: whether rows have masks, [boxes]. box: its record, [boxes, 4]. masks: the records of its
    masks, [boxes, warpgroups, 4], in which masks are counted from the table's first.
    """

    tile: np.ndarray
    masked: np.ndarray
    box: np.ndarray
    masks: np.ndarray


def _video_list(tiling: Tiling, products: Sequence[Product], table: _MaskTable, line: Line) -> _List:
    """List the tiles of the video under one mask: the boxes of its products, and those of the global keys."""
    places = np.indices(_tiles(tiling.q_box, tiling.steps, tiling.tile)).reshape(3, -1)  # of tiles, in tiles
    corners = [
        rows_of(tiling.q_box, tiling.k_box, tiling.steps, whole(stop), axis, tiling.tile[axis]).corner[places[axis]]
        for axis, stop in enumerate(_stops(tiling.q_box))
    ]
    entries = [_product_boxes(tiling, product, table, places) for product in products]
    entries.append(_line_boxes(tiling, table, line, places.shape[1], with_video=False))
    return _List(np.stack([*corners, 0 * corners[0]], 1), entries)


def _line_list(tiling: Tiling, table: _MaskTable, line: Line) -> _List:
    """List the tiles of the global queries."""
    step = ROWS * WARPGROUPS
    sides = ((BEFORE, line.before), (AFTER, line.after)) if line.queries else ()
    corners = [(0, 0, first, kind) for kind, tokens in sides for first in range(0, tokens, step)]
    entries = [_line_boxes(tiling, table, line, len(corners), with_video=line.see == "all")]
    return _List(np.array(corners, np.int64).reshape(-1, 4), entries)


def _line_boxes(tiling: Tiling, table: _MaskTable, line: Line, tiles: int, with_video: bool) -> _Entries:
    """Cut the line's keys into boxes, the same for each of ``tiles`` tiles."""
    rows = _prod(tiling.box)
    parts = [(0, line.before, True), (line.before, line.video if with_video else 0, False)]
    parts.append((line.before + line.video, line.after, True))
    boxes, masked, masks, number = [], [], [], 0
    for start, length, is_global in parts:
        for first in range(0, length, rows):
            count = min(rows, length - first)
            number += is_global
            boxes.append((0, 0, start + first, 1))
            masked.append(count < tiling.config.box or (is_global and line.valid))
            sees = [table.line(axis, tiling.slab[axis], count) for axis in AXES]
            masks.append([(*sees, number if is_global and line.valid else 0)] * WARPGROUPS)
    return _Entries(
        np.repeat(np.arange(tiles), len(boxes)),
        np.tile(np.array(masked, bool), tiles),
        np.tile(np.array(boxes, np.int64).reshape(-1, 4), (tiles, 1)),
        np.tile(np.array(masks, np.int64).reshape(-1, WARPGROUPS, 4), (tiles, 1, 1)),
    )


def _product_boxes(tiling: Tiling, product: Product, table: _MaskTable, places: np.ndarray) -> _Entries:
    """Cut what the tiles at ``places`` visit of a product into boxes."""
    rows = [rows_of(tiling.q_box, tiling.k_box, tiling.steps, product[a], a, tiling.tile[a]) for a in AXES]
    visits = [visit(each) for each in rows]
    boxes = [in_boxes(each, extent) for each, extent in zip(visits, tiling.box, strict=True)]
    counts = [each.number[place] for each, place in zip(boxes, places, strict=True)]
    total = counts[0] * counts[1] * counts[2]
    tile = np.repeat(np.arange(len(total)), total)
    rest = np.arange(len(tile)) - np.repeat(np.cumsum(total) - total, total)
    # The stacked axis is the outermost: boxes that a warpgroup leaves out then lie in a row.
    order = [tiling.stacked, *(axis for axis in AXES if axis != tiling.stacked)]
    middle, inmost = (counts[axis][tile] for axis in order[1:])
    number = [rest] * 3
    number[order[0]], number[order[1]] = rest // (middle * inmost), rest // inmost % middle
    number[order[2]] = rest % inmost
    inner = np.ones(len(tile), bool)
    first, masks = [], []
    for axis in AXES:
        place, at = places[axis][tile], number[axis]
        inner &= (boxes[axis].whole_from[place] <= at) & (at < boxes[axis].whole_to[place])
        key = visits[axis].first[place] + at * tiling.box[axis]  # in its class
        first.append(rows[axis].key[place] + tiling.steps[axis] * key)
        masks.append(_axis_masks(tiling, axis, rows[axis], visits[axis], boxes[axis], table, place, at))
    # A box with columns that no key fills has masks always.
    masked = ~inner if _prod(tiling.box) == tiling.config.box else np.ones(len(tile), bool)
    found = np.stack(masks, 2)
    unseen = (found == UNSEEN).any(2)
    found = np.concatenate([np.maximum(found, 0), np.where(unseen, UNSEEN, 0)[..., None]], 2)
    return _Entries(tile, masked, np.stack([*first, 0 * tile], 1), found)


def _axis_masks(
    tiling: Tiling,
    axis: int,
    rows: Rows,
    visits: Visits,
    boxes: Boxes,
    table: _MaskTable,
    place: np.ndarray,
    at: np.ndarray,
) -> np.ndarray:
    """Number the masks of an axis for boxes ``at`` of tiles ``place``, or UNSEEN: [boxes, warpgroups]."""
    slab, extent = tiling.slab[axis], tiling.box[axis]
    groups = WARPGROUPS if axis == tiling.stacked else 1
    count = len(boxes.number)
    lo, hi = (x.reshape(count, groups, slab) for x in (rows.lo, rows.hi))
    # Every box of every tile of the axis, those seen whole as one.
    everything = np.broadcast_to(np.array([0, extent]), (1, slab, 2))
    numbers = np.full((count, int(boxes.number.max(initial=0)), groups), int(table.find(axis, everything)[0]))
    i, b = np.nonzero(np.arange(numbers.shape[1]) < boxes.number[:, None])
    part = (b < boxes.whole_from[i]) | (boxes.whole_to[i] <= b)
    i, b = i[part], b[part]
    start = (visits.first[i] + b * extent)[:, None, None]
    spans = np.stack([np.clip(lo[i] - start, 0, extent), np.clip(hi[i] + 1 - start, 0, extent)], 3)
    spans[spans[..., 0] >= spans[..., 1]] = 0
    seen = spans.any((2, 3))
    numbers[i, b] = np.where(seen, table.find(axis, spans.reshape(-1, slab, 2)).reshape(-1, groups), UNSEEN)
    return np.broadcast_to(numbers[place, at], (len(at), WARPGROUPS)) if groups == 1 else numbers[place, at]


class _List:
    """Tiles, their boxes and the masks of these. corners: the first record of each tile, [tiles, 4]."""

    def __init__(self, corners: np.ndarray, entries: Sequence[_Entries]) -> None:
        self.corners = corners
        tile, masked, box, masks = (np.concatenate(each) for each in zip(*entries, strict=True))
        self._count = np.bincount(tile, minlength=len(corners))
        self._masked = np.bincount(tile[masked], minlength=len(corners))
        order = np.lexsort((~masked, tile))  # stable: in a tile by products and row-major, those with masks first
        self._boxes = box[order]
        self._tile_of_mask = tile[order][masked[order]]
        self._masks = masks[order][masked[order]]

    def records(self, start: int, first_mask: int) -> np.ndarray:
        """Lay the list out in records of four, from record ``start`` on. first_mask: the number of the first mask."""
        tiles = len(self.corners)
        first_box = start + 2 * tiles + np.cumsum(self._count) - self._count
        masks = WARPGROUPS * self._masked
        first_mask_record = start + 2 * tiles + len(self._boxes) + np.cumsum(masks) - masks
        lists = np.stack([first_box, self._count, first_mask_record, self._masked], 1)
        header = np.concatenate([self.corners, lists], 1)
        if self._count.max(initial=0) * len(self._count) > 1.25 * self._count.sum():  # the longest first
            header = header[np.argsort(-self._count, kind="stable")]
        # All boxes of a tile's first warpgroup, then those of its next.
        of_tile = self._masked[self._tile_of_mask]
        inside = np.arange(len(self._masks)) - (np.cumsum(self._masked) - self._masked)[self._tile_of_mask]
        at = (np.cumsum(masks) - masks)[self._tile_of_mask] + inside
        found = np.zeros((int(masks.sum()), 4), np.int64)
        for group in range(WARPGROUPS):
            found[at + group * of_tile] = self._masks[:, group] + np.array([first_mask, first_mask, first_mask, 0])
        return np.concatenate([header.reshape(-1, 4), self._boxes, found])
