"""Attention by the CUDA kernels: dense beside cuDNN, masks by the time of the pairs they allow, on the same card.

    python -m pytest benchmarks/bench_attention_cuda.py --results benchmarks/results/h200

Every output is compared with float64 rows before it is timed. Names are attention/cuda/<mask>/<shape>; the baseline is
cuDNN on dense shapes, one's own dense attention of as many pairs on masks, and a copy of q, k, v and the output on
temporal attention. Where text lies beside a window, what the launches with it and without it visit is counted in pairs
of a query tile and a key box, and their time is given by the pair: those masks' names end in _pairs and _per_pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from attention_cases import random_lists, sta_lists
from torch.nn.attention import SDPBackend, sdpa_kernel

import stattn
from stattn import extension, masks, results
from stattn.blocks import BlockList, tile_of
from stattn.grid import Grid, Region
from stattn.masks import Mask
from stattn.ops import _cuda_plan
from stattn.problem import Problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or extension.why_not("cuda") is not None, reason="no Hopper GPU, or no library"
    ),
]
ROWS = 32


class Case(NamedTuple):
    """mask: or what makes block lists on a device. q_frames: the last frames only, as queries."""

    name: str
    grid: Grid
    heads: int
    dim: int
    mask: Mask | Callable[[str], BlockList]
    q_frames: int | None = None

    @property
    def q_region(self) -> Region | None:
        if self.q_frames is None:
            return None
        return Region((self.grid.t - self.q_frames, 0, 0), (self.q_frames, self.grid.h, self.grid.w))

    @property
    def queries(self) -> int:
        return self.grid.tokens if self.q_region is None else self.q_region.video


DENSE = (
    Case("dense_fwd/wan-1.3b-480p", Grid(21, 30, 52), 12, 128, masks.full()),
    Case("dense_fwd/cogvideox-5b", Grid(13, 30, 45), 48, 64, masks.full()),
    Case("dense_fwd/hunyuan-720p", Grid(33, 45, 80), 24, 128, masks.full()),
)
LATENT_720P = Grid(30, 48, 80)
WAN_720P = Grid(21, 45, 80)
COSMOS = Grid(24, 44, 80)
MASKED = (
    Case("blocks64_sta/30x48x80", LATENT_720P, 24, 128, sta_lists),
    Case("blocks64_random162/115200", LATENT_720P, 24, 128, random_lists),
    Case("frame_causal_query/self-forcing", Grid(21, 30, 52), 12, 128, masks.frame_causal(3), q_frames=3),
    Case("sta333/30x48x80", LATENT_720P, 24, 128, masks.sliding_tile((6, 8, 8), (3, 3, 3))),
    Case("window_18_24_24/30x48x80", LATENT_720P, 24, 128, masks.window(18, 24, 24)),
    Case("window_7_17_17/wan-14b-720p", WAN_720P, 40, 128, masks.window(7, 17, 17)),
    Case("cosmos90/24x44x80", COSMOS, 40, 128, masks.window(24, 12, 24, stride=(1, 4, 8))),
    Case("cosmos_dilated/24x44x80", COSMOS, 40, 128, masks.window(24, 4, 16, dilation=(1, 11, 5))),
    Case("cosmos_undilated/24x44x80", COSMOS, 40, 128, masks.window(24, 4, 16)),
    Case("spatial/wan-14b-720p", WAN_720P, 40, 128, masks.spatial()),
    Case("temporal/wan-14b-720p", WAN_720P, 40, 128, masks.temporal()),
    Case("frame_causal_3/wan-1.3b-480p", Grid(21, 30, 52), 12, 128, masks.frame_causal(3)),
    Case("window_7_15_15/hunyuan-720p", Grid(33, 45, 80), 24, 128, masks.window(7, 15, 15)),
    Case("joint_256/hunyuan-720p", Grid(33, 45, 80, 0, 256), 24, 128, masks.window(7, 15, 15)),
)
ALONE, JOINT = MASKED[-2:]


def tensors(case: Case) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, tokens, case.heads, case.dim) for tokens in (case.queries, case.grid.tokens, case.grid.tokens)]
    return tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) for shape in shapes)


def seen_by(case: Case, mask: Mask | BlockList, rows: torch.Tensor, head: int) -> torch.Tensor:
    """What rows of q see: booleans [rows, keys]."""
    if isinstance(mask, Mask):
        return mask.allowed(case.grid, rows + case.grid.tokens - case.queries).to("cuda")
    kinds = mask.kinds()[0, head % mask.count.shape[1]]
    return kinds[tile_of(case.grid, mask.q_tile, "cuda")[rows]][:, tile_of(case.grid, mask.k_tile, "cuda")] > 0


def assert_right(out: torch.Tensor, qkv: tuple[torch.Tensor, ...], case: Case, mask: Mask | BlockList) -> None:
    """Compare sampled rows, the first and the last with float64, and refuse more than rounding explains."""
    q, k, v = qkv
    chosen = torch.randperm(case.queries, generator=torch.Generator().manual_seed(1))[:ROWS]
    chosen = torch.cat([chosen, torch.tensor([0, case.queries - 1])])
    seen = seen_by(case, mask, chosen, 0)
    for head in range(0, case.heads, 7):
        if isinstance(mask, BlockList) and mask.count.shape[1] > 1:
            seen = seen_by(case, mask, chosen, head)
        scores = q[0, chosen, head].double() @ k[0, :, head].double().T / math.sqrt(case.dim)
        want = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[0, :, head].double()
        error = (out[0, chosen, head].double() - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error < 2 * torch.finfo(q.dtype).eps, f"{case.name}, head {head}: relative error {error:.2e}"


def measure(
    benchmark: Any, report: results.Report, contenders: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, results.Timing]:
    timings = results.time_contenders(contenders, device="cuda", rounds=rounds, warmup=2)
    first = next(iter(contenders.values()))
    benchmark.pedantic(lambda: (first(), torch.cuda.synchronize()), rounds=2, iterations=1)
    return timings


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_dense_attention_beside_cudnn(benchmark: Any, report: results.Report, case: Case) -> None:
    qkv = tensors(case)
    swapped = [x.transpose(1, 2) for x in qkv]

    def cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(*swapped).transpose(1, 2)

    ours, theirs = f"attention/cuda/{case.name}", f"attention/torch-cudnn/{case.name}"
    contenders = {ours: partial(stattn.attention, *qkv, case.grid, impl="cuda"), theirs: cudnn}
    for call in contenders.values():
        assert_right(call(), qkv, case, masks.full())
    timings = measure(benchmark, report, contenders, rounds=3 if case.grid.tokens > 100_000 else 15)
    report.results.append(results.Result.of(ours, timings[ours], baseline=(theirs, timings[theirs]), checked=True))
    report.results.append(results.Result.of(theirs, timings[theirs], checked=True))


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_masks_beside_dense_attention_and_a_copy(benchmark: Any, report: results.Report, case: Case) -> None:
    qkv = tensors(case)
    ours = f"attention/cuda/{case.name}"
    mask = case.mask if isinstance(case.mask, Mask) else case.mask("cuda")
    call = partial(stattn.attention, *qkv, case.grid, mask, q_region=case.q_region, impl="cuda")
    assert_right(call(), qkv, case, mask)
    contenders: dict[str, Callable[[], Any]] = {ours: call}
    if case.name.startswith("temporal"):
        other = "copy of q, k, v and out"  # as many bytes are read and written
        to = torch.empty_like(qkv[0]), torch.empty_like(qkv[0])
        contenders[other] = lambda: (to[0].copy_(qkv[0]), to[1].copy_(qkv[1]))
    else:
        # Dense attention of 32,760 tokens, its time scaled to the pairs of the mask.
        other = "dense attention of as many pairs"
        dense = Case("", Grid(21, 30, 52), 12, case.dim, masks.full())
        contenders[other] = partial(stattn.attention, *tensors(dense), dense.grid, impl="cuda")
    timings = measure(benchmark, report, contenders, rounds=7)
    beside = timings[other]
    if not case.name.startswith("temporal"):
        if isinstance(mask, BlockList):
            pairs = int(mask.count.sum()) * (case.heads // mask.count.shape[1]) * math.prod(mask.q_tile + mask.k_tile)
        elif case.q_frames is not None:  # the last frames see all that is before them
            pairs = case.queries * case.grid.tokens * case.heads
        else:
            pairs = mask.density(case.grid) * case.grid.tokens**2 * case.heads
        share = pairs / (dense.grid.tokens**2 * dense.heads)
        beside = results.Timing(tuple(sample * share for sample in beside.samples))
    report.results.append(results.Result.of(ours, timings[ours], baseline=(other, beside), checked=True))


def tile_pairs(case: Case) -> int:
    """Count the pairs of a query tile and a key box that a launch visits, by its plan."""
    assert isinstance(case.mask, Mask)
    everything = Region((0, 0, 0), case.grid.shape)
    problem = Problem(case.grid, (case.mask,), everything, everything, True, "all", 1.0)
    _, integers, array = _cuda_plan.layout(problem, case.heads, case.dim)
    records, tiles, (line_tiles, line_record) = array.reshape(-1, 4), integers[16], integers[20:22]
    lists = [*((first, tiles) for first in array[: case.heads]), *[(line_record, line_tiles)] * case.heads]
    return sum(int(records[first + 1 : first + 2 * count : 2, 1].sum()) for first, count in lists)


def test_text_beside_a_window_by_the_pairs_that_are_visited(benchmark: Any, report: results.Report) -> None:
    contenders: dict[str, Callable[[], Any]] = {}
    for case in (JOINT, ALONE):
        assert isinstance(case.mask, Mask)
        qkv = tensors(case)
        contenders[case.name] = partial(stattn.attention, *qkv, case.grid, case.mask, impl="cuda")
        assert_right(contenders[case.name](), qkv, case, case.mask)
    timings = measure(benchmark, report, contenders, rounds=15)
    pairs = {case.name: tile_pairs(case) for case in (JOINT, ALONE)}
    of_pair = {
        name: results.Timing(tuple(sample * 1e6 / pairs[name] for sample in timing.samples))
        for name, timing in timings.items()
    }
    for what, unit, of in (
        ("pairs", "pairs", {name: results.Timing((float(count),)) for name, count in pairs.items()}),
        ("per_pair", "ns", of_pair),
    ):
        ours, theirs = (f"attention/cuda/{case.name.replace('/', f'_{what}/')}" for case in (JOINT, ALONE))
        mine, other = of[JOINT.name], of[ALONE.name]
        baseline, ratio = results.Baseline(theirs, other.median), other.median / mine.median
        report.results.append(
            results.Result(ours, unit, mine.median, mine.p20, mine.p80, baseline, ratio, checked=True)
        )
