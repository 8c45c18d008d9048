"""The plans of the reference: few groups for the masks of real grids, and a cache that stays small."""

from __future__ import annotations

import numpy as np
import pytest

from stattn import masks
from stattn.grid import Grid, Region
from stattn.masks import Mask
from stattn.reference.walk import Group, _Plans, walk


def plan(mask: Mask, shape: tuple[int, int, int]) -> tuple[Group, ...]:
    box = Region((0, 0, 0), shape)
    return walk(mask, Grid(*shape), box, box)


@pytest.mark.parametrize(
    "mask, shape, groups, megabytes",
    [
        (masks.spatial() | masks.temporal(), (21, 45, 80), 42, 16),
        (masks.radial(((0, None, None), (None, 2, 2))), (21, 45, 80), 126, 64),
        (masks.frame_causal(3, window=6, sink_frames=1), (21, 30, 52), 6, 1),
        (masks.window(9, 13, 25), (21, 30, 52), 45, 48),
        (masks.full(), (21, 30, 52), 1, 1),
    ],
    ids=str,
)
def test_tiles_that_see_alike_are_one_group(
    mask: Mask, shape: tuple[int, int, int], groups: int, megabytes: int
) -> None:
    found = plan(mask, shape)
    assert len(found) <= groups
    assert sum(x.nbytes for group in found for x in group if x is not None) <= megabytes << 20
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


def some_plan(size: int) -> tuple[Group, ...]:
    empty = np.zeros(0, np.int8)
    return (Group(empty, empty, empty, np.zeros(size, np.int8), empty, None),)


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
