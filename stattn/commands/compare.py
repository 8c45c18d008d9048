"""`stattn compare`: two runs row by row, and an exit status of 1 where the new one is worse beyond its spread."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stattn import results
from stattn.reports import report
from stattn.reports.report import MILLISECONDS, Row, Source
from stattn.results import LOWER_IS_BETTER, Result

WORSE, BETTER, SPREAD, LIMIT = "worse", "better", "within spread", "within limit"
ONLY_OLD, ONLY_NEW = "only in old", "only in new"


@dataclass(frozen=True)
class Change:
    """Hold a row of both runs, or of one: change is the share by which the value grew, None without two values."""

    name: str
    place: str
    old: Result | None
    new: Result | None
    change: float | None
    verdict: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stattn compare`."""
    parser.add_argument("old", metavar="OLD", help="a results file, or a folder of them")
    parser.add_argument("new", metavar="NEW", help="the same; files of two folders are paired by their rows")
    parser.add_argument(
        "--fail-over",
        type=percentage,
        default=0.05,
        metavar="PERCENT",
        help="limit; exit with 1 where a row is worse by more, outside of both spreads (default: 5%%)",
    )
    parser.add_argument("--any-machine", action="store_true", help="compare runs of different machines, too")
    parser.add_argument(
        "--scale",
        action="store_true",
        help="scale new times by the runs' matrix products (cublas_tflops), or copies for rows judged by one",
    )
    parser.add_argument("--markdown", metavar="FILE", help="write the table there, too")


def percentage(text: str) -> float:
    """Parse "5%" or "5" as 0.05, for argparse."""
    try:
        value = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a percentage like 5%")
    return value


def main(args: argparse.Namespace) -> int:
    """Print the table; return 1 when a row is worse by more than the limit and outside of both spreads, else 0."""
    (old, old_others), (new, new_others) = report.load([args.old]), report.load([args.new])
    for each in (*old_others, *new_others):
        print(f"stattn compare: left out: {each}", file=sys.stderr)
    folders = Path(args.old).is_dir()
    if folders != Path(args.new).is_dir():
        raise ValueError(f"{args.old} and {args.new} must be two files or two folders")
    found = pairs(old, new, folders)
    met = {(id(one.source), id(two.source)): (one.source, two.source) for one, two in found if one and two}
    heads = [_head(*each, args) for each in met.values()]
    scales = {key: _scales(*each) if args.scale else (1.0, 1.0) for key, each in met.items()}
    used = {key for keys in met for key in keys}
    for side, sources in ((ONLY_OLD, old), (ONLY_NEW, new)):
        for source in sources:
            if id(source) not in used:
                heads.append(f"- `{source.path.as_posix()}` is {side}: {len(source.report.results)} rows")
    changes = []
    for one, two in found:
        alone = one or two
        assert alone is not None
        place = alone.source.place if folders else ""
        if one is not None and two is not None:
            scale = scales[id(one.source), id(two.source)]
            changes.append(compare(one.result, two.result, args.fail_over, scale, place))
        elif id(alone.source) in used:
            before, after = (None if row is None else row.result for row in (one, two))
            changes.append(Change(alone.result.name, place, before, after, None, ONLY_NEW if one is None else ONLY_OLD))
    if all(change.verdict in (ONLY_OLD, ONLY_NEW) for change in changes):
        raise ValueError(f"{args.old} and {args.new} have no row in common")
    text = table(changes, heads, args.fail_over)
    print(text, end="")
    if args.markdown is not None:
        path = Path(args.markdown)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return int(any(change.verdict == WORSE for change in changes))


def pairs(old: Sequence[Source], new: Sequence[Source], folders: bool) -> list[tuple[Row | None, Row | None]]:
    """Pair rows by their names, those of the old run first; None stands for a row that the other run lacks.

    Of folders, rows must lie in files of one folder inside, whatever these are called; where several files there hold a
    name, in files of one name.
    """
    rows = [[Row(source, result) for source in each for result in source.report.results] for each in (old, new)]

    def inside(row: Row) -> tuple[str, str]:
        return (Path(row.source.place).parent.as_posix() if folders else "", row.result.name)

    counts = [Counter(map(inside, each)) for each in rows]

    def key(row: Row) -> tuple[str, str]:
        several = any(count[inside(row)] > 1 for count in counts)
        return (row.source.place, row.result.name) if folders and several else inside(row)

    before, after = ({key(row): row for row in each} for each in rows)
    return [(before.get(each), after.get(each)) for each in [*before, *(each for each in after if each not in before)]]


def _head(old: Source, new: Source, args: argparse.Namespace) -> str:
    """Say what two files are of; refuse two machines unless they may differ."""
    machines = old.report.gpu, new.report.gpu
    if machines[0] != machines[1] and not args.any_machine:
        raise ValueError(
            f"{old.path} is of {machines[0]!r} and {new.path} of {machines[1]!r}: allow it with --any-machine"
        )
    line = f"- `{old.path.as_posix()}` ({old.report.date}) and `{new.path.as_posix()}` ({new.report.date}): "
    line += machines[0] if machines[0] == machines[1] else f"{machines[0]} and {machines[1]}"
    if args.scale:
        line += "; new times scaled by {:.4f}, those beside a copy by {:.4f}".format(*_scales(old, new))
    return line


def _scales(old: Source, new: Source) -> tuple[float, float]:
    """Return what new times are multiplied by, and those of rows beside a copy."""
    found = []
    for name in ("cublas_tflops", "copy_tbps"):
        before, after = getattr(old.report, name), getattr(new.report, name)
        for source, value in ((old, before), (new, after)):
            if value is None:
                raise ValueError(f"--scale: {source.path} has no {name} to scale by")
        found.append(after / before)
    return found[0], found[1]


def compare(old: Result, new: Result, limit: float, scales: tuple[float, float], place: str) -> Change:
    """Compare a row of both runs.

    limit: the share by which a row may be worse. scales: what new times are multiplied by, and those of rows beside a
    copy. place: the file that it is from. Raises ValueError, by name, for a row whose unit changed.
    """
    if old.unit != new.unit:
        raise ValueError(f"{old.name} is in {old.unit} and in {new.unit}")
    scale = scales[report.beside_copy(old) or report.is_copy(old.name)]
    if new.unit in MILLISECONDS and scale != 1:
        new = dataclasses.replace(new, value=new.value * scale, p20=new.p20 * scale, p80=new.p80 * scale)
    return Change(old.name, place, old, new, _growth(old, new), _verdict(old, new, limit))


def _growth(old: Result, new: Result) -> float:
    if old.value == 0:
        return 0.0 if new.value == 0 else math.inf
    return new.value / old.value - 1


def _verdict(old: Result, new: Result, limit: float) -> str:
    """Judge a row: only where the two spreads, p20 to p80, do not overlap has it become better or worse."""
    if new.p20 <= old.p80 and old.p20 <= new.p80:
        return SPREAD
    growth = _growth(old, new)
    if abs(growth) <= limit:
        return LIMIT
    return WORSE if (growth > 0) == (new.unit in LOWER_IS_BETTER) else BETTER


def table(changes: Sequence[Change], heads: Sequence[str], limit: float) -> str:
    """Return what changed as Markdown: what is worse first, then what is better, then the rest."""
    order = (WORSE, BETTER, LIMIT, SPREAD, ONLY_OLD, ONLY_NEW)
    counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in order}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    folders = any(change.place for change in changes)
    lines = ["# Comparison", "", f"{said}. The limit is {100 * limit:g} %.", "", *heads, ""]
    lines += ["| result | old | new | change | verdict |", "|---|---:|---:|---:|---|"]
    for change in sorted(changes, key=lambda each: order.index(each.verdict)):
        name = f"{change.name} [{change.place}]" if folders else change.name
        growth = "–" if change.change is None else f"{100 * change.change:+.1f} %"
        verdict = f"**{change.verdict}**" if change.verdict in (WORSE, BETTER) else change.verdict
        cells = (name, _value(change.old), _value(change.new), growth, verdict)
        lines.append(f"| {' | '.join(results.cell(each) for each in cells)} |")
    return "\n".join(lines) + "\n"


def _value(result: Result | None) -> str:
    if result is None:
        return "–"
    spread = f"{results.digits(result.p20)}–{results.digits(result.p80)}"
    return f"{results.digits(result.value)} {result.unit} ({spread})"
