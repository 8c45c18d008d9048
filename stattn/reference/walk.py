"""How the reference walks a mask: groups of query tiles that see the same pattern of keys.

Axes that a mask does not cut are merged first (full attention becomes one row of tokens, per-frame attention T rows).
Each axis is then cut into tiles; tiles of an axis whose keys lie alike, relative to the tile, form a class; and every
combination of classes is a group: the same relative query and key indices and the same element mask, at many places of
the grid. Groups are found once per mask and grid.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from stattn.grid import Grid, Region, Triple, tile_coordinates, tile_for, visited_keys
from stattn.masks import Mask
from stattn.tables import Packed, Rule, is_same, is_whole, same, whole

T = TypeVar("T")

# The cost of a query tile on a CPU, measured: a gathered key costs about as much as this many query rows do with it,
# and PyTorch's kernel reaches this share of its dense rate from that many rows on (it cuts the rows into blocks of 32,
# 64 or 256).
GATHER_ROWS = 24
TILE_RATES = ((768, 1.0), (192, 0.75), (1, 0.55))
TILE_ROWS = (16, 32, 64, 128, 192, 256, 512, 768, 1024)


class Group(NamedTuple):
    """Query tiles at ``bases`` (pairs of offsets for queries and keys) that see the same pattern of keys.

    q, k: relative indices of video tokens, int64 [rows], [keys]. mask: booleans [rows, keys], None when all are seen.
    """

    q_bases: np.ndarray  # int64 [tiles]
    k_bases: np.ndarray  # int64 [tiles]
    q: np.ndarray
    k: np.ndarray
    mask: np.ndarray | None


class _AxisTile(NamedTuple):
    """A tile of one axis: its queries and, per product, the keys it visits, relative to its first query."""

    start: int
    queries: tuple[int, ...]
    keys: tuple[tuple[int, ...], ...]  # [product]
    masks: tuple[bytes | None, ...]  # booleans [queries, keys] per product, None when all are seen

    @property
    def pattern(self) -> tuple[object, ...]:
        return (self.queries, self.keys, self.masks)


@lru_cache(maxsize=256)
def walk(
    mask: Mask, grid: Grid, q_box: Region, k_box: Region, frames: tuple[int, ...] | None = None
) -> tuple[Group, ...]:
    """Group the query tiles of ``q_box`` by what they see of ``k_box``.

    frames: the frame that each key slot holds (-1 none), for ring caches; k_box then spans slots. Indices count the
    video tokens of the boxes in row-major order. Query tiles that see nothing are left out.
    """
    packed = mask.pack(grid)
    if frames is None:
        packed, q_box, k_box = _merge(packed, q_box, k_box)
    products = packed.products()
    if not products:
        return ()
    tile = _query_tile(packed)
    classes = [
        _axis_classes(
            [product[axis] for product in products],
            tile[axis],
            (q_box.origin[axis], q_box.extent[axis]),
            np.asarray(frames)
            if axis == 0 and frames is not None
            else np.arange(k_box.extent[axis]) + k_box.origin[axis],
        )
        for axis in range(3)
    ]
    groups = (_group(chosen, q_box.extent, k_box.extent) for chosen in itertools.product(*classes))
    return tuple(group for group in groups if group is not None)


def _query_tile(packed: Packed) -> Triple:
    """Choose the tile that costs least on a CPU; the whole grid when the mask cuts nothing."""
    grid = Grid(*packed.shape)
    products = packed.products()
    if len(products) == 1 and all(is_whole(rule) for rule in products[0]):
        return packed.shape
    tiles = {tile_for(grid, packed, min(rows, grid.video)) for rows in TILE_ROWS}

    def cost(tile: Triple) -> float:
        rows = math.prod(tile)
        rate = next(rate for least, rate in TILE_RATES if rows >= least)
        return visited_keys(grid, packed, tile) * (rows / rate + GATHER_ROWS)

    return min(tiles, key=lambda tile: (cost(tile), tile))


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


def _axis_classes(rules: list[Rule], extent: int, queries: tuple[int, int], keys: np.ndarray) -> list[list[_AxisTile]]:
    """Cut one axis into tiles and class them by pattern.

    queries: origin and extent of the query box. keys: the coordinate that each key of the key box holds, -1 for none.
    """
    origin, length = queries
    step = int(np.gcd.reduce([rule.step for rule in rules]))
    classes: dict[tuple[object, ...], list[_AxisTile]] = {}
    for local in tile_coordinates(length, extent, step):
        per_product, masks = [], []
        for rule in rules:
            index, mask = _visited(rule, local + origin, keys)
            per_product.append(tuple((index - local[0]).tolist()))
            masks.append(None if mask is None else mask.tobytes())
        tile = _AxisTile(int(local[0]), tuple((local - local[0]).tolist()), tuple(per_product), tuple(masks))
        classes.setdefault(tile.pattern, []).append(tile)
    return list(classes.values())


def _visited(rule: Rule, queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Find the keys that some query of a tile sees, and which query sees which; None when all see all."""
    lo, hi = rule.lo[queries], rule.hi[queries]
    near = np.flatnonzero((keys >= max(lo.min(), 0)) & (keys <= hi.max()))
    y = keys[near]
    if rule.step == 1 and len(y) and lo.max() <= y.min() and y.max() <= hi.min():
        return near, None
    mask = (lo[:, None] <= y) & (y <= hi[:, None]) & ((y - queries[:, None]) % rule.step == 0)
    seen = mask.any(axis=0)
    near, mask = near[seen], mask[:, seen]
    return near, None if mask.all() else mask


def _group(chosen: tuple[list[_AxisTile], ...], q_extent: Triple, k_extent: Triple) -> Group | None:
    """Join one class per axis into a group; None when its tiles see nothing."""
    first = [tiles[0] for tiles in chosen]
    q = _flat([np.array(tile.queries) for tile in first], q_extent)
    starts = [np.array([tile.start for tile in tiles]) for tiles in chosen]
    parts = []
    for product in range(len(first[0].keys)):
        keys = [np.array(tile.keys[product], np.int64) for tile in first]
        if any(len(each) == 0 for each in keys):
            continue
        mask: np.ndarray | None = None
        if any(tile.masks[product] is not None for tile in first):
            axes = [
                np.ones((len(tile.queries), len(k)), bool)
                if (data := tile.masks[product]) is None
                else np.frombuffer(data, bool).reshape(len(tile.queries), len(k))
                for tile, k in zip(first, keys, strict=True)
            ]
            mask = np.einsum("ad,be,cf->abcdef", *axes).reshape(len(q), -1)
        parts.append((_flat(keys, k_extent), mask))
    if not parts:
        return None
    k, mask = parts[0] if len(parts) == 1 else _union(parts, len(q))
    if mask is not None:
        seeing = mask.any(axis=1)
        q, mask = q[seeing], mask[seeing]
        mask = None if mask.all() else mask
    return Group(_flat(starts, q_extent), _flat(starts, k_extent), q, k, mask)


def _union(parts: list[tuple[np.ndarray, np.ndarray | None]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    k = np.unique(np.concatenate([keys for keys, _ in parts]))
    union = np.zeros((rows, len(k)), bool)
    for keys, mask in parts:
        union[:, np.searchsorted(k, keys)] |= True if mask is None else mask
    return k, union


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
