"""The CUDA library: whether it is here, and why not.

The library (csrc/, built by setup.py) registers its operations under `torch.ops.stattn`. It is loaded when first asked
for, never on import, so that `import stattn` works where it was not built. Its CPU operations run everywhere, its
kernels on compute capability 9.0.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).parent / "libstattn.so"
CAPABILITY = (9, 0)
_IMPLEMENTATIONS = torch.library.Library("stattn", "IMPL")


@functools.cache
def _failure() -> str | None:
    """Load the library once and return what stood in the way, or None."""
    if not LIBRARY.exists():
        return "the CUDA library was not built: installing stattn found no nvcc 13, or was told to leave it out"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the CUDA library failed to load: {error}"
    stages = tuple(f"attention_backward_{stage}" for stage in ("prepare", "kv", "dq", "finish", "lists"))
    for name in ("copy_bytes", *stages):  # which write into tensors that they are given
        torch.library.register_fake(f"stattn::{name}", lambda *given: None)
    torch.library.register_fake("stattn::attention_output", lambda *given: _attention_results(*given)[0])
    for name in ("attention_forward", "attention_forward_lists"):
        torch.library.register_fake(f"stattn::{name}", _attention_results)
    for name in ("attention_forward", "attention_output", "attention_forward_lists"):
        for key in ("AutogradCUDA", "ADInplaceOrView"):  # gradients are those of stattn::attention
            _IMPLEMENTATIONS.impl(name, torch.library.fallthrough_kernel, key)
    return None


@functools.cache
def attention_function() -> Callable[[int, tuple[object, ...]], Callable[..., Any]] | None:
    """Give what turns a call that the loaded library keeps into a function, see csrc/attention_direct.cpp.

    None where this process has no stable ABI of Python's that the library finds.
    """
    library = ctypes.PyDLL(str(LIBRARY))
    if not library.stattn_has_python():
        return None
    function = library.stattn_attention_function
    function.argtypes, function.restype = (ctypes.c_uint64, ctypes.py_object), ctypes.py_object
    return function


def _attention_results(q: torch.Tensor, *others: object) -> tuple[torch.Tensor, torch.Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=torch.float32)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def load() -> bool:
    """Load the CUDA library if it is not yet loaded. Returns whether `torch.ops.stattn` holds its operations."""
    return _failure() is None


def why_not(device: torch.device | str | None = None) -> str | None:
    """Say why the CUDA library cannot be used, or None if it can.

    Without `device`: whether the library is built and loads. With one: first whether its kernels could run there at
    all. Never raises for what the machine lacks: that is the answer.
    """
    if device is not None:
        device = torch.device(device)
        if device.type != "cuda":
            return f"the CUDA library has kernels for CUDA devices only, not for {device.type}"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            return f"torch finds {torch.cuda.device_count()} CUDA devices, so no {device}"
        capability = _capability(index)
        if capability != CAPABILITY:
            return f"compute capability {capability[0]}.{capability[1]}, not {CAPABILITY[0]}.{CAPABILITY[1]}"
    return _failure()
