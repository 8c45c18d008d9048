"""What a warm call of attention costs its caller, and what calls past the dispatcher say to the library."""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from test_attention_memo import arguments, refuse

import stattn
from stattn import extension, masks
from stattn.grid import Grid
from stattn.ops import _attention_memo as memo
from stattn.ops import _cuda


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    memo.clear()
    yield
    memo.clear()


def test_what_calls_past_the_dispatcher_says_where_each_tensor_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[int, ...]] = []

    def library(packed: bytes) -> int:
        said.append(struct.unpack("=9Q", packed))
        return 0

    monkeypatch.setattr(_cuda, "_stream", lambda index: 77 + index)
    launch = object.__new__(_cuda.Launch)
    launch._direct = extension.Direct(library, refuse, refuse)
    launch._kept, launch._index, launch._alone = 5, 2, True
    made = []

    def here(*given: Any) -> torch.Tensor:
        made.append(given)
        return _cuda._empty(*given, torch.device("cpu"))

    def use(room: int) -> None:
        found = _cuda._results(q, room)
        launch._here = tuple(partial(here, *each) for each in found)
        launch._there = tuple(partial(_cuda._empty, *each, torch.device("cpu")) for each in found)

    q, k, v = torch.randn(3, 2, 2, 24, 8).bfloat16().transpose(2, 3).unbind()
    places = q.data_ptr(), k.data_ptr(), v.data_ptr()
    real = torch.ones(2, 3, dtype=torch.bool)
    for room, valid, wants, fill in itertools.product((0, 7), (None, real), (True, False), (True, False)):
        use(room)
        made.clear()
        out, lse = launch(places, valid, wants, fill)
        assert out.shape == q.shape
        assert out.is_contiguous()
        assert out.dtype == torch.bfloat16
        assert (None if lse is None else (lse.shape, lse.dtype)) == (((2, 2, 24), torch.float32) if wants else None)
        assert len(made) == (0 if fill else 1 + wants + (room > 0))
        addresses = [0 if x is None else x.data_ptr() for x in (q, k, v, out, lse, valid)]
        assert said[-1][:7] == (5, *addresses)
        assert (said[-1][7] == 0) == (room == 0)
        assert said[-1][8] == 79
    use(0)
    launch._alone = False
    for current in (2, 0):  # memory comes from the device of the call
        monkeypatch.setattr(_cuda, "_current_device", {2: lambda: 2, 0: lambda: 0}[current])
        made.clear()
        launch(places, None, False, False)
        assert len(made) == (current == 2)
    launch._direct = extension.Direct(lambda packed: 9, refuse, lambda error: b"no")
    with pytest.raises(RuntimeError, match="attention: no"):
        launch(places, None, False, True)


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
