"""The last layer of Wan, modulated norm and projection to patches, beside compiled code and a copy of the same bytes.

    python -m pytest benchmarks/bench_modulate_linear.py --results benchmarks/results/h200

Names are ops/<operation>/fwd/<shape> as in ``bench_ops``: modulate_linear, and modulate_linear-compiled, -two (this
package's modulate, then a linear layer) and -copy. The tokens and the result count as bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_ops import CPU_SHAPES, GPU_SHAPES, skip_unless_measured, time_and_record, touch
from stattn import results
from stattn.ops.modulate import modulate
from stattn.ops.modulate_linear import modulate_linear
from stattn.reference.modulate_linear import modulate_linear as reference

FEATURES = 64
CASES = [
    pytest.param(name, device, id=name, marks=marks)
    for device, shapes, marks in (("cpu", CPU_SHAPES, ()), ("cuda", GPU_SHAPES, (pytest.mark.gpu,)))
    for name in shapes
]


def plain(x: Tensor, scale: Tensor, shift: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    return reference(x, scale, shift, "layer", None, None, 1e-6, matrix, bias)


def two(x: Tensor, scale: Tensor, shift: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    return F.linear(modulate(x, scale, shift), matrix, bias)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_forward(benchmark: Any, report: results.Report, device: str, name: str, kind: str) -> None:
    skip_unless_measured(device, kind)
    shape = (GPU_SHAPES | CPU_SHAPES)[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = shape.tokens * (shape.channels + FEATURES) * dtype.itemsize
    copies = results.copies_for(size) if device == "cuda" else 2
    torch.manual_seed(0)
    xs = [torch.randn(1, *shape, device=device, dtype=dtype) for _ in range(copies)]
    scale, shift = torch.randn(2, 1, shape.channels, device=device) / 3
    matrix = torch.randn(FEATURES, shape.channels, device=device, dtype=dtype) / shape.channels**0.5
    rest = (scale, shift, matrix, torch.randn(FEATURES, device=device, dtype=dtype))
    calls: dict[str, Callable[..., Tensor]] = {"modulate_linear": modulate_linear, "modulate_linear-two": two}
    if device == "cuda":
        torch.compiler.reset()
        calls["modulate_linear-compiled"] = torch.compile(plain, fullgraph=True, dynamic=False)
    with torch.no_grad():
        want = plain(*(each.double() for each in (xs[0][:, :4096], *rest)))
        for label, call in calls.items():
            error = (call(xs[0], *rest)[:, :4096] - want).square().mean().sqrt() / want.square().mean().sqrt()
            assert error < torch.finfo(torch.bfloat16).eps, f"{label}: relative error {error:.2e}"
        timed: dict[str, Callable[[int], Any]] = {
            f"ops/{label}/fwd/{name}": (lambda copy, call=call: call(xs[copy], *rest)) for label, call in calls.items()
        }
        time_and_record(report, timed, f"modulate_linear/fwd/{name}", size, copies, device)
        touch(benchmark, lambda: modulate_linear(xs[0], *rest), device)
