"""How the CUDA kernels cut a problem: tiles of queries, boxes of keys, and what the one visit of the other.

Costs are estimates fitted to measurements; nothing is timed while a program runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from stattn.grid import Region, Triple
from stattn.tables import Product, Rule

AXES = (0, 1, 2)
ROWS = 64  # of a warpgroup's slab


class Config(NamedTuple):
    """An entry of a kernel's list in csrc/. cost: the time of a box, in those of the first entry's."""

    number: int
    box: int  # rows of a box
    cost: float


class Kernel(NamedTuple):
    """What tiles a kernel takes.

    warpgroups: that share one. configs: its list by head dimension. unit: boxes are multiples of this along w, and
    begin at multiples. split: the cost of a box whose rows are no boxes themselves by sixteen, in those of others.
    astray: that of boxes which do not begin at multiples of all their extents.
    """

    warpgroups: int
    configs: dict[int, tuple[Config, ...]]
    unit: int = 1
    split: float = 1.0
    astray: float = 1.0


# Fitted to windows and sliding tiles on an H200, see benchmarks/notes/attention-cuda.md.
CONFIGS = {128: (Config(0, 64, 1.0), Config(1, 80, 1.15)), 64: (Config(0, 128, 1.0),)}
KERNELS = {
    "forward": Kernel(3, CONFIGS),
    "dq": Kernel(3, {128: (Config(0, 64, 1.0),), 64: (Config(0, 64, 1.0), Config(1, 96, 1.36))}),
    # Rows' statistics are copied in units of 16 bytes, from multiples of 16 bytes on. The reduction of dQ takes whole
    # boxes that do not overlap; of others it takes rows by sixteen, or boxes of at most ROWS.
    "kv": Kernel(2, {128: (Config(0, 64, 1.0),), 64: (Config(0, 128, 1.0),)}, unit=4, split=1.1, astray=1.15),
}
MASKED = 0.38  # the cost of masking a box, in those of a box
LEFT_OUT = 0.5  # the saving by a box that a warpgroup leaves out, in its share of the box
TILE = 3.0  # the cost of beginning and ending a tile, in those of a box
FORWARD_ROWS = KERNELS["forward"].warpgroups * ROWS  # of a tile
SHORTEST = 24  # boxes of a piece of a list, but for the last ones
MANY = 8  # lists of this many boxes for each tile of the head are cut: keys are some 3 times as many as queries
SHARES = 16  # pieces of a list are no longer than its head's boxes divided by this
CANDIDATES = 40  # of tile extents, the best of which are tried with every extent of boxes


class Tiling(NamedTuple):
    """How a problem is cut; of the kernel of dK and dV, read keys for queries and queries for keys.

    steps: an axis with a step is cut within its residue classes, of which extents count the members. slab: a
    warpgroup's part of a query tile. stacked: the axis on which slabs lie in a row. multiples: of what boxes begin at,
    counted in their residue class.
    """

    q_box: Region
    k_box: Region
    steps: Triple
    slab: Triple
    stacked: int
    box: Triple
    config: Config
    warpgroups: int
    multiples: Triple

    @property
    def tile(self) -> Triple:
        return _times(self.slab, self.stacked, self.warpgroups)


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


def common_steps(products: Sequence[Sequence[Product]]) -> Triple | None:
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


def choose(
    q_box: Region,
    k_box: Region,
    products: Sequence[Sequence[Product]],
    head_dim: int,
    kernel: str = "forward",
    thin: bool = False,
) -> Tiling:
    """Choose the extents of tiles and boxes: the least time by a count of boxes, of those with masks, and of tiles.

    thin: boxes have an extent of 1 on the first axis.
    """
    warpgroups, configs, unit, split, astray = KERNELS[kernel]
    flat = [product for each in products for product in each]
    steps = common_steps(products)
    assert steps is not None
    visits = _Memo(partial(_visits, q_box, k_box, steps, unit))
    # A copy takes every eighth token at the least, of 256; rows further apart are copied one at a time.
    q_shape, k_shape = (
        triple(
            1 if step > 8 else min(-(-n // (step * multiple)) * multiple, 256 // step)
            for n, step, multiple in zip(box.extent, steps, multiples, strict=True)
        )
        for box, multiples in ((q_box, (1, 1, 1)), (k_box, (1, 1, unit)))
    )
    if thin:
        k_shape = 1, k_shape[1], k_shape[2]
    candidates = []
    for slab in _extents(q_shape, ROWS):
        part = sum(product_of([float(visits(p[a], a, slab[a]).length.sum()) for a in AXES]) for p in flat)
        part /= warpgroups
        for stacked in AXES:
            tile = _times(slab, stacked, warpgroups)
            visited = sum(product_of([float(visits(p[a], a, tile[a]).length.sum()) for a in AXES]) for p in flat)
            tiles = product_of(tile_counts(q_box, steps, tile)) * len(products)
            share = part / visited if visited else 1.0
            guess = visited * (1 - LEFT_OUT * (1 - share)) / ROWS + TILE * tiles
            candidates.append((guess, slab[0], slab[1], stacked, slab))
    all_boxes = {}  # of each config: extents [boxes, 3], and the cost of one
    for config in configs[head_dim]:
        fitting = [
            box
            for box in _extents(k_shape, config.box, unit)
            if config.box < 2 * product_of(box) or product_of(k_shape) <= config.box
        ]
        if astray > 1 and steps == (1, 1, 1):
            all_boxes[config, True] = np.array(fitting, np.int64), np.full(len(fitting), config.cost)
        if astray > 1:
            fitting = [box for box in fitting if _by_sixteen(box) or product_of(box) <= ROWS]
        costs = [astray * config.cost * (1.0 if _by_sixteen(box) else split) for box in fitting]
        all_boxes[config, False] = np.array(fitting, np.int64).reshape(-1, 3), np.array(costs)
    best: tuple[float, Tiling] | None = None
    for _, _, _, stacked, slab in sorted(candidates)[:CANDIDATES]:
        tile = _times(slab, stacked, warpgroups)
        tiles = product_of(tile_counts(q_box, steps, tile)) * len(products)
        all_counts = [_Memo(partial(_count, visits, tile, apart)) for apart in (False, True)]
        shares = _Memo(partial(_share, visits, slab, tile, warpgroups))
        for (config, apart), (extents, each_box) in all_boxes.items():
            counts = all_counts[apart]
            cost = np.full(len(extents), TILE * tiles)
            full = extents.prod(1) == config.box
            for product in flat:
                boxes, inside = np.ones((2, len(extents)), np.int64)
                for axis in AXES:
                    of_axis = _of_extents(partial(counts, product[axis], axis), extents[:, axis])
                    boxes, inside = boxes * of_axis[:, 0], inside * of_axis[:, 1]
                masked = np.where(full, boxes - inside, boxes)
                # Boxes with masks are left out by a warpgroup that sees nothing of them.
                saved = LEFT_OUT * (1 - _of_extents(partial(shares, product[stacked], stacked), extents[:, stacked]))
                cost += each_box * (boxes - masked + (1 + MASKED) * (1 - saved) * masked)
            if not len(extents):
                continue
            first = int(np.lexsort((-extents[:, 1], -extents[:, 2], cost))[0])
            box = triple(map(int, extents[first]))
            if best is None or (cost[first], -box[2], -box[1]) < (best[0], -best[1].box[2], -best[1].box[1]):
                multiples = box if apart else (1, 1, unit)
                best = (
                    float(cost[first]),
                    Tiling(q_box, k_box, steps, slab, stacked, box, config, warpgroups, multiples),
                )
    assert best is not None
    return best[1]


def _of_extents(function: Callable[[int], Any], extents: np.ndarray) -> np.ndarray:
    """Give a function's values for extents, calling it once for each that there is."""
    different, place = np.unique(extents, return_inverse=True)
    return np.array([function(int(extent)) for extent in different])[place.reshape(-1)]


def cut_list(boxes: int, queries: int | None) -> list[int]:
    """Cut the list of a tile into pieces that different blocks walk: the number of boxes of each, the longest first.

    It is cut if its head has few tiles beside it, which might not keep all blocks busy; a matter of the list and of the
    queries of a head alone, None if lists are never cut. Half, a third and a sixth let blocks end together (simulated
    for many numbers of tiles); few tiles are cut into more pieces.
    """
    if queries is None:
        return [boxes]
    tiles = -(-queries // FORWARD_ROWS)
    if boxes < max(2 * SHORTEST, MANY * tiles):
        return [boxes]
    longest = max(SHORTEST, min(boxes // 2, boxes * tiles // SHARES))
    pieces, rest = [], boxes
    while rest > 2 * longest:
        pieces.append(longest)
        rest -= longest
    pieces += [rest // 2, rest // 3]
    return [*pieces, boxes - sum(pieces)]


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


def _extents(shape: Triple, most: int, unit: int = 1) -> Iterator[Triple]:
    """List the extents of at most ``most`` tokens that fit a shape, multiples of ``unit`` along w."""
    for t in range(1, min(most, shape[0]) + 1):
        for h in range(1, min(most // t, shape[1]) + 1):
            longest = min(most // (t * h), shape[2])
            yield from ((t, h, w) for w in range(unit, longest + 1, unit))


def _by_sixteen(box: Triple) -> bool:
    """Say whether rows 0 to 15 of a box, 16 to 31 and so on are boxes themselves."""
    _, h, w = box
    if product_of(box) % 16:
        return False
    if w % 16 == 0:
        return True
    return 16 % w == 0 and (h % (16 // w) == 0 or 16 % (w * h) == 0)


def _count(visits: _Memo, tile: Triple, apart: bool, rule: Rule, axis: int, extent: int) -> tuple[int, int]:
    visited = visits(rule, axis, tile[axis])
    boxes = in_boxes(from_multiples(visited, extent) if apart else visited, extent)
    return int(boxes.number.sum()), int((boxes.whole_to - boxes.whole_from).sum())


def _share(visits: _Memo, slab: Triple, tile: Triple, warpgroups: int, rule: Rule, axis: int, extent: int) -> float:
    """Give the share of the boxes of a stacked axis of which a warpgroup sees something."""
    all_rows, part = visits(rule, axis, tile[axis]), visits(rule, axis, slab[axis])
    boxes = int((-(-all_rows.length // extent)).sum())
    if boxes == 0 or len(part.first) < len(all_rows.first):
        return 1.0
    first = all_rows.first[np.minimum(np.arange(len(part.first)) // warpgroups, len(all_rows.first) - 1)]
    from_box, to_box = (part.first - first) // extent, (part.first - first + part.length - 1) // extent
    return min(1.0, int(np.where(part.length > 0, to_box - from_box + 1, 0).sum()) / (warpgroups * boxes))


def _times(slab: Triple, stacked: int, warpgroups: int) -> Triple:
    t, h, w = (n * (warpgroups if axis == stacked else 1) for axis, n in enumerate(slab))
    return t, h, w


def product_of(values: Sequence[Any]) -> Any:
    return math.prod(values)


def triple(values: Iterable[int]) -> Triple:
    t, h, w = values
    return t, h, w


def tile_counts(q_box: Region, steps: Triple, tile: Triple) -> Triple:
    """Count the tiles of each axis."""
    return triple(
        sum(-(-size // extent) for size in _class_sizes(n, step))
        for n, step, extent in zip(q_box.extent, steps, tile, strict=True)
    )


@lru_cache(maxsize=4096)
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


def _visits(q_box: Region, k_box: Region, steps: Triple, unit: int, rule: Rule, axis: int, extent: int) -> Visits:
    visited = visit(rows_of(q_box, k_box, steps, rule, axis, extent))
    return from_multiples(visited, unit) if axis == 2 else visited


def from_multiples(visits: Visits, unit: int) -> Visits:
    """Begin visits at multiples of a number."""
    more = np.where(visits.length > 0, visits.first % unit, 0)
    return Visits(visits.first - more, visits.length + more, visits.whole_from + more, visits.whole_to + more)


def in_boxes(visits: Visits, extent: int) -> Boxes:
    """Cut visits into boxes from their first key on."""
    count = -(-visits.length // extent)
    whole_from = np.minimum(-(-visits.whole_from // extent), count)
    return Boxes(count, whole_from, np.maximum(visits.whole_to // extent, whole_from))
