"""The token geometry, and the choice of tile against every other tile."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from stattn import masks
from stattn.grid import Grid, Region, as_grid, is_int, tile_coordinates, tile_for, visited_keys
from stattn.masks import CONSTRUCTORS

SMALL_GRIDS = [(1, 1, 1), (1, 1, 7), (2, 3, 5), (3, 5, 7), (4, 6, 6), (5, 1, 9)]


def visited_by_hand(grid: Grid, mask: masks.Mask, tile: tuple[int, int, int]) -> int:
    """Walk the tiles of the grid one by one and count the keys of the boxes they visit, axis members by members."""
    total = 0
    for product in mask.products(grid):
        per_axis = []
        for rule, extent, length in zip(product, tile, grid.shape, strict=True):
            keys = 0
            for residue in range(min(rule.step, length)):
                members = list(range(residue, length, rule.step))
                for start in range(0, len(members), extent):
                    queries = members[start : start + extent]
                    low, high = min(rule.lo[q] for q in queries), max(rule.hi[q] for q in queries)
                    keys += sum(1 for k in members if low <= k <= high)
            per_axis.append(keys)
        total += math.prod(per_axis)
    return total


# Grid and Region.


def test_a_grid_counts_its_tokens() -> None:
    grid = Grid(3, 4, 5, before=2, after=7)
    assert (grid.shape, grid.video, grid.globals, grid.tokens) == ((3, 4, 5), 60, 9, 69)
    assert tuple(grid) == (3, 4, 5)
    assert Grid(3, 4, 5).tokens == 60


def test_grids_are_equal_by_value() -> None:
    assert Grid(3, 4, 5, 0, 6) == Grid(3, 4, 5, after=6)
    assert hash(Grid(3, 4, 5)) == hash(Grid(3, 4, 5))
    assert Grid(3, 4, 5) != Grid(3, 4, 5, 1)


@pytest.mark.parametrize("name", ["t", "h", "w", "before", "after"])
@pytest.mark.parametrize("value, error", [(-1, ValueError), (2.0, TypeError), (True, TypeError), ("3", TypeError)])
def test_a_grid_refuses_what_is_no_extent(name: str, value: object, error: type[Exception]) -> None:
    good = {"t": 2, "h": 3, "w": 4, "before": 1, "after": 1}
    assert Grid(**good).tokens == 26
    with pytest.raises(error, match=f"{name}="):
        Grid(**{**good, name: value})


@pytest.mark.parametrize("name", ["t", "h", "w"])
def test_a_grid_refuses_an_empty_axis(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        Grid(**{"t": 2, "h": 3, "w": 4, name: 0})


def test_as_grid_takes_grids_and_triples() -> None:
    grid = Grid(2, 3, 4, 1)
    assert as_grid(grid) is grid
    assert as_grid((2, 3, 4)) == as_grid([2, 3, 4]) == Grid(2, 3, 4)


@pytest.mark.parametrize("bad", [(2, 3), (2, 3, 4, 5), 24, "234", None])
def test_as_grid_refuses_what_is_no_triple(bad: object) -> None:
    with pytest.raises(TypeError, match="grid="):
        as_grid(bad)  # type: ignore[arg-type]


def test_a_region_counts_its_tokens_and_stays_inside_its_grid() -> None:
    region = Region((1, 0, 2), (2, 3, 2))
    assert region.video == 12
    region.check(Grid(3, 3, 4))
    with pytest.raises(ValueError, match=r"q_region=.*reaches 4 on axis w, beyond the grid's 3"):
        region.check(Grid(3, 3, 3), "q_region")


def test_regions_are_equal_by_value_whether_made_of_lists_or_tuples() -> None:
    assert Region([0, 1, 2], [3, 4, 5]) == Region((0, 1, 2), (3, 4, 5))  # type: ignore[arg-type]
    assert hash(Region([0, 1, 2], [3, 4, 5])) == hash(Region((0, 1, 2), (3, 4, 5)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "origin, extent, name",
    [
        ((-1, 0, 0), (1, 1, 1), "origin"),
        ((0, 0), (1, 1, 1), "origin"),
        ((0, 0, 0), (1, 0, 1), "extent"),
        ((0, 0, 0), (1, 1.5, 1), "extent"),
        ((0, 0, 0), 3, "extent"),
    ],
)
def test_a_region_refuses_what_is_no_box(origin: object, extent: object, name: str) -> None:
    with pytest.raises(ValueError, match=f"Region {name}="):
        Region(origin, extent)  # type: ignore[arg-type]


def test_booleans_are_no_integers() -> None:
    assert is_int(3)
    assert is_int(np.int32(3))
    assert not is_int(True)
    assert not is_int(3.0)


# Tiles.


@pytest.mark.parametrize("length, extent, step", [(10, 3, 1), (10, 3, 3), (7, 4, 2), (5, 8, 1), (3, 1, 5), (1, 1, 1)])
def test_tiles_hold_every_coordinate_once_and_one_residue_each(length: int, extent: int, step: int) -> None:
    tiles = tile_coordinates(length, extent, step)
    assert sorted(np.concatenate(tiles).tolist()) == list(range(length))
    for tile in tiles:
        assert 1 <= len(tile) <= extent
        assert len(set((tile % step).tolist())) == 1
        assert (np.diff(tile) == step).all()


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_visited_keys_are_those_of_the_boxes_walked_by_hand(name: str) -> None:
    for shape in SMALL_GRIDS[1:5]:
        for mask in CONSTRUCTORS[name].examples(shape):
            for tile in ((1, 1, 1), (2, 2, 3), (1, 3, 2), shape):
                assert visited_keys(Grid(*shape), mask, tile) == visited_by_hand(Grid(*shape), mask, tile)


@pytest.mark.parametrize("name", CONSTRUCTORS)
@pytest.mark.parametrize("rows", [1, 4, 12, 64])
def test_no_other_tile_visits_fewer_pairs(name: str, rows: int) -> None:
    for shape in SMALL_GRIDS:
        for mask in CONSTRUCTORS[name].examples(shape):
            chosen = tile_for(Grid(*shape), mask, rows)
            assert math.prod(chosen) <= rows
            others = itertools.product(*(range(1, n + 1) for n in shape))
            least = min(visited_keys(Grid(*shape), mask, tile) for tile in others if math.prod(tile) <= rows)
            assert visited_keys(Grid(*shape), mask, chosen) == least


def test_no_other_tile_visits_fewer_pairs_of_a_union() -> None:
    mask = masks.spatial() | masks.temporal() | masks.window(3, 3, 3, dilation=(1, 1, 2))
    for rows in (3, 8, 32):
        chosen = tile_for(Grid(4, 6, 6), mask, rows)
        others = itertools.product(range(1, 5), range(1, 7), range(1, 7))
        least = min(visited_by_hand(Grid(4, 6, 6), mask, tile) for tile in others if math.prod(tile) <= rows)
        assert visited_by_hand(Grid(4, 6, 6), mask, chosen) == least


def test_a_window_at_video_length_gets_a_square_tile() -> None:
    assert tile_for(Grid(30, 48, 80), masks.window(7, 17, 17), 128) == (2, 8, 8)


def test_per_frame_and_per_place_attention_get_tiles_along_their_axes() -> None:
    t, h, w = tile_for(Grid(8, 16, 16), masks.spatial(), 64)
    assert t == 1
    assert h * w == 64
    t, h, w = tile_for(Grid(64, 4, 4), masks.temporal(), 64)
    assert (t, h, w) == (64, 1, 1)


def test_a_tile_depends_on_values_alone_and_is_cached() -> None:
    tile_for.cache_clear()
    first = tile_for(Grid(9, 10, 11), masks.window(3, 5, 5), 32)
    assert tile_for.cache_info().misses == 1
    assert tile_for(Grid(9, 10, 11), masks.window(3, 5, 5), 32) == first
    assert tile_for.cache_info().hits == 1
    assert tile_for(Grid(9, 10, 11, before=4, after=3), masks.window(3, 5, 5), 32) == first


def test_packed_tables_stand_for_their_mask() -> None:
    grid, mask = Grid(9, 10, 11), masks.window(3, 5, 5, dilation=(1, 2, 1))
    assert tile_for(grid, mask.pack(grid), 32) == tile_for(grid, mask, 32)
    with pytest.raises(ValueError, match=r"grid=\(9, 10, 12\)"):
        tile_for(Grid(9, 10, 12), mask.pack(grid), 32)


def test_a_tile_is_no_longer_than_a_residue_class() -> None:
    assert tile_for(Grid(8, 16, 16), masks.window(3, 3, 3, dilation=(2, 4, 4)), 128) == (4, 4, 4)
    assert tile_for(Grid(1, 1, 12), masks.window(1, 1, 3, dilation=(1, 1, 4)), 128) == (1, 1, 3)


def test_a_mask_that_sees_nothing_still_gets_a_tile() -> None:
    nothing = masks.tables(t=([3, 3, 3], [0, 0, 0]))
    tile = tile_for(Grid(3, 4, 5), nothing, 16)
    assert math.prod(tile) <= 16


@pytest.mark.parametrize("rows", [0, -3, 2.5, True])
def test_a_tile_of_no_rows_is_refused(rows: object) -> None:
    tile_for(Grid(2, 3, 4), masks.full(), 1)
    with pytest.raises(ValueError, match="rows="):
        tile_for(Grid(2, 3, 4), masks.full(), rows)  # type: ignore[arg-type]


def test_whole_rows_as_a_float_are_refused_even_when_the_integer_is_cached() -> None:
    tile_for(Grid(2, 3, 4), masks.full(), 8)
    with pytest.raises(ValueError, match=r"rows=8\.0"):
        tile_for(Grid(2, 3, 4), masks.full(), 8.0)  # type: ignore[arg-type]
