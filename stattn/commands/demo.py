"""`stattn demo`: sample the shipped model under several masks, time it, and write a page that shows all of it.

Everything lands in one folder: index.html, clips/ (MP4 and GIF), masks/ (SVG), contact sheets, clips.json (what each
clip was judged to show), timings.json (`stattn.results`). The page is rewritten after every stage, so that Ctrl-C
leaves what is done.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stattn import dit, results, world
from stattn.accelerate import accelerate
from stattn.commands.demo_timings import Timings, around_attention, serving
from stattn.grid import Grid
from stattn.masks import Mask, parse
from stattn.metrics import checks
from stattn.reports.demo_page import ClipCard, MaskCard, Page, render
from stattn.sampler import FlowMatching, sample
from stattn.video import media

CAPTIONS = (
    "a red disc moves left, camera static",
    "a blue square moves right with a yellow disc, camera pans left",
    "a green triangle moves up, camera tilts down",
    "a magenta disc moves down with a cyan triangle, camera zooms in",
    "a yellow square moves left, camera rolls right",
    "a cyan triangle moves right with a red square and a blue disc, camera dollies out",
)
MASKS = ("full()", "window(5, 5, 5)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stattn demo`."""
    from stattn.cli import count, positive

    parser.add_argument("--out", default="out/demo", metavar="DIR", help="default: out/demo")
    parser.add_argument(
        "--captions", nargs="+", default=list(CAPTIONS), metavar="CAPTION", help="default: six of its own"
    )
    parser.add_argument("--masks", nargs="+", default=list(MASKS), metavar="KEY", help=f"default: {' '.join(MASKS)}")
    parser.add_argument("--rounds", type=count, default=5, help="timing rounds, 0 for no timings (default: 5)")
    add_sampling_arguments(parser, steps=positive, seed=count)


def add_sampling_arguments(parser: argparse.ArgumentParser, *, steps: Any, seed: Any) -> None:
    """Add the options that `stattn demo` and `stattn sample` share. steps, seed: their argparse types."""
    from stattn.cli import triple

    parser.add_argument(
        "--model", default="tiny", metavar="NAME", help="shipped weights, or a .safetensors file (default: tiny)"
    )
    parser.add_argument("--steps", type=steps, default=20, help="sampling steps (default: 20)")
    parser.add_argument(
        "--guidance", type=float, default=1.4, help="classifier-free guidance, 1 for none (default: 1.4)"
    )
    parser.add_argument(
        "--shift", type=float, default=1.0, help="shift of the noise levels, above 1 towards noise (default: 1)"
    )
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument(
        "--size", type=triple, default=(16, 64, 64), metavar="T,H,W", help="in pixels (default: 16,64,64)"
    )
    parser.add_argument("--fps", type=float, default=8, help="of the written clips (default: 8)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def main(args: argparse.Namespace) -> int:
    """Run the demo; 0 when all is done, 1 when an output that was timed was wrong, 130 after Ctrl-C."""
    demo = Demo(args)
    try:
        demo.run()
    except KeyboardInterrupt:
        demo.page.interrupted = True
        demo.write()
        print(f"\nstopped; what is done is in {demo.out / 'index.html'}", file=sys.stderr)
        return 130
    for each in demo.wrong:
        print(f"WRONG: {each}", file=sys.stderr)
    total = sum(len(clip.checks) for clip in demo.page.clips.values())
    right = sum(asked == seen for clip in demo.page.clips.values() for _, asked, seen in clip.checks)
    print(f"{right} of {total} checks of the clips hold; {demo.seconds:.0f} s; open {demo.out / 'index.html'}")
    return 1 if demo.wrong else 0


class Demo:
    """One run of the demo: a model, its captions and masks, and the page as it grows."""

    def __init__(self, args: argparse.Namespace):
        for module, package in (("av", "PyAV"), ("PIL", "pillow"), ("tqdm", "tqdm")):
            media.extra(module, package)
        self.args, self.out, self.began = args, Path(args.out), time.perf_counter()
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = dit.load(args.model, dtype=dtype, device=self.device)
        self.captions = list(dict.fromkeys(args.captions))
        self.masks = list(dict.fromkeys(parse(key) for key in args.masks))
        self.ids, self.valid = world.tokenize(self.captions, self.model.config.text_len, device=self.device)
        self.shape = (len(self.captions), self.model.config.in_channels, *args.size)
        self.grid = Grid(*token_grid(args.size, self.model.config.patch), after=self.model.config.text_len)
        for mask in self.masks:
            mask.pack(self.grid)
        self.wrong: list[str] = []
        self.videos: dict[str, Tensor] = {}
        self.report = results.new_report(args.command_line, self.device, limits=False)
        self.page = self._page(str(dtype).removeprefix("torch."))

    @property
    def seconds(self) -> float:
        """Count the seconds since the start."""
        return time.perf_counter() - self.began

    def run(self) -> None:
        """Sample, judge, time; write the page after every stage."""
        from tqdm import tqdm

        self._draw_masks()
        self.write()
        rest, impls = self._plan()
        with tqdm(total=self.args.steps * len(self.masks), unit="step", desc="sampling") as bar:
            for mask in self.masks:
                self.sample(mask, {"attention": impls[mask], **rest}, bar)
                self._done(f"clips under {mask.key}")
        if self.args.rounds:
            with tqdm(bar_format="{desc}") as bar:
                self._time(rest, lambda text: bar.set_description_str(f"{self.seconds:4.0f} s  {text}"))
        self.write()

    def sample(self, mask: Mask, impl: dict[str, str], bar: Any) -> None:
        """Sample every caption under a mask in one batch, write the clips and judge them."""
        bar.set_postfix_str(mask.key)
        args = self.args
        with accelerate(self.model, impl=impl):
            video = sample(
                self.model,
                self.shape,
                text=self.ids,
                text_valid=self.valid,
                steps=FlowMatching(args.steps, args.shift),
                guidance=args.guidance,
                mask=mask,
                seed=args.seed,
                impl=impl,
                callback=lambda *_: bar.update(),
            )
        self.videos[mask.key] = video
        first = self.videos[self.masks[0].key]
        seen = judge(video, self.captions)
        for i, caption in enumerate(self.captions):
            stem = f"clips/{i + 1:02d}-{slug(caption)}-{slug(mask.key)}"
            media.write_mp4(self.out / f"{stem}.mp4", video[i], fps=args.fps)
            media.write_gif(self.out / f"{stem}.gif", video[i], fps=args.fps)
            psnr = None if video is first else _psnr(video[i], first[i])
            self.page.clips[caption, mask.key] = ClipCard(f"{stem}.mp4", f"{stem}.gif", seen[i], psnr)
        sheet = f"sheet-{slug(mask.key)}.png"
        media.contact_sheet(self.out / sheet, video, captions=self.captions, scale=2)
        self.page.sheets[mask.key] = sheet

    def write(self) -> None:
        """Write the page, clips.json and, once something is timed, timings.json."""
        self.out.mkdir(parents=True, exist_ok=True)
        clips = [
            {"caption": caption, "mask": mask, "mp4": clip.mp4, "gif": clip.gif, "psnr_to_first_mask_db": clip.psnr}
            | {"checks": [{"what": w, "asked": a, "seen": s, "holds": a == s} for w, a, s in clip.checks]}
            for (caption, mask), clip in self.page.clips.items()
        ]
        (self.out / "clips.json").write_text(json.dumps(clips, indent=2) + "\n", encoding="utf-8")
        if self.page.report is not None:
            results.write(self.out / "timings.json", self.page.report)
        (self.out / "index.html").write_text(render(self.page), encoding="utf-8")

    def _page(self, dtype: str) -> Page:
        args, size = self.args, " × ".join(map(str, self.args.size))
        settings = (
            f"Clips are {size} pixels, sampled in {args.steps} Euler steps of flow matching with guidance "
            f"{args.guidance:g}, in {dtype} on the {'GPU' if self.device.type == 'cuda' else 'CPU'}."
        )
        cards = [
            MaskCard(mask.key, mask.density(self.grid), f"masks/{slug(mask.key)}.svg", sentence(mask))
            for mask in self.masks
        ]
        page = Page(
            self.report.command,
            settings,
            self.report.gpu if self.device.type == "cuda" else results.machine(self.device),
            self.report.versions,
            self.report.date,
            args.size,
            self.captions,
            cards,
            self.grid.shape,
        )
        page.todo = [f"clips under {mask.key}" for mask in self.masks]
        page.todo += ["timings of the sampler's step"] if args.rounds else []
        page.todo += ["timings of two Wan 1.3B layers"] if args.rounds and self.device.type == "cuda" else []
        return page

    def _plan(self) -> tuple[dict[str, str], dict[Mask, str]]:
        """Choose implementations: of all operations but attention, and of attention under each mask."""
        rest, reasons = around_attention(lambda impl: one_step(self.model, self.shape, self.ids, self.valid, impl))
        self.page.notes += [f"sampling: {reason}" for reason in reasons]
        chosen = {}
        for mask in self.masks:

            def attempt(name: str, mask: Mask = mask) -> None:
                one_step(self.model, self.shape, self.ids, self.valid, {"attention": name, **rest}, mask)

            chosen[mask] = serving(attempt)[0][0]
        return rest, chosen

    def _draw_masks(self) -> None:
        for mask, card in zip(self.masks, self.page.masks, strict=True):
            path = self.out / card.picture
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(mask.draw(Grid(*self.grid.shape)), encoding="utf-8")

    def _time(self, rest: dict[str, str], tick: Any) -> None:
        timings = Timings(rounds=self.args.rounds, budget=8.0, tick=tick)
        if self.device.type == "cuda":
            tick("measuring what the GPU reaches")
            top = results.ceilings(self.device)
            self.report = replace(self.report, cublas_tflops=top.matmul, copy_tbps=top.copy)
        timings.steps(self.model, self.shape, self.ids, self.valid, self.args.guidance, self.masks, rest)
        self._timed(timings, "timings of the sampler's step")
        if self.device.type == "cuda":
            timings.layers(self.device)
            self._timed(timings, "timings of two Wan 1.3B layers")

    def _timed(self, timings: Timings, stage: str) -> None:
        self.report.results = list(timings.results)
        self.page.report = self.report
        self.page.notes += [note for note in timings.notes + timings.wrong if note not in self.page.notes]
        self.wrong = timings.wrong
        self._done(stage)

    def _done(self, stage: str) -> None:
        self.page.todo.remove(stage)
        self.write()


def one_step(
    model: dit.DiT,
    shape: tuple[int, ...],
    ids: Tensor,
    valid: Tensor,
    impl: dict[str, str],
    mask: Mask | None = None,
) -> None:
    """Sample one clip in one step: the smallest call that asks the implementations what sampling asks them."""
    with accelerate(model, impl=impl):
        sample(model, (1, *shape[1:]), text=ids[:1], text_valid=valid[:1], steps=1, mask=mask, seed=0, impl=impl)


def judge(video: Tensor, captions: list[str]) -> list[list[tuple[str, str, str]]]:
    """Compare each clip with its caption: lists of (what, asked, seen), without what a caption leaves open.

    video: [B, 3, T, H, W] in [-1, 1]. What is asked is the first colour, shape and direction of motion that the caption
    names.
    """
    seen = checks.classify(video)
    verdicts = []
    for i, caption in enumerate(captions):
        words = caption.lower().replace(",", " ").split()
        moves = words[words.index("moves") + 1 :] if "moves" in words else []
        found = []
        for what, names, ids, among in (
            ("colour", world.COLOURS, seen.colours, words),
            ("shape", world.SHAPES, seen.shapes, words),
            ("sets out", world.DIRECTIONS, seen.directions, moves[:1]),
        ):
            asked = next((word for word in among if word in names), None)
            if asked is not None:
                found.append((what, asked, names[ids[i]] if ids[i] >= 0 else "nothing"))
        verdicts.append(found)
    return verdicts


def token_grid(size: tuple[int, int, int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the token grid of a video. Raises ValueError where the patch does not divide the size."""
    if any(n % p for n, p in zip(size, patch, strict=True)):
        raise ValueError(f"size={size} must be a multiple of the model's patch {patch}")
    t, h, w = (n // p for n, p in zip(size, patch, strict=True))
    return t, h, w


def slug(text: str) -> str:
    """Turn text into a file name's part: lower-case words joined by dashes, at most 48 characters."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].rstrip("-") or "x"


def sentence(mask: Mask) -> str:
    """Describe a mask in a sentence, empty for combinations."""
    name = mask.key.split("(")[0]
    return {
        "full": "Every query sees every key.",
        "spatial": "A query sees its own frame only.",
        "temporal": "A query sees its own place in all frames.",
        "window": "A query sees a box of tokens around it, shifted inwards at the borders: all boxes have one size.",
        "sliding_tile": "A query sees whole tiles around its own tile, so that all queries of a tile share their keys.",
        "frame_causal": "A query sees its own frames and earlier ones.",
        "radial": "A query sees a box that narrows with the distance in time.",
    }.get(name, "")


def _psnr(a: Tensor, b: Tensor) -> float | None:
    """Return the peak signal-to-noise ratio in dB of two videos in [-1, 1]; None when they are equal."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean().item()
    return None if error == 0 else -10 * torch.tensor(error / 4).log10().item()
