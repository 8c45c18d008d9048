"""Whether Triton's kernels can run a call at all; what a kernel serves is said beside its operation."""

from __future__ import annotations

import importlib.util
import os

import torch

from stattn.ops._dispatch import lacks

CAPABILITY = (8, 0)  # the least that Triton compiles these kernels for
_INSTALLED = importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    # As Triton reads it. Kernels are made for the interpreter, or for a GPU, once, when their file is imported.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def why_not(device: str, capability: tuple[int, int], *dtypes: torch.dtype) -> str | None:
    """Say why Triton cannot run on tensors of these dtypes on a device of this type, or None.

    capability: of a CUDA device, as ``capability_of`` gives it.
    On a CPU kernels run under Triton's interpreter (TRITON_INTERPRET=1), for tests: slowly, and not in bfloat16, whose
    arithmetic it gets wrong. ``auto`` never takes them there.
    """
    if not _INSTALLED:
        return "Triton is not installed"
    if any(dtype == torch.float64 for dtype in dtypes):
        return "has no float64 kernel"
    if device == "cuda":
        return lacks(capability, CAPABILITY) if capability < CAPABILITY else None
    if device != "cpu" or not _interpreted():
        return f"runs on CUDA, the tensors are on {device}"
    if any(dtype == torch.bfloat16 for dtype in dtypes):
        return "Triton's interpreter computes bfloat16 wrongly"
    return None
