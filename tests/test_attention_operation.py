"""Attention as an operation: who serves a call, torch.library, compile, and what a call costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_attention import GRID, draw

import stattn
from stattn import masks
from stattn.blocks import lower
from stattn.grid import Grid, Region, Triple
from stattn.masks import Mask

# Choice of implementation.


def test_explain_says_who_serves_and_why_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(1, 24, 2, 64)
    table = stattn.explain(q, k, v, GRID, masks.window(1, 3, 3))
    assert "auto takes reference" in table
    assert "serves dense attention only, the call has mask window(1, 3, 3)" in table
    assert "auto takes sdpa" in stattn.explain(q, k, v, GRID)
    assert "auto takes Triton on CUDA tensors only" in table or "runs on CUDA" in table
    meta = [x.to("meta") for x in (q, k, v)]
    for capability, served in (((9, 0), "triton"), ((8, 0), "triton"), ((7, 5), "nothing")):
        # Not by its dotted name, which is that of the function.
        monkeypatch.setitem(stattn.explain.__globals__, "capability_of", lambda device, found=capability: found)
        on_gpu = stattn.explain(*meta, GRID, masks.window(1, 3, 3), device="cuda")
        assert f"auto takes {served}" in on_gpu
        assert "auto takes the reference on CPU tensors only" in on_gpu
    assert "needs compute capability 8.0, this device has 7.5" in on_gpu


def test_kernels_that_add_up_in_no_fixed_order_are_refused_where_one_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(stattn.explain.__globals__, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr("stattn.ops._dense.flash_version", lambda: 3)
    meta = [x.to("meta").bfloat16() for x in draw(1, 24, 2, 64)]

    def lines(deterministic: bool | None) -> dict[str, str]:
        table = stattn.explain(*meta, GRID, device="cuda", deterministic=deterministic)
        return {line.split()[0]: line for line in table.replace("*", " ").splitlines()[1:]}

    for name in ("sdpa", "flash"):
        assert "serves it" in lines(True)[name]  # no gradient is needed
    meta[1].requires_grad_()
    for name in ("sdpa", "flash"):
        assert "serves it" in lines(None)[name]
        assert "in no fixed order, and deterministic=True" in lines(True)[name]
    assert "serves it" in lines(True)["triton"]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert "in no fixed order" in lines(None)["sdpa"]
        assert "serves it" in lines(False)["sdpa"]
    finally:
        torch.use_deterministic_algorithms(before)
    # On a CPU PyTorch's kernel goes head by head.
    q, k, v = (x.requires_grad_() for x in draw(1, 24, 2, 64))
    assert stattn.attention(q, k, v, GRID, impl="sdpa", deterministic=True).requires_grad


def test_every_reason_against_dense_attention_is_named() -> None:
    q, k, v = draw(1, 24, 2, 64)
    grid = Grid(2, 3, 3, 0, 6)
    for options, reason in [
        ({"valid": torch.tensor([3])}, "valid"),
        ({"globals_see": "globals"}, "globals_see='globals'"),
        ({"mask": [masks.full(), masks.spatial()]}, "mask spatial()"),
        ({"mask": lower(masks.full(), grid, (1, 3, 3), (1, 3, 3))}, "block lists"),
    ]:
        assert f"the call has {reason}" in stattn.explain(q, k, v, grid, **options)  # type: ignore[arg-type]


# torch.library, compile.


def operator_arguments(
    grad: bool, impl: str, device: str, heads: int, dim: int, dtype: torch.dtype, mask: Mask | None
) -> tuple[Any, ...]:
    from stattn.ops.attention import _check, _flatten

    grid = Grid(2, 3, 4, 0, 3)
    q, k, v = (x.requires_grad_(grad) for x in draw(2, grid.tokens, heads, dim, device=device, dtype=dtype))
    valid = None if mask else torch.tensor([3, 1], device=device)
    problem, extras = _check(q, k, v, grid, mask or masks.window(2, 3, 3), None, None, None, valid, "all", None)
    return (q, k, v, *_flatten(problem), *extras, False, impl)


def check_operations(
    impl: str,
    device: str,
    heads: int = 2,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    mask: Mask | None = None,
) -> None:
    """mask: one to take in place of a window with padded text."""
    arguments = operator_arguments(True, impl, device, heads, dim, dtype, mask)
    torch.library.opcheck(torch.ops.stattn.attention.default, arguments)
    plain = operator_arguments(False, impl, device, heads, dim, dtype, mask)
    out, lse = torch.ops.stattn.attention(*plain)
    torch.library.opcheck(
        torch.ops.stattn.attention_backward.default,
        (torch.randn_like(out), torch.randn_like(lse), *plain[:3], out, lse, *plain[3:]),
    )


def test_the_operations_pass_opcheck() -> None:
    check_operations("reference", "cpu")


def check_compiled(
    impl: str,
    device: str = "cpu",
    backend: str = "aot_eager",
    heads: int = 2,
    dim: int = 16,
    shapes: Sequence[Triple] = ((2, 3, 4), (3, 5, 6), (4, 4, 7)),
    dtype: torch.dtype = torch.float32,
    mask: Mask | None = None,
) -> None:
    """The first call, compiled, and others on grids of other sizes equal eager calls, without a recompilation."""
    mask = mask or masks.window(2, 3, 3)

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def compiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        return stattn.attention(q, k, v, Grid(*shape, 0, 3), mask, impl=impl)

    torch._dynamo.reset()
    for number, shape in enumerate(shapes):
        tensors = draw(2, Grid(*shape, 0, 3).tokens, heads, dim, device=device, dtype=dtype)
        q, k, v = (x.requires_grad_() for x in tensors)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            got = compiled(q, k, v, shape)
        want = stattn.attention(q, k, v, Grid(*shape, 0, 3), mask, impl=impl)
        assert torch.equal(got, want)
        grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (got, want)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_compiled_call_equals_an_eager_one_and_follows_the_grid() -> None:
    check_compiled("auto")


def test_a_warm_call_costs_little_python() -> None:
    q, k, v = draw(1, 8, 1, 8)
    with torch.no_grad():
        times = []
        for _ in range(300):
            start = time.perf_counter()
            stattn.attention(q, k, v, (2, 2, 2))
            times.append(time.perf_counter() - start)
    # The kernel itself included; a slow path such as rebuilding masks or tables each time costs milliseconds.
    assert sorted(times)[len(times) // 4] < 1e-3


def test_memory_of_a_long_call_is_that_of_its_tensors() -> None:
    """The scores of 4,096 x 4,096 x 4 heads would take 268 MB a copy; what is allocated beside the output must not."""
    from torch.profiler import ProfilerActivity, profile

    grid = Grid(16, 16, 16)
    tensors = draw(1, grid.tokens, 4, 16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        stattn.attention(*tensors, grid, masks.window(5, 9, 9))
    largest = max(event.self_cpu_memory_usage for event in run.events())
    assert largest < 64 << 20


def test_a_window_costs_what_it_visits() -> None:
    """Visited pairs, not seconds: a mask of 10 % must not walk more than 20 % of the dense pairs on a real grid."""
    from stattn.reference.walk import walk

    grid, mask = Grid(21, 30, 52), masks.window(9, 13, 25)
    box = Region((0, 0, 0), grid.shape)
    visited = sum(len(group.q_bases) * len(group.q) * len(group.k) for group in walk(mask, grid, box, box))
    assert mask.density(grid) * grid.video**2 < visited < 0.2 * grid.video**2
