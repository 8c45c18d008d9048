"""Attention's memory on a CPU: the peak of a process that computes a forward and a backward of a real video's tokens.

    python -m pytest benchmarks/bench_attention_memory.py --results benchmarks/results/cpu

Each case runs in a process of its own, whose largest resident memory counts whole: Python and PyTorch, q, k, v, the
output and its gradient, and the gradients of q, k and v. Outputs and gradients are compared with float64.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import stattn
from stattn import masks, results
from stattn.grid import Grid

GRID, HEADS, DIM = Grid(21, 30, 52), 12, 128  # Wan 2.1 1.3B at 480p: 32,760 tokens
LIMIT_GIB = 4
MASKS = {"window_9_15_25": masks.window(9, 15, 25), "dense": masks.full()}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = 64


def peak_gib() -> float:
    """Return the largest resident memory of this process so far.

    Not by getrusage: what it returns begins with the memory of the process that started this one.
    """
    with open("/proc/self/status", encoding="utf-8") as status:
        (kib,) = (int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return kib / (1 << 20)


def run(label: str, dtype: str) -> float:
    """Compute a forward and a backward, check them, and return the peak in GiB before the check."""
    mask = MASKS[label]
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, GRID.tokens, HEADS, DIM, generator=generator, dtype=DTYPES[dtype]) for _ in range(4)
    )
    for x in (q, k, v):
        x.requires_grad_()
    out = stattn.attention(q, k, v, GRID, mask)
    out.backward(dout)
    peak = peak_gib()
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    eps = torch.finfo(q.dtype).eps
    chosen = torch.randperm(GRID.tokens, generator=generator)[:ROWS]
    hidden = ~mask.allowed(GRID, chosen)
    for head in range(0, HEADS, 5):
        qh, kh, vh, dh, gh, keys_grad, values_grad = (
            x.detach()[0, :, head].double() for x in (q, k, v, dout, q.grad, k.grad, v.grad)
        )
        p = (qh[chosen] @ kh.T / math.sqrt(DIM)).masked_fill(hidden, -torch.inf).softmax(-1)
        want = p @ vh
        ds = p * (dh[chosen] @ vh.T - (dh[chosen] * want).sum(-1, keepdim=True))
        for name, got, exact in (
            ("out", out.detach()[0, chosen, head].double(), want),
            ("dq", gh[chosen], ds @ kh / math.sqrt(DIM)),
        ):
            error = (got - exact).square().mean().sqrt() / exact.square().mean().sqrt()
            assert error < (2 if dtype == "bf16" else 8) * eps, f"{name} of head {head}: relative error {error:.2e}"
        # The weights of a row add up to one, and so dV to dout; and sum dQ * Q = sum dS * S = sum dK * K.
        lost = (values_grad - dh).sum(0).abs() / dh.norm(dim=0)
        assert (lost < 32 * eps).all(), f"dv of head {head}: {lost.max():.2e} of dout is lost"
        at_queries, at_keys = gh * qh, keys_grad * kh
        lost = (at_queries.sum() - at_keys.sum()).abs() / at_queries.norm()
        assert lost < 32 * eps, f"dk of head {head}: {lost:.2e} of dQ * Q is lost"
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("label, dtype", [("window_9_15_25", "fp32"), ("window_9_15_25", "bf16"), ("dense", "fp32")])
def test_a_forward_and_a_backward_fit_in_memory(
    benchmark: Any, report: results.Report, device: str, label: str, dtype: str
) -> None:
    if device != "cpu":
        pytest.skip("measures the CPU's default, this machine has a GPU")

    def child() -> float:
        path = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, __file__, label, dtype]
        done = subprocess.run(command, env=path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    peak = benchmark.pedantic(child, rounds=1, iterations=1)
    impl = "sdpa" if label == "dense" else "reference"
    name = f"attention/{impl}/{label}_fwd_bwd_peak_{dtype}/wan-1.3b-480p"
    report.results.append(results.Result(name, "GiB", peak, peak, peak, None, None, checked=True))
    assert peak <= LIMIT_GIB


if __name__ == "__main__":
    print(run(*sys.argv[1:]))
