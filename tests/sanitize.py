"""Run the CUDA kernels of attention under compute-sanitizer: small calls of every kind, forward and both backwards.

    python tests/sanitize.py --record benchmarks/results/h200/cuda_sanitizer.json

Memory is not pooled there, so that an access beside a tensor is one outside all memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

import stattn
from stattn import masks, results
from stattn.grid import Grid, Region

TOOLS = ("memcheck", "synccheck", "racecheck")


def calls() -> int:
    """Call attention with gradients in every way that reaches other code of the kernels; returns how often."""
    cases = [
        (Grid(1, 1, 200), masks.full(), {}),
        (Grid(3, 5, 7), masks.window(3, 3, 3), {}),
        (Grid(3, 5, 20), masks.window(2, 3, 5, dilation=(1, 1, 2)), {}),
        (Grid(4, 6, 8), masks.sliding_tile((2, 3, 4), (1, 1, 2)), {}),
        (Grid(3, 5, 7, 3, 70), masks.spatial() | masks.temporal(), {"valid": True}),
        (Grid(4, 6, 6), masks.window(3, 3, 3), {"q_region": Region((1, 2, 0), (2, 3, 6))}),
    ]
    count = 0
    for grid, mask, options in cases:
        for dim, dtype, way in ((64, torch.float16, True), (128, torch.bfloat16, True), (128, torch.bfloat16, False)):
            given = dict(options)
            if given.pop("valid", False):
                given["valid"] = torch.arange(grid.globals, device="cuda")[None].expand(2, -1) % 3 > 0
            region = given.get("q_region")
            queries = region.video if region else grid.tokens
            q = torch.randn(2, queries, 4, dim, device="cuda", dtype=dtype, requires_grad=True)
            k, v = (
                torch.randn(2, grid.tokens, 2, dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)
            )
            out, lse = stattn.attention(q, k, v, grid, mask, return_lse=True, deterministic=way, impl="cuda", **given)
            finite = torch.where(lse.isinf(), 0, lse)
            (out.float().square().sum() + finite.sum()).backward()
            assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
            count += 1
    torch.cuda.synchronize()
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="write what was found, as JSON")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS))
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        print(f"{calls()} calls")
        return 0
    found = []
    for tool in options.tools:
        command = ["compute-sanitizer", "--tool", tool, sys.executable, __file__, "--inner"]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        )
        said = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", done.stdout)
        ran = re.search(r"(\d+) calls", done.stdout)
        errors = not said or not re.match(r"0 (errors|hazards)", said[-1]) or done.returncode != 0
        found.append({"tool": tool, "calls": int(ran[1]) if ran else 0, "summary": said[-1:] or ["none"]})
        print(found[-1], "FAILED" if errors else "clean", flush=True)
        if errors:
            print(done.stdout[-3000:], done.stderr[-1000:])
            return 1
    if options.record:
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "gpu": results.machine(),
            "versions": results.versions(),
            "tools": found,
        }
        options.record.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
