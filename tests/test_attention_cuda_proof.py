"""The proof of the CUDA attention, forward, on a Hopper GPU: masks bit by bit, numbers, layout, order, graphs, memory.

    python -m pytest -m gpu tests/test_attention_cuda_proof.py --record FILE

Tests run apart, several at a time. What each covered is in the record. Its beginnings are in ``test_attention_cuda.py``
and ``test_attention_lists.py``.
"""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from probes import BIG_GRIDS, GRIDS, Case, check, counts_by_axis
from test_attention import SHIFTS, assert_rule_1, dense, draw
from test_attention_cuda import HOPPER, problem
from test_attention_kernels import NUMBERS
from test_attention_proof import Covered, option_cases, video
from test_attention_proof_numbers import CASES, LENGTHS, Seen

import stattn
from stattn import extension, masks
from stattn.blocks import BlockList, lower
from stattn.grid import Grid, Region, Triple
from stattn.masks import CONSTRUCTORS, Mask
from stattn.ops import _attention_memo, _cuda, _cuda_plan, _cuda_tiles
from stattn.ops._cuda_tiles import Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.apart,
    pytest.mark.skipif(not HOPPER or not extension.LIBRARY.exists(), reason="no Hopper GPU, or no CUDA library"),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EVERY = [(dim, config.number) for dim, configs in _cuda_tiles.CONFIGS.items() for config in configs]


@contextmanager
def config_alone(dim: int, number: int) -> Iterator[None]:
    """Let plans of a head dimension use one config alone, and forget the plans and warm calls of before, then these."""

    def forget() -> None:
        _attention_memo.clear()
        for cached in (_cuda_plan.layout, _cuda_plan.on_device, _cuda._launch):
            cached.cache_clear()

    kernel = _cuda_tiles.KERNELS["forward"]
    config = next(each for each in kernel.configs[dim] if each.number == number)
    only: dict[int, tuple[Config, ...]] = {dim: (config,)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_cuda_tiles.KERNELS, "forward", kernel._replace(configs=only))
        forget()
        yield
    forget()


def served(case: Case) -> bool:
    """Say whether the kernels take a call; what they do not take they name."""
    rows, columns = (
        torch.empty(1, len(tokens), case.heads, 64, dtype=torch.bfloat16, device="cuda")
        for tokens in (case.rows(), case.columns())
    )
    options = {name: value for name, value in case.options.items() if name != "scale"}
    if options.get("k_frames") is not None:
        options["k_frames"] = options["k_frames"].cuda()
    if case.valid is not None:
        options["valid"] = case.valid.cuda().expand(1, -1)
    found = case.masks
    if not isinstance(found, (Mask, list, tuple)):
        return not case.grid.globals
    return "* cuda" in stattn.explain(rows, columns, columns, case.grid, found, **options)


# Masks.


@pytest.mark.parametrize("dim, number", EVERY)
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_constructor_is_seen_as_it_is_on_awkward_grids_by_every_config(
    name: str, dim: int, number: int
) -> Covered:
    covered = Counter[str]()
    with config_alone(dim, number):
        for turn, shape in enumerate([*GRIDS, *BIG_GRIDS]):
            tokens, examples = Grid(*shape).video, CONSTRUCTORS[name].examples(shape)
            for place, mask in enumerate(examples):
                part = len(examples) if tokens > 2048 else 1 if tokens <= 60 else min(4, len(examples))
                if place % part != turn % part or _cuda_plan.why_not(problem(shape, mask)) is not None:
                    continue  # on larger grids some of the examples, others on each grid
                last = (tokens - 1) // dim
                only = None if tokens <= 2048 else sorted({0, last // 2, last})
                for dtype in DTYPES.values():
                    case = Case(Grid(*shape), mask, heads=1)
                    check(case, impl="cuda", device="cuda", dtype=dtype, dim=dim, only=only, backward=False)
                    covered.update(calls=1, pairs=video(case) if only is None else tokens * dim * len(only))
    return covered | {"grids": len(GRIDS + BIG_GRIDS)}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", ["globals", "unions", "heads", "regions", "rings", "lists"])
def test_calls_with_more_than_a_mask_see_what_they_should(kind: str, dim: int) -> Covered:
    covered = Counter[str]()
    for case in option_cases(kind):
        if served(case):
            check(case, impl="cuda", device="cuda", dtype=torch.bfloat16, dim=dim, backward=False)
            covered.update(calls=1, pairs=video(case))
        else:
            covered.update(refused=1)
    assert covered["calls"] > 4 * covered["refused"]
    return covered


AROUND = [n + d for n in (64, 80, 128, 160, 192, 256, 384) for d in range(-2, 3)]


@pytest.mark.parametrize("dim", [64, 128])
def test_every_length_around_each_tile_is_seen_whole(dim: int) -> Covered:
    covered = Counter[str]()
    for n in AROUND:
        cases = [Case(Grid(1, 1, n), mask, heads=1) for mask in (masks.full(), masks.window(1, 1, 33, causal=True))]
        region = {"k_region": Region((0, 0, 0), (1, 1, n)), "q_region": Region((0, 0, 0), (1, 1, 40))}
        cases.append(Case(Grid(1, 1, 400), masks.full(), heads=1, options=region))
        cases.append(Case(Grid(1, 2, 3, n, 0), masks.full(), heads=1))
        for case in cases:
            check(case, impl="cuda", device="cuda", dtype=torch.bfloat16, dim=dim, backward=False)
            covered.update(calls=1, pairs=video(case))
    return covered | {"lengths": len(AROUND)}


# Production lengths: proof 3.


@pytest.mark.parametrize("shape, number", CASES, ids=lambda value: str(value).replace(" ", ""))
def test_long_calls_are_within_rule_1_at_sampled_rows(shape: Triple, number: int) -> Covered:
    mask, n = LENGTHS[shape][number], Grid(*shape).video
    q, k, v = draw(1, n, 1, 128, dtype=torch.bfloat16, device="cuda")
    tile = torch.arange(0, n, 192)
    edges = torch.cat([tile, tile - 1])[torch.randperm(2 * len(tile))[:64]].clamp(min=0)
    rows = torch.cat([torch.randint(n, (64,)), edges, torch.tensor([0, n - 1])]).unique().cuda()
    out, lse = stattn.attention(q, k, v, shape, mask, return_lse=True, impl="cuda")
    seen = Seen(mask, shape)(rows)
    by = {}
    for name, kind in (("eager", torch.bfloat16), ("exact", torch.float64)):
        scores = (q[0, rows, 0].to(kind) @ k[0, :, 0].to(kind).T / math.sqrt(128)).masked_fill(~seen, -torch.inf)
        by[name] = scores.softmax(-1) @ v[0, :, 0].to(kind), scores.logsumexp(-1)
    for name, got, place in (("out", out[0, rows, 0], 0), ("lse", lse[0, 0, rows], 1)):
        assert_rule_1(f"{mask} on {shape}: {name}", got, by["eager"][place].to(got.dtype), by["exact"][place])
    return {"tokens": n, "rows": len(rows)}


@pytest.mark.parametrize("shape", LENGTHS, ids=str)
def test_every_row_of_a_long_call_counts_its_keys(shape: Triple) -> Covered:
    n, covered = Grid(*shape).video, Counter[str]()
    q, k, v = torch.zeros(1, n, 1, 128, device="cuda").bfloat16(), *draw(1, n, 1, 128, device="cuda")[:2]
    for mask in LENGTHS[shape]:
        _, lse = stattn.attention(q, k.bfloat16(), v.bfloat16(), shape, mask, return_lse=True, impl="cuda")
        want = counts_by_axis(mask, Grid(*shape)).cuda()
        assert torch.equal(torch.exp(lse[0, 0].double()).round().long(), want), mask
        covered.update(masks=1, rows=n)
    return covered


def test_a_long_forward_takes_the_memory_of_its_output_and_lse() -> Covered:
    shape = (21, 45, 80)
    q, k, v = draw(1, Grid(*shape).video, 4, 128, dtype=torch.bfloat16, device="cuda")
    for mask in LENGTHS[shape]:
        stattn.attention(q, k, v, shape, mask, impl="cuda")  # plans stay
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, lse = stattn.attention(q, k, v, shape, mask, return_lse=True, impl="cuda")
        assert torch.cuda.max_memory_allocated() - before <= out.nbytes + lse.nbytes + (1 << 20)
    return {"masks": len(LENGTHS[shape])}


# Numbers: proof 1, 2, 4, 6.


def hold(name: str, case: Case, tensors: tuple[torch.Tensor, ...]) -> None:
    """Hold output and LSE against the formula in float64, by rule 1; inputs stay as they are."""
    scale = case.options.get("scale", 1 / math.sqrt(tensors[0].shape[3]))
    seen, before = case.truth().cuda(), [x.clone() for x in tensors]
    got = case.call(*tensors, "cuda")
    assert all(torch.equal(x, same) for x, same in zip(tensors, before, strict=True))
    eager, exact = (dense(*given, seen, scale) for given in (tensors, [x.double() for x in tensors]))
    for what, mine, rounded, want in zip(("out", "LSE"), got, eager, exact, strict=True):
        assert_rule_1(f"{name}: {what}", mine, rounded.to(mine.dtype), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
def test_results_are_within_rule_1(dim: int, dtype: str) -> Covered:
    covered = Counter[str]()
    for name, (case, given) in NUMBERS.items():
        if case.options.get("scale", 1.0) < 0 or not served(case):
            covered.update(refused=1)
            continue
        rows, columns = len(case.rows()), len(case.columns())
        heads, sizes = given.get("key_heads"), {"dtype": DTYPES[dtype], "device": "cuda"}
        hold(name, case, draw(given.get("batch", 1), rows, case.heads, dim, key_heads=heads, keys=columns, **sizes))
        covered.update(calls=1)
    assert covered["calls"] >= 20
    return covered


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_lone_values_stay_within_rule_1(dtype: str) -> Covered:
    covered = Counter[str]()
    sizes = (1.0, 3.0, 30.0) if dtype == "bf16" else (1.0, 3.0)  # eager scores of 30 overflow fp16
    for mask, size, spoil in itertools.product(
        (masks.full(), masks.window(3, 5, 3)), sizes, ("none", "outlier", "one-hot")
    ):
        case = Case(Grid(4, 9, 9), mask)
        q, k, v = (x * size for x in draw(1, case.grid.tokens, 2, 64, dtype=DTYPES[dtype], device="cuda"))
        if spoil == "outlier":
            q[..., 3] *= 10
        if spoil == "one-hot":
            k[:, 7] *= 10
        hold(f"{spoil} x {size}", case, (q, k, v))
        covered.update(calls=1)
    return covered


def test_a_shift_of_all_scores_changes_nothing() -> Covered:
    lengths = (1, 63, 64, 65, 127, 128)
    for shift, tokens, kind in itertools.product(SHIFTS, lengths, DTYPES.values()):
        for mask in (masks.full(), masks.window(1, 1, min(tokens, 33))):
            q, k, v = draw(1, tokens, 1, 64, dtype=kind, device="cuda")
            q[..., 0], k[..., 0] = 0.0, 4.0
            plain, plain_lse = stattn.attention(q, k, v, (1, 1, tokens), mask, scale=1.0, return_lse=True, impl="cuda")
            q[..., 0] = shift / 4
            out, lse = stattn.attention(q, k, v, (1, 1, tokens), mask, scale=1.0, return_lse=True, impl="cuda")
            moved = float(q[0, 0, 0, 0]) * 4  # as it is rounded
            # A score is rounded as a sum on the tensor cores (2 ulp) and times log2(e) (half an ulp of 1.44 c), in each
            # of two calls; then LSE is rounded once more.
            slack = 8 * torch.finfo(torch.float32).eps * abs(moved)
            rounding = 2 * torch.finfo(kind).eps  # of weights, and of the output
            assert (out - plain).abs().max() <= (2 * slack + rounding) * plain.abs().max() + 1e-5
            assert (lse - plain_lse - moved).abs().max() <= slack + 1e-4
    return {"shifts": len(SHIFTS), "lengths": len(lengths)}


def test_whole_numbers_are_summed_exactly() -> Covered:
    for kind, dim in itertools.product(DTYPES.values(), (64, 128)):
        q = torch.zeros(1, 1024, 1, dim, dtype=kind, device="cuda")
        k = torch.randint(-2, 3, q.shape, device="cuda").to(kind)
        v = torch.randint(-2, 3, q.shape, device="cuda") * (torch.rand(q.shape, device="cuda") < 0.3)
        for mask in (masks.full(), masks.spatial()):
            out = stattn.attention(q, k, v.to(kind), (1, 32, 32), mask, impl="cuda")
            assert torch.equal(out, (v.sum(1, keepdim=True).float() / 1024).to(kind).expand_as(out))
    return {"dtypes": len(DTYPES)}


# Memory and layout: proof 5, 9, 12.


def test_nothing_outside_the_tensors_is_read_or_written() -> Covered:
    """Inputs between guards of NaN, results in memory that is full of NaN, padded text and an empty slot of NaN."""
    guard, frame, covered = 512, 5 * 7, Counter[str]()
    valid = torch.tensor([[True] * 4 + [False] * 2], device="cuda")
    lists = lower(masks.window(3, 3, 3), (3, 5, 7), (3, 4, 4), (3, 2, 4), "cuda")
    held = torch.tensor([2, -1, 0, 1], dtype=torch.int32, device="cuda")
    window, text = masks.window(3, 3, 3), Grid(3, 5, 7, 0, 6)
    # Grid, mask, options, keys, and the tokens of q, and of k and v, that are nobody's.
    ways = (
        (Grid(3, 5, 7), masks.full(), {}, 3 * frame, slice(0), slice(0)),
        (text, window, {"valid": valid}, text.tokens, slice(-2, None), slice(-2, None)),
        (text, masks.full(), {"valid": valid}, text.tokens, slice(-2, None), slice(-2, None)),
        (Grid(3, 5, 7), lists, {}, 3 * frame, slice(0), slice(0)),
        (Grid(3, 5, 7), masks.frame_causal(1), {"k_frames": held}, 4 * frame, slice(0), slice(frame, 2 * frame)),
    )
    for dim, kind, (grid, mask, options, keys, unreal, empty) in itertools.product((64, 128), DTYPES.values(), ways):
        memory = torch.full((3, max(keys, grid.tokens) * 2 * dim + 2 * guard), torch.nan, device="cuda", dtype=kind)
        ends = [guard + tokens * 2 * dim for tokens in (grid.tokens, keys, keys)]
        q, k, v = (x[guard:end].view(1, -1, 2, dim).normal_() for x, end in zip(memory, ends, strict=True))
        results = []
        for nothing in (torch.nan, torch.inf, 1.0):
            q[:, unreal], k[:, empty], v[:, empty] = nothing, nothing, nothing
            torch.use_deterministic_algorithms(True)  # fills new memory with NaN
            try:
                results.append(stattn.attention(q, k, v, grid, mask, return_lse=True, impl="cuda", **options))
            finally:
                torch.use_deterministic_algorithms(False)
        assert all(x[:guard].isnan().all() and x[end:].isnan().all() for x, end in zip(memory, ends, strict=True))
        for out, lse in results:
            assert not out.isnan().any()
            assert not lse.isnan().any()
            assert not out[:, unreal].any()
            assert torch.equal(out, results[-1][0])
            assert torch.equal(lse, results[-1][1])
        covered.update(calls=len(results))
    return covered


@pytest.mark.parametrize("tool", ["memcheck", "initcheck", "synccheck", "racecheck"])
def test_compute_sanitizer_finds_nothing_in_tiny_calls(tool: str) -> Covered:
    sanitizer = shutil.which("compute-sanitizer")
    assert sanitizer is not None, "the CUDA toolkit is not on PATH"
    script = str(Path(__file__).with_name("tiny_calls.py"))
    unread = ["--unread"] if tool == "initcheck" else []
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, script, *unread]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return {"calls": int(done.stdout.split(" calls")[0].split()[-1])}


# Order, streams, graphs: proof 16 to 19.


def calls_of(grid: Grid, dim: int, device: str = "cuda") -> list[tuple[object, dict[str, object]]]:
    """Give masks and options, one of each way that the kernels go."""
    shape = grid.shape
    found: list[tuple[object, dict[str, object]]] = [(masks.full(), {}), (masks.window(3, 5, 7), {})]
    found.append(([masks.spatial(), masks.frame_causal(2), masks.window(1, 5, 5), masks.temporal()], {}))
    found.append((lower(masks.window(3, 5, 7), shape, (2, 4, 8), (2, 4, 8), device), {}))
    held = torch.arange(grid.t - 1, -1, -1, dtype=torch.int32, device=device)
    found.append((masks.frame_causal(2), {"k_frames": held}))
    return found


@pytest.mark.parametrize("dim", [64, 128])
def test_250_runs_beside_another_stream_give_the_same_bits_whatever_the_batch(dim: int) -> Covered:
    grid, noise, other = Grid(5, 12, 16), torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    q, k, v = draw(3, grid.tokens, 4, dim, key_heads=2, dtype=torch.bfloat16, device="cuda")
    found = calls_of(grid, dim)
    for mask, options in found:
        first = stattn.attention(q, k, v, grid, mask, return_lse=True, impl="cuda", **options)
        for _ in range(250):
            with torch.cuda.stream(other):
                noise @ noise
            again = stattn.attention(q, k, v, grid, mask, return_lse=True, impl="cuda", **options)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        for one in (slice(i, i + 1) for i in range(3)):
            alone = stattn.attention(q[one], k[one], v[one], grid, mask, return_lse=True, impl="cuda", **options)
            assert all(torch.equal(a[one], b) for a, b in zip(first, alone, strict=True))
    return {"calls": len(found), "reruns": 250 * len(found)}


@pytest.mark.parametrize("dim, number", EVERY)
def test_50_runs_of_every_config_give_the_same_bits(dim: int, number: int) -> Covered:
    grid, noise, other = Grid(5, 12, 16), torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    q, k, v = draw(2, grid.tokens, 4, dim, key_heads=2, dtype=torch.bfloat16, device="cuda")
    with config_alone(dim, number):
        found = [(mask, options) for mask, options in calls_of(grid, dim) if not isinstance(mask, BlockList)]
        for mask, options in found:
            first = stattn.attention(q, k, v, grid, mask, return_lse=True, impl="cuda", **options)
            for _ in range(50):
                with torch.cuda.stream(other):
                    noise @ noise
                again = stattn.attention(q, k, v, grid, mask, return_lse=True, impl="cuda", **options)
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return {"calls": len(found), "reruns": 50 * len(found)}


def test_kernels_run_on_the_stream_they_are_called_on() -> Covered:
    grid = Grid(5, 12, 16)
    given = draw(2, grid.tokens, 4, 64, dtype=torch.bfloat16, device="cuda")
    found = calls_of(grid, 64)
    for mask, options in found:
        want = stattn.attention(*given, grid, mask, impl="cuda", **options)
        stream, noise = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
        copies = [torch.zeros_like(x) for x in given]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(20):
                noise = (noise @ noise).clamp(-1, 1)  # keeps the copies back: another stream would read zeros
            for x, y in zip(copies, given, strict=True):
                x.copy_(y)
            got = stattn.attention(*copies, grid, mask, impl="cuda", **options)
        stream.synchronize()
        assert torch.equal(got, want)
    return {"calls": len(found)}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_kernels_run_on_the_device_of_their_tensors() -> None:
    grid = Grid(5, 12, 16)
    given = draw(2, grid.tokens, 4, 64, dtype=torch.bfloat16, device="cuda:0")
    moved = [x.to("cuda:1") for x in given]
    for here, there in zip(calls_of(grid, 64, "cuda:0"), calls_of(grid, 64, "cuda:1"), strict=True):
        want = stattn.attention(*given, grid, here[0], impl="cuda", **here[1])
        for _ in range(2):  # a warm call, too
            found = stattn.attention(*moved, grid, there[0], impl="cuda", **there[1])
            assert torch.cuda.current_device() == 0
            assert found.device == torch.device("cuda:1")
            assert torch.equal(found.to("cuda:0"), want)
        with torch.cuda.device(1):
            again = stattn.attention(*given, grid, here[0], impl="cuda", **here[1])
            assert again.device == torch.device("cuda:0")
            torch.cuda.synchronize(0)
            assert torch.equal(again, want)


def launched(run: Callable[[], Any]) -> Counter[str]:
    """Name the kernels that a call launches, without namespaces and template arguments, and count them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [each.name for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    plain = (name.replace("(anonymous namespace)::", "").split("<")[0].split("(")[0] for name in events)
    names = Counter(name.split("::")[-1] for name in plain)
    return Counter({name: count for name, count in names.items() if "Mem" not in name})


def test_a_call_without_samples_launches_nothing() -> Covered:
    grid = Grid(5, 12, 16)
    q, k, v = draw(1, grid.tokens, 4, 64, dtype=torch.bfloat16, device="cuda")
    found = calls_of(grid, 64)
    for mask, options in found:
        full = partial(stattn.attention, q, k, v, grid, mask, return_lse=True, impl="cuda", **options)
        none = partial(stattn.attention, q[:0], k[:0], v[:0], grid, mask, return_lse=True, impl="cuda", **options)
        out, lse = none()
        assert (out.shape, lse.shape) == ((0, grid.tokens, 4, 64), (0, 4, grid.tokens))
        assert launched(full)
        assert not launched(none)
    return {"calls": len(found)}


def test_a_graph_replays_with_new_inputs_and_holds_its_kernels_only() -> Covered:
    grid = Grid(5, 12, 16)
    q, k, v = draw(1, grid.tokens, 4, 64, dtype=torch.bfloat16, device="cuda")
    few = Region((0, 0, 0), (1, 1, 16)), Grid(5, 24, 96)
    wide = draw(1, few[1].tokens, 4, 64, dtype=torch.bfloat16, device="cuda")
    kernels = Counter[str]()
    found = calls_of(grid, 64)
    ways = [(grid, (q, k, v), mask, options) for mask, options in found]
    ways.append((few[1], (q[:, :16], *wide[1:]), masks.full(), {"q_region": few[0]}))
    expected = [
        {"attention_forward": 1}, {"attention_forward": 1}, {"attention_forward": 1},
        {"join_lists": 1, "attention_forward_lists": 1}, {"place_frames": 1, "attention_forward": 1},
        {"attention_forward": 1},
    ]  # fmt: skip
    for (where, given, mask, options), want in zip(ways, expected, strict=True):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            stattn.attention(*given, where, mask, impl="cuda", **options)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                captured = stattn.attention(*given, where, mask, return_lse=True, impl="cuda", **options)
            for _ in range(20):
                for x in given:
                    x.normal_()
                graph.replay()
                eager = stattn.attention(*given, where, mask, return_lse=True, impl="cuda", **options)
                assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
            stream.synchronize()
            names = launched(graph.replay)
        assert names == want
        kernels += names
    return {"calls": len(ways), "kernels": kernels.total()}
