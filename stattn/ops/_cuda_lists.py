"""How the CUDA kernels cut block lists: slabs of query tiles, boxes of key tiles, and masks of partial tiles.

The lists themselves stay on the device; what is made here depends on the problem alone.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product as every
from typing import NamedTuple

import numpy as np
import torch

from stattn.grid import Triple
from stattn.ops._cuda_tiles import AXES, ROWS
from stattn.problem import Problem
from stattn.tables import Product, Rule, is_whole, whole

GROUPS = 3  # slabs that are computed together
BOX = 64  # keys
MOST_TILES = 1 << 15  # key tiles
MOST_WORDS = 1 << 22  # 8-byte masks of rows on an axis


class Layout(NamedTuple):
    """How lists are cut.

    integers: int64, those of AttentionLists in csrc/stattn.h from its shape to its products. triples: of slabs, a list.
    k_tiles: their number.
    """

    integers: torch.Tensor
    triples: int
    k_tiles: int


@lru_cache(maxsize=512)
def why_not(problem: Problem) -> str | None:
    """Say what in block lists the kernels cannot walk, or None."""
    assert problem.q_tile is not None
    assert problem.k_tile is not None
    if problem.grid.globals:
        return "does not serve global tokens beside block lists"
    for name, tile in (("query", problem.q_tile), ("key", problem.k_tile)):
        part = math.prod(part_of(tile))
        if part < min(math.prod(tile), ROWS // 2):
            return f"{name} tiles of {tile} do not divide into equal parts of {ROWS // 2} to {ROWS} tokens"
    k_tiles = _count(problem.grid.shape, problem.k_tile)
    if k_tiles > MOST_TILES:
        return f"block lists of {k_tiles} key tiles, more than {MOST_TILES}"
    words = sum(_words(problem, rules) for rules in _products(problem))
    if words > MOST_WORDS:
        return f"partial tiles of mask {problem.masks[0]} need tables of {words * 8 >> 20} MB"
    return None


def part_of(tile: Triple) -> Triple:
    """Find the largest part of at most 64 tokens that divides a tile on each axis; of several the longest in w."""
    divisors = [[n for n in range(1, extent + 1) if extent % n == 0] for extent in tile]
    fitting = [(t, h, w) for t, h, w in every(*divisors) if t * h * w <= ROWS]
    return max(fitting, key=lambda part: (math.prod(part), part[2], part[1]))


@lru_cache(maxsize=128)
def layout(problem: Problem) -> Layout:
    """Cut the tiles of a problem."""
    assert problem.q_tile is not None
    assert problem.k_tile is not None
    shape, slab, box = problem.grid.shape, part_of(problem.q_tile), part_of(problem.k_tile)
    slabs = [-(-n // extent) for n, extent in zip(shape, slab, strict=True)]

    def cost(axis: int) -> tuple[float, int]:
        """Guess what slabs side by side see together, and count those that are none."""
        alike = problem.q_tile is not None and problem.q_tile[axis] // slab[axis] % GROUPS == 0
        others = 1.0 if alike else 1.0 + slab[axis] / 12  # windows of some 24 tokens
        return others * -(-slabs[axis] // GROUPS) * GROUPS / slabs[axis], axis

    stacked = min(AXES, key=cost)
    triples = math.prod(-(-n // GROUPS) if axis == stacked else n for axis, n in enumerate(slabs))
    products = len(_products(problem)) - 1
    integers = [*shape, *problem.q_tile, *problem.k_tile, *slab, *box, stacked, products]
    return Layout(torch.tensor(integers), triples, _count(shape, problem.k_tile))


@lru_cache(maxsize=1024)  # captured graphs go on reading tables: few are ever given up
def on_device(problem: Problem, device: torch.device) -> torch.Tensor:
    """Give the tables of a problem on a device, copied there once."""
    return torch.from_numpy(tables(problem)).to(device)


@lru_cache(maxsize=128)
def tables(problem: Problem) -> np.ndarray:
    """Say what rows see of boxes, axis by axis: a key is seen if all three axes of one product say so. int32, flat

    The first product is what lies inside of a tile and of the grid, for tiles that are whole; then those of the mask.
    Each has a record of 8 integers: for the axes t, h and w, and one unused, where its table starts and how far one row
    of it is from the next, in words of 8 bytes counted from the beginning. A table has a word for each query coordinate
    and box of the axis, or one for each box if all queries see the same; bit n stands for key n of a box.
    """
    products = _products(problem)
    header, parts, start = [], [], 4 * len(products)
    for rules in products:
        first, step = [0, 0, 0, 0], [0, 0, 0, 0]
        for axis in AXES:
            table = _table(problem, rules[axis], axis)
            first[axis], step[axis] = start, table.shape[1] if len(table) > 1 else 0
            parts.append(table.reshape(-1))
            start += table.size
        header.append([first, step])
    return np.concatenate([np.array(header, np.int32).reshape(-1), *(part.view(np.int32) for part in parts)])


def _products(problem: Problem) -> list[Product]:
    t, h, w = (whole(n) for n in problem.grid.shape)
    return [(t, h, w), *(rules for mask in problem.masks for rules in mask.products(problem.grid))]


def _words(problem: Problem, rules: Product) -> int:
    assert problem.k_tile is not None
    boxes = [
        -(-n // e) * (e // p)
        for n, e, p in zip(problem.grid.shape, problem.k_tile, part_of(problem.k_tile), strict=True)
    ]
    return sum(boxes[axis] * (1 if is_whole(rules[axis]) else len(rules[axis].lo)) for axis in AXES)


def _table(problem: Problem, rule: Rule, axis: int) -> np.ndarray:
    """Say which keys of each box the rows see on one axis: uint64 [rows, boxes]."""
    assert problem.k_tile is not None
    box, extent, length = part_of(problem.k_tile), problem.k_tile[axis], problem.grid.shape[axis]
    column = np.arange(math.prod(box))
    place = np.unravel_index(column, box)[axis]
    start = np.arange(0, -(-length // extent) * extent, box[axis])
    key = start[:, None] + place  # [boxes, columns]
    row = np.arange(1 if is_whole(rule) else length)[:, None, None]
    lo, hi = rule.lo[: len(row), None, None], rule.hi[: len(row), None, None]
    seen = (lo <= key) & (key <= hi) & ((key - row) % rule.step == 0)  # no bound lies behind the grid
    bits = np.packbits(np.pad(seen, ((0, 0), (0, 0), (0, BOX - len(column)))), axis=2, bitorder="little")
    return bits.view(np.uint64)[..., 0]


def _count(shape: Triple, tile: Triple) -> int:
    return math.prod(-(-n // extent) for n, extent in zip(shape, tile, strict=True))
