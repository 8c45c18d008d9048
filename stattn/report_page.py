"""The page that `stattn report` writes: plots and tables of results, in one HTML file that refers to no other."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from stattn import report
from stattn.demo_page import STYLE
from stattn.report import MILLISECONDS, Row, Source
from stattn.results import LOWER_IS_BETTER

BETTER, WORSE, PLAIN, SOFT = "#2a7f4f", "#b3372d", "#4a74c0", "#8a8e98"
WIDTH, BAR = 10.5, 0.24  # inches


def render(sources: Sequence[Source], others: Sequence[str], command: str) -> str:
    """Return the page as HTML. Raises ImportError where matplotlib is not installed."""
    numbers = {id(source): number for number, source in enumerate(sources, start=1)}
    stems = report.rows_by_stem(sources)
    links = " · ".join(f'<a href="#{escape(stem)}">{escape(stem)}</a>' for stem in stems)
    sections = "\n".join(_stem(stem, rows, numbers) for stem, rows in stems.items())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>stattn results</title>\n<style>{STYLE}{MORE_STYLE}</style>\n</head>\n<body>\n<main>\n"
        '<header>\n<p class="over">stattn report</p>\n<h1>Results</h1>\n'
        f'<p class="lead">{escape(report.summary(sources))}</p>\n<p>{links}</p>\n</header>\n'
        "<p>Medians of interleaved rounds, with the 20th and 80th percentile. A ratio says how many times better a "
        "result is than its baseline, which was timed in the same rounds. Every output that was timed was compared "
        f"with a reference first.</p>\n{sections}\n{_runs(sources, others, numbers)}\n"
        f'<p class="facts">This page was made by <code>{escape(command)}</code>.</p>\n</main>\n</body>\n</html>\n'
    )


def _stem(stem: str, rows: Sequence[Row], numbers: dict[int, int]) -> str:
    products, copies = report.rates(rows)
    figures = [
        _figure(_bars(rows, numbers), f"{stem}: how many times better than its baseline each result is"),
        _figure(
            _roofline(products, copies, numbers),
            f"{stem}: the share of the matrix product's and of the copy's rate that results reach",
        ),
        _figure(_lengths(report.series(rows)), f"{stem}: time against length"),
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


# ---- plots


def _new(width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """Return a matplotlib figure and its axes, which no window and no global state know of."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install stattn[bench]") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**options)


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


def _label(row: Row, numbers: dict[int, int]) -> str:
    return f"{row.result.name}  [{numbers[id(row.source)]}]"


def _bars(rows: Sequence[Row], numbers: dict[int, int]) -> Any:
    """Draw ratios as bars from 1, and their range over the result's spread as whiskers; rows of a baseline together."""
    compared = [row for row in rows if row.result.ratio is not None]
    if not compared:
        return None
    order = {row.result.baseline.name: place for place, row in reversed([*enumerate(compared)]) if row.result.baseline}
    compared.sort(key=lambda row: order[row.result.baseline.name] if row.result.baseline else 0)
    figure, axes = _new(WIDTH, 0.9 + BAR * len(compared))
    for place, row in enumerate(compared):
        result, base = row.result, row.result.baseline
        assert result.ratio is not None
        assert base is not None
        if result.unit in LOWER_IS_BETTER:
            low, high = base.value / result.p80, base.value / (result.p20 or result.value)
        else:
            low, high = result.p20 / base.value, result.p80 / base.value
        color = BETTER if low > 1 else WORSE if high < 1 else SOFT
        axes.barh(place, result.ratio - 1, left=1, color=color, height=0.7)
        axes.plot([low, high], [place, place], color="black", linewidth=1)
        _beside(axes, place, f"{result.ratio:.3g}× {base.name}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(compared)), [_label(row, numbers) for row in compared], fontsize=7)
    axes.set_ylim(len(compared) - 0.4, -0.6)
    axes.set_xscale("log", base=2)
    ratios = [row.result.ratio or 1 for row in compared]
    axes.set_xlim(min(0.5, *ratios) / 1.2, max(2.0, *ratios) * 1.2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.set_xlabel("times better than the baseline", fontsize=8)
    _plain(axes)
    return figure


def _roofline(
    products: Sequence[tuple[Row, float, str]], copies: Sequence[tuple[Row, float, str]], numbers: dict[int, int]
) -> Any:
    """Draw what rows reach of the matrix product's rate, and of the copy's, each where there are such rows."""
    panels = [
        (each, what)
        for each, what in ((products, "% of a bf16 8192³ matrix product (cuBLAS)"), (copies, "% of a copy's rate"))
        if each
    ]
    if not panels:
        return None
    counts = [len(each) for each, _ in panels]
    figure, grid = _new(
        WIDTH, 0.9 * len(panels) + BAR * sum(counts), nrows=len(panels), squeeze=False, height_ratios=counts
    )
    for axes, (found, what) in zip(grid[:, 0], panels, strict=True):
        for place, (_, share, words) in enumerate(found):
            axes.barh(place, 100 * share, color=PLAIN, height=0.7)
            _beside(axes, place, words)
        axes.axvline(100, color="black", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(found)), [_label(row, numbers) for row, _, _ in found], fontsize=7)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xlim(0, 105 * max(1, *(share for _, share, _ in found)))
        axes.set_xlabel(what, fontsize=8)
        _plain(axes)
    return figure


def _lengths(found: dict[str, list[tuple[int, Row]]]) -> Any:
    """Draw times against lengths on logarithmic axes, with their spread, beside the quadratic law."""
    found = {name: each for name, each in found.items() if all(row.result.p20 > 0 for _, row in each)}
    if not found:
        return None
    figure, axes = _new(WIDTH, 5)
    for name, each in found.items():
        lengths = [tokens for tokens, _ in each]
        scales = [MILLISECONDS[row.result.unit] for _, row in each]
        values = [row.result.value * scale for (_, row), scale in zip(each, scales, strict=True)]
        below = [(row.result.value - row.result.p20) * scale for (_, row), scale in zip(each, scales, strict=True)]
        above = [(row.result.p80 - row.result.value) * scale for (_, row), scale in zip(each, scales, strict=True)]
        axes.errorbar(lengths, values, yerr=(below, above), marker="o", markersize=4, capsize=2, label=name)
    slowest = max(found.values(), key=lambda each: each[-1][1].result.value)
    (first, row), (last, _) = slowest[0], slowest[-1]
    start = row.result.value * MILLISECONDS[row.result.unit]
    axes.plot(
        [first, last], [start, start * (last / first) ** 2], color="black", linestyle=":", label="length squared"
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tokens", fontsize=8)
    axes.set_ylabel("ms", fontsize=8)
    axes.legend(fontsize=7)
    _plain(axes)
    return figure


def _beside(axes: Any, place: int, words: str) -> None:
    """Write to the right of the plot, beside a bar."""
    axes.annotate(words, (1.01, place), xycoords=("axes fraction", "data"), fontsize=6.5, va="center")


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=7)


MORE_STYLE = """
.plot { margin: 1rem 0 1.4rem; }
.plot img { display: block; width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line);
  border-radius: 8px; padding: .5rem; }
.plot figcaption { color: var(--soft); font-size: .85rem; margin-top: .3rem; }
"""
