"""Which runs of neighbouring tokens the tiles of a mask see whole, where no mask cuts them.

Dense, per-frame and frame-causal attention are made of such runs; kernels that walk them need no bounds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from stattn.grid import Grid, Region
from stattn.masks import Mask
from stattn.plan import geometry, transposed
from stattn.tables import Product, is_whole

MAX_RUNS = 16


@lru_cache(maxsize=1024)
def runs(
    mask: Mask, grid: Grid, q_box: Region, k_box: Region, q_globals: bool, globals_see: str, rows: int, by_key: bool
) -> np.ndarray | None:
    """List the runs of neighbouring tokens that tiles of neighbouring rows see whole, or None where a mask cuts them.

    by_key: rows are keys, columns queries. Returns int32 [tiles, 2 + 2 runs], those that see most first: a tile's first
    row and number of rows, at most ``rows``, then first column and number of columns of each run, 0 behind the last;
    all count tokens in memory, global ones included.
    """
    laid = geometry(mask, Grid(*grid.shape), q_box, k_box)
    products, own, other = laid.products, laid.q_box, laid.k_box
    if by_key:
        products, own, other = transposed(products), other, own
    if laid.overlap or any(not is_whole(w) or t.step > 1 or h.step > 1 for t, h, w in products):
        return None
    own_before, other_before = grid.before, grid.before
    if not q_globals:
        own_before, other_before = (grid.before, 0) if by_key else (0, grid.before)
    globals_of_rows = q_globals or by_key
    sides = [(0, grid.before), (other_before + other.video, grid.after)] if q_globals or not by_key else []
    everything = [(0, other.video + sum(length for _, length in sides))] if sides else [(0, other.video)]
    tiles: list[tuple[int, int, list[tuple[int, int]]]] = []
    for start, count in ((0, grid.before), (own_before + own.video, grid.after)) if globals_of_rows else ():
        found = everything if globals_see == "all" else [(other_before, other.video)] if by_key else []
        found = _joined(found + (sides if globals_see != "all" else []))
        tiles += [(start + i, min(rows, count - i), found) for i in range(0, count, rows)]
    line = own.extent[2]
    for t, h in itertools.product(range(own.extent[0]), range(own.extent[1])):
        found = list(sides) if globals_see == "all" or not by_key else []
        for product in products:
            found += _runs_of(product, t + own.origin[0], h + own.origin[1], other, other_before)
        found = _joined(found)
        if len(found) > MAX_RUNS:
            return None
        start = own_before + (t * own.extent[1] + h) * line
        tiles += [(start + i, min(rows, line - i), found) for i in range(0, line, rows)]
    tiles.sort(key=lambda tile: -sum(length for _, length in tile[2]))
    table = np.zeros((len(tiles), 2 + 2 * max(1, *(len(found) for *_, found in tiles))), np.int32)
    for number, (start, count, found) in enumerate(tiles):
        record = [start, count, *itertools.chain(*found)]
        table[number, : len(record)] = record
    return table


def _runs_of(product: Product, t: int, h: int, columns: Region, before: int) -> list[tuple[int, int]]:
    """Give the runs of a box's tokens that the row at (t, h) sees by a product that frees the last axis."""
    intervals = []
    for axis, x in enumerate((t, h)):
        first = max(int(product[axis].lo[x]), columns.origin[axis])
        last = min(int(product[axis].hi[x]), columns.origin[axis] + columns.extent[axis] - 1)
        if first > last:
            return []
        intervals.append((first - columns.origin[axis], last - first + 1))
    (first_t, frames), (first_h, lines) = intervals
    size = columns.extent[2]
    starts = [before + ((first_t + i) * columns.extent[1] + first_h) * size for i in range(frames)]
    return _joined([(start, lines * size) for start in starts])


def _joined(found: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join runs that touch; they are disjoint."""
    joined: list[tuple[int, int]] = []
    for start, length in sorted(found):
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        elif length:
            joined.append((start, length))
    return joined
