"""The CUDA kernels of the attention backward on a Hopper GPU: memory and layouts, order, streams, graphs, compile.

python -m pytest -m gpu tests/test_attention_cuda_bwd_calls.py --record FILE
"""

from __future__ import annotations

import itertools
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from probes import Case
from test_attention import draw, results
from test_attention_cuda import HOPPER, problem
from test_attention_cuda_bwd_proof import EVERY, forget_plans, refusal
from test_attention_kernels import check_strides_of_dout, gradients, random_call, same
from test_attention_operation import check_compiled, check_operations
from test_attention_proof import option_cases

import stattn
from stattn import extension, masks
from stattn.blocks import BlockList, lower
from stattn.grid import Grid, Triple
from stattn.ops import _cuda_bwd, _cuda_bwd_plan, _cuda_tiles
from stattn.ops._cuda_tiles import KERNELS, Config

DEVICE = "cuda"
gpu = pytest.mark.gpu
apart = pytest.mark.apart
hopper = pytest.mark.skipif(not HOPPER or not extension.LIBRARY.exists(), reason="no Hopper GPU, or no CUDA library")
Covered = dict[str, int]
WAYS = (True, False)  # of ``deterministic``

# Memory and layout: proof 9 to 12.


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
            before = held[:4].clone()
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = stattn.attention(*leaves, grid, mask, impl="cuda", deterministic=way)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "empty", Given(*found))
                patch.setattr(torch.Tensor, "new_empty", lambda x, n: x.new_full((n,), torch.nan))
                gradient = torch.autograd.grad(out, leaves, dout)
            assert all(a.data_ptr() == b.data_ptr() for a, b in zip(gradient, found, strict=True))
            torch.testing.assert_close(held[:4], before, rtol=0, atol=0, equal_nan=True)
            assert held[:, :guard].isnan().all()
            assert held[:, -guard:].isnan().all()
            assert not held[:, guard:-guard].isnan().any()
            calls += 1
    return {"calls": calls}


@gpu
@apart
@hopper
def test_what_memory_holds_before_makes_no_difference() -> Covered:
    grid, video = Grid(4, 9, 16, 2, 3), Grid(4, 9, 16)
    lists = lower(masks.window(3, 5, 5), video.shape, (2, 3, 8), (2, 3, 8), DEVICE)
    calls = [(grid, masks.full()), (grid, masks.window(3, 5, 5)), (video, lists)]
    for dim, (where, mask) in itertools.product((64, 128), calls):
        tensors = draw(2, where.tokens, 2, dim, dtype=torch.bfloat16, device=DEVICE)
        dout = torch.randn_like(tensors[0])
        plain = gradients(tensors, dout, None, where, mask, impl="cuda", deterministic=True)
        torch.use_deterministic_algorithms(True)  # by which PyTorch fills new memory with NaN, or the largest integer
        try:
            filled = gradients(tensors, dout, None, where, mask, impl="cuda")
        finally:
            torch.use_deterministic_algorithms(False)
        assert same(filled, plain)
    return {"calls": 2 * len(calls)}


# racecheck orders what the arriving thread itself did before a barrier: here all lanes of a warp read, then __syncwarp,
# then one lane arrives for them, and only then may the producer write again. A build in which each lane arrives has no
# hazard (benchmarks/notes/attention-cuda.md).
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
def test_as_many_heads_and_samples_as_there_are_places_have_gradients(batch: int, heads: int, shape: Triple) -> Covered:
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


# Order, streams, graphs, compile: proof 16 to 19, 22.


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
@pytest.mark.parametrize("dim, dq, kv", EVERY, ids=[f"{dim}-{dq.number}-{kv.number}" for dim, dq, kv in EVERY])
def test_50_runs_of_every_config_give_the_same_bits(dim: int, dq: Config, kv: Config) -> Covered:
    grid = Grid(4, 11, 17, 3, 5)
    tensors = draw(2, grid.tokens, 2, dim, dtype=torch.bfloat16, device=DEVICE)
    dout = torch.randn_like(tensors[0])
    with pytest.MonkeyPatch.context() as patch:
        for kernel, chosen in (("dq", dq), ("kv", kv)):
            patch.setitem(_cuda_tiles.KERNELS, kernel, KERNELS[kernel]._replace(configs={dim: (chosen,)}))
        forget_plans()
        for mask in (masks.full(), masks.window(3, 5, 7), masks.spatial() | masks.temporal()):
            first = gradients(tensors, dout, None, grid, mask, impl="cuda", deterministic=True)
            for _ in range(50):
                assert same(gradients(tensors, dout, None, grid, mask, impl="cuda", deterministic=True), first)
    forget_plans()
    return {"reruns": 150}


@gpu
@apart
@hopper
def test_long_lists_whose_blocks_wait_for_each_other_give_the_same_bits() -> Covered:
    shape, tile = (30, 48, 80), (2, 4, 8)
    tiles = Grid(*shape).video // 64
    index = torch.rand(1, 3, tiles, tiles, device=DEVICE).topk(90).indices.sort(-1).values.to(torch.int32)
    index[:, 1] = index[:, 1, :1]  # all that the first tile sees
    count = torch.randint(1, 91, (1, 3, tiles), device=DEVICE, dtype=torch.int32)
    lists = BlockList(shape, tile, tile, count, index)
    tensors = draw(1, Grid(*shape).video, 3, 128, dtype=torch.bfloat16, device=DEVICE)
    dout = torch.randn_like(tensors[0])
    first = gradients(tensors, dout, None, shape, lists, impl="cuda", deterministic=True)
    for _ in range(50):
        assert same(gradients(tensors, dout, None, shape, lists, impl="cuda", deterministic=True), first)
    for head in range(3):  # alone, blocks meet others
        one = slice(head, head + 1)
        alone = BlockList(shape, tile, tile, count[:, one], index[:, one])
        found = gradients(tuple(x[:, :, one] for x in tensors), dout[:, :, one], None, shape, alone, impl="cuda")
        assert all(torch.equal(x, y[:, :, one]) for x, y in zip(found[2:], first[2:], strict=True))
    return {"reruns": 50}


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
    lists = lower(found[1], (4, 9, 16), (2, 3, 8), (2, 3, 8), DEVICE)
    tensors = draw(3, 4 * 9 * 16, 4, 64, key_heads=2, dtype=torch.bfloat16, device=DEVICE)
    dout = torch.randn_like(tensors[0])
    together = gradients(tensors, dout, None, lists.shape, lists, **given)
    for one in (slice(i, i + 1) for i in range(3)):
        alone = gradients(tuple(x[one] for x in tensors), dout[one], None, lists.shape, lists, **given)
        assert same(alone, [x[one] for x in together])
    return {"masks": len(found) + 1}


def kernels_of(call: Callable[[], object]) -> Counter[str]:
    """Count the package's kernels in a call, by their names."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [each for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    return Counter(each.name for each in events if "stattn" in each.name)


@gpu
@apart
@hopper
def test_deterministic_algorithms_choose_the_way_that_is_reproducible() -> None:
    grid, mask = Grid(3, 9, 14), masks.window(3, 3, 5)
    tensors = draw(1, grid.tokens, 2, 128, dtype=torch.bfloat16, device=DEVICE)
    dout = torch.randn_like(tensors[0])

    def kernels(**given: Any) -> set[str]:
        found = kernels_of(lambda: gradients(tensors, dout, None, grid, mask, impl="cuda", **given))
        return {name for name in found if "attention_dq" in name}

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
@pytest.mark.parametrize("kind", ["globals", "unions", "heads", "regions", "lists", "shared keys"])
def test_auto_takes_these_kernels_where_gradients_are_needed(kind: str) -> Covered:
    covered = Counter[str]()
    shared = [Case(Grid(3, 7, 9, 2, 5), masks.window(3, 3, 5), heads=4)]
    for case in itertools.islice(shared if kind == "shared keys" else option_cases(kind), 12):
        if refusal(case, torch.bfloat16, 64) is not None:
            continue
        case.options["deterministic"] = True
        tensors = tuple(
            torch.randn(1, len(each), case.heads // (1 + (kind == "shared keys" and number > 0)), 64, device=DEVICE)
            for number, each in enumerate((case.rows(), case.columns(), case.columns()))
        )
        tensors = tuple(x.bfloat16() for x in tensors)
        given = (torch.randn_like(tensors[0]), torch.zeros(1, case.heads, len(case.rows()), device=DEVICE))
        chosen, named = (results(case, tensors, given, impl) for impl in ("auto", "cuda"))
        for name in named:
            assert torch.equal(chosen[name], named[name]), f"{case} {name}"
        covered.update(calls=1)
    assert covered["calls"]
    return covered


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
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_kernels_run_on_the_device_of_their_tensors() -> Covered:
    grid, calls = Grid(4, 9, 16, 2, 3), 0
    lists = lower(masks.window(3, 5, 5), (4, 9, 16), (2, 3, 8), (2, 3, 8), DEVICE)
    for dim, mask in itertools.product((64, 128), (masks.full(), masks.window(3, 5, 5), lists)):
        where = Grid(4, 9, 16) if mask is lists else grid
        tensors = draw(2, where.tokens, 2, dim, dtype=torch.bfloat16, device=DEVICE)
        dout = torch.randn_like(tensors[0])
        want = gradients(tensors, dout, None, where, mask, impl="cuda", deterministic=True)
        there = mask
        if isinstance(there, BlockList):
            there = lower(masks.window(3, 5, 5), (4, 9, 16), (2, 3, 8), (2, 3, 8), "cuda:1")
        assert torch.cuda.current_device() == 0
        *moved, d = (x.to("cuda:1") for x in (*tensors, dout))
        found = gradients(tuple(moved), d, None, where, there, impl="cuda", deterministic=True)
        assert all(x.device == torch.device("cuda:1") for x in found)
        assert same([x.to(DEVICE) for x in found], want)
        calls += 1
    return {"calls": calls}


@gpu
@apart
@hopper
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["dense", "window", "lists"])
def test_a_graph_replays_with_new_inputs(kind: str, way: bool) -> Covered:
    grid: Grid = Grid(4, 9, 16) if kind == "lists" else Grid(4, 9, 16, 2, 3)
    mask: Any = masks.full() if kind == "dense" else masks.window(3, 5, 5)
    if kind == "lists":
        mask = lower(mask, grid.shape, (2, 3, 8), (2, 3, 8), DEVICE)
    valid = torch.tensor([[True, True, False, True, True]], device=DEVICE) if kind == "window" else None
    tensors = [x.requires_grad_() for x in draw(1, grid.tokens, 2, 64, dtype=torch.bfloat16, device=DEVICE)]
    dout = torch.randn_like(tensors[0]).detach()

    def call() -> list[torch.Tensor]:
        out, lse = stattn.attention(*tensors, grid, mask, valid=valid, return_lse=True, impl="cuda", deterministic=way)
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
        assert kernels_of(graph.replay) == kernels_of(call)  # a launch elsewhere would escape the capture
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
    mask and for lists; of dense calls pieces, or 8 bytes a box of 64 queries; of lists a plan at a time, of at most 64
    bytes a pair of tiles of 64 tokens and 64 a tile, and two bits for each pair that might be.
    """
    shape, heads = (21, 45, 80), 4
    n = Grid(*shape).video
    tensors = [x.requires_grad_() for x in draw(1, n, heads, 128, dtype=torch.bfloat16, device=DEVICE)]
    dout = torch.randn_like(tensors[0])
    tiles, most = 6 * 12 * 20, 96
    index = torch.rand(1, heads, tiles, tiles, device=DEVICE).topk(most).indices.to(torch.int32)
    lists = BlockList(shape, (4, 4, 4), (4, 4, 4), torch.full_like(index[..., 0], most), index)
    ways: list[tuple[Any, bool]] = [*itertools.product((masks.full(), masks.window(7, 17, 17)), WAYS), (lists, False)]
    for mask, way in ways:
        out = stattn.attention(*tensors, shape, mask, impl="cuda", deterministic=way)
        torch.autograd.grad(out, tensors, dout, retain_graph=True)  # plans stay
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = torch.autograd.grad(out, tensors, dout)
        taken = torch.cuda.max_memory_allocated() - before
        allowed = sum(x.nbytes for x in found) + 8 * n * heads
        if mask is not lists and mask == masks.full():
            allowed += 4 * dout.numel() + (n // 8 * heads if way else 4 * _cuda_bwd.TAIL * 2 * _cuda_bwd.KEY_TILE * 128)
        elif mask is lists:
            allowed += heads * tiles * (64 * (most + 1) + tiles // 4 + 8)
        elif not way:  # in whole boxes of 64 queries
            _, integers, _ = _cuda_bwd_plan.layout(problem(shape, mask), heads, 128)
            allowed += 4 * 8192 * heads * math.prod(-(-s // b) for s, b in zip(shape, integers[9:12], strict=True))
        # PyTorch leaves up to 1 MiB at the end of each of the six.
        assert taken <= allowed + (6 << 20), f"{type(mask)} {way}: {taken} bytes, {allowed} allowed"
    return {"tokens": n}
