"""How the reference walks a mask: groups of query tiles that see the same pattern of keys.

Axes that a mask does not cut are merged first (full attention becomes one row of tokens, per-frame attention T rows).
Each axis is then cut into tiles (``tiles.py``); tiles of an axis whose keys lie alike, relative to the tile or to the
grid, form a class; and every combination of classes is a group: the same query and key indices and the same element
mask, at many places of the grid. Of a union, each product leaves out what earlier ones allow. Groups are found once per
mask and grid.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from stattn.grid import Grid, Region, Triple
from stattn.masks import Mask
from stattn.reference.tiles import query_tiles
from stattn.tables import Packed, Rule, is_same, is_whole, same, whole

T = TypeVar("T")

LEAST_BOX = 512  # a box of fewer tokens is copied token by token as fast

# The plans that are kept for further calls, all together.
CACHE_BYTES = 256 << 20


class Box(NamedTuple):
    """Tokens at ``a * steps[0] + b * steps[1] + c * steps[2]`` from the first, for a, b and c below the sizes."""

    sizes: Triple
    steps: Triple


class Group(NamedTuple):
    """Query tiles that see the same pattern of keys.

    q: int64 [rows], video tokens relative to a tile's entry in ``q_bases``, int64 [tiles]. k: int64 [keys], relative to
    the tile's entry in ``k_bases``, int64 [tiles, parts], of the ``part`` that the key belongs to, int8 [keys].
    mask: booleans [rows, keys], None when all are seen. A row sees no token twice. boxes: how the keys of each part lie
    in memory, None when not all of them are boxes of ``LEAST_BOX`` tokens or more.
    """

    q_bases: np.ndarray
    k_bases: np.ndarray
    q: np.ndarray
    k: np.ndarray
    part: np.ndarray
    mask: np.ndarray | None
    boxes: tuple[Box, ...] | None

    def rows(self) -> np.ndarray:
        """Give the video tokens of the queries of each tile. int64 [tiles, rows]"""
        return self.q_bases[:, None] + self.q

    def keys(self) -> np.ndarray:
        """Give the video tokens of the keys of each tile. int64 [tiles, keys]"""
        return self.k_bases[:, self.part] + self.k

    def corners(self) -> np.ndarray:
        """Give the first video token of each part's keys. int64 [tiles, parts]"""
        return self.k_bases + self.k[np.flatnonzero(np.diff(self.part, prepend=-1))]


class _AxisTile(NamedTuple):
    """A tile of one axis.

    queries: int64 [queries], of the query box. keys: per product the keys that the tile visits, int64 [keys], of the
    key box. seen: per product, by its own rule and those of earlier products, which query sees which of these keys,
    booleans [queries, keys], [1, keys] when the queries see alike, None when all are seen.
    """

    queries: np.ndarray
    keys: list[np.ndarray]
    seen: list[list[np.ndarray | None]]  # [product][earlier product or itself]

    def pattern(self, relative: Sequence[bool]) -> tuple[object, ...]:
        """Give what tiles of one class share: keys count from the tile's first query where they are relative."""
        start = self.queries[0]
        keys = (keys - start * moves for keys, moves in zip(self.keys, relative, strict=True))
        seen = (None if each is None else each.tobytes() for by_rule in self.seen for each in by_rule)
        return ((self.queries - start).tobytes(), *(each.tobytes() for each in keys), *seen)


class _Axis(NamedTuple):
    """The tiles of an axis in classes, and whether each product's keys are stored relative to the tile."""

    classes: list[list[_AxisTile]]
    relative: list[bool]  # [product]


Plan = tuple[Group, ...]


class _Plans:
    """The plans used last, up to a number of bytes; the latest one is always kept."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self._plans: OrderedDict[tuple[object, ...], tuple[Plan, int]] = OrderedDict()
        self._lock = threading.Lock()  # the backward runs in threads of its own

    def get(self, key: tuple[object, ...], make: Callable[[], Plan]) -> Plan:
        """Return the plan of a key, made when it is not here."""
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
                return self._plans[key][0]
        plan = make()
        size = sum(part.nbytes for group in plan for part in group if isinstance(part, np.ndarray))
        with self._lock:
            if key not in self._plans:
                self._plans[key] = (plan, size)
                self.bytes += size
            while self.bytes > self.budget and len(self._plans) > 1:
                _, (_, freed) = self._plans.popitem(last=False)
                self.bytes -= freed
        return plan


_PLANS = _Plans(CACHE_BYTES)


def walk(mask: Mask, grid: Grid, q_box: Region, k_box: Region, frames: tuple[int, ...] | None = None) -> Plan:
    """Group the query tiles of ``q_box`` by what they see of ``k_box``.

    frames: the frame that each key slot holds (-1 none), for ring caches; k_box then spans slots. Indices count the
    video tokens of the boxes in row-major order. Query tiles that see nothing are left out.
    """
    # The mask depends on the extents of the grid only, its global tokens take no part.
    key = (mask, grid.shape, q_box, k_box, frames)
    return _PLANS.get(key, lambda: _plan(mask.pack(grid), q_box, k_box, frames))


def _plan(packed: Packed, q_box: Region, k_box: Region, frames: tuple[int, ...] | None) -> Plan:
    if frames is None:
        packed, q_box, k_box = _merge(packed, q_box, k_box)
    products = packed.products()
    if not products:
        return ()
    coordinates = [np.arange(extent) + origin for origin, extent in zip(k_box.origin, k_box.extent, strict=True)]
    if frames is not None:
        coordinates[0] = np.asarray(frames)
    queries = [range(origin, origin + extent) for origin, extent in zip(q_box.origin, q_box.extent, strict=True)]
    tiles = query_tiles(packed, queries, coordinates)
    axes = [
        _axis([product[axis] for product in products], tiles[axis], q_box.origin[axis], coordinates[axis])
        for axis in range(3)
    ]
    relative = [axis.relative for axis in axes]
    groups = (
        _group(chosen, relative, q_box.extent, k_box.extent)
        for chosen in itertools.product(*(axis.classes for axis in axes))
    )
    return tuple(group for group in groups if group is not None)


def _merge(packed: Packed, q_box: Region, k_box: Region) -> tuple[Packed, Region, Region]:
    """Merge neighbouring axes that no product cuts: both whole, or both identical, and held whole by both boxes."""
    for outer, inner in ((1, 2), (0, 1)):
        products = packed.products()
        whole_inner = all(box.extent[inner] == packed.shape[inner] for box in (q_box, k_box))
        if not whole_inner or not all(_mergeable(p[outer], p[inner]) for p in products):
            continue
        size = packed.shape[inner]
        length = packed.shape[outer] * size
        merged = [
            _with(
                p, {outer: whole(length) if is_whole(p[outer]) and is_whole(p[inner]) else same(length), inner: same(1)}
            )
            for p in products
        ]
        packed = Packed.of(_with(packed.shape, {outer: length, inner: 1}), merged)
        q_box, k_box = (
            Region(
                _with(box.origin, {outer: box.origin[outer] * size, inner: 0}),
                _with(box.extent, {outer: box.extent[outer] * size, inner: 1}),
            )
            for box in (q_box, k_box)
        )
    return packed, q_box, k_box


def _with(axes: tuple[T, T, T], changes: dict[int, T]) -> tuple[T, T, T]:
    t, h, w = (changes.get(axis, value) for axis, value in enumerate(axes))
    return t, h, w


def _mergeable(outer: Rule, inner: Rule) -> bool:
    return (is_whole(outer) and is_whole(inner)) or (is_same(outer) and is_same(inner))


def _axis(rules: list[Rule], cut: list[np.ndarray], origin: int, keys: np.ndarray) -> _Axis:
    """Class the tiles of one axis by pattern.

    cut: the queries of each tile, relative to the query box's origin. keys: the coordinate that each key of the key box
    holds, -1 for none.
    """
    tiles = []
    for local in cut:
        visited = [_visited(rule, local + origin, keys) for rule in rules]
        seen = [[_seen(e, local + origin, keys[near]) for e in rules[:n]] for n, (near, _) in enumerate(visited)]
        own = ([*earlier, mask] for earlier, (_, mask) in zip(seen, visited, strict=True))
        tiles.append(_AxisTile(local, [near for near, _ in visited], list(own)))
    # A window moves with the tile, a whole axis does not: what differs less from tile to tile is stored.
    relative = []
    for product in range(len(rules)):
        moving = {(tile.keys[product] - tile.queries[0]).tobytes() for tile in tiles}
        relative.append(len(moving) <= len({tile.keys[product].tobytes() for tile in tiles}))
    classes: dict[tuple[object, ...], list[_AxisTile]] = {}
    for tile in tiles:
        classes.setdefault(tile.pattern(relative), []).append(tile)
    return _Axis(list(classes.values()), relative)


def _visited(rule: Rule, queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Find the keys that some query of a tile sees, and which query sees which, as ``_seen`` says it."""
    lo, hi = rule.lo[queries], rule.hi[queries]
    near = np.flatnonzero((keys >= max(lo.min(), 0)) & (keys <= hi.max()))
    mask = _seen(rule, queries, keys[near])
    if mask is None:
        return near, None
    some = mask.any(axis=0)
    near, mask = near[some], mask[:, some]
    return near, None if mask.all() else mask


def _seen(rule: Rule, queries: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    """Say which queries see which of the keys at coordinates y, none of them -1.

    Returns booleans [queries, keys], [1, keys] when the queries see alike, None when all see all.
    """
    lo, hi = rule.lo[queries], rule.hi[queries]
    if rule.step == 1 and len(y) and lo.max() <= y.min() and y.max() <= hi.min():
        return None
    mask = (lo[:, None] <= y) & (y <= hi[:, None]) & ((y - queries[:, None]) % rule.step == 0)
    if mask.all():
        return None
    return mask[:1] if (mask == mask[:1]).all() else mask


def _group(
    chosen: Sequence[list[_AxisTile]], relative: Sequence[list[bool]], q_extent: Triple, k_extent: Triple
) -> Group | None:
    """Join one class per axis into a group; None when its tiles see nothing."""
    first = [tiles[0] for tiles in chosen]
    q = _flat([tile.queries - tile.queries[0] for tile in first], q_extent)
    starts = [np.array([tile.queries[0] for tile in tiles]) for tiles in chosen]
    bases, parts, masks = [], [], []
    for product in range(len(first[0].keys)):
        moves = [axis[product] for axis in relative]
        keys = [tile.keys[product] - tile.queries[0] * move for tile, move in zip(first, moves, strict=True)]
        if any(len(each) == 0 for each in keys):
            continue
        part = _flat(keys, k_extent)
        mask = _pairs([tile.seen[product][product] for tile in first])
        for earlier in range(product):
            again = _pairs([tile.seen[product][earlier] for tile in first])
            rest = np.zeros((1,) * 6, bool) if again is None else ~again
            mask = rest if mask is None else mask & rest
        if mask is not None:
            alike = math.prod(mask.shape[:3]) == 1
            rows = (1, 1, 1) if alike else tuple(len(tile.queries) for tile in first)
            mask = np.broadcast_to(mask, (*rows, *(len(each) for each in keys))).reshape(math.prod(rows), -1)
            some = mask.any(axis=0)
            part, mask = part[some], None if alike else mask[:, some]
        if len(part):
            bases.append(_flat([start * move for start, move in zip(starts, moves, strict=True)], k_extent))
            parts.append(part)
            masks.append(mask)
    if not parts:
        return None
    seen = None
    if any(mask is not None for mask in masks):
        ones = (np.ones((len(q), len(part)), bool) for part in parts)
        seen = np.concatenate([one if mask is None else mask for one, mask in zip(ones, masks, strict=True)], axis=1)
        seeing = seen.any(axis=1)
        q, seen = q[seeing], seen[seeing]
    return Group(
        _flat(starts, q_extent),
        np.stack(bases, axis=1),
        q,
        np.concatenate(parts),
        np.repeat(np.arange(len(parts), dtype=np.int8), [len(part) for part in parts]),
        None if seen is None or seen.all() else seen,
        _boxes(parts),
    )


def _boxes(parts: list[np.ndarray]) -> tuple[Box, ...] | None:
    """Describe each part of a tile's keys as a box, when all of them are."""
    boxes = []
    for part in parts:
        axes: list[tuple[int, int]] = []
        starts = part
        for _ in range(3):  # the innermost axis first: how long does its step go on?
            step = int(starts[1] - starts[0]) if len(starts) > 1 else 1
            breaks = np.flatnonzero(np.diff(starts) != step)
            size = int(breaks[0]) + 1 if len(breaks) else len(starts)
            axes.insert(0, (size, step))
            starts = starts[::size]
        (nt, st), (nh, sh), (nw, sw) = axes
        if len(part) < LEAST_BOX or nt * nh * nw != len(part):
            return None
        tokens = _flat([st * np.arange(nt), sh * np.arange(nh), sw * np.arange(nw)], (1, 1, 1))
        if not np.array_equal(tokens, part - part[0]):
            return None
        boxes.append(Box((nt, nh, nw), (st, sh, sw)))
    return tuple(boxes)


def _pairs(axes: list[np.ndarray | None]) -> np.ndarray | None:
    """Combine what the queries of three axes see, None for all, into booleans of six axes that may be spread."""
    pairs = None
    for axis, seen in enumerate(axes):
        if seen is not None:
            seen = np.expand_dims(seen, [other for other in range(6) if other % 3 != axis])
            pairs = seen if pairs is None else pairs & seen
    return pairs


def _flat(axes: list[np.ndarray], extent: Triple) -> np.ndarray:
    """Combine coordinates of three axes into row-major indices. Relative coordinates may be negative."""
    t, h, w = axes
    return (((t[:, None] * extent[1] + h)[:, :, None]) * extent[2] + w).reshape(-1)


def block_rows(shape: Triple, tile: Triple) -> np.ndarray:
    """List the video tokens of each tile in row-major order, -1 behind short ones. int64 [tiles, tokens of a tile]"""
    table = np.full([-(-n // e) * e for n, e in zip(shape, tile, strict=True)], -1, np.int64)
    table[: shape[0], : shape[1], : shape[2]] = np.arange(np.prod(shape)).reshape(shape)
    t, h, w = (-(-n // e) for n, e in zip(shape, tile, strict=True))
    split = table.reshape(t, tile[0], h, tile[1], w, tile[2])
    return split.transpose(0, 2, 4, 1, 3, 5).reshape(t * h * w, -1)
