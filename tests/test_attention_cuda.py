"""The CUDA kernels of attention: what they serve, the plans that they read, and on a Hopper GPU their results."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from probes import Case
from test_probes import UNIONS

import stattn
from stattn import extension, masks, plan
from stattn.blocks import lower
from stattn.grid import Grid, Region, Triple
from stattn.masks import CONSTRUCTORS, Mask
from stattn.ops import _cuda, _cuda_plan, _cuda_tiles
from stattn.ops._attention_choice import OPERATION, AttentionCall
from stattn.problem import Extras, Problem

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == extension.CAPABILITY
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER or not extension.LIBRARY.exists(), reason="no Hopper GPU, or no CUDA library"),
]
SHAPES = [(1, 1, 7), (3, 5, 7), (4, 6, 6), (2, 9, 4)]


def problem(shape: Triple, *found: Mask, q_box: Region | None = None, k_box: Region | None = None) -> Problem:
    everything = Region((0, 0, 0), shape)
    return Problem(Grid(*shape), found, q_box or everything, k_box or everything, True, "all", 0.1)


def planned_masks(shape: Triple) -> list[Mask]:
    examples = [mask for each in CONSTRUCTORS.values() for mask in each.examples(shape)]
    return [mask for mask in examples if _cuda_plan.why_not(problem(shape, mask)) is None]


# What is served.

SERVED = AttentionCall("cuda", (9, 0), torch.bfloat16, 128, 4, 2, None, False, None, False)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"device": "cpu"}, "runs on CUDA, the tensors are on cpu"),
        ({"capability": (8, 0)}, r"needs compute capability 9\.0, this device has 8\.0"),
        ({"dtype": torch.float32}, "takes bfloat16 and float16, not float32"),
        ({"head_dim": 80}, "head dimension 80 must be 64 or 128"),
        ({"obstacle": "does not serve that"}, "does not serve that"),
    ],
)
def test_each_condition_of_the_kernels_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(extension, "why_not", lambda device=None: None)
    assert _cuda.why_not(SERVED) is None
    assert re.fullmatch(words, _cuda.why_not(SERVED._replace(**changes)) or "")


def test_a_library_that_is_missing_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "why_not", lambda device=None: "the CUDA library was not built")
    assert _cuda.why_not(SERVED) == "the CUDA library was not built"


def test_auto_takes_the_kernels_for_gradients_that_they_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "why_not", lambda device=None: None)
    for dense, lists in ((None, False), ("mask window(3, 3, 3)", False), ("block lists", True)):
        for ordered in (True, False):
            call = SERVED._replace(dense=dense, lists=lists, ordered=ordered)
            assert OPERATION.choose("auto", call).name == "cuda"
            assert OPERATION.choose("auto", call._replace(obstacle="does not serve that")).name != "cuda"


def half(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def obstacle(**changes: Any) -> str | None:
    shape = (2, 3, 4)
    given: dict[str, Any] = {name: half(2, 24, 4, 64) for name in "qkv"}
    given |= {"problem": problem(shape, masks.full()), "extras": Extras(), "grad": False}
    return _cuda.obstacle(**(given | changes))


def test_views_and_transposes_are_no_obstacle() -> None:
    fused = half(2, 24, 3, 4, 64)
    assert obstacle(**dict(zip("qkv", fused.unbind(2), strict=True))) is None
    assert obstacle(q=half(2, 4, 24, 64).transpose(1, 2)) is None
    assert obstacle(k=half(2, 24, 1, 64).expand(2, 24, 4, 64)) is None


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"grad": True, "problem": problem((2, 3, 40), masks.window(1, 1, 3, dilation=(1, 1, 9)))},
            "mask .* is dilated by 9 on its last axis",
        ),
        ({"grad": True, "extras": Extras(k_frames=torch.arange(2))}, "has no backward of k_frames"),
        ({"k": half(2, 24, 4, 66)[..., :64]}, r"k has strides \(6336, 264, 66, 1\): all but"),
        ({"v": half(2, 1, 4, 64).expand(2, 24, 4, 64)}, r"v has strides \(256, 0, 64, 1\)"),
        (
            {"problem": problem((9000, 1, 1), masks.full()), "extras": Extras(k_frames=torch.arange(2))},
            "does not serve k_frames of grids of more than 8192 frames",
        ),
        (
            {"problem": problem((2, 3, 4), masks.window(1, 1, 2), masks.window(1, 1, 2, dilation=(1, 1, 2)))},
            r"mask window\(.*\) and others are dilated in several ways on one axis",
        ),
    ],
)
def test_what_stands_against_the_kernels_is_named(changes: dict[str, Any], words: str) -> None:
    assert re.match(words, obstacle(**changes) or "")


def test_block_lists_are_no_obstacle_and_negative_scales_are_one() -> None:
    lists = lower(masks.spatial(), (2, 3, 4), (1, 3, 4), (1, 3, 4))
    everything = Region((0, 0, 0), (2, 3, 4))
    listed = Problem(Grid(2, 3, 4), (), everything, everything, True, "all", 0.5, (1, 3, 4), (1, 3, 4))
    assert obstacle(problem=listed, extras=Extras(None, None, lists.count, lists.index)) is None
    negative = Problem(Grid(2, 3, 4), (masks.full(),), everything, everything, True, "all", -0.5)
    assert obstacle(problem=negative) == "scale=-0.5 must not be negative"


def test_an_explicit_request_on_a_cpu_is_refused() -> None:
    q = torch.zeros(1, 24, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="impl='cuda' does not serve attention for this call: runs on CUDA"):
        stattn.attention(q, q, q, (2, 3, 4), impl="cuda")


# Plans.


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


# Results.


def assert_right(
    qkv: tuple[torch.Tensor, ...], grid: Grid, mask: Any = None, valid: torch.Tensor | None = None, **options: Any
) -> None:
    """Compare with float64 attention over the table of allowed pairs, within twice the error of eager's rounding."""
    mask = masks.full() if mask is None else mask
    q, k, v = qkv
    out, lse = stattn.attention(q, k, v, grid, mask, valid=valid, return_lse=True, impl="cuda", **options)
    see = options.get("globals_see", "all")
    video = torch.arange(grid.before, grid.before + grid.video)
    each = mask if isinstance(mask, tuple) else (mask,) * q.shape[2]
    scale = options.get("scale", 1 / math.sqrt(q.shape[3]))
    group = q.shape[2] // k.shape[2]
    eps = torch.finfo(q.dtype).eps
    for head in range(q.shape[2]):
        qh, kh, vh = (x[:, :, i].double() for x, i in ((q, head), (k, head // group), (v, head // group)))
        seen = torch.ones(q.shape[0], q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
        if each[head] != masks.full() or see != "all" or valid is not None:
            rows = None if q.shape[1] == grid.tokens else video
            for sample in range(q.shape[0]):
                real = None if valid is None else valid[sample]
                seen[sample] = each[head].allowed(grid, rows, globals_see=see, valid=real).to(q.device)
        scores = (qh @ kh.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        want_lse = scores.logsumexp(-1)
        weights = torch.exp(scores - want_lse.masked_fill(want_lse == -torch.inf, 0)[..., None])
        want = weights @ vh
        # Eager attention rounds its weights and its output to the dtype.
        eager = (weights.to(q.dtype) @ vh.to(q.dtype)).double()
        error, allowed = (out[:, :, head] - want).abs().max(), 2 * ((eager - want).abs().max() + eps * want.abs().max())
        assert error <= allowed, f"head {head} of {mask}: error {error:.2e}, allowed {allowed:.2e}"
        empty = want_lse == -torch.inf
        assert torch.equal(lse[:, head] == -torch.inf, empty)
        assert (out[:, :, head][empty] == 0).all()
        assert ((lse[:, head] - want_lse)[~empty].abs() <= 1e-5 * (1 + want_lse[~empty].abs())).all()


def tensors(
    q_tokens: int, k_tokens: int, heads: int, key_heads: int, dim: int, dtype: torch.dtype, batch: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(batch, q_tokens, heads, dim, device="cuda", dtype=dtype)
    k, v = (torch.randn(batch, k_tokens, key_heads, dim, device="cuda", dtype=dtype) for _ in range(2))
    return q, k, v


class TestOnHopper:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dim", [64, 128])
    def test_dense_attention_is_right_around_every_tile_edge(self, dim: int, dtype: torch.dtype) -> None:
        edges = [1, 63, 64, 65, 78, 79, 80, 81, 82, 127, 128, 129, 190, 191, 192, 193, 194, 400]
        for number, queries in enumerate(edges):
            keys = edges[(number * 7 + 3) % len(edges)]
            grid = Grid(1, 1, max(queries, keys))
            q_region, k_region = Region((0, 0, 0), (1, 1, queries)), Region((0, 0, 0), (1, 1, keys))
            qkv = tensors(queries, keys, 2, 2, dim, dtype)
            assert_right(qkv, grid, q_region=q_region, k_region=k_region)

    @pytest.mark.parametrize("dim", [64, 128])
    def test_views_batches_and_grouped_heads_are_read_where_they_lie(self, dim: int) -> None:
        grid = Grid(3, 7, 19, 5, 3)
        n = grid.tokens
        fused = torch.randn(2, n, 3, 6, dim, device="cuda", dtype=torch.bfloat16)
        assert_right(fused.unbind(2), grid)
        swapped = torch.randn(3, 2, 6, n, dim, device="cuda", dtype=torch.bfloat16).transpose(2, 3)
        assert_right(swapped.unbind(0), grid)
        tokens_first = torch.randn(3, n, 2, 6, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        assert_right(tokens_first.unbind(0), grid)
        assert_right(tensors(n, n, 24, 8, dim, torch.bfloat16, batch=3), grid)
        q, k, v = tensors(n, n, 6, 1, dim, torch.bfloat16)
        assert_right((q, k.expand(1, n, 6, dim), v.expand(1, n, 6, dim)), grid)

    def test_large_scores_and_a_scale_of_zero_are_served(self) -> None:
        q, k, v = tensors(500, 500, 2, 2, 128, torch.bfloat16)
        for factor in (3, 30):
            assert_right((q * factor, k * factor, v), Grid(1, 1, 500))
        assert_right((q, k, v), Grid(1, 1, 500), scale=0.0)

    @pytest.mark.parametrize("shape", [*SHAPES, (7, 11, 13)])
    @pytest.mark.parametrize("dim", [64, 128])
    def test_every_planned_mask_is_right(self, shape: Triple, dim: int) -> None:
        grid = Grid(*shape)
        qkv = tensors(grid.tokens, grid.tokens, 2, 1, dim, torch.bfloat16, batch=2)
        for mask in planned_masks(shape):
            assert_right(qkv, grid, mask)

    @pytest.mark.parametrize("dim", [64, 128])
    def test_global_tokens_are_right_beside_every_kind_of_mask(self, dim: int) -> None:
        for before, after in ((0, 77), (5, 0), (70, 200)):
            grid = Grid(3, 5, 7, before, after)
            qkv = tensors(grid.tokens, grid.tokens, 2, 1, dim, torch.bfloat16, batch=2)
            valid = torch.rand(2, before + after, device="cuda") < 0.7
            dilated = masks.window(1, 2, 3, dilation=(3, 2, 2))
            for mask in (masks.full(), masks.window(3, 3, 3), masks.spatial(), dilated):
                for see in ("all", "globals"):
                    for real in (None, valid):
                        assert_right(qkv, grid, mask, real, globals_see=see)
                video = qkv[0][:, : grid.video].contiguous()
                assert_right((video, *qkv[1:]), grid, mask, valid)

    def test_dilated_windows_are_right(self) -> None:
        grid = Grid(6, 18, 27)
        qkv = tensors(grid.tokens, grid.tokens, 2, 2, 128, torch.bfloat16)
        for dilation in ((1, 2, 3), (2, 1, 9), (3, 9, 1), (1, 3, 8)):
            assert_right(qkv, grid, masks.window(2, 2, 3, dilation=dilation))

    def test_heads_may_have_masks_of_their_own(self) -> None:
        grid = Grid(4, 6, 6)
        each = (masks.window(3, 3, 3), masks.spatial(), masks.window(3, 5, 5), masks.frame_causal(2))
        assert_right(tensors(grid.tokens, grid.tokens, 4, 4, 128, torch.bfloat16, batch=2), grid, each)

    @pytest.mark.parametrize(
        "shape, mask",
        [
            ((21, 45, 80), masks.window(7, 17, 17)),
            ((30, 48, 80), masks.sliding_tile((6, 8, 8), (3, 3, 3))),
            ((21, 30, 52), masks.frame_causal(3)),
            ((21, 45, 80), masks.temporal()),
        ],
    )
    def test_every_row_counts_its_keys_at_video_length(self, shape: Triple, mask: Mask) -> None:
        grid = Grid(*shape)
        _, k, v = tensors(1, grid.tokens, 2, 2, 128, torch.bfloat16)
        _, lse = stattn.attention(torch.zeros_like(k), k, v, grid, mask, return_lse=True, impl="cuda")
        counts = [np.prod(np.meshgrid(*(r.counts() for r in p), indexing="ij"), axis=0) for p in mask.products(grid)]
        want = torch.from_numpy(np.sum(counts, axis=0).reshape(-1)).to("cuda")
        assert torch.equal(lse.exp().round().long(), want.expand(1, 2, -1))

    @pytest.mark.parametrize("dim", [64, 128])
    def test_few_rows_of_many_keys_are_right(self, dim: int) -> None:
        """The tiles are in pieces, whose number does not depend on heads or batch."""
        grid = Grid(9, 30, 40, 70, 3)
        _, k, v = tensors(1, grid.tokens, 4, 2, dim, torch.bfloat16, batch=2)
        region = Region((8, 0, 0), (1, 30, 40))
        frame = torch.randn(2, 1200, 4, dim, device="cuda", dtype=torch.bfloat16)
        causal, dense = masks.frame_causal(2), masks.full()
        whole = stattn.attention(
            torch.cat([k.new_zeros(2, grid.tokens - 1203, 4, dim), frame, k.new_zeros(2, 3, 4, dim)], 1),
            k, v, grid, causal, impl="cuda",
        )  # fmt: skip
        for mask in (causal, dense, masks.window(9, 5, 7)):
            part = stattn.attention(frame, k, v, grid, mask, q_region=region, return_lse=True, impl="cuda")
            if mask != masks.window(9, 5, 7):
                eps = torch.finfo(torch.bfloat16).eps
                error = (part[0] - whole[:, -1203:-3]).float().abs().max()
                assert error <= 2 * eps * whole.float().abs().max()
            one = stattn.attention(
                frame[1:, :, 2:3], k[1:, :, 1:], v[1:, :, 1:], grid, mask, q_region=region, return_lse=True, impl="cuda"
            )
            assert torch.equal(one[0], part[0][1:, :, 2:3])
            assert torch.equal(one[1], part[1][1:, 2:3])

    def test_results_repeat_and_do_not_depend_on_the_batch(self) -> None:
        grid = Grid(5, 17, 23)
        q, k, v = tensors(grid.tokens, grid.tokens, 4, 2, 128, torch.bfloat16, batch=3)
        for mask in (masks.full(), masks.window(3, 5, 7)):
            first = stattn.attention(q, k, v, grid, mask, return_lse=True, impl="cuda")
            for _ in range(20):
                again = stattn.attention(q, k, v, grid, mask, return_lse=True, impl="cuda")
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            alone = stattn.attention(q[1:2], k[1:2], v[1:2], grid, mask, return_lse=True, impl="cuda")
            assert all(torch.equal(a[1:2], b) for a, b in zip(first, alone, strict=True))

    def test_a_captured_call_follows_its_inputs_on_any_stream(self) -> None:
        grid = Grid(3, 9, 14)
        q, k, v = tensors(grid.tokens, grid.tokens, 4, 4, 64, torch.bfloat16)
        for mask in (masks.full(), masks.window(3, 3, 5)):
            stattn.attention(q, k, v, grid, mask, impl="cuda")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = stattn.attention(q, k, v, grid, mask, impl="cuda")
            for _ in range(3):
                q.normal_()
                graph.replay()
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    eager = stattn.attention(q, k, v, grid, mask, impl="cuda")
                stream.synchronize()
                assert torch.equal(captured, eager)

    def test_nothing_is_read_or_written_beside_the_tensors(self) -> None:
        grid, guard = Grid(3, 5, 7), 512
        n = grid.tokens
        for mask in (masks.full(), masks.window(3, 3, 3)):
            held = torch.full((3, n * 2 * 64 + 2 * guard), torch.nan, device="cuda", dtype=torch.bfloat16)
            q, k, v = (x[guard:-guard].view(1, n, 2, 64).normal_() for x in held)
            assert_right((q, k, v), grid, mask)
            assert held[:, :guard].isnan().all()
            assert held[:, -guard:].isnan().all()

    def test_offsets_beyond_2_to_the_31_are_right(self) -> None:
        grid = Grid(21, 45, 80)
        fused = torch.randn(2, grid.tokens, 3, 40, 128, device="cuda", dtype=torch.bfloat16)
        assert fused.numel() > 2**31
        for mask in (masks.window(3, 5, 5), masks.temporal()):
            whole = stattn.attention(*fused.unbind(2), grid, mask, impl="cuda")
            last = (x[1:, :, 38:].contiguous() for x in fused.unbind(2))
            assert torch.equal(whole[1:, :, 38:], stattn.attention(*last, grid, mask, impl="cuda"))

    def test_a_batch_of_144_000_heads_is_served(self) -> None:
        grid = Grid(1, 1, 21)
        q, k, v = (torch.randn(3600, 21, 40, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        out = stattn.attention(q, k, v, grid, impl="cuda")
        assert_right((q[-1:], k[-1:], v[-1:]), grid)
        for sample in (0, 1797, 3599):
            alone = (x[sample : sample + 1] for x in (q, k, v))
            assert torch.equal(out[sample : sample + 1], stattn.attention(*alone, grid, impl="cuda"))

    def test_an_address_that_copies_cannot_take_is_named(self) -> None:
        x = torch.randn(1, 24 * 2 * 64 + 1, device="cuda").to(torch.bfloat16)[:, 1:].view(1, 24, 2, 64)
        with pytest.raises(ValueError, match="k starts at an address that is no multiple of 16 bytes"):
            stattn.attention(x.clone(), x, x, (2, 3, 4), impl="cuda")

    def test_auto_takes_these_kernels_whether_or_not_a_gradient_is_needed(self) -> None:
        q, k, v = tensors(24, 24, 2, 2, 64, torch.bfloat16)
        assert "auto takes cuda" in stattn.explain(q, k, v, (2, 3, 4))
        q.requires_grad_()
        assert "auto takes cuda" in stattn.explain(q, k, v, (2, 3, 4))
        stattn.attention(q, k, v, (2, 3, 4)).sum().backward()
        assert q.grad is not None

    def test_a_call_without_keys_or_queries_is_empty(self) -> None:
        q, k, v = tensors(24, 24, 2, 2, 64, torch.bfloat16)
        assert stattn.attention(q[:0], k[:0], v[:0], (2, 3, 4), impl="cuda").shape == (0, 24, 2, 64)
