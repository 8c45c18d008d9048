"""What `stattn bench` measures: operations, attention, a denoising step and a whole sample of a named shape.

Each function adds results to a report. Everything that is timed is compared first with another implementation, and a
wrong contender raises WrongResult: nothing is written of it. Contenders whose package is not installed are left out,
and named in the report's versions.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

import stattn
from stattn import masks, results
from stattn.bench.models import (
    Contender,
    Inputs,
    ModelShape,
    contender,
    peak_memory,
    psnr,
    random_inputs,
    random_model,
    relative_error,
    truth,
)
from stattn.dit import DiT
from stattn.graph import SampleGraph
from stattn.masks import Mask
from stattn.ops.patchify import patchify3d
from stattn.problem import Step
from stattn.reference import denoise as denoise_reference
from stattn.reference import gate as gate_reference
from stattn.reference import modulate as modulate_reference
from stattn.reference import qk_norm_rope as rope_reference
from stattn.reference.patchify import patchify3d as patchify_reference
from stattn.rope import rope_tables
from stattn.sampler import FlowMatching, Walk, draw_noise, prepare
from stattn.sampler import Inputs as SampleInputs


class WrongResult(Exception):
    """A contender's output is not what another implementation computes."""


def dtype_of(device: str) -> torch.dtype:
    """Measure in bf16 on a GPU, in fp32 on a CPU."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def add(report: results.Report, name: str, unit: str, value: float, beside: tuple[str, float] | None = None) -> None:
    """Add one number without a spread, beside another where there is one."""
    base = ratio = None
    if beside is not None and value > 0:
        base = results.Baseline(*beside)
        ratio = beside[1] / value if unit in results.LOWER_IS_BETTER else value / beside[1]
    report.results.append(results.Result(name, unit, value, value, value, base, ratio, True))


def add_rate(report: results.Report, name: str, unit: str, amount: float, timing: results.Timing) -> None:
    """Add how much of ``amount`` a timing does in a millisecond, with its spread."""
    value, least, most = (amount / each for each in (timing.median, timing.p80, timing.p20))
    report.results.append(results.Result(name, unit, value, least, most, None, None, True))


def decibels(error: float) -> float:
    """Return a relative error as a ratio of signal to noise, at most 240 dB, which float64 does not tell from exact."""
    return min(-20 * math.log10(max(error, 1e-12)), 240.0) if error < 1 else 0.0


# One denoising step.


@dataclass(frozen=True)
class Entrant:
    """A contender whose output was found right.

    error: of its output, relative to that of PyTorch's operations under dense attention. memory: its peak on a GPU, in
    GiB.
    """

    contender: Contender
    error: float
    memory: float | None


LONG = 4096  # tokens above which another implementation of sparse attention is not run for a whole model


def build(
    report: results.Report, wanted: Iterable[str], model: DiT, shape: ModelShape, given: Inputs
) -> dict[str, Entrant]:
    """Build the contenders, and compare them with PyTorch's operations one by one on the same weights.

    Contenders under a mask are compared with another implementation of it. Where that takes too long, their prediction
    must differ from that of dense attention; then the attention of all is compared with float64, too, on sampled rows.
    Roundings of the same size are allowed as often as there are layers.
    """
    found: dict[str, Entrant] = {}
    dense = contender("eager", model, shape).call(*given)
    allowed = 4 * torch.finfo(given.x.dtype).eps * math.sqrt(shape.config.layers)
    for name in wanted:
        start = time.perf_counter()
        try:
            made = contender(name, model, shape)
        except ImportError:
            report.versions[name] = "not installed"
            continue
        if name == "diffusers":
            report.versions[name] = metadata.version(name)
        with peak_memory(given.x.device.type) as memory:
            out = made.call(*given)
        error = to_dense = relative_error(out, dense)
        if shape.grid.tokens > LONG:
            check_attention(made, shape, attention_inputs(shape, given.x.device.type, given.x.dtype))
        if made.mask != masks.full():
            if shape.grid.tokens > LONG:
                error = 0.0 if to_dense > 0 else math.inf
            else:
                error = relative_error(out, truth(model, given, made.mask))
        if not error <= allowed:
            raise WrongResult(f"{name}: relative error {error:.2e}, allowed are {allowed:.2e}")
        found[name] = Entrant(made, to_dense, memory.get("GiB"))
        seconds = time.perf_counter() - start
        print(f"{name}: {to_dense:.1e} from dense, built in {seconds:.0f} s", file=sys.stderr, flush=True)
    return found


@torch.no_grad()
def measure_step(
    report: results.Report, shape: ModelShape, wanted: Sequence[str], device: str, *, rounds: int = 7
) -> dict[str, Callable[[], Any]]:
    """Time one prediction of a model by each contender; returns what was timed.

    Rows step/<shape>/<contender>: milliseconds beside diffusers (or eager), and behind it attention (self-attention of
    all layers, timed alone), density, rate (of the arithmetic that the mask leaves), memory (at the peak, of a first
    call), and snr (of the prediction to that of PyTorch's operations under dense attention, in dB).
    """
    dtype = dtype_of(device)
    model = random_model(shape, device, dtype)
    given = random_inputs(shape, device, dtype)
    found = build(report, wanted, model, shape, given)
    baseline = next((name for name in ("diffusers", "compiled", "eager") if name in found), None)
    calls: dict[str, Callable[[], Any]] = {name: partial(each.contender.call, *given) for name, each in found.items()}
    timings = results.time_contenders(calls, device=device, rounds=rounds, warmup=0)  # each was called once
    qkv = attention_inputs(shape, device, dtype)
    parts: dict[str, Callable[[], Any]] = {
        name: partial(each.contender.attend, *qkv) for name, each in found.items() if each.contender.attend is not None
    }
    alone = results.time_contenders(parts, device=device, rounds=3, warmup=1)
    for name, each in found.items():
        row, timing, mask = f"step/{shape.name}/{name}", timings[name], each.contender.mask
        beside = None if baseline in (None, name) else (f"step/{shape.name}/{baseline}", timings[str(baseline)])
        report.results.append(results.Result.of(row, timing, baseline=beside, checked=True))
        if name in alone:
            layers = results.Timing(tuple(each * shape.config.layers for each in alone[name].samples))
            report.results.append(results.Result.of(f"{row}/attention", layers, checked=True))
        add(report, f"{row}/density", "fraction", mask.density(shape.grid))
        work = model.flops(shape.grid, mask, text_len=given.text.shape[1])
        scale, unit = (1e-9, "TFLOP/s") if device == "cuda" else (1e-6, "GFLOP/s")
        add_rate(report, f"{row}/rate", unit, work * scale, timing)
        add(report, f"{row}/snr", "dB", decibels(each.error))
        if each.memory is not None:
            add(report, f"{row}/memory", "GiB", each.memory)
    return calls


def attention_inputs(shape: ModelShape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k and v [1, N, heads, D] of a layer."""
    generator = torch.Generator(device).manual_seed(2)
    size = (1, shape.grid.tokens, shape.config.heads, shape.config.head_dim)
    q, k, v = (torch.randn(size, device=device, dtype=dtype, generator=generator) for _ in range(3))
    return q, k, v


# Attention alone.


def measure_attention(
    report: results.Report, shape: ModelShape, wanted: Sequence[str], device: str, *, rounds: int = 9
) -> None:
    """Time the self-attention of one layer. Rows attention/<contender>/<shape>: milliseconds, and density and rate."""
    dtype = dtype_of(device)
    model = random_model(shape.of_layers(1), device, dtype)
    q, k, v = attention_inputs(shape, device, dtype)
    calls: dict[str, Callable[[], Any]] = {}
    kept: dict[str, Mask] = {}
    for name in wanted:
        made = contender(name, model, shape.of_layers(1))
        if made.attend is None or name == "diffusers":
            continue  # what diffusers calls is the contender "compiled"
        check_attention(made, shape, (q, k, v))
        calls[name], kept[name] = partial(made.attend, q, k, v), made.mask
    timings = results.time_contenders(calls, device=device, rounds=rounds)
    baseline = next((name for name in ("compiled", "eager") if name in timings), None)
    for name, timing in timings.items():
        row = f"attention/{name}/{shape.name}"
        beside = None if baseline in (None, name) else (f"attention/{baseline}/{shape.name}", timings[str(baseline)])
        report.results.append(results.Result.of(row, timing, baseline=beside, checked=True))
        density = kept[name].density(shape.grid)
        add(report, f"{row}/density", "fraction", density)
        work = 4 * density * shape.grid.tokens**2 * shape.config.dim
        scale, unit = (1e-9, "TFLOP/s") if device == "cuda" else (1e-6, "GFLOP/s")
        add_rate(report, f"{row}/rate", unit, work * scale, timing)


def check_attention(made: Contender, shape: ModelShape, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    """Compare sampled rows of a head with float64. Raises WrongResult."""
    assert made.attend is not None
    q, k, v = qkv
    out = made.attend(q, k, v)
    out = out if out.shape == q.shape else out.transpose(1, 2)
    rows = torch.randperm(shape.grid.tokens, generator=torch.Generator().manual_seed(1))[:64]
    seen = made.mask.allowed(shape.grid, rows).to(q.device)
    scores = q[0, rows, 0].double() @ k[0, :, 0].double().T / math.sqrt(q.shape[3])
    want = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[0, :, 0].double()
    error = relative_error(out[0, rows, 0], want)
    if not error <= (2 if q.dtype == torch.bfloat16 else 8) * torch.finfo(q.dtype).eps:
        raise WrongResult(f"{made.name}: relative error {error:.2e} of sampled rows of attention")


# The operations around it.


def measure_ops(report: results.Report, shape: ModelShape, device: str, *, rounds: int = 20) -> None:
    """Time the operations of a layer, their references compiled, and a copy of as many bytes.

    Rows ops/<operation>/fwd/<shape> beside the copy, with "-compiled" and "-copy" behind the operation for these, and
    bandwidth behind all: the bytes that must be read and written, by the time. Timed by graph replay, on a cold cache.
    """
    for name, (size, draw, ours, reference) in _operations(shape, device).items():
        copies = results.copies_for(size) if device == "cuda" else 2
        torch.manual_seed(0)
        given = [draw() for _ in range(copies)]
        calls: dict[str, Callable[..., Any]] = {name: ours}
        if device == "cuda":
            calls[f"{name}-compiled"] = torch.compile(reference, dynamic=False)
        with torch.no_grad():
            want = _tuple(reference(*given[0]))
            for who, call in calls.items():
                for got, right in zip(_tuple(call(*given[0])), want, strict=True):
                    error = relative_error(got, right)
                    if not error <= 4 * torch.finfo(got.dtype).eps + 1e-6:
                        raise WrongResult(f"{who}: relative error {error:.2e} to the reference")
            source = torch.randint(0, 256, (copies, size // 2), dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            rows: dict[str, Callable[[int], Any]] = {
                f"ops/{who}/fwd/{shape.name}": partial(_on, call, given) for who, call in calls.items()
            }
            copy = f"ops/{name}-copy/fwd/{shape.name}"
            rows[copy] = partial(_copy, source, target)
            timings = results.time_in_graph(rows, copies=copies, device=device, rounds=rounds)
        for row, timing in timings.items():
            beside = None if row == copy else (copy, timings[copy])
            report.results.append(results.Result.of(row, timing, baseline=beside, checked=True))
            add_rate(report, f"{row}/bandwidth", "GB/s", size * 1e-6, timing)
        torch.compiler.reset()


def _on(call: Callable[..., Any], given: Sequence[tuple[Tensor, ...]], number: int) -> Any:
    return call(*given[number])


def _copy(source: Tensor, target: Tensor, number: int) -> Tensor:
    return target[number].copy_(source[number])


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return tuple(out) if isinstance(out, tuple | list) else (out,)


Operation = tuple[int, Callable[[], tuple[Tensor, ...]], Callable[..., Any], Callable[..., Any]]


def _operations(shape: ModelShape, device: str) -> dict[str, Operation]:
    """Give each operation its bytes, a way to draw its tensors, itself and its reference."""
    config, grid, dtype = shape.config, shape.grid, dtype_of(device)
    one = grid.tokens * config.dim * dtype.itemsize
    across = config.qk_norm == "across_heads"
    rope = rope_tables(grid, config.head_dim, split=config.rope_split, theta=config.rope_theta, device=device)
    norm = ("layer", None, None, config.eps)
    latent = (1, config.in_channels, *shape.size)
    held = math.prod(latent)

    def tokens(count: int, vectors: int) -> Callable[[], tuple[Tensor, ...]]:
        def draw() -> tuple[Tensor, ...]:
            many = [torch.randn(1, grid.tokens, config.dim, device=device, dtype=dtype) for _ in range(count)]
            return (*many, *(torch.randn(1, config.dim, device=device) / 3 for _ in range(vectors)))

        return draw

    def heads() -> tuple[Tensor, ...]:
        pair = [torch.randn(1, grid.tokens, config.heads, config.head_dim, device=device, dtype=dtype) for _ in "qk"]
        width = config.dim if across else config.head_dim
        return (*pair, *(torch.rand(width, device=device, dtype=dtype) + 0.5 for _ in "qk"))

    def patches() -> tuple[Tensor, ...]:
        x = torch.randn(1, config.model_channels, *shape.size, device=device, dtype=dtype)
        weight = torch.randn(config.dim, config.model_channels, *config.patch, device=device, dtype=dtype) / 8
        return x, weight, torch.randn(config.dim, device=device, dtype=dtype)

    def latents() -> tuple[Tensor, ...]:
        return (
            torch.randn(latent, device=device),
            *(torch.randn(latent, device=device, dtype=dtype) for _ in range(2)),
        )

    def step(call: Callable[..., Any], x: Tensor, cond: Tensor, uncond: Tensor) -> Any:
        return call(x, cond, uncond=uncond, guidance=5.0, sigma=0.6, weights=(1.0, -0.1), target="velocity")

    def step_reference(x: Tensor, cond: Tensor, uncond: Tensor) -> Any:
        return denoise_reference.denoise_step(Step(x, cond, uncond, guidance=5.0, weights=(1.0, -0.1)))

    return {
        "modulate": (
            2 * one, tokens(1, 2), stattn.modulate,
            lambda x, scale, shift: modulate_reference.modulate(x, scale, shift, *norm),
        ),
        "gate_residual": (3 * one, tokens(2, 1), stattn.gate_residual, gate_reference.gate_residual),
        "gate_residual_modulate": (
            4 * one, tokens(2, 3), stattn.gate_residual_modulate,
            lambda x, y, gate, scale, shift: gate_reference.gate_residual_modulate(x, y, gate, scale, shift, *norm),
        ),
        "qk_norm_rope": (
            4 * one, heads,
            lambda q, k, a, b: stattn.qk_norm_rope(q, k, a, b, rope, across_heads=across, eps=config.eps),
            lambda q, k, a, b: rope_reference.qk_norm_rope(q, k, a, b, rope, rope, across, config.eps, True),
        ),
        "patchify": (
            one + config.model_channels * math.prod(shape.size) * dtype.itemsize, patches, patchify3d,
            lambda x, weight, bias: patchify_reference(x, weight, bias, None),
        ),
        "denoise_step": (
            held * (3 * 4 + 2 * dtype.itemsize), latents, partial(step, stattn.denoise_step), step_reference,
        ),
    }  # fmt: skip


# A whole sample.


def measure_sampler(
    report: results.Report, shape: ModelShape, wanted: Sequence[str], device: str, *, steps: int = 50
) -> None:
    """Time whole samples: this package's on a GPU in one graph each, others, and all on a CPU, in the host's loop.

    Rows sampler/<shape>/<contender>: seconds for all steps beside steps x the time of one, launched by the host. Those
    of a graph are of a replay, from the start of its first kernel to the end of its last by the profiler's clock, and
    behind the row stand gap (the longest time between two kernels in it) and loop (seconds when the host launches all
    steps). Further density, and where stattn-dense is among the contenders snr and psnr: of the final latents to its,
    from the same noise.
    """
    dtype = dtype_of(device)
    model = random_model(shape, device, dtype)
    noise = draw_noise((1, shape.config.in_channels, *shape.size), seed=3)
    given = random_inputs(shape, device, dtype)
    found = build(report, wanted, model, shape, given)
    options: dict[str, Any] = {
        "text": given.text, "steps": FlowMatching(steps, shift=5.0), "prediction": "v", "device": device, "dtype": dtype
    }  # fmt: skip
    dense: Tensor | None = None
    for name in sorted(found, key=lambda name: name != "stattn-dense"):
        row, made, own = f"sampler/{shape.name}/{name}", found[name].contender, name.startswith("stattn-")
        with torch.no_grad():
            how = options | {"impl": "auto" if own else "reference"}
            walk, inputs = prepare(made.call, noise.shape, noise=noise, **how)
            inputs = walk.encode(inputs) if own else inputs
            one = results.time_callable(partial(walk, inputs, only={steps // 2}), device=device, rounds=5, warmup=1)
            kept: list[Tensor] = []
            loop = results.time_callable(partial(_keep, kept, walk, inputs), device=device, rounds=1, warmup=0)
        seconds, video = loop.median / 1e3, kept[-1]
        if not bool(video.isfinite().all()):
            raise WrongResult(f"{name}: the video is not finite")
        if device == "cuda" and own:
            graph = SampleGraph(made.call, noise.shape, noise=noise, **how)
            graph.replay()  # the first puts the graph on the device
            replay = replay_times(graph.replay)
            error = relative_error(graph.video, video)
            print(f"{name}: the graph's video differs by {error:.1e} from the loop's", file=sys.stderr)
            print(f"{name}: longest gap {replay.gap:.1f} us, {replay.between}", file=sys.stderr, flush=True)
            if not error <= torch.finfo(dtype).eps:
                raise WrongResult(f"{name}: the graph's video differs by {error:.2e} from the loop's")
            add(report, f"{row}/loop", "s", seconds)
            add(report, f"{row}/gap", "us", replay.gap)
            seconds = replay.seconds
            del graph
        add(report, row, "s", seconds, (f"{steps} x the step launched alone", steps * one.median / 1e3))
        add(report, f"{row}/density", "fraction", made.mask.density(shape.grid))
        if name == "stattn-dense":
            dense = video
        elif dense is not None:
            add(report, f"{row}/snr", "dB", decibels(relative_error(video, dense)))
            add(report, f"{row}/psnr", "dB", psnr(video, dense))


def _keep(kept: list[Tensor], walk: Walk, inputs: SampleInputs) -> None:
    kept.append(walk(inputs))


class Replay(NamedTuple):
    """What was measured of a replayed graph.

    seconds: from the start of the first kernel to the end of the last. gap: the longest time without kernels, copies
    and fills, in microseconds. between: what ran before and after it.
    """

    seconds: float
    gap: float
    between: str


def replay_times(replay: Callable[[], Any]) -> Replay:
    """Time what ``replay`` launches, by the profiler's timestamps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        replay()
        torch.cuda.synchronize()
    spans = sorted(
        (each.time_range.start, each.time_range.end, each.name)
        for each in profiler.events()
        if each.device_type.name == "CUDA"
    )
    first, end, last = spans[0]
    longest, between = 0.0, ""
    for number, (start, stop, name) in enumerate(spans[1:], 1):
        if start - end > longest:
            longest, between = start - end, f"at {number} of {len(spans)}, between {last[:60]} and {name[:60]}"
        if stop > end:
            end, last = stop, name
    return Replay((end - first) / 1e6, longest, between)
