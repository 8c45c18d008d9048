"""The proof of the Triton attention, on a GPU: masks bit by bit.

    python -m pytest -m gpu tests/test_attention_proof.py --record build/attention_proof_masks.json

Numbers are in ``test_attention_proof_numbers.py``; memory, layout, order and graphs in
``test_attention_proof_calls.py``. Tests run apart, several at a time, since most of their time goes into compiling.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from probes import BIG_GRIDS, GRIDS, Case, check
from test_attention import draw
from test_attention_kernels import gradients, listed, same
from test_probes import REGIONS, UNIONS

from stattn import masks, plan_runs
from stattn.blocks import block_list, lower, tile_count
from stattn.grid import Grid, Region
from stattn.kernels import attention as forward
from stattn.kernels import attention_bwd as backward
from stattn.kernels import attention_runs as runs
from stattn.kernels import attention_runs_hopper as hopper
from stattn.kernels.attention import Config
from stattn.masks import CONSTRUCTORS, EMPTY, FULL, PARTIAL, Constructor, Mask

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
GENERAL = ("forward", "dq", "dkdv")
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


# Every mask by every config.


def rounds() -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Give a type, a head dimension and the number of a config of each general kernel, until each had its turn.

    Each config serves each type that it can: bf16 and fp32 at the widest of its head dimensions, fp16 at the narrowest.
    """
    for dtype, edge in (("bf16", -1), ("fp16", 0), ("fp32", -1)):
        size = DTYPES[dtype].itemsize
        of_size = [[c for c in configs(place) if c.bytes == size] for place in GENERAL]
        for dim in sorted({config.widths[edge] for found in of_size for config in found}):
            turns = []
            for place, found in zip(GENERAL, of_size, strict=True):
                own = [c for c in found if c.widths[edge] == dim] or [c for c in found if dim in c.widths][:1]
                turns.append([configs(place).index(config) for config in own])
            for turn in range(max(map(len, turns))):
                yield dtype, dim, tuple(each[min(turn, len(each) - 1)] for each in turns)


def on_awkward_grids(constructor: Constructor) -> Iterator[Case]:
    """Give a mask on each grid: all examples on the smallest, some of them on larger ones, others on each."""
    for turn, shape in enumerate([*GRIDS, *BIG_GRIDS]):
        examples, tokens = constructor.examples(shape), Grid(*shape).video
        part = len(examples) if tokens > 2048 else 1 if tokens <= 60 else min(4, len(examples))
        yield from (Case(Grid(*shape), mask, heads=1) for mask in examples[turn % part :: part])


AROUND = [n + d for n in (16, 32, 64, 128, 256) for d in range(-2, 3)]


def around_tiles() -> Iterator[Case]:
    """Give every length around each extent that tiles and boxes have."""
    for n in AROUND:
        for mask in (masks.full(), masks.window(1, 1, min(n, 33), causal=True)):
            yield Case(Grid(1, 1, n), mask, heads=1)


def probe(case: Case, dim: int, dtype: str, covered: Counter[str]) -> None:
    """Compare the masks that the sub-kernels print with the truth: all of them, or on large grids three chunks."""
    tokens, last = case.grid.tokens, (case.grid.tokens - 1) // dim
    only = None if case.grid.video <= 2048 else sorted({0, last // 2, last})
    check(case, impl="triton", device=DEVICE, dtype=DTYPES[dtype], dim=dim, only=only)
    covered.update(calls=1, pairs=video(case) if only is None else tokens * dim * len(only))


def rerun(mask: Mask, dim: int, dtype: str, covered: Counter[str]) -> None:
    tensors = draw(2, 336, 2, dim, dtype=DTYPES[dtype], device=DEVICE)
    dout = torch.randn_like(tensors[0])
    first = gradients(tensors, dout, None, (6, 7, 8), mask)
    for _ in range(50):
        assert same(gradients(tensors, dout, None, (6, 7, 8), mask), first)
        covered.update(reruns=1)


ROUNDS = list(rounds())
NAMES = ["-".join(map(str, (dtype, dim, *numbers))) for dtype, dim, numbers in ROUNDS]


def test_the_rounds_leave_no_config_out() -> None:
    for (dtype, kind), place in itertools.product(DTYPES.items(), GENERAL):
        found = {numbers[GENERAL.index(place)] for each, _, numbers in ROUNDS if each == dtype}
        assert found == {i for i, config in enumerate(configs(place)) if config.bytes == kind.itemsize}


@pytest.mark.parametrize("dtype, dim, numbers", ROUNDS, ids=NAMES)
def test_every_config_sees_every_mask_as_it_is_and_gives_the_same_bits_50_times(
    dtype: str, dim: int, numbers: tuple[int, ...]
) -> Covered:
    """numbers: those of the configs of the forward pass, of dQ, and of dK and dV."""
    covered = Counter[str]()
    chosen = [configs(place)[number] for place, number in zip(GENERAL, numbers, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        leave_runs(patch)
        for place, config in zip(GENERAL, chosen, strict=True):
            use(patch, place, config)
        for constructor in CONSTRUCTORS.values():
            for case in on_awkward_grids(constructor):
                probe(case, dim, dtype, covered)
        for case in around_tiles():
            probe(case, dim, dtype, covered)
        probe(Case(Grid(6, 7, 8, 3, 18), UNIONS[1], heads=1), dim, dtype, covered)
        probe(Case(Grid(2, 5, 4), listed()), dim, dtype, covered)
        rerun(masks.window(3, 3, 5), dim, dtype, covered)
    return covered | {"constructors": len(CONSTRUCTORS), "grids": len(GRIDS + BIG_GRIDS)}


def with_text() -> Iterator[Case]:
    for turn, shape in enumerate([*GRIDS, *BIG_GRIDS]):
        before, after = ((0, 5), (3, 0), (70, 61))[turn % 3]
        mask = (masks.frame_causal(1 + turn % 2), masks.spatial(), masks.full())[turn % 3]
        if shape != (7, 1, 1) or mask == masks.full():  # no runs: a frame is a token
            see = ("all", "globals")[turn % 2]
            yield Case(Grid(*shape, before, after), mask, heads=1, options={"globals_see": see})


def has_runs(case: Case) -> bool:
    assert isinstance(case.masks, Mask)
    box = Region((0, 0, 0), case.grid.shape)
    given = (case.masks, case.grid, box, box, True, case.options.get("globals_see", "all"), 64)
    return all(plan_runs.runs(*given, by_key) is not None for by_key in (False, True))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("place", RUNS_FORWARD)
def test_every_config_of_runs_sees_what_is_made_of_runs_and_gives_the_same_bits_50_times(
    place: str, dim: int, dtype: str
) -> Covered:
    covered, made = Counter[str](), Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        served = take_runs(patch, place)
        for name, constructor in CONSTRUCTORS.items():
            for case in filter(has_runs, on_awkward_grids(constructor)):
                probe(case, dim, dtype, covered)
                made.update([name])
        for case in itertools.chain(filter(has_runs, around_tiles()), with_text()):
            probe(case, dim, dtype, covered)
        rerun(masks.frame_causal(2), dim, dtype, covered)
    assert served["served"] == served["calls"] > 0
    assert min(made[name] for name in ("full", "spatial", "frame_causal")) >= len(GRIDS)
    return covered | dict(made)


# Calls with more than a mask.


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


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_number_of_global_tokens_around_each_tile_is_seen_whole(dtype: str) -> Covered:
    covered = Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        use_first(patch, 64, DTYPES[dtype].itemsize)
        for n in AROUND:
            probe(Case(Grid(1, 2, 3, n, 0), masks.full(), heads=1), 64, dtype, covered)
    return covered | {"lengths": len(AROUND)}
