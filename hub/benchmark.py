"""Attention under masks, beside PyTorch's given the same mask: ``kernels benchmark stattn/stattn --version 1``.

Each workload is verified against PyTorch before it is timed; so is what PyTorch took.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark

GRIDS = {"cuda": (13, 30, 45), "cpu": (3, 8, 8)}  # CogVideoX at 480p x 49 frames, and what a CPU can do
HEADS, HEAD_DIM = 12, 64


class AttentionBenchmark(Benchmark):
    """A workload a mask: q, k and v [1, T*H*W, heads, D] in bf16 on a GPU."""

    seed = 0

    def _setup(self, name: str, *sizes: int) -> None:
        where = torch.device(self.device).type
        self.grid = GRIDS[where]
        t, h, w = self.grid
        dtype = torch.bfloat16 if where == "cuda" else torch.float32
        self.q, self.k, self.v = torch.randn(3, 1, t * h * w, HEADS, HEAD_DIM, device=self.device, dtype=dtype)
        self.mask = getattr(self.kernel.masks, name)(*sizes)
        self.allowed = None if name == "full" else self.mask.allowed(self.grid).to(self.device)

    def _run(self) -> None:
        self.out = self.kernel.attention(self.q, self.k, self.v, self.grid, self.mask)

    def _reference(self) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.allowed).transpose(1, 2)

    def setup_full(self) -> None:
        self._setup("full")

    def benchmark_full(self) -> None:
        self._run()

    def verify_full(self) -> torch.Tensor:
        return self._reference()

    def setup_window(self) -> None:
        self._setup("window", 3, 7, 7)

    def benchmark_window(self) -> None:
        self._run()

    def verify_window(self) -> torch.Tensor:
        return self._reference()

    def setup_frame_causal(self) -> None:
        self._setup("frame_causal", 1)

    def benchmark_frame_causal(self) -> None:
        self._run()

    def verify_frame_causal(self) -> torch.Tensor:
        return self._reference()
