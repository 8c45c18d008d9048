"""Plans: their tables, read as a kernel reads them, show exactly the pairs that the mask allows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pytest
import torch
from mask_definitions import Triple
from probes import Case

from stattn import masks, plan, plan_runs
from stattn.grid import Grid, Region
from stattn.kernels import attention as forward
from stattn.kernels import attention_bwd as backward
from stattn.masks import CONSTRUCTORS, Mask
from stattn.plan import HEADER, Walk
from stattn.problem import Problem

SHAPES = [(1, 1, 7), (3, 5, 4), (4, 4, 6), (5, 1, 7), (6, 3, 3)]
UNIONS = [
    masks.temporal() | masks.spatial(),
    masks.window(3, 3, 3, dilation=(1, 1, 1)) | masks.window(1, 1, 2, dilation=(1, 1, 2)),
    masks.frame_causal(2, window=2, sink_frames=1) | masks.temporal(),
    masks.window(3, 1, 3) | masks.window(1, 3, 3) | masks.spatial(),
]


def whole(shape: Triple) -> Region:
    return Region((0, 0, 0), shape)


def truth(mask: Mask, shape: Triple, q_box: Region, k_box: Region) -> np.ndarray:
    """Which keys of one box the queries of another see. Booleans [queries, keys]"""
    places = np.arange(Grid(*shape).video).reshape(shape)
    rows, columns = (
        places[tuple(slice(o, o + e) for o, e in zip(box.origin, box.extent, strict=True))].reshape(-1)
        for box in (q_box, k_box)
    )
    return allowed(mask, shape)[rows][:, columns]


@lru_cache(maxsize=256)
def allowed(mask: Mask, shape: Triple) -> np.ndarray:
    return mask.allowed(shape).numpy()


class Tables:
    """The array that kernels read, read by hand."""

    def __init__(self, walk: Walk) -> None:
        encoded = plan.encode([walk], [0])
        assert encoded.dtype == np.int32
        data = encoded[encoded[0] :].astype(np.int64)
        self.data = data
        self.rows, self.tile, self.steps, self.tiles, self.columns, self.box, self.lengths, self.factors = (
            data[3 * i : 3 * i + 3] for i in range(8)
        )
        self.guards, self.products, self.record = (int(x) for x in data[24:27])
        self.shift = data[27:30]

    def members(self, tile: tuple[int, ...]) -> list[np.ndarray]:
        """The coordinates of a tile's rows on each axis."""
        found = []
        for place, step, extent, length in zip(tile, self.steps, self.tile, self.rows, strict=True):
            start = place % step + step * extent * (place // step)
            found.append(np.arange(start, min(length, start + step * extent), step))
        return found

    def residues(self, product: int) -> np.ndarray:
        start = HEADER + product * self.record
        return self.data[start : start + 3]

    def intervals(self, product: int, tile: tuple[int, ...]) -> list[np.ndarray]:
        """For each axis the first column, how many, and those from which and up to which all rows see them."""
        start, found = HEADER + product * self.record + 4, []
        for place, tiles in zip(tile, self.tiles, strict=True):
            found.append(self.data[start + 4 * place : start + 4 * place + 4])
            start += 4 * tiles
        return found

    def bounds(self, product: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The packed bounds of rows [n, 3]."""
        start, total = HEADER + product * self.record + 4 + 4 * self.tiles.sum(), self.lengths.sum()
        low = high = np.zeros(len(rows), np.int64)
        for axis, length in enumerate(self.lengths):
            at = start + (rows[:, axis] if length > 1 else 0)
            low, high = low + self.data[at], high + self.data[at + total]
            start += length
        return low, high

    def within(self, product: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Which columns [m, 3] lie in the bounds of rows [n, 3], by the packed integers. [n, m]"""
        low, high = self.bounds(product, rows)
        field = columns @ self.factors
        guarded = (field + self.guards - low[:, None]) & (high[:, None] - field)
        assert (field + self.guards - low[:, None]).max(initial=0) < 2**31, "kernels have 32 bits"
        return (guarded & self.guards) == self.guards

    def same_class(self, product: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        apart = (rows + self.shift)[:, None] - columns[None]
        return (apart % self.residues(product) == 0).all(-1)


def cells(axes: list[np.ndarray]) -> np.ndarray:
    """All (t, h, w) of three axes. [n, 3]"""
    return np.array(list(itertools.product(*axes)), np.int64).reshape(-1, 3)


def walked(walk: Walk) -> np.ndarray:
    """How often each pair of a row and a column is counted when the tables are walked. int [rows, columns]"""
    read = Tables(walk)
    counted = np.zeros((read.rows.prod(), read.columns.prod()), np.int64)
    visited = 0
    for tile in itertools.product(*map(range, read.tiles)):
        rows = cells(read.members(tile))
        for product in range(read.products):
            intervals, step = read.intervals(product, tile), read.residues(product)
            for at in itertools.product(*(range(0, v[1], e) for v, e in zip(intervals, read.box, strict=True))):
                visited += 1
                steps = [np.arange(start, start + extent) for start, extent in zip(at, read.box, strict=True)]
                inside = cells([each < v[1] for each, v in zip(steps, intervals, strict=True)]).all(-1)
                columns = cells([v[0] + s * each for each, v, s in zip(steps, intervals, step, strict=True)])
                seen = read.within(product, rows, columns)
                assert not seen[:, ~inside].any(), "a column behind the end of its interval is seen"
                if all(v[2] <= a and a + e <= v[3] for a, e, v in zip(at, read.box, intervals, strict=True)):
                    assert seen.all(), "a box said to be seen wholly is not"
                for earlier in range(product):
                    twice = seen & read.within(earlier, rows, columns) & read.same_class(earlier, rows, columns)
                    assert walk.overlap or not twice.any(), "products overlap and the plan does not say so"
                    seen &= ~twice
                r, c = seen.nonzero()
                scales = [np.array([e[1] * e[2], e[2], 1]) for e in (read.rows, read.columns)]
                np.add.at(counted, (rows[r] @ scales[0], columns[c] @ scales[1]), 1)
    assert visited == walk.visited
    return counted


def examples(shape: Triple) -> Iterator[Mask]:
    for constructor in CONSTRUCTORS.values():
        yield from constructor.examples(shape)
    generator = np.random.default_rng(sum(shape))
    for _ in range(2):  # tables that are neither sorted nor gapless
        low, high = (generator.integers(0, shape[2], shape[2]).tolist() for _ in range(2))
        yield masks.tables(w=(low, high))
    for mask in UNIONS:
        try:
            mask.pack(shape)
        except ValueError:  # a window over its axis
            continue
        yield mask


def boxes(shape: Triple, seed: int) -> list[tuple[Region, Region]]:
    """The whole grid for q and k, and a part of it for one or the other."""
    generator = np.random.default_rng(seed)
    origin = [int(generator.integers(0, n)) for n in shape]
    extent = [int(generator.integers(1, n - o + 1)) for n, o in zip(shape, origin, strict=True)]
    part = Region((origin[0], origin[1], origin[2]), (extent[0], extent[1], extent[2]))
    return [(whole(shape), whole(shape)), (part, whole(shape)), (whole(shape), part)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tables_show_what_the_mask_allows_in_parts_of_the_grid_and_both_ways(shape: Triple) -> None:
    for turn, mask in enumerate(examples(shape)):
        for number, (q_box, k_box) in enumerate(boxes(shape, turn)):
            if number and number % 2 != turn % 2:
                continue
            seen = truth(mask, shape, q_box, k_box)
            rows = (4, 16)[turn // 2 % 2]
            for walk, wanted in (
                (plan.by_query(mask, Grid(*shape), q_box, k_box, rows, 8), seen),
                (plan.by_key(mask, Grid(*shape), q_box, k_box, rows, 8), seen.T),
            ):
                assert (walked(walk) == wanted).all(), (mask, q_box, k_box, rows, walk)


def test_boxes_of_a_ring_cache_lie_in_one_frame() -> None:
    shape = (4, 3, 5)
    for mask in (masks.full(), masks.temporal(), masks.frame_causal(2, window=3), masks.window(3, 3, 3)):
        slots = Region((0, 0, 0), (6, 3, 5))  # more of them than frames
        seen = truth(mask, shape, whole(shape), whole(shape))
        queries = plan.by_query(mask, Grid(*shape), whole(shape), slots, 16, 16, frames=True)
        assert queries.box[0] == 1
        assert (walked(queries) == seen).all(), mask
        keys = plan.by_key(mask, Grid(*shape), whole(shape), slots, 16, 16, frames=True)
        assert (keys.tile[0], keys.tiles[0]) == (1, 4)
        assert (walked(keys) == seen.T).all(), mask


def test_whole_boxes_are_found_where_most_of_a_window_is_seen() -> None:
    """Boxes without element masks are what long calls live on: most of a dense walk, many of a wide window's."""

    def share(mask: Mask, shape: Triple) -> float:
        walk = plan.by_query(mask, Grid(*shape), whole(shape), whole(shape), 64, 64)
        fully = 0
        for visits in walk.visits:
            per_axis = []
            for interval, extent in zip(visits, walk.box, strict=True):
                first = -(-interval.whole_from // extent)
                per_axis.append(np.maximum(interval.whole_to // extent - first, 0).sum())
            fully += int(np.prod(per_axis))
        return fully / walk.visited

    assert share(masks.full(), (4, 16, 16)) == 1
    assert share(masks.spatial(), (4, 16, 16)) == 1
    assert share(masks.sliding_tile((2, 8, 8), (1, 3, 3)), (4, 32, 32)) == 1
    assert share(masks.frame_causal(1), (8, 16, 16)) > 0.9
    assert share(masks.window(9, 25, 33), (21, 45, 80)) > 0.2


def allows(products: tuple[plan.Product, ...]) -> np.ndarray:
    """How many products allow each pair. [N, N]"""
    total = np.zeros((1, 1), np.int64)
    for product in products:
        t, h, w = (rule.matrix().astype(np.int64) for rule in product)
        total = total + np.kron(np.kron(t, h), w)
    return total


@pytest.mark.parametrize("shape", [(3, 5, 4), (6, 6, 7)], ids=str)
def test_products_cut_apart_allow_what_their_union_allows(shape: Triple) -> None:
    masks_of = [*UNIONS, masks.radial(((0, None, None), (1, 3, 3), (2, 1, 1))), masks.frame_causal(1, 2, 1)]
    apart = 0
    for mask in masks_of:
        try:
            products = mask.products(shape)
        except ValueError:
            continue
        cut, overlap = plan.disjoint(products)
        count = allows(cut)
        assert ((count > 0) == (allows(products) > 0)).all(), mask
        assert overlap or (count <= 1).all(), mask
        apart += not overlap and len(products) > 1
    assert apart >= 3


def test_an_overlap_that_no_axis_can_cut_out_is_flagged() -> None:
    cross = masks.window(5, 1, 3) | masks.window(3, 3, 5)
    _, overlap = plan.disjoint(cross.products((6, 6, 6)))
    assert overlap
    walk = plan.by_query(cross, Grid(6, 6, 6), whole((6, 6, 6)), whole((6, 6, 6)), 16, 16)
    assert walk.overlap
    _, overlap = plan.disjoint((masks.spatial() | masks.temporal()).products((6, 6, 6)))
    assert not overlap


def test_axes_that_are_not_cut_are_merged() -> None:
    def laid(mask: Mask, q_box: Region | None = None) -> plan.Geometry:
        return plan.geometry(mask, Grid(4, 6, 8), q_box or whole((4, 6, 8)), whole((4, 6, 8)))

    assert laid(masks.full()).shape == (1, 1, 192)
    assert laid(masks.spatial()).shape == (1, 4, 48)
    assert laid(masks.temporal()).shape == (1, 4, 48)
    assert laid(masks.window(3, None, None)).shape == (1, 4, 48)
    assert laid(masks.window(3, 3, None)).shape == (4, 6, 8)
    assert laid(masks.full(), Region((1, 0, 0), (2, 6, 8))).shape == (1, 1, 192)
    assert laid(masks.full(), Region((0, 1, 0), (4, 5, 8))).shape == (1, 4, 48)
    slots = plan.geometry(masks.full(), Grid(4, 6, 8), whole((4, 6, 8)), whole((4, 6, 8)), frames=True)
    assert slots.shape == (4, 1, 48)


@pytest.mark.parametrize("frames", [2, 3, 5, 8, 13, 16, 20, 21, 33])
@pytest.mark.parametrize("shape", [(45, 80), (3, 8)])
def test_temporal_attention_visits_at_most_eight_times_the_allowed_pairs(frames: int, shape: tuple[int, int]) -> None:
    grid = Grid(frames, *shape)
    box = whole(grid.shape)
    problem = Problem(grid, (masks.temporal(),), box, box, True, "all", 1.0)
    for configs, by_key in ((forward.CONFIGS, False), (backward.DQ_CONFIGS, False), (backward.DKDV_CONFIGS, True)):
        for size, dim in itertools.product((2, 4), (64, 128)):
            made = forward.make_plan(problem, 1, dim, size, False, by_key, configs, torch.device("cpu"))
            make, chosen = plan.by_key if by_key else plan.by_query, made.config
            walk = make(masks.temporal(), grid, box, box, chosen.rows, chosen.columns)
            assert walk.allowed == frames * grid.video
            assert walk.visited * chosen.rows * chosen.columns <= 8 * walk.allowed, (chosen, size)


@pytest.mark.parametrize("shape", [(1, 7, 9), (2, 7, 9)])
def test_temporal_attention_of_a_frame_or_two_visits_as_few_pairs_as_tiles_allow(shape: Triple) -> None:
    problem = Problem(Grid(*shape), (masks.temporal(),), whole(shape), whole(shape), True, "all", 1.0)
    for configs, by_key in (
        (forward.CONFIGS, False),
        (backward.DQ_CONFIGS, False),
        (backward.DKDV_CONFIGS, True),
    ):
        made = forward.make_plan(problem, 1, 128, 2, False, by_key, configs, torch.device("cpu"))
        assert (made.config.rows, made.config.columns) == (16, 16)


@pytest.mark.parametrize("shape", SHAPES)
def test_allowed_pairs_are_counted_in_parts_of_the_grid_and_both_ways(shape: Triple) -> None:
    parts = [whole(shape), Region((0, shape[1] // 2, 0), (shape[0], shape[1] - shape[1] // 2, (shape[2] + 1) // 2))]
    for constructor, q_box, k_box in itertools.product(CONSTRUCTORS.values(), parts, parts):
        mask = constructor.examples(shape)[-1]
        for make in (plan.by_query, plan.by_key):
            walk = make(mask, Grid(*shape), q_box, k_box, 16, 16)
            seen = truth(mask, shape, q_box, k_box).sum()
            assert walk.overlap or walk.allowed == seen, mask
            assert walk.allowed >= seen


RUNS = [
    masks.full(),
    masks.spatial(),
    masks.frame_causal(1),
    masks.frame_causal(2, 3, 1),
    masks.window(3, None, None),
    masks.window(1, 2, None),
    masks.tables(t=([4, 0, 0, 2], [3, 1, 3, 2])),
]


@pytest.mark.parametrize("mask", RUNS, ids=str)
@pytest.mark.parametrize("by_key", [False, True])
def test_runs_are_what_the_mask_allows_in_parts_of_the_grid_and_beside_global_tokens(mask: Mask, by_key: bool) -> None:
    shape = (4, 3, 5)
    parts = [whole(shape), Region((1, 1, 2), (2, 2, 3)), Region((0, 0, 0), (4, 2, 5))]
    for (before, after), q_globals, see in itertools.product(
        ((0, 0), (2, 0), (3, 20)), (True, False), ("all", "globals")
    ):
        for q_box, k_box in itertools.product(parts, parts):
            grid = Grid(*shape, before, after)
            options = {"q_region": q_box, "k_region": k_box, "globals_see": see}
            want = Case(grid, mask, heads=1, options=options, q_globals=q_globals).truth()[0].numpy()
            table = plan_runs.runs(mask, grid, q_box, k_box, q_globals, see, 8, by_key)
            assert table is not None
            assert table.dtype == np.int32
            found = np.zeros(want.T.shape if by_key else want.shape, np.int64)
            listed = np.zeros(len(found), np.int64)
            for first, rows, *runs in table:
                assert 0 < rows <= 8
                listed[first : first + rows] += 1
                for column, length in zip(runs[::2], runs[1::2], strict=True):
                    found[first : first + rows, column : column + length] += 1
            assert (listed == 1).all()
            assert (found == (want.T if by_key else want)).all()
            lengths = table[:, 3::2].sum(1)
            assert (np.diff(lengths) <= 0).all()  # those that take longest first


def test_masks_that_cut_a_run_have_no_runs() -> None:
    box = whole((4, 3, 5))
    for mask in (masks.temporal(), masks.window(1, 3, 3), masks.window(2, 1, 5, dilation=(2, 1, 1)), UNIONS[3]):
        for by_key in (False, True):
            assert plan_runs.runs(mask, Grid(4, 3, 5), box, box, True, "all", 8, by_key) is None


def test_coordinates_that_take_more_bits_than_an_integer_has_are_refused() -> None:
    fits = plan.by_query(
        masks.window(3, 3, 3), Grid(200, 150, 200), whole((200, 150, 200)), whole((200, 150, 200)), 64, 64
    )
    assert len(plan.encode([fits], [0]))
    shape = (300, 300, 300)
    wide = plan.by_query(masks.window(3, 3, 3), Grid(*shape), whole(shape), whole(shape), 64, 64)
    with pytest.raises(ValueError, match=r"coordinates of merged extents \(300, 300, 300\) take 33 bits"):
        plan.encode([wide], [0])


def test_heads_share_the_walk_of_their_mask() -> None:
    grid, box = Grid(3, 4, 5), whole((3, 4, 5))
    walks = [plan.by_query(mask, grid, box, box, 16, 16) for mask in (masks.spatial(), masks.window(3, 3, 3))]
    encoded = plan.encode(walks, [1, 0, 1, 1])
    alone = [plan.encode([walk], [0])[1:] for walk in walks]
    assert encoded[0] == encoded[2] == encoded[3] == 4 + len(alone[0])
    assert encoded[1] == 4
    assert (encoded[4:] == np.concatenate(alone)).all()


def test_rows_that_see_nothing_have_nothing_to_visit() -> None:
    mask = masks.tables(w=([0, 8, 8, 8, 8, 8, 8, 7], [1, -1, -1, -1, -1, -1, -1, 7]))
    walk = plan.by_query(mask, Grid(1, 1, 8), whole((1, 1, 8)), whole((1, 1, 8)), 2, 4)
    assert (walked(walk) == truth(mask, (1, 1, 8), whole((1, 1, 8)), whole((1, 1, 8)))).all()
    assert walk.visits[0][2].length.tolist()[1:3] == [0, 0]


def test_long_grids_are_planned_quickly_and_small() -> None:
    """720p of Wan: a walk of kilobytes that takes milliseconds, whatever the number of tokens."""
    shape = (21, 45, 80)
    for mask in (
        masks.window(7, 17, 17),
        masks.sliding_tile((6, 8, 8), (3, 3, 3)),
        masks.radial(((1, None, None), (4, 9, 9))),
    ):
        for make in (plan.by_query, plan.by_key):
            walk = make(mask, Grid(*shape), whole(shape), whole(shape), 128, 64)
            assert plan.encode([walk], [0]).nbytes < 64 << 10


@pytest.mark.parametrize("dim, size", list(itertools.product((16, 64, 128, 256), (2, 4))))
def test_gpus_with_little_shared_memory_get_configs_that_fit_it(
    monkeypatch: pytest.MonkeyPatch, dim: int, size: int
) -> None:
    monkeypatch.setattr(forward, "roomy", lambda device: False)
    shape = (2, 16, 16)
    problem = Problem(Grid(*shape), (masks.window(1, 5, 5),), whole(shape), whole(shape), True, "all", 1.0)
    for configs, by_key in ((forward.CONFIGS, False), (backward.DQ_CONFIGS, False), (backward.DKDV_CONFIGS, True)):
        made = forward.make_plan.__wrapped__(problem, 1, dim, size, False, by_key, configs, torch.device("cpu"))
        assert dim <= made.config.little
