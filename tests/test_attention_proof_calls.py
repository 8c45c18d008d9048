"""The proof of the Triton attention, on a GPU, continued: memory, layout, order, streams, graphs, random calls.

python -m pytest -m gpu tests/test_attention_proof_calls.py --record build/attention_proof_calls.json
"""

from __future__ import annotations

import inspect
import itertools
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from probes import Case
from test_attention import check_empty_slots, draw, results
from test_attention_kernels import (
    check_guards,
    check_strides_of_dout,
    check_views,
    gradients,
    random_call,
    same,
)
from test_attention_operation import check_compiled, check_operations
from test_attention_proof import (
    DEVICE,
    DTYPES,
    PLACES,
    RUNS_FORWARD,
    Covered,
    configs,
    leave_runs,
    take_runs,
    use,
    use_first,
)
from test_probes import UNIONS

import stattn
from stattn import extension, masks
from stattn.blocks import block_list, lower
from stattn.grid import Grid, Triple
from stattn.kernels import attention as forward
from stattn.kernels import attention_bwd as backward
from stattn.kernels import attention_runs_hopper as hopper
from stattn.masks import Mask
from stattn.ops import _attention_memo
from stattn.ops._attention_choice import OPERATION

pytestmark = [pytest.mark.gpu, pytest.mark.apart]
Chosen = Mask | list[Mask]
KINDS: dict[str, list[Chosen]] = {
    "general": [masks.window(3, 5, 5), masks.full(), UNIONS[2], [masks.spatial(), UNIONS[0]]],
    **dict.fromkeys(RUNS_FORWARD, [masks.frame_causal(2), masks.full(), masks.spatial()]),
}


@contextmanager
def kernels_of(kind: str) -> Iterator[list[Any]]:
    """Give masks for the general kernels or for those of runs, and see that these take them."""
    with pytest.MonkeyPatch.context() as patch:
        served = leave_runs(patch) if kind == "general" else take_runs(patch, kind)
        yield KINDS[kind]
        assert (served["calls"] > 0) == (kind != "general")
        assert served["served"] == served["calls"]


# Memory and layout.


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_nothing_outside_the_tensors_is_read_or_written_and_views_are_used_as_they_are(dtype: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use_first(patch, 64, 4 if dtype == "fp32" else 2)
        for dim in (64, 40):
            check_guards(DEVICE, dim, DTYPES[dtype])
        plain = random_call(64, DTYPES[dtype], DEVICE)
        check_views(plain)
        check_strides_of_dout(plain)


@pytest.mark.parametrize("kind", RUNS_FORWARD)
def test_the_kernels_of_runs_read_and_write_nothing_outside_the_tensors(kind: str) -> Covered:
    with kernels_of(kind) as found:
        for mask, dim in itertools.product(found, (64, 128)):
            check_guards(DEVICE, dim, torch.bfloat16, runs=mask)
    return {"calls": 2 * len(found)}


@pytest.mark.parametrize("mask", [masks.window(5, 9, 9), masks.spatial()], ids=["general", "runs"])
def test_offsets_beyond_two_to_the_31_are_right_in_a_fused_projection_of_720p(mask: Mask) -> Covered:
    """Wan 14B with guidance: 2.32e9 elements; the last sample's last heads lie behind 2^31."""
    shape = (21, 45, 80)
    fused = torch.randn(2, 75_600, 3, 40, 128, dtype=torch.bfloat16, device=DEVICE)
    assert fused.numel() > 2**31
    q, k, v = fused[:, :, :, 36:].unbind(2)
    dout = torch.randn_like(fused[:, :, 0])[:, :, 36:]
    found = gradients((q, k, v), dout, None, shape, mask)
    alone = [x[1:, :, 2:].contiguous() for x in (q, k, v, dout)]
    want = gradients(tuple(alone[:3]), alone[3], None, shape, mask)
    assert torch.equal(found[1][1:, 2:], want[1])
    assert all(torch.equal(x[1:, :, 2:], y) for x, y in zip(found[:1] + found[2:], want[:1] + want[2:], strict=True))
    return {"elements": fused.numel()}


@pytest.mark.parametrize("mask", [masks.window(3, 9, 9), masks.spatial()], ids=["general", "runs"])
def test_offsets_beyond_two_to_the_31_within_a_sample_are_right(mask: Mask) -> Covered:
    shape = (42, 45, 80)
    fused = torch.randn(1, 151_200, 3, 40, 128, dtype=torch.bfloat16, device=DEVICE)
    q, k, v = fused[:, :, :, 39:].unbind(2)
    assert forward.wide(k, v)
    dout = torch.randn_like(fused[:, :, 0])[:, :, 39:]
    alone = [x.contiguous() for x in (q, k, v, dout)]
    assert not forward.wide(*alone)
    want = gradients(tuple(alone[:3]), alone[3], None, shape, mask)
    assert same(gradients((q, k, v), dout, None, shape, mask), want)
    return {"elements": fused.numel()}


def test_64_bit_offsets_give_the_bits_of_32() -> Covered:
    grid, every = Grid(4, 9, 11, 2, 3), 0
    tensors = draw(2, grid.tokens, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    dout = torch.randn_like(tensors[0])
    for mask in (
        masks.full(),
        masks.window(3, 3, 5),
        UNIONS[2],
        lower(masks.spatial(), grid.shape, (2, 4, 8), (2, 4, 8)),
    ):
        moved = mask if isinstance(mask, Mask) else block_list(
            grid.shape, (2, 4, 8), (2, 4, 8), mask.kinds().to(DEVICE), masks.spatial()
        )  # fmt: skip
        want = gradients(tensors, dout, None, grid, moved)
        with pytest.MonkeyPatch.context() as patch:
            for module in (forward, backward):
                patch.setattr(module, "wide", lambda *given: True)
            assert same(gradients(tensors, dout, None, grid, moved), want)
        every += 1
    return {"masks": every}


@pytest.mark.parametrize(
    "batch, heads, shape", [(16_384, 4, (1, 1, 7)), (36_000, 4, (3, 1, 2)), (65_536, 1, (1, 1, 1))]
)
def test_as_many_heads_and_samples_as_there_are_places_are_served(batch: int, heads: int, shape: Triple) -> Covered:
    case = Case(Grid(*shape), masks.temporal(), heads=heads)
    tensors = draw(batch, case.grid.video, heads, 16, dtype=torch.float32, device=DEVICE)
    given = (torch.randn_like(tensors[0]), torch.zeros(batch, heads, case.grid.video, device=DEVICE))
    got, want = results(case, tensors, given, "triton"), results(case, tensors, given, None)
    for name in got:
        # Where one key is seen dS is 0, or what rounding leaves of dout . v - delta: eps |dout| |v|.
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=2e-5)
    return {"heads": batch * heads}


@pytest.mark.parametrize("kind", RUNS_FORWARD)
def test_the_kernels_of_runs_serve_as_many_heads_and_samples(kind: str) -> Covered:
    shape, batch, heads = (3, 1, 2), 36_000, 4
    tensors = draw(batch, 6, heads, 64, dtype=torch.bfloat16, device=DEVICE)
    dout = torch.randn_like(tensors[0])
    with kernels_of(kind) as found:
        mask = found[1]
        together = gradients(tensors, dout, None, shape, mask)
        for some in (slice(0, 100), slice(16_300, 16_400), slice(-100, None)):
            alone = gradients(tuple(x[some] for x in tensors), dout[some], None, shape, mask)
            assert same(alone, [x[some] for x in together])
    return {"heads": batch * heads}


def test_empty_slots_of_a_ring_may_hold_anything() -> None:
    check_empty_slots("triton", DEVICE)


def test_an_empty_batch_returns_at_once() -> None:
    empty = tuple(torch.randn(0, 24, 2, 64, device=DEVICE) for _ in range(3))
    found = gradients(empty, torch.randn(0, 24, 2, 64, device=DEVICE), None, (2, 3, 4))
    assert [len(x) for x in found] == [0] * 5


def strange_races(report: str) -> list[str]:
    """Give the accesses of racecheck's report that are not about the byte that tells waiting warps what to run.

    Triton makes it of ``warp_specialize``, and says that it belongs to that line or to the kernel's first: the byte is
    stored, all warps meet at barrier 1, and those that waited load it. The report does not see that barrier.
    """
    lines, first = inspect.getsourcelines(hopper.attention_runs_forward_hopper.fn)
    starts = ("def ", "    gl.warp_specialize(")
    known = [f"attention_runs_hopper.py:{first + i}" for i, line in enumerate(lines) if line.startswith(starts)]
    found = [line for line in report.splitlines() if " access at " in line]
    assert found
    return [line for line in found if not any(re.search(f"{place}( |$)", line) for place in known)]


@pytest.mark.parametrize("tool", ["memcheck", "synccheck", "initcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing_in_tiny_calls(tool: str) -> Covered:
    sanitizer = shutil.which("compute-sanitizer")
    assert sanitizer is not None, "the CUDA toolkit is not on PATH"
    script = str(Path(__file__).with_name("tiny_calls.py"))
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, script]
    command += ["--gradients", "--impl", "triton", "--dims", "128"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    known = tool == "racecheck" and done.returncode == 9 and not strange_races(done.stdout)
    assert done.returncode == 0 or known, (done.stdout + done.stderr)[-3000:]
    return {"calls": int(done.stdout.split(" calls")[0].split()[-1])}


# Order, streams, graphs, compile.


@pytest.mark.parametrize("kind", KINDS)
def test_250_runs_beside_another_stream_give_the_same_bits(kind: str) -> Covered:
    grid, noise, other = Grid(5, 12, 16, 3, 5), torch.randn(2048, 2048, device=DEVICE), torch.cuda.Stream()
    tensors = draw(2, grid.tokens, 2, 128, key_heads=1, dtype=torch.bfloat16, device=DEVICE)
    dout = torch.randn_like(tensors[0])
    with kernels_of(kind) as found:
        for mask in found:
            first = gradients(tensors, dout, None, grid, mask, deterministic=True)
            for _ in range(250):
                with torch.cuda.stream(other):
                    noise @ noise
                assert same(gradients(tensors, dout, None, grid, mask, deterministic=True), first)
    return {"masks": len(found), "reruns": 250 * len(found)}


@pytest.mark.parametrize(
    "kind, dtype", [("general", "bf16"), ("general", "fp32"), ("runs forward", "bf16"), ("runs hopper", "fp16")]
)
def test_a_sample_depends_on_nothing_but_itself_bitwise(kind: str, dtype: str) -> Covered:
    grid = Grid(4, 9, 16, 0, 7)
    tensors = draw(3, grid.tokens, 4, 64, key_heads=2, dtype=DTYPES[dtype], device=DEVICE)
    dout = torch.randn_like(tensors[0])
    valid = torch.tensor([7, 2, 5], device=DEVICE) if kind == "general" else None
    with kernels_of(kind) as found:
        chosen = [mask for mask in found if isinstance(mask, Mask)]
        for mask in chosen:
            together = gradients(tensors, dout, None, grid, mask, valid=valid)
            for one in (slice(i, i + 1) for i in range(3)):
                real = None if valid is None else valid[one]
                alone = gradients(tuple(x[one] for x in tensors), dout[one], None, grid, mask, valid=real)
                assert same(alone, [x[one] for x in together])
    return {"masks": len(chosen)}


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_run_on_the_stream_they_are_called_on(kind: str) -> None:
    grid = Grid(4, 9, 16)
    tensors = draw(2, grid.tokens, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    dout = torch.randn_like(tensors[0])
    stream, noise = torch.cuda.Stream(), torch.randn(4096, 4096, device=DEVICE)
    copies = [torch.zeros_like(x) for x in (*tensors, dout)]
    with kernels_of(kind) as (mask, *_):
        want = gradients(tensors, dout, None, grid, mask)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(20):
                noise = (noise @ noise).clamp(-1, 1)  # keeps the copies back: another stream would read zeros
            for x, y in zip(copies, (*tensors, dout), strict=True):
                x.copy_(y)
            found = gradients(tuple(copies[:3]), copies[3], None, grid, mask)
        stream.synchronize()
    assert same(found, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_run_on_the_device_of_their_tensors(kind: str) -> None:
    grid = Grid(4, 9, 16, 0, 3)
    tensors = draw(2, grid.tokens, 2, 64, dtype=torch.bfloat16, device="cuda:0")
    dout = torch.randn_like(tensors[0])
    with kernels_of(kind) as (mask, *_):
        want = gradients(tensors, dout, None, grid, mask)
        assert torch.cuda.current_device() == 0
        found = gradients(tuple(x.to("cuda:1") for x in tensors), dout.to("cuda:1"), None, grid, mask)
    assert all(x.device == torch.device("cuda:1") for x in found)
    assert same([x.to("cuda:0") for x in found], want)


BACKWARD_OF_RUNS = ("attention_runs_stats", "attention_runs_dq", "attention_runs_dkdv")
LAUNCHES = {
    "general": ("attention_forward", "attention_delta", "attention_dq", "attention_dkdv"),
    "runs forward": ("attention_runs_forward", *BACKWARD_OF_RUNS),
    "runs hopper": ("attention_runs_forward_hopper", *BACKWARD_OF_RUNS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_replays_with_new_inputs_and_holds_its_kernels_only(kind: str) -> Covered:
    grid = Grid(4, 9, 16, 2, 3)
    real = torch.tensor([[True, True, False, True, True]], device=DEVICE)
    valid = real if kind == "general" else None
    tensors = [x.requires_grad_() for x in draw(1, grid.tokens, 2, 64, dtype=torch.bfloat16, device=DEVICE)]
    dout = torch.randn_like(tensors[0]).detach()

    def call(mask: Mask) -> list[torch.Tensor]:
        out, lse = stattn.attention(*tensors, grid, mask, valid=valid, return_lse=True, impl="triton")
        return [out, lse, *torch.autograd.grad(out, tensors, dout)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with kernels_of(kind) as (mask, *_), torch.cuda.stream(stream):
        for _ in range(2):
            call(mask)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = call(mask)
        for _ in range(20):
            with torch.no_grad():
                for x in (*tensors, dout):
                    x.normal_()
            graph.replay()
            replayed = [x.detach().clone() for x in captured]
            assert same(replayed, call(mask))
        stream.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            graph.replay()
            stream.synchronize()
    names = [each.name for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    kernels = Counter(name for name in names if name.startswith("attention_"))
    assert kernels == Counter(LAUNCHES[kind]), names
    return {"replays": 20, "kernels": sum(kernels.values())}


def test_the_operations_pass_opcheck() -> None:
    check_operations("triton", DEVICE)


@pytest.mark.parametrize("kind", RUNS_FORWARD)
def test_the_operations_pass_opcheck_with_the_kernels_of_runs(kind: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        served = take_runs(patch, kind)
        check_operations("triton", DEVICE, dim=64, dtype=torch.bfloat16, mask=masks.spatial())
    assert served["served"] > 3  # some gradients that it asks for have strides of 0, and are left to other kernels


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_call_equals_an_eager_one_and_follows_the_grid(kind: str) -> None:
    with kernels_of(kind) as (mask, *_):
        of_runs = {} if kind == "general" else {"dtype": torch.bfloat16, "mask": mask}
        check_compiled("triton", DEVICE, "inductor", dim=64, **of_runs)


# Choice.


def test_without_the_cuda_library_auto_takes_these_kernels() -> Covered:
    tensors = draw(1, 240, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    dout = torch.randn_like(tensors[0])
    found = [masks.window(3, 3, 5), masks.spatial(), [masks.spatial(), UNIONS[0]]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "LIBRARY", Path("nothing.so"))
        forget()
        for mask in found:
            reasons = stattn.explain(*tensors, (4, 6, 10), mask)
            assert "auto takes triton" in reasons
            assert "was not built" in reasons
            got = gradients(tensors, dout, None, (4, 6, 10), mask, impl="auto")
            assert same(got, gradients(tensors, dout, None, (4, 6, 10), mask))
    forget()
    return {"masks": len(found)}


def forget() -> None:
    extension._failure.cache_clear()
    OPERATION._choose.cache_clear()
    _attention_memo.clear()


# The fuzzer.

SEEDS = 6


@pytest.mark.parametrize("first, dim", zip(range(0, 12 * SEEDS, SEEDS), (16, 24, 64, 128) * 3, strict=True))
def test_random_calls_agree_with_a_dense_softmax(first: int, dim: int) -> Covered:
    """With one config a kernel; ``python tests/fuzz.py --impl triton --device cuda`` draws more."""
    width = max(16, 1 << (dim - 1).bit_length())
    with pytest.MonkeyPatch.context() as patch:
        for place in PLACES:
            able = ([c for c in configs(place) if width in c.widths and c.bytes == size] for size in (2, 4))
            use(patch, place, *(config for found in able for config in found[:1]))
        calls = sum(fuzz.check(seed, "triton", None, DEVICE, (dim,)) for seed in range(first, first + SEEDS))
    return {"calls": calls}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("place", RUNS_FORWARD)
def test_random_calls_of_runs_agree_with_a_dense_softmax(place: str, dim: int) -> Covered:
    seeds = range(100)
    with pytest.MonkeyPatch.context() as patch:
        served = take_runs(patch, place)
        calls = sum(fuzz.check(seed, "triton", None, DEVICE, (dim,), runs=True) for seed in seeds)
    assert served["served"] > 2.8 * len(seeds)  # of three launches; some masks have too many runs
    return {"calls": calls, "launches": served["served"]}
