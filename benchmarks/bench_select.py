"""Selection of key tiles, and what is made of its lists, beside the same in PyTorch on the same tensors.

    python -m pytest benchmarks/bench_select.py --results benchmarks/results/h200
    python -m benchmarks.bench_select          # on a GPU: every CONFIG of every kernel, as a table

The shape is 30 x 48 x 80 = 115,200 tokens, 24 heads of 128, in tiles of 2 x 4 x 8 = 64: 1,800 x 1,800 pairs a head.
Names are select/<operation>/<shape> for this package and select/<other>/<operation>/<shape> for the others: reference
is impl="reference", torch is a view, a mean, a matrix product and torch.topk as one would write them for tiles that
divide the grid, and copy is ``copy_`` of as many bytes as q and k hold, half read and half written. Lists are compared
with float64 scores, or with the reference's, before anything is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import stattn
from stattn import BlockList, masks, results
from stattn.blocks import join, transpose
from stattn.grid import Grid, Triple
from stattn.masks import FULL
from stattn.reference.select import tile_means

GRID = Grid(30, 48, 80)
TILE: Triple = (2, 4, 8)
HEADS, DIM, TILES, KEEP, MASS = 24, 128, 1800, 162, 0.5
MASK = masks.sliding_tile((6, 8, 8), (3, 3, 3))
SHAPE = "115200_tiles64"


@pytest.fixture(autouse=True)
def _gpu(device: str) -> None:
    if device != "cuda":
        pytest.skip("measures the GPU, this machine has none")


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Random q and k [1, N, heads, D] in bf16, views of one projection. q is large, so that tiles differ in weight."""
    generator = torch.Generator("cuda").manual_seed(0)
    packed = torch.randn(1, GRID.video, 2, HEADS, DIM, device="cuda", dtype=torch.bfloat16, generator=generator)
    packed[:, :, 0] *= 64
    return packed[:, :, 0], packed[:, :, 1]


def assert_selected(blocks: BlockList, q: torch.Tensor, k: torch.Tensor, mass: float | None) -> None:
    """Compare some heads with float64: no tile that is left out beats one that is kept, and the mass is just held."""
    chosen = blocks.kinds() == FULL
    for head in range(0, HEADS, 7):
        q_means, k_means = (tile_means(x[:, :, head : head + 1].double(), GRID, TILE)[0, 0] for x in (q, k))
        scores = q_means @ k_means.T
        slack = 32 * torch.finfo(torch.float32).eps * float((q_means.abs() @ k_means.abs().T).max())
        taken = chosen[0, head]
        least = scores.masked_fill(~taken, math.inf).amin(-1)
        best = scores.masked_fill(taken, -math.inf).amax(-1)
        assert (least >= best - slack).all(), (
            f"head {head}: a tile is left out that is better by {(best - least).max()}"
        )
        if mass is None:
            assert (taken.sum(-1) == KEEP).all()
            continue
        weights = (scores / math.sqrt(DIM)).softmax(-1)
        held = (weights * taken).sum(-1)
        without = held - weights.masked_fill(~taken, math.inf).amin(-1)
        assert (held >= mass - 1e-5).all(), f"head {head}: {held.min()} of the mass"
        assert (without < mass + 1e-5).all(), f"head {head}: a tile too many"


def by_torch(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Choose tiles by torch.topk, for tiles that divide the grid."""
    (t, h, w), (a, b, c) = GRID.shape, TILE
    means = [
        x.view(1, t // a, a, h // b, b, w // c, c, HEADS, DIM).mean((2, 4, 6), dtype=torch.float32) for x in (q, k)
    ]
    q_means, k_means = (x.flatten(1, 3).transpose(1, 2) for x in means)
    return (q_means @ k_means.transpose(-1, -2)).topk(KEEP).indices.sort(-1).values.to(torch.int32)


def measure(
    benchmark: Any, report: results.Report, contenders: dict[str, Callable[[], Any]], baseline: str, rounds: int = 10
) -> None:
    """Time the contenders in interleaved rounds and record each beside the baseline."""
    timings = results.time_contenders(contenders, device="cuda", rounds=rounds, warmup=2, budget=6)
    for name, timing in timings.items():
        beside = None if name == baseline else (baseline, timings[baseline])
        report.results.append(results.Result.of(name, timing, baseline=beside, checked=True))
    first = next(iter(contenders.values()))

    def run() -> None:
        first()
        torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=3, iterations=1)


@pytest.mark.gpu
def test_top_k(benchmark: Any, report: results.Report) -> None:
    q, k = tokens()
    shape = f"{SHAPE}_keep{KEEP}"
    source, target = torch.empty_like(q.contiguous()), torch.empty_like(q.contiguous())
    select = partial(stattn.top_k, q, k, GRID, TILE, TILE, KEEP)
    for impl in ("triton", "reference"):
        assert_selected(select(impl=impl), q, k, None)
    blocks = select(impl="triton")
    assert_selected(BlockList(GRID.shape, TILE, TILE, blocks.count, by_torch(q, k)), q, k, None)
    contenders: dict[str, Callable[[], Any]] = {
        f"select/top_k/{shape}": partial(select, impl="triton"),
        f"select/reference/top_k/{shape}": partial(select, impl="reference"),
        f"select/torch/top_k/{shape}": partial(by_torch, q, k),
        f"select/copy/top_k/{shape}": partial(target.copy_, source),
    }
    measure(benchmark, report, contenders, f"select/reference/top_k/{shape}")


@pytest.mark.gpu
def test_top_p(benchmark: Any, report: results.Report) -> None:
    q, k = tokens()
    shape = f"{SHAPE}_mass{round(100 * MASS)}"
    select = partial(stattn.top_p, q, k, GRID, TILE, TILE, MASS)
    for impl in ("triton", "reference"):
        assert_selected(select(impl=impl), q, k, MASS)
    contenders = {
        f"select/top_p/{shape}": partial(select, impl="triton"),
        f"select/reference/top_p/{shape}": partial(select, impl="reference"),
    }
    measure(benchmark, report, contenders, f"select/reference/top_p/{shape}")


@pytest.mark.gpu
def test_transposition(benchmark: Any, report: results.Report) -> None:
    blocks = stattn.top_k(*tokens(), GRID, TILE, TILE, KEEP)
    flags = torch.rand(blocks.index.shape, device="cuda") < 0.5
    shape = f"{SHAPE}_keep{KEEP}"
    run = partial(transpose, blocks.count, blocks.index, flags, TILES)
    got, want = run(impl="triton"), run(impl="reference")
    for one, other in zip(got, want, strict=True):  # each row is full: nothing lies behind the last list
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    contenders = {
        f"select/transpose/{shape}": partial(run, impl="triton"),
        f"select/reference/transpose/{shape}": partial(run, impl="reference"),
    }
    measure(benchmark, report, contenders, f"select/reference/transpose/{shape}")


@pytest.mark.gpu
def test_joining_a_mask(benchmark: Any, report: results.Report) -> None:
    blocks = stattn.top_k(*tokens(), GRID, TILE, TILE, KEEP)
    shape = f"{SHAPE}_keep{KEEP}_sliding_tile_333"
    run = partial(join, blocks, MASK)
    got, want = run(impl="triton"), run(impl="reference")
    for name in ("count", "index", "partial"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    contenders = {
        f"select/join/{shape}": partial(run, impl="triton"),
        f"select/reference/join/{shape}": partial(run, impl="reference"),
    }
    measure(benchmark, report, contenders, f"select/reference/join/{shape}")


def main() -> None:
    """Time every CONFIG of every kernel, and the three kernels of a selection one by one."""
    from stattn.kernels import blocks as block_kernels
    from stattn.kernels import select as kernels

    q, k = tokens()
    calls: dict[str, Callable[[], Any]] = {}
    for number, config in enumerate(kernels.CONFIGS):
        run = partial(kernels.select, q, k, GRID.shape, TILE, TILE)
        calls[f"top_k, config {number}"] = partial(run, KEEP, None, config)
        calls[f"top_p, config {number}"] = partial(run, None, MASS, config)
        calls[f"means of q, config {number}"] = partial(kernels.means, q, GRID.shape, TILE, config)
    blocks = stattn.top_k(q, k, GRID, TILE, TILE, KEEP)
    flags = torch.rand(blocks.index.shape, device="cuda") < 0.5
    for number, each in enumerate(block_kernels.CONFIGS):
        lists = (blocks.count, blocks.index, flags)
        calls[f"transpose, config {number}"] = partial(block_kernels.transpose, *lists, TILES, each)
    for name, timing in results.time_contenders(calls, device="cuda", rounds=10).items():
        print(f"{name:24} {timing.median:8.3f} ms", flush=True)
    for row in profile(partial(kernels.select, q, k, GRID.shape, TILE, TILE, KEEP, None)):
        print(row, flush=True)


def profile(call: Callable[[], Any]) -> list[str]:
    """Say how long each kernel of a call takes, its launches summed."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return [f"{each.key:24} {each.device_time_total / 1e3:8.3f} ms" for each in profiler.key_averages()]


if __name__ == "__main__":
    main()
