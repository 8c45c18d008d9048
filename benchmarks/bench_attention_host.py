"""What a warm call of attention by the CUDA kernels costs its caller, beside an addition in place on the same host.

    python -m pytest benchmarks/bench_attention_host.py --results benchmarks/results/h200

Names are attention/cuda/host and host_grad, in microseconds. The device waits for the host: what it computes is tiny.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from bench_attention_cuda import Case, assert_right, pytestmark, tensors

import stattn
from stattn import masks, results
from stattn.grid import Grid
from stattn.masks import Mask

__all__ = ["pytestmark"]


def time_host(contenders: dict[str, Callable[[], Any]], calls: int = 10_000) -> dict[str, results.Timing]:
    """Time calls by the caller's clock, in turns of a hundred that begin with an idle device."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        for _ in range(1000):
            call()
    for _ in range(0, calls, 100):
        for name, call in contenders.items():
            torch.cuda.synchronize()
            for _ in range(100):
                start = time.perf_counter_ns()
                call()
                samples[name].append((time.perf_counter_ns() - start) / 1000)
    return {name: results.Timing(tuple(each)) for name, each in samples.items()}


@pytest.mark.parametrize("grad", [False, True], ids=["host", "host_grad"])
@pytest.mark.parametrize("name, mask", [("full", masks.full()), ("window_3_3_3", masks.window(3, 3, 3))])
def test_the_hosts_time_of_a_warm_call(
    benchmark: Any, report: results.Report, name: str, mask: Mask, grad: bool
) -> None:
    case = Case(name, Grid(8, 8, 8), 2, 64, mask)
    q, k, v = tensors(case)
    q.requires_grad_(grad)
    call = partial(stattn.attention, q, k, v, case.grid, mask, impl="cuda")
    assert_right(call().detach(), (q.detach(), k, v), case, mask)
    other = torch.zeros_like(k)
    ours, beside = f"attention/cuda/{'host_grad' if grad else 'host'}/{name}", "an addition in place"
    timings = time_host({ours: call, beside: lambda: other.add_(1)})
    benchmark.pedantic(lambda: (call(), torch.cuda.synchronize()), rounds=2, iterations=1)
    base, took = timings[beside].median, timings[ours]
    baseline = results.Baseline(beside, base)
    report.results.append(
        results.Result(ours, "us", took.median, took.p20, took.p80, baseline, base / took.median, checked=True)
    )
