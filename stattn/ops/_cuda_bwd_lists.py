"""Plans of the CUDA backward for block lists: written on the device, from tables that the problem alone decides.

A plan of dK and dV has key tiles for rows and query tiles for columns, one of dQ the other way round. Tiles of rows are
cut into slabs, those of columns into parts, each in one box. What a slab sees of a box is one of few *patterns* on each
axis; the tables hold the masks for all patterns of t, h and w.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product as every
from typing import NamedTuple

import numpy as np
import torch

from stattn.grid import Triple
from stattn.ops._cuda_bwd_plan import COLUMNS
from stattn.ops._cuda_tiles import AXES, KERNELS, ROWS, triple
from stattn.problem import Problem

MOST_GROUPS = 1 << 15  # of masks, each of 64 rows
MOST_BITS = 1 << 28  # that are compared to find patterns on an axis


class Cut(NamedTuple):
    """How lists are cut for a kernel.

    config: the kernel's. plan_layout: the integers of its plan. layout: those of the pass that writes it, but for two.
    tables: what that pass reads. tiles: of the plan, for each head. slabs_of_tile: of a tile of the lists. visits: all
    pairs of a tile of the plan and one of columns. pair: records of boxes and masks that one takes at most. head:
    integers of the plan before its tiles. scratch: integers for the lists of a head.
    """

    config: int
    plan_layout: list[int]
    layout: list[int]
    tables: np.ndarray
    tiles: int
    slabs_of_tile: int
    visits: int
    pair: int
    head: int
    scratch: int


@lru_cache(maxsize=512)
def why_not(problem: Problem) -> str | None:
    """Say what in block lists the kernels of the backward cannot walk, or None."""
    for kernel in ("kv", "dq"):
        for dim in KERNELS[kernel].configs:
            axes = _Axes(problem, kernel, dim)
            if not axes.begins:
                return f"query tiles of {problem.q_tile} do not begin at multiples of {KERNELS[kernel].unit} along w"
            if not axes.fits:
                return f"partial tiles of mask {problem.masks[0]} have too many patterns on an axis"
            if math.prod(len(each) for each in axes.patterns) > MOST_GROUPS:
                return f"partial tiles of mask {problem.masks[0]} have more than {MOST_GROUPS} patterns"
    return None


@lru_cache(maxsize=128)
def cut(problem: Problem, heads: int, head_dim: int, kernel: str) -> Cut:
    """Cut the tiles of a problem. kernel: "kv" or "dq"."""
    axes = _Axes(problem, kernel, head_dim)
    shape, slab, slabs, stacked = problem.grid.shape, axes.slab, axes.slabs, axes.stacked
    warpgroups = KERNELS[kernel].warpgroups
    counts = [-(-n // warpgroups) if axis == stacked else n for axis, n in enumerate(slabs)]
    places = np.indices(counts).reshape(3, -1)
    t, h, w = places
    if kernel == "kv":
        places = places[:, np.lexsort((t, w, h, w // COLUMNS, h // COLUMNS))]
    first = places.copy()
    first[stacked] *= warpgroups
    corners = np.stack([*(first[axis] * slab[axis] for axis in AXES), 0 * first[0]], 1)
    row_tiles = [-(-n // extent) for n, extent in zip(shape, axes.row_tile, strict=True)]
    rows = np.zeros((len(corners), warpgroups), np.int64)
    for group in range(warpgroups):
        place = [first[axis] + (group if axis == stacked else 0) for axis in AXES]
        exists = place[stacked] < slabs[stacked]
        tile = [np.minimum(place[a], slabs[a] - 1) * slab[a] // axes.row_tile[a] for a in AXES]
        rows[:, group] = np.where(exists, np.ravel_multi_index(tuple(tile), tuple(row_tiles)), -1)
    parts = [corners.reshape(-1), rows.reshape(-1), np.concatenate(axes.numbers), axes.groups().reshape(-1)]
    starts, at = [], 0
    for number, part in enumerate(parts):
        starts.append(at)
        parts[number] = np.pad(part.astype(np.int32), (0, -len(part) % 4))
        at += len(parts[number])
    group_integers = len(parts[3])
    # Behind the heads' numbers lies that by which blocks begin together. Groups begin at multiples of their size.
    groups_record = -(-(heads + 1) // (4 * ROWS)) * ROWS
    first_record = groups_record + group_integers // 4
    pattern_at = np.cumsum([0, *(len(each) for each in axes.numbers)])[:3]
    columns = [-(-n // extent) for n, extent in zip(shape, axes.column_tile, strict=True)]
    cuts = [extent // part for extent, part in zip(axes.column_tile, axes.part, strict=True)]
    q_tiles, k_tiles = math.prod(row_tiles), math.prod(columns)
    if kernel == "kv":
        q_tiles, k_tiles = k_tiles, q_tiles
    layout = [heads, q_tiles, k_tiles, int(kernel == "kv"), int(axes.short), warpgroups, stacked, len(corners)]
    layout += [*shape, *slab, *columns, *axes.column_tile, *axes.part, *cuts]
    layout += [n * c for n, c in zip(columns, cuts, strict=True)]
    layout += [*pattern_at, *(len(each) for each in axes.patterns)]
    layout += [groups_record, groups_record * 4 // (axes.width // 32 * ROWS), first_record, *starts, group_integers]
    plan_layout = [*shape, *shape, *slab, *axes.box, 1, 1, 1, stacked, len(corners), 0, 0, 1, 0, 0]
    plan_layout += [0, 0, 0, heads]
    slabs_of_tile = math.prod(extent // n for extent, n in zip(axes.row_tile, slab, strict=True))
    bits = math.prod(row_tiles) * -(-math.prod(columns) // 32)
    return Cut(
        KERNELS[kernel].configs[head_dim][0].number,
        [int(each) for each in plan_layout],
        [int(each) for each in layout],
        np.concatenate(parts),
        len(corners),
        slabs_of_tile,
        len(corners) * math.prod(columns),
        math.prod(cuts) * (1 + warpgroups),
        4 * first_record,
        2 * bits + 2 * len(corners),
    )


@lru_cache(maxsize=1024)  # captured graphs go on reading tables: few are ever given up
def _tables(problem: Problem, heads: int, head_dim: int, kernel: str, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(cut(problem, heads, head_dim, kernel).tables).to(device)


def write(
    problem: Problem,
    heads: int,
    head_dim: int,
    kernel: str,
    count: torch.Tensor,
    index: torch.Tensor,
    partial: torch.Tensor | None,
) -> tuple[int, list[int], torch.Tensor]:
    """Write the plan of one sample on its device; returns the kernel's configuration, the layout and the plan.

    count: [heads or 1, query tiles]. index, partial: [heads or 1, query tiles, most].
    """
    made = cut(problem, heads, head_dim, kernel)
    lists, tiles, most = index.shape
    pairs = min(tiles * most * made.slabs_of_tile, made.visits)
    room = made.head + 4 * lists * (2 * made.tiles + pairs * made.pair)
    plan = torch.empty(room, dtype=torch.int32, device=index.device)
    scratch = torch.empty(lists * made.scratch, dtype=torch.int32, device=index.device)
    tables = _tables(problem, heads, head_dim, kernel, index.device)
    torch.ops.stattn.attention_backward_lists.default(
        count, index, partial, tables, plan, scratch, [*made.layout, lists, made.slabs_of_tile]
    )
    return made.config, made.plan_layout, plan


class _Axes:
    """What slabs see of boxes, axis by axis.

    begins: whether boxes begin where the kernel's may. fits: whether there are few enough of both to compare.
    patterns: of each axis, booleans [patterns, products, slab, box], where product 0 is what lies inside of a tile and
    of the grid, for tiles that are whole, and the others are those of the mask. numbers: of each axis, which pattern
    whole tiles have at each box, then those of partial ones for each slab and box, flat.
    """

    def __init__(self, problem: Problem, kernel: str, head_dim: int) -> None:
        assert problem.q_tile is not None
        assert problem.k_tile is not None
        self.row_tile, self.column_tile = problem.q_tile, problem.k_tile
        if kernel == "kv":
            self.row_tile, self.column_tile = self.column_tile, self.row_tile
        warpgroups, configs, unit, *_ = KERNELS[kernel]
        columns = configs[head_dim][0].box
        self.width = 64 if columns <= 64 else 128
        self.slab = _part(self.row_tile, ROWS, 1)
        self.part = _part(self.column_tile, columns, unit)
        t, h, w = self.part
        self.box = (t, h, -(-w // unit) * unit)
        self.short = self.box != self.part or math.prod(self.box) < columns
        shape = problem.grid.shape
        self.begins = self.part[2] % unit == 0 or shape[2] <= self.part[2]
        self.slabs = triple(-(-n // extent) for n, extent in zip(shape, self.slab, strict=True))
        self.stacked = min(AXES, key=lambda axis: self._cost(axis, warpgroups))
        products = [rules for mask in problem.masks for rules in mask.products(problem.grid)]
        self.patterns: list[np.ndarray] = []
        self.numbers: list[np.ndarray] = []
        self.fits = True
        for axis in AXES:
            length, extent = shape[axis], self.column_tile[axis]
            tile = np.arange(0, length, extent)
            start = (tile[:, None] + np.arange(0, extent, self.part[axis])).reshape(-1)
            place = np.arange(self.box[axis])
            column = start[:, None] + place  # [boxes, box]
            inside = column < length  # where boxes are longer than parts, the grid ends before both
            bits = (self.slabs[axis] if products else 0) * len(start) * self.slab[axis] * self.box[axis]
            if bits * (1 + len(products)) > MOST_BITS:
                self.fits = False
                return
            row = np.minimum(np.arange(self.slabs[axis] * self.slab[axis]), length - 1).reshape(-1, self.slab[axis])
            found = np.zeros((len(start) * (1 + len(row) * bool(products)), 1 + len(products), *self._cell(axis)), bool)
            found[: len(start), 0] = inside[:, None]
            column = np.minimum(column, length - 1)
            for number, rules in enumerate(products):
                rule = rules[axis]
                r, c = row[:, None, :, None], column[None, :, None, :]  # [slabs, boxes, slab, box]
                query, key = (c, r) if kernel == "kv" else (r, c)
                seen = (rule.lo[query] <= key) & (key <= rule.hi[query]) & ((key - query) % rule.step == 0)
                found[len(start) :, 1 + number] = (seen & inside[None, :, None]).reshape(-1, *self._cell(axis))
            packed = np.packbits(found.reshape(len(found), -1), axis=1)
            _, first, numbers = np.unique(packed, axis=0, return_index=True, return_inverse=True)
            self.patterns.append(found[first])
            self.numbers.append(numbers.reshape(-1))

    def _cell(self, axis: int) -> tuple[int, int]:
        return self.slab[axis], self.box[axis]

    def _cost(self, axis: int, warpgroups: int) -> tuple[float, int]:
        """Guess what slabs side by side see together, and count those that are none."""
        alike = self.row_tile[axis] // self.slab[axis] % warpgroups == 0
        others = 1.0 if alike else 1.0 + self.slab[axis] / 36
        return others * -(-self.slabs[axis] // warpgroups) * warpgroups / self.slabs[axis], axis

    def groups(self) -> np.ndarray:
        """Give the masks of 64 rows for all patterns of t, h and w: int32 [groups, 64, words]."""
        rows = np.unravel_index(np.minimum(np.arange(ROWS), math.prod(self.slab) - 1), self.slab)
        columns = np.unravel_index(np.arange(math.prod(self.box)), self.box)
        of_t, of_h, of_w = (
            each[:, :, row[:, None], column] for each, row, column in zip(self.patterns, rows, columns, strict=True)
        )  # [patterns, products, rows, columns]
        found = []
        for t, h in every(of_t, of_h):
            seen = (t & h & of_w).any(1)
            seen = np.pad(seen, ((0, 0), (0, 0), (0, self.width - seen.shape[2])))
            found.append(np.packbits(seen, axis=2, bitorder="little").view(np.int32))
        return np.concatenate(found)


def _part(tile: Triple, most: int, unit: int) -> Triple:
    """Find the largest part that divides a tile on each axis and fits a box; of several the longest in w.

    Where it can, it is a multiple of ``unit`` along w.
    """
    divisors = [[n for n in range(1, extent + 1) if extent % n == 0] for extent in tile]
    divisors[2] = [n for n in divisors[2] if n % unit == 0] or divisors[2]
    fitting = [(t, h, w) for t, h, w in every(*divisors) if t * h * -(-w // unit) * unit <= most]
    if not fitting:  # a part of one token, in a box of one unit
        return (1, 1, 1)
    return max(fitting, key=lambda part: (math.prod(part), part[2], part[1]))
