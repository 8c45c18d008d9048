"""How the reference cuts the queries of a grid: tiles of any extents on each axis, by what they cost on a CPU.

A tile of queries visits, for each product of the mask, the box of keys from the least lower to the greatest upper bound
of its queries on every axis. Neighbours with the same bounds, as at the border of a window or within a chunk, form a
*run* that visits nothing in vain; cuts therefore lie between runs. A tile of ``rows`` queries costs, in products of a
query with a key::

    keys * (rows + BLOCK_ROWS * blocks(rows) + GATHER_ROWS)

Given the cuts of two axes, the best cuts of the third are a shortest path. The search begins with single runs and goes
round the axes until nothing improves: it finds a local minimum, and nothing is timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from stattn.tables import Packed

# Measured with PyTorch's fused kernel (fp32, head dimension 128): a call cuts its rows into blocks of 256 from 768 rows
# on, of 64 from 192 on, else of 32, and every block reads the keys anew, for about the cost of BLOCK_ROWS rows more.
# To gather a key with its value costs as much as GATHER_ROWS rows.
BLOCKS = ((768, 256), (192, 64), (1, 32))
BLOCK_ROWS = 11
GATHER_ROWS = 26

MOST_ROWS = 1024  # of a tile of several runs, whose mask has an entry for every row and key
MOST_RUNS = 64  # of one axis in a tile: bounds the search
MOST_CUTS = 4096  # of one axis and residue class: where there are more runs, several count as one


class _Line(NamedTuple):
    """The queries of one axis and residue class, in runs.

    queries: int64 [queries], relative to the query box. edges: int64 [runs + 1], where runs begin among them. lo, hi:
    int64 [products, runs], their bounds. step: the residue.
    """

    queries: np.ndarray
    edges: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    step: int

    def segments(self, first: int, end: int) -> _Tiles:
        """Give the tiles that reach from each run of ``first`` to ``end - 1`` up to the run before ``end``."""
        lo = np.minimum.accumulate(self.lo[:, first:end][:, ::-1], axis=1)[:, ::-1]
        hi = np.maximum.accumulate(self.hi[:, first:end][:, ::-1], axis=1)[:, ::-1]
        keys = np.maximum((hi - lo) // self.step + 1, 0)
        return _Tiles(self.edges[end] - self.edges[first:end], keys, np.arange(first, end) < end - 1)


class _Tiles(NamedTuple):
    """Tiles of one axis or of two: int64 rows [tiles], int64 keys [products, tiles], bool [tiles] of several runs."""

    rows: np.ndarray
    keys: np.ndarray
    mixed: np.ndarray


def query_tiles(packed: Packed, queries: Sequence[range], keys: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Cut a box of queries into tiles.

    queries: the coordinates of the box on each axis. keys: the coordinates of the keys on each axis, negative for none.
    Returns per axis the coordinates of each tile's queries, relative to the box; a tile keeps to one residue class.
    """
    axes = [
        _lines([(r.lo, r.hi, r.step) for r in rules], held, near)
        for rules, held, near in zip(zip(*packed.products(), strict=True), queries, keys, strict=True)
    ]
    cuts = [[list(range(len(line.edges))) for line in lines] for lines in axes]
    least, axis, settled = np.inf, 0, 0
    while settled < 3:
        a, b = (_sizes(axes[other], cuts[other]) for other in range(3) if other != axis)
        found = [_cut(line, _price(_together(a, b))) for line in axes[axis]]
        cost = sum(cost for _, cost in found)
        if cost < 0.999 * least:
            cuts[axis] = [cut for cut, _ in found]
            least, settled = cost, 0
        axis, settled = (axis + 1) % 3, settled + 1
    return [
        [line.queries[line.edges[i] : line.edges[j]] for line, cut in zip(*each, strict=True) for i, j in _pairs(cut)]
        for each in zip(axes, cuts, strict=True)
    ]


def tile_cost(rows: np.ndarray) -> np.ndarray:
    """Give what one key costs in tiles of so many rows, in products of a query with a key."""
    block = np.select([rows >= least for least, _ in BLOCKS], [size for _, size in BLOCKS])
    return rows + BLOCK_ROWS * -(-rows // block) + GATHER_ROWS


def _lines(rules: Sequence[tuple[np.ndarray, np.ndarray, int]], queries: range, keys: np.ndarray) -> list[_Line]:
    """Split an axis by residue class, and each class into runs."""
    there = keys[keys >= 0]
    first, last = (there.min(), there.max()) if len(there) else (0, -1)
    box = slice(queries.start, queries.stop)
    lo = np.maximum(np.stack([lo[box] for lo, _, _ in rules]), first).astype(np.int64)
    hi = np.minimum(np.stack([hi[box] for _, hi, _ in rules]), last).astype(np.int64)
    step = int(np.gcd.reduce([step for _, _, step in rules]))
    lines = []
    for residue in range(min(step, len(queries))):
        members = np.arange(residue, len(queries), step)
        bounds = np.concatenate([lo[:, members], hi[:, members]])
        starts = np.flatnonzero(np.concatenate([[True], (np.diff(bounds, axis=1) != 0).any(axis=0)]))
        starts = starts[:: -(-len(starts) // MOST_CUTS)]
        low = np.minimum.reduceat(lo[:, members], starts, axis=1)
        high = np.maximum.reduceat(hi[:, members], starts, axis=1)
        lines.append(_Line(members, np.append(starts, len(members)), low, high, step))
    return lines


def _pairs(cut: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cut))


def _sizes(lines: list[_Line], cuts: list[list[int]]) -> _Tiles:
    """Give the tiles of an axis that is cut, before the runs named, in each of its lines."""
    found = [line.segments(i, j) for line, cut in zip(lines, cuts, strict=True) for i, j in _pairs(cut)]
    rows, keys, mixed = zip(*((each.rows[0], each.keys[:, 0], each.mixed[0]) for each in found), strict=True)
    return _Tiles(np.array(rows), np.stack(keys, axis=1), np.array(mixed))


def _together(a: _Tiles, b: _Tiles) -> _Tiles:
    """Give the tiles of two axes; those with as many rows count as one, with the keys of all."""
    rows, mixed = np.outer(a.rows, b.rows).ravel(), np.logical_or.outer(a.mixed, b.mixed).ravel()
    keys = np.einsum("pa,pb->pab", a.keys, b.keys).reshape(len(a.keys), -1)
    kinds, which = np.unique(rows * 2 + mixed, return_inverse=True)
    return _Tiles(kinds // 2, np.stack([np.bincount(which, each, len(kinds)) for each in keys]), kinds % 2 == 1)


def _price(others: _Tiles) -> Callable[[_Tiles], np.ndarray]:
    """Give the function that says what tiles of one axis cost together with those of the other two."""

    def price(tiles: _Tiles) -> np.ndarray:
        rows = np.outer(tiles.rows, others.rows)
        costs = np.einsum("pa,pb->ab", tiles.keys, others.keys) * tile_cost(rows)
        costs[(rows > MOST_ROWS) & np.logical_or.outer(tiles.mixed, others.mixed)] = np.inf
        return costs.sum(axis=1)

    return price


def _cut(line: _Line, price: Callable[[_Tiles], np.ndarray]) -> tuple[list[int], float]:
    """Find the cheapest cuts of a line: the runs before which it is cut, its ends included, and their cost."""
    runs = len(line.edges) - 1
    least, origin = np.zeros(runs + 1), np.zeros(runs + 1, np.int64)
    for end in range(1, runs + 1):
        first = max(0, end - MOST_RUNS)
        costs = least[first:end] + price(line.segments(first, end))
        origin[end] = first + costs.argmin()
        least[end] = costs.min()
    cut = [runs]
    while cut[-1] > 0:
        cut.append(int(origin[cut[-1]]))
    return cut[::-1], float(least[-1])
