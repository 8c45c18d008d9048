"""`stattn bench`: measure operations, attention, a denoising step or a whole sample of a named model."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stattn.bench.models import ModelShape

WHAT = ("ops", "attention", "step", "sampler")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stattn bench`."""
    from stattn.cli import positive

    parser.add_argument("what", choices=WHAT, help="what to measure")
    parser.add_argument("--shape", metavar="NAME", help="model and clip; default: wan2.1-1.3b-480p, on a CPU wan-small")
    parser.add_argument("--layers", type=positive, help="number of the model's layers to use (default: all)")
    parser.add_argument(
        "--contenders",
        metavar="A,B",
        help="default: all that this machine runs; `list` names them; also stattn-MASK, as 'stattn-window(5, 9, 17)'",
    )
    parser.add_argument("--frames", metavar="3,6,9", help="attention: at each of these numbers of token frames")
    parser.add_argument("--steps", type=positive, default=50, help="of a sample (default: 50)")
    parser.add_argument("--rounds", type=positive, help="how many times each contender is timed")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--out", metavar="FILE", help="results file to write, or to add to (default: build/results/WHAT.json)"
    )


def main(args: argparse.Namespace) -> int:
    """Measure, write the results file and print it as a table; 1 where a contender computes something else."""
    import torch

    from stattn import results
    from stattn.bench import models, runs

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = args.shape or ("wan2.1-1.3b-480p" if device == "cuda" else "wan-small")
    if name not in models.SHAPES:
        raise ValueError(f"--shape {name!r} must be one of {', '.join(models.SHAPES)}")
    shape = models.SHAPES[name].of_layers(args.layers)
    wanted = models.names(shape, device)
    if args.contenders == "list":
        print("\n".join(wanted))
        return 0
    if args.contenders is not None:
        asked = _split(args.contenders)
        unknown = [each for each in asked if each not in wanted and models.own_mask(each, shape) is None]
        if unknown:
            raise ValueError(f"--contenders {','.join(unknown)}: here there are {', '.join(wanted)}")
        wanted = asked
    if args.contenders is None and shape.grid.globals:
        wanted = [each for each in wanted if not each.startswith("flex") and each != "diffusers"]
    if args.frames is not None and args.what != "attention":
        raise ValueError(f"--frames {args.frames} is for attention, not for {args.what}")
    if args.rounds is not None and args.what == "sampler":
        raise ValueError(f"--rounds {args.rounds}: a sample is timed once")
    if args.what == "sampler" and device == "cuda":
        # Products of linear layers that clear no workspace leave no gaps in a graph. PyTorch reads this once, when it
        # first multiplies; the report tells it, and it holds for all contenders.
        os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "0")
    options = {} if args.rounds is None else {"rounds": args.rounds}
    out = Path(args.out or f"build/results/{args.what}.json")
    report = results.new_report(args.command_line, device)
    try:
        if args.what == "ops":
            runs.measure_ops(report, shape, device, **options)
        elif args.what == "attention":
            for each in [shape] if args.frames is None else _lengths(shape, args.frames):
                runs.measure_attention(report, each, wanted, device, **options)
        elif args.what == "step":
            runs.measure_step(report, shape, wanted, device, **options)
        else:
            runs.measure_sampler(report, shape, wanted, device, steps=args.steps)
    except runs.WrongResult as error:
        print(f"stattn bench: {error}; nothing was written", file=sys.stderr)
        return 1
    results.write(out, report)
    print(results.markdown(report))
    print(out)
    return 0


def _split(names: str) -> list[str]:
    """Split a list at the commas that stand in no parentheses."""
    depth, found = 0, [""]
    for letter in names:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [each.strip() for each in found]


def _lengths(shape: ModelShape, frames: str) -> list[ModelShape]:
    """Return the shape with other numbers of frames, named by their grids."""
    from dataclasses import replace

    from stattn.cli import positive

    found = []
    for count in map(positive, frames.split(",")):
        other = replace(shape, size=(count * shape.config.patch[0], *shape.size[1:]))
        found.append(replace(other, name="x".join(map(str, other.grid.shape))))
    return found
