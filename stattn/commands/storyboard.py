"""`stattn storyboard`: a long video of an object that follows a plot, keyframes first."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from stattn import dit, results
from stattn.studies.story import judge
from stattn.video import files, long
from stattn.video.paint import Sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stattn storyboard`."""
    from stattn.cli import count, positive, triple

    parser.add_argument("out", metavar="OUT.mp4", help="the video; a lossless file and OUT.json are written beside it")
    parser.add_argument(
        "--caption", default="a red disc moves left, camera static", help="what is seen (default: %(default)s)"
    )
    parser.add_argument(
        "--plot",
        default="left, right, left",
        help="directions in which the object moves, in order (default: %(default)s)",
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="length, at ten keyframes per minute (default: 1)")
    parser.add_argument(
        "--stride",
        type=positive,
        default=1,
        help="factor on the number of frames; above 1 adds a second level of windows (default: 1)",
    )
    parser.add_argument(
        "--follow",
        type=float,
        default=0.8,
        help="strength of repainting between keyframes; 1 leaves their path to the model (default: 0.8)",
    )
    parser.add_argument("--model", default="tiny", metavar="NAME", help="shipped weights, or a .safetensors file")
    parser.add_argument("--steps", type=positive, default=16, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=1.5, help="default: %(default)s")
    parser.add_argument("--seed", type=count, default=0)
    parser.add_argument("--size", type=triple, default=(16, 64, 64), metavar="T,H,W", help="of a window")
    parser.add_argument("--batch", type=positive, default=8, help="windows at once (default: 8)")
    parser.add_argument("--lossless", choices=files.LOSSLESS, default="ffv1")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def main(args: argparse.Namespace) -> int:
    """Tell the story, write it, and say what was measured."""
    files.out_path(args.out)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = dit.load(args.model, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)
    sampling = Sampling(steps=args.steps, guidance=args.guidance, seed=args.seed, size=args.size, overlap=1)
    began = time.perf_counter()
    story = long.tell(
        model,
        args.caption,
        long.parse_plot(args.plot),
        sampling,
        minutes=args.minutes,
        stride=args.stride,
        follow=args.follow,
        batch=args.batch,
    )
    seconds = time.perf_counter() - began
    fps = (story.video.shape[1] - 1) / (60 * args.minutes)
    found = {
        "command": args.command_line,
        "machine": results.machine(device),
        "versions": results.versions(),
        "seconds": round(seconds, 1),
        "fps": fps,
        **judge(story, args.caption),
    }
    beside = Path(args.out).with_suffix(".json")
    beside.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for path in [beside, *files.write_result(args.out, story.video, fps, lossless=args.lossless)]:
        print(f"wrote {path}")
    print(json.dumps(found, indent=2))
    return 0
