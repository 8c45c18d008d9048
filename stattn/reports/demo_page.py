"""The page that `stattn demo` writes: clips, masks, timings and what was not done, as HTML beside its media."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from stattn.results import Report, Result

STEP = "One sampler step"  # how the names of those results begin


@dataclass
class MaskCard:
    """Describe one mask: its key, the share of pairs it allows, its picture's file, and a sentence about it."""

    key: str
    density: float
    picture: str
    sentence: str


@dataclass
class ClipCard:
    """Describe one clip: its files, (what, asked, seen) checks, and its PSNR in dB to the first mask's clip."""

    mp4: str
    gif: str
    checks: list[tuple[str, str, str]]
    psnr: float | None


@dataclass
class Page:
    """Hold what the demo has made so far.

    size: (frames, height, width) of the clips; grid: of their tokens. clips: by (caption, mask key); sheets: by mask
    key; notes: what a reader should know about the timings; todo: what is missing.
    """

    command: str
    settings: str
    machine: str
    versions: dict[str, str]
    date: str
    size: tuple[int, int, int]
    captions: list[str]
    masks: list[MaskCard]
    grid: tuple[int, int, int]
    clips: dict[tuple[str, str], ClipCard] = field(default_factory=dict)
    sheets: dict[str, str] = field(default_factory=dict)
    report: Report | None = None
    notes: list[str] = field(default_factory=list)
    todo: list[str] = field(default_factory=list)
    interrupted: bool = False


def render(page: Page) -> str:
    """Return the page as HTML. It refers only to files that its fields name, by paths relative to it."""
    body = "\n".join(
        [
            _header(page),
            _status(page),
            _intro(page),
            _clips(page),
            _masks(page),
            _timings(page),
            _more(page),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>stattn demo</title>\n<style>{STYLE}</style>\n</head>\n"
        f'<body style="--aspect: {page.size[2]} / {page.size[1]}">\n<main>\n{body}\n</main>\n</body>\n</html>\n'
    )


def _header(page: Page) -> str:
    versions = " · ".join(f"{escape(name)} {escape(version)}" for name, version in page.versions.items())
    machine = (
        page.machine.removeprefix("none (").removesuffix(")") if page.machine.startswith("none (") else page.machine
    )
    return (
        '<header>\n<p class="over">stattn demo</p>\n<h1>One video model, several attention masks</h1>\n'
        f'<p class="facts">{escape(machine)} · {versions} · {escape(page.date)}</p>\n</header>'
    )


def _status(page: Page) -> str:
    if not page.todo:
        return ""
    why = "Stopped before the end." if page.interrupted else "Still running: reload for more."
    items = "".join(f"<li>{escape(each)}</li>" for each in page.todo)
    return f'<section class="status"><strong>{why}</strong> Not done:<ul>{items}</ul></section>'


def _intro(page: Page) -> str:
    grid = " × ".join(map(str, page.grid))
    tokens = page.grid[0] * page.grid[1] * page.grid[2]
    return f"""<section>
<p class="lead">Each card is one caption, sampled from the same noise under each mask. The weights are the same too:
only the keys that a query may see differ.</p>
<p>The model is a diffusion transformer over spacetime patches: {grid} = {tokens} tokens a clip. It was trained on a
synthetic world of coloured shapes before a moving camera, with full and with windowed attention. Every clip is judged
by its pixels alone: the main object's colour and shape, and the way it sets out, against what the caption asks.
{escape(page.settings)}</p>
{_summary(page)}
</section>"""


def _summary(page: Page) -> str:
    """Return one row per mask: what it allows, what its clips got right, and the fastest step under it."""
    rows = []
    for mask in page.masks:
        total, right = _verdict(page, mask.key)
        steps = (
            [r for r in page.report.results if r.name.startswith(STEP) and f": {mask.key}, " in r.name]
            if page.report
            else []
        )
        best = min(steps, key=lambda result: result.value, default=None)
        step = f"{_number(best.value)} {best.unit}, {best.name.rsplit(', ', 1)[-1]}" if best else "–"
        rows.append(
            f"<tr><td><code>{escape(mask.key)}</code></td><td class=n>{_percent(mask.density)}</td>"
            f"<td class=n>{f'{right} of {total}' if total else '–'}</td><td class=n>{escape(step)}</td></tr>"
        )
    return (
        '<div class="scroll"><table class="timings"><thead><tr><th>mask</th><th class=n>pairs allowed</th>'
        f"<th class=n>checks that hold</th><th class=n>a sampling step</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _clips(page: Page) -> str:
    cards = []
    for caption in page.captions:
        clips = "".join(
            _clip(page.clips.get((caption, mask.key)), caption, mask.key, page.masks[0].key) for mask in page.masks
        )
        cards.append(f'<article><h3>{escape(caption)}</h3><div class="row">{clips}</div></article>')
    sheets = ", ".join(f'<a href="{escape(path)}">{escape(key)}</a>' for key, path in page.sheets.items())
    tail = f"<p>Frame by frame, as contact sheets: {sheets}.</p>" if sheets else ""
    return f'<section>\n<h2>Clips</h2>\n<div class="clips">\n{chr(10).join(cards)}\n</div>\n{tail}\n</section>'


def _clip(clip: ClipCard | None, caption: str, mask: str, first: str) -> str:
    label = escape(f"{caption}, {mask}")
    name = f"<code>{escape(mask)}</code>"
    if clip is None:
        return f'<figure><div class="missing">not sampled</div><figcaption>{name}</figcaption></figure>'
    badges = "".join(
        f'<span class="{"right" if asked == seen else "wrong"}" title="{escape(what)}: asked {escape(asked)}, seen '
        f'{escape(seen)}">{"✓" if asked == seen else "✗"} {escape(seen)}</span>'
        for what, asked, seen in clip.checks
    )
    close = ""
    if clip.psnr is not None:
        close = f'<span title="PSNR against the other clip">{clip.psnr:.1f} dB to {escape(first)}</span>'
    return (
        f'<figure><video muted autoplay loop playsinline aria-label="{label}"><source src="{escape(clip.mp4)}" '
        f'type="video/mp4"><img src="{escape(clip.gif)}" alt="{label}"></video>'
        f'<figcaption>{name}<a href="{escape(clip.gif)}">gif</a><div class="badges">{badges}{close}</div></figcaption>'
        f"</figure>"
    )


def _verdict(page: Page, mask: str) -> tuple[int, int]:
    """Return how many checks there are of the clips under a mask, and how many hold."""
    clips = [clip for (_, key), clip in page.clips.items() if key == mask]
    checks = [asked == seen for clip in clips for _, asked, seen in clip.checks]
    return len(checks), sum(checks)


def _masks(page: Page) -> str:
    cards = "".join(
        f'<figure><img src="{escape(mask.picture)}" alt="what one query sees under {escape(mask.key)}">'
        f"<figcaption><code>{escape(mask.key)}</code> allows {_percent(mask.density)} of all pairs, text included. "
        f"{escape(mask.sentence)}</figcaption></figure>"
        for mask in page.masks
    )
    return f"""<section>
<h2>Masks</h2>
<p>A panel per frame of tokens; one query in the middle, and the keys that it sees.</p>
<div class="masks">{cards}</div>
</section>"""


def _timings(page: Page) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in page.notes)
    notes = (
        f'<details class="notes"><summary>Notes, and what was not timed</summary><ul>{notes}</ul></details>'
        if notes
        else ""
    )
    if page.report is None or not page.report.results:
        return f"<section>\n<h2>Timings</h2>\n<p>Nothing was timed.</p>\n{notes}\n</section>"
    report = page.report
    limits = []
    if report.cublas_tflops is not None:
        limits.append(f"bf16 matrix products reach {report.cublas_tflops:.0f} TFLOP/s")
    if report.copy_tbps is not None:
        limits.append(f"copies {report.copy_tbps:.2f} TB/s")
    reach = f" Here {' and '.join(limits)}." if limits else ""
    if report.gpu.startswith("none"):
        reach += (
            " On a CPU the reference computes every mask: it defines what a mask means and is not written for speed,"
            " so that a sparse mask saves little here."
        )
    groups: dict[str, list[Result]] = {}
    for result in report.results:
        groups.setdefault(result.name.split(": ")[0], []).append(result)
    tables = "".join(_group(name, results) for name, results in groups.items())
    return (
        "<section>\n<h2>Timings</h2>\n<p>Medians in interleaved rounds, with the 20th and 80th percentile. Every "
        f"output that was timed was first compared with a reference in higher precision.{reach} "
        f'Machine-readable: <a href="timings.json">timings.json</a>.</p>\n{tables}{notes}\n</section>'
    )


def _group(name: str, results: list[Result]) -> str:
    slowest = max(result.value for result in results)
    rows = "".join(
        f"<tr><td><code>{escape(result.name.split(': ', 1)[-1])}</code></td>"
        f"<td class=n>{_number(result.value)} {escape(result.unit)}</td>"
        f"<td class=n>{_number(result.p20)} – {_number(result.p80)}</td>"
        f"<td class=n>{'baseline' if result.ratio is None else f'{result.ratio:.2f}×'}</td>"
        f'<td class=bar><span style="width:{100 * result.value / slowest:.1f}%"></span></td></tr>'
        for result in results
    )
    return (
        f'<h3>{escape(name)}</h3>\n<div class="scroll"><table class="timings"><thead><tr><th>mask, implementation</th>'
        f"<th class=n>median</th><th class=n>p20 – p80</th><th class=n>speed</th><th></th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>\n"
    )


def _more(page: Page) -> str:
    return f"""<section>
<h2>Go on</h2>
<pre>stattn sample --caption "a red disc moves left" --mask "window(5, 5, 5)" --out clip.mp4
stattn explain --grid 21,45,80 --mask "window(7, 17, 17)"
stattn doctor</pre>
<p class="facts">This page was made by <code>{escape(page.command)}</code>.</p>
</section>"""


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --ink: #1d1f24; --soft: #6a6e78; --line: #e2e0da; --card: #ffffff;
  --accent: #2a62c9; --right: #1c7c4a; --wrong: #b3372d; --bar: #9db8ea; }
@media (prefers-color-scheme: dark) { :root { --page: #15171b; --ink: #e8e6e1; --soft: #9a9ea8; --line: #2c3037;
  --card: #1c1f25; --accent: #8ab0ff; --right: #63c795; --wrong: #f08a80; --bar: #3f5f9e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: .2rem 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .7rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { max-width: 46rem; }
a { color: var(--accent); }
code, pre { font: .88em/1.5 ui-monospace, monospace; }
small { color: var(--soft); font-weight: 400; font-size: .85rem; }
.over { color: var(--accent); font-weight: 600; margin: 0; }
.facts { color: var(--soft); font-size: .88rem; max-width: none; }
.lead { font-size: 1.12rem; }
.status { border: 1px solid var(--line); border-left: 4px solid var(--wrong); background: var(--card);
  padding: .7rem 1rem; border-radius: 6px; }
.status ul { margin: .3rem 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1.2rem; }
article { padding: .9rem 1rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
article h3 { margin: 0 0 .7rem; font-weight: 600; }
.row { display: flex; flex-wrap: wrap; gap: .9rem; }
.row figure { flex: 1 1 11rem; max-width: 18rem; padding: 0; border: 0; }
.row video, .missing { display: block; width: 100%; aspect-ratio: var(--aspect); border-radius: 6px;
  background: var(--line); image-rendering: pixelated; object-fit: contain; }
.missing { display: grid; place-items: center; color: var(--soft); }
.row figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 .6rem; font-size: .85rem;
  margin-top: .35rem; }
.badges { display: flex; flex-wrap: wrap; gap: 0 .8rem; width: 100%; color: var(--soft); }
.right { color: var(--right); } .wrong { color: var(--wrong); }
.masks { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; }
.masks figure { padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.masks img { display: block; width: 100%; height: auto; max-height: 24rem; object-fit: contain; }
.masks figcaption { font-size: .9rem; margin-top: .7rem; }
.timings { width: 100%; }
.timings th { text-align: left; color: var(--soft); font-weight: 500; font-size: .85rem; }
.timings th, .timings td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); }
.timings td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.timings .n { text-align: right; }
.bar { width: 30%; } .bar span { display: block; height: .6rem; background: var(--bar); border-radius: 3px; }
.notes { color: var(--soft); font-size: .9rem; margin-top: 1rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem;
  overflow-x: auto; }
"""
