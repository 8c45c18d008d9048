"""How kernels walk a mask: tiles of one side of the attention table, and for each the boxes of the other that it needs.

The forward pass and dQ tile the queries and walk the keys (``by_query``); dK and dV tile the keys and walk the queries
(``by_key``). Both are the same kind of walk: *rows* are tiled, *columns* are walked. It is made once per mask and grid:

1. The products of a union are made disjoint where a subtraction on one axis does it (``disjoint``).
2. Neighbouring axes that no product cuts are merged: full attention is one row of tokens, per-frame attention (T, H*W).
3. Each axis is cut into tiles, within a residue class where a product has a step. For a tile and a product the tables
   give the interval of columns to visit and, within it, those that every row of the tile sees. Intervals are visited in
   boxes of at most so many columns, from their own first column on.
4. What a row sees of a box partly allowed is decided by packed integers: every axis has a field of bits with a guard
   bit above it, and a column at c is seen if ``c + guards - lo`` and ``hi + guards - c`` both keep every guard.

``encode`` lays the walks of all heads out as one int32 array that kernels read, so that nothing about a mask is
compiled into a kernel.
"""

from __future__ import annotations

import itertools
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
FIELD_BITS = 30
EXISTS = 1 << FIELD_BITS  # the guard of a field without bits: columns behind the end of a box have it set
HEADER = 36  # integers before the products of a walk
AXES = (0, 1, 2)


class Geometry(NamedTuple):
    """A mask on the parts of a grid that q and k hold, axes merged and pushed to the end: (1, 1, N) is one row.

    shape: the grid's merged extents. products: the rules on it. overlap: whether products may still allow the same
    pair; each then excludes what earlier ones allow.
    """

    shape: Triple
    q_box: Region
    k_box: Region
    products: tuple[Product, ...]
    overlap: bool


class Interval(NamedTuple):
    """What the tiles of one axis visit under one rule: int32 [tiles] each.

    first: the first column, counted in the column box. length: columns, ``step`` apart. whole_from, whole_to: those
    from the one up to, not including, the other are seen by all rows of the tile.
    """

    first: np.ndarray
    length: np.ndarray
    whole_from: np.ndarray
    whole_to: np.ndarray


@dataclass(frozen=True, eq=False)
class Walk:
    """The tiles of the rows, and what each visits.

    rows, columns: the boxes of the merged grid. bounds: per product the columns that each row sees, exactly. tile:
    extents in tokens of one residue class modulo ``steps``. tiles: how many there are on each axis; tile i of an axis
    belongs to the residue class i % step. visits: per product and axis. box: the extents that intervals are visited in.
    overlap: whether each product excludes what earlier ones allow.
    """

    rows: Region
    columns: Region
    bounds: tuple[Product, ...]
    tile: Triple
    steps: Triple
    tiles: Triple
    visits: tuple[tuple[Interval, Interval, Interval], ...]
    box: Triple
    overlap: bool

    @property
    def visited(self) -> int:
        """The number of boxes that all tiles visit."""
        return _boxes(self.visits, self.box)

    @property
    def allowed(self) -> int:
        """The number of pairs that the products allow, those that several allow counted for each."""
        total = 0
        for product in self.bounds:
            pairs = 1
            for axis, rule in enumerate(product):
                x = np.arange(self.rows.origin[axis], self.rows.origin[axis] + self.rows.extent[axis])
                first, last = self.columns.origin[axis], self.columns.origin[axis] + self.columns.extent[axis] - 1
                lo, hi = np.maximum(rule.lo[x], first), np.minimum(rule.hi[x], last)
                lo = lo + (x - lo) % rule.step
                pairs *= int(np.maximum((hi - lo) // rule.step + 1, 0).sum(dtype=np.int64))
            total += pairs
        return total

    @property
    def windowless(self) -> bool:
        """Whether each axis is free or fixed, as those of per-frame and per-place attention are."""
        return all(is_whole(rule) or is_same(rule) for product in self.bounds for rule in product)


@lru_cache(maxsize=512)
def geometry(mask: Mask, grid: Grid, q_box: Region, k_box: Region, frames: bool = False) -> Geometry:
    """Lay out a mask for kernels. frames: the keys' first axis are slots of a ring cache, so it stays an axis."""
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
    return Geometry(shape, q_box, k_box, products, overlap)


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
def by_query(
    mask: Mask, grid: Grid, q_box: Region, k_box: Region, rows: int, columns: int, frames: bool = False
) -> Walk:
    """Tile the queries, at most ``rows`` a tile, and walk the keys in boxes of at most ``columns``.

    frames: the first axis of the keys counts frames here, whatever slots hold them, and a box lies in one frame.
    """
    laid = geometry(mask, grid, q_box, k_box, frames)
    return _walk(laid, laid.q_box, _keys(laid, frames), laid.products, rows, columns, thin_box=frames)


@lru_cache(maxsize=1024)
def by_key(mask: Mask, grid: Grid, q_box: Region, k_box: Region, rows: int, columns: int, frames: bool = False) -> Walk:
    """Tile the keys, at most ``rows`` a tile, and walk the queries in boxes of at most ``columns``.

    frames: the first axis of the keys counts frames here, whatever slots hold them, and a tile lies in one frame.
    """
    laid = geometry(mask, grid, q_box, k_box, frames)
    bounds = transposed(laid.products)
    return _walk(laid, _keys(laid, frames), laid.q_box, bounds, rows, columns, thin_tile=frames)


def transposed(products: Sequence[Product]) -> tuple[Product, ...]:
    """Give products that say of each key which queries see it, no pair twice if no two of the given allow the same."""
    exact = [piece for product in products for piece in itertools.product(*map(_intervals_by_key, product))]
    return tuple((_transpose(t), _transpose(h), _transpose(w)) for t, h, w in exact)


def _keys(laid: Geometry, frames: bool) -> Region:
    if not frames:
        return laid.k_box
    return Region(_with(laid.k_box.origin, {0: 0}), _with(laid.k_box.extent, {0: laid.shape[0]}))


def lists(mask: Mask | None, grid: Grid, tiles: tuple[Triple, Triple], columns: int, by_key: bool) -> Walk:
    """Lay out the tiles of block lists. tiles: of rows and of columns. mask: what partial entries allow.

    There are no intervals, since the lists say what is visited; the bounds are those of ``mask``.
    """
    everything = Region((0, 0, 0), grid.shape)
    rules = () if mask is None else mask.products(grid)
    if by_key:
        rules = transposed(rules)
    tile, other = tiles
    counts = [_tiles(n, e, 1) for n, e in zip(grid.shape, tile, strict=True)]
    none = [Interval(*np.zeros((4, count), np.int32)) for count in counts]
    whole_tile = [Interval(*np.array([[0], [min(e, n)], [0], [0]])) for e, n in zip(other, grid.shape, strict=True)]
    box = _box(((whole_tile[0], whole_tile[1], whole_tile[2]),), columns, False)
    visits = tuple((none[0], none[1], none[2]) for _ in rules)
    return Walk(everything, everything, rules, tile, (1, 1, 1), _triple(counts), visits, box, False)


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
    bounds: tuple[Product, ...],
    most_rows: int,
    most_columns: int,
    thin_tile: bool = False,
    thin_box: bool = False,
) -> Walk:
    """Tile ``rows``. thin_tile, thin_box: tiles, or boxes, have an extent of 1 on the first axis."""
    lcm = [math.lcm(*(p[axis].step for p in bounds)) if bounds else 1 for axis in AXES]
    steps = [min(step, n) for step, n in zip(lcm, rows.extent, strict=True)]
    tile = _tile(rows, bounds, steps, most_rows, thin_tile)
    tiles = [s * _tiles(n, e, s) for n, e, s in zip(rows.extent, tile, steps, strict=True)]
    visits = []
    for product in bounds:
        per_axis = []
        for axis in AXES:
            members = _members(rows.extent[axis], tile[axis], steps[axis], rows.origin[axis])
            per_axis.append(_interval(members, product[axis], columns.origin[axis], columns.extent[axis]))
        visits.append((per_axis[0], per_axis[1], per_axis[2]))
    box = _box(tuple(visits), most_columns, thin_box)
    return Walk(rows, columns, bounds, tile, _triple(steps), _triple(tiles), tuple(visits), box, laid.overlap)


def _tile(rows: Region, bounds: tuple[Product, ...], steps: list[int], most: int, thin: bool) -> Triple:
    """Choose the extents of a tile, those of ``tile_for`` among the rows at hand."""
    if rows.extent[:2] == (1, 1) and all(is_whole(p[2]) for p in bounds):  # one row of tokens
        return (1, 1, min(most, rows.extent[2]))
    if thin:
        bounds = tuple(_with(p, {0: Rule(p[0].lo[:1], p[0].hi[:1], 1)}) for p in bounds)
        rows = Region(_with(rows.origin, {0: 0}), _with(rows.extent, {0: 1}))
        steps = [1, *steps[1:]]
    grid = Grid(*rows.extent)
    return tile_for(grid, _Rows(bounds, rows, steps), min(most, grid.video))


def _box(visits: tuple[tuple[Interval, Interval, Interval], ...], most: int, thin: bool) -> Triple:
    """Choose the extents of at most ``most`` columns in which the fewest boxes are visited; the longest w, then h."""
    longest = [max((int(v[axis].length.max(initial=1)) for v in visits), default=1) for axis in AXES]
    best: tuple[int, int, int, int] | None = None
    for t in range(1, 2 if thin else min(most, longest[0]) + 1):
        for h in range(1, min(most // t, longest[1]) + 1):
            w = max(1, min(most // (t * h), longest[2]))
            found = (_boxes(visits, (t, h, w)), -w, -h, -t)
            best = found if best is None or found < best else best
    assert best is not None
    return (-best[3], -best[2], -best[1])


def _boxes(visits: tuple[tuple[Interval, Interval, Interval], ...], box: Triple) -> int:
    return sum(
        math.prod(int((-(-interval.length // extent)).sum()) for interval, extent in zip(each, box, strict=True))
        for each in visits
    )


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


def _interval(members: list[np.ndarray], bounds: Rule, origin: int, extent: int) -> Interval:
    """Find what each tile of an axis visits of the ``extent`` columns from ``origin`` on."""
    found = np.zeros((4, len(members)), np.int64)
    for index, coordinates in enumerate(members):
        lo, hi = bounds.lo[coordinates], bounds.hi[coordinates]
        some = lo <= hi
        if not some.any():
            continue
        first, last = max(int(lo[some].min()), origin), min(int(hi[some].max()), origin + extent - 1)
        first += (int(coordinates[0]) - first) % bounds.step
        if first > last:
            continue
        length = (last - first) // bounds.step + 1
        start = stop = 0
        if some.all():
            start = max(0, -(-(int(lo.max()) - first) // bounds.step))
            stop = max(start, min(length, (int(hi.min()) - first) // bounds.step + 1))
        found[:, index] = (first - origin, length, start, stop)
    return Interval(*found.astype(np.int32))


def _intervals_by_key(rule: Rule) -> list[Rule]:
    """Split a rule by queries, until the queries that see a key are an interval (of their residue class) in each."""
    turned = _transpose(rule)
    if turned is rule or turned.counts().sum(dtype=np.int64) == rule.counts().sum(dtype=np.int64):
        return [rule]
    length = len(rule.lo)
    piece = np.zeros(length, np.int64)
    for residue in range(min(rule.step, length)):
        x = np.arange(residue, length, rule.step)
        some = rule.lo[x] <= rule.hi[x]
        x = x[some]
        # Bounds that grow, of neighbours that all see something, are intervals seen from the keys as well.
        back = (np.diff(rule.lo[x]) < 0) | (np.diff(rule.hi[x]) < 0) | (np.diff(x) > rule.step)
        piece[x] = np.concatenate([[0], np.cumsum(back)]) if len(x) else 0
    pieces = []
    for number in range(int(piece.max()) + 1):
        mine = piece == number
        pieces.append(Rule(np.where(mine, rule.lo, length), np.where(mine, rule.hi, -1), rule.step))
    return pieces


def _transpose(rule: Rule) -> Rule:
    """Give for each key the first and the last query that sees it."""
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


# What kernels read.


def encode(walks: Sequence[Walk], heads: Sequence[int]) -> np.ndarray:
    """Lay walks out for kernels. heads: for each head the index of its walk. Returns int32, one dimension.

    First the offset of each head's walk, then the walks. A walk: HEADER integers, in threes by axis: the extents of
    rows and of tiles, steps, tiles, the extents of columns and of boxes, the lengths of the bound tables (1 when all
    rows share one entry), the factor of a column's coordinate in its field (0 for an axis without one); the guard bits
    (24), the number of products (25) and of integers a product (26); by axis, the first row less the first column (27
    to 29) and the bits of its field (30 to 32). A product: the steps of its three axes, one
    unused, then for each axis [tiles, 4] integers of its ``Interval``, then the packed bounds of rows: lo axis after
    axis, and hi with the guards.

    Raises ValueError when the coordinates take more bits than an integer has.
    """
    bodies = [_encode(walk) for walk in walks]
    offsets = len(heads) + np.cumsum([0, *(len(body) for body in bodies)])
    return np.concatenate([offsets[list(heads)], *bodies]).astype(np.int32)


def _encode(walk: Walk) -> np.ndarray:
    rows, columns = walk.rows, walk.columns
    free = [all(is_whole(p[axis]) for p in walk.bounds) for axis in AXES]
    lengths = [1 if each else n for each, n in zip(free, rows.extent, strict=True)]
    factors, guards, bit = [], [], 0
    for axis in AXES:
        if free[axis] and columns.extent[axis] == 1:
            factors.append(0)
            guards.append(0)
            continue
        width = (2 * columns.extent[axis]).bit_length()  # a box may reach beyond the columns, by less than its extent
        factors.append(1 << bit)
        guards.append(1 << (bit + width))
        bit += width + 1
    if bit > FIELD_BITS:
        raise ValueError(f"coordinates of merged extents {columns.extent} take {bit} bits, kernels have {FIELD_BITS}")
    records = []
    for product, visits in zip(walk.bounds, walk.visits, strict=True):
        tables = [np.stack(interval, axis=1).reshape(-1) for interval in visits]
        lows, highs = [], []
        for axis in AXES:
            first, last = columns.origin[axis], columns.origin[axis] + columns.extent[axis] - 1
            part = slice(rows.origin[axis], rows.origin[axis] + lengths[axis])
            lo, hi = np.maximum(product[axis].lo[part], first), np.minimum(product[axis].hi[part], last)
            none = lo > hi
            lo, hi = np.where(none, columns.extent[axis], lo - first), np.where(none, 0, hi - first)
            lows.append(lo.astype(np.int64) * factors[axis])
            highs.append(hi.astype(np.int64) * factors[axis] + guards[axis])
        highs[0] += EXISTS
        records.append(np.concatenate([[*(rule.step for rule in product), 0], *tables, *lows, *highs]))
    header = np.zeros(HEADER, np.int64)
    header[:24] = np.concatenate(
        [rows.extent, walk.tile, walk.steps, walk.tiles, columns.extent, walk.box, lengths, factors]
    )
    header[24:27] = [sum(guards) + EXISTS, len(records), len(records[0]) if records else 0]
    header[27:30] = np.subtract(rows.origin, columns.origin)
    header[30:33] = np.subtract(guards, factors)
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
