"""The plans of the CUDA kernels, read as the kernels read them: which pairs they visit, and how often."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from probes import Case
from test_attention_cuda import SHAPES, planned_masks, problem
from test_probes import UNIONS

from stattn import masks, plan
from stattn.grid import Grid, Region, Triple
from stattn.ops import _cuda, _cuda_plan, _cuda_tiles
from stattn.problem import Problem


def read_plan(
    given: Problem, heads: int, head_dim: int, valid: np.ndarray | None = None, held: list[int] | None = None
) -> list[np.ndarray]:
    """Count, as the kernel walks a plan, how often each query of each head takes part with each key.

    held: the frame of each slot of a ring cache.
    """
    number, integers, array = _cuda_plan.layout(given, heads, head_dim, valid is not None, frames=held is not None)
    q_shape, k_shape, slab, box, steps = (np.array(integers[i : i + 3]) for i in (0, 3, 6, 9, 12))
    stacked, tiles, before, after, q_globals, line_tiles, line_record, pieces, split_tiles = integers[15:]
    for extents in (slab, box):
        assert ((steps <= 8) | (extents == 1)).all()  # as far as a tensor copy steps
    columns = next(each.box for each in _cuda_tiles.CONFIGS[head_dim] if each.number == number)
    width = 64 if columns <= 64 else 128
    records = array.reshape(-1, 4)
    bits = np.unpackbits(array.view(np.uint8), bitorder="little").astype(bool)
    bits = bits[: bits.size // (64 * width) * 64 * width].reshape(-1, 64, width)
    rows, keys = (np.stack(np.unravel_index(np.arange(e.prod()), tuple(e)), 1) for e in (slab, box))
    queries = q_shape.prod() + q_globals * (before + after)
    total = k_shape.prod() + before + after
    global_keys = np.r_[0:before, total - after : total]
    boxes_before = -(-before // len(keys))
    found = []
    for head in range(heads):
        seen, written = np.zeros((queries, total), np.int64), np.zeros(queries, np.int64)
        listed = [array[head] + 2 * tile for tile in range(tiles)]
        merged = {}  # the tile of each piece
        for record in (array[head] + 2 * (tiles + number) for number in range(split_tiles)):
            first, count, *_ = records[record + 1]
            merged |= {int(first) + piece: tuple(records[record]) for piece in range(count)}
        pieces_of = [piece for piece in range(pieces) if piece in merged]
        for record in (*(line_record + 2 * tile for tile in range(line_tiles)), *listed):
            *corner, kind = records[record]
            if kind == _cuda_plan.NONE:
                continue
            kind, piece = kind % 4, kind // 4 - 1
            first_box, boxes, first_mask, masked = records[record + 1]
            assert len(keys) == columns or masked == boxes
            if piece >= 0:
                pieces_of.remove(piece)
                assert merged[piece] == (*corner, kind)
                cuts = records[array[head] + 2 * tiles + 1 :][: 2 * split_tiles : 2].tolist()
                number = piece * split_tiles // pieces  # as the last one to be done looks for it
                while not cuts[number][1] or piece < cuts[number][0]:
                    number -= 1
                while piece >= sum(cuts[number][:2]):
                    number += 1
                assert tuple(records[array[head] + 2 * (tiles + number)]) == (*corner, kind)
            once = piece < 0 or piece == min(each for each, tile in merged.items() if tile == merged[piece])
            for group in range(3):
                if kind:  # rows of 64 global queries
                    tokens = corner[2] + group * 64 + np.arange(64)
                    query = np.where(tokens < (before, after)[kind - 1], tokens + (kind - 1) * (queries - after), -1)
                    row = tokens
                else:
                    place = np.array(corner) + steps * (rows + group * slab * (np.arange(3) == stacked))
                    inside = (place < q_shape).all(1)
                    query = np.ravel_multi_index(tuple(np.minimum(place, q_shape - 1).T), tuple(q_shape))
                    query = np.where(inside, query + q_globals * before, -1)
                    row = rows
                real = query >= 0
                written[query[real]] += once
                for number in range(boxes):
                    *first, line = records[first_box + number]
                    if held is not None and not line:
                        if first[0] not in held:
                            continue
                        first[0] = held.index(first[0])
                    if line:
                        key = first[2] + np.arange(len(keys))
                        inside = key < total
                    else:
                        place = np.array(first) + steps * keys
                        inside = (place < k_shape).all(1)
                        key = before + np.ravel_multi_index(tuple(np.minimum(place, k_shape - 1).T), tuple(k_shape))
                    allowed = np.ones((len(row), width), bool)
                    if number < masked:
                        index, _, _, mark = records[first_mask + group * masked + number]
                        allowed &= bits[index, : len(row)]
                        assert not allowed[:, len(keys) :].any()
                        if mark < 0:  # the warpgroup leaves the box out
                            continue
                        if mark > -(-before // len(keys)) - (-after // len(keys)):  # the video's last one in the line
                            noted = np.arange(len(keys)) < k_shape.prod() % len(keys)
                        elif mark:
                            assert valid is not None
                            end = before if mark - 1 < boxes_before else before + after
                            index = mark - 1 if mark - 1 < boxes_before else mark - 1 - boxes_before
                            base = index * len(keys) + (0 if mark - 1 < boxes_before else before)
                            noted = np.array([base + c < end and valid[base + c] for c in range(len(keys))])
                            assert (global_keys[base] == key[0]).all()
                        if mark:
                            allowed[:, : len(keys)] &= noted
                    if line and valid is not None:  # what is not real is noted as such, wherever a box brings it
                        brought = np.isin(key, global_keys[~valid])
                        assert not brought.any() or (number < masked and mark and not noted[brought].any())
                    assert not allowed[real][:, : len(keys)][:, ~inside].any()
                    seen[query[real][:, None], key[inside]] += allowed[real][:, : len(keys)][:, inside]
        assert (written == 1).all()
        assert not pieces_of
        found.append(seen)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_plan_visits_each_allowed_pair_once_and_no_other(shape: Triple, head_dim: int) -> None:
    examples = planned_masks(shape)
    assert len(examples) > 10
    for mask in examples:
        (seen,) = read_plan(problem(shape, mask), 1, head_dim)
        assert (seen == mask.allowed(shape).numpy()).all(), f"{mask}"


@pytest.mark.parametrize("before, after", [(5, 0), (0, 70), (3, 200)])
@pytest.mark.parametrize("q_globals", [True, False])
def test_global_tokens_are_planned_beside_the_video(before: int, after: int, q_globals: bool) -> None:
    grid, everything = Grid(3, 4, 6, before, after), Region((0, 0, 0), (3, 4, 6))
    video = np.arange(before, before + 72)
    for mask in (masks.full(), masks.window(3, 3, 3), masks.spatial()):
        for see in ("all", "globals"):
            for valid in (None, np.arange(before + after) % 3 > 0):
                given = Problem(grid, (mask,), everything, everything, q_globals, see, 0.1)
                (seen,) = read_plan(given, 1, 128, valid)
                told = None if valid is None else torch.from_numpy(valid)
                want = mask.allowed(grid, globals_see=see, valid=told).numpy()
                # Rows of global tokens that are not real are left to the end of the kernel.
                real = np.ones(grid.tokens, bool)
                if valid is not None:
                    real[np.r_[0:before, before + 72 : grid.tokens]] = valid
                rows = real.nonzero()[0] if q_globals else video
                assert (seen[rows if q_globals else slice(None)] == want[rows]).all(), f"{mask} {see}"


@pytest.mark.parametrize("held", [[0, 1, 2], [4, 5, 2, 3], [-1, 3, -1, 0, 5], [-1]])
def test_plans_of_ring_caches_visit_the_frames_that_slots_hold(held: list[int]) -> None:
    frames = torch.tensor(held, dtype=torch.int32)
    for grid, k_box in (
        (Grid(6, 4, 5, 1, 2), Region((0, 0, 0), (6, 4, 5))),
        (Grid(6, 4, 5), Region((0, 1, 0), (6, 2, 5))),
    ):
        for mask in planned_masks((6, 4, 5)):
            q_box = Region((3, 0, 0), (2, 4, 5))
            case = Case(grid, mask, 1, options={"q_region": q_box, "k_region": k_box, "k_frames": frames})
            slots = Region((0, *k_box.origin[1:]), (len(held), *k_box.extent[1:]))
            (seen,) = read_plan(Problem(grid, (mask,), q_box, slots, True, "all", 0.1), 1, 128, held=held)
            assert (seen == case.truth()[0].numpy()).all(), f"{mask}"


@pytest.mark.parametrize("shape", [(6, 7, 8), (7, 9, 10), (8, 8, 5)])
def test_a_pair_that_several_parts_of_a_union_allow_is_visited_once(shape: Triple) -> None:
    unions = [*UNIONS, masks.window(3, 5, 3) | masks.window(5, 3, 3) | masks.window(1, 1, 5)]
    unions = [mask for mask in unions if _cuda_plan.why_not(problem(shape, mask)) is None]
    assert sum(plan.geometry(mask, Grid(*shape), *[Region((0, 0, 0), shape)] * 2).overlap for mask in unions) > 0
    for mask in unions:
        for head_dim in (64, 128):
            (seen,) = read_plan(problem(shape, mask), 1, head_dim)
            assert (seen == mask.allowed(shape).numpy()).all(), f"{mask}"
    both = (UNIONS[0], masks.window(3, 3, 3))
    for mask, seen in zip(both, read_plan(problem(shape, *both), 2, 128), strict=True):
        assert (seen == mask.allowed(shape).numpy()).all(), f"{mask}"


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cut lists that are as short as those of small grids."""
    monkeypatch.setattr(_cuda_tiles, "SHORTEST", 2)
    monkeypatch.setattr(_cuda_tiles, "MANY", 0)
    _cuda_plan.layout.cache_clear()
    _cuda_plan.on_device.cache_clear()
    yield
    _cuda_plan.layout.cache_clear()
    _cuda_plan.on_device.cache_clear()


def test_pieces_of_lists_cover_them_and_get_shorter() -> None:
    for boxes in (0, 1, 47, 48, 63, 64, 410, 1856, 20_000):
        for queries in (1, 192, 193, 1560, 4680, 12_288, 118_800):
            pieces = _cuda_tiles.cut_list(boxes, queries)
            assert sum(pieces) == boxes
            if len(pieces) > 1:
                assert min(pieces) >= _cuda_tiles.SHORTEST // 6
                assert max(pieces) == pieces[0]
                assert boxes >= _cuda_tiles.MANY * queries / 192
    assert len(_cuda_tiles.cut_list(410, 4680)) > 2  # self-forcing: a chunk of three frames and all before it
    assert len(_cuda_tiles.cut_list(410, 32_760)) == 1
    assert len(_cuda_tiles.cut_list(410, None)) == 1


def test_lists_in_pieces_visit_each_allowed_pair_once(short_pieces: None) -> None:
    shape, part = (4, 6, 36), Region((2, 1, 3), (2, 4, 30))
    everything = np.arange(4 * 6 * 36).reshape(shape)
    for mask in planned_masks(shape):
        (seen,) = read_plan(problem(shape, mask, q_box=part), 1, 128)
        q = everything[2:, 1:5, 3:33].reshape(-1)
        assert (seen == mask.allowed(shape).numpy()[q]).all(), f"{mask}"
    assert _cuda_plan.layout(problem(shape, masks.full(), q_box=part), 1, 128)[1][-1] > 0
    each = (masks.full(), masks.window(3, 3, 3), masks.spatial())  # heads whose tiles are in as many pieces as they may
    given = Problem(Grid(4, 6, 36, 5, 100), each, Region((0, 0, 0), shape), Region((0, 0, 0), shape), True, "all", 0.1)
    for mask, seen in zip(each, read_plan(given, 3, 64), strict=True):
        assert (seen == mask.allowed(given.grid).numpy()).all(), f"{mask}"


def test_ring_caches_beside_padded_text_are_planned_in_pieces(short_pieces: None) -> None:
    grid, held, valid = Grid(6, 4, 5, 4, 5), [-1, 3, -1, 0, 5], np.arange(9) % 3 > 0
    q_box, slots = Region((3, 0, 0), (2, 4, 5)), Region((0, 0, 0), (5, 4, 5))
    frames = torch.tensor(held, dtype=torch.int32)
    for mask in (masks.full(), masks.frame_causal(2, 4, 1), masks.window(2, 3, 3, dilation=(2, 1, 1)), UNIONS[2]):
        for see in ("all", "globals"):
            options = {"q_region": q_box, "k_frames": frames, "globals_see": see}
            case = Case(grid, mask, 1, valid=torch.from_numpy(valid), options=options)
            (seen,) = read_plan(Problem(grid, (mask,), q_box, slots, True, see, 0.1), 1, 128, valid, held=held)
            real = np.r_[valid[:4], np.ones(40, bool), valid[4:]]  # the kernel's end sees to other rows
            assert (seen[real] == case.truth()[0].numpy()[real]).all(), f"{mask} {see}"


def test_heads_with_masks_of_their_own_read_plans_of_their_own() -> None:
    shape = (4, 6, 6)
    each = (masks.window(3, 3, 3), masks.spatial(), masks.window(3, 3, 3), masks.frame_causal(2))
    for mask, seen in zip(each, read_plan(problem(shape, *each), 4, 128), strict=True):
        assert (seen == mask.allowed(shape).numpy()).all(), f"{mask}"


@pytest.mark.parametrize("dilation", [(1, 2, 3), (2, 1, 9), (3, 9, 1)])
def test_dilated_windows_are_walked_by_residue_class(dilation: Triple) -> None:
    shape = (6, 18, 27)
    for size in ((2, 2, 3), (1, 2, 1)):
        mask = masks.window(*size, dilation=dilation)
        part = Region((1, 2, 5), (4, 13, 17))
        everything = np.arange(6 * 18 * 27).reshape(shape)
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
        (seen,) = read_plan(problem(shape, mask, q_box=q_box, k_box=k_box), 1, 128)
        assert (seen == mask.allowed(shape).numpy()[np.ix_(q, k)]).all(), f"{mask}"


def test_queries_that_see_every_key_of_a_region_are_planned_and_run_as_dense() -> None:
    shape, last, first = (6, 5, 7), Region((4, 0, 0), (2, 5, 7)), Region((0, 0, 0), (2, 5, 7))
    causal = masks.frame_causal(2)
    for see_all, q_box, k_box in ((True, last, None), (False, first, None), (True, first, first), (False, None, None)):
        given, whole = (problem(shape, mask, q_box=q_box, k_box=k_box) for mask in (causal, masks.full()))
        plans = [_cuda_plan.layout(each, 1, 128) for each in (given, whole)]
        assert _cuda.is_dense(given, False) == see_all
        assert (plans[0][1] == plans[1][1] and np.array_equal(plans[0][2], plans[1][2])) == see_all
    near = problem(shape, masks.window(3, None, None), q_box=Region((0, 0, 0), (4, 5, 7)), k_box=first)
    assert not _cuda.is_dense(near, False)  # the first queries see every key, the last ones do not
    even = Region((0, 0, 0), (6, 5, 1)), Region((0, 0, 0), (6, 5, 7))  # whose bounds are those of all keys
    dilated = problem((6, 5, 8), masks.window(None, None, 4, dilation=(1, 1, 2)), q_box=even[0], k_box=even[1])
    assert not _cuda.is_dense(dilated, False)
    # All frames of the grid count beside a ring cache, not those that there are slots for.
    slots = Region((0, 0, 0), (3, 5, 7))
    assert _cuda_plan.sees_all(causal, problem(shape, causal, q_box=last, k_box=slots), True)
    early = problem(shape, causal, q_box=Region((2, 0, 0), (1, 5, 7)), k_box=slots)
    assert not _cuda_plan.sees_all(causal, early, True)


def test_sliding_tiles_that_boxes_divide_need_no_masks() -> None:
    shape, mask = (30, 48, 80), masks.sliding_tile((6, 8, 8), (3, 3, 3))
    number, integers, array = _cuda_plan.layout(problem(shape, mask), 1, 128)
    records = array.reshape(-1, 4)[array[0] :][: 2 * integers[16]].reshape(-1, 2, 4)
    assert records[:, 1, 3].sum() == 0
    pairs = records[:, 1, 1].sum() * _cuda_tiles.CONFIGS[128][number].box * 192
    assert pairs == 30 * 48 * 80 * 18 * 24 * 24
