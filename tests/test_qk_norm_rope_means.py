"""``qk_norm_rope_means``: the same q and k as ``qk_norm_rope``, and the means that selection would make of k."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import stattn
from stattn.grid import Grid
from stattn.kernels import qk_norm_rope_means as kernels
from stattn.ops.qk_norm_rope import qk_norm_rope
from stattn.ops.qk_norm_rope_means import qk_norm_rope_means
from stattn.reference.select import tile_means
from stattn.rope import rope_tables

CPU = pytest.param("cpu", marks=pytest.mark.interpreter)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = (CPU, CUDA)


class Case(NamedTuple):
    grid: Grid
    tile: tuple[int, int, int]
    heads: int
    kv_heads: int
    dim: int
    across: bool = False
    interleaved: bool = True
    norms: tuple[bool, bool] = (True, True)
    k_grid: Grid | None = None


SMALL = {
    "wan": Case(Grid(2, 3, 4), (1, 2, 2), 3, 3, 16, across=True),
    "ragged, global tokens": Case(Grid(3, 3, 5, 1, 2), (2, 2, 4), 2, 2, 16),
    "half, fewer keys": Case(Grid(1, 4, 2, 2), (1, 3, 2), 4, 2, 20, interleaved=False),
    "one tile, no norm": Case(Grid(1, 2, 3, 0, 1), (1, 2, 3), 2, 1, 12, norms=(False, False)),
    "cache": Case(Grid(1, 2, 2), (1, 1, 2), 2, 1, 16, k_grid=Grid(2, 2, 2)),
    "odd chunks": Case(Grid(1, 1, 3), (1, 1, 2), 5, 5, 128, across=True),
    "tokens alone": Case(Grid(1, 2, 2), (1, 1, 1), 1, 1, 2),
}
REAL = {
    "wan 14b": Case(Grid(5, 45, 80), (4, 4, 8), 40, 40, 128, across=True),
    "hunyuanvideo": Case(Grid(5, 45, 80, 0, 256), (4, 4, 4), 24, 24, 128),
}


def draw(case: Case, dtype: torch.dtype, device: str, batch: int = 2) -> tuple[list[Tensor | None], dict[str, Any]]:
    k_grid = case.k_grid or case.grid
    q = torch.randn(batch, case.grid.tokens, case.heads, case.dim, device=device).to(dtype)
    k = torch.randn(batch, k_grid.tokens, case.kv_heads, case.dim, device=device).to(dtype) + 0.5
    lengths = [x.shape[2] * case.dim if case.across else case.dim for x in (q, k)]
    weights = [
        (1 + 0.3 * torch.randn(n, device=device)).to(dtype) if norm else None
        for n, norm in zip(lengths, case.norms, strict=True)
    ]
    options: dict[str, Any] = {"across_heads": case.across, "interleaved": case.interleaved}
    if case.k_grid is not None:
        options["k_rope"] = rope_tables(case.k_grid, case.dim, device=device)
    return [q, k, *weights, rope_tables(case.grid, case.dim, device=device)], options


def means_of(k: Tensor, case: Case) -> Tensor:
    grid = case.k_grid or case.grid
    return tile_means(k[:, grid.before : grid.before + grid.video].double(), grid, case.tile)


@pytest.mark.parametrize("device", DEVICES)
def test_q_and_k_are_those_of_qk_norm_rope_and_means_those_of_the_stored_keys(device):
    dtypes = (torch.float32, torch.float16) if device == "cpu" else (torch.bfloat16, torch.float16, torch.float32)
    for label, case in (SMALL if device == "cpu" else SMALL | REAL).items():
        for dtype in dtypes:
            given, options = draw(case, dtype, device)
            q, k, means = qk_norm_rope_means(*given, **options, k_tile=case.tile, impl="triton")
            want_q, want_k = qk_norm_rope(*given, **options, impl="triton")
            assert torch.equal(q, want_q), label
            # Another layout of threads may add up the squares of a row in another order: some roundings in fp32 of
            # each term of a rotated pair, which may cancel, and are about as large as the largest key.
            bound = 4 * torch.finfo(torch.float32).eps * float(want_k.abs().max())
            torch.testing.assert_close(k, want_k, rtol=2 * torch.finfo(dtype).eps, atol=bound)
            assert means.dtype == torch.float32
            torch.testing.assert_close(means.double(), means_of(k, case), rtol=1e-5, atol=1e-5, msg=label)


@pytest.mark.parametrize("label", SMALL)
def test_the_reference_returns_the_means_of_the_keys_that_it_returns(label):
    case = SMALL[label]
    given, options = draw(case, torch.float64, "cpu")
    q, k, means = qk_norm_rope_means(*given, **options, k_tile=case.tile, impl="reference")
    want_q, want_k = qk_norm_rope(*given, **options, impl="reference")
    assert torch.equal(q, want_q)
    assert torch.equal(k, want_k)
    torch.testing.assert_close(means, means_of(k, case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", range(len(kernels.CONFIGS)))
def test_every_config_is_right(device, config, monkeypatch):
    monkeypatch.setattr(kernels.forward_with_means, "__defaults__", (kernels.CONFIGS[config],))
    for label in ("wan", "ragged, global tokens"):
        given, options = draw(SMALL[label], torch.float16, device)
        _, k, means = qk_norm_rope_means(*given, **options, k_tile=SMALL[label].tile, impl="triton")
        torch.testing.assert_close(means.double(), means_of(k, SMALL[label]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_views_are_read_in_place_and_a_sample_does_not_depend_on_its_batch(device):
    case = SMALL["ragged, global tokens"]
    (q, k, *rest), options = draw(case, torch.float32, device)
    want = qk_norm_rope_means(q, k, *rest, **options, k_tile=case.tile, impl="triton")
    fused = torch.full((2, case.grid.tokens + 2, 3, *q.shape[2:]), torch.nan, device=device)
    views = [fused[:, 1:-1, 0].copy_(q), fused[:, 1:-1, 1].copy_(k)]
    got = qk_norm_rope_means(*views, *rest, **options, k_tile=case.tile, impl="triton")
    alone = qk_norm_rope_means(q[1:], k[1:], *rest, **options, k_tile=case.tile, impl="triton")
    for view, one, each in zip(got, alone, want, strict=True):
        assert torch.equal(view, each)
        assert torch.equal(one, each[1:])
    assert int(fused.isnan().sum()) == fused.numel() - 2 * q.numel()


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=pytest.mark.interpreter), "reference"])
def test_gradients_flow_through_q_and_k_alone(impl):
    case = SMALL["wan"]
    given, options = draw(case, torch.float32, "cpu", batch=1)
    leaves = [each.clone().requires_grad_() for each in given[:4]]
    q, k, means = qk_norm_rope_means(*leaves, given[4], **options, k_tile=case.tile, impl=impl)
    want_q, want_k = qk_norm_rope(*leaves, given[4], **options, impl=impl)
    assert not means.requires_grad
    dq, dk = torch.randn_like(q), torch.randn_like(k)
    got, want = (torch.autograd.grad(each, leaves, (dq, dk)) for each in ((q, k), (want_q, want_k)))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    torch.testing.assert_close(means.double(), means_of(k.detach(), case), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "impl"),
    [
        ("cpu", "reference"),
        pytest.param("cpu", "triton", marks=pytest.mark.interpreter),
        pytest.param("cuda", "triton", marks=pytest.mark.gpu),
    ],
)
def test_selection_takes_the_means_in_place_of_the_keys(device, impl):
    case = Case(Grid(2, 4, 6, 1), (1, 2, 3), 4, 2, 16)
    given, options = draw(case, torch.float32, device, batch=1)
    q, k, means = qk_norm_rope_means(*given, **options, k_tile=case.tile, impl=impl)
    q_tile = (1, 2, 2)
    want = stattn.top_k(q, k, case.grid, q_tile, case.tile, 3, impl=impl)
    got = stattn.top_k(q, torch.full_like(k, torch.nan), case.grid, q_tile, case.tile, 3, k_means=means, impl=impl)
    assert torch.equal(got.index, want.index)
    want = stattn.top_p(q, k, case.grid, q_tile, case.tile, 0.5, impl=impl)
    got = stattn.top_p(q, torch.full_like(k, torch.nan), case.grid, q_tile, case.tile, 0.5, k_means=means, impl=impl)
    assert torch.equal(got.count, want.count)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k_means": torch.zeros(2, 2, 7, 16)}, ValueError, r"k_means of shape \(2, 2, 7, 16\)"),
        ({"k_means": torch.zeros(2, 2, 8, 16).half()}, TypeError, "k_means of torch.float16 must be torch.float32"),
    ],
)
def test_wrong_means_are_named(change, error, message):
    q, k = torch.randn(2, 48, 4, 16), torch.randn(2, 48, 2, 16)
    sizes = ((2, 4, 6), (1, 2, 2), (1, 2, 3), 3)
    stattn.top_k(q, k, *sizes, k_means=torch.zeros(2, 2, 8, 16))
    with pytest.raises(error, match=message):
        stattn.top_k(q, k, *sizes, **change)


def test_tables_and_a_tile_are_needed():
    given, options = draw(SMALL["wan"], torch.float32, "cpu")
    with pytest.raises(ValueError, match="rope=None"):
        qk_norm_rope_means(*given[:4], None, **options, k_tile=(1, 2, 2))
    with pytest.raises((TypeError, ValueError), match="k_tile"):
        qk_norm_rope_means(*given, **options, k_tile=(1, 2))


@pytest.mark.gpu
def test_opcheck_compiled_calls_graphs_and_reruns():
    case = SMALL["ragged, global tokens"]
    given, options = draw(case, torch.bfloat16, "cuda")
    q, k, q_weight, k_weight, rope = given
    arguments = (q, k, q_weight, k_weight, [rope.t, rope.h, rope.w], [rope.before], False, 1e-6, True, list(case.tile))
    torch.library.opcheck(torch.ops.stattn.qk_norm_rope_means, arguments)
    with torch.no_grad():
        want = qk_norm_rope_means(*given, **options, k_tile=case.tile)
        call = torch.compile(lambda *each: qk_norm_rope_means(*each, **options, k_tile=case.tile), fullgraph=True)
        assert all(torch.equal(a, b) for a, b in zip(call(*given), want, strict=True))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                out = qk_norm_rope_means(*given, **options, k_tile=case.tile)
        for _ in range(20):
            k.copy_(torch.randn_like(k))
            graph.replay()
            torch.cuda.synchronize()
            again = qk_norm_rope_means(*given, **options, k_tile=case.tile)
            assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))


@pytest.mark.gpu
def test_250_runs_beside_another_stream_and_on_another_device_give_the_same_bits():
    case = REAL["wan 14b"]
    given, options = draw(case, torch.bfloat16, "cuda")
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()

    def run(tensors: list[Any]) -> tuple[Tensor, ...]:
        return qk_norm_rope_means(*tensors, **options, k_tile=case.tile)

    with torch.no_grad():
        want = run(given)
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            assert all(torch.equal(a, b) for a, b in zip(run(given), want, strict=True))
        for _ in range(250):
            with torch.cuda.stream(other):
                noise @ noise
            assert all(torch.equal(a, b) for a, b in zip(run(given), want, strict=True))
        if torch.cuda.device_count() > 1:
            there = run([each if each is None else each.to("cuda:1") for each in given])
            assert all(torch.equal(a.to("cuda:0"), b) for a, b in zip(there, want, strict=True))
