"""`stattn sample`: one clip from a caption into a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from stattn import dit, world
from stattn.accelerate import accelerate
from stattn.commands import demo
from stattn.commands.demo_timings import around_attention
from stattn.masks import parse
from stattn.sampler import FlowMatching, sample
from stattn.video import media

FORMATS = (".mp4", ".gif", ".png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stattn sample`."""
    from stattn.cli import count, positive

    parser.add_argument("--caption", required=True, help='for example "a red disc moves left, camera pans right"')
    parser.add_argument("--negative", metavar="CAPTION", help="guide away from this caption (default: from no caption)")
    parser.add_argument(
        "--mask", default="full()", metavar="KEY", help='for example "window(5, 5, 5)" (default: full())'
    )
    parser.add_argument("--dense-steps", type=count, default=0, metavar="N", help="number of first steps under full()")
    parser.add_argument("--out", required=True, metavar="FILE", help="ending in .mp4, .gif or .png (a contact sheet)")
    parser.add_argument("--scale", type=positive, help="factor to enlarge by (default: 4 for small clips)")
    parser.add_argument("--impl", default="auto", help="of attention (default: auto)")
    demo.add_sampling_arguments(parser, steps=positive, seed=count)


def main(args: argparse.Namespace) -> int:
    """Sample, write the file, and say what the clip was judged to show."""
    target = Path(args.out)
    if target.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {args.out!r} must end in {', '.join(FORMATS)}")
    for module, package in (("av", "PyAV"), ("PIL", "pillow"), ("tqdm", "tqdm")):
        media.extra(module, package)
    from tqdm import tqdm

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = dit.load(args.model, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)
    mask = parse(args.mask)
    mask.pack(demo.token_grid(args.size, model.config.patch))
    ids, valid = world.tokenize([args.caption], model.config.text_len, device=device)
    negative: dict[str, Any] = {}
    if args.negative is not None:
        words, real = world.tokenize([args.negative], model.config.text_len, device=device)
        negative = {"negative": words, "negative_valid": real}
    shape = (1, model.config.in_channels, *args.size)
    rest, reasons = around_attention(lambda impl: demo.one_step(model, shape, ids, valid, impl))
    for reason in reasons:
        print(reason, file=sys.stderr)
    impl = {"attention": args.impl, **rest}
    with tqdm(total=args.steps, unit="step") as bar, accelerate(model, impl=impl):
        video = sample(
            model,
            shape,
            text=ids,
            text_valid=valid,
            steps=FlowMatching(args.steps, args.shift),
            guidance=args.guidance,
            mask=mask,
            dense_steps=args.dense_steps,
            seed=args.seed,
            impl=impl,
            callback=lambda *_: bar.update(),
            **negative,
        )
    if target.suffix.lower() == ".mp4":
        media.write_mp4(target, video[0], fps=args.fps, scale=args.scale)
    elif target.suffix.lower() == ".gif":
        media.write_gif(target, video[0], fps=args.fps, scale=args.scale)
    else:
        media.contact_sheet(target, video, captions=[args.caption], scale=args.scale)
    for what, asked, seen in demo.judge(video, [args.caption])[0]:
        print(f"{what}: asked {asked}, seen {seen}")
    print(f"wrote {target}")
    return 0
