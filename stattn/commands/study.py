"""`stattn study`: experiments about video, each with its numbers, a plot, and the command that made them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stattn import dit, results
from stattn.recipes import PRESETS
from stattn.studies import consistency, edits, length, story
from stattn.video import media
from stattn.video.paint import Sampling

Found = tuple[dict[str, Any], Callable[[], None]]  # numbers, and what draws them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the studies and their options."""
    from stattn.cli import positive

    studies = parser.add_subparsers(dest="study", required=True, metavar="study")
    child = studies.add_parser("edits", help="check edits by what they ask for, and a stale cache by its error")
    child.set_defaults(work=_edits)
    child.add_argument("--clips", type=positive, default=16, help="default: 16")
    child.add_argument("--steps", type=positive, default=16, help="of sampling (default: 16)")
    child = studies.add_parser("story", help="check interpolation, and long videos by their script")
    child.set_defaults(work=_story)
    child.add_argument("--clips", type=positive, default=128, help="to interpolate (default: 128)")
    child.add_argument("--stories", type=positive, default=6, help="default: 6")
    child.add_argument("--minutes", type=float, default=1.0, help="of each story (default: 1)")
    child.add_argument("--steps", type=positive, default=16, help="of sampling (default: 16)")
    child = studies.add_parser("length", help="time longer videos, in windows and in one piece")
    child.set_defaults(work=_length)
    child.add_argument("--windows", type=positive, nargs="+", default=[1, 2, 3, 4, 6], metavar="N")
    child.add_argument("--rounds", type=positive, default=3, help="timings, of which the median counts (default: 3)")
    child = studies.add_parser("consistency", help="train and sample with full, windowed and per-frame attention")
    child.set_defaults(work=_consistency)
    child.add_argument("--steps", type=positive, default=1500, help="of each training (default: 1500)")
    child.add_argument("--seeds", type=positive, default=3, help="trainings of each kind (default: 3)")
    child.add_argument("--clips", type=positive, default=128, help="sampled of each (default: 128)")
    child.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="make every N-th training from the I-th, for several GPUs; those in --out are not repeated",
    )
    child.add_argument("--smoke", action="store_true", help="a tiny model, a few steps: only the machinery")
    for child in studies.choices.values():
        child.add_argument("--model", default="tiny", metavar="NAME", help="shipped weights, or a .safetensors file")
        child.add_argument("--out", type=Path, default=None, metavar="DIR", help="default: out/study-NAME")
        child.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def main(args: argparse.Namespace) -> int:
    """Run a study and write NAME.json and NAME.png."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    out = args.out if args.out is not None else Path("out") / f"study-{args.study}"
    out.mkdir(parents=True, exist_ok=True)
    done = args.work(args, device, out)
    if done is None:
        print(f"this part is done; the command without --part finishes {out} when all parts are there")
        return 0
    found, draw = done
    record = {
        "command": args.command_line,
        "machine": results.machine(device),
        "versions": results.versions(),
        **found,
    }
    (out / f"{args.study}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in found.items() if key != "recipe"}, indent=2))
    draw()
    print(f"wrote {out / args.study}.json and .png")
    return 0


def _model(args: argparse.Namespace, device: torch.device) -> Any:
    return dit.load(args.model, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)


def _edits(args: argparse.Namespace, device: torch.device, out: Path) -> Found:
    found, shown = edits.study(_model(args, device), args.clips, Sampling(steps=args.steps))
    names = ["given", "recoloured", "moved", "inpainted", "object removed", "outpainted"]

    def draw() -> None:
        media.contact_sheet(out / "clips.png", shown[: 4 * len(names)], captions=(names * 4)[: len(shown)], scale=2)
        edits.plot(found, out / "edits.png")

    return found, draw


def _story(args: argparse.Namespace, device: torch.device, out: Path) -> Found:
    model, sampling = _model(args, device), Sampling(steps=args.steps)
    found, videos = story.study(model, args.clips, args.stories, sampling, minutes=args.minutes)
    return found, lambda: story.plot(videos, out / "story.png")


def _length(args: argparse.Namespace, device: torch.device, out: Path) -> Found:
    found = length.study(_model(args, device), args.windows, rounds=args.rounds)
    if len(args.windows) > 2:
        found["exponents"] = length.exponents(found)
    return found, lambda: length.plot(found, out / "length.png")


def _consistency(args: argparse.Namespace, device: torch.device, out: Path) -> Found | None:
    recipe = dataclasses.replace(consistency.RECIPE)
    options = {"steps": args.steps, "seeds": args.seeds, "clips": args.clips, "sampling_steps": 20}
    if args.smoke:
        small = dataclasses.replace(PRESETS["smoke"].model, patch=(1, 8, 8))
        recipe = dataclasses.replace(recipe, model=small, batch=4, warmup=2)
        options = {"steps": 2, "seeds": 2, "clips": 4, "sampling_steps": 2}
    studied = consistency.study(**options, device=device, recipe=recipe, out=out, part=args.part)
    if studied is None:
        return None
    found, shown = studied
    names = [f"{kind}" for kind, clips in shown.items() for _ in clips]

    def draw() -> None:
        media.contact_sheet(out / "clips.png", torch.cat(list(shown.values())), captions=names, columns=16)
        consistency.plot(found, out / "consistency.png")

    return found, draw


def _part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} must be I/N, with I in 1..N")
    return int(number), int(of)
