"""`stattn explain`: which implementation serves an attention call, and why the others do not."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stattn explain`."""
    from stattn.cli import count, positive, triple

    parser.add_argument(
        "--grid", type=triple, required=True, metavar="T,H,W", help="video tokens along time, height, width"
    )
    parser.add_argument("--before", type=count, default=0, metavar="N", help="global tokens before the video")
    parser.add_argument(
        "--after", type=count, default=0, metavar="N", help="global tokens after the video, text for example"
    )
    parser.add_argument(
        "--mask", default="full()", metavar="KEY", help='for example "window(7, 17, 17)" (default: full())'
    )
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--heads", type=positive, default=40)
    parser.add_argument("--key-heads", type=positive, help="heads of k and v, when fewer")
    parser.add_argument("--head-dim", type=positive, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--capability", type=capability, metavar="9.0", help="ask for a GPU of this compute capability, here or not"
    )
    parser.add_argument("--svg", metavar="FILE", help="draw what the middle query sees into this file")


def capability(text: str) -> tuple[int, int]:
    """Parse a compute capability like 9.0, for argparse."""
    found = re.fullmatch(r"(\d+)\.(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} must be a compute capability like 9.0")
    return int(found[1]), int(found[2])


def main(args: argparse.Namespace) -> int:
    """Print the table, and the share of pairs that the mask allows."""
    import torch

    import stattn

    t, h, w = args.grid
    grid = stattn.Grid(t, h, w, before=args.before, after=args.after)
    mask = stattn.masks.parse(args.mask)
    device = args.device
    if device is None and args.capability is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    heads, key_heads = args.heads, args.key_heads or args.heads
    dtype = getattr(torch, DTYPES[args.dtype])
    q, k = (
        torch.empty(args.batch, grid.tokens, n, args.head_dim, dtype=dtype, device="meta") for n in (heads, key_heads)
    )
    table = stattn.explain(q, k, k, grid, mask, device=device, capability=args.capability)
    density = mask.density(grid)
    pairs = grid.tokens**2
    flops = 4 * args.batch * heads * args.head_dim * pairs
    print(f"grid {'x'.join(map(str, grid.shape))}, {grid.tokens} tokens ({grid.globals} global), mask {mask.key}")
    print(
        f"density {100 * density:.3g} % of {pairs:.4g} pairs; forward {density * flops / 1e12:.4g} TFLOP"
        f" (dense {flops / 1e12:.4g})"
    )
    print()
    print(table)
    if args.svg:
        target = Path(args.svg)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(mask.draw(grid), encoding="utf-8")
        print(f"\nwrote {target}")
    return 0
