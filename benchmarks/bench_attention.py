"""Attention: the implementations of this machine beside those of other packages, on the same tensors, round by round.

    python -m pytest benchmarks/bench_attention.py --results benchmarks/results/h200
    python -m pytest benchmarks/bench_attention.py -k "forward and sta333"     # a part of it, by pass, case or shape

Every contender's output, and sampled gradients, are compared with float64 before they are timed. A wrong one of this
package fails the benchmark and nothing is written of it; a wrong one of another package is left out and fails it after
the others were recorded. Names are attention/<implementation>/<mask>_<pass>/<shape>. A package that is not installed,
and a call that another package refuses, stands in the report's versions. Milliseconds are as measured in the file; the
table that is printed also scales them by the run's matrix product, to that of the card on which limits were set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import attention_peers
import pytest
import torch
from attention_cases import CASES, Case
from attention_peers import Peer
from attention_truth import Truth, WrongResult
from torch import Tensor

import stattn
from stattn import masks, results
from stattn.grid import Grid, Region
from stattn.masks import Mask
from stattn.ops._dispatch import NAMES

WAN_480P = Grid(21, 30, 52)
ROWS = 64


def tensors(grid: Grid, heads: int, dim: int, device: str, grad: bool = False) -> tuple[torch.Tensor, ...]:
    """Random q, k and v [1, N, heads, dim]: bf16 on a GPU, fp32 on a CPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, grid.tokens, heads, dim)
    return tuple(
        torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_(grad) for _ in range(3)
    )


def assert_right(out: torch.Tensor, qkv: tuple[torch.Tensor, ...], grid: Grid, mask: Mask) -> None:
    """Compare sampled rows, the first and the last with float64, and refuse more than rounding explains."""
    q, k, v = (x.detach() for x in qkv)
    slack = 2 if q.dtype == torch.bfloat16 else 8  # fp32 sums of thousands of terms round on the way, too
    chosen = torch.randperm(grid.tokens, generator=torch.Generator().manual_seed(1))[:ROWS]
    chosen = torch.cat([chosen, torch.tensor([0, grid.tokens - 1])])
    seen = mask.allowed(grid, chosen).to(q.device)
    for head in range(0, q.shape[2], 5):
        scores = q[0, chosen, head].double() @ k[0, :, head].double().T / math.sqrt(q.shape[3])
        want = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[0, :, head].double()
        error = (out[0, chosen, head].double() - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error < slack * torch.finfo(q.dtype).eps, f"head {head}: relative error {error:.2e}"


def measure(
    benchmark: Any,
    report: results.Report,
    contenders: dict[str, Callable[[], Any]],
    baseline: str,
    device: str,
    rounds: int,
) -> None:
    """Time the contenders in interleaved rounds and record each beside the baseline."""
    # On a CPU every call was made once, to be compared, and slow machines make fewer rounds.
    warmup, budget = (0, 60.0) if device == "cpu" else (3, None)
    timings = results.time_contenders(contenders, device=device, rounds=rounds, warmup=warmup, budget=budget)
    for name, timing in timings.items():
        beside = None if name == baseline else (baseline, timings[baseline])
        report.results.append(results.Result.of(name, timing, baseline=beside, checked=True))
    # pytest-benchmark's own table and JSON show the first contender; its clock is the host's, so the call waits.
    first = next(iter(contenders.values()))

    def run() -> None:
        first()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=1 if device == "cpu" else 3, iterations=1)


# About 10 % of the pairs each: compact windows, one over all frames, and whole tiles.
TEN_PERCENT = {
    "window_9_15_25": masks.window(9, 15, 25),
    "window_7_15_31": masks.window(7, 15, 31),
    "window_11_15_21": masks.window(11, 15, 21),
    "window_21_10_16": masks.window(21, 10, 16),
    "sliding_tile_122": masks.sliding_tile((7, 10, 13), (1, 2, 2)),
}


def test_sparse_masks_beside_dense_attention_on_a_cpu(benchmark: Any, report: results.Report, device: str) -> None:
    if device != "cpu":
        pytest.skip("measures the CPU's default, this machine has a GPU")
    heads = 2
    qkv = tensors(WAN_480P, heads, 128, device)
    shape = f"wan-1.3b-480p-{heads}-heads"
    contenders: dict[str, Callable[[], Any]] = {}
    for label, mask in (*TEN_PERCENT.items(), ("dense", masks.full())):
        impl = "sdpa" if label == "dense" else "reference"
        call = partial(stattn.attention, *qkv, WAN_480P, mask, impl=impl)
        assert_right(call(), qkv, WAN_480P, mask)
        contenders[f"attention/{impl}/{label}_fwd/{shape}"] = call
    measure(benchmark, report, contenders, f"attention/sdpa/dense_fwd/{shape}", device, rounds=5)


# On a GPU.

LIMITS_TFLOPS = 807  # the bf16 8192^3 matrix product of the card on which limits in milliseconds were set
BACKWARD_ROUNDS = 9
GIB = 1 << 30
DENSE_ONLY = ("flash", "sdpa")  # of other packages: they refuse every mask, and know no deterministic backward
OURS = tuple(name for name in NAMES if name != "reference")


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest, report: results.Report) -> Iterator[None]:
    """Name what is compared; print the results, scaled, when all benchmarks are over."""
    report.versions |= attention_peers.versions()
    yield
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with nullcontext() if capture is None else capture.global_and_fixture_disabled():
        print("", *lines(report), sep="\n", flush=True)


def lines(report: results.Report) -> list[str]:
    """Print results with scaled milliseconds, and what was not measured."""
    scale = (report.cublas_tflops or LIMITS_TFLOPS) / LIMITS_TFLOPS
    values = {each.name: each.value for each in report.results}
    flops = work()
    found = [f"{report.gpu}, cuBLAS 8192^3 {report.cublas_tflops or 0:.0f} TFLOP/s: milliseconds scaled by {scale:.3f}"]
    for each in report.results:
        label = each.name.split("/", 2)[2]
        scaled = f"{each.value * scale:9.3f} scaled" if each.unit == "ms" else " " * 16
        rate = f"{flops[label] / each.value / 1e9:4.0f} TFLOP/s" if label in flops else " " * 12
        ratio = f"{each.ratio:6.3f} x {each.baseline.name}" if each.ratio and each.baseline else ""
        forward = values.get(each.name.replace("_bwd/", "/").replace("dense/", "dense_fwd/"))
        if "_bwd/" in each.name and forward is not None:
            ratio += f"  ({each.value / forward:.2f} x its forward)"
        spread = f"({each.p20:.3f}-{each.p80:.3f})"
        found.append(f"{each.name:66} {each.value:9.3f} {each.unit:3} {spread:20} {scaled} {rate}  {ratio}")
    packages = {"python", "torch", "cuda", "stattn", "triton"}
    return found + [f"{name}: {said}" for name, said in report.versions.items() if name not in packages]


def work() -> dict[str, float]:
    """Give the arithmetic of allowed pairs by the name of a row behind its implementation."""
    found = {}
    for case in CASES:
        for backward in (False, True):
            label = case.label(backward)
            found[f"{label}/{case.shape}"] = found[f"{label}_deterministic/{case.shape}"] = case.flops(backward)
            if case.without_text:
                bare = label.replace(case.name, f"{case.name}_without_text")
                found[f"{bare}/{case.shape}"] = case.flops(backward, text=False)
    return found


@pytest.fixture
def clean() -> Iterator[None]:
    """Give each case the memory and the compiler's caches that the one before it held."""
    yield
    torch.compiler.reset()
    torch.cuda.empty_cache()


class Field:
    """The contenders of one case and pass that are right, and what is said of the others.

    device: where it runs. backward: whether gradients are compared and timed.
    """

    def __init__(self, case: Case, report: results.Report, device: str, backward: bool = False) -> None:
        self.case, self.report, self.backward = case, report, backward
        self.label = case.label(backward)
        self.mask = case.mask if isinstance(case.mask, Mask) else case.mask(device)
        qkv = tensors(case.grid, case.heads, case.dim, device)
        q_tokens = case.q_region.video if case.q_region else case.grid.tokens
        self.qkv = tuple(x.requires_grad_(backward) for x in (qkv[0][:, -q_tokens:], *qkv[1:]))
        self.dout = torch.randn_like(self.qkv[0], requires_grad=False) if backward else None
        self.truth = Truth(self.qkv, case.grid, self.mask, self.dout)
        self.calls: dict[str, Callable[[], Any]] = {}
        self.parts: dict[str, Callable[[], Any]] = {}
        self.forwards: dict[str, Callable[[], Tensor]] = {}
        self.wrong: list[str] = []
        self.excused: set[str] = set()  # peers that have no such pass at all

    def name(self, who: str, label: str | None = None) -> str:
        """Name a row."""
        return f"attention/{who}/{label or self.label}/{self.case.shape}"

    def enter(self, who: str, forward: Callable[..., Tensor], label: str | None = None) -> None:
        """Check a contender, and let it take part. forward: of q, k and v."""
        out = forward(*self.qkv)
        self.truth.check_output(out)
        if self.dout is None:
            self.forwards[who] = self.calls[self.name(who, label)] = partial(forward, *self.qkv)
            return
        backward = partial(torch.autograd.grad, out, self.qkv, self.dout, retain_graph=True)
        self.truth.check_gradients(*backward())
        self.calls[self.name(who, label)] = backward

    def enter_ours(self, implementations: tuple[str, ...] = OURS) -> None:
        """Let every implementation of this package take part that serves the case. Raises what a wrong one does."""
        case = self.case
        for impl in implementations:
            attend = partial(self._ours, impl, case.grid, case.q_region, False)
            try:
                self.enter(impl, attend)
            except ValueError as refusal:
                if "does not serve" not in str(refusal) and "no such implementation" not in str(refusal):
                    raise
                if impl not in DENSE_ONLY:
                    self.say(impl, str(refusal))
                continue
            if case.deterministic and self.backward and impl not in DENSE_ONLY:
                attend = partial(self._ours, impl, case.grid, case.q_region, True)
                self.enter(impl, attend, f"{self.label}_deterministic")
            if case.without_text:
                self._enter_without_text(impl)

    def _ours(
        self, impl: str, grid: Grid, region: Region | None, deterministic: bool, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        return stattn.attention(q, k, v, grid, self.mask, q_region=region, deterministic=deterministic, impl=impl)

    def _enter_without_text(self, impl: str) -> None:
        video = Grid(*self.case.grid.shape)
        shorter = tuple(x.detach()[:, : video.tokens].requires_grad_(self.backward) for x in self.qkv)
        label = self.label.replace(self.case.name, f"{self.case.name}_without_text")
        forward = partial(self._ours, impl, video, None, False)
        out = forward(*shorter)
        if self.dout is None:
            Truth(shorter, video, self.mask).check_output(out)
            self.calls[self.name(impl, label)] = partial(forward, *shorter)
            return
        dout = self.dout[:, : video.tokens]
        backward = partial(torch.autograd.grad, out, shorter, dout, retain_graph=True)
        Truth(shorter, video, self.mask, dout).check_gradients(*backward())
        self.calls[self.name(impl, label)] = backward

    def enter_peers(self) -> None:
        """Let the other packages take part that are installed, run the case, and are right."""
        for who, make in self.case.peers.items():
            try:
                peer: Peer = make(self.case.grid, self.mask)
                if self.backward and not peer.backward:
                    self.excused.add(who)
                    self.say(who, "has no backward for it")
                    continue
                self.enter(who, peer.forward)
            except ImportError as error:
                if self.report.versions.get(who) != "not installed":  # which is said once, there
                    self.say(who, f"not measured: {error}")
            except WrongResult as error:
                self.wrong.append(f"{who} is wrong: {error}")
                self.say(who, f"left out, since its result is wrong: {error}")
            except Exception as error:  # other packages raise what they like; it stands in the report
                self.say(who, f"refuses it: {type(error).__name__}: {error}")
            else:
                if not self.backward:
                    self.parts |= {
                        self.name(who, f"{self.label}_{part}"): partial(call, *self.qkv)
                        for part, call in peer.parts.items()
                    }

    def say(self, who: str, what: str) -> None:
        """Put a line in the report on what is not measured."""
        self.report.versions[f"{who} at {self.label}/{self.case.shape}"] = " ".join(what.split())[:300]

    def baseline(self, name: str) -> str | None:
        """Name the row that a row is compared with; None for one that is a baseline itself or whose own is missing."""
        impl = name.split("/")[1]
        if self.case.without_text:
            wanted = self.name(impl, self.label.replace(self.case.name, f"{self.case.name}_without_text"))
        else:
            wanted = self.name(self.case.baselines.get(impl, self.case.baselines.get("", "")))
        return wanted if wanted != name and wanted in self.calls else None

    def measure(self) -> None:
        """Time all in interleaved rounds and record them; each ran before, when it was checked."""
        rounds = min(self.case.rounds, BACKWARD_ROUNDS) if self.backward else self.case.rounds
        device = self.qkv[0].device
        timings = results.time_contenders(self.calls | self.parts, device=device, rounds=rounds, warmup=0)
        for name, timing in timings.items():
            beside = self.baseline(name) if name in self.calls else None
            pair = None if beside is None else (beside, timings[beside])
            self.report.results.append(results.Result.of(name, timing, baseline=pair, checked=True))

    def measure_memory(self) -> None:
        """Record the peak memory of each forward, q, k and v included, beside what these, output and LSE take."""
        q, k, v = self.qkv
        given = sum(x.numel() * x.element_size() for x in (q, k, v))
        needed = given + q.numel() * q.element_size() + 4 * q.shape[1] * q.shape[2]
        for who, call in self.forwards.items():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            peak = (given + torch.cuda.max_memory_allocated() - before) / GIB
            name = self.name(who, f"peak_memory/{self.case.label()}")
            beside = results.Baseline(self.name("inputs_output_lse", f"peak_memory/{self.case.label()}"), needed / GIB)
            ratio = beside.value / peak
            self.report.results.append(results.Result(name, "GiB", peak, peak, peak, beside, ratio, checked=True))

    def close(self, benchmark: Any) -> None:
        """Fail on what was left out as wrong, and on a missing baseline that PyTorch itself should have given."""
        first = next(iter(self.calls.values()))

        def run() -> None:
            first()
            torch.cuda.synchronize()

        benchmark.pedantic(run, rounds=1, iterations=1)  # its table shows the first; the results file has them all
        wanted = {who for who in self.case.baselines.values() if who.startswith(("torch", "flex"))} - self.excused
        missing = [who for who in sorted(wanted) if self.name(who) not in self.calls]
        said = {who: self.report.versions.get(f"{who} at {self.label}/{self.case.shape}") for who in missing}
        assert not self.wrong, "; ".join(self.wrong)
        assert not missing, f"no baseline: {said}"


def ids(cases: list[Case]) -> list[str]:
    """Name cases for -k."""
    return [f"{case.name}-{case.shape}" for case in cases]


BACKWARDS = [case for case in CASES if case.backward]
ONE_LAUNCH = [case for case in CASES if case.name in ("sta333", "window_7_17_17", "joint_256")]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_forward(case: Case, benchmark: Any, report: results.Report, table: None, clean: None) -> None:
    field = Field(case, report, "cuda")
    field.enter_ours()
    field.enter_peers()
    field.measure_memory()
    field.measure()
    field.close(benchmark)


@pytest.mark.gpu
@pytest.mark.parametrize("case", BACKWARDS, ids=ids(BACKWARDS))
def test_backward(case: Case, benchmark: Any, report: results.Report, table: None, clean: None) -> None:
    field = Field(case, report, "cuda", backward=True)
    field.enter_ours()
    field.enter_peers()
    field.measure()
    field.close(benchmark)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ONE_LAUNCH, ids=ids(ONE_LAUNCH))
def test_a_forward_is_one_launch(case: Case, report: results.Report, clean: None) -> None:
    field = Field(case, report, "cuda")
    field.enter_ours()
    assert field.forwards
    for who, call in field.forwards.items():
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        launched = [event.name for event in profiler.events() if event.device_type == on_device]
        assert len(launched) == 1, f"{who}: {launched}"
