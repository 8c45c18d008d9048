"""One denoising step of published models, by stattn and by what a user would run today, on the same weights.

    python -m pytest benchmarks/bench_step.py --results benchmarks/results/h200
    stattn bench step --shape wan2.1-1.3b-480p           # the same from the command line

Contenders are those of `stattn.bench.models`, rows those of `stattn.bench.runs.measure_step`. What is compiled is
compiled by blocks, so that it takes seconds and not minutes; benchmarks/notes/operations.md says what that costs
diffusers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stattn import results
from stattn.bench import models, runs

# Windows of 2 to 74 % of the pairs: what a mask costs, and what it changes.
WINDOWS = [f"stattn-window{each}" for each in ((3, 9, 19), (5, 13, 25), (11, 19, 33), (15, 23, 41), (19, 27, 47))]
# name, layers (None: all), contenders (None: all of the device)
OURS = ["stattn-dense", "stattn-sliding_tile", "stattn-window"]
GPU = [
    ("wan2.1-1.3b-480p", None, ["diffusers", *OURS]),
    ("wan2.1-14b-720p", 2, ["diffusers", *OURS]),
    ("wan2.1-1.3b-480p", 4, ["eager", "compiled", "flex", "flex-window", *OURS, *WINDOWS]),
]
CPU = [("wan-small", None, None)]
CASES = [
    pytest.param(*case, device, id=models.SHAPES[case[0]].of_layers(case[1]).name, marks=marks)
    for device, cases, marks in (("cpu", CPU, ()), ("cuda", GPU, (pytest.mark.gpu,)))
    for case in cases
]


@pytest.mark.parametrize(("name", "layers", "wanted", "there"), CASES)
def test_step(
    benchmark: Any,
    report: results.Report,
    device: str,
    name: str,
    layers: int | None,
    wanted: list[str] | None,
    there: str,
) -> None:
    if device != there:
        pytest.skip(f"measures the {there.upper()}, this machine measures the {device.upper()}")
    shape = models.SHAPES[name].of_layers(layers)
    calls = runs.measure_step(report, shape, wanted or models.names(shape, device), device, rounds=3)

    def run() -> None:
        calls["stattn-dense"]()
        if device == "cuda":
            torch.cuda.synchronize()

    # pytest-benchmark's own table; its clock is the host's, so the call waits.
    with torch.no_grad():
        benchmark.pedantic(run, rounds=3, iterations=1)
    torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
