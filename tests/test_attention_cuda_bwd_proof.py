"""The CUDA kernels of the attention backward on a Hopper GPU: proof of their masks, bit by bit, and of their numbers.

    python -m pytest -m gpu tests/test_attention_cuda_bwd_proof.py --record FILE

Both ways are held to all of it: dQ summed in memory in any order, and in a fixed one.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from probes import BIG_GRIDS, GRIDS, Case, check
from test_attention import (
    SHIFTS,
    assert_rule_1,
    draw,
    largest_score,
    results,
)
from test_attention_cuda import HOPPER
from test_attention_kernels import NUMBERS, check_numbers, gradients
from test_attention_proof import AROUND, option_cases
from test_attention_proof_numbers import LENGTHS, check_sampled

import stattn
from stattn import extension, masks
from stattn.blocks import BlockList, block_list, tile_count
from stattn.grid import Grid, Triple
from stattn.masks import CONSTRUCTORS, EMPTY, FULL, PARTIAL
from stattn.ops import _cuda_bwd, _cuda_bwd_plan, _cuda_plan, _cuda_tiles
from stattn.ops._cuda_tiles import KERNELS, Config

DEVICE = "cuda"
gpu = pytest.mark.gpu
apart = pytest.mark.apart
hopper = pytest.mark.skipif(not HOPPER or not extension.LIBRARY.exists(), reason="no Hopper GPU, or no CUDA library")
Covered = dict[str, int]
WAYS = (True, False)  # of ``deterministic``

# Masks bit by bit: proof.


def video(case: Case) -> int:
    return len(case.rows()) * len(case.columns()) * case.heads


def refusal(case: Case, dtype: torch.dtype, dim: int) -> str | None:
    """Say why the kernels do not serve a case with gradients, or None."""
    shapes = ((1, len(each), case.heads, dim) for each in (case.rows(), case.columns(), case.columns()))
    q, k, v = (torch.empty(shape, dtype=dtype, device=DEVICE, requires_grad=True) for shape in shapes)
    options = {name: each for name, each in case.options.items() if name not in ("deterministic", "scale")}
    if case.valid is not None:
        options["valid"] = case.valid.to(DEVICE)[None]
    if options.get("k_frames") is not None:
        options["k_frames"] = options["k_frames"].to(DEVICE)
    found = case.masks
    if isinstance(found, BlockList):
        tables = (None if x is None else x.to(DEVICE) for x in (found.count, found.index, found.partial))
        found = BlockList(found.shape, found.q_tile, found.k_tile, *tables, found.mask)
    line = stattn.explain(q, k, v, case.grid, found, **options).splitlines()[1]
    reason = line[2:].strip().removeprefix("cuda").strip()
    return None if reason == "serves it" else reason


def both_ways(case: Case, dtype: torch.dtype, dim: int, only: list[int] | None = None) -> Covered:
    """Probe a case both ways, if its masks are served."""
    reason = refusal(case, dtype, dim)
    if reason is not None:
        assert "dilated" in reason or "tiles of" in reason, reason
        return {"refused": 1}
    found = Counter[str]()
    for way in WAYS:
        case.options["deterministic"] = way
        check(case, impl="cuda", device=DEVICE, dtype=dtype, dim=dim, only=only)
        found.update(calls=1, pairs=video(case) if only is None else len(case.rows()) * dim * len(only))
    return dict(found)


def forget_plans() -> None:
    """Let plans be made anew: what decides them is patched."""
    for known in (_cuda_plan.layout, _cuda_plan.on_device, _cuda_bwd_plan.layout, _cuda_bwd_plan.on_device):
        known.cache_clear()
    _cuda_bwd._planned.cache_clear()


EVERY = [(dim, dq, kv) for dim in (64, 128) for dq in KERNELS["dq"].configs[dim] for kv in KERNELS["kv"].configs[dim]]


@gpu
@apart
@hopper
@pytest.mark.parametrize("dim, dq, kv", EVERY, ids=[f"{dim}-{dq.number}-{kv.number}" for dim, dq, kv in EVERY])
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_constructor_is_seen_as_it_is_on_awkward_grids_by_every_config(
    name: str, dim: int, dq: Config, kv: Config
) -> Covered:
    covered = Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        for kernel, chosen in (("dq", dq), ("kv", kv)):
            patch.setitem(_cuda_tiles.KERNELS, kernel, KERNELS[kernel]._replace(configs={dim: (chosen,)}))
        forget_plans()
        for turn, shape in enumerate([*GRIDS, *BIG_GRIDS]):
            examples, tokens = CONSTRUCTORS[name].examples(shape), Grid(*shape).video
            for number, mask in enumerate(examples):
                part = len(examples) if tokens > 2048 else min(6, len(examples))
                if number % part != turn % part:
                    continue  # on larger grids some of the examples, others on each grid
                last = (tokens - 1) // dim
                only = None if tokens <= 2048 else sorted({0, last // 2, last})
                for dtype in (torch.bfloat16, torch.float16):
                    covered.update(both_ways(Case(Grid(*shape), mask, heads=1), dtype, dim, only))
    forget_plans()
    return covered | {"grids": len(GRIDS + BIG_GRIDS)}


@gpu
@apart
@hopper
@pytest.mark.parametrize("kind", ["globals", "unions", "heads", "regions", "lists"])
def test_calls_with_more_than_a_mask_see_what_they_should(kind: str) -> Covered:
    covered = Counter[str]()
    for number, case in enumerate(option_cases(kind)):
        dim = (64, 128)[number % 2]
        covered.update(both_ways(case, torch.bfloat16, dim))
    return covered


@gpu
@apart
@hopper
@pytest.mark.parametrize("dim", [64, 128])
def test_lists_of_strangers_and_of_twins_are_seen_as_they_are(dim: int) -> Covered:
    """Key tiles side by side share a ring of boxes where their queries are mostly the same, else each has its own."""
    covered = Counter[str]()
    for shape, tile in (((4, 16, 24), (4, 4, 4)), ((4, 15, 22), (4, 4, 4)), ((6, 8, 24), (2, 4, 8))):
        tiles = tile_count(shape, tile)
        number = torch.arange(tiles)
        strangers = (number[:, None] + number) % 2 == 0
        twins = (number[:, None] + number // 6) % 3 > 0
        few = number[:, None] == 3 * number
        for seen in (strangers, twins, few, torch.rand(tiles, tiles) < 0.2):
            kinds = torch.where(seen, FULL, EMPTY).to(torch.int8)
            kinds[:, 5:9] = torch.where(kinds[:, 5:9] == FULL, PARTIAL, EMPTY).to(torch.int8)
            lists = block_list(shape, tile, tile, kinds[None, None], masks.window(3, 7, 7))
            covered.update(both_ways(Case(Grid(*shape), lists, heads=1), torch.bfloat16, dim))
    return covered


@gpu
@apart
@hopper
def test_keys_in_pieces_are_seen_as_they_are() -> Covered:
    covered = Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda_bwd_plan, "SHORTEST", 2)
        patch.setattr(_cuda_bwd_plan, "LONG", 1)
        for dim, q_globals in itertools.product((64, 128), (True, False)):
            found = [masks.frame_causal(1, 2, 1), masks.window(3, 3, 3)]
            case = Case(Grid(9, 8, 12, 5, 150), found, q_globals=q_globals)
            forget_plans()
            covered.update(both_ways(case, torch.bfloat16, dim))
    forget_plans()
    return covered


@gpu
@apart
@hopper
@pytest.mark.parametrize("dim", [64, 128])
def test_every_length_around_each_tile_is_seen_whole(dim: int) -> Covered:
    covered = Counter[str]()
    for n in sorted({*AROUND, *range(188, 197)}):
        for mask in (masks.full(), masks.window(1, 1, min(n, 33), causal=True)):
            covered.update(both_ways(Case(Grid(1, 1, n), mask, heads=1), torch.bfloat16, dim))
        covered.update(both_ways(Case(Grid(1, 2, 3, n, 0), masks.full(), heads=1), torch.bfloat16, dim))
    return covered


# Numbers: proof 1, 3, 5, 6.

UNSERVED = {"frames", "frames of a region", "negative scale"}


@gpu
@apart
@hopper
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("way", WAYS)
def test_results_and_gradients_are_within_rule_1(way: bool, dim: int, dtype: str) -> Covered:
    covered = Counter[str]()
    for name, (case, given) in NUMBERS.items():
        case.options["deterministic"] = way
        if name in UNSERVED or name.startswith("dim") or refusal(case, torch.bfloat16, dim) is not None:
            continue
        check_numbers(case, **(given | {"dim": dim, "dtype": getattr(torch, dtype), "device": DEVICE, "impl": "cuda"}))
        covered.update(calls=1)
    for case, given in (
        (Case(Grid(5, 9, 11), masks.full()), {"batch": 2}),
        (Case(Grid(4, 9, 11, 0, 5), masks.window(3, 5, 5)), {"batch": 2}),
        (Case(Grid(4, 9, 11, 7, 0), masks.window(3, 5, 5), heads=6), {"key_heads": 2}),
    ):
        case.options["deterministic"] = way
        check_numbers(case, dim=dim, dtype=getattr(torch, dtype), device=DEVICE, impl="cuda", **given)
        covered.update(calls=1)
    return covered


@gpu
@apart
@hopper
@pytest.mark.parametrize("dim", [64, 128])
def test_more_padded_tokens_than_rings_leave_room_for_are_within_rule_1(dim: int) -> Covered:
    """Which of them are real lies in shared memory: rings of dQ have two stages where four leave no room for it."""
    valid = torch.arange(16_000) % 5 > 0
    case = Case(Grid(1, 4, 16, 0, len(valid)), masks.window(1, 3, 5), heads=1, valid=valid, q_globals=False)
    for way in WAYS:
        case.options["deterministic"] = way
        check_numbers(case, dim=dim, dtype=torch.bfloat16, device=DEVICE, impl="cuda")
    return {"calls": len(WAYS)}


@gpu
@apart
@hopper
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_large_and_lone_values_stay_within_rule_1(dtype: str) -> Covered:
    kind, calls = getattr(torch, dtype), 0
    for way, mask, size, spoil in itertools.product(
        WAYS, (masks.full(), masks.window(3, 5, 3)), (1.0, 3.0, 30.0), ("none", "outlier", "one-hot")
    ):
        if dtype == "float16" and size > 3:  # eager scores overflow
            continue
        case = Case(Grid(4, 9, 9), mask, options={"deterministic": way})
        q, k, v = (x * size for x in draw(1, case.grid.tokens, 2, 64, dtype=kind, device=DEVICE))
        if spoil == "outlier":
            q[..., 3] *= 10
        if spoil == "one-hot":
            k[:, 7] *= 10
        given = (torch.randn_like(q), torch.zeros(1, 2, case.grid.tokens, device=DEVICE))
        got, eager = (results(case, (q, k, v), given, impl) for impl in ("cuda", None))
        exact = results(case, (q.double(), k.double(), v.double()), given, None)
        for name in ("dq", "dk", "dv"):
            rounded = eager[name].to(kind)
            assert_rule_1(f"{mask} {spoil} x {size} {name}", got[name], rounded, exact[name], largest_score((q, k, v)))
        calls += 1
    return {"calls": calls}


@gpu
@apart
@hopper
def test_a_shift_of_all_scores_changes_no_gradient() -> Covered:
    lengths = (1, 63, 64, 65, 127, 128)
    for shift, tokens, way in itertools.product(SHIFTS, lengths, WAYS):
        for mask in (masks.full(), masks.window(1, 1, min(tokens, 33))):
            q, k, v = draw(1, tokens, 1, 64, dtype=torch.bfloat16, device=DEVICE)
            q[..., 0], k[..., 0] = 0.0, 4.0
            dout = torch.randn_like(q).abs()  # so that nothing in dV cancels
            given: dict[str, Any] = {"scale": 1.0, "impl": "cuda", "deterministic": way}
            plain = gradients((q, k, v), dout, None, (1, 1, tokens), mask, **given)
            q[..., 0] = shift / 4
            found = gradients((q, k, v), dout, None, (1, 1, tokens), mask, **given)
            assert all(x.isfinite().all() for x in found)
            # A score is rounded as a sum on the tensor cores (2 ulp) and times log2(e), twice in each of two calls.
            slack = math.expm1(16 * torch.finfo(torch.float32).eps * abs(shift))
            assert (found[4] - plain[4]).abs().max() <= (slack + 4 * torch.finfo(q.dtype).eps) * plain[4].max()
    return {"shifts": len(SHIFTS), "lengths": len(lengths)}


LONG = [(shape, number) for shape, found in LENGTHS.items() for number in range(len(found))]


@gpu
@apart
@hopper
@pytest.mark.parametrize("shape, number", LONG, ids=lambda value: str(value).replace(" ", ""))
def test_long_calls_are_within_rule_1_at_sampled_rows_and_keys(shape: Triple, number: int) -> Covered:
    mask, covered = LENGTHS[shape][number], Counter[str]()
    for way in WAYS:
        covered.update(check_sampled(shape, mask, impl="cuda", deterministic=way))
    return covered
