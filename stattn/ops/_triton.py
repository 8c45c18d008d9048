"""Whether Triton's kernels can run a call at all; what a kernel serves is said beside its operation."""

from __future__ import annotations

import importlib.util

import torch


@torch.compiler.assume_constant_result
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result  # Dynamo cannot trace how Triton reads its knob
def _interpreted() -> bool:
    # Kernels are made for the interpreter, or for a GPU, once, when their file is imported.
    from triton import knobs

    return bool(knobs.runtime.interpret)


def why_not(device: str, *dtypes: torch.dtype) -> str | None:
    """Say why Triton cannot run on tensors of these dtypes on a device of this type, or None.

    On a CPU kernels run under Triton's interpreter (TRITON_INTERPRET=1), for tests: slowly, and not in bfloat16, whose
    arithmetic it gets wrong. ``auto`` never takes them there.
    """
    if not _installed():
        return "Triton is not installed"
    if any(dtype == torch.float64 for dtype in dtypes):
        return "has no float64 kernel"
    if device == "cuda":
        return None
    if device != "cpu" or not _interpreted():
        return f"runs on CUDA, the tensors are on {device}"
    if any(dtype == torch.bfloat16 for dtype in dtypes):
        return "Triton's interpreter computes bfloat16 wrongly"
    return None
