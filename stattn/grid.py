"""Token geometry: the (t, h, w) grid of a video, boxes of it, and the tiles that kernels walk.

Tokens lie in row-major (t, h, w) order with ``before`` and ``after`` *global* tokens (text, memory, sinks) around::

    token index = before + (t * H + h) * W + w
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeGuard

import numpy as np

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Grid:
    """The tokens of one video: a grid of T x H x W, with optional global tokens (text, memory) before and after it.

    t, h, w: extents in tokens, at least 1. before, after: global tokens around the video, at least 0.
    Raises TypeError or ValueError naming the field that does not fit.
    """

    t: int
    h: int
    w: int
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        for name, least in (("t", 1), ("h", 1), ("w", 1), ("before", 0), ("after", 0)):
            value = getattr(self, name)
            if not is_int(value):
                raise TypeError(f"Grid {name}={value!r} must be an integer")
            if value < least:
                raise ValueError(f"Grid {name}={value} must be at least {least}")

    @property
    def shape(self) -> Triple:
        """The extents (t, h, w)."""
        return (self.t, self.h, self.w)

    @property
    def video(self) -> int:
        """The number of video tokens, t * h * w."""
        return self.t * self.h * self.w

    @property
    def globals(self) -> int:
        """The number of global tokens, before + after."""
        return self.before + self.after

    @property
    def tokens(self) -> int:
        """The number of tokens, global ones included."""
        return self.video + self.before + self.after

    def __iter__(self) -> Iterator[int]:
        return iter(self.shape)


@dataclass(frozen=True)
class Region:
    """A box of a grid, for example some of its frames.

    origin: its first (t, h, w). extent: its size (t, h, w), in tokens. Raises ValueError naming what does not fit.
    """

    origin: Triple
    extent: Triple

    def __post_init__(self) -> None:
        for name, least in (("origin", 0), ("extent", 1)):
            value = getattr(self, name)
            if not _is_triple(value) or any(each < least for each in value):
                raise ValueError(f"Region {name}={value!r} must be three integers of at least {least}")
            object.__setattr__(self, name, tuple(value))

    @property
    def video(self) -> int:
        """The number of tokens in the box."""
        return self.extent[0] * self.extent[1] * self.extent[2]

    def check(self, grid: Grid, name: str = "region") -> None:
        """Raise ValueError when the box reaches outside the grid."""
        for axis, origin, extent, length in zip("thw", self.origin, self.extent, grid.shape, strict=True):
            if origin + extent > length:
                raise ValueError(
                    f"{name}={self} reaches {origin + extent} on axis {axis}, beyond the grid's {length} ({grid.shape})"
                )


def as_grid(grid: Grid | tuple[int, int, int]) -> Grid:
    """Return a ``Grid`` from a Grid or a (t, h, w) tuple. Raises TypeError or ValueError otherwise."""
    if isinstance(grid, Grid):
        return grid
    if not isinstance(grid, (tuple, list)) or len(grid) != 3:
        raise TypeError(f"grid={grid!r} must be a Grid or three integers (t, h, w)")
    return Grid(*grid)


class AxisTables(Protocol):
    """What ``tile_for`` needs of a mask: per product and axis, (lo, hi, step) with one table entry per coordinate."""

    def products(self, grid: Grid) -> tuple[tuple[tuple[np.ndarray, np.ndarray, int], ...], ...]: ...


@lru_cache(maxsize=1024, typed=True)  # typed, or 128.0 would be taken for a cached 128
def tile_for(grid: Grid, mask: AxisTables, rows: int) -> Triple:
    """Choose the extents (t, h, w) of a query tile of at most ``rows`` tokens for a mask: the fewest visited pairs.

    A tile visits, for each product of the mask, the box of keys from the least lower to the greatest upper bound of its
    queries on every axis. An axis with residue ``step`` is tiled within a residue class, so that extents count its
    members. Ties go to fewer tiles, then to the longer w, h and t in that order (contiguous memory).

    The cost separates by axis: with S_a(e) the key span summed over the tiles of extent e on axis a, a product costs
    rows * S_t * S_h * S_w. A tile always costs ``rows`` rows, full or not. Pure and cached; nothing is timed.
    """
    grid = as_grid(grid)
    if not is_int(rows) or rows < 1:
        raise ValueError(f"rows={rows!r} must be a positive integer")
    products = mask.products(grid)
    steps = [math.gcd(*(product[axis][2] for product in products)) or 1 for axis in range(3)]
    longest = [min(rows, -(-length // step)) for length, step in zip(grid.shape, steps, strict=True)]
    visited = np.zeros(longest, dtype=np.float64)
    for product in products:
        t, h, w = (
            np.array([_axis_span(lo, hi, step, extent) for extent in range(1, most + 1)], np.float64)
            for (lo, hi, step), most in zip(product, longest, strict=True)
        )
        visited += t[:, None, None] * h[:, None] * w
    extents = np.indices(longest) + 1
    visited[extents.prod(axis=0) > rows] = np.inf
    tiles = np.ones(longest, np.int64)
    for axis, (length, step) in enumerate(zip(grid.shape, steps, strict=True)):
        per_axis = [len(tile_coordinates(length, extent, step)) for extent in range(1, longest[axis] + 1)]
        tiles *= np.array(per_axis)[extents[axis] - 1]
    candidates = np.argwhere(visited == visited.min()) + 1
    t, h, w = min(candidates, key=lambda e: (tiles[tuple(e - 1)], -e[2], -e[1], -e[0]))
    return int(t), int(h), int(w)


def tile_coordinates(length: int, extent: int, step: int = 1) -> list[np.ndarray]:
    """List the coordinates of each tile of an axis: ``extent`` members of one residue class modulo ``step``."""
    tiles: list[np.ndarray] = []
    for residue in range(min(step, length)):
        members = np.arange(residue, length, step)
        tiles.extend(members[start : start + extent] for start in range(0, len(members), extent))
    return tiles


def visited_keys(grid: Grid, mask: AxisTables, tile: Triple) -> int:
    """Count the keys that all query tiles of the given extents visit, as ``tile_for`` counts them."""
    return sum(
        math.prod(_axis_span(lo, hi, step, extent) for (lo, hi, step), extent in zip(product, tile, strict=True))
        for product in mask.products(grid)
    )


def _axis_span(lo: np.ndarray, hi: np.ndarray, step: int, extent: int) -> int:
    """Sum over an axis's tiles the number of keys between the tile's bounds."""
    length, span = len(lo), 0
    for residue in range(min(step, length)):
        first = np.arange(0, len(range(residue, length, step)), extent)
        low = np.minimum.reduceat(lo[residue::step], first)
        high = np.maximum.reduceat(hi[residue::step], first)
        low = low + (residue - low) % step  # the first member of the class at or above the bound
        span += int(np.maximum((high - low) // step + 1, 0).sum())
    return span


def is_int(value: object) -> TypeGuard[int]:
    """Say whether a value is an integer, booleans excepted."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_triple(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 3 and all(is_int(each) for each in value)


def check_positive(name: str, value: object, least: int = 1) -> int:
    """Return an integer of at least ``least``. Raises TypeError or ValueError naming it otherwise."""
    if not is_int(value):
        raise TypeError(f"{name}={value!r} must be an integer")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    return int(value)


def check_triple(name: str, value: object) -> Triple:
    """Return three positive integers (t, h, w). Raises TypeError or ValueError naming them otherwise."""
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise TypeError(f"{name}={value!r} must be three integers (t, h, w)")
    t, h, w = (check_positive(name, each) for each in value)
    return t, h, w


def as_triple(name: str, value: object) -> Triple:
    """Return three positive integers (t, h, w) from three, or from one for all axes."""
    return check_triple(name, (value,) * 3 if is_int(value) else value)
