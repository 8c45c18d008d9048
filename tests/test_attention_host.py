"""What a warm call of attention costs its caller, and what calls past the dispatcher say to the library."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from test_attention_cuda import gpu
from test_attention_memo import arguments
from torch.utils._python_dispatch import TorchDispatchMode

import stattn
from stattn import extension, masks
from stattn.grid import Grid, Region
from stattn.ops import _attention_memo as memo


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    memo.clear()
    yield
    memo.clear()


@pytest.mark.skipif(not extension.LIBRARY.exists(), reason="no CUDA library")
def test_the_library_finds_what_it_needs_of_this_python() -> None:
    assert extension.load()
    assert extension.attention_function() is not None


class TestOnHopper:
    """What the library calls by Python's stable ABI, past the dispatcher, beside the operation."""

    pytestmark = gpu

    def test_results_are_those_of_the_operation(self) -> None:
        text, text_valid = Grid(3, 5, 7, 0, 6), torch.arange(12, device="cuda").view(2, 6) % 5 > 0
        few = Region((2, 0, 0), (1, 8, 8))  # in pieces
        ways: tuple[tuple[Grid, masks.Mask, dict[str, Any], int], ...] = (
            (Grid(3, 5, 7), masks.full(), {}, 105),
            (Grid(3, 5, 7), masks.window(3, 3, 3), {}, 105),
            (text, masks.window(3, 3, 3), {"valid": text_valid}, 111),
            (Grid(3, 8, 640), masks.full(), {"q_region": few}, 64),
        )
        for (grid, mask, options, rows), dim, lse in itertools.product(ways, (64, 128), (False, True)):
            q = torch.randn(2, rows, 4, dim, device="cuda", dtype=torch.bfloat16)
            k, v = torch.randn(2, 2, grid.tokens, 2, dim, device="cuda", dtype=torch.bfloat16).unbind()
            call = partial(stattn.attention, q, k, v, grid, mask, return_lse=lse, impl="cuda", **options)
            with Watched():
                want = call()
            for filled in (False, False, True):
                torch.use_deterministic_algorithms(filled)
                try:
                    got = call()
                finally:
                    torch.use_deterministic_algorithms(False)
                for mine, other in zip(*((x if lse else (x,)) for x in (got, want)), strict=True):
                    assert torch.equal(mine, other)
                    assert (mine.dtype, mine.stride()) == (other.dtype, other.stride())

    def test_a_call_holds_nothing_but_its_results(self) -> None:
        q, k, v = torch.randn(3, 1, 512, 2, 64, device="cuda", dtype=torch.bfloat16).unbind()
        call = partial(stattn.attention, q, k, v, Grid(8, 8, 8), masks.window(3, 3, 3), return_lse=True, impl="cuda")
        held = [call() for _ in range(4)]
        before, references = torch.cuda.memory_allocated(), sys.getrefcount(torch.Tensor.data_ptr)
        for _ in range(1000):
            call()
        assert torch.cuda.memory_allocated() == before
        assert abs(sys.getrefcount(torch.Tensor.data_ptr) - references) < 10
        assert len(held) == 4

    def test_wrong_arguments_of_a_kept_call_raise(self) -> None:
        q, k, v = torch.randn(3, 1, 512, 2, 64, device="cuda", dtype=torch.bfloat16).unbind()
        for _ in range(2):
            stattn.attention(q, k, v, Grid(8, 8, 8), impl="cuda")
        (known,) = memo._known.values()
        launch, places = known.launch, memo.places_of(q, k, v)
        assert launch is not None
        assert launch(places, None, False, False)[0].shape == q.shape
        for wrong in ((), (places,), (places[:2], None, False, False), (("q", 0, 0), None, False, False)):
            with pytest.raises((RuntimeError, TypeError, IndexError)):
                launch(*wrong)


class Watched(TorchDispatchMode):
    """Lets calls go by the operation."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def median(calls: int, run: Callable[[], Any], rest: Callable[[], Any] = lambda: None) -> float:
    """Microseconds of the caller's time; ``rest`` is called now and then, outside of it."""
    for _ in range(calls // 10):
        run()
    times = []
    for number in range(calls):
        if number % 100 == 0:
            rest()
        start = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - start)
    return sorted(times)[calls // 2] / 1000


def test_a_warm_call_takes_a_fraction_of_the_time_of_a_cold_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(mask=masks.window(1, 3, 3))
    result = stattn.attention(**given, return_lse=True)
    (known,) = memo._known.values()
    free = known._replace(run=lambda *given: result)

    monkeypatch.setattr(memo, "recall", lambda *given: (None, None))

    def of_one(find: Callable[[Any], Any]) -> float:
        monkeypatch.setattr(memo, "find", find)
        return median(200, lambda: stattn.attention(**given))

    # A shared machine is slow at times, but not for the cold calls alone.
    of_cold = of_one(lambda signature: None)
    assert of_one(lambda signature: free) < max(of_cold / 2, 30)


@pytest.mark.gpu
@pytest.mark.parametrize("grad, most", [(False, 15), (True, 30)], ids=["no grad", "grad"])
@pytest.mark.parametrize("mask", [masks.full(), masks.window(3, 3, 3)], ids=str)
def test_a_warm_call_on_a_gpu_takes_few_microseconds_of_the_host(mask: masks.Mask, grad: bool, most: float) -> None:
    q, k, v = torch.randn(3, 1, 512, 2, 64, device="cuda", dtype=torch.bfloat16).unbind()
    q.requires_grad_(grad)
    grid = Grid(8, 8, 8)
    if "* cuda" not in stattn.explain(q.detach(), k, v, grid, mask):
        pytest.skip("the CUDA kernels do not run here")
    took = median(10_000, lambda: stattn.attention(q, k, v, grid, mask, impl="cuda"), torch.cuda.synchronize)
    assert took <= most, f"{took:.1f} us"
