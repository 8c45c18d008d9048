"""The backward of attention by the CUDA kernels: dense beside cuDNN's, masks beside their forward, on the same card.

    python -m pytest benchmarks/bench_attention_cuda_bwd.py --results benchmarks/results/h200

The whole backward is timed, its preparation and conversions included, and sampled gradients of the timed tensors are
compared with float64 before. Names are attention/cuda/<mask>_bwd/<shape>, with _deterministic where dQ is summed in a
fixed order. The table that is printed scales milliseconds as bench_attention.py does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import CASES, Case
from bench_attention import BACKWARD_ROUNDS, Field, ids, table
from torch import Tensor

import stattn
from stattn import extension, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or extension.why_not("cuda") is not None, reason="no Hopper GPU, or no library"
    ),
]
__all__ = ["table"]  # a fixture
BACKWARDS = [case for case in CASES if case.backward]
CUDNN = "torch-cudnn"
DENSE = [case for case in BACKWARDS if case.name == "dense"]
MASKED = [case for case in BACKWARDS if case.name != "dense"]


@pytest.fixture
def clean() -> Iterator[None]:
    """Give each case the memory that the one before it held."""
    yield
    torch.cuda.empty_cache()


def attend(field: Field, deterministic: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return stattn.attention(q, k, v, field.case.grid, field.mask, deterministic=deterministic, impl="cuda")


def enter(field: Field) -> None:
    """Let both ways of the backward take part."""
    field.enter("cuda", partial(attend, field, False))
    field.enter("cuda", partial(attend, field, True), f"{field.label}_deterministic")


def measure(field: Field, report: results.Report, baseline: str, benchmark: Any) -> None:
    """Time all in interleaved rounds, and record them beside one of them."""
    rounds = min(field.case.rounds, BACKWARD_ROUNDS)
    timings = results.time_contenders(field.calls, device="cuda", rounds=rounds, warmup=1)
    for name, timing in timings.items():
        beside = None if name == baseline else (baseline, timings[baseline])
        report.results.append(results.Result.of(name, timing, baseline=beside, checked=True))
    first = next(iter(field.calls.values()))
    benchmark.pedantic(lambda: (first(), torch.cuda.synchronize()), rounds=1, iterations=1)


@pytest.mark.parametrize("case", MASKED, ids=ids(MASKED))
def test_backwards_of_masks_beside_their_forward(
    case: Case, benchmark: Any, report: results.Report, table: None, clean: None
) -> None:
    field = Field(case, report, "cuda", backward=True)
    enter(field)
    forward = f"attention/cuda/{case.label()}/{case.shape}"
    given = [x.detach() for x in field.qkv]
    field.truth.check_output(attend(field, False, *given))
    field.calls[forward] = partial(attend, field, False, *given)
    measure(field, report, forward, benchmark)


@pytest.mark.parametrize("case", DENSE, ids=ids(DENSE))
def test_dense_backwards_beside_cudnn(
    case: Case, benchmark: Any, report: results.Report, table: None, clean: None
) -> None:
    field = Field(case, report, "cuda", backward=True)
    enter(field)
    field.enter(CUDNN, case.peers[CUDNN](case.grid, field.mask).forward)
    measure(field, report, field.name(CUDNN), benchmark)
