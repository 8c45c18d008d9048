"""Attention: the implementations of this machine beside PyTorch's own kernels, on the same tensors, round by round.

    python -m pytest benchmarks/bench_attention.py --results benchmarks/results/h200

Every contender's output is compared with float64 rows before it is timed; a wrong one fails the benchmark and nothing
is written of it. Names are attention/<implementation>/<mask>_<pass>/<shape>.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import stattn
from stattn import masks, results
from stattn.grid import Grid
from stattn.masks import Mask

WAN_480P = Grid(21, 30, 52)
ROWS = 64


def tensors(grid: Grid, heads: int, dim: int, device: str, grad: bool = False) -> tuple[torch.Tensor, ...]:
    """Random q, k and v [1, N, heads, dim]: bf16 on a GPU, fp32 on a CPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, grid.tokens, heads, dim)
    return tuple(
        torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_(grad) for _ in range(3)
    )


def assert_right(out: torch.Tensor, qkv: tuple[torch.Tensor, ...], grid: Grid, mask: Mask) -> None:
    """Compare sampled rows, the first and the last with float64, and refuse more than rounding explains."""
    q, k, v = (x.detach() for x in qkv)
    slack = 2 if q.dtype == torch.bfloat16 else 8  # fp32 sums of thousands of terms round on the way, too
    chosen = torch.randperm(grid.tokens, generator=torch.Generator().manual_seed(1))[:ROWS]
    chosen = torch.cat([chosen, torch.tensor([0, grid.tokens - 1])])
    seen = mask.allowed(grid, chosen).to(q.device)
    for head in range(0, q.shape[2], 5):
        scores = q[0, chosen, head].double() @ k[0, :, head].double().T / math.sqrt(q.shape[3])
        want = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[0, :, head].double()
        error = (out[0, chosen, head].double() - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error < slack * torch.finfo(q.dtype).eps, f"head {head}: relative error {error:.2e}"


def measure(
    benchmark: Any,
    report: results.Report,
    contenders: dict[str, Callable[[], Any]],
    baseline: str,
    device: str,
    rounds: int,
) -> None:
    """Time the contenders in interleaved rounds and record each beside the baseline."""
    timings = results.time_contenders(contenders, device=device, rounds=rounds, warmup=1 if device == "cpu" else 3)
    for name, timing in timings.items():
        beside = None if name == baseline else (baseline, timings[baseline])
        report.results.append(results.Result.of(name, timing, baseline=beside, checked=True))
    # pytest-benchmark's own table and JSON show the first contender; its clock is the host's, so the call waits.
    first = next(iter(contenders.values()))

    def run() -> None:
        first()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=3, iterations=1)


# About 10 % of the pairs each: a compact window, one over all frames, and whole tiles.
TEN_PERCENT = {
    "window_9_15_25": masks.window(9, 15, 25),
    "window_21_10_16": masks.window(21, 10, 16),
    "sliding_tile_122": masks.sliding_tile((7, 10, 13), (1, 2, 2)),
}


def test_sparse_masks_beside_dense_attention_on_a_cpu(benchmark: Any, report: results.Report, device: str) -> None:
    if device != "cpu":
        pytest.skip("measures the CPU's default, this machine has a GPU")
    heads = 2
    qkv = tensors(WAN_480P, heads, 128, device)
    shape = f"wan-1.3b-480p-{heads}-heads"
    contenders: dict[str, Callable[[], Any]] = {}
    for label, mask in (*TEN_PERCENT.items(), ("dense", masks.full())):
        impl = "sdpa" if label == "dense" else "reference"
        call = partial(stattn.attention, *qkv, WAN_480P, mask, impl=impl)
        assert_right(call(), qkv, WAN_480P, mask)
        contenders[f"attention/{impl}/{label}_fwd/{shape}"] = call
    measure(benchmark, report, contenders, f"attention/sdpa/dense_fwd/{shape}", device, rounds=3)


@pytest.mark.gpu
def test_dense_forward(benchmark: Any, report: results.Report) -> None:
    qkv = tensors(WAN_480P, 12, 128, "cuda")
    swapped = [x.transpose(1, 2) for x in qkv]

    def torch_kernel(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*swapped).transpose(1, 2)

    contenders: dict[str, Callable[[], torch.Tensor]] = {
        "attention/sdpa/dense_fwd/wan-1.3b-480p": lambda: stattn.attention(*qkv, WAN_480P, impl="sdpa"),
        "attention/torch-cudnn/dense_fwd/wan-1.3b-480p": lambda: torch_kernel(SDPBackend.CUDNN_ATTENTION),
        "attention/torch-flash/dense_fwd/wan-1.3b-480p": lambda: torch_kernel(SDPBackend.FLASH_ATTENTION),
    }
    for call in contenders.values():
        assert_right(call(), qkv, WAN_480P, masks.full())
    measure(benchmark, report, contenders, "attention/torch-cudnn/dense_fwd/wan-1.3b-480p", "cuda", rounds=20)


@pytest.mark.gpu
def test_dense_backward(benchmark: Any, report: results.Report) -> None:
    qkv = tensors(WAN_480P, 12, 128, "cuda", grad=True)
    out = stattn.attention(*qkv, WAN_480P, impl="sdpa")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        other = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)
    dout = torch.randn_like(out)
    contenders: dict[str, Callable[[], tuple[torch.Tensor, ...]]] = {
        "attention/sdpa/dense_bwd/wan-1.3b-480p": lambda: torch.autograd.grad(out, qkv, dout, retain_graph=True),
        "attention/torch-cudnn/dense_bwd/wan-1.3b-480p": lambda: torch.autograd.grad(
            other, qkv, dout, retain_graph=True
        ),
    }
    # dV = P^T dout of sampled keys: the scores and the LSE of all rows against float64.
    got = [call() for call in contenders.values()]
    keys = torch.randperm(WAN_480P.tokens, generator=torch.Generator().manual_seed(2))[:ROWS]
    q, k = (x.detach()[0, :, 0].double() for x in qkv[:2])
    scale = 1 / math.sqrt(128)
    lse = torch.cat([torch.logsumexp(part @ k.T * scale, -1) for part in q.split(2048)])
    want = torch.exp(k[keys] @ q.T * scale - lse) @ dout[0, :, 0].double()
    for grads in got:
        error = (grads[2][0, keys, 0].double() - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error < 4 * torch.finfo(torch.bfloat16).eps, f"dV: relative error {error:.2e}"
        torch.testing.assert_close(grads[0], got[0][0], rtol=5e-2, atol=1e-3)
    measure(benchmark, report, contenders, "attention/torch-cudnn/dense_bwd/wan-1.3b-480p", "cuda", rounds=10)
