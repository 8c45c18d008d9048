"""Pictures of masks: what one query sees, frame by frame, as SVG.

``python -m stattn.masks`` draws a page of all named masks.
"""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stattn import masks
from stattn.blocks import BlockList
from stattn.grid import Grid, Triple, as_grid, is_int
from stattn.masks import CONSTRUCTORS, Mask

PAGE_GRID = Grid(5, 9, 12)
MOST_FRAMES = 9
WIDEST = 1100  # pixels of one picture, beyond which its frames wrap
GAP, MARGIN, LINE, STRIP = 8, 12, 17, 8  # pixels between frames, around a picture, of text, of a strip of global tokens
HEADER = 28  # pixels of the page's title
CHARACTER, SMALL_CHARACTER = 7.3, 6.1  # the widths of characters

# Viewers that do not ask for a colour scheme show the first colours; all of them stand out on white and on black.
STYLE = """
text { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 12px; fill: #24292f }
.small { font-size: 10px; fill: #6e7781 }
.unseen { fill: #dfe4ea }
.seen { fill: #2f7fd1 }
.query { fill: #f2762e }
.lines { stroke: #ffffff; stroke-width: 0.6; fill: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .small { fill: #8b949e }
  .unseen { fill: #2b323b }
  .seen { fill: #4f9cec }
  .query { fill: #ff9a57 }
  .lines { stroke: #0d1117 }
}
"""


class _Picture(NamedTuple):
    width: int
    height: int
    body: str


def draw_mask(mask: Mask, grid: Grid | Triple, query: Triple | None = None) -> str:
    """Draw what one query of a mask sees, a panel of h x w cells per frame, as an SVG picture.

    grid: at most nine of its frames are drawn, evenly spaced, the query's among them. Global tokens are strips around
    the frames. query: (t, h, w), the middle of the grid when None. Raises ValueError when it lies outside the grid.
    """
    picture = _picture(mask, as_grid(grid), query)
    return _svg(picture.width, picture.height, picture.body, mask.key)


def draw_page(grid: Grid | Triple = PAGE_GRID, columns: int = 2) -> str:
    """Draw every named mask, and combinations of them, on one page."""
    grid = as_grid(grid)
    pictures = [_picture(mask, grid, query) for mask, query in _examples(grid)]
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    placed = [
        f'<g transform="translate({index % columns * width} {index // columns * height + HEADER})">{picture.body}</g>'
        for index, picture in enumerate(pictures)
    ]
    rows = -(-len(pictures) // columns)
    t, h, w = grid
    label = f"The keys (blue) that one query (orange) sees under each mask, on a grid of {t} frames of {h} x {w} tokens"
    placed.append(_text(MARGIN, MARGIN + 14, label))
    return _svg(width * columns, height * rows + HEADER, "\n".join(placed), label)


def _examples(grid: Grid) -> list[tuple[Mask, Triple | None]]:
    """List masks that show well on the page's grid, and queries; a constructor without one shows its first example."""
    shown: list[tuple[Mask | BlockList, Triple | None]] = [
        (masks.full(), None),
        (masks.spatial(), None),
        (masks.temporal(), None),
        (masks.window(3, 5, 7), None),
        (masks.window(3, 5, 7), (0, 1, 10)),
        (masks.window(3, 6, 6, stride=(1, 3, 6)), (2, 3, 6)),
        (masks.window(3, 3, 4, dilation=(1, 2, 3)), None),
        (masks.window(3, 5, 7, causal=(True, False, False)), None),
        (masks.window(2, 5, 7, causal=True), None),
        (masks.sliding_tile((2, 3, 4), (2, 1, 2)), None),
        (masks.sliding_tile((1, 2, 5), (3, 3, 2)), (2, 8, 11)),
        (masks.frame_causal(2), None),
        (masks.frame_causal(1, window=2, sink_frames=1), (4, 4, 6)),
        (masks.radial(((0, None, None), (1, 5, 7), (None, 2, 3))), None),
        (masks.tables(t=((1, 0, 0, 0, 0), (4, 0, 1, 2, 3))), None),
        (masks.frame_causal(1) & masks.window(None, 5, 7), None),
        (masks.spatial() | masks.temporal(), None),
        (masks.spatial() | masks.window(5, 3, 3, dilation=(1, 3, 4)), None),
    ]
    found = [(mask, query) for mask, query in shown if isinstance(mask, Mask)]
    drawn = {mask.key.partition("(")[0] for mask, _ in found}
    for name in CONSTRUCTORS:
        if name not in drawn:
            found.append((CONSTRUCTORS[name].examples(grid.shape)[0], None))
    return found


def _picture(mask: Mask, grid: Grid, query: Triple | None) -> _Picture:
    query = _check_query(query, grid)
    t, h, w = query
    row = mask.allowed(grid, [grid.before + (t * grid.h + h) * grid.w + w])[0].numpy()
    video = row[grid.before : grid.before + grid.video].reshape(grid.shape)
    cell = max(2, min(8, 240 // max(grid.h, grid.w)))
    frames = _frames(grid.t, t)
    across = max(1, min(len(frames), (WIDEST - 2 * MARGIN) // (grid.w * cell + GAP)))
    across = -(-len(frames) // -(-len(frames) // across))  # rows of equal length

    text = f"density {100 * mask.density(grid):.3g} %; query ({t}, {h}, {w}) sees {int(row.sum()):,} of {grid.tokens:,}"
    text += "" if len(frames) == grid.t else f"; {len(frames)} of {grid.t} frames"
    inner = max(across * (grid.w * cell + GAP) - GAP, round(len(text) * SMALL_CHARACTER))
    parts = [_text(0, 12, _elided(mask.key, inner), tip=mask.key), _text(0, 12 + LINE, text, "small")]
    y = 12 + LINE + 8
    if grid.before:
        parts.append(_strip(y, inner, "before", row[: grid.before]))
        y += STRIP + LINE
    for place, frame in enumerate(frames):
        x = place % across * (grid.w * cell + GAP)
        top = y + place // across * (grid.h * cell + LINE)
        panel = _frame(video[frame], cell, (h, w) if frame == t else None)
        parts.append(f'<g transform="translate({x} {top})">{panel}')
        parts.append(_text(0, grid.h * cell + 11, f"t = {frame}", "small") + "</g>")
    y += -(-len(frames) // across) * (grid.h * cell + LINE)
    if grid.after:
        parts.append(_strip(y + 4, inner, "after", row[grid.before + grid.video :]))
        y += 4 + STRIP + LINE
    body = f'<g transform="translate({MARGIN} {MARGIN})">' + "\n".join(parts) + "</g>"
    return _Picture(inner + 2 * MARGIN, y + 2 * MARGIN, body)


def _check_query(query: Triple | None, grid: Grid) -> Triple:
    if query is None:
        return (grid.t // 2, grid.h // 2, grid.w // 2)
    if not isinstance(query, (tuple, list)) or len(query) != 3 or not all(is_int(each) for each in query):
        raise TypeError(f"query={query!r} must be three integers (t, h, w)")
    if not all(0 <= each < length for each, length in zip(query, grid.shape, strict=True)):
        raise ValueError(f"query={query!r} lies outside the grid {grid.shape}")
    return query


def _frames(count: int, query: int) -> list[int]:
    """Choose the frames to draw: all, or evenly spaced ones with the query's in place of its neighbour."""
    if count <= MOST_FRAMES:
        return list(range(count))
    chosen = np.linspace(0, count - 1, MOST_FRAMES).round().astype(int)
    chosen[np.abs(chosen - query).argmin()] = query
    return chosen.tolist()


def _frame(seen: np.ndarray, cell: int, query: tuple[int, int] | None) -> str:
    """Draw one frame: runs of seen cells, lines between cells, the query on top. seen: booleans [h, w]"""
    h, w = seen.shape
    parts = [f'<rect class="unseen" width="{w * cell}" height="{h * cell}"/>']
    runs = "".join(
        f"M{a * cell} {y * cell}h{(b - a) * cell}v{cell}h{(a - b) * cell}z" for y in range(h) for a, b in _runs(seen[y])
    )
    if runs:
        parts.append(f'<path class="seen" d="{runs}"/>')
    if cell >= 4:
        lines = "".join(f"M0 {y * cell}H{w * cell}" for y in range(1, h))
        lines += "".join(f"M{x * cell} 0V{h * cell}" for x in range(1, w))
        parts.append(f'<path class="lines" d="{lines}"/>')
    if query is not None:
        size = max(cell - 2 if seen[query] else cell, 5)  # a seen query keeps a border of that colour
        y, x = ((place + 0.5) * cell - size / 2 for place in query)
        parts.append(f'<rect class="query" x="{x:g}" y="{y:g}" width="{size}" height="{size}"/>')
    return "".join(parts)


def _runs(row: np.ndarray) -> list[tuple[int, int]]:
    """List the runs of True in a row: (first, behind the last)."""
    edges = np.flatnonzero(np.diff(row.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _strip(y: int, width: int, name: str, seen: np.ndarray) -> str:
    """Draw the global tokens of one side as a strip of cells, or as a bar when they are too many."""
    cell = min(STRIP, width / len(seen))
    parts = [f'<rect class="unseen" width="{cell * len(seen):g}" height="{STRIP}"/>']
    for a, b in _runs(seen):
        parts.append(f'<rect class="seen" x="{a * cell:g}" width="{(b - a) * cell:g}" height="{STRIP}"/>')
    if cell >= 4:
        lines = "".join(f"M{x * cell:g} 0V{STRIP}" for x in range(1, len(seen)))
        parts.append(f'<path class="lines" d="{lines}"/>')
    label = _text(0, STRIP + 11, f"{len(seen)} global token{'s' if len(seen) > 1 else ''} {name}", "small")
    return f'<g transform="translate(0 {y})">{"".join(parts)}{label}</g>'


def _text(x: int, y: int, text: str, kind: str = "", tip: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    tip = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<text x="{x}" y="{y}"{kind}>{tip}{escape(text)}</text>'


def _elided(text: str, width: int) -> str:
    most = int(width / CHARACTER)
    return text if len(text) <= most else text[: most - 1] + "…"


def _svg(width: int, height: int, body: str, label: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'{head} role="img">\n<title>{escape(label)}</title>\n<style>{STYLE}</style>\n{body}\n</svg>\n'


def main(argv: list[str] | None = None) -> None:
    """Write the page of all named masks."""
    parser = argparse.ArgumentParser(prog="python -m stattn.masks", description="Draw a page of all named masks.")
    parser.add_argument("--out", type=Path, default=Path("docs/masks.svg"), help="the SVG file to write (%(default)s)")
    out = parser.parse_args(argv).out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(draw_page(), encoding="utf-8")
    print(f"wrote {out}")
