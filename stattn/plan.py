"""How kernels walk a mask: tiles of one side of the attention table, and for each the boxes of the other that it needs.

The forward pass and dQ tile the queries and walk the keys (``by_query``); dK and dV tile the keys and walk the queries
(``by_key``). Both are the same kind of walk: *rows* are tiled, *columns* are walked. It is made once per mask and grid:

1. The products of a union are made disjoint where a subtraction on one axis does it (``disjoint``).
2. Neighbouring axes that no product cuts are merged: full attention is one row of tokens, per-frame attention (T, H*W).
3. Each axis is cut into tiles, within a residue class where a product has a step. For a tile and a product the tables
   give the interval of columns to visit and, within it, those that every row of the tile sees.
4. The rule of a single pair is packed into one integer a query and product, and one a key: each axis has a field of
   bits with a guard bit above it, and k is seen if both ``k + guards - lo`` and ``hi + guards - k`` keep every guard.

``encode`` lays the walks of all heads out as one int32 array that kernels read, so that nothing about a mask is
compiled into a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from stattn.grid import Grid, Region, Triple, tile_for
from stattn.masks import Mask
from stattn.tables import Product, Rule, covers_axis, intersect, is_same, is_whole, same, tighten, whole

T = TypeVar("T")

MAX_PIECES = 16
FIELD_BITS = 31
HEADER = 32  # integers before the products of a walk
AXES = (0, 1, 2)


class Geometry(NamedTuple):
    """A mask on the parts of a grid that q and k hold, axes merged and pushed to the end: (1, 1, N) is one row.

    shape: the grid's merged extents. products: the rules on it. overlap: whether products may still allow the same
    pair; each then excludes what earlier ones allow. shifts: the first bit of each axis's field, -1 for an axis that no
    product cuts.
    """

    shape: Triple
    q_box: Region
    k_box: Region
    products: tuple[Product, ...]
    overlap: bool
    shifts: Triple

    @property
    def guard(self) -> int:
        """The guard bits of all fields."""
        return sum(1 << (s + n.bit_length()) for s, n in zip(self.shifts, self.shape, strict=True) if s >= 0)


class Interval(NamedTuple):
    """What the tiles of one axis visit under one rule: int32 [tiles] each.

    first: the first column, counted in the column box. length: columns, ``step`` apart. whole_from, whole_to: those from
    the one up to, not including, the other are seen by all rows of the tile.
    """

    first: np.ndarray
    length: np.ndarray
    whole_from: np.ndarray
    whole_to: np.ndarray


@dataclass(frozen=True, eq=False)
class Walk:
    """The tiles of the rows, and what each visits.

    tile: extents in tokens of one residue class modulo ``steps``. tiles: how many there are on each axis; tile i of an
    axis belongs to the residue class i % step. visits: per product and axis.
    """

    geometry: Geometry
    rows: Region
    columns: Region
    tile: Triple
    steps: Triple
    tiles: Triple
    visits: tuple[tuple[Interval, Interval, Interval], ...]

    def visited(self, columns: int = 1) -> int:
        """Count the columns that all tiles visit, each box rounded up to a multiple of ``columns``."""
        total = 0
        for t, h, w in self.visits:
            boxes = t.length[:, None, None].astype(np.int64) * h.length[:, None] * w.length
            total += int((-(-boxes // columns) * columns).sum())
        return total


@lru_cache(maxsize=512)
def geometry(mask: Mask, grid: Grid, q_box: Region, k_box: Region, frames: bool = False) -> Geometry:
    """Lay out a mask for kernels. frames: the keys' first axis are slots of a ring cache, so it stays an axis.

    Raises ValueError when the coordinates of the cut axes take more than 31 bits.
    """
    products, overlap = disjoint(mask.products(grid))
    shape, boxes = grid.shape, [q_box, k_box]
    for outer, inner in ((1, 2), (0, 1)):
        if frames and outer == 0:
            continue
        whole_inner = all(box.extent[inner] == shape[inner] for box in boxes)
        if not whole_inner or not all(_alike(p[outer], p[inner]) for p in products):
            continue
        size, length = shape[inner], shape[outer] * shape[inner]
        both = (same(length), whole(length))
        free = (is_whole(p[outer]) and is_whole(p[inner]) for p in products)
        products = tuple(_with(p, {outer: both[each], inner: same(1)}) for p, each in zip(products, free, strict=True))
        shape = _with(shape, {outer: length, inner: 1})
        boxes = [
            Region(
                _with(box.origin, {outer: box.origin[outer] * size, inner: 0}),
                _with(box.extent, {outer: box.extent[outer] * size, inner: 1}),
            )
            for box in boxes
        ]
    kept = [axis for axis in AXES if shape[axis] > 1 or (frames and axis == 0)]
    order = [axis for axis in AXES if axis not in kept] + kept
    if frames:
        order = [0, *(axis for axis in order if axis != 0)]
    shape = _permute(shape, order)
    products = tuple(_permute(p, order) for p in products)
    q_box, k_box = (Region(_permute(box.origin, order), _permute(box.extent, order)) for box in boxes)
    shifts, bit = [], 0
    for axis in AXES:
        if all(is_whole(p[axis]) for p in products) and not (frames and axis == 0):
            shifts.append(-1)
            continue
        shifts.append(bit)
        bit += shape[axis].bit_length() + 1
    if bit > FIELD_BITS:
        raise ValueError(f"grid {grid.shape} under mask {mask}: coordinates take {bit} bits, kernels have {FIELD_BITS}")
    return Geometry(shape, q_box, k_box, products, overlap, (shifts[0], shifts[1], shifts[2]))


def disjoint(products: Sequence[Product]) -> tuple[tuple[Product, ...], bool]:
    """Cut out of each product what earlier ones allow, where intervals on one axis can say it.

    Returns the products, and whether some may still allow the same pair.
    """
    found: list[Product] = []
    overlap = False
    for product in products:
        pieces = [product]
        for earlier in tuple(found):
            cut = [part for piece in pieces for part in _subtract(piece, earlier)]
            if len(found) + len(cut) <= MAX_PIECES:
                pieces = cut
        overlap |= any(_meet(piece, earlier) for piece in pieces for earlier in found)
        found += pieces
    return tuple(found), overlap


def _subtract(piece: Product, earlier: Product) -> list[Product]:
    """Take from a product what an earlier one allows; the product itself when that is no matter of one axis."""
    if not _meet(piece, earlier):
        return [piece]
    for axis in AXES:
        if not all(covers_axis(earlier[other], piece[other]) for other in AXES if other != axis):
            continue
        mine, theirs = piece[axis], earlier[axis]
        if mine.step % theirs.step:
            continue
        none = theirs.lo > theirs.hi
        below = tighten(Rule(mine.lo, np.where(none, mine.hi, np.minimum(mine.hi, theirs.lo - 1)), mine.step))
        above = tighten(Rule(np.where(none, len(mine.lo), np.maximum(mine.lo, theirs.hi + 1)), mine.hi, mine.step))
        return [_with(piece, {axis: rest}) for rest in (below, above) if rest.counts().any()]
    return [piece]


def _meet(a: Product, b: Product) -> bool:
    """Say whether two products may allow the same pair."""
    return all(bool(rule.counts().any()) for rule in intersect(a, b))


@lru_cache(maxsize=1024)
def by_query(mask: Mask, grid: Grid, q_box: Region, k_box: Region, rows: int, frames: bool = False) -> Walk:
    """Tile the queries, at most ``rows`` a tile, and walk the keys. With frames, t counts frames, not slots."""
    laid = geometry(mask, grid, q_box, k_box, frames)
    k_box = laid.k_box
    if frames:
        k_box = Region(_with(k_box.origin, {0: 0}), _with(k_box.extent, {0: laid.shape[0]}))
    return _walk(laid, laid.q_box, k_box, laid.products, rows)


@lru_cache(maxsize=1024)
def by_key(mask: Mask, grid: Grid, q_box: Region, k_box: Region, rows: int, frames: bool = False) -> Walk:
    """Tile the keys, at most ``rows`` a tile, and walk the queries. With frames a tile lies in one frame."""
    laid = geometry(mask, grid, q_box, k_box, frames)
    k_box = laid.k_box
    if frames:
        k_box = Region(_with(k_box.origin, {0: 0}), _with(k_box.extent, {0: laid.shape[0]}))
    hulls = tuple((_transpose(t), _transpose(h), _transpose(w)) for t, h, w in laid.products)
    return _walk(laid, k_box, laid.q_box, hulls, rows, transposed=True, thin=frames)


class _Rows:
    """The rules of a box of rows, as ``tile_for`` asks for them, all in the residue classes that are tiled."""

    def __init__(self, products: Sequence[Product], rows: Region, steps: Sequence[int]) -> None:
        axes = tuple(zip(rows.origin, rows.extent, steps, strict=True))
        self._products = tuple(
            tuple((rule.lo[o : o + n], rule.hi[o : o + n], step) for rule, (o, n, step) in zip(p, axes, strict=True))
            for p in products
        )

    def products(self, grid: Grid) -> tuple[tuple[tuple[np.ndarray, np.ndarray, int], ...], ...]:
        return self._products


def _walk(
    laid: Geometry,
    rows: Region,
    columns: Region,
    hulls: tuple[Product, ...],
    most: int,
    transposed: bool = False,
    thin: bool = False,
) -> Walk:
    """Tile ``rows``. hulls: per product, the columns between the first and the last that a row wants.

    transposed: rows are keys. thin: tiles have an extent of 1 on the first axis.
    """
    lcm = [math.lcm(*(p[axis].step for p in hulls)) if hulls else 1 for axis in AXES]
    steps = [min(step, n) for step, n in zip(lcm, rows.extent, strict=True)]
    tile = _tile(rows, hulls, steps, most, thin)
    tiles = [s * _tiles(n, e, s) for n, e, s in zip(rows.extent, tile, steps, strict=True)]
    visits = []
    for hull, product in zip(hulls, laid.products, strict=True):
        per_axis = []
        for axis in AXES:
            members = _members(rows.extent[axis], tile[axis], steps[axis], rows.origin[axis])
            span = (columns.origin[axis], columns.extent[axis])
            per_axis.append(_interval(members, hull[axis], span, product[axis] if transposed else None))
        visits.append((per_axis[0], per_axis[1], per_axis[2]))
    return Walk(laid, rows, columns, tile, _triple(steps), _triple(tiles), tuple(visits))


def _tile(rows: Region, hulls: tuple[Product, ...], steps: list[int], most: int, thin: bool) -> Triple:
    """Choose the extents of a tile, those of ``tile_for`` among the rows at hand."""
    if rows.extent[:2] == (1, 1) and all(is_whole(p[2]) for p in hulls):  # one row of tokens
        return (1, 1, min(most, rows.extent[2]))
    if thin:
        hulls = tuple(_with(p, {0: Rule(p[0].lo[:1], p[0].hi[:1], 1)}) for p in hulls)
        rows = Region(_with(rows.origin, {0: 0}), _with(rows.extent, {0: 1}))
        steps = [1, *steps[1:]]
    grid = Grid(*rows.extent)
    return tile_for(grid, _Rows(hulls, rows, steps), min(most, grid.video))


def _tiles(length: int, extent: int, step: int) -> int:
    """Count the tiles of the longest residue class of an axis."""
    members = math.ceil(length / step)
    return math.ceil(members / extent)


def _members(length: int, extent: int, step: int, origin: int) -> list[np.ndarray]:
    """List the coordinates of each tile of an axis, tile i in residue class i % step; some may be empty."""
    found = []
    for index in range(step * _tiles(length, extent, step)):
        start = index % step + step * extent * (index // step)
        found.append(np.arange(start, min(length, start + step * extent), step) + origin)
    return found


def _interval(members: list[np.ndarray], hull: Rule, span: tuple[int, int], by_key: Rule | None) -> Interval:
    """Find what each tile of an axis visits of the ``span[1]`` columns from ``span[0]`` on.

    hull: the columns between the first and the last that a row wants. by_key: where rows are keys, the queries' rule.
    """
    origin, extent = span
    found = np.zeros((4, len(members)), np.int64)
    everyone = by_key is None or is_whole(by_key)
    for index, coordinates in enumerate(members):
        lo, hi = hull.lo[coordinates], hull.hi[coordinates]
        some = lo <= hi
        if not some.any():
            continue
        first, last = max(int(lo[some].min()), origin), min(int(hi[some].max()), origin + extent - 1)
        first += (int(coordinates[0]) - first) % hull.step
        if first > last:
            continue
        count = (last - first) // hull.step + 1
        if by_key is not None and not everyone:
            queries = first + hull.step * np.arange(count)
            start, stop = _longest_run((by_key.lo[queries] <= coordinates[0]) & (coordinates[-1] <= by_key.hi[queries]))
        elif some.all():
            start = max(0, -(-(int(lo.max()) - first) // hull.step))
            stop = min(count, (int(hi.min()) - first) // hull.step + 1)
        else:
            start = stop = 0
        found[:, index] = (first - origin, count, start, max(start, stop))
    return Interval(*found.astype(np.int32))


def _longest_run(flags: np.ndarray) -> tuple[int, int]:
    """Find the longest run of True: (start, stop)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    if not len(edges):
        return 0, 0
    starts, stops = edges[::2], edges[1::2]
    best = int((stops - starts).argmax())
    return int(starts[best]), int(stops[best])


def _transpose(rule: Rule) -> Rule:
    """Give for each key the first and the last query that sees it; those between need not."""
    if is_whole(rule) or is_same(rule):
        return rule
    length = len(rule.lo)
    lo, hi = np.full(length, length, np.int32), np.full(length, -1, np.int32)
    for residue in range(min(rule.step, length)):
        x = np.arange(residue, length, rule.step)
        seeing = rule.lo[x] <= rule.hi[x]
        first, last = ((bound[x] - residue)[seeing] // rule.step for bound in (rule.lo, rule.hi))
        lo[x] = _paint(first, last, x[seeing], len(x), np.minimum, length)
        hi[x] = _paint(first, last, x[seeing], len(x), np.maximum, -1)
    return Rule(lo, hi, rule.step)


def _paint(
    first: np.ndarray, last: np.ndarray, value: np.ndarray, length: int, best: np.ufunc, none: int
) -> np.ndarray:
    """Give each place the best value of the intervals that cover it, ``none`` where none does. O(length log length)."""
    levels = length.bit_length()
    table = np.full((levels, length), none, np.int64)  # of level k: intervals of 2^k places
    level = np.frexp((last - first + 1).astype(np.float64))[1] - 1
    best.at(table, (level, first), value)
    best.at(table, (level, last - (1 << level) + 1), value)
    for k in range(levels - 1, 0, -1):
        half = 1 << (k - 1)
        table[k - 1] = best(table[k - 1], table[k])
        table[k - 1, half:] = best(table[k - 1, half:], table[k, : length - half])
    return table[0]


# --- what kernels read -----------------------------------------------------------------------------------------------


def encode(walks: Sequence[Walk], heads: Sequence[int]) -> np.ndarray:
    """Lay walks out for kernels. heads: for each head the index of its walk. Returns int32, one dimension.

    ``[heads]`` offsets of the head's walk, then the walks. A walk: HEADER integers, in threes by axis: row extents,
    tile extents, steps, tiles, column extents, row origin, column origin, the factor of a coordinate in its field (0 on
    an axis that is not cut); the guard bits (24), products (25), integers a product (26), lengths of the bound tables
    by axis (27 to 29). A product: the steps of its three axes, one unused, then for each axis [tiles, 4] integers of
    its ``Interval``, then the bounds of queries, the fields of lo and those of hi with their guards, axis after axis.
    """
    bodies = [_encode(walk) for walk in walks]
    offsets = len(heads) + np.cumsum([0, *(len(body) for body in bodies)])
    return np.concatenate([offsets[list(heads)], *bodies]).astype(np.int32)


def _encode(walk: Walk) -> np.ndarray:
    laid = walk.geometry
    cut = [shift >= 0 for shift in laid.shifts]
    lengths = [n if is_cut else 0 for n, is_cut in zip(laid.shape, cut, strict=True)]
    records = []
    for product, visits in zip(laid.products, walk.visits, strict=True):
        tables = [np.stack(interval, axis=1).reshape(-1) for interval in visits]
        bounds: list[np.ndarray] = []
        for side in ("lo", "hi"):
            for axis in AXES:
                if not cut[axis]:
                    continue
                rule, shift, bits = product[axis], laid.shifts[axis], laid.shape[axis].bit_length()
                value = np.maximum(getattr(rule, side).astype(np.int64), 0) << shift
                bounds.append(value + (1 << (shift + bits) if side == "hi" else 0))
        records.append(np.concatenate([[*(rule.step for rule in product), 0], *tables, *bounds]))
    header = np.zeros(HEADER, np.int64)
    factors = [1 << shift if shift >= 0 else 0 for shift in laid.shifts]
    rows, columns = walk.rows, walk.columns
    header[:24] = np.concatenate(
        [rows.extent, walk.tile, walk.steps, walk.tiles, columns.extent, rows.origin, columns.origin, factors]
    )
    header[24:30] = [laid.guard, len(records), len(records[0]) if records else 0, *lengths]
    return np.concatenate([header, *records])


def _alike(outer: Rule, inner: Rule) -> bool:
    return (is_whole(outer) and is_whole(inner)) or (is_same(outer) and is_same(inner))


def _with(axes: tuple[T, T, T], changes: dict[int, T]) -> tuple[T, T, T]:
    t, h, w = (changes.get(axis, value) for axis, value in enumerate(axes))
    return t, h, w


def _permute(axes: tuple[T, T, T], order: Sequence[int]) -> tuple[T, T, T]:
    t, h, w = (axes[axis] for axis in order)
    return t, h, w


def _triple(values: Sequence[int]) -> Triple:
    t, h, w = (int(value) for value in values)
    return t, h, w
