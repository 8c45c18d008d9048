"""`stattn compare`: two runs row by row, and an exit status of 1 where the new one is worse beyond its spread."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stattn import report, results
from stattn.report import MILLISECONDS, Source
from stattn.results import LOWER_IS_BETTER, Report, Result

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
    parser.add_argument("new", metavar="NEW", help="of the same kind; files of two folders are paired by their paths")
    parser.add_argument(
        "--fail-over",
        type=percentage,
        default=0.05,
        metavar="PERCENT",
        help="how much worse a row may be; more, and outside of both spreads, is status 1 (default: 5%%)",
    )
    parser.add_argument("--any-machine", action="store_true", help="compare runs of different machines, too")
    parser.add_argument(
        "--scale",
        action="store_true",
        help="scale new times by the two runs' matrix products (cublas_tflops), of rows beside a copy by their copies",
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
    changes: list[Change] = []
    heads: list[str] = []
    alone: list[str] = []
    for place, before, after in pairs(args.old, old, args.new, new):
        if before is None or after is None:
            side, source = (ONLY_OLD, before) if after is None else (ONLY_NEW, after)
            assert source is not None
            alone.append(f"- `{source.path.as_posix()}` is {side}: {len(source.report.results)} rows")
            continue
        heads.append(_head(before, after, args))
        scales = _scales(before, after) if args.scale else (1.0, 1.0)
        changes += compare(before.report, after.report, args.fail_over, scales, place)
    if all(change.verdict in (ONLY_OLD, ONLY_NEW) for change in changes):
        raise ValueError(f"{args.old} and {args.new} have no row in common")
    text = table(changes, [*heads, *alone], args.fail_over)
    print(text, end="")
    if args.markdown is not None:
        path = Path(args.markdown)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return int(any(change.verdict == WORSE for change in changes))


def pairs(
    old_path: str, old: Sequence[Source], new_path: str, new: Sequence[Source]
) -> Iterator[tuple[str, Source | None, Source | None]]:
    """Pair the files of two folders by their paths inside, or two files whatever they are called.

    Yields (path, old, new), None where one has no such file. Raises ValueError for a file beside a folder.
    """
    if Path(old_path).is_dir() != Path(new_path).is_dir():
        raise ValueError(f"{old_path} and {new_path} must be two files or two folders")
    if not Path(old_path).is_dir():
        yield "", old[0], new[0]
        return
    before, after = ({source.place: source for source in each} for each in (old, new))
    for place in sorted(before | after):
        yield place, before.get(place), after.get(place)


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


def compare(
    old: Report, new: Report, limit: float, scales: tuple[float, float] = (1.0, 1.0), place: str = ""
) -> list[Change]:
    """Compare two reports row by row, rows of the old one first.

    limit: the share by which a row may be worse. scales: what new times are multiplied by, and those of rows beside a
    copy. place: the file both are from. Raises ValueError, by name, for a row whose unit changed.
    """
    before = {result.name: result for result in old.results}
    after = {result.name: result for result in new.results}
    found = []
    for name in [*before, *(name for name in after if name not in before)]:
        one, two = before.get(name), after.get(name)
        if one is None or two is None:
            found.append(Change(name, place, one, two, None, ONLY_NEW if one is None else ONLY_OLD))
            continue
        if one.unit != two.unit:
            raise ValueError(f"{name} is in {one.unit} and in {two.unit}")
        scale = scales[report.beside_copy(one) or report.is_copy(name)]
        if two.unit in MILLISECONDS and scale != 1:
            two = dataclasses.replace(two, value=two.value * scale, p20=two.p20 * scale, p80=two.p80 * scale)
        found.append(Change(name, place, one, two, _growth(one, two), _verdict(one, two, limit)))
    return found


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
