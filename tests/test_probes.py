"""Every mask as the reference applies it, in the forward and in each gradient, against ``mask.allowed``."""

from __future__ import annotations

import pytest
import torch
from probes import BIG_GRIDS, GRIDS, Case, check, counts_by_axis

from stattn import masks
from stattn.blocks import block_list, lower, tile_count
from stattn.grid import Grid, Region
from stattn.masks import CONSTRUCTORS, EMPTY, FULL, PARTIAL


def some_chunks(tokens: int, dim: int) -> list[int] | None:
    """All chunks of a small grid; the first, middle and last of a larger one."""
    last = (tokens - 1) // dim
    return None if tokens <= 200 else sorted({0, last // 2, last})


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_constructor_is_seen_as_it_is_on_awkward_grids(name: str) -> None:
    for turn, shape in enumerate(GRIDS):
        examples = CONSTRUCTORS[name].examples(shape)
        for number, mask in enumerate(examples):
            tokens = Grid(*shape).video
            part = min(len(examples), 4)
            if tokens > 60 and number % part != turn % part:
                continue  # on larger grids a part of the examples, another one on each grid
            check(Case(Grid(*shape), mask, heads=1), impl="reference", dim=64, only=some_chunks(tokens, 64))


@pytest.mark.parametrize("shape", BIG_GRIDS, ids=str)
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_constructor_is_seen_as_it_is_on_large_grids(name: str, shape: tuple[int, int, int]) -> None:
    if shape == BIG_GRIDS[-1] and name in ("full", "spatial", "temporal", "tables", "frame_causal"):
        return  # nothing is left to see that the other large grid did not show
    mask = CONSTRUCTORS[name].examples(shape)[-1]
    check(Case(Grid(*shape), mask, heads=1), impl="reference", dim=32, only=[61])


@pytest.mark.parametrize("globals_see", ["all", "globals"])
@pytest.mark.parametrize("before, after", [(3, 0), (0, 5), (2, 4)])
@pytest.mark.parametrize("padded", [False, True])
def test_global_tokens_are_seen_beside_every_mask(before: int, after: int, globals_see: str, padded: bool) -> None:
    shape = (3, 5, 7)
    valid = (torch.arange(before + after) % 3 != 1) if padded else None
    for constructor in CONSTRUCTORS.values():
        for mask in constructor.examples(shape)[-2:]:
            case = Case(Grid(*shape, before, after), mask, valid=valid, options={"globals_see": globals_see})
            check(case, impl="reference")


def test_queries_may_leave_out_their_global_tokens() -> None:
    valid = torch.tensor([True, False, True, True])
    check(Case(Grid(3, 4, 5, 1, 3), masks.window(3, 3, 3), valid=valid, q_globals=False), impl="reference")


UNIONS = [
    masks.window(1, 3, 3) | masks.window(3, 1, 3),
    masks.window(3, 3, 3, dilation=(1, 2, 1)) | masks.window(3, 3, 3),
    masks.spatial() | masks.temporal(),
    masks.spatial() | masks.temporal() | masks.window(3, 3, 3, causal=True),
    (masks.frame_causal(2) & masks.window(3, 3, 5)) | masks.spatial(),
    masks.window(3, 3, 3, dilation=(2, 1, 1)) & masks.window(4, 3, 5),
]


@pytest.mark.parametrize("mask", UNIONS, ids=str)
def test_overlapping_products_count_no_key_twice(mask: masks.Mask) -> None:
    for shape in [(6, 7, 8), (7, 9, 10), (8, 8, 5)]:
        check(Case(Grid(*shape), mask, heads=1), impl="reference", dim=64, only=some_chunks(Grid(*shape).video, 64))


def test_each_head_has_its_own_mask() -> None:
    per_head = [masks.window(3, 3, 3), masks.spatial(), masks.frame_causal(2), masks.window(3, 3, 3)]
    check(Case(Grid(5, 6, 7, 0, 3), per_head, heads=4), impl="reference")


REGIONS = [
    (Region((0, 0, 0), (6, 7, 8)), Region((2, 1, 3), (3, 5, 4))),
    (Region((2, 0, 0), (2, 7, 8)), Region((0, 0, 0), (4, 7, 8))),
    (Region((1, 2, 3), (4, 3, 5)), Region((0, 1, 2), (6, 6, 6))),
    (Region((5, 6, 7), (1, 1, 1)), Region((0, 0, 0), (6, 7, 8))),
]


@pytest.mark.parametrize("q_region, k_region", REGIONS)
def test_regions_see_what_their_place_in_the_grid_sees(q_region: Region, k_region: Region) -> None:
    grid = Grid(6, 7, 8, 0, 2)
    options = {"q_region": q_region, "k_region": k_region}
    for constructor in CONSTRUCTORS.values():
        for mask in constructor.examples(grid.shape)[:3] + constructor.examples(grid.shape)[-2:]:
            check(Case(grid, mask, options=options), impl="reference")


@pytest.mark.parametrize("frames", [[0, 1, 2], [4, 5, 2, 3], [-1, 3, -1, 0, 5], [-1]])
def test_ring_caches_see_the_frames_that_their_slots_hold(frames: list[int]) -> None:
    grid = Grid(6, 4, 5, 1, 2)
    options = {"q_region": Region((3, 0, 0), (2, 4, 5)), "k_frames": torch.tensor(frames, dtype=torch.int32)}
    for mask in (masks.full(), masks.frame_causal(2, window=4, sink_frames=1), masks.window(3, 3, 3), masks.temporal()):
        check(Case(grid, mask, options=options), impl="reference")
    options["k_region"] = Region((0, 1, 0), (6, 2, 5))
    check(Case(grid, masks.window(3, 3, 3), options=options), impl="reference")


def test_block_lists_are_walked_as_listed() -> None:
    shape, q_tile, k_tile = (5, 6, 7), (2, 3, 4), (3, 2, 4)
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(3, (1, 2, tile_count(shape, q_tile), tile_count(shape, k_tile)), generator=generator)
    kinds = torch.tensor([EMPTY, PARTIAL, FULL], dtype=torch.int8)[table]
    kinds[0, 0, 1] = EMPTY
    check(Case(Grid(*shape), block_list(shape, q_tile, k_tile, kinds, masks.window(3, 3, 3))), impl="reference")
    whole = torch.where(kinds == FULL, kinds, EMPTY)
    check(Case(Grid(*shape), block_list(shape, q_tile, k_tile, whole)), impl="reference")
    check(Case(Grid(*shape), masks.window(3, 5, 3) | block_list(shape, q_tile, k_tile, whole)), impl="reference")
    check(Case(Grid(*shape), lower(masks.window(3, 5, 3), shape, q_tile, k_tile)), impl="reference")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_masks_are_the_same_in_every_dtype(dtype: torch.dtype) -> None:
    for constructor in CONSTRUCTORS.values():
        check(Case(Grid(5, 6, 7, 0, 3), constructor.examples((5, 6, 7))[0]), impl="reference", dtype=dtype)


def test_dense_attention_by_pytorch_sees_everything() -> None:
    check(Case(Grid(3, 5, 7, 2, 3), masks.full()), impl="sdpa")


def test_rows_are_counted_by_axis_as_in_a_table() -> None:
    for shape in [(3, 5, 7), (6, 7, 8)]:
        every = [mask for each in CONSTRUCTORS.values() for mask in each.examples(shape)]
        for mask in [*every, UNIONS[0], masks.spatial() | masks.temporal() | masks.frame_causal(2, 2, 1)]:
            assert torch.equal(counts_by_axis(mask, Grid(*shape)), mask.allowed(shape).sum(-1)), mask
