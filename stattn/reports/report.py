"""What results files say together: rows by stem, as Markdown and as the JSON of github-action-benchmark."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stattn import masks, results
from stattn.grid import Grid
from stattn.results import LOWER_IS_BETTER, Report, Result

# What the last part of an attention row's name stands for: the grid, heads and the head dimension.
SHAPES = {
    "wan-1.3b-480p": (Grid(21, 30, 52), 12, 128),
    "wan-14b-720p": (Grid(21, 45, 80), 40, 128),
    "hunyuan-720p": (Grid(33, 45, 80), 24, 128),
    "cogvideox-5b": (Grid(13, 30, 45), 48, 64),
    "30x48x80": (Grid(30, 48, 80), 24, 128),
    "24x44x80": (Grid(24, 44, 80), 40, 128),
}
MASK_NAMES = {"dense": masks.full, "spatial": masks.spatial, "temporal": masks.temporal}
MILLISECONDS = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3}
LARGE = {"GFLOP/s": 1e-3, "TFLOP/s": 1.0, "GB/s": 1e-3, "TB/s": 1.0}


@dataclass(frozen=True)
class Source:
    """Hold one results file: the path by which it was found, its path inside the folder that was named, its report."""

    path: Path
    place: str
    report: Report


@dataclass(frozen=True)
class TestRun:
    """Hold what a record of tests says: the file, the command, the machine, the date, and tests by how they ended."""

    path: Path
    command: str
    gpu: str
    date: str
    passed: int
    failed: tuple[str, ...]
    skipped: int


@dataclass(frozen=True)
class Row:
    """Hold one result and the file it is from."""

    source: Source
    result: Result

    @property
    def stem(self) -> str:
        """The operation that was measured: the first part of the name; of ops/..., the second, without its contender.

        A name in one part belongs to the stem that its file is called by.
        """
        first, *rest = self.result.name.split("/")
        if not rest:
            return self.source.path.stem
        return f"ops/{rest[0].split('-')[0]}" if first == "ops" else first


def load(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Source], list[str]]:
    """Read results files and, from folders, every .json in them; return them and lines on what else lies there.

    JSON of another kind, one without "results", is left out of a folder, and named; records of tests are for
    ``read_test_runs``. Raises ValueError or OSError, by name, for what is named itself and is no results file, for a
    broken one, and when there is none at all.
    """
    found: list[Source] = []
    others: list[str] = []
    named = [Path(path) for path in paths]
    for path, each in _files(named):
        if path.is_dir():
            data = _json(each)
            if not isinstance(data, dict) or "results" not in data:
                if not _is_test_run(data):
                    others.append(f"{each.as_posix()} is not a results file")
                continue
        place = each.relative_to(path).as_posix() if path.is_dir() else each.name
        found.append(Source(each, place, results.read(each)))
    if not found:
        raise ValueError(f"no results files in {', '.join(map(str, named))}")
    return found, others


def read_test_runs(paths: Iterable[str | os.PathLike[str]]) -> list[TestRun]:
    """Return what the records of tests in folders say, those that pytest's ``--record`` left."""
    found = []
    for path, each in _files(map(Path, paths)):
        data: Any = _json(each) if path.is_dir() else None
        if _is_test_run(data):
            failed = tuple(test["test"] for test in data["tests"] if test["outcome"] == "failed")
            fields = (data["command"], data["gpu"], data["date"], data["passed"], failed, data["skipped"])
            found.append(TestRun(each, *fields))
    return found


def _files(named: Iterable[Path]) -> Iterator[tuple[Path, Path]]:
    """Yield each file once, behind the path that it was found by."""
    seen: set[Path] = set()
    for path in named:
        for each in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            if each.resolve() not in seen:
                seen.add(each.resolve())
                yield path, each


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _is_test_run(data: Any) -> bool:
    return isinstance(data, dict) and {"command", "gpu", "date", "passed", "skipped", "tests"} <= data.keys()


def rows_by_stem(sources: Sequence[Source]) -> dict[str, list[Row]]:
    """Return every row of every file by its stem, stems in the order of their names, times before all else."""
    found: dict[str, list[Row]] = {}
    for source in sources:
        for result in source.report.results:
            row = Row(source, result)
            found.setdefault(row.stem, []).append(row)
    return {
        stem: sorted(rows, key=lambda row: row.result.unit not in MILLISECONDS) for stem, rows in sorted(found.items())
    }


def machine(report: Report) -> str:
    """Name what was measured, with what it reaches."""
    said = report.gpu.removeprefix("none (").removesuffix(")") if report.gpu.startswith("none (") else report.gpu
    if report.cublas_tflops is not None:
        said += f", bf16 8192³ product {report.cublas_tflops:.0f} TFLOP/s"
    if report.copy_tbps is not None:
        said += f", copy {report.copy_tbps:.2f} TB/s"
    return said


def cells(row: Row) -> tuple[str, str, str, str, str]:
    """Return a row as text: its name, median, spread, baseline and ratio."""
    result = row.result
    base = result.baseline
    return (
        result.name,
        f"{results.digits(result.value)} {result.unit}",
        f"{results.digits(result.p20)}–{results.digits(result.p80)}",
        f"{results.digits(base.value)} {result.unit} ({base.name})" if base else "–",
        f"{result.ratio:.3g}×" if result.ratio is not None else "–",
    )


def summary(sources: Sequence[Source]) -> str:
    """Say in a sentence how much there is, and of what."""
    count = sum(len(source.report.results) for source in sources)
    machines = sorted({source.report.gpu for source in sources})
    return f"{_many(count, 'result')} of {_many(len(sources), 'file')}: {'; '.join(machines)}."


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def markdown(sources: Sequence[Source], others: Sequence[str] = (), tests: Sequence[TestRun] = ()) -> str:
    """Return a table per stem, with the machine and command behind its rows; every row of every file is in one."""
    numbers = {id(source): number for number, source in enumerate(sources, start=1)}
    lines = ["# Results", "", summary(sources), ""]
    lines += ["Ratios say how many times better than the baseline, which was timed in the same rounds.", ""]
    for stem, rows in rows_by_stem(sources).items():
        lines += [f"## {stem}", ""]
        for source in {id(row.source): row.source for row in rows}.values():
            lines.append(f"- run {numbers[id(source)]}: {machine(source.report)}; `{source.report.command}`")
        lines += ["", "| result | median | p20–p80 | baseline | ratio | run |", "|---|---:|---:|---|---:|---:|"]
        for row in rows:
            texts = [results.cell(text) for text in cells(row)]
            lines.append(f"| {' | '.join(texts)} | {numbers[id(row.source)]} |")
        lines.append("")
    lines += ["## Runs", "", "| run | file | date | versions, and what was not measured |", "|---:|---|---|---|"]
    for source in sources:
        versions = "; ".join(f"{name}: {said}" for name, said in source.report.versions.items())
        fields = (source.path.as_posix(), source.report.date, versions)
        lines.append(f"| {numbers[id(source)]} | {' | '.join(results.cell(each) for each in fields)} |")
    if tests:
        lines += ["", "## Tests", "", "| file | machine | date | passed | failed | skipped |"]
        lines.append("|---|---|---|---:|---:|---:|")
        for run in tests:
            told = (run.path.as_posix(), run.gpu, run.date, str(run.passed), str(len(run.failed)), str(run.skipped))
            lines.append(f"| {' | '.join(results.cell(each) for each in told)} |")
        lines += ["", *(f"- failed: `{name}` ({run.path.as_posix()})" for run in tests for name in run.failed)]
    lines += ["", *(f"Left out: {each}." for each in others)]
    return "\n".join(lines).rstrip() + "\n"


def action_entries(sources: Sequence[Source]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return all rows as entries of github-action-benchmark: customSmallerIsBetter, and customBiggerIsBetter.

    A name that several files hold has its file behind it, so that every entry has a name of its own.
    """
    names = Counter(result.name for source in sources for result in source.report.results)
    smaller: list[dict[str, Any]] = []
    bigger: list[dict[str, Any]] = []
    for source in sources:
        for result in source.report.results:
            beside = f"{result.ratio:.3g}x of {result.baseline.name}; " if result.ratio and result.baseline else ""
            entry = {
                "name": result.name if names[result.name] == 1 else f"{result.name} [{source.path.as_posix()}]",
                "unit": result.unit,
                "value": result.value,
                "range": f"{results.digits(result.p20)} to {results.digits(result.p80)}",
                "extra": f"{beside}{source.report.gpu}; {source.report.command}",
            }
            (smaller if result.unit in LOWER_IS_BETTER else bigger).append(entry)
    return smaller, bigger


# What a row reaches of the machine.


def rates(rows: Sequence[Row]) -> tuple[list[tuple[Row, float, str]], list[tuple[Row, float, str]]]:
    """Return which share of the machine's matrix product rows reach, and which share of its copy.

    Each as (row, share, rate in words). Of products: rows in FLOP/s, and rows of attention whose mask and shape the
    name tells. Of copies: rows beside a copy of the bytes they must move, with the rate that a row <name>/bandwidth
    tells of them, and others in B/s.
    """
    products: list[tuple[Row, float, str]] = []
    copies: list[tuple[Row, float, str]] = []
    moved = {(id(row.source), row.result.name): row.result for row in rows if row.result.unit in ("GB/s", "TB/s")}
    beside_copies = {(id(row.source), row.result.name) for row in rows if beside_copy(row.result)}
    for row in rows:
        result, report = row.result, row.source.report
        top, copy = report.cublas_tflops, report.copy_tbps
        base = result.baseline
        work = flops(result.name)
        if base is not None and result.ratio is not None and beside_copy(result):
            words = f"{100 * result.ratio:.0f} % of {base.name}"
            rate_of = moved.get((id(row.source), f"{result.name}/bandwidth"))
            if rate_of is not None:
                words += f", {results.digits(rate_of.value * LARGE[rate_of.unit])} TB/s"
            copies.append((row, result.ratio, words))
        elif result.unit.endswith("FLOP/s") and top is not None:
            rate = result.value * LARGE[result.unit]
            products.append((row, rate / top, f"{results.digits(rate)} TFLOP/s"))
        elif result.unit in ("GB/s", "TB/s"):
            if copy is None or (id(row.source), result.name.removesuffix("/bandwidth")) in beside_copies:
                continue
            rate = result.value * LARGE[result.unit]
            copies.append((row, rate / copy, f"{results.digits(rate)} TB/s"))
        elif result.unit in MILLISECONDS and work is not None and top is not None and result.value > 0:
            rate = work / (result.value * MILLISECONDS[result.unit]) * 1e-9
            products.append((row, rate / top, f"{rate:.0f} TFLOP/s"))
    return products, copies


def beside_copy(result: Result) -> bool:
    """Whether a row is judged against a copy of the bytes that it must move: its time follows the memory's."""
    return result.baseline is not None and is_copy(result.baseline.name)


def is_copy(name: str) -> bool:
    """Whether a row's name says that it is a copy."""
    return re.search(r"(^|[-/ ])copy([-/ ]|$)", name) is not None


def flops(name: str) -> float | None:
    """Return the arithmetic of the pairs that are allowed, from attention/<implementation>/<mask>_<pass>/<shape>.

    Two products forward, five backward. None where the name does not tell mask or shape.
    """
    parts = name.split("/")
    if len(parts) != 4 or parts[0] != "attention" or parts[3] not in SHAPES:
        return None
    label = parts[2].removesuffix("_deterministic")
    products = 5 if label.endswith("_bwd") else 2
    label = label.removesuffix("_fwd").removesuffix("_bwd")
    window = re.fullmatch(r"window_(\d+)_(\d+)_(\d+)", label)
    if window is None and label not in MASK_NAMES:
        return None
    t, h, w = map(int, window.groups()) if window else (0, 0, 0)
    mask = masks.window(t, h, w) if window else MASK_NAMES[label]()
    grid, heads, dim = SHAPES[parts[3]]
    return 2 * products * mask.density(grid) * grid.tokens**2 * dim * heads


def length(name: str) -> tuple[str, int] | None:
    """Return a name without the length it tells, and the length in tokens; None when it tells none.

    A length is a grid as 21x30x52 anywhere in the name, or tokens, as 32760 or n32760, that begin its last part.
    """
    grid = re.search(r"(?<![\w.])(\d+)x(\d+)x(\d+)(?![\w.])", name)
    if grid:
        t, h, w = map(int, grid.groups())
        return f"{name[: grid.start()]}N{name[grid.end() :]}", t * h * w
    tokens = re.search(r"(?<=/)n?(\d{3,})(?=$|[_-])(?!.*/)", name)
    if tokens:
        return f"{name[: tokens.start()]}N{name[tokens.end() :]}", int(tokens.group(1))
    return None


def series(rows: Sequence[Row]) -> dict[str, list[tuple[int, Row]]]:
    """Return times of rows that differ in their length alone, by name and in the order of their lengths.

    Only rows of one run are put together, and only where there are several lengths.
    """
    found: dict[tuple[int, str], list[tuple[int, Row]]] = {}
    for row in rows:
        told = length(row.result.name)
        if told is not None and row.result.unit in MILLISECONDS:
            found.setdefault((id(row.source), told[0]), []).append((told[1], row))
    several = {key: sorted(each, key=lambda at: at[0]) for key, each in found.items() if len({n for n, _ in each}) > 1}
    names = Counter(name for _, name in several)
    return {
        name if names[name] == 1 else f"{name} [{each[0][1].source.path.as_posix()}]": each
        for (_, name), each in several.items()
    }


# Roofline, breakdown, error.


@dataclass(frozen=True)
class Point:
    """Hold what a row reaches on the roofline of its run: operations a byte, and TFLOP/s.

    problem, contender: what its name says was computed, and by whom.
    """

    row: Row
    problem: str
    contender: str
    intensity: float
    tflops: float


@dataclass(frozen=True)
class Breakdown:
    """Hold a step's milliseconds, and those of its self-attention alone."""

    name: str
    total: float
    attention: float


@dataclass(frozen=True)
class Total:
    """Hold the seconds of a whole sample, and how many times faster it is than another contender, if any."""

    row: Row
    seconds: float
    faster: float | None
    than: str


# Operations an element that is read or written, of the memory-bound ones: counted from their formulas, so nominal.
PER_ELEMENT = {"modulate": 5.0, "gate_residual": 0.7, "gate_residual_modulate": 3.0, "qk_norm_rope": 4.0}


def points(rows: Sequence[Row]) -> list[Point]:
    """Return rows whose name tells their arithmetic and their bytes, of runs that know what the machine reaches.

    Attention moves q, k, v and the output once, in 16 bits; rows ops/<operation>/<pass>/<shape>/bandwidth move what
    they say, with a nominal count of operations.
    """
    found = []
    for row in rows:
        result, report = row.result, row.source.report
        if report.cublas_tflops is None or report.copy_tbps is None or result.value <= 0:
            continue
        parts = result.name.split("/")
        work = flops(result.name)
        if work is not None and result.unit in MILLISECONDS and not parts[2].endswith(("_bwd", "_bwd_deterministic")):
            grid, heads, dim = SHAPES[parts[3]]
            rate = work / (result.value * MILLISECONDS[result.unit]) * 1e-9
            intensity = work / (4 * grid.tokens * heads * dim * 2)
            found.append(Point(row, f"{parts[2]} {parts[3]}", parts[1], intensity, rate))
        elif parts[0] == "ops" and parts[-1] == "bandwidth" and result.unit == "GB/s":
            operation, _, other = parts[1].partition("-")
            if operation in PER_ELEMENT and other != "copy":
                intensity = PER_ELEMENT[operation] / 2
                problem = " ".join((operation, *parts[2:-1]))
                found.append(Point(row, problem, other or "stattn", intensity, result.value * 1e-3 * intensity))
    return found


def breakdowns(rows: Sequence[Row]) -> list[Breakdown]:
    """Return the steps of which a row <name>/attention tells the time of self-attention."""
    values = {(id(row.source), row.result.name): row.result for row in rows if row.result.unit == "ms"}
    return [
        Breakdown(name, result.value, values[source, f"{name}/attention"].value)
        for (source, name), result in values.items()
        if (source, f"{name}/attention") in values
    ]


def totals(rows: Sequence[Row]) -> list[Total]:
    """Return whole samples, rows sampler/<shape>/<contender>, beside what a user would run instead, of the same run.

    That is diffusers where it was measured, else the compiled contender, else the eager one.
    """
    samples = {}
    for row in rows:
        parts = row.result.name.split("/")
        if len(parts) == 3 and parts[0] == "sampler" and row.result.unit in MILLISECONDS:
            samples[id(row.source), parts[1], parts[2]] = row
    found = []
    for (source, shape, _), row in samples.items():
        seconds = row.result.value * MILLISECONDS[row.result.unit] / 1e3
        others = [samples.get((source, shape, name)) for name in ("diffusers", "compiled", "eager")]
        base = next((each for each in others if each is not None), None)
        if base is None or base is row:
            found.append(Total(row, seconds, None, ""))
            continue
        ratio = base.result.value * MILLISECONDS[base.result.unit] / 1e3 / seconds
        found.append(Total(row, seconds, ratio, base.result.name.rpartition("/")[2]))
    return found


def errors(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Return density and relative error by name, of rows <name>/density and <name>/snr under a mask."""
    values = {(id(row.source), row.result.name): row.result for row in rows}
    found = {}
    for (source, name), result in values.items():
        snr = values.get((source, f"{name.removesuffix('/density')}/snr"))
        if name.endswith("/density") and snr is not None and result.value < 1:
            found[name.removesuffix("/density")] = result.value, 10 ** (-snr.value / 20)
    return found
