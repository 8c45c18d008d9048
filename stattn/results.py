"""Measurements: how a callable is timed, and the file in which a result is kept.

A result is a median with its 20th and 80th percentile, the unit, and the baseline it was timed beside. `checked` says
that the outputs that were timed were compared with a reference: a result that was not checked is not written. Files are
JSON, one `Report` each, and `read` refuses what `write` would not have written.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

# Whether less or more of a unit is better: it fixes the direction of `ratio`.
LOWER_IS_BETTER = {"ns", "us", "ms", "s", "MiB", "GiB", "pairs"}
HIGHER_IS_BETTER = {"GFLOP/s", "TFLOP/s", "GB/s", "TB/s", "tokens/s", "frames/s", "clips/s", "fraction", "dB"}
RATIO_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Baseline:
    """Name what a result is measured against, and its value in the result's unit."""

    name: str
    value: float


@dataclass(frozen=True)
class Result:
    """Hold one measurement: a median, its percentiles, its unit and the baseline timed in the same rounds.

    `ratio` is how many times better than the baseline: baseline / value where less is better (ms), value / baseline
    where more is (TFLOP/s). `checked` is true when the outputs that were timed were compared with a reference.
    """

    name: str
    unit: str
    value: float
    p20: float
    p80: float
    baseline: Baseline | None
    ratio: float | None
    checked: bool

    @classmethod
    def of(cls, name: str, timing: Timing, *, baseline: tuple[str, Timing] | None = None, checked: bool) -> Result:
        """Build a result in milliseconds from a timing, and from the timing of its baseline."""
        base = Baseline(baseline[0], baseline[1].median) if baseline else None
        ratio = base.value / timing.median if base else None
        return cls(name, "ms", timing.median, timing.p20, timing.p80, base, ratio, checked)


@dataclass
class Report:
    """Hold the results of one command on one machine.

    gpu: the GPU's name, or "none" and the CPU. cublas_tflops and copy_tbps: what this machine reaches at a bf16 8192^3
    matrix product and at a device copy (read and write counted), None where there is no GPU. date: ISO 8601, time zone.
    """

    command: str
    gpu: str
    versions: dict[str, str]
    date: str
    cublas_tflops: float | None
    copy_tbps: float | None
    results: list[Result] = field(default_factory=list)


@dataclass(frozen=True)
class Timing:
    """Hold the samples of one timed callable, in milliseconds, in the order in which they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median in milliseconds."""
        return statistics.median(self.samples)

    @property
    def p20(self) -> float:
        """Return the 20th percentile in milliseconds."""
        return _percentile(self.samples, 0.2)

    @property
    def p80(self) -> float:
        """Return the 80th percentile in milliseconds."""
        return _percentile(self.samples, 0.8)


def _percentile(samples: tuple[float, ...], p: float) -> float:
    ordered = sorted(samples)
    at = p * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


# The file.


def validate(data: Any) -> Report:
    """Return the report held by a JSON-like mapping; raise ValueError that names the first field that is wrong."""
    fields = {"command", "gpu", "versions", "date", "cublas_tflops", "copy_tbps", "results"}
    _keys(data, fields, "report")
    for name in ("command", "gpu", "date"):
        if not isinstance(data[name], str) or not data[name].strip():
            raise ValueError(f"report.{name}={data[name]!r} must be a non-empty string")
    try:
        moment = datetime.datetime.fromisoformat(data["date"])
    except ValueError as error:
        raise ValueError(f"report.date={data['date']!r} must be an ISO 8601 date and time") from error
    if moment.tzinfo is None:
        raise ValueError(f"report.date={data['date']!r} must name its time zone")
    versions = data["versions"]
    if (
        not isinstance(versions, Mapping)
        or not versions
        or not all(isinstance(k, str) and isinstance(v, str) for k, v in versions.items())
    ):
        raise ValueError(f"report.versions={versions!r} must map names to version strings")
    for name in ("cublas_tflops", "copy_tbps"):
        if data[name] is not None:
            _number(data[name], f"report.{name}", positive=True)
    if not isinstance(data["results"], list | tuple):
        raise ValueError(f"report.results={data['results']!r} must be a list")
    results = [_result(entry, f"results[{i}]") for i, entry in enumerate(data["results"])]
    names = [r.name for r in results]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"results hold the name {name!r} more than once")
    return Report(
        data["command"], data["gpu"], dict(versions), data["date"], data["cublas_tflops"], data["copy_tbps"], results
    )


def _result(entry: Any, where: str) -> Result:
    _keys(entry, {"name", "unit", "value", "p20", "p80", "baseline", "ratio", "checked"}, where)
    if not isinstance(entry["name"], str) or not entry["name"].strip():
        raise ValueError(f"{where}.name={entry['name']!r} must be a non-empty string")
    unit = entry["unit"]
    if unit not in LOWER_IS_BETTER | HIGHER_IS_BETTER:
        raise ValueError(f"{where}.unit={unit!r} must be one of {sorted(LOWER_IS_BETTER | HIGHER_IS_BETTER)}")
    for name in ("value", "p20", "p80"):
        _number(entry[name], f"{where}.{name}")
    value, p20, p80 = entry["value"], entry["p20"], entry["p80"]
    if not p20 <= value <= p80:
        raise ValueError(f"{where}: p20={p20} <= value={value} <= p80={p80} must hold")
    if entry["checked"] is not True:
        checked = entry["checked"]
        raise ValueError(f"{where} ({entry['name']}): checked={checked!r}: outputs that were not checked are no result")
    base = entry["baseline"]
    if (base is None) != (entry["ratio"] is None):
        raise ValueError(f"{where}: baseline={base!r} and ratio={entry['ratio']!r} must be given together")
    baseline = None
    if base is not None:
        _keys(base, {"name", "value"}, f"{where}.baseline")
        if not isinstance(base["name"], str) or not base["name"].strip():
            raise ValueError(f"{where}.baseline.name={base['name']!r} must be a non-empty string")
        _number(base["value"], f"{where}.baseline.value", positive=True)
        _number(entry["ratio"], f"{where}.ratio", positive=True)
        if value <= 0:
            raise ValueError(f"{where}.value={value} must be positive to have a ratio")
        baseline = Baseline(base["name"], base["value"])
        ratio = base["value"] / value if unit in LOWER_IS_BETTER else value / base["value"]
        if abs(entry["ratio"] - ratio) > RATIO_TOLERANCE * ratio:
            sides = f"value={value} {unit} and baseline={base['value']} {unit}"
            raise ValueError(f"{where}.ratio={entry['ratio']} must be {ratio:.6g} for {sides}")
    return Result(entry["name"], unit, value, p20, p80, baseline, entry["ratio"], True)


def _keys(data: Any, expected: set[str], where: str) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}={data!r} must be an object")
    if set(data) != expected:
        missing, unknown = sorted(expected - set(data)), sorted(set(data) - expected)
        raise ValueError(f"{where} has missing fields {missing} and unknown fields {unknown}")


def _number(value: Any, where: str, positive: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (positive and value == 0):
        raise ValueError(f"{where}={value!r} must be a finite number {'> 0' if positive else '>= 0'}")


def write(path: str | os.PathLike[str], report: Report) -> None:
    """Write a report as JSON; refuse (ValueError) an invalid one or one with an unchecked result.

    The file appears whole or not at all: it is written beside its place and moved there.
    """
    data = asdict(report)
    validate(data)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(target.name + f".{os.getpid()}.part")
    scratch.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(scratch, target)


def read(path: str | os.PathLike[str]) -> Report:
    """Read a report; raise ValueError naming the file and the field when it is not one."""
    try:
        return validate(json.loads(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def markdown(report: Report) -> str:
    """Return the report as Markdown: the machine in one paragraph, the results in one table."""
    limits = [
        f"bf16 8192³ matmul {report.cublas_tflops:.0f} TFLOP/s" if report.cublas_tflops is not None else "",
        f"copy {report.copy_tbps:.2f} TB/s" if report.copy_tbps is not None else "",
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines = ["`" + report.command + "`", "", "; ".join([report.gpu, *filter(None, limits), versions, report.date]), ""]
    lines += ["| result | median | p20–p80 | baseline | ratio |", "|---|---:|---:|---:|---:|"]
    for r in report.results:
        base = f"{digits(r.baseline.value)} {r.unit} ({cell(r.baseline.name)})" if r.baseline else "–"
        ratio = f"{r.ratio:.2f}×" if r.ratio is not None else "–"
        lines.append(
            f"| {cell(r.name)} | {digits(r.value)} {r.unit} | {digits(r.p20)}–{digits(r.p80)} | {base} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def digits(value: float) -> str:
    """Return four significant digits, without an exponent for ordinary sizes."""
    if value >= 1e4:
        return f"{value:.0f}"
    return f"{value:.4g}" if value == 0 or value >= 1e-3 else f"{value:.3e}"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


# The machine.


def new_report(command: str | None = None, device: str | torch.device | None = None, *, limits: bool = True) -> Report:
    """Start a report for this machine.

    command: how the results were made; None takes this process's command line. limits: on a GPU, first measure what it
    reaches at a matrix product and at a copy (`ceilings`).
    """
    where = _device(device)
    top = ceilings(where) if limits and where.type == "cuda" else None
    return Report(
        command=command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) or "python",
        gpu=machine(where),
        versions=versions(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        cublas_tflops=top.matmul if top else None,
        copy_tbps=top.copy if top else None,
    )


def machine(device: str | torch.device | None = None) -> str:
    """Describe the device that is timed: the GPU's name, or "none (CPU ...)" with the CPU and the threads in use."""
    where = _device(device)
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    return f"none (CPU: {cpu_name()}, {torch.get_num_threads()} threads)"


def cpu_name() -> str:
    """Return the CPU's model name, or its architecture where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions that a measurement depends on, and what the environment says about cuBLAS's kernels."""
    from importlib import metadata

    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in ("stattn", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    for name in ("CUBLASLT_WORKSPACE_SIZE", "CUBLAS_WORKSPACE_CONFIG"):
        if name in os.environ:
            found[name] = os.environ[name]
    return found


# Timing.


def _device(device: str | torch.device | None) -> torch.device:
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r} must be a CPU or a CUDA device")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: this machine has no CUDA device")
    return where


def time_callable(
    fn: Callable[[], Any],
    *,
    device: str | torch.device | None = None,
    rounds: int = 20,
    warmup: int = 3,
    budget: float | None = None,
) -> Timing:
    """Time one callable. See `time_contenders`, which this calls with a single contender."""
    return time_contenders({"fn": fn}, device=device, rounds=rounds, warmup=warmup, budget=budget)["fn"]


def time_contenders(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    device: str | torch.device | None = None,
    rounds: int = 20,
    warmup: int = 3,
    budget: float | None = None,
) -> dict[str, Timing]:
    """Time several callables in interleaved rounds, so that drift of the clock and of the machine falls on all alike.

    Every round calls each contender once, starting one further each round. On CUDA a call is timed by events after the
    L2 cache was overwritten, which also hides the launch; on a CPU by the wall clock, with whatever the caches hold.
    budget: seconds after which no further round starts (at least three are made). Raises ValueError for an empty
    mapping or for counts below one; what a contender raises is passed on.
    """
    if not contenders:
        raise ValueError(f"contenders={contenders!r} must name at least one callable")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds={rounds} must be at least 1 and warmup={warmup} at least 0")
    where = _device(device)
    once = _cuda_timer(where) if where.type == "cuda" else _cpu_timer
    for fn in contenders.values():
        for _ in range(warmup):
            fn()
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for r in range(rounds):
        if budget is not None and r >= 3 and time.perf_counter() - start > budget:
            break
        for i in range(len(names)):
            name = names[(r + i) % len(names)]
            samples[name].append(once(contenders[name]))
    return {name: Timing(tuple(samples[name])) for name in names}


def time_in_graph(
    contenders: Mapping[str, Callable[[int], Any]],
    *,
    copies: int,
    device: str | torch.device | None = None,
    rounds: int = 20,
    warmup: int = 3,
) -> dict[str, Timing]:
    """Time short callables without their launches: on CUDA by replaying graphs, in interleaved rounds.

    contenders: called with 0 ... copies - 1, the number of the buffers to work on. copies: enough that all buffers
    together are larger than the L2 cache, so that a call finds nothing of its own there (`copies_for`). A contender's
    graph walks over all copies, at least eight calls in all; what the calls of one walk return is kept to its end, so
    that outputs rotate too. A sample is the time of one replay divided by its calls, in milliseconds. Graphs are
    captured on the current stream, or on a new one when that is the default stream: autograd runs a backward on the
    stream of its forward, so whoever times a backward runs the forward, and this, in ``torch.cuda.stream`` of one
    stream. On a CPU the same calls are timed by the wall clock. Raises ValueError for an empty mapping or for counts
    below one.
    """
    if not contenders:
        raise ValueError(f"contenders={contenders!r} must name at least one callable")
    if copies < 1 or rounds < 1 or warmup < 1:
        raise ValueError(f"copies={copies}, rounds={rounds} and warmup={warmup} must be at least 1")
    where = _device(device)
    if where.type == "cpu":
        walks = {name: partial(_walk, fn, copies) for name, fn in contenders.items()}
        timings = time_contenders(walks, device=where, rounds=rounds, warmup=warmup)
        return {name: Timing(tuple(each / copies for each in timing.samples)) for name, timing in timings.items()}
    repeats = -(-8 // copies)
    with torch.cuda.device(where):
        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream() if current == torch.cuda.default_stream() else current
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            graphs = {name: _capture(partial(_walk, fn, copies), repeats, warmup) for name, fn in contenders.items()}
            for graph in graphs.values():
                graph.replay()
            names = list(graphs)
            samples: dict[str, list[float]] = {name: [] for name in names}
            for r in range(rounds):
                for i in range(len(names)):
                    name = names[(r + i) % len(names)]
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    start.record()
                    graphs[name].replay()
                    end.record()
                    end.synchronize()
                    samples[name].append(start.elapsed_time(end) / (repeats * copies))
        current.wait_stream(stream)
    return {name: Timing(tuple(samples[name])) for name in names}


def copies_for(size: int, total: int = 256 << 20) -> int:
    """Return how many buffers of ``size`` bytes, read and written by one call, make up ``total`` bytes: at least 2."""
    return max(2, -(-total // max(size, 1)))


def _walk(fn: Callable[[int], Any], copies: int) -> None:
    kept = [fn(copy) for copy in range(copies)]
    del kept


def _capture(walk: Callable[[], None], repeats: int, warmup: int) -> torch.cuda.CUDAGraph:
    for _ in range(warmup):
        walk()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(repeats):
            walk()
    return graph


def _cpu_timer(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return (time.perf_counter() - start) * 1e3


def _cuda_timer(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    # Twice the L2 at least: a buffer of just its size leaves lines behind, because the L2 is hashed in two partitions.
    size = max(256 << 20, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
    flush = torch.empty(size, dtype=torch.uint8, device=device)

    def once(fn: Callable[[], Any]) -> float:
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            fn()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)

    return once


@dataclass(frozen=True)
class Ceilings:
    """Hold what a machine reaches: a matrix product and a copy, each with its unit and what was run."""

    matmul: float
    matmul_unit: str
    matmul_what: str
    copy: float
    copy_unit: str
    copy_what: str


def ceilings(device: str | torch.device | None = None, *, rounds: int = 20) -> Ceilings:
    """Measure what this device reaches at a matrix product and at a copy (bytes read and written both counted).

    CUDA: bf16 8192 x 8192 x 8192 in TFLOP/s, 1 GiB in TB/s. CPU: float32 1024 x 1024 x 1024 in GFLOP/s, 64 MiB in GB/s:
    for orientation, never comparable with the former. Raises RuntimeError when a result that was timed is wrong.
    """
    where = _device(device)
    cuda = where.type == "cuda"
    n, dtype, size = (8192, torch.bfloat16, 1 << 30) if cuda else (1024, torch.float32, 64 << 20)
    generator = torch.Generator(device=where).manual_seed(0)
    a = torch.randn(n, n, dtype=dtype, device=where, generator=generator)
    b = torch.randn(n, n, dtype=dtype, device=where, generator=generator)
    out = torch.empty_like(a)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=where, generator=generator)
    target = torch.empty_like(source)
    product = time_callable(lambda: torch.mm(a, b, out=out), device=where, rounds=rounds).median
    copy = time_callable(lambda: target.copy_(source), device=where, rounds=rounds).median
    exact = a[:16].double() @ b.double()
    if (out[:16] - exact).square().mean().sqrt() > 16 * torch.finfo(dtype).eps * exact.square().mean().sqrt():
        raise RuntimeError(f"the {n}^3 matrix product that was timed on {where} is wrong")
    if not torch.equal(target, source):
        raise RuntimeError(f"the copy of {size} bytes that was timed on {where} is wrong")
    scale, unit = (1e-9, "T") if cuda else (1e-6, "G")
    return Ceilings(
        2 * n**3 / product * scale,
        f"{unit}FLOP/s",
        f"{str(dtype).removeprefix('torch.')} {n}^3 matrix product",
        2 * size / copy * scale,
        f"{unit}B/s",
        f"copy of {size >> 20} MiB, read and written",
    )
