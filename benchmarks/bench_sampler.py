"""Whole samples: on a GPU 50 steps, this package's in one CUDA graph, on a CPU a few in a loop.

    CUBLASLT_WORKSPACE_SIZE=0 python -m pytest benchmarks/bench_sampler.py --results benchmarks/results/h200
    stattn bench sampler --shape wan2.1-1.3b-480p        # the same from the command line

Rows are those of `stattn.bench.runs.measure_sampler`. Without the variable (see `stattn.graph.SampleGraph`) gaps of a
graph are longer.
"""

from __future__ import annotations

from typing import Any

import pytest

from stattn import results
from stattn.bench import models, runs

# name, layers (None: all), steps, contenders (None: all of the device)
CASES = [
    pytest.param("wan-small", None, 4, None, "cpu", id="wan-small"),
    pytest.param(
        "wan2.1-1.3b-480p", None, 50, ["stattn-dense", "stattn-sliding_tile", "diffusers"], "cuda", id="wan2.1-1.3b",
        marks=pytest.mark.gpu,
    ),
    pytest.param("wan2.1-1.3b-480p", 4, 50, None, "cuda", id="wan2.1-1.3b-4-layers", marks=pytest.mark.gpu),
]  # fmt: skip


@pytest.mark.parametrize(("name", "layers", "steps", "wanted", "there"), CASES)
def test_sampler(
    benchmark: Any,
    report: results.Report,
    device: str,
    name: str,
    layers: int | None,
    steps: int,
    wanted: list[str] | None,
    there: str,
) -> None:
    if device != there:
        pytest.skip(f"measures the {there.upper()}, this machine measures the {device.upper()}")
    shape = models.SHAPES[name].of_layers(layers)

    def run() -> None:
        runs.measure_sampler(report, shape, wanted or models.names(shape, device), device, steps=steps)

    # A sample takes too long to be repeated for pytest-benchmark, whose table holds the whole measurement.
    benchmark.pedantic(run, rounds=1, iterations=1)
