"""The plots of `stattn report`: each draws what `reports.report` found in rows, or nothing where it found nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stattn.reports.report import MILLISECONDS, Breakdown, Point, Row, Total
from stattn.results import LOWER_IS_BETTER

BETTER, WORSE, PLAIN, SOFT = "#2a7f4f", "#b3372d", "#4a74c0", "#8a8e98"
WIDTH, BAR = 10.5, 0.24  # inches


def _new(width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """Return a matplotlib figure and its axes, which no window and no global state know of."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install stattn[bench]") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**options)


def _label(row: Row, numbers: dict[int, int]) -> str:
    return f"{row.result.name}  [{numbers[id(row.source)]}]"


def bars(rows: Sequence[Row], numbers: dict[int, int]) -> Any:
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


def shares(
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


def lengths(found: dict[str, list[tuple[int, Row]]]) -> Any:
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
    axes.plot([first, last], [start, start * (last / first) ** 2], color="black", linestyle=":", label="length squared")
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


def roofline(points: Sequence[Point]) -> Any:
    """Draw rates against operations a byte, below the copy's slope and the matrix product's flat, of each run.

    Colours tell contenders.
    """
    if not points:
        return None
    figure, axes = _new(WIDTH, 7)
    runs = {id(point.row.source): point.row.source.report for point in points}
    low, high = min(point.intensity for point in points) / 2, max(point.intensity for point in points) * 2
    for report in runs.values():
        assert report.cublas_tflops is not None
        assert report.copy_tbps is not None
        knee = report.cublas_tflops / report.copy_tbps
        ends = [min(low, knee / 3), knee, max(high, knee * 3)]
        heights = [ends[0] * report.copy_tbps, report.cublas_tflops, report.cublas_tflops]
        axes.plot(ends, heights, color="black", linewidth=0.9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for place, who in enumerate(sorted({point.contender for point in points})):
        mine = [point for point in points if point.contender == who]
        where = [point.intensity for point in mine], [point.tflops for point in mine]
        axes.plot(*where, "osD^v"[place // 10 % 5], markersize=5, label=who, color=f"C{place % 10}", alpha=0.8)
    # Contenders of a problem lie above each other: its name stands below them, aside where another one is as intense.
    bottom = min(point.tflops for point in points)
    axes.set_ylim(bottom / 40)
    behind = 0.0
    for intensity, problem in sorted({(point.intensity, point.problem) for point in points}):
        behind = max(intensity, behind * (high / low) ** 0.017)
        lowest = min(point.tflops for point in points if point.problem == problem)
        axes.plot([intensity, behind], [lowest, bottom / 1.5], color=SOFT, linewidth=0.4)
        axes.text(behind, bottom / 1.6, problem, rotation=90, fontsize=6, ha="center", va="top", color="#444444")
    axes.set_xlabel("operations a byte that must be moved", fontsize=8)
    axes.set_ylabel("TFLOP/s", fontsize=8)
    axes.legend(fontsize=7, loc="upper left")
    _plain(axes)
    return figure


def breakdown(found: Sequence[Breakdown]) -> Any:
    """Draw each step's time as self-attention and the rest."""
    if not found:
        return None
    figure, axes = _new(WIDTH, 0.9 + BAR * len(found))
    for place, each in enumerate(found):
        rest = max(each.total - each.attention, 0)
        axes.barh(place, each.attention, color=PLAIN, height=0.7, label="self-attention" if place == 0 else None)
        axes.barh(place, rest, left=each.attention, color=SOFT, height=0.7, label="the rest" if place == 0 else None)
        _beside(axes, place, f"{each.total:.4g} ms, {100 * each.attention / each.total:.0f} % attention")
    axes.set_yticks(range(len(found)), [each.name for each in found], fontsize=7)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel("ms", fontsize=8)
    axes.legend(fontsize=7)
    _plain(axes)
    return figure


def totals(found: Sequence[Total], numbers: dict[int, int]) -> Any:
    """Draw how long whole samples take."""
    if not found:
        return None
    figure, axes = _new(WIDTH, 0.9 + BAR * len(found))
    for place, each in enumerate(found):
        axes.barh(place, each.seconds, color=PLAIN, height=0.7)
        told = "" if each.faster is None else f", {each.faster:.3g}× {each.than}"
        _beside(axes, place, f"{each.seconds:.3g} s{told}")
    axes.set_yticks(range(len(found)), [_label(each.row, numbers) for each in found], fontsize=7)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel("s", fontsize=8)
    _plain(axes)
    return figure


def errors(found: Mapping[str, tuple[float, float]]) -> Any:
    """Draw relative errors against densities. found: (density, error) by name; the last part names the contender."""
    if not found:
        return None
    figure, axes = _new(WIDTH, 5)
    shapes = list(dict.fromkeys(name.rpartition("/")[0] for name in found))
    for place, shape in enumerate(shapes):
        mine = sorted((at, name.rpartition("/")[2]) for name, at in found.items() if name.rpartition("/")[0] == shape)
        where = [100 * density for (density, _), _ in mine], [error for (_, error), _ in mine]
        axes.plot(*where, "o-", linewidth=0.6, markersize=5, color=f"C{place % 10}", label=shape)
    # Points that lie upon each other share their label; colours tell their shapes.
    clusters: list[tuple[float, float, list[str]]] = []
    for (density, error), name in sorted((at, name.rpartition("/")[2]) for name, at in found.items()):
        near = next((names for x, y, names in clusters if density < 1.1 * x and y / 1.15 < error < 1.15 * y), None)
        if near is None:
            clusters.append((density, error, [name]))
        elif name not in near:
            near.append(name)
    for density, error, names in clusters:
        told = "\n".join(names)
        axes.annotate(told, (100 * density, error), (5, 3), textcoords="offset points", fontsize=6.5, va="bottom")
    low, high = (bound(density for density, _ in found.values()) for bound in (min, max))
    axes.set_xlim(70 * low, min(100, 200 * high))
    least, most = (bound(error for _, error in found.values()) for bound in (min, max))
    axes.set_ylim(least / 1.5, most * 1.5)
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log")
        axis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axis.set_minor_formatter(lambda value, _: f"{value:.2g}" if f"{value:.0e}"[0] in "235" else "")
        axis.set_tick_params(which="both", labelsize=7)
    axes.set_xlabel("% of pairs that the mask allows", fontsize=8)
    axes.set_ylabel("relative error to dense attention", fontsize=8)
    axes.legend(fontsize=7)
    _plain(axes)
    return figure
