"""The CUDA kernels of attention: what they serve, the plans that they read, and on a Hopper GPU their results."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

import stattn
from stattn import extension, masks
from stattn.blocks import lower
from stattn.grid import Grid, Region, Triple
from stattn.masks import CONSTRUCTORS, Mask
from stattn.ops import _cuda, _cuda_plan
from stattn.ops.attention import AttentionCall
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


# --- what is served ---------------------------------------------------------------------------------------------------

SERVED = AttentionCall("cuda", (9, 0), torch.bfloat16, 128, 4, 2, None, False, None)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"device": "cpu"}, "runs on CUDA, the tensors are on cpu"),
        ({"capability": (8, 0)}, r"needs compute capability 9\.0, this device has 8\.0"),
        ({"dtype": torch.float32}, "takes bfloat16 and float16, not float32"),
        ({"head_dim": 80}, "head dimension 80 must be 64 or 128"),
        ({"obstacle": "does not serve k_frames yet"}, "does not serve k_frames yet"),
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
        ({"grad": True}, "has no backward yet, and a gradient is needed"),
        ({"k": half(2, 24, 4, 66)[..., :64]}, r"k has strides \(6336, 264, 66, 1\): all but"),
        ({"v": half(2, 1, 4, 64).expand(2, 24, 4, 64)}, r"v has strides \(256, 0, 64, 1\)"),
        ({"extras": Extras(k_frames=torch.arange(2))}, "does not serve k_frames yet"),
        ({"problem": problem((2, 3, 4), masks.window(1, 1, 2, dilation=2))}, r"mask window\(.*\) is dilated"),
    ],
)
def test_what_stands_against_the_kernels_is_named(changes: dict[str, Any], words: str) -> None:
    assert re.match(words, obstacle(**changes) or "")


def test_global_tokens_beside_a_mask_block_lists_and_negative_scales_are_refused_so_far() -> None:
    grid, region = Grid(2, 3, 4, 0, 5), Region((0, 0, 0), (2, 3, 4))
    beside = Problem(grid, (masks.spatial(),), region, region, True, "all", 0.1)
    assert obstacle(problem=beside) == "does not serve 5 global tokens beside mask spatial() yet"
    dense = Problem(grid, (masks.full(),), region, region, True, "all", 0.1)
    assert obstacle(problem=dense) is None
    only = Problem(grid, (masks.full(),), region, region, True, "globals", 0.1)
    assert obstacle(problem=only) == "does not serve globals_see='globals' yet"
    real = Extras(valid=torch.ones(2, 5, dtype=torch.bool))
    assert obstacle(problem=dense, extras=real) == "does not serve valid yet"
    lists = lower(masks.spatial(), (2, 3, 4), (1, 3, 4), (1, 3, 4))
    assert obstacle(extras=Extras(None, None, lists.count, lists.index)) == "does not serve block lists yet"
    negative = Problem(Grid(2, 3, 4), (masks.full(),), region, region, True, "all", -0.5)
    assert obstacle(problem=negative) == "scale=-0.5 must not be negative"


def test_an_explicit_request_on_a_cpu_is_refused() -> None:
    q = torch.zeros(1, 24, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="impl='cuda' does not serve attention for this call: runs on CUDA"):
        stattn.attention(q, q, q, (2, 3, 4), impl="cuda")


# --- plans ------------------------------------------------------------------------------------------------------------


def read_plan(given: Problem, heads: int, head_dim: int) -> list[np.ndarray]:
    """Count, as the kernel walks a plan, how often each query of each head takes part with each key."""
    number, integers, array = _cuda_plan.layout(given, heads, head_dim)
    q_shape, k_shape, slab, box = (np.array(integers[i : i + 3]) for i in (0, 3, 6, 9))
    stacked, tiles = integers[12:]
    columns = next(each.box for each in _cuda_plan.CONFIGS[head_dim] if each.number == number)
    width = 64 if columns <= 64 else 128
    records = array.reshape(-1, 4)
    bits = np.unpackbits(array.view(np.uint8), bitorder="little").reshape(-1, width).astype(bool)
    rows, keys = (np.stack(np.unravel_index(np.arange(e.prod()), tuple(e)), 1) for e in (slab, box))
    found = []
    for head in range(heads):
        seen = np.zeros((q_shape.prod(), k_shape.prod()), np.int64)
        written = np.zeros(q_shape.prod(), np.int64)
        for tile in range(tiles):
            corner = records[array[head] + 2 * tile][:3]
            first_box, boxes, first_mask, masked = records[array[head] + 2 * tile + 1]
            assert len(keys) == columns or masked == boxes
            for group in range(3):
                place = corner + rows + group * slab * (np.arange(3) == stacked)
                real = (place < q_shape).all(1)
                query = np.ravel_multi_index(tuple(place[real].T), tuple(q_shape))
                written[query] += 1
                for number in range(boxes):
                    key_place = records[first_box + number][:3] + keys
                    allowed = np.ones((len(rows), width), bool)
                    if number < masked:
                        start = records[first_mask + group * masked + number][:3]
                        for axis in range(3):
                            allowed &= bits[start[axis] + rows[:, axis]]
                        assert not allowed[:, len(keys) :].any()
                    inside = (key_place < k_shape).all(1)
                    assert not allowed[real][:, : len(keys)][:, ~inside].any()
                    key = np.ravel_multi_index(tuple(key_place[inside].T), tuple(k_shape))
                    seen[query[:, None], key] += allowed[real][:, : len(keys)][:, inside]
        assert (written == 1).all()
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


def test_heads_with_masks_of_their_own_read_plans_of_their_own() -> None:
    shape = (4, 6, 6)
    each = (masks.window(3, 3, 3), masks.spatial(), masks.window(3, 3, 3), masks.frame_causal(2))
    for mask, seen in zip(each, read_plan(problem(shape, *each), 4, 128), strict=True):
        assert (seen == mask.allowed(shape).numpy()).all(), f"{mask}"


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


def test_sliding_tiles_that_boxes_divide_need_no_masks() -> None:
    shape, mask = (30, 48, 80), masks.sliding_tile((6, 8, 8), (3, 3, 3))
    number, integers, array = _cuda_plan.layout(problem(shape, mask), 1, 128)
    records = array.reshape(-1, 4)[array[0] :][: 2 * integers[13]].reshape(-1, 2, 4)
    assert records[:, 1, 3].sum() == 0
    pairs = records[:, 1, 1].sum() * _cuda_plan.CONFIGS[128][number].box * 192
    assert pairs == 30 * 48 * 80 * 18 * 24 * 24


# --- results ----------------------------------------------------------------------------------------------------------


def assert_right(qkv: tuple[torch.Tensor, ...], grid: Grid, mask: Any = None, **options: Any) -> None:
    """Compare with float64 attention over the table of allowed pairs, within twice the error of eager's rounding."""
    mask = masks.full() if mask is None else mask
    q, k, v = qkv
    out, lse = stattn.attention(q, k, v, grid, mask, return_lse=True, impl="cuda", **options)
    each = mask if isinstance(mask, tuple) else (mask,) * q.shape[2]
    scale = options.get("scale", 1 / math.sqrt(q.shape[3]))
    group = q.shape[2] // k.shape[2]
    eps = torch.finfo(q.dtype).eps
    for head in range(q.shape[2]):
        qh, kh, vh = (x[:, :, i].double() for x, i in ((q, head), (k, head // group), (v, head // group)))
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
        if each[head] != masks.full():
            seen = each[head].allowed(grid).to(q.device)
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

    def test_auto_takes_these_kernels_and_another_where_a_gradient_is_needed(self) -> None:
        q, k, v = tensors(24, 24, 2, 2, 64, torch.bfloat16)
        assert "auto takes cuda" in stattn.explain(q, k, v, (2, 3, 4))
        q.requires_grad_()
        assert "auto takes cuda" not in stattn.explain(q, k, v, (2, 3, 4))
        stattn.attention(q, k, v, (2, 3, 4)).sum().backward()
        assert q.grad is not None

    def test_a_call_without_keys_or_queries_is_empty(self) -> None:
        q, k, v = tensors(24, 24, 2, 2, 64, torch.bfloat16)
        assert stattn.attention(q[:0], k[:0], v[:0], (2, 3, 4), impl="cuda").shape == (0, 24, 2, 64)
