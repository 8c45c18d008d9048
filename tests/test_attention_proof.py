"""The proof of the Triton attention, on a GPU: masks bit by bit, numbers against float64.

    python -m pytest -m gpu tests/test_attention_proof.py --record benchmarks/results/h200/attention_proof.json

Memory, layout, order and graphs are in ``test_attention_proof_calls.py``. Tests run apart, several at a time, since
most of their time goes into compiling. What each covered is in the record, or in records of parts of them.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from probes import BIG_GRIDS, GRIDS, Case, check, counts_by_axis
from test_attention import (
    SHIFTS,
    assert_rule_1,
    check_shift,
    draw,
    largest_score,
    results,
)
from test_attention_kernels import (
    NUMBERS,
    check_numbers,
    gradients,
    listed,
    same,
)
from test_attention_runs import CASES as RUNS
from test_probes import REGIONS, UNIONS

import stattn
from stattn import masks, plan
from stattn.blocks import block_list, lower, tile_count
from stattn.grid import Grid, Region, Triple
from stattn.kernels import attention as forward
from stattn.kernels import attention_bwd as backward
from stattn.kernels import attention_runs as runs
from stattn.kernels import attention_runs_hopper as hopper
from stattn.kernels.attention import Config
from stattn.masks import CONSTRUCTORS, EMPTY, FULL, PARTIAL, Mask

pytestmark = [pytest.mark.gpu, pytest.mark.apart]
DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PLACES = {
    "forward": (forward, "CONFIGS"),
    "dq": (backward, "DQ_CONFIGS"),
    "dkdv": (backward, "DKDV_CONFIGS"),
    "runs forward": (runs, "CONFIGS"),
    "runs hopper": (hopper, "CONFIGS"),
    "runs dq": (runs, "DQ_CONFIGS"),
    "runs dkdv": (runs, "DKDV_CONFIGS"),
}
RUNS_FORWARD = ("runs forward", "runs hopper")
Covered = dict[str, int]


def configs(place: str) -> tuple[Config, ...]:
    module, name = PLACES[place]
    return getattr(module, name)


def use(patch: pytest.MonkeyPatch, place: str, *chosen: Config) -> None:
    """Let one kernel use these configs alone."""
    patch.setattr(*PLACES[place], chosen)


def use_first(patch: pytest.MonkeyPatch, dim: int, size: int) -> None:
    """Let each kernel use the first config that serves a head dimension, so that no two are compiled."""
    for place in PLACES:
        use(patch, place, *[c for c in configs(place) if dim in c.widths and c.bytes == size][:1])


def take_runs(patch: pytest.MonkeyPatch, chosen: str) -> Counter[str]:
    """Let the kernels of runs take all that they serve; count the launches that ask for them, and those they serve.

    chosen: the place of the forward pass.
    """
    served, choose = Counter[str](), runs.choose
    for place in PLACES:
        if place in RUNS_FORWARD and place != chosen:
            use(patch, place)
        elif place.startswith("runs"):
            use(patch, place, *(config._replace(rate=1000.0) for config in configs(place)))

    def noted(*given: Any) -> Any:
        made = choose(*given)
        served.update(calls=bool(given[4]), served=made is not None)
        return made

    patch.setattr(runs, "choose", noted)
    return served


def leave_runs(patch: pytest.MonkeyPatch) -> Counter[str]:
    """Let the general kernels take all calls."""
    for place in PLACES:
        if place.startswith("runs"):
            use(patch, place)
    return Counter()


def video(case: Case) -> int:
    return len(case.rows()) * len(case.columns()) * case.heads


# --- production lengths: proof 3 -------------------------------------------------------------------------------------

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


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_constructor_is_seen_as_it_is_on_awkward_grids(name: str, dtype: str) -> Covered:
    dim, covered = {"bf16": 128, "fp16": 64, "fp32": 64}[dtype], Counter[str]()
    for turn, shape in enumerate([*GRIDS, *BIG_GRIDS]):
        examples, tokens = CONSTRUCTORS[name].examples(shape), Grid(*shape).video
        for number, mask in enumerate(examples):
            part = len(examples) if tokens > 2048 else 1 if tokens <= 60 else min(4, len(examples))
            if number % part != turn % part:
                continue  # on larger grids some of the examples, others on each grid
            last = (tokens - 1) // dim
            only = None if tokens <= 2048 else sorted({0, last // 2, last})
            case = Case(Grid(*shape), mask, heads=1)
            check(case, impl="triton", device=DEVICE, dtype=DTYPES[dtype], dim=dim, only=only)
            covered.update(calls=1, pairs=video(case) if only is None else tokens * dim * len(only))
    return covered | {"grids": len(GRIDS + BIG_GRIDS)}


@pytest.mark.parametrize("dim, dtype", [(128, "bf16"), (64, "fp16")])
@pytest.mark.parametrize("name", ["full", "spatial", "frame_causal", "text"])
@pytest.mark.parametrize("place", RUNS_FORWARD)
def test_runs_are_seen_as_they_are_on_awkward_grids(place: str, name: str, dim: int, dtype: str) -> Covered:
    covered = Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        served = take_runs(patch, place)
        for turn, shape in enumerate([*GRIDS, *BIG_GRIDS]):
            tokens = Grid(*shape).video
            if shape == (7, 1, 1) and name != "full":
                continue  # no runs: a frame is a token
            if name == "text":
                before, after = ((0, 5), (3, 0), (70, 61))[turn % 3]
                see = ("all", "globals")[turn % 2]
                grid, options = Grid(*shape, before, after), {"globals_see": see}
                examples = [masks.frame_causal(1 + turn % 2), masks.spatial(), masks.full()][turn % 3 :][:1]
            else:
                grid, options, examples = Grid(*shape), {}, CONSTRUCTORS[name].examples(shape)
            examples = examples if tokens <= 60 else examples[turn % len(examples) :][:1]
            last = (tokens - 1) // dim
            only = None if tokens <= 2048 else sorted({0, last // 2, last})
            for mask in examples:
                case = Case(grid, mask, heads=1, options=options)
                check(case, impl="triton", device=DEVICE, dtype=DTYPES[dtype], dim=dim, only=only)
                covered.update(calls=1, pairs=video(case) if only is None else tokens * dim * len(only))
    assert served["served"] == served["calls"]
    covered["grids"] = turn + 1 - (name != "full")
    return covered


def telling() -> Iterator[Case]:
    """Cases for each config: each kind of mask on all grids, overlapping unions with global tokens, and block lists."""
    for number, constructor in enumerate(CONSTRUCTORS.values()):
        for turn, shape in enumerate(GRIDS):
            examples = constructor.examples(shape)
            yield Case(Grid(*shape), examples[(turn + number) % len(examples)], heads=1)
    yield Case(Grid(6, 7, 8, 3, 18), UNIONS[1], heads=1)
    yield Case(Grid(2, 5, 4), listed())


def of_runs() -> Iterator[Case]:
    """Cases for each config of the kernels of runs."""
    for shape in GRIDS:
        for mask in (masks.full(), masks.spatial(), masks.frame_causal(2), masks.window(shape[0] // 2 + 1, None, None)):
            if shape != (7, 1, 1) or mask == masks.full():  # no runs: a frame is a token
                yield Case(Grid(*shape), mask, heads=1)
    yield Case(Grid(3, 7, 8, 3, 18), masks.frame_causal(1), options={"globals_see": "globals"})


EVERY = [(place, index) for place in PLACES for index in range(len(configs(place)))]


@pytest.mark.parametrize("place, index", EVERY)
def test_every_config_sees_what_masks_allow_and_gives_the_same_bits_50_times(place: str, index: int) -> Covered:
    config, covered = configs(place)[index], Counter[str]()
    dim = config.widths[-1]
    dtype = torch.float32 if config.bytes == 4 else torch.bfloat16
    by_runs = place.startswith("runs")
    with pytest.MonkeyPatch.context() as patch:
        use_first(patch, dim, config.bytes)
        served = take_runs(patch, place if place in RUNS_FORWARD else RUNS_FORWARD[0]) if by_runs else leave_runs(patch)
        use(patch, place, config._replace(rate=1000.0) if by_runs else config)
        for case in of_runs() if by_runs else telling():
            check(case, impl="triton", device=DEVICE, dtype=dtype, dim=dim)
            covered.update(calls=1, pairs=video(case))
        grid, mask = Grid(6, 7, 8), masks.frame_causal(2) if by_runs else masks.window(3, 3, 5)
        tensors = draw(2, grid.tokens, 2, dim, dtype=dtype, device=DEVICE)
        dout = torch.randn_like(tensors[0])
        first = gradients(tensors, dout, None, grid, mask)
        for _ in range(50):
            assert same(gradients(tensors, dout, None, grid, mask), first)
            covered.update(reruns=1)
    assert served["served"] == served["calls"]
    return covered


def option_cases(kind: str) -> Iterator[Case]:
    """Calls with more than a mask."""
    last = [examples[-1] for c in CONSTRUCTORS.values() if (examples := c.examples((3, 5, 7)))]
    if kind == "globals":
        for (before, after), see, padded in itertools.product(
            ((3, 0), (0, 5), (2, 4), (70, 61)), ("all", "globals"), (False, True)
        ):
            valid = (torch.arange(before + after) % 3 != 1) if padded else None
            for mask in last:
                yield Case(Grid(3, 5, 7, before, after), mask, valid=valid, options={"globals_see": see})
        valid = torch.tensor([True, False, True, True])
        yield Case(Grid(3, 4, 5, 1, 3), masks.window(3, 3, 3), valid=valid, q_globals=False)
    if kind == "unions":
        for mask, shape in itertools.product(UNIONS, [(6, 7, 8), (7, 9, 10), (8, 8, 5)]):
            yield Case(Grid(*shape), mask, heads=1)
    if kind == "heads":
        yield Case(Grid(5, 6, 7, 0, 3), [masks.window(3, 3, 3), masks.spatial(), masks.frame_causal(2)] * 2, heads=6)
        yield Case(Grid(5, 6, 7), [UNIONS[0], masks.full(), masks.temporal()], heads=3)
    if kind == "regions":
        for (q_region, k_region), constructor in itertools.product(REGIONS, CONSTRUCTORS.values()):
            options = {"q_region": q_region, "k_region": k_region}
            for mask in {*constructor.examples((6, 7, 8))[:3], *constructor.examples((6, 7, 8))[-2:]}:
                yield Case(Grid(6, 7, 8, 0, 2), mask, options=options)
    if kind == "rings":
        for held in ([0, 1, 2], [4, 5, 2, 3], [-1, 3, -1, 0, 5], [-1]):
            frames = torch.tensor(held, dtype=torch.int32)
            options = {"q_region": Region((3, 0, 0), (2, 4, 5)), "k_frames": frames}
            for mask in (masks.full(), masks.frame_causal(2, 4, 1), masks.window(3, 3, 3), masks.temporal()):
                yield Case(Grid(6, 4, 5, 1, 2), mask, options=options)
            part = options | {"k_region": Region((0, 1, 0), (6, 2, 5))}
            yield Case(Grid(6, 4, 5, 1, 2), masks.window(3, 3, 3), options=part)
    if kind == "lists":
        generator = torch.Generator().manual_seed(0)
        for shape, q_tile, k_tile in (
            ((5, 6, 7), (2, 3, 4), (3, 2, 4)),
            ((8, 12, 16), (4, 8, 8), (2, 4, 8)),
            ((8, 12, 16), (4, 8, 16), (4, 4, 4)),
            ((1, 4, 5), (1, 3, 7), (1, 3, 7)),
        ):
            sizes = (1, 2, tile_count(shape, q_tile), tile_count(shape, k_tile))
            kinds = torch.tensor([EMPTY, PARTIAL, FULL], dtype=torch.int8)[torch.randint(3, sizes, generator=generator)]
            window = masks.window(*(min(3, n) for n in shape))
            yield Case(Grid(*shape), block_list(shape, q_tile, k_tile, kinds, window))
            yield Case(Grid(*shape), block_list(shape, q_tile, k_tile, torch.where(kinds == FULL, kinds, EMPTY)))
            yield Case(Grid(*shape), lower(window, shape, q_tile, k_tile))


@pytest.mark.parametrize("kind", ["globals", "unions", "heads", "regions", "rings", "lists"])
def test_calls_with_more_than_a_mask_see_what_they_should(kind: str) -> Covered:
    covered = Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        use_first(patch, 64, 2)
        for case in option_cases(kind):
            check(case, impl="triton", device=DEVICE, dtype=torch.bfloat16, dim=64)
            covered.update(calls=1, pairs=video(case))
    return covered


AROUND = [n + d for n in (16, 32, 64, 128, 256) for d in range(-2, 3)]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_length_around_each_tile_is_seen_whole(dtype: str) -> Covered:
    covered = Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        use_first(patch, 64, 4 if dtype == "fp32" else 2)
        for n in AROUND:
            for mask in (masks.full(), masks.window(1, 1, min(n, 33), causal=True)):
                case = Case(Grid(1, 1, n), mask, heads=1)
                check(case, impl="triton", device=DEVICE, dtype=DTYPES[dtype], dim=64)
                covered.update(calls=1, pairs=n * n)
            case = Case(Grid(1, 2, 3, n, 0), masks.full(), heads=1)
            check(case, impl="triton", device=DEVICE, dtype=DTYPES[dtype], dim=64)
    return covered | {"lengths": len(AROUND)}


# --- numbers: proof 1, 4, 6 ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_large_and_lone_values_stay_within_rule_1(dtype: str) -> Covered:
    case, kind, covered = Case(Grid(4, 9, 9), masks.window(3, 5, 3)), DTYPES[dtype], Counter[str]()
    for size, spoil in itertools.product((1.0, 3.0, 30.0), ("none", "outlier", "one-hot")):
        q, k, v = (x * size for x in draw(1, case.grid.tokens, 2, 64, dtype=kind, device=DEVICE))
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


def test_a_shift_of_all_scores_changes_nothing() -> Covered:
    lengths = (1, 63, 64, 65, 127, 128)
    with pytest.MonkeyPatch.context() as patch:
        use_first(patch, 64, 4)
        for shift, tokens in itertools.product(SHIFTS, lengths):
            check_shift(shift, tokens, "triton", DEVICE, 64, truncated=64 // 8)
    return {"shifts": len(SHIFTS), "lengths": len(lengths)}


def test_whole_numbers_are_summed_exactly() -> Covered:
    grid = Grid(4, 16, 16)
    for dtype in DTYPES.values():
        q = torch.zeros(1, 1024, 1, 64, dtype=dtype, device=DEVICE)
        k = torch.randint(-2, 3, q.shape, device=DEVICE).to(dtype)
        v = torch.randint(-2, 3, q.shape, device=DEVICE) * (torch.rand(q.shape, device=DEVICE) < 0.3)
        out = stattn.attention(q, k, v.to(dtype), grid, impl="triton")
        assert torch.equal(out, (v.sum(1, keepdim=True).float() / 1024).to(dtype).expand_as(out))
    return {"dtypes": len(DTYPES)}
