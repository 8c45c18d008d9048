"""Attention: numbers against float64, gradients, empty rows, layouts, batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from probes import GRIDS, Case

import stattn
from stattn import masks
from stattn.blocks import lower
from stattn.grid import Grid, Region
from stattn.masks import CONSTRUCTORS, Mask

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def draw(
    batch: int, tokens: int, heads: int, dim: int, *, key_heads: int | None = None, keys: int | None = None, **kind: Any
) -> Tensors:
    shapes = [(batch, tokens, heads, dim)] + 2 * [(batch, keys or tokens, key_heads or heads, dim)]
    q, k, v = (torch.randn(shape, **kind) for shape in shapes)
    return q, k, v


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written down: seen is booleans, broadcast to [B, heads, Nq, Nk]."""
    rep = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(rep, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    p = torch.exp(scores - torch.where(torch.isneginf(lse), 0.0, lse)[..., None])
    return torch.einsum("bhqk,bkhd->bqhd", p, v), lse


def errors(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """Greatest and root mean square error against float64; two infinities of one sign agree."""
    both = torch.isinf(want)
    assert torch.equal(torch.isinf(got), both)
    difference = (got.double() - want).masked_fill(both, 0.0)
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def assert_rule_1(name: str, got: torch.Tensor, eager: torch.Tensor, want: torch.Tensor, score: float = 0.0) -> None:
    """err <= 2 (err of eager + eps max|ref|), RMSE <= 1.1 that of eager (plus rounding of the result itself).

    score: the largest score, for gradients. A backward that recomputes P = exp(S - LSE) from rounded S and LSE has a
    relative error of eps * max|S| in each P, which the formula's softmax has not.
    """
    (most, rms), (eager_most, eager_rms) = errors(got, want), errors(eager, want)
    eps = torch.finfo(eager.dtype).eps
    lost = score * torch.finfo(torch.float32).eps
    largest = want.masked_fill(torch.isinf(want), 0.0).abs().max().item()
    assert most <= 2 * (eager_most + (eps + lost) * largest), f"{name}: error {most:.3e}, eager {eager_most:.3e}"
    assert rms <= 1.1 * eager_rms + (eps + lost) * largest / 8, f"{name}: RMSE {rms:.3e}, eager {eager_rms:.3e}"


def largest_score(tensors: Tensors) -> float:
    """The largest |score| of a case, at most: max|q| max|k| over rows."""
    q, k = (x.double().norm(dim=-1).max().item() for x in tensors[:2])
    return q * k / math.sqrt(tensors[0].shape[3])


def results(
    case: Case, tensors: Tensors, gradients: tuple[torch.Tensor, torch.Tensor], impl: str | None
) -> dict[str, torch.Tensor]:
    """Output, LSE and gradients: by an implementation, or by the formula when impl is None."""
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors)
    if impl is None:
        scale = case.options.get("scale", 1 / math.sqrt(q.shape[3]))
        out, lse = dense(q, k, v, case.truth().to(q.device), scale)
    else:
        out, lse = case.call(q, k, v, impl)
    finite = torch.where(torch.isneginf(lse), 0.0, lse)
    total = (out * gradients[0].to(out.dtype)).sum(dtype=torch.float64) + (finite * gradients[1].to(lse.dtype)).sum()
    total.backward()
    return {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}


CASES = [
    Case(Grid(3, 5, 7), masks.full(), heads=2),
    Case(Grid(4, 6, 6, 3, 5), masks.window(3, 3, 5), heads=2),
    Case(
        Grid(6, 4, 5, 0, 4), masks.frame_causal(2, window=4, sink_frames=1), heads=2, options={"globals_see": "globals"}
    ),
    Case(Grid(4, 9, 8), masks.sliding_tile((2, 4, 3), (1, 3, 2)), heads=2),
    Case(Grid(5, 6, 7, 2, 0), masks.radial(((0, None, None), (2, 3, 3))), heads=2, valid=torch.tensor([True, False])),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.masks.key)
def test_outputs_and_gradients_are_within_rule_1(case: Case, dtype: torch.dtype) -> None:
    tensors = draw(2, case.grid.tokens, 2, 32, dtype=dtype)
    gradients = (torch.randn_like(tensors[0]), torch.randn(2, 2, case.grid.tokens, dtype=dtype))
    got = results(case, tensors, gradients, "reference")
    eager = results(case, tensors, gradients, None)
    exact = results(case, tuple(x.double() for x in tensors), gradients, None)  # type: ignore[arg-type]
    for name in got:
        assert_rule_1(name, got[name], eager[name].to(got[name].dtype), exact[name], largest_score(tensors))


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_float64_equals_the_formula_for_every_mask(name: str) -> None:
    for shape in [(1, 1, 7), (3, 5, 7), (4, 4, 8)]:
        for mask in CONSTRUCTORS[name].examples(shape):
            case = Case(Grid(*shape, 2, 3), mask, heads=2)
            tensors = draw(2, case.grid.tokens, 2, 8, dtype=torch.float64)
            gradients = (torch.randn_like(tensors[0]), torch.randn(2, 2, case.grid.tokens, dtype=torch.float64))
            got, want = results(case, tensors, gradients, "reference"), results(case, tensors, gradients, None)
            for key in got:
                torch.testing.assert_close(got[key], want[key], rtol=1e-9, atol=1e-10)


def test_gradients_are_those_of_finite_differences() -> None:
    mask, grid = masks.window(2, 3, 3), Grid(2, 3, 4, 0, 2)
    tensors = [x.requires_grad_() for x in draw(1, grid.tokens, 2, 4, key_heads=1, dtype=torch.float64)]
    valid = torch.tensor([1])
    assert torch.autograd.gradcheck(
        lambda q, k, v: stattn.attention(q, k, v, grid, mask, valid=valid), tensors, fast_mode=False
    )
    assert torch.autograd.gradcheck(
        lambda q, k, v: stattn.attention(q, k, v, Grid(2, 3, 4, 0, 2), mask, return_lse=True), tensors, fast_mode=True
    )


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_whole_numbers_are_summed_exactly(impl: str) -> None:
    grid = Grid(2, 4, 8)
    q = torch.zeros(1, grid.tokens, 1, 16)
    k = torch.randint(-2, 3, q.shape).float()
    v = torch.randint(-2, 3, q.shape).float() * (torch.rand(q.shape) < 0.3)
    out = stattn.attention(q, k, v, grid, impl=impl)
    assert torch.equal(out * grid.tokens, v.sum(1, keepdim=True).expand_as(v))


SHIFTS = [-1e5, -5e4, -120.0, -88.8, 0.0, 120.0, 1e4]


def check_shift(
    shift: float,
    tokens: int,
    impl: str,
    device: str = "cpu",
    dim: int = 16,
    truncated: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """truncated: how often a score's sum is cut off to 24 bits, as tensor cores do after every few features."""
    grid, shift = Grid(1, 1, tokens), torch.tensor(shift, dtype=dtype).item()
    for mask in (masks.full(), masks.window(1, 1, min(tokens, 33))):
        q, k, v = draw(1, tokens, 1, dim, dtype=dtype, device=device)
        q[..., 0], k[..., 0] = 0.0, 1.0
        plain, plain_lse = stattn.attention(q, k, v, grid, mask, scale=1.0, return_lse=True, impl=impl)
        q[..., 0] = shift
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out, lse = stattn.attention(q, k, v, grid, mask, scale=1.0, return_lse=True, impl=impl)
        out.sum().backward()
        # Scores of size |c| are rounded to ulp(c): so much of each exponent is lost.
        slack = (4 + truncated) * torch.finfo(torch.float32).eps * abs(shift)
        rounding = 2 * slack + 4 * torch.finfo(dtype).eps  # of P and of the output, before the shift and with it
        assert (out - plain).abs().max() <= rounding * plain.abs().max() + 1e-5
        assert (lse - plain_lse - shift).abs().max() <= slack + 1e-4
        assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128])
def test_a_shift_of_all_scores_changes_nothing(shift: float, tokens: int) -> None:
    check_shift(shift, tokens, "reference")


@pytest.mark.parametrize("size", [1.0, 3.0, 30.0])
def test_large_and_lone_values_stay_within_rule_1(size: float) -> None:
    case = Case(Grid(4, 6, 6), masks.window(3, 5, 3), heads=2)
    for spoil in ("none", "outlier", "one-hot"):
        tensors = draw(1, case.grid.tokens, 2, 32, dtype=torch.float32)
        tensors = tuple(x * size for x in tensors)  # type: ignore[assignment]
        if spoil == "outlier":
            tensors[0][..., 3] *= 100
        if spoil == "one-hot":
            tensors[1][:, 7] *= 50
        gradients = (torch.randn_like(tensors[0]), torch.zeros(1, 2, case.grid.tokens))
        got, eager = results(case, tensors, gradients, "reference"), results(case, tensors, gradients, None)
        exact = results(case, tuple(x.double() for x in tensors), gradients, None)  # type: ignore[arg-type]
        for name in got:
            assert_rule_1(f"{spoil} {name}", got[name], eager[name], exact[name], largest_score(tensors))


def test_a_query_that_sees_nothing_returns_zero_and_minus_infinity() -> None:
    grid, mask = Grid(3, 4, 2), masks.tables(h=([4, 4, 0, 0], [3, 3, 3, 3]))
    q, k, v = (x.requires_grad_() for x in draw(2, grid.tokens, 2, 8))
    out, lse = stattn.attention(q, k, v, grid, mask, return_lse=True)
    blind = (torch.arange(grid.tokens) // 2 % 4) < 2
    assert (out[:, blind] == 0).all()
    assert torch.isneginf(lse[:, :, blind]).all()
    assert (out[:, ~blind] != 0).all()
    assert torch.isfinite(lse[:, :, ~blind]).all()
    (out.sum() + lse[:, :, ~blind].sum()).backward()
    assert (q.grad[:, blind] == 0).all()
    assert torch.isfinite(k.grad).all()
    assert torch.isfinite(v.grad).all()


def test_invalid_global_tokens_are_neither_keys_nor_queries() -> None:
    grid, mask = Grid(2, 3, 4, 0, 4), masks.window(1, 3, 3)
    q, k, v = draw(2, grid.tokens, 2, 8)
    counts = torch.tensor([4, 1])
    out, lse = stattn.attention(q, k, v, grid, mask, valid=counts, return_lse=True)
    assert (out[1, -3:] == 0).all()
    assert torch.isneginf(lse[1, :, -3:]).all()
    spoiled = [x.clone() for x in (q, k, v)]
    for x in spoiled:
        x[1, -3:] = float("nan")
    tensors = [x.requires_grad_() for x in spoiled]
    again = stattn.attention(*tensors, grid, mask, valid=counts)
    assert torch.equal(again, out)
    again.sum().backward()
    assert all((x.grad[1, -3:] == 0).all() and torch.isfinite(x.grad).all() for x in tensors)
    booleans = torch.arange(4) < counts[:, None]
    assert torch.equal(stattn.attention(q, k, v, grid, mask, valid=booleans), out)


def check_empty_slots(impl: str, device: str = "cpu") -> None:
    grid, q_region = Grid(3, 3, 4, 1, 0), Region((1, 0, 0), (2, 3, 4))
    frames = torch.tensor([2, -1, 0], dtype=torch.int32, device=device)
    q, k, v = draw(1, 25, 2, 16, keys=37, device=device)
    options = {"q_region": q_region, "k_frames": frames, "return_lse": True, "impl": impl}
    out, lse = stattn.attention(q, k, v, grid, masks.frame_causal(1), **options)
    spoiled = [q, k.clone(), v.clone()]
    spoiled[1][:, 13:25] = spoiled[2][:, 13:25] = float("nan")
    tensors = [x.requires_grad_() for x in spoiled]
    again = stattn.attention(*tensors, grid, masks.frame_causal(1), **options)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)
    (again[0].sum() + again[1].sum()).backward()
    assert all(torch.isfinite(x.grad).all() for x in tensors)
    assert all((x.grad[:, 13:25] == 0).all() for x in tensors[1:])


def test_empty_slots_of_a_ring_may_hold_anything() -> None:
    check_empty_slots("reference")


def test_merging_parts_equals_the_whole() -> None:
    grid = Grid(4, 3, 5)
    q, k, v = draw(2, grid.tokens, 2, 8, dtype=torch.float64)
    want, want_lse = stattn.attention(q, k, v, grid, return_lse=True)
    parts = []
    for start, extent in ((0, 1), (1, 3)):
        region = Region((start, 0, 0), (extent, 3, 5))
        piece = slice(start * 15, (start + extent) * 15)
        parts.append(stattn.attention(q, k[:, piece], v[:, piece], grid, k_region=region, return_lse=True))
    out, lse = stattn.merge([part[0] for part in parts], [part[1] for part in parts])
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


def test_merging_nothing_changes_nothing() -> None:
    out, lse = torch.randn(1, 5, 2, 8), torch.randn(1, 2, 5)
    nothing = (torch.zeros_like(out), torch.full_like(lse, -torch.inf))
    got, got_lse = stattn.merge([out, nothing[0]], [lse, nothing[1]])
    assert torch.equal(got, out)
    assert torch.equal(got_lse, lse)
    got, got_lse = stattn.merge([nothing[0]] * 2, [nothing[1]] * 2)
    assert (got == 0).all()
    assert torch.isneginf(got_lse).all()


@pytest.mark.parametrize("batch, tokens", [(0, 24), (2, 24)])
@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_an_empty_batch_returns_empty(batch: int, tokens: int, impl: str) -> None:
    q, k, v = (x.requires_grad_() for x in draw(batch, tokens, 2, 8))
    out, lse = stattn.attention(q, k, v, (2, 3, 4), return_lse=True, impl=impl)
    assert out.shape == q.shape
    assert lse.shape == (batch, 2, tokens)
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_views_transposes_and_expanded_heads_are_used_as_they_are() -> None:
    grid, mask = Grid(3, 4, 5), masks.window(3, 3, 3)
    qkv = torch.randn(2, grid.tokens, 3, 2, 16)
    q, k, v = qkv.unbind(2)
    want = stattn.attention(*(x.contiguous() for x in (q, k, v)), grid, mask)
    before = qkv.clone()
    assert torch.equal(stattn.attention(q, k, v, grid, mask), want)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(stattn.attention(*transposed, grid, mask), want)
    assert torch.equal(qkv, before)
    shared = [x[:, :, :1].expand(-1, -1, 2, -1) for x in (k, v)]
    grouped = stattn.attention(q, k[:, :, :1], v[:, :, :1], grid, mask)
    assert torch.equal(stattn.attention(q, *shared, grid, mask), grouped)


def test_the_gradient_of_the_output_may_have_any_strides() -> None:
    grid, mask = Grid(3, 4, 5), masks.window(3, 3, 3)
    for impl_mask in (mask, masks.full()):
        tensors = [x.requires_grad_() for x in draw(2, grid.tokens, 2, 16)]
        out = stattn.attention(*tensors, grid, impl_mask)
        dout = torch.randn(2, 2, 16, grid.tokens).permute(0, 3, 1, 2)
        want = torch.autograd.grad(out, tensors, dout.contiguous(), retain_graph=True)
        for got, each in zip(torch.autograd.grad(out, tensors, dout), want, strict=True):
            torch.testing.assert_close(got, each, rtol=1e-6, atol=1e-6)


def test_grouped_heads_equal_repeated_ones() -> None:
    grid, mask = Grid(3, 4, 5, 2, 0), [masks.window(3, 3, 3)] * 3 + [masks.spatial()] * 3
    q, k, v = (x.requires_grad_() for x in draw(2, grid.tokens, 6, 8, key_heads=2, dtype=torch.float64))
    out = stattn.attention(q, k, v, grid, mask)
    want = stattn.attention(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), grid, mask)
    torch.testing.assert_close(out, want)
    dout = torch.randn_like(out)
    for got, each in zip(*(torch.autograd.grad(x, (q, k, v), dout) for x in (out, want)), strict=True):
        torch.testing.assert_close(got, each)


@pytest.mark.parametrize("mask", [masks.full(), masks.window(3, 3, 3), masks.frame_causal(2)], ids=str)
def test_a_sample_does_not_depend_on_its_batch(mask: Mask) -> None:
    grid = Grid(4, 5, 6, 0, 3)
    tensors = draw(3, grid.tokens, 2, 16)
    valid = torch.tensor([3, 1, 3])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several share a product of few matrices in another way than one of many
    try:
        together = stattn.attention(*tensors, grid, mask, valid=valid)
        for sample in range(3):
            part = slice(sample, sample + 1)
            alone = stattn.attention(*(x[part] for x in tensors), grid, mask, valid=valid[part])
            assert torch.equal(alone[0], together[sample])
    finally:
        torch.set_num_threads(threads)


def test_reruns_are_bitwise_equal() -> None:
    grid, mask = Grid(4, 5, 6, 0, 3), masks.window(3, 3, 3) | masks.spatial()
    tensors = [x.requires_grad_() for x in draw(2, grid.tokens, 2, 16)]
    first = None
    for _ in range(20):
        out = stattn.attention(*tensors, grid, mask, deterministic=True)
        run = [out, *torch.autograd.grad(out.square().sum(), tensors)]
        first = first or run
        assert all(torch.equal(a, b) for a, b in zip(run, first, strict=True))


def test_block_lists_equal_the_mask_they_come_from() -> None:
    grid, mask = Grid(5, 6, 7, 2, 1), masks.window(3, 3, 5)
    tensors = draw(2, grid.tokens, 4, 8, key_heads=2, dtype=torch.float64)
    lists = lower(mask, grid, (2, 3, 4), (3, 2, 4))
    torch.testing.assert_close(stattn.attention(*tensors, grid, lists), stattn.attention(*tensors, grid, mask))


GRID = Grid(2, 3, 4)


def test_a_second_derivative_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in draw(1, 24, 1, 8))
    (grad,) = torch.autograd.grad(stattn.attention(q, k, v, GRID).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_dense_attention_on_a_gpu_is_within_rule_1(impl: str, dim: int, dtype: torch.dtype) -> None:
    for shape in GRIDS[::5]:
        case = Case(Grid(*shape, 2, 3), masks.full(), heads=2)
        tensors = draw(2, case.grid.tokens, 2, dim, dtype=dtype, device="cuda")
        gradients = (torch.randn_like(tensors[0]), torch.randn(2, 2, case.grid.tokens, device="cuda"))
        got, eager = results(case, tensors, gradients, impl), results(case, tensors, gradients, None)
        exact = results(case, tuple(x.double() for x in tensors), gradients, None)  # type: ignore[arg-type]
        for name in got:
            assert_rule_1(
                f"{shape} {name}", got[name], eager[name].to(got[name].dtype), exact[name], largest_score(tensors)
            )


@pytest.mark.gpu
def test_the_reference_on_a_gpu_equals_that_on_a_cpu() -> None:
    for case in CASES:
        tensors = draw(2, case.grid.tokens, 2, 32, dtype=torch.float64)
        gradients = (torch.randn_like(tensors[0]), torch.randn(2, 2, case.grid.tokens, dtype=torch.float64))
        want = results(case, tensors, gradients, "reference")
        on_gpu = tuple(x.cuda() for x in tensors)
        got = results(case, on_gpu, tuple(x.cuda() for x in gradients), "reference")  # type: ignore[arg-type]
        for name in got:
            torch.testing.assert_close(got[name].cpu(), want[name], rtol=1e-9, atol=1e-10)
