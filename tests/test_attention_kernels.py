"""The Triton kernels of attention on a CPU, by Triton's interpreter; ``test_attention_proof.py`` runs them on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from probes import Case, check
from test_attention import (
    assert_rule_1,
    check_empty_slots,
    check_shift,
    draw,
    largest_score,
    results,
)
from test_attention_operation import check_compiled, check_operations

import stattn
from stattn import masks
from stattn.blocks import BlockList, block_list, lower, tile_count
from stattn.grid import Grid, Region
from stattn.kernels import attention as forward
from stattn.kernels import attention_bwd as backward
from stattn.kernels.attention import Config
from stattn.masks import CONSTRUCTORS, EMPTY, FULL, PARTIAL

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are made for the GPU here; tests/test_attention_proof.py runs them on it"
)
GUARD = 512
WIDTHS = (16, 32, 64, 128, 256)


def force(patch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    """Let all kernels use tiles of so many rows and boxes of so many columns. Few large ones are quick to interpret."""
    configs = tuple(Config(rows, columns, 4, 2, WIDTHS, size, 1.0) for size in (2, 4))
    patch.setattr(forward, "CONFIGS", configs)
    patch.setattr(backward, "DQ_CONFIGS", configs)
    patch.setattr(backward, "DKDV_CONFIGS", configs)


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    force(monkeypatch, 32, 32)
    return monkeypatch


# Masks.


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_constructor_is_seen_as_it_is(name: str, tiles: pytest.MonkeyPatch) -> None:
    for number, mask in enumerate(CONSTRUCTORS[name].examples((2, 3, 4))):
        force(tiles, *((16, 16), (32, 16), (32, 32), (32, 32))[number % 4])  # two tiles, two boxes, and neither
        check(Case(Grid(2, 3, 4), mask, heads=1), impl="triton", dim=32)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_constructor_is_seen_as_it_is_in_tiles_that_divide_no_axis(name: str, tiles: pytest.MonkeyPatch) -> None:
    force(tiles, 64, 32)
    mask = CONSTRUCTORS[name].examples((2, 5, 7))[-1]
    check(Case(Grid(2, 5, 7), mask, heads=1), impl="triton", dtype=torch.float16, dim=128)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_keys_that_no_query_sees_may_be_anything(name: str) -> None:
    grid, region = Grid(3, 4, 5), Region((1, 1, 1), (1, 2, 2))
    mask = CONSTRUCTORS[name].examples(grid.shape)[-1]
    seen = Case(grid, mask, heads=1, options={"q_region": region}).truth()[0].any(0)
    q, k, v = draw(1, 60, 1, 16)
    q, dout = q[:, :4], torch.randn(1, 4, 1, 16)
    found = []
    for fill in (0.0, torch.nan, torch.inf):
        for x in (k, v):
            x[:, ~seen] = fill
        found.append(gradients((q, k, v), dout, None, grid, mask, q_region=region)[:3])
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_overlapping_products_count_no_key_twice(tiles: pytest.MonkeyPatch) -> None:
    force(tiles, 64, 32)
    # No axis alone can cut the one out of the other, nor a dilated window out of a dense one.
    for mask in (
        masks.window(2, 1, 3) | masks.window(1, 3, 4),
        masks.window(2, 2, 2, dilation=(1, 2, 2)) | masks.window(1, 3, 3) | masks.temporal(),
    ):
        assert forward.plan.disjoint(mask.products((2, 4, 4)))[1]
        check(Case(Grid(2, 4, 4), mask, heads=1), impl="triton", dim=32)


def test_global_tokens_are_seen_by_all_or_by_each_other() -> None:
    for see, valid in (("all", None), ("globals", torch.tensor([True, False, True, True, False]))):
        options = {"globals_see": see}
        case = Case(Grid(1, 3, 4, 3, 2), masks.window(1, 3, 3), heads=1, valid=valid, options=options)
        check(case, impl="triton", dim=32)


def listed(partial: bool = True) -> BlockList:
    """Lists of two heads in tiles that divide no axis, with entries in part, empty rows and columns."""
    shape, q_tile, k_tile = (2, 5, 4), (2, 3, 4), (2, 2, 3)
    generator = torch.Generator().manual_seed(1)
    table = torch.randint(3, (1, 2, tile_count(shape, q_tile), tile_count(shape, k_tile)), generator=generator)
    kinds = torch.tensor([EMPTY, PARTIAL if partial else FULL, FULL], dtype=torch.int8)[table]
    kinds[0, 0, 1], kinds[0, 1, :, 0] = EMPTY, EMPTY
    return block_list(shape, q_tile, k_tile, kinds, masks.window(2, 3, 3) if partial else None)


def test_block_lists_are_walked_as_listed(tiles: pytest.MonkeyPatch) -> None:
    force(tiles, 16, 16)  # a query tile of 24 is that of two programs, a key tile of 12 less than a box
    check(Case(Grid(2, 5, 4), listed()), impl="triton", dim=64)
    force(tiles, 32, 8)  # two boxes a key tile
    check_numbers(Case(Grid(2, 5, 4), listed(partial=False)))


# Numbers.

WINDOW, DILATED = masks.window(2, 3, 3), masks.window(1, 2, 2, dilation=(1, 2, 2))
VALID = torch.tensor([True, False, True, True, False])
RING = torch.tensor([2, -1, 0, 1], dtype=torch.int32)


def options(**given: Any) -> dict[str, Any]:
    return {"heads": 1, "options": given}


NUMBERS: dict[str, tuple[Case, dict[str, Any]]] = {
    "full": (Case(Grid(2, 5, 7), masks.full()), {}),
    "window": (Case(Grid(2, 5, 7), WINDOW, heads=1), {"batch": 2}),
    "disjoint products": (Case(Grid(2, 4, 5), masks.temporal() | masks.spatial(), heads=1), {}),
    "overlapping products": (Case(Grid(2, 4, 5), WINDOW | DILATED, heads=1), {}),
    "a mask a head": (Case(Grid(2, 4, 4), [WINDOW, DILATED | masks.temporal()]), {}),
    "a mask a head, grouped": (
        Case(Grid(2, 3, 4, 2, 0), [WINDOW, masks.spatial(), WINDOW, masks.full()], heads=4),
        {"key_heads": 2},
    ),
    "grouped": (Case(Grid(2, 3, 4), WINDOW, heads=4), {"key_heads": 2}),
    "globals": (Case(Grid(2, 3, 5, 3, 2), WINDOW, heads=1, valid=VALID), {}),
    "globals alone": (Case(Grid(2, 3, 5, 3, 2), WINDOW, valid=VALID, **options(globals_see="globals")), {}),
    "keys only globals": (Case(Grid(2, 3, 5, 3, 2), WINDOW, heads=1, valid=VALID, q_globals=False), {}),
    "many globals": (Case(Grid(1, 2, 3, 40, 41), masks.full(), heads=1), {}),
    "q region": (Case(Grid(3, 5, 7), WINDOW, **options(q_region=Region((1, 2, 3), (2, 2, 4)))), {}),
    "k region": (Case(Grid(2, 4, 5, 0, 2), WINDOW | DILATED, **options(k_region=Region((0, 1, 2), (2, 3, 3)))), {}),
    "frames": (
        Case(Grid(3, 3, 4, 1, 0), masks.frame_causal(1, window=2, sink_frames=1), **options(k_frames=RING)),
        {},
    ),
    "frames of a region": (
        Case(
            Grid(3, 4, 5, 3, 2),
            masks.temporal() | WINDOW,
            valid=VALID,
            **options(k_frames=RING[:2], q_region=Region((1, 0, 0), (2, 4, 5)), k_region=Region((0, 1, 1), (3, 3, 4))),
        ),
        {},
    ),
    "lists, grouped": (Case(Grid(2, 5, 4), listed()), {"key_heads": 1}),
    "lists of one tile": (Case(Grid(2, 4, 5), lower(DILATED, (2, 4, 5), (2, 4, 5), (2, 2, 4)), heads=1), {}),
    # The last box of a tile that reaches beyond the grid may begin behind it, and be smaller than a box of columns.
    "lists of tiles beyond the grid": (
        Case(Grid(1, 4, 5), lower(masks.full(), (1, 4, 5), (1, 3, 7), (1, 3, 7)), heads=1),
        {},
    ),
    "dim 24": (Case(Grid(2, 3, 4), WINDOW, heads=1), {"dim": 24}),
    "dim 40 in fp16": (Case(Grid(2, 3, 4), WINDOW, heads=1), {"dim": 40, "dtype": torch.float16}),
    "dim 136": (Case(Grid(2, 3, 4), WINDOW, heads=1), {"dim": 136}),
    "scale 0": (Case(Grid(2, 3, 4), WINDOW, **options(scale=0.0)), {}),
    "negative scale": (Case(Grid(2, 3, 4, 0, 2), WINDOW, **options(scale=-0.3)), {}),
    "empty rows": (Case(Grid(2, 4, 4), masks.tables(h=([4, 4, 0, 0], [3, 3, 3, 2])), heads=1), {}),
}


def check_numbers(
    case: Case,
    batch: int = 1,
    key_heads: int | None = None,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    impl: str = "triton",
) -> None:
    """Hold output, LSE and gradients of both against the formula in float64, by rule 1; inputs stay as they are."""
    rows, columns = len(case.rows()), len(case.columns())
    tensors = draw(batch, rows, case.heads, dim, key_heads=key_heads, keys=columns, dtype=dtype, device=device)
    gradients = (torch.randn_like(tensors[0]), torch.randn(batch, case.heads, rows, dtype=dtype, device=device))
    before = [x.clone() for x in tensors]
    got, eager = results(case, tensors, gradients, impl), results(case, tensors, gradients, None)
    exact = results(case, tuple(x.double() for x in tensors), gradients, None)  # type: ignore[arg-type]
    assert all(torch.equal(x, same) for x, same in zip(tensors, before, strict=True))
    for name in got:
        expected = torch.float32 if name == "lse" else dtype
        assert got[name].dtype == expected
        assert_rule_1(name, got[name], eager[name].to(expected), exact[name], largest_score(tensors))


@pytest.mark.parametrize("name", NUMBERS)
def test_results_and_gradients_are_within_rule_1(name: str) -> None:
    case, given = NUMBERS[name]
    check_numbers(case, **given)


def test_a_lone_token_returns_its_value() -> None:
    q, k, v = (x.requires_grad_() for x in draw(2, 1, 2, 16))
    out, lse = stattn.attention(q, k, v, (1, 1, 1), return_lse=True, impl="triton")
    assert torch.equal(out, v)
    torch.testing.assert_close(lse, (q * k).sum(-1).transpose(1, 2) / 4)
    dout = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, v, dout)[0], dout)


def test_configs_as_they_are_serve_every_head_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for configs in (forward.CONFIGS, backward.DQ_CONFIGS, backward.DKDV_CONFIGS):
        for size in (2, 4):
            assert {width for config in configs if config.bytes == size for width in config.widths} == set(WIDTHS)
    for dim, dtype in ((16, torch.float32), (64, torch.float16)):
        check_numbers(Case(Grid(2, 3, 4, 1, 0), masks.window(1, 3, 3), heads=1), dim=dim, dtype=dtype)


@pytest.mark.parametrize("shift", [-1e5, -88.8, 1e4])
def test_a_shift_of_all_scores_changes_nothing(shift: float) -> None:
    check_shift(shift, 65, "triton")


def test_a_query_that_sees_nothing_returns_zero_and_minus_infinity_and_has_no_gradient() -> None:
    grid, mask = Grid(2, 4, 2), masks.tables(h=([4, 4, 0, 0], [3, 3, 3, 3]))
    q, k, v = (x.requires_grad_() for x in draw(1, 16, 1, 16))
    out, lse = stattn.attention(q, k, v, grid, mask, return_lse=True, impl="triton")
    blind = (torch.arange(16) // 2 % 4) < 2
    assert (out[:, blind] == 0).all()
    assert torch.isneginf(lse[:, :, blind]).all()
    assert torch.isfinite(lse[:, :, ~blind]).all()
    (out.sum() + lse[:, :, ~blind].sum()).backward()
    assert (q.grad[:, blind] == 0).all()
    assert (q.grad[:, ~blind] != 0).any()
    assert all(torch.isfinite(x.grad).all() for x in (k, v))


def test_empty_slots_of_a_ring_may_hold_anything() -> None:
    check_empty_slots("triton")


def test_whole_numbers_are_summed_exactly() -> None:
    grid = Grid(2, 4, 8)
    q = torch.zeros(1, 64, 1, 16)
    k = torch.randint(-2, 3, q.shape).float()
    v = torch.randint(-2, 3, q.shape).float() * (torch.rand(q.shape) < 0.3)
    out = stattn.attention(q, k, v, grid, impl="triton")
    assert torch.equal(out * 64, v.sum(1, keepdim=True).expand_as(v))


# Memory and layout.


def gradients(
    tensors: tuple[torch.Tensor, ...], dout: torch.Tensor | None, dlse: torch.Tensor | None, *call: Any, **given: Any
) -> list[torch.Tensor]:
    """Output, LSE and the gradients of an attention call."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = stattn.attention(*leaves, *call, return_lse=True, **{"impl": "triton"} | given)
    pairs = [(x, g) for x, g in ((out, dout), (lse, dlse)) if g is not None]
    return [out, lse, *torch.autograd.grad([x for x, _ in pairs], leaves, [g for _, g in pairs])]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


GRID, MASK = Grid(1, 4, 5, 1, 2), masks.window(1, 3, 3)
LISTS = lower(MASK, GRID.shape, (1, 4, 5), (1, 2, 5))


Plain = tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]


def random_call(dim: int = 16, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Plain:
    tensors = draw(1, GRID.tokens, 2, dim, dtype=dtype, device=device)
    return tensors, torch.randn_like(tensors[0]), torch.randn(1, 2, GRID.tokens, device=device)


@pytest.fixture
def plain() -> Plain:
    return random_call()


def check_views(plain: Plain) -> None:
    """Slices of a wider tensor, [B, heads, N, D] and shared heads give the bits that contiguous tensors give."""
    tensors, dout, dlse = plain
    dim = dout.shape[3]
    want = gradients(tensors, dout, dlse, GRID, MASK)
    fused = dout.new_full((1, GRID.tokens, 5, 2, dim + 3), torch.nan)  # of odd strides, with NaN between the heads
    views = [fused[:, :, i, :, 2 : dim + 2].copy_(x) for i, x in zip((0, 2, 4), tensors, strict=True)]
    held = fused.clone()
    assert same(gradients(tuple(views), dout, dlse, GRID, MASK), want)
    assert torch.equal(fused.nan_to_num(), held.nan_to_num())
    turned = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)
    assert same(gradients(turned, dout, dlse, GRID, MASK), want)
    k, v = (x[:, :, :1] for x in tensors[1:])
    grouped = stattn.attention(tensors[0], k, v, GRID, MASK, impl="triton")
    expanded = (x.expand(-1, -1, 2, -1) for x in (k, v))
    assert torch.equal(stattn.attention(tensors[0], *expanded, GRID, MASK, impl="triton"), grouped)


def check_strides_of_dout(plain: Plain, **given: Any) -> None:
    tensors, dout, dlse = plain
    want = gradients(tensors, dout, dlse, GRID, MASK, **given)
    heads_first = dout.transpose(1, 2).contiguous().transpose(1, 2)
    assert same(gradients(tensors, heads_first, dlse, GRID, MASK, **given), want)
    feature_first = dout.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert feature_first.stride(3) != 1
    heads_last = dlse.transpose(1, 2).contiguous().transpose(1, 2)
    assert same(gradients(tensors, feature_first, heads_last, GRID, MASK, **given), want)
    number = gradients(tensors, torch.ones_like(dout[0, 0, 0, 0]).expand_as(dout), None, GRID, MASK, **given)
    assert same(number, gradients(tensors, torch.ones_like(dout), None, GRID, MASK, **given))


def test_views_transposes_and_expanded_heads_are_used_as_they_are(plain: Plain) -> None:
    check_views(plain)


def test_the_gradient_of_the_output_may_have_any_strides(plain: Plain) -> None:
    check_strides_of_dout(plain)


def test_the_output_and_the_lse_have_gradients_of_their_own(plain: Plain) -> None:
    tensors, dout, dlse = plain
    both = gradients(tensors, dout, dlse, GRID, MASK)
    of_out, of_lse = (gradients(tensors, *each, GRID, MASK) for each in ((dout, None), (None, dlse)))
    assert (of_lse[4] == 0).all()
    for whole, a, b in zip(both[2:], of_out[2:], of_lse[2:], strict=True):
        torch.testing.assert_close(a + b, whole, rtol=1e-4, atol=1e-5)


def check_guards(
    device: str = "cpu", dim: int = 24, given_dtype: torch.dtype = torch.float32, runs: masks.Mask | None = None
) -> None:
    """Between guards of NaN, in memory full of NaN, behind views that end in NaN: not one comes through.

    runs: a mask to look at in place of others.
    """
    held: list[torch.Tensor] = []
    empty = torch.empty

    def guarded(shape: Any, dtype: torch.dtype = given_dtype, device: str = device) -> torch.Tensor:
        if isinstance(shape, int):  # not ours
            return empty(shape, dtype=dtype, device=device)
        flat = empty(math.prod(shape) + 2 * GUARD, dtype=dtype, device=device).fill_(torch.nan)
        held.append(flat)
        return flat[GUARD:-GUARD].view(tuple(shape))

    grouped = [MASK, masks.full()]

    def new_empty(x: torch.Tensor, shape: Any, dtype: torch.dtype | None = None, **given: Any) -> torch.Tensor:
        return empty(shape, dtype=x.dtype, **given) if given else guarded(shape, dtype or x.dtype)  # Triton's own

    calls = [(MASK, torch.tensor([[True, False, True]], device=device)), (grouped, None)]
    for mask, valid in calls if runs is None else [(runs, None)]:
        held.clear()
        tensors = tuple(guarded(x.shape).copy_(x) for x in draw(1, GRID.tokens, 2, dim, key_heads=1))
        if valid is not None:  # what is not real may be anything
            for x in tensors:
                x[:, GRID.tokens - 2] = torch.nan
        dout = guarded(tensors[0].shape).normal_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", guarded)
            patch.setattr(torch, "empty_like", lambda x: guarded(x.shape, x.dtype))
            patch.setattr(torch.Tensor, "new_empty", new_empty)
            found = gradients(tensors, dout, None, GRID, mask, valid=valid)
        assert len(held) >= 10  # the inputs, the output, the LSE, delta and the gradients
        for flat in held:
            assert flat[:GUARD].isnan().all()
            assert flat[-GUARD:].isnan().all()
        assert not any(x.isnan().any() for x in found)


def test_nothing_outside_the_tensors_is_read_or_written() -> None:
    check_guards()


def test_offsets_of_64_bits_are_taken_when_one_sample_is_that_long() -> None:
    def fused(tokens: int, batch: int = 1) -> torch.Tensor:
        return torch.empty((batch, tokens, 3, 40, 128), dtype=torch.bfloat16, device="meta")[:, :, 1]

    assert not forward.wide(fused(75_600, batch=2))  # 2.3e9 elements, but 1.2e9 a sample
    assert not forward.wide(fused(2**31 // 15_360 - 1))
    assert forward.wide(fused(2**31 // 15_360 + 1))
    assert forward.wide(fused(1000), fused(200_000))


def test_offsets_of_64_bits_give_the_bits_of_32(plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, dout, dlse = plain
    for mask in (MASK, LISTS):
        want = gradients(tensors, dout, dlse, GRID, mask)
        with monkeypatch.context() as patch:
            for module in (forward, backward):
                patch.setattr(module, "wide", lambda *tensors: True)
            assert same(gradients(tensors, dout, dlse, GRID, mask), want)


def test_an_empty_batch_returns_without_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((forward, "attention_forward"), (backward, "attention_dq"), (backward, "attention_dkdv")):
        monkeypatch.setattr(module, name, None)
    empty = tuple(torch.randn(0, GRID.tokens, 2, 16) for _ in range(3))
    found = gradients(empty, torch.randn(0, GRID.tokens, 2, 16), None, GRID, MASK)
    assert [tuple(x.shape) for x in found] == [(0, 23, 2, 16), (0, 2, 23), *[(0, 23, 2, 16)] * 3]
    with pytest.raises(TypeError):  # as one sample would
        gradients(draw(1, GRID.tokens, 2, 16), None, torch.randn(1, 2, GRID.tokens), GRID, MASK)


# Order.


def test_a_sample_depends_on_nothing_but_itself_bitwise() -> None:
    tensors = draw(2, GRID.tokens, 1, 16)
    dout, dlse = torch.randn_like(tensors[0]), torch.randn(2, 1, GRID.tokens)
    valid = torch.tensor([[True, True, False], [False, True, True]])
    for given in ({"mask": MASK, "valid": valid}, {"mask": LISTS}):
        together = gradients(tensors, dout, dlse, GRID, **given)
        for sample in (0, 1):
            one = slice(sample, sample + 1)
            if "valid" in given:
                given = given | {"valid": valid[one]}
            alone = gradients(tuple(x[one] for x in tensors), dout[one], dlse[one], GRID, **given)
            assert same(alone, [x[one] for x in together])


def test_reruns_give_the_same_bits(plain: Plain) -> None:
    tensors, dout, dlse = plain
    mask = MASK | masks.temporal()
    first = gradients(tensors, dout, dlse, GRID, mask, deterministic=True)
    assert same(gradients(tensors, dout, dlse, GRID, mask, deterministic=True), first)


# Registration and choice.


def test_the_operations_pass_opcheck() -> None:
    check_operations("triton", "cpu", heads=1)


def test_a_compiled_call_equals_an_eager_one_and_follows_the_grid() -> None:
    check_compiled("triton", heads=1, shapes=[(2, 3, 3), (2, 3, 4)])


def refusals() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"head_dim": 12}, "head dimension 12 must be a multiple of 8 from 16 to 256"
    yield {"head_dim": 8}, "head dimension 8 must be a multiple of 8 from 16 to 256"
    yield {"head_dim": 264}, "head dimension 264 must be a multiple of 8 from 16 to 256"
    yield {"dtype": torch.float64}, "has no float64 kernel"
    yield {"capability": (7, 5)}, "needs compute capability 8.0, this device has 7.5"
    yield {"device": "cpu", "dtype": torch.bfloat16}, "Triton's interpreter computes bfloat16 wrongly"


@pytest.mark.parametrize("changes, reason", list(refusals()))
def test_what_the_kernels_do_not_serve_is_said_in_a_sentence(changes: dict[str, Any], reason: str) -> None:
    from stattn.ops._attention_choice import OPERATION, AttentionCall

    (triton,) = [each for each in OPERATION.implementations if each.name == "triton"]
    call = AttentionCall("cuda", (8, 0), torch.bfloat16, 128, 4, 2, "mask spatial()", True, None, False)
    assert triton.why_not(call) is None
    assert triton.why_not(call._replace(**changes)) == reason


def test_a_cpu_needs_the_interpreter_and_an_explicit_request(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 24, 1, 16)
    assert stattn.attention(q, q, q, (2, 3, 4), MASK, impl="triton").shape == q.shape
    assert "auto takes reference" in stattn.explain(q, q, q, (2, 3, 4), MASK)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    choose = stattn.explain.__globals__["OPERATION"]._choose
    choose.cache_clear()  # it holds that a CPU is served
    try:
        with pytest.raises(ValueError, match="impl='triton' does not serve attention.*: runs on CUDA"):
            stattn.attention(q, q, q, (2, 3, 4), MASK, impl="triton")
    finally:
        choose.cache_clear()
    wide = torch.randn(1, 24, 1, 12)
    with pytest.raises(ValueError, match="head dimension 12 must be a multiple of 8"):
        stattn.attention(wide, wide, wide, (2, 3, 4), MASK, impl="triton")
