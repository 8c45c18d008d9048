"""The CUDA kernels of the attention backward: the plans of dK and dV, and on a Hopper GPU the proof of all gradients.

    python -m pytest -m gpu tests/test_attention_cuda_bwd.py --record FILE

Both ways are held to all of it: dQ summed in memory in any order, and in a fixed one.
"""

from __future__ import annotations

import itertools
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from probes import BIG_GRIDS, GRIDS, Case, check
from test_attention import (
    SHIFTS,
    assert_rule_1,
    check_compiled,
    check_operations,
    draw,
    largest_score,
    results,
)
from test_attention_cuda import HOPPER, SHAPES, planned_masks, problem
from test_attention_kernels import NUMBERS, check_numbers, check_strides_of_dout, gradients, random_call, same
from test_attention_proof import AROUND, option_cases
from test_attention_proof_numbers import LENGTHS, check_sampled
from test_probes import UNIONS

import stattn
from stattn import extension, masks
from stattn.blocks import BlockList
from stattn.grid import Grid, Region, Triple
from stattn.masks import CONSTRUCTORS
from stattn.ops import _cuda_bwd, _cuda_bwd_lists, _cuda_bwd_plan, _cuda_plan, _cuda_tiles
from stattn.ops._cuda_tiles import KERNELS, Config
from stattn.problem import Problem

DEVICE = "cuda"
gpu = pytest.mark.gpu
apart = pytest.mark.apart
hopper = pytest.mark.skipif(not HOPPER or not extension.LIBRARY.exists(), reason="no Hopper GPU, or no CUDA library")
Covered = dict[str, int]
WAYS = (True, False)  # of ``deterministic``

# --- plans ------------------------------------------------------------------------------------------------------------


def read_plan(given: Problem, heads: int, head_dim: int) -> list[np.ndarray]:
    """Count, as the kernel walks a plan, how often each key of each head takes part with each query: [Nq, Nk] each."""
    number, integers, array = _cuda_bwd_plan.layout(given, heads, head_dim)
    q_shape, k_shape, slab, box, steps = (np.array(integers[i : i + 3]) for i in (0, 3, 6, 9, 12))
    stacked, tiles, before, after, q_globals, line_tiles, line_record, pieces, split_tiles, split_record = integers[15:]
    columns = next(each.box for each in KERNELS["kv"].configs[head_dim] if each.number == number)
    assert box[2] % KERNELS["kv"].unit == 0
    apart = _cuda_bwd_plan.boxes_lie_apart(given, heads, head_dim)
    assert apart or box.prod() <= 64 or _cuda_tiles._by_sixteen(tuple(box))
    for extents in (slab, box):
        assert ((steps <= 8) | (extents == 1)).all()  # as far as a tensor copy steps
        assert (steps * extents <= 256).all()
    width = 64 if columns <= 64 else 128
    records = array.reshape(-1, 4)
    bits = np.unpackbits(array.view(np.uint8), bitorder="little").astype(bool)
    bits = bits[: bits.size // (64 * width) * 64 * width].reshape(-1, 64, width)
    rows, queries = (np.stack(np.unravel_index(np.arange(e.prod()), tuple(e)), 1) for e in (slab, box))
    all_keys = k_shape.prod() + before + after
    all_queries = q_shape.prod() + q_globals * (before + after)
    splits = {tuple(records[split_record + 2 * i]): records[split_record + 2 * i + 1] for i in range(split_tiles)}
    found = []
    for head in range(heads):
        seen, written = np.zeros((all_queries, all_keys), np.int64), np.zeros(all_keys, np.int64)
        numbers: dict[tuple[int, ...], list[int]] = {}
        listed = [array[head] + 2 * tile for tile in range(tiles)]
        for record in (*(line_record + 2 * tile for tile in range(line_tiles)), *listed):
            *corner, word = records[record]
            kind, piece = word & 3, (word >> 2) - 1
            place_of = (*corner, kind)
            first_box, boxes, first_mask, masked = records[record + 1]
            assert len(queries) == columns or masked == boxes
            if piece >= 0:
                numbers.setdefault(place_of, []).append(piece)
            for group in range(2):
                if kind:  # rows of 64 global keys
                    row = tokens = corner[2] + group * 64 + np.arange(64)
                    key = np.where(tokens < (before, after)[kind - 1], tokens + (kind - 1) * (all_keys - after), -1)
                else:
                    row = rows
                    place = np.array(corner) + steps * (rows + group * slab * (np.arange(3) == stacked))
                    inside = (place < k_shape).all(1)
                    key = np.ravel_multi_index(tuple(np.minimum(place, k_shape - 1).T), tuple(k_shape)) + before
                    key = np.where(inside, key, -1)
                real = key >= 0
                if piece < 0 or splits[place_of][0] == piece:
                    written[key[real]] += 1
                for number in range(boxes):
                    *first, what = records[first_box + number]
                    if what:
                        assert q_globals
                        tokens = first[2] + np.arange(len(queries))
                        inside = tokens < (before, after)[what - 1]
                        query = np.where(inside, tokens + (what - 1) * (all_queries - after), 0)
                    else:
                        assert first[2] // steps[2] % KERNELS["kv"].unit == 0  # where a copy of statistics begins
                        place = np.array(first) + steps * queries
                        inside = (place < q_shape).all(1)
                        query = np.ravel_multi_index(tuple(np.minimum(place, q_shape - 1).T), tuple(q_shape))
                        query += q_globals * before
                    allowed = np.ones((len(row), width), bool)
                    if number < masked:
                        index, _, _, mark = records[first_mask + group * masked + number]
                        if mark < 0:  # the warpgroup leaves the box out
                            continue
                        assert mark == 0
                        allowed &= bits[index, : len(row)]
                        assert not allowed[:, len(queries) :].any()
                    allowed = allowed[real][:, : len(queries)]
                    assert not allowed[:, ~inside].any()
                    np.add.at(seen, (query[inside][None], key[real][:, None]), allowed[:, inside])
        assert (written == 1).all()
        for place_of, each in numbers.items():
            first_piece, count = splits[place_of][:2]
            assert each == list(range(first_piece, first_piece + count))
        assert sorted(sum(numbers.values(), [])) == list(range(pieces))
        found.append(seen)
    return found


def served(given: Problem) -> bool:
    return _cuda_bwd_plan.why_not(given) is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_plan_visits_each_allowed_pair_once_and_no_other(shape: Triple, head_dim: int) -> None:
    examples = [mask for mask in planned_masks(shape) if served(problem(shape, mask))]
    assert len(examples) > 10
    for mask in examples:
        (seen,) = read_plan(problem(shape, mask), 1, head_dim)
        assert (seen == mask.allowed(shape).numpy()).all(), f"{mask}"


@pytest.mark.parametrize("before, after", [(5, 0), (0, 70), (3, 200)])
@pytest.mark.parametrize("q_globals", [True, False])
def test_global_tokens_are_planned_beside_the_video(before: int, after: int, q_globals: bool) -> None:
    grid, everything = Grid(3, 4, 6, before, after), Region((0, 0, 0), (3, 4, 6))
    for mask in (masks.full(), masks.window(3, 3, 3), masks.spatial(), masks.window(2, 3, 2, dilation=(1, 1, 3))):
        for see in ("all", "globals"):
            (seen,) = read_plan(Problem(grid, (mask,), everything, everything, q_globals, see, 0.1), 1, 128)
            want = mask.allowed(grid, globals_see=see).numpy()
            assert (seen == (want if q_globals else want[before : before + 72])).all(), f"{mask} {see}"


def test_heads_with_masks_of_their_own_have_the_same_tiles() -> None:
    shape = (4, 6, 6)
    each = (masks.window(3, 3, 3), masks.spatial(), masks.window(3, 3, 3), masks.frame_causal(2))
    given = problem(shape, *each)
    for mask, seen in zip(each, read_plan(given, 4, 128), strict=True):
        assert (seen == mask.allowed(shape).numpy()).all(), f"{mask}"
    _, integers, array = _cuda_bwd_plan.layout(given, 4, 128)
    first = [array.reshape(-1, 4)[array[head] :][: 2 * integers[16] : 2] for head in range(4)]
    assert all((corners == first[0]).all() for corners in first)


@pytest.mark.parametrize("dilation", [(1, 2, 3), (2, 1, 8), (3, 9, 1)])
def test_dilated_windows_are_walked_by_residue_class(dilation: Triple) -> None:
    shape = (6, 18, 27)
    everything = np.arange(6 * 18 * 27).reshape(shape)
    part = Region((1, 2, 5), (4, 13, 17))
    for size in ((2, 2, 3), (1, 2, 1)):
        mask = masks.window(*size, dilation=dilation)
        for q_box, k_box in ((None, None), (part, None), (None, part)):
            (seen,) = read_plan(problem(shape, mask, q_box=q_box, k_box=k_box), 1, 128)
            q, k = (everything[:, 2:15, 5:22][1:5] if box else everything for box in (q_box, k_box))
            assert (seen == mask.allowed(shape).numpy()[np.ix_(q.reshape(-1), k.reshape(-1))]).all(), f"{mask}"


def test_parts_of_a_grid_are_planned_as_parts() -> None:
    shape = (4, 6, 6)
    q_box, k_box = Region((1, 2, 0), (2, 3, 6)), Region((0, 1, 1), (4, 5, 4))
    q, k = (
        np.ravel_multi_index(np.indices(box.extent).reshape(3, -1) + np.array(box.origin)[:, None], shape)
        for box in (q_box, k_box)
    )
    for mask in planned_masks(shape):
        given = problem(shape, mask, q_box=q_box, k_box=k_box)
        if served(given):
            (seen,) = read_plan(given, 1, 128)
            assert (seen == mask.allowed(shape).numpy()[np.ix_(q, k)]).all(), f"{mask}"


def test_parts_of_unions_that_overlap_count_no_pair_twice() -> None:
    for shape in ((6, 7, 8), (8, 8, 5)):
        found = [mask for mask in UNIONS if served(problem(shape, mask))]
        assert len(found) >= 4
        for mask in found:
            (seen,) = read_plan(problem(shape, mask), 1, 128)
            assert (seen == mask.allowed(shape).numpy()).all(), f"{mask}"
    grid, everything = Grid(4, 6, 6, 3, 5), Region((0, 0, 0), (4, 6, 6))
    each = (UNIONS[0], masks.full(), UNIONS[3])
    given = Problem(grid, each, everything, everything, True, "all", 0.1)
    for mask, seen in zip(each, read_plan(given, 3, 64), strict=True):
        assert (seen == mask.allowed(grid).numpy()).all(), f"{mask}"


@pytest.mark.parametrize("q_globals", [True, False])
def test_long_lists_are_cut_into_pieces(q_globals: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda_bwd_plan, "SHORTEST", 2)
    monkeypatch.setattr(_cuda_bwd_plan, "LONG", 1)
    _cuda_bwd_plan.layout.cache_clear()
    grid, everything = Grid(9, 8, 12, 5, 150), Region((0, 0, 0), (9, 8, 12))
    for found in ((masks.frame_causal(1, 2, 1),), (masks.frame_causal(1, 2, 1), masks.window(3, 3, 3))):
        given = Problem(grid, found, everything, everything, q_globals, "all", 0.1)
        _, integers, _ = _cuda_bwd_plan.layout(given, 2, 128)
        assert integers[22] > integers[23] > 3  # pieces of more tiles than the three of global keys
        for mask, seen in zip(found, read_plan(given, 2, 128), strict=False):
            want = mask.allowed(grid).numpy()
            assert (seen == (want if q_globals else want[5 : 5 + grid.video])).all(), f"{mask}"
    _cuda_bwd_plan.layout.cache_clear()


def test_keys_that_all_queries_see_are_cut_where_the_others_are_seen_by_few() -> None:
    grid = Grid(30, 48, 80, 0, 256)
    everything = Region((0, 0, 0), grid.shape)
    given = Problem(grid, (masks.window(5, 9, 9),), everything, everything, True, "all", 0.1)
    _, integers, array = _cuda_bwd_plan.layout(given, 1, 128)
    records = array.reshape(-1, 4)
    lengths = [records[integers[20 + 1] + 2 * tile + 1][1] for tile in range(integers[20])]
    assert len(lengths) > 2  # 256 keys are two tiles
    assert max(lengths) <= 2 * max(_cuda_bwd_plan.SHORTEST, 512)


def test_sliding_tiles_that_boxes_divide_need_no_masks() -> None:
    shape, mask = (30, 48, 80), masks.sliding_tile((6, 8, 8), (3, 3, 3))
    _, integers, array = _cuda_bwd_plan.layout(problem(shape, mask), 1, 128)
    records = array.reshape(-1, 4)[array[0] :][: 2 * integers[16]].reshape(-1, 2, 4)
    assert records[:, 1, 3].sum() == 0
    assert records[:, 1, 1].sum() * 64 * 128 == 30 * 48 * 80 * 18 * 24 * 24


def test_boxes_of_queries_lie_apart_where_that_costs_little() -> None:
    shape = (33, 45, 80)
    for mask, apart in ((masks.window(7, 15, 15), True), (masks.window(7, 15, 15, dilation=(1, 1, 2)), False)):
        given = problem(shape, mask)
        assert _cuda_bwd_plan.boxes_lie_apart(given, 1, 128) == apart
        _, integers, array = _cuda_bwd_plan.layout(given, 1, 128)
        records = array.reshape(-1, 4)
        tiles = records[array[0] + 1 :][: 2 * integers[16] : 2]
        corners = np.concatenate([records[first : first + boxes, :3] for first, boxes, _, _ in tiles])
        assert (corners % integers[9:12] == 0).all() == apart


def test_a_step_that_no_copy_of_statistics_takes_is_named() -> None:
    given = problem((2, 3, 40), masks.window(1, 1, 3, dilation=(1, 1, 9)))
    assert "is dilated by 9 on its last axis" in (_cuda_bwd_plan.why_not(given) or "")


def test_statistics_are_padded_as_the_kernels_expect() -> None:
    assert _cuda_bwd.stats_rows([1, 1, 7, 1, 0, 0]) == 8
    assert _cuda_bwd.stats_rows([2, 3, 10, 3, 5, 1]) == 8 + 2 * 3 * 3 * 4 + 4


# --- block lists ------------------------------------------------------------------------------------------------------

LISTS: list[tuple[Triple, Triple, Triple]] = [
    ((5, 6, 7), (2, 3, 4), (3, 2, 4)),
    ((8, 12, 16), (4, 8, 8), (2, 4, 8)),
    ((8, 12, 16), (4, 8, 16), (4, 4, 4)),
    ((1, 4, 7), (1, 3, 7), (1, 3, 7)),
    ((7, 2, 24), (7, 1, 12), (7, 1, 12)),
]


@pytest.mark.parametrize("shape, q_tile, k_tile", LISTS)
@pytest.mark.parametrize("kernel", ["kv", "dq"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_masks_of_listed_tiles_show_what_rows_see_of_boxes(
    shape: Triple, q_tile: Triple, k_tile: Triple, kernel: str, head_dim: int
) -> None:
    everything, n = Region((0, 0, 0), shape), Grid(*shape).video
    mask = masks.window(*(min(3, extent) for extent in shape)) | masks.spatial()
    given = Problem(Grid(*shape), (mask,), everything, everything, True, "all", 0.1, q_tile, k_tile)
    assert _cuda_bwd_lists.why_not(given) is None
    cut = _cuda_bwd_lists.cut(given, 2, head_dim, kernel)
    integers = iter(cut.layout)
    _, _, _, by_key, _, slabs, stacked, tiles = itertools.islice(integers, 8)
    _, slab, columns, column_tile, part, parts, boxes, pattern_at, patterns = (
        np.array(list(itertools.islice(integers, 3))) for _ in range(9)
    )
    _, _, _, at_corners, at_rows, at_patterns, at_groups, groups = integers
    corners = cut.tables[at_corners:][: 4 * tiles].reshape(-1, 4)[:, :3]
    rows = cut.tables[at_rows:][: slabs * tiles].reshape(tiles, slabs)
    width = 64 if KERNELS[kernel].configs[head_dim][0].box <= 64 else 128
    bits = np.unpackbits(cut.tables[at_groups:][:groups].view(np.uint8), bitorder="little").reshape(-1, 64, width)
    box = np.array(cut.plan_layout[9:12])
    places = np.stack(np.unravel_index(np.arange(slab.prod()), tuple(slab)), 1)
    within = np.stack(np.unravel_index(np.arange(box.prod()), tuple(box)), 1)
    counts = [np.zeros((n, n), np.int64) for _ in range(2)]
    for tile, group in np.ndindex(tiles, slabs):
        if rows[tile, group] < 0:
            continue
        own = corners[tile] // slab + group * (np.arange(3) == stacked)
        row = own * slab + places
        for number in np.ndindex(*boxes):
            start = np.array(number) // parts * column_tile + np.array(number) % parts * part
            column = start + within
            real, inside = (row < shape).all(1), (column < shape).all(1)
            for partial, count in enumerate(counts):
                of_axis = [
                    cut.tables[at_patterns + pattern_at[a] :][
                        (1 + own[a]) * boxes[a] + number[a] if partial else number[a]
                    ]
                    for a in range(3)
                ]
                seen = bits[np.ravel_multi_index(tuple(of_axis), tuple(patterns))][: len(row), : len(column)]
                assert not seen[:, ~inside].any()
                r, c = (np.ravel_multi_index(tuple(x.T), shape) for x in (row[real], column[inside]))
                np.add.at(count, (r[:, None], c[None]), seen[real][:, inside])
    for count, want in zip(counts, (np.ones((n, n)), mask.allowed(shape).numpy()), strict=True):
        assert ((count.T if by_key else count) == want).all()


def test_tiles_of_queries_that_begin_where_no_copy_does_are_named() -> None:
    shape, everything = (1, 4, 9), Region((0, 0, 0), (1, 4, 9))
    given = Problem(Grid(*shape), (masks.full(),), everything, everything, True, "all", 0.1, (1, 3, 7), (1, 3, 7))
    assert "query tiles of (1, 3, 7) do not begin at multiples of 4" in (_cuda_bwd_lists.why_not(given) or "")


# --- masks bit by bit: proof -----------------------------------------------------------------------------------------


def video(case: Case) -> int:
    return len(case.rows()) * len(case.columns()) * case.heads


def refusal(case: Case, dtype: torch.dtype, dim: int) -> str | None:
    """Say why the kernels do not serve a case with gradients, not even when asked for, or None."""
    shapes = ((1, len(each), case.heads, dim) for each in (case.rows(), case.columns(), case.columns()))
    q, k, v = (torch.empty(shape, dtype=dtype, device=DEVICE, requires_grad=True) for shape in shapes)
    options = {name: each for name, each in case.options.items() if name not in ("deterministic", "scale")}
    if case.valid is not None:
        options["valid"] = case.valid.to(DEVICE)[None]
    if options.get("k_frames") is not None:
        options["k_frames"] = options["k_frames"].to(DEVICE)
    found = case.masks
    if isinstance(found, BlockList):
        tables = (None if x is None else x.to(DEVICE) for x in (found.count, found.index, found.partial))
        found = BlockList(found.shape, found.q_tile, found.k_tile, *tables, found.mask)
    line = stattn.explain(q, k, v, case.grid, found, **options).splitlines()[1]
    reason = line[2:].strip().removeprefix("cuda").strip()
    return None if reason == "serves it" or reason.startswith("auto leaves gradients") else reason


def both_ways(case: Case, dtype: torch.dtype, dim: int, only: list[int] | None = None) -> Covered:
    """Probe a case both ways, if its masks are served."""
    reason = refusal(case, dtype, dim)
    if reason is not None:
        assert "dilated" in reason or "tiles of" in reason, reason
        return {"refused": 1}
    found = Counter[str]()
    for way in WAYS:
        case.options["deterministic"] = way
        check(case, impl="cuda", device=DEVICE, dtype=dtype, dim=dim, only=only)
        found.update(calls=1, pairs=video(case) if only is None else len(case.rows()) * dim * len(only))
    return dict(found)


def forget_plans() -> None:
    """Let plans be made anew: what decides them is patched."""
    for known in (_cuda_plan.layout, _cuda_plan.on_device, _cuda_bwd_plan.layout, _cuda_bwd_plan.on_device):
        known.cache_clear()
    _cuda_bwd._planned.cache_clear()


EVERY = [(dim, dq, kv) for dim in (64, 128) for dq in KERNELS["dq"].configs[dim] for kv in KERNELS["kv"].configs[dim]]


@gpu
@apart
@hopper
@pytest.mark.parametrize("dim, dq, kv", EVERY, ids=[f"{dim}-{dq.number}-{kv.number}" for dim, dq, kv in EVERY])
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_constructor_is_seen_as_it_is_on_awkward_grids_by_every_config(
    name: str, dim: int, dq: Config, kv: Config
) -> Covered:
    covered = Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        for kernel, chosen in (("dq", dq), ("kv", kv)):
            patch.setitem(_cuda_tiles.KERNELS, kernel, KERNELS[kernel]._replace(configs={dim: (chosen,)}))
        forget_plans()
        for turn, shape in enumerate([*GRIDS, *BIG_GRIDS]):
            examples, tokens = CONSTRUCTORS[name].examples(shape), Grid(*shape).video
            for number, mask in enumerate(examples):
                part = len(examples) if tokens > 2048 else min(6, len(examples))
                if number % part != turn % part:
                    continue  # on larger grids some of the examples, others on each grid
                last = (tokens - 1) // dim
                only = None if tokens <= 2048 else sorted({0, last // 2, last})
                for dtype in (torch.bfloat16, torch.float16):
                    covered.update(both_ways(Case(Grid(*shape), mask, heads=1), dtype, dim, only))
    forget_plans()
    return covered | {"grids": len(GRIDS + BIG_GRIDS)}


@gpu
@apart
@hopper
@pytest.mark.parametrize("kind", ["globals", "unions", "heads", "regions", "lists"])
def test_calls_with_more_than_a_mask_see_what_they_should(kind: str) -> Covered:
    covered = Counter[str]()
    for number, case in enumerate(option_cases(kind)):
        dim = (64, 128)[number % 2]
        covered.update(both_ways(case, torch.bfloat16, dim))
    return covered


@gpu
@apart
@hopper
def test_keys_in_pieces_are_seen_as_they_are() -> Covered:
    covered = Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda_bwd_plan, "SHORTEST", 2)
        patch.setattr(_cuda_bwd_plan, "LONG", 1)
        for dim, q_globals in itertools.product((64, 128), (True, False)):
            found = [masks.frame_causal(1, 2, 1), masks.window(3, 3, 3)]
            case = Case(Grid(9, 8, 12, 5, 150), found, q_globals=q_globals)
            forget_plans()
            covered.update(both_ways(case, torch.bfloat16, dim))
    forget_plans()
    return covered


@gpu
@apart
@hopper
@pytest.mark.parametrize("dim", [64, 128])
def test_every_length_around_each_tile_is_seen_whole(dim: int) -> Covered:
    covered = Counter[str]()
    for n in sorted({*AROUND, *range(188, 197)}):
        for mask in (masks.full(), masks.window(1, 1, min(n, 33), causal=True)):
            covered.update(both_ways(Case(Grid(1, 1, n), mask, heads=1), torch.bfloat16, dim))
        covered.update(both_ways(Case(Grid(1, 2, 3, n, 0), masks.full(), heads=1), torch.bfloat16, dim))
    return covered


# --- numbers: proof 1, 3, 5, 6 ---------------------------------------------------------------------------------------

UNSERVED = {"frames", "frames of a region", "negative scale"}


@gpu
@apart
@hopper
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("way", WAYS)
def test_results_and_gradients_are_within_rule_1(way: bool, dim: int, dtype: str) -> Covered:
    covered = Counter[str]()
    for name, (case, given) in NUMBERS.items():
        case.options["deterministic"] = way
        if name in UNSERVED or name.startswith("dim") or refusal(case, torch.bfloat16, dim) is not None:
            continue
        check_numbers(
            case, **(given | {"dim": dim, "dtype": getattr(torch, dtype), "device": DEVICE, "impl": "cuda"})
        )
        covered.update(calls=1)
    for case, given in (
        (Case(Grid(5, 9, 11), masks.full()), {"batch": 2}),
        (Case(Grid(4, 9, 11, 0, 5), masks.window(3, 5, 5)), {"batch": 2}),
        (Case(Grid(4, 9, 11, 7, 0), masks.window(3, 5, 5), heads=6), {"key_heads": 2}),
    ):
        case.options["deterministic"] = way
        check_numbers(case, dim=dim, dtype=getattr(torch, dtype), device=DEVICE, impl="cuda", **given)
        covered.update(calls=1)
    return covered


@gpu
@apart
@hopper
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_large_and_lone_values_stay_within_rule_1(dtype: str) -> Covered:
    kind, calls = getattr(torch, dtype), 0
    for way, mask, size, spoil in itertools.product(
        WAYS, (masks.full(), masks.window(3, 5, 3)), (1.0, 3.0, 30.0), ("none", "outlier", "one-hot")
    ):
        if dtype == "float16" and size > 3:  # eager scores overflow
            continue
        case = Case(Grid(4, 9, 9), mask, options={"deterministic": way})
        q, k, v = (x * size for x in draw(1, case.grid.tokens, 2, 64, dtype=kind, device=DEVICE))
        if spoil == "outlier":
            q[..., 3] *= 10
        if spoil == "one-hot":
            k[:, 7] *= 10
        given = (torch.randn_like(q), torch.zeros(1, 2, case.grid.tokens, device=DEVICE))
        got, eager = (results(case, (q, k, v), given, impl) for impl in ("cuda", None))
        exact = results(case, (q.double(), k.double(), v.double()), given, None)
        for name in ("dq", "dk", "dv"):
            rounded = eager[name].to(kind)
            assert_rule_1(f"{mask} {spoil} x {size} {name}", got[name], rounded, exact[name], largest_score((q, k, v)))
        calls += 1
    return {"calls": calls}


@gpu
@apart
@hopper
def test_a_shift_of_all_scores_changes_no_gradient() -> Covered:
    lengths = (1, 63, 64, 65, 127, 128)
    for shift, tokens, way in itertools.product(SHIFTS, lengths, WAYS):
        for mask in (masks.full(), masks.window(1, 1, min(tokens, 33))):
            q, k, v = draw(1, tokens, 1, 64, dtype=torch.bfloat16, device=DEVICE)
            q[..., 0], k[..., 0] = 0.0, 4.0
            dout = torch.randn_like(q).abs()  # so that nothing in dV cancels
            given: dict[str, Any] = {"scale": 1.0, "impl": "cuda", "deterministic": way}
            plain = gradients((q, k, v), dout, None, (1, 1, tokens), mask, **given)
            q[..., 0] = shift / 4
            found = gradients((q, k, v), dout, None, (1, 1, tokens), mask, **given)
            assert all(x.isfinite().all() for x in found)
            # A score is rounded as a sum on the tensor cores (2 ulp) and times log2(e), twice in each of two calls.
            slack = math.expm1(16 * torch.finfo(torch.float32).eps * abs(shift))
            assert (found[4] - plain[4]).abs().max() <= (slack + 4 * torch.finfo(q.dtype).eps) * plain[4].max()
    return {"shifts": len(SHIFTS), "lengths": len(lengths)}


LONG = [(shape, number) for shape, found in LENGTHS.items() for number in range(len(found))]


@gpu
@apart
@hopper
@pytest.mark.parametrize("shape, number", LONG, ids=lambda value: str(value).replace(" ", ""))
def test_long_calls_are_within_rule_1_at_sampled_rows_and_keys(shape: Triple, number: int) -> Covered:
    mask, covered = LENGTHS[shape][number], Counter[str]()
    for way in WAYS:
        covered.update(check_sampled(shape, mask, impl="cuda", deterministic=way))
    return covered


# --- memory and layout: proof 9 to 12 --------------------------------------------------------------------------------


@gpu
@apart
@hopper
def test_the_gradient_of_the_output_may_have_any_strides() -> None:
    for dim in (64, 128):
        check_strides_of_dout(random_call(dim, torch.bfloat16, DEVICE), impl="cuda", deterministic=True)


@gpu
@apart
@hopper
def test_views_and_shared_heads_are_read_where_they_lie() -> Covered:
    grid, mask = Grid(3, 7, 19, 5, 3), masks.window(3, 3, 5)
    for dim in (64, 128):
        tensors = draw(2, grid.tokens, 6, dim, dtype=torch.bfloat16, device=DEVICE)
        dout = torch.randn_like(tensors[0])
        for given in (masks.full(), mask):
            want = gradients(tensors, dout, None, grid, given, impl="cuda", deterministic=True)
            fused = torch.stack(tensors, 2)
            swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
            for views in (fused.unbind(2), swapped):
                found = gradients(tuple(views), dout, None, grid, given, impl="cuda", deterministic=True)
                assert same(found, want)
    return {"calls": 12}


class Given:
    """Stands for torch.empty: gives one tensor after the other."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._tensors = iter(tensors)

    def __call__(self, shape: torch.Size, **kind: Any) -> torch.Tensor:
        found = next(self._tensors)
        assert found.shape == shape
        return found


@gpu
@apart
@hopper
def test_nothing_outside_the_tensors_is_read_or_written() -> Covered:
    guard, calls = 512, 0
    for grid, mask in itertools.product(
        (Grid(3, 5, 7), Grid(2, 9, 13, 3, 5)), (masks.full(), masks.window(2, 3, 3), masks.spatial())
    ):
        for dim, way in itertools.product((64, 128), WAYS):
            n = grid.tokens
            held = torch.full((7, n * 2 * dim + 2 * guard), torch.nan, device=DEVICE, dtype=torch.bfloat16)
            q, k, v, dout, *found = (x[guard:-guard].view(1, n, 2, dim) for x in held)
            for x in (q, k, v, dout):
                x.normal_()
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = stattn.attention(*leaves, grid, mask, impl="cuda", deterministic=way)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "empty", Given(*found))
                patch.setattr(torch.Tensor, "new_empty", lambda x, n: x.new_full((n,), torch.nan))
                gradient = torch.autograd.grad(out, leaves, dout)
            assert all(a.data_ptr() == b.data_ptr() for a, b in zip(gradient, found, strict=True))
            assert held[:, :guard].isnan().all()
            assert held[:, -guard:].isnan().all()
            assert not held[:, guard:-guard].isnan().any()
            calls += 1
    return {"calls": calls}


# racecheck orders what the arriving thread itself did before a barrier: here all lanes of a warp read, then __syncwarp,
# then one lane arrives for them, and only then may the producer write again.
READ_BY_WARPS = {
    ("Read", "stattn::attention_bwd::mask_weights"),
    ("Read", "stattn::attention_bwd::masks_of"),
    ("Write", "stattn::attention_bwd::note"),
    ("Write", "stattn::sm90::copy_in_line"),
}


@gpu
@apart
@hopper
@pytest.mark.parametrize("tool", ["memcheck", "initcheck", "synccheck", "racecheck"])
def test_compute_sanitizer_finds_nothing_in_tiny_calls(tool: str) -> Covered:
    sanitizer = shutil.which("compute-sanitizer")
    assert sanitizer is not None, "the CUDA toolkit is not on PATH"
    script = str(Path(__file__).with_name("tiny_calls.py"))
    options = ["--gradients", *(["--unread"] if tool == "initcheck" else [])]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, script, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if tool == "racecheck" and done.returncode == 9:
        hazards = set(re.findall(r"(Read|Write) access at (?:\w+ )?([\w:]+)", done.stdout))
        assert hazards <= READ_BY_WARPS, hazards - READ_BY_WARPS
    else:
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return {"calls": int(done.stdout.split(" calls")[0].split()[-1])}


@gpu
@apart
@hopper
def test_offsets_beyond_two_to_the_31_are_right() -> Covered:
    grid = Grid(21, 45, 80)
    fused = torch.randn(2, grid.tokens, 3, 40, 128, device=DEVICE, dtype=torch.bfloat16)
    dout = torch.randn_like(fused[:, :, 0])
    assert fused.numel() > 2**31
    for mask in (masks.window(3, 5, 5), masks.temporal()):
        whole = gradients(fused.unbind(2), dout, None, grid, mask, impl="cuda", deterministic=True)
        last = tuple(x[1:, :, 38:].contiguous() for x in (*fused.unbind(2), dout))
        alone = gradients(last[:3], last[3], None, grid, mask, impl="cuda", deterministic=True)
        assert torch.equal(whole[1][1:, 38:], alone[1])
        for x, y in zip(whole[2:], alone[2:], strict=True):
            assert torch.equal(x[1:, :, 38:], y)
    return {"elements": fused.numel()}


@gpu
@apart
@hopper
@pytest.mark.parametrize(
    "batch, heads, shape", [(16_384, 4, (1, 1, 7)), (36_000, 4, (3, 1, 2)), (65_536, 1, (1, 1, 1))]
)
def test_as_many_heads_and_samples_as_there_are_places_have_gradients(
    batch: int, heads: int, shape: Triple
) -> Covered:
    for mask, way in itertools.product((masks.full(), masks.temporal()), WAYS):
        case = Case(Grid(*shape), mask, heads=heads, options={"deterministic": way})
        tensors = draw(batch, case.grid.video, heads, 64, dtype=torch.bfloat16, device=DEVICE)
        given = (torch.randn_like(tensors[0]), torch.zeros(batch, heads, case.grid.video, device=DEVICE))
        got = results(case, tensors, given, "cuda")
        want = results(case, tuple(x.float() for x in tensors), given, None)  # type: ignore[arg-type]
        for name in got:
            torch.testing.assert_close(got[name].float(), want[name].float(), rtol=2e-2, atol=4e-2)
    return {"heads": batch * heads}


@gpu
@apart
@hopper
def test_a_call_without_queries_has_gradients_of_zero() -> None:
    q, k, v = draw(0, 24, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    found = gradients((q, k, v), torch.zeros_like(q), None, (2, 3, 4), impl="cuda")
    assert [len(x) for x in found] == [0] * 5


# --- order, streams, graphs, compile: proof 16 to 19, 22 -------------------------------------------------------------


@gpu
@apart
@hopper
@pytest.mark.parametrize("number", range(4))
def test_1000_deterministic_runs_beside_another_stream_give_the_same_bits(number: int) -> Covered:
    grid, noise, other = Grid(5, 12, 16, 3, 5), torch.randn(2048, 2048, device=DEVICE), torch.cuda.Stream()
    own = [masks.spatial(), masks.frame_causal(2)]
    mask, dim = ((masks.window(3, 5, 7), 128), (masks.full(), 64), (own, 128), (masks.full(), 128))[number]
    key_heads = 2 if isinstance(mask, list) else 1
    tensors = draw(2, grid.tokens, 2, dim, key_heads=key_heads, dtype=torch.bfloat16, device=DEVICE)
    dout = torch.randn_like(tensors[0])
    first = gradients(tensors, dout, None, grid, mask, impl="cuda", deterministic=True)
    for _ in range(1000):
        with torch.cuda.stream(other):
            noise @ noise
        assert same(gradients(tensors, dout, None, grid, mask, impl="cuda", deterministic=True), first)
    return {"reruns": 1000}


@gpu
@apart
@hopper
def test_a_sample_depends_on_nothing_but_itself_bitwise() -> Covered:
    grid = Grid(4, 9, 16, 0, 7)
    found = (masks.full(), masks.window(3, 5, 5), masks.spatial() | masks.temporal())
    valid = torch.tensor([7, 2, 5], device=DEVICE)
    for dim, mask in itertools.product((64, 128), found):
        tensors = draw(3, grid.tokens, 4, dim, key_heads=2, dtype=torch.bfloat16, device=DEVICE)
        dout = torch.randn_like(tensors[0])
        given: dict[str, Any] = {"impl": "cuda", "deterministic": True}
        together = gradients(tensors, dout, None, grid, mask, valid=valid, **given)
        for one in (slice(i, i + 1) for i in range(3)):
            alone = gradients(tuple(x[one] for x in tensors), dout[one], None, grid, mask, valid=valid[one], **given)
            assert same(alone, [x[one] for x in together])
    return {"masks": len(found)}


@gpu
@apart
@hopper
def test_deterministic_algorithms_choose_the_way_that_is_reproducible() -> None:
    grid, mask = Grid(3, 9, 14), masks.window(3, 3, 5)
    tensors = draw(1, grid.tokens, 2, 128, dtype=torch.bfloat16, device=DEVICE)
    dout = torch.randn_like(tensors[0])

    def kernels(**given: Any) -> set[str]:
        gradients(tensors, dout, None, grid, mask, impl="cuda", **given)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            gradients(tensors, dout, None, grid, mask, impl="cuda", **given)
            torch.cuda.synchronize()
        names = [each.name for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
        return {name for name in names if "attention_dq" in name}

    assert not kernels()
    assert kernels(deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert kernels()
        assert not kernels(deterministic=False)
    finally:
        torch.use_deterministic_algorithms(False)


@gpu
@apart
@hopper
def test_kernels_run_on_the_stream_they_are_called_on() -> None:
    grid, mask = Grid(4, 9, 16), masks.window(3, 5, 5)
    tensors = draw(2, grid.tokens, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    dout = torch.randn_like(tensors[0])
    want = gradients(tensors, dout, None, grid, mask, impl="cuda", deterministic=True)
    torch.cuda.synchronize()
    stream, noise = torch.cuda.Stream(), torch.randn(4096, 4096, device=DEVICE)
    copies = [torch.zeros_like(x) for x in (*tensors, dout)]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            noise = (noise @ noise).clamp(-1, 1)  # keeps the copies back: another stream would read zeros
        for x, y in zip(copies, (*tensors, dout), strict=True):
            x.copy_(y)
        found = gradients(tuple(copies[:3]), copies[3], None, grid, mask, impl="cuda", deterministic=True)
    stream.synchronize()
    assert same(found, want)


@gpu
@apart
@hopper
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dense", [True, False])
def test_a_graph_replays_with_new_inputs(dense: bool, way: bool) -> Covered:
    grid, mask = Grid(4, 9, 16, 2, 3), masks.full() if dense else masks.window(3, 5, 5)
    valid = None if dense else torch.tensor([[True, True, False, True, True]], device=DEVICE)
    tensors = [x.requires_grad_() for x in draw(1, grid.tokens, 2, 64, dtype=torch.bfloat16, device=DEVICE)]
    dout = torch.randn_like(tensors[0]).detach()

    def call() -> list[torch.Tensor]:
        out, lse = stattn.attention(
            *tensors, grid, mask, valid=valid, return_lse=True, impl="cuda", deterministic=way
        )
        return [out, lse, *torch.autograd.grad(out, tensors, dout)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = call()
        for _ in range(20):
            with torch.no_grad():
                for x in (*tensors, dout):
                    x.normal_()
            graph.replay()
            replayed = [x.detach().clone() for x in captured]
            eager = call()
            if way:
                assert same(replayed, eager)
            for x, y in zip(replayed, eager, strict=True):
                torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)
        stream.synchronize()
    return {"replays": 20}


@gpu
@apart
@hopper
def test_the_operations_pass_opcheck_and_compile() -> None:
    check_operations("cuda", DEVICE, dim=64, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        check_compiled("cuda", DEVICE, "inductor", dim=64, dtype=torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)


@gpu
@apart
@hopper
def test_a_long_backward_takes_the_memory_that_its_way_says() -> Covered:
    """Beside the gradients: statistics of 8 bytes a row, rounded up; sums of dQ in fp32, but for a fixed order under a
    mask; and of dense calls pieces, or 8 bytes a box of 64 queries.
    """
    shape, heads = (21, 45, 80), 4
    n = Grid(*shape).video
    tensors = [x.requires_grad_() for x in draw(1, n, heads, 128, dtype=torch.bfloat16, device=DEVICE)]
    dout = torch.randn_like(tensors[0])
    for mask, way in itertools.product((masks.full(), masks.window(7, 17, 17)), WAYS):
        out = stattn.attention(*tensors, shape, mask, impl="cuda", deterministic=way)
        torch.autograd.grad(out, tensors, dout, retain_graph=True)  # plans stay
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = torch.autograd.grad(out, tensors, dout)
        taken = torch.cuda.max_memory_allocated() - before
        allowed = sum(x.nbytes for x in found) + 8 * n * heads
        if mask == masks.full():
            allowed += 4 * dout.numel() + (n // 8 * heads if way else 4 * _cuda_bwd.TAIL * 2 * _cuda_bwd.KEY_TILE * 128)
        elif not way:  # in whole boxes of 64 queries
            _, integers, _ = _cuda_bwd_plan.layout(problem(shape, mask), heads, 128)
            allowed += 4 * 8192 * heads * math.prod(-(-s // b) for s, b in zip(shape, integers[9:12], strict=True))
        # PyTorch leaves up to 1 MiB at the end of each of the six.
        assert taken <= allowed + (6 << 20), f"{mask}: {taken} bytes, {allowed} allowed"
    return {"tokens": n}
