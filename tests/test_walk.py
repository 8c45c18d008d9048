"""The plans of the reference: tiles that cost little, few groups, keys in boxes, and a cache that stays small."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from stattn import masks
from stattn.grid import Grid, Region, tile_coordinates, tile_for
from stattn.masks import Mask
from stattn.reference import tiles
from stattn.reference.tiles import query_tiles, tile_cost
from stattn.reference.walk import LEAST_BOX, Group, _boxes, _Plans, walk


def plan(mask: Mask, shape: tuple[int, int, int]) -> tuple[Group, ...]:
    box = Region((0, 0, 0), shape)
    return walk(mask, Grid(*shape), box, box)


@pytest.mark.parametrize(
    "mask, shape, groups, megabytes",
    [
        (masks.spatial() | masks.temporal(), (21, 45, 80), 63, 20),
        (masks.radial(((0, None, None), (None, 2, 2))), (21, 45, 80), 126, 64),
        (masks.frame_causal(3, window=6, sink_frames=1), (21, 30, 52), 6, 1),
        (masks.window(9, 13, 25), (21, 30, 52), 48, 64),
        (masks.full(), (21, 30, 52), 1, 1),
    ],
    ids=str,
)
def test_tiles_that_see_alike_are_one_group(
    mask: Mask, shape: tuple[int, int, int], groups: int, megabytes: int
) -> None:
    found = plan(mask, shape)
    assert len(found) <= groups
    assert sum(x.nbytes for group in found for x in group if isinstance(x, np.ndarray)) <= megabytes << 20
    rows = np.concatenate([group.rows().reshape(-1) for group in found])
    assert np.array_equal(np.sort(rows), np.arange(Grid(*shape).video))


def test_a_row_sees_no_token_twice() -> None:
    mask = masks.window(1, 3, 3) | masks.window(3, 1, 3) | masks.spatial() | masks.temporal()
    for group in plan(mask, (5, 6, 7)):
        keys = group.keys()
        seen = np.ones((len(group.q), len(group.k)), bool) if group.mask is None else group.mask
        for row in seen:
            for tile in keys:
                assert len(np.unique(tile[row])) == row.sum()


MASKS = [
    masks.window(9, 15, 25),
    masks.window(21, 10, 16),
    masks.window(3, 5, 5, dilation=(2, 1, 3)),
    masks.sliding_tile((7, 10, 13), (1, 2, 2)),
    masks.frame_causal(3, window=6, sink_frames=1),
    masks.spatial() | masks.temporal(),
]


def cost(mask: Mask, grid: Grid, cuts: list[list[np.ndarray]], steps: list[int]) -> int:
    """What the tiles of a grid cost: each tile's rows, and the box of keys from its least to its greatest bound."""
    total = 0
    for product in mask.products(grid):
        spans = [
            [max((rule.hi[x].max() - rule.lo[x].min()) // step + 1, 0) for x in cut]
            for rule, cut, step in zip(product, cuts, steps, strict=True)
        ]
        keys = np.array([math.prod(each) for each in itertools.product(*spans)])
        rows = np.array([math.prod(map(len, each)) for each in itertools.product(*cuts)])
        total += int((keys * tile_cost(rows)).sum())
    return total


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_tiles_hold_every_query_once_and_cost_no_more_than_equal_ones(mask: Mask) -> None:
    grid = Grid(21, 30, 52)
    cuts = query_tiles(mask.pack(grid), [range(n) for n in grid.shape], [np.arange(n) for n in grid.shape])
    for axis, length in enumerate(grid.shape):
        assert np.array_equal(np.sort(np.concatenate(cuts[axis])), np.arange(length))
    steps = [int(np.gcd.reduce([product[axis].step for product in mask.products(grid)])) for axis in range(3)]
    least = cost(mask, grid, cuts, steps)
    for rows in (16, 64, 192, 256, 768):
        equal = tile_for(grid, mask, rows)
        others = [tile_coordinates(*each) for each in zip(grid.shape, equal, steps, strict=True)]
        assert least <= cost(mask, grid, others, steps)


def test_a_mask_is_held_for_few_rows_at_once() -> None:
    """Where a tile needs a mask, it has an entry for each of its rows and keys: even a wide window must be cut."""
    found = [len(group.q) for group in plan(masks.window(9, 13, 15), (12, 18, 20)) if group.mask is not None]
    assert 0 < max(found) <= tiles.MOST_ROWS


def test_a_box_is_told_from_other_sets_of_tokens() -> None:
    tokens = np.arange(6 * 20 * 30).reshape(6, 20, 30)
    for part in (tokens[1:, 3:15, 2:29], tokens[::2, :, ::3], tokens[2], tokens[:, :, 5:6], tokens):
        boxes = _boxes([part.ravel()])
        if part.size < LEAST_BOX:
            assert boxes is None
            continue
        assert boxes is not None
        t, h, w = (step * np.arange(size) for size, step in zip(boxes[0].sizes, boxes[0].steps, strict=True))
        assert np.array_equal((t[:, None, None] + h[:, None] + w).ravel(), part.ravel() - part.flat[0])
    for other in (np.delete(tokens[1:, 3:15], 17), np.concatenate([tokens[0].ravel(), tokens[3:, :9].ravel()])):
        assert _boxes([other.ravel()]) is None


def some_plan(size: int) -> tuple[Group, ...]:
    empty = np.zeros(0, np.int8)
    return (Group(empty, empty, empty, np.zeros(size, np.int8), empty, None, None),)


def test_plans_are_kept_up_to_a_number_of_bytes() -> None:
    plans = _Plans(100)
    first = plans.get(("a",), lambda: some_plan(60))
    plans.get(("b",), lambda: some_plan(40))
    assert plans.get(("a",), lambda: some_plan(1)) is first
    plans.get(("c",), lambda: some_plan(30))  # drops b, the one used longest ago
    assert plans.bytes == 90
    assert plans.get(("a",), lambda: some_plan(1)) is first
    large = plans.get(("d",), lambda: some_plan(500))
    assert plans.bytes == 500
    assert plans.get(("d",), lambda: some_plan(1)) is large
