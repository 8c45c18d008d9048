"""The first half of a feed-forward at Wan's sizes, its GELU on the product, beside the two operations.

    python -m pytest benchmarks/bench_linear_gelu.py --results benchmarks/results/h200

Names are ops/<operation>/fwd/<shape>: linear_gelu, linear_gelu-eager (the projection, then GELU), linear_gelu-compiled
and linear_gelu-product, the projection alone, which is the baseline. All is timed by graph replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_ops import skip_unless_measured, touch
from stattn import results
from stattn.ops.linear_gelu import linear_gelu
from stattn.reference.linear_gelu import linear_gelu as reference


class Shape(NamedTuple):
    """Tokens, their channels and the hidden features of a feed-forward."""

    tokens: int
    channels: int
    features: int


GPU_SHAPES = {"wan-14b-720p": Shape(75_600, 5120, 13_824), "wan-1.3b-480p": Shape(32_760, 1536, 8960)}
CPU_SHAPES = {"tiny": Shape(512, 256, 1024)}
CASES = [
    pytest.param(name, device, id=name, marks=marks)
    for device, shapes, marks in (("cpu", CPU_SHAPES, ()), ("cuda", GPU_SHAPES, (pytest.mark.gpu,)))
    for name in shapes
]


def assert_close(got: Tensor, given: tuple[Tensor, Tensor, Tensor]) -> None:
    """Compare the first, the last and 62 other tokens with float64."""
    rows = torch.linspace(0, got.shape[0] - 1, 64, device=got.device).long()
    x, weight, bias = (each.double() for each in given)
    want = reference(x[rows], weight, bias)
    error = (got[rows].double() - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert error < torch.finfo(got.dtype).eps * (1 if got.dtype == torch.bfloat16 else 8), f"relative error {error:.2e}"


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_forward(benchmark: Any, report: results.Report, device: str, name: str, kind: str) -> None:
    skip_unless_measured(device, kind)
    shape = (GPU_SHAPES | CPU_SHAPES)[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    xs = [torch.randn(shape.tokens, shape.channels, device=device, dtype=dtype) for _ in range(2)]
    weight = torch.randn(shape.features, shape.channels, device=device, dtype=dtype) / shape.channels**0.5
    bias = torch.randn(shape.features, device=device, dtype=dtype)
    calls: dict[str, Callable[..., Tensor]] = {"linear_gelu": linear_gelu, "linear_gelu-eager": reference}
    if device == "cuda":
        torch.compiler.reset()
        calls["linear_gelu-compiled"] = torch.compile(reference, fullgraph=True, dynamic=False)
    product = f"ops/linear_gelu-product/fwd/{name}"
    with torch.no_grad():
        for call in calls.values():
            assert_close(call(xs[0], weight, bias), (xs[0], weight, bias))
        timed: dict[str, Callable[[int], Any]] = {
            f"ops/{each}/fwd/{name}": (lambda copy, call=call: call(xs[copy], weight, bias))
            for each, call in calls.items()
        }
        timed[product] = lambda copy: F.linear(xs[copy], weight, bias)
        timings = results.time_in_graph(timed, copies=2, device=device, rounds=10)
        for each, timing in timings.items():
            baseline = None if each == product else (product, timings[product])
            report.results.append(results.Result.of(each, timing, baseline=baseline, checked=True))
        touch(benchmark, lambda: linear_gelu(xs[0], weight, bias), device)
