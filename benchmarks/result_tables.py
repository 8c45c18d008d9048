"""Lay out results files as tables of a page: what ``benchmarks.pages`` and ``benchmarks.video_pages`` share."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stattn import results

ROOT = Path(__file__).resolve().parent.parent


def shown(value: float, unit: str) -> str:
    """Format a measured value with three digits and its unit; what takes less than a millisecond in microseconds."""
    if unit == "ms" and value < 1:
        value, unit = value * 1e3, "us"
    digits = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:.{digits}f} {unit}"


class Run:
    """Hold the results of one file, by name."""

    def __init__(self, stem: str):
        self.path = f"benchmarks/results/{stem}.json"
        self.report = results.read(ROOT / self.path)
        self.rows = {row.name: row for row in self.report.results}

    def row(self, name: str) -> results.Result:
        if name not in self.rows:
            raise KeyError(f"{self.path} has no result {name!r}")
        return self.rows[name]

    def __call__(self, name: str) -> str:
        """A result as it is shown."""
        row = self.row(name)
        return shown(row.value, row.unit)

    def base(self, name: str) -> str:
        """What a result was timed beside."""
        row = self.row(name)
        if row.baseline is None:
            raise KeyError(f"{self.path}: {name!r} has no baseline")
        return shown(row.baseline.value, row.unit)

    def ratio(self, name: str, other: str | None = None) -> float:
        """A result's value as a multiple of its baseline, or of another result of the file."""
        row = self.row(name)
        if other is None:
            assert row.baseline is not None
            return row.value / row.baseline.value
        return row.value / self.row(other).value


def table(head: Iterable[str], rows: Iterable[Iterable[str]], *runs: Run) -> str:
    """Lay out a table, and below it the files that its numbers are from with their commands."""
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    for run in runs:
        name, machine = run.path.split("/results/")[1], run.report.gpu.removeprefix("none ").strip("()")
        text += f"\n[{name}](../{run.path}), {machine}: `{run.report.command}`\n"
    return text


def record(path: str) -> dict[str, Any]:
    """Read a record of the video system, by its path from the repository's root."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))
