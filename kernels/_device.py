"""What launchers ask of a device."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# Bytes of shared memory that a program may take on sm_86, sm_89 and sm_120. On sm_80 it is 163 KB, on sm_90 227.
LITTLE_SHARED = 99 << 10
# Bytes of it that tiles or rows in flight may take in element-wise kernels: every GPU since sm_80 has them.
IN_FLIGHT = 96 << 10


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Make the device of a tensor the current one: Triton launches there, on its current stream."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def check_count(tokens: int, name: str = "x") -> None:
    """Raise ValueError for more tokens of a batch than kernels can number."""
    if tokens >= 2**31:
        raise ValueError(f"{name} has {tokens} tokens in its batch; the Triton kernels number at most 2**31 - 1")


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Give the compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def roomy(device: torch.device) -> bool:
    """Say whether a program may take more than `LITTLE_SHARED` on a device; so it may under the interpreter."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= 160 << 10
