"""The plans of the CUDA attention backward: of dK and dV, and of block lists for it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from test_attention_cuda import SHAPES, planned_masks, problem
from test_probes import UNIONS

from stattn import masks
from stattn.grid import Grid, Region, Triple
from stattn.ops import _cuda_bwd, _cuda_bwd_lists, _cuda_bwd_plan, _cuda_tiles
from stattn.ops._cuda_tiles import KERNELS
from stattn.problem import Problem

# Plans.


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


def test_a_gradient_is_copied_only_where_tensor_copies_do_not_read_it() -> None:
    dout = torch.randn(2, 24, 2, 64, dtype=torch.float16)
    heads_first = dout.transpose(1, 2).contiguous().transpose(1, 2)
    for given in (dout, heads_first, dout[:1].expand(2, -1, -1, -1), dout[..., :32]):
        assert _cuda_bwd.readable(given) is given
    odd, shifted = torch.zeros(2, 24, 2, 67, dtype=dout.dtype)[..., :64], torch.zeros(dout.numel() + 1).half()[1:]
    for given in (
        torch.ones((), dtype=dout.dtype).expand_as(dout),  # the gradient of a sum
        dout[:, :1].expand(-1, 24, -1, -1),
        odd.copy_(dout),
        shifted.view_as(dout).copy_(dout),  # contiguous, but no copy reads from such an address
    ):
        found = _cuda_bwd.readable(given)
        assert found.data_ptr() != given.data_ptr()
        assert found.data_ptr() % 16 == 0
        assert found.is_contiguous()
        assert torch.equal(found, given)


def test_statistics_are_padded_as_the_kernels_expect() -> None:
    assert _cuda_bwd.stats_rows([1, 1, 7, 1, 0, 0]) == 8
    assert _cuda_bwd.stats_rows([2, 3, 10, 3, 5, 1]) == 8 + 2 * 3 * 3 * 4 + 4


# Block lists.

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
