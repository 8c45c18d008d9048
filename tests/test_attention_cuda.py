"""The CUDA kernels of attention: what they serve, and on a Hopper GPU their results."""

from __future__ import annotations

import dataclasses
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


def test_block_lists_are_no_obstacle_and_scales_out_of_range_are_one() -> None:
    lists = lower(masks.spatial(), (2, 3, 4), (1, 3, 4), (1, 3, 4))
    everything = Region((0, 0, 0), (2, 3, 4))
    listed = Problem(Grid(2, 3, 4), (), everything, everything, True, "all", 0.5, (1, 3, 4), (1, 3, 4))
    assert obstacle(problem=listed, extras=Extras(None, None, lists.count, lists.index)) is None
    negative = Problem(Grid(2, 3, 4), (masks.full(),), everything, everything, True, "all", -0.5)
    assert obstacle(problem=negative) == "scale=-0.5 must not be negative"
    huge = dataclasses.replace(negative, scale=1e30)
    assert obstacle(problem=huge) == "scale=1e+30 must be below 1e+30"
    assert obstacle(problem=dataclasses.replace(huge, scale=1e29)) is None


def test_an_explicit_request_on_a_cpu_is_refused() -> None:
    q = torch.zeros(1, 24, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="impl='cuda' does not serve attention for this call: runs on CUDA"):
        stattn.attention(q, q, q, (2, 3, 4), impl="cuda")


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

    @pytest.mark.parametrize("dim", [64, 128])
    def test_65_536_samples_of_a_head_and_of_a_token_are_served(self, dim: int) -> None:
        q, k, v = tensors(5, 5, 1, 1, dim, torch.bfloat16, batch=65_536)
        for mask in (masks.full(), masks.window(1, 1, 3)):
            out = stattn.attention(q, k, v, (1, 1, 5), mask, impl="cuda")
            for sample in (0, 40_000, 65_535):
                alone = (x[sample : sample + 1] for x in (q, k, v))
                assert torch.equal(out[sample : sample + 1], stattn.attention(*alone, (1, 1, 5), mask, impl="cuda"))
        assert_right((q[-1:], k[-1:], v[-1:]), Grid(1, 1, 5), mask)
        one = tensors(1, 1, 1, 1, dim, torch.bfloat16, batch=65_536)
        assert torch.equal(stattn.attention(*one, (1, 1, 1), impl="cuda"), one[2])

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
