"""Tiny calls of the kernels of attention, one of each kind, to be watched by compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/tiny_calls.py

Prints how many there were. initcheck does not see what tensor copies write, so no other kernel may read that:
``--unread`` leaves results alone, and writes the output anew before its gradients. ``--gradients`` asks for those of
both ways as well, but of ring caches. ``--impl`` and ``--dims`` choose an implementation and head dimensions.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import torch

import stattn
from stattn import masks
from stattn.blocks import BlockList, block_list, lower
from stattn.grid import Grid, Region


def calls() -> Iterator[tuple[Grid, Any, dict[str, Any]]]:
    """Give grids, masks or lists, and the options of calls."""
    yield Grid(1, 1, 130), masks.full(), {}
    yield Grid(3, 5, 7), masks.window(3, 3, 3), {}
    yield Grid(4, 6, 6), masks.spatial() | masks.temporal() | masks.window(3, 3, 3), {}
    yield Grid(4, 6, 6), masks.sliding_tile((1, 2, 2), (3, 3, 3)), {}
    yield Grid(2, 9, 60), masks.spatial(), {}
    yield Grid(2, 9, 18), masks.window(2, 2, 3, dilation=(1, 2, 3)), {}
    yield Grid(3, 5, 7, 3, 70), masks.window(3, 3, 3), {"valid": (torch.arange(73) % 3 > 0)[None].cuda()}
    yield Grid(6, 4, 60), masks.frame_causal(2), {"q_region": Region((5, 0, 0), (1, 4, 60))}
    yield Grid(1, 2, 2000), masks.full(), {"q_region": Region((0, 0, 0), (1, 1, 90))}  # in pieces
    held = torch.tensor([-1, 3, 0, 5], dtype=torch.int32, device="cuda")
    yield Grid(6, 4, 5), masks.frame_causal(2), {"k_frames": held}
    for q_tile, k_tile in (((2, 4, 8), (2, 4, 8)), ((6, 8, 8), (2, 4, 4))):
        lists = lower(masks.window(3, 3, 3), (6, 8, 9), q_tile, k_tile, "cuda")
        yield Grid(6, 8, 9), lists, {}
    number = torch.arange(12, device="cuda")
    strangers = torch.where((number[:, None] + number) % 2 == 0, masks.FULL, masks.EMPTY).to(torch.int8)
    yield Grid(6, 8, 16), block_list((6, 8, 16), (2, 4, 8), (2, 4, 8), strangers[None, None]), {}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make tiny calls of attention for compute-sanitizer.")
    parser.add_argument("--unread", action="store_true", help="read no results")
    parser.add_argument("--gradients", action="store_true", help="compute gradients, too")
    parser.add_argument("--impl", default="cuda", help="implementation")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128], help="head dimensions")
    given = parser.parse_args()
    unread = given.unread
    count = 0
    for (grid, mask, options), dim in itertools.product(list(calls()), given.dims):
        rows = options["q_region"].video if "q_region" in options else grid.tokens
        columns = grid.tokens
        if "k_frames" in options:
            columns = len(options["k_frames"]) * grid.h * grid.w + grid.globals
        q = torch.randn(1, rows, 2, dim).to("cuda", torch.bfloat16)
        k, v = torch.randn(2, 1, columns, 1, dim).to("cuda", torch.bfloat16)
        out, lse = stattn.attention(q, k, v, grid, mask, return_lse=True, impl=given.impl, **options)
        assert not lse.isnan().any()
        assert unread or out.isfinite().all()
        assert isinstance(mask, BlockList) or mask.key
        for way in (True, False) if given.gradients and "k_frames" not in options else ():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = stattn.attention(*leaves, grid, mask, deterministic=way, impl=given.impl, **options)
            if unread:
                out.data.zero_()
            found = torch.autograd.grad(out, leaves, torch.randn(out.shape).to(out))
            assert unread or all(x.isfinite().all() for x in found)
        count += 1
    torch.cuda.synchronize()
    print(f"{count} calls")


if __name__ == "__main__":
    main()
