"""The page that `stattn report` writes: plots and tables of results, in one HTML file that refers to no other."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from stattn.reports import plots, report
from stattn.reports.demo_page import STYLE
from stattn.reports.report import Row, Source, TestRun


def render(sources: Sequence[Source], others: Sequence[str], tests: Sequence[TestRun], command: str) -> str:
    """Return the page as HTML. Raises ImportError where matplotlib is not installed."""
    numbers = {id(source): number for number, source in enumerate(sources, start=1)}
    stems = report.rows_by_stem(sources)
    links = " · ".join(f'<a href="#{escape(stem)}">{escape(stem)}</a>' for stem in stems)
    sections = "\n".join(_stem(stem, rows, numbers) for stem, rows in stems.items())
    points = report.points([row for rows in stems.values() for row in rows])
    roofline = _figure(plots.roofline(points), "the roofline, and what results reach below it")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>stattn results</title>\n<style>{STYLE}{MORE_STYLE}</style>\n</head>\n<body>\n<main>\n"
        '<header>\n<p class="over">stattn report</p>\n<h1>Results</h1>\n'
        f'<p class="lead">{escape(report.summary(sources))}</p>\n<p>{links}</p>\n</header>\n'
        "<p>Medians of interleaved rounds, with the 20th and 80th percentile. A ratio says how many times better a "
        "result is than its baseline, which was timed in the same rounds. Every output that was timed was compared "
        f"with a reference first.</p>\n{roofline}{sections}\n{_tests(tests)}{_runs(sources, others, numbers)}\n"
        f'<p class="facts">This page was made by <code>{escape(command)}</code>.</p>\n</main>\n</body>\n</html>\n'
    )


def _stem(stem: str, rows: Sequence[Row], numbers: dict[int, int]) -> str:
    products, copies = report.rates(rows)
    samples = report.totals(rows)
    compared = [row for row in rows if row not in [each.row for each in samples]]
    figures = [
        _figure(plots.bars(compared, numbers), f"{stem}: how many times better than its baseline each result is"),
        _figure(plots.totals(samples, numbers), f"{stem}: how long whole samples take"),
        _figure(
            plots.shares(products, copies, numbers),
            f"{stem}: the share of the matrix product's and of the copy's rate that results reach",
        ),
        _figure(plots.lengths(report.series(rows)), f"{stem}: time against length"),
        _figure(plots.breakdown(report.breakdowns(rows)), f"{stem}: what a step's time goes to"),
        _figure(plots.errors(report.errors(rows)), f"{stem}: error against density"),
    ]
    runs = {id(row.source): row.source for row in rows}.values()
    facts = "".join(
        f"<li>run {numbers[id(source)]}: {escape(report.machine(source.report))}; "
        f"<code>{escape(source.report.command)}</code></li>"
        for source in runs
    )
    body = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td class=n>{escape(value)}</td><td class=n>{escape(spread)}</td>"
        f"<td>{escape(base)}</td><td class=n>{escape(ratio)}</td><td class=n>{numbers[id(row.source)]}</td></tr>\n"
        for row in rows
        for name, value, spread, base, ratio in (report.cells(row),)
    )
    return (
        f'<section id="{escape(stem)}">\n<h2>{escape(stem)}</h2>\n<ul class="facts">{facts}</ul>\n'
        f'{"".join(figures)}<div class="scroll"><table class="timings"><thead><tr><th>result</th><th class=n>median'
        "</th><th class=n>p20–p80</th><th>baseline</th><th class=n>ratio</th><th class=n>run</th></tr></thead>\n"
        f"<tbody>{body}</tbody></table></div>\n</section>"
    )


def _runs(sources: Sequence[Source], others: Sequence[str], numbers: dict[int, int]) -> str:
    items = "".join(
        f"<li>run {numbers[id(source)]}: <code>{escape(source.path.as_posix())}</code>, {escape(source.report.date)}; "
        f"{escape('; '.join(f'{name}: {said}' for name, said in source.report.versions.items()))}</li>"
        for source in sources
    )
    left = "".join(f"<li>left out: {escape(each)}</li>" for each in others)
    return (
        "<section>\n<h2>Runs</h2>\n<p>Files, dates, versions, and what was not measured.</p>\n"
        f'<ul class="notes">{items}{left}</ul>\n</section>'
    )


def _tests(tests: Sequence[TestRun]) -> str:
    if not tests:
        return ""
    body = "".join(
        f"<tr><td><code>{escape(run.path.as_posix())}</code></td><td>{escape(run.gpu)}</td><td>{escape(run.date)}</td>"
        f"<td class=n>{run.passed}</td><td class=n>{len(run.failed)}</td><td class=n>{run.skipped}</td></tr>\n"
        for run in tests
    )
    failed = "".join(f"<li>failed: <code>{escape(name)}</code></li>" for run in tests for name in run.failed)
    return (
        '<section id="tests">\n<h2>Tests</h2>\n<div class="scroll"><table class="timings"><thead><tr><th>file</th><th>'
        "machine</th><th>date</th><th class=n>passed</th><th class=n>failed</th><th class=n>skipped</th></tr></thead>\n"
        f'<tbody>{body}</tbody></table></div>\n<ul class="notes">{failed}</ul>\n</section>\n'
    )


def _figure(figure: Any, words: str) -> str:
    """Return a figure as an image inside the page; nothing for None."""
    if figure is None:
        return ""
    from matplotlib import rc_context

    file = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": words, "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return (
        f'<figure class="plot"><img alt="{escape(words)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(words)}</figcaption></figure>\n"
    )


MORE_STYLE = """
.plot { margin: 1rem 0 1.4rem; }
.plot img { display: block; width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line);
  border-radius: 8px; padding: .5rem; }
.plot figcaption { color: var(--soft); font-size: .85rem; margin-top: .3rem; }
"""
