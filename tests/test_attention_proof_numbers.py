"""The proof of the Triton attention, on a GPU, continued: numbers against float64, and calls of production length.

python -m pytest -m gpu tests/test_attention_proof_numbers.py --record build/attention_proof_numbers.json
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from probes import Case, counts_by_axis
from test_attention import SHIFTS, assert_rule_1, check_shift, draw, largest_score, results
from test_attention_kernels import NUMBERS, check_numbers, gradients
from test_attention_proof import DEVICE, DTYPES, RUNS_FORWARD, Covered, configs, leave_runs, take_runs, use, use_first
from test_attention_runs import CASES as RUNS

import stattn
from stattn import masks, plan
from stattn.grid import Grid, Region, Triple
from stattn.kernels.attention import Config
from stattn.masks import CONSTRUCTORS, Mask

pytestmark = [pytest.mark.gpu, pytest.mark.apart]

# Production lengths.

LENGTHS: dict[Triple, tuple[Mask, ...]] = {
    (21, 30, 52): (masks.full(), masks.spatial() | masks.temporal(), masks.window(9, 13, 25, causal=True)),
    (21, 45, 80): (masks.window(7, 17, 17), masks.temporal(), masks.window(5, 9, 9, dilation=(2, 2, 3))),
    (30, 48, 80): (masks.sliding_tile((6, 8, 8), (3, 3, 3)), masks.window(1, 24, 40, stride=(1, 8, 8))),
    (33, 45, 80): (masks.radial(((0, None, None), (2, 21, 41), (8, 9, 9))), masks.frame_causal(3, 9, 3)),
}
CASES = [(shape, number) for shape, found in LENGTHS.items() for number in range(len(found))]


class Seen:
    """Which keys queries see, made on the device for a part of them at a time."""

    def __init__(self, mask: Mask, shape: Triple) -> None:
        self.shape = shape
        self.products = [[torch.from_numpy(r.matrix()).to(DEVICE) for r in p] for p in mask.products(shape)]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Booleans [len(rows), N]"""
        _, height, width = self.shape
        t, h, w = rows // (height * width), rows // width % height, rows % width
        table = torch.zeros(len(rows), *self.shape, dtype=torch.bool, device=DEVICE)
        for of_t, of_h, of_w in self.products:
            table |= of_t[t][:, :, None, None] & of_h[h][:, None, :, None] & of_w[w][:, None, None, :]
        return table.flatten(1)


def by_formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, seen: Seen, rows: torch.Tensor,
    keys: torch.Tensor,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Output, LSE and dQ of some rows, dK and dV of some keys, of one head [N, D], in the dtype of the tensors.

    Sums over chunks of queries are taken in fp32 at least: the formula's products and weights are what is rounded.
    """
    scale = 1 / math.sqrt(q.shape[1])
    total = torch.promote_types(q.dtype, torch.float32)
    dk, dv = (torch.zeros(len(keys), q.shape[1], dtype=total, device=DEVICE) for _ in range(2))

    def part(some: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = ((q[some] @ k.T) * scale).masked_fill(~seen(some), -torch.inf)
        lse = torch.logsumexp(scores, -1)
        p = torch.exp(scores - lse[:, None])
        out = p @ v
        return lse, p, out, (dout[some] * out).sum(-1, keepdim=True)

    for some in torch.arange(len(q), device=DEVICE).split(512):
        _, p, _, delta = part(some)
        mine = p[:, keys]
        ds = mine * (dout[some] @ v[keys].T - delta) * scale
        dv += mine.T @ dout[some]
        dk += ds.T @ q[some]
    lse, p, out, delta = part(rows)
    dq = (p * (dout[rows] @ v.T - delta) * scale) @ k
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def edges(mask: Mask, shape: Triple) -> torch.Tensor:
    """First and last rows of query tiles: 64 of them, with the first and the last of all."""
    box = Region((0, 0, 0), shape)
    config = configs("forward")[0]
    walk = plan.by_query(mask, Grid(*shape), box, box, config.rows, config.columns)
    axes = []
    for extent, tile, step in zip(walk.rows.extent, walk.tile, walk.steps, strict=True):
        x = np.arange(extent)
        place = x // step % tile
        axes.append(x[(place == 0) | (place == tile - 1) | (x == extent - 1)])
    chosen = [np.random.choice(axis, 64) for axis in axes]
    rows = np.ravel_multi_index(tuple(chosen), walk.rows.extent)
    return torch.from_numpy(np.unique([0, Grid(*shape).video - 1, *rows]))


def check_sampled(shape: Triple, mask: Mask, **given: Any) -> Covered:
    """Hold 64 rows and those at the edges of tiles, and the gradients of 64 keys, to rule 1."""
    n = Grid(*shape).video
    tensors = draw(1, n, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    dout = torch.randn_like(tensors[0])
    rows = torch.cat([torch.randint(n, (64,)), edges(mask, shape)]).unique().to(DEVICE)
    keys = torch.randint(n, (64,)).unique().to(DEVICE)
    out, lse, dq, dk, dv = gradients(tensors, dout, None, shape, mask, **given)
    got = {"out": out[0, rows, 0], "lse": lse[0, 0, rows], "dq": dq[0, rows, 0]}
    got |= {"dk": dk[0, keys, 0], "dv": dv[0, keys, 0]}
    flat = [x[0, :, 0] for x in (*tensors, dout)]
    seen = Seen(mask, shape)
    eager = by_formula(*flat, seen, rows, keys)
    exact = by_formula(*(x.double() for x in flat), seen, rows, keys)
    for name, value in got.items():
        rounded = eager[name].to(value.dtype)
        assert_rule_1(f"{mask} on {shape}: {name}", value, rounded, exact[name], largest_score(tensors))
    return {"tokens": n, "rows": len(rows), "keys": len(keys)}


@pytest.mark.parametrize("shape, number", CASES, ids=lambda value: str(value).replace(" ", ""))
def test_long_calls_are_within_rule_1_at_sampled_rows_and_keys(shape: Triple, number: int) -> Covered:
    return check_sampled(shape, LENGTHS[shape][number])


@pytest.mark.parametrize("shape", LENGTHS, ids=str)
def test_every_row_of_a_long_call_counts_its_keys(shape: Triple) -> Covered:
    n = Grid(*shape).video
    examples = [mask for constructor in CONSTRUCTORS.values() for mask in constructor.examples(shape)]
    covered = Counter[str]()
    for mask in [*LENGTHS[shape], *examples]:
        q, k, v = torch.zeros(1, n, 1, 128, device=DEVICE).bfloat16(), *draw(1, n, 1, 128, device=DEVICE)[:2]
        _, lse = stattn.attention(q, k.bfloat16(), v.bfloat16(), shape, mask, return_lse=True, impl="triton")
        counted = torch.exp(lse[0, 0].double())
        want = counts_by_axis(mask, Grid(*shape)).to(DEVICE)
        assert torch.equal(counted.round().long(), want), mask
        covered.update(masks=1, rows=n)
    return covered


def test_a_long_forward_takes_the_memory_of_its_output_and_lse() -> Covered:
    shape = (21, 45, 80)
    n, heads = Grid(*shape).video, 4
    q, k, v = draw(1, n, heads, 128, dtype=torch.bfloat16, device=DEVICE)
    for mask in LENGTHS[shape]:
        stattn.attention(q, k, v, shape, mask, impl="triton")  # plans stay
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, lse = stattn.attention(q, k, v, shape, mask, return_lse=True, impl="triton")
        taken = torch.cuda.max_memory_allocated() - before
        assert taken <= out.nbytes + lse.nbytes + (1 << 20)
    return {"masks": len(LENGTHS[shape])}


# Numbers.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", range(3))
def test_results_and_gradients_are_within_rule_1(part: int, dtype: str) -> Covered:
    chosen = list(NUMBERS.values())[part::3]
    with pytest.MonkeyPatch.context() as patch:
        for case, given in chosen:
            dim = max(16, 1 << (given.get("dim", 16) - 1).bit_length())
            with patch.context() as inner:
                use_first(inner, dim, 4 if dtype == "fp32" else 2)
                check_numbers(case, **(given | {"dtype": DTYPES[dtype], "device": DEVICE}))
    return {"calls": len(chosen)}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("place", RUNS_FORWARD)
def test_runs_are_within_rule_1(place: str, dim: int, dtype: str) -> Covered:
    with pytest.MonkeyPatch.context() as patch:
        served = take_runs(patch, place)
        for case, given in RUNS.values():
            check_numbers(case, **(given | {"dim": dim, "dtype": DTYPES[dtype], "device": DEVICE}))
    assert served["served"] == served["calls"] == 3 * len(RUNS)
    return {"calls": len(RUNS)}


def test_copies_of_boxes_of_128_rows_and_128_features_are_right() -> None:
    """Triton 3.6 gave wrong numbers for some tensor copies of that size, and said nothing."""
    for place in RUNS_FORWARD:  # the boxes of one are of that size
        with pytest.MonkeyPatch.context() as patch:
            take_runs(patch, place)
            if place == "runs forward":
                use(patch, place, Config(128, 128, 8, 2, (128,), 2, 1000.0))
            use(patch, "runs dq", Config(128, 128, 8, 2, (128,), 2, 1000.0))
            use(patch, "runs dkdv", Config(64, 128, 4, 2, (128,), 2, 1000.0))
            for mask in (masks.full(), masks.spatial()):
                check_numbers(Case(Grid(2, 15, 20), mask), dim=128, dtype=torch.bfloat16, device=DEVICE)


@pytest.mark.parametrize("dim", [40, 64, 80, 128, 192, 256])
def test_every_head_dimension_is_within_rule_1_in_every_dtype(dim: int) -> Covered:
    cases = [Case(Grid(5, 9, 11), masks.full()), Case(Grid(4, 9, 11, 0, 5), masks.window(3, 5, 5))]
    for case, dtype in itertools.product(cases, DTYPES.values()):
        check_numbers(case, batch=2, dim=dim, dtype=dtype, device=DEVICE)
    return {"calls": len(cases) * len(DTYPES)}


@contextmanager
def kernels_for(kind: str) -> Iterator[tuple[torch.dtype, Mask]]:
    """Let general kernels take a type, or those of runs whatever they serve; give the type and a mask for them."""
    with pytest.MonkeyPatch.context() as patch:
        served = take_runs(patch, kind) if kind in RUNS_FORWARD else leave_runs(patch)
        yield (torch.bfloat16, masks.full()) if kind in RUNS_FORWARD else (DTYPES[kind], masks.window(3, 5, 3))
    assert (served["served"] > 0) == (kind in RUNS_FORWARD)


@pytest.mark.parametrize("kind", ["bf16", "fp32", *RUNS_FORWARD])
def test_large_and_lone_values_stay_within_rule_1(kind: str) -> Covered:
    with kernels_for(kind) as (dtype, mask):
        return check_large_values(Case(Grid(4, 9, 9), mask), dtype)


def check_large_values(case: Case, dtype: torch.dtype) -> Covered:
    covered = Counter[str]()
    for size, spoil in itertools.product((1.0, 3.0, 30.0), ("none", "outlier", "one-hot")):
        q, k, v = (x * size for x in draw(1, case.grid.tokens, 2, 64, dtype=dtype, device=DEVICE))
        if spoil == "outlier":
            q[..., 3] *= 100
        if spoil == "one-hot":
            k[:, 7] *= 50
        dout = (torch.randn_like(q), torch.zeros(1, 2, case.grid.tokens, device=DEVICE))
        got, eager = (results(case, (q, k, v), dout, impl) for impl in ("triton", None))
        exact = results(case, (q.double(), k.double(), v.double()), dout, None)
        for name in got:
            rounded = eager[name].to(got[name].dtype)
            assert_rule_1(f"{spoil} x {size} {name}", got[name], rounded, exact[name], largest_score((q, k, v)))
        covered.update(calls=1)
    return covered


@pytest.mark.parametrize("kind", ["bf16", "fp32", *RUNS_FORWARD])
def test_a_shift_of_all_scores_changes_nothing(kind: str) -> Covered:
    lengths = (1, 63, 64, 65, 127, 128)
    with kernels_for(kind) as (dtype, _):
        for shift, tokens in itertools.product(SHIFTS, lengths):
            check_shift(shift, tokens, "triton", DEVICE, 64, truncated=64 // 8, dtype=dtype)
    return {"shifts": len(SHIFTS), "lengths": len(lengths)}


@pytest.mark.parametrize("kind", [*DTYPES, *RUNS_FORWARD])
def test_whole_numbers_are_summed_exactly(kind: str) -> None:
    with kernels_for(kind) as (dtype, _):
        q = torch.zeros(1, 1024, 1, 64, dtype=dtype, device=DEVICE)
        k = torch.randint(-2, 3, q.shape, device=DEVICE).to(dtype)
        v = torch.randint(-2, 3, q.shape, device=DEVICE) * (torch.rand(q.shape, device=DEVICE) < 0.3)
        out = stattn.attention(q, k, v.to(dtype), (4, 16, 16), impl="triton")
        assert torch.equal(out, (v.sum(1, keepdim=True).float() / 1024).to(dtype).expand_as(out))
