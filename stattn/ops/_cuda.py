"""Attention by the CUDA library's Hopper kernels: which calls they serve, and how they are called."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import torch

from stattn import extension
from stattn.ops import _cuda_bwd_lists, _cuda_bwd_plan, _cuda_lists, _cuda_plan
from stattn.ops._cuda_plan import is_split, on_device
from stattn.ops._dispatch import lacks
from stattn.problem import Extras, Problem

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
ALIGNMENT = 16  # bytes: what a tensor copy asks of addresses and strides
LEAST_SCALE = 1e-37  # stands for 0, with which masked scores of -inf would turn into NaN
TOO_LARGE = 1e30  # a scale that check_elements in csrc/bindings.h refuses

_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)  # of a build with CUDA
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def obstacle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, extras: Extras, grad: bool
) -> str | None:
    """Say what in a call's tensors, masks or numbers stands against the kernels, or None. grad: one is needed."""
    reason = _mask_obstacle(problem, extras, grad)
    if reason is not None:
        return reason
    if problem.scale < 0:
        return f"scale={problem.scale} must not be negative"
    if problem.scale >= TOO_LARGE:
        return f"scale={problem.scale} must be below {TOO_LARGE:g}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        size = x.element_size()
        batch, token, head, _ = x.stride()
        # An axis of one place has no stride to speak of.
        wrong = (
            (batch * size % ALIGNMENT and x.shape[0] > 1)
            or (head * size % ALIGNMENT and x.shape[2] > 1)
            or ((token * size % ALIGNMENT or token == 0) and x.shape[1] > 1)
        )
        if wrong:
            return f"{name} has strides {tuple(x.stride())}: all but the last must be multiples of {ALIGNMENT} bytes"
        if type(x) in _PLAIN and x.device.type == "cuda" and x.data_ptr() % ALIGNMENT:
            return f"{name} starts at an address that is no multiple of {ALIGNMENT} bytes"
    return None


def _mask_obstacle(problem: Problem, extras: Extras, grad: bool) -> str | None:
    if extras.block_index is not None:
        return _cuda_lists.why_not(problem) or (_cuda_bwd_lists.why_not(problem) if grad else None)
    if extras.k_frames is not None:
        return "has no backward of k_frames" if grad else _cuda_plan.why_not(problem, frames=True)
    if is_dense(problem, extras.valid is not None):
        return None
    return _cuda_plan.why_not(problem) or (_cuda_bwd_plan.why_not(problem) if grad else None)


@lru_cache(maxsize=1024)
def is_dense(problem: Problem, valid: bool) -> bool:
    """Say whether every query sees every key. valid: whether the call says which global tokens are real."""
    if not all(_cuda_plan.sees_all(mask, problem) for mask in problem.masks):
        return False
    if problem.grid.globals == 0:
        return True
    return not valid and (problem.globals_see == "all" or not problem.q_globals)


def why_not(call: Any) -> str | None:
    """Say why the kernels do not serve a call, or None. The call's metadata is an ``AttentionCall``."""
    if call.device != "cuda":
        return f"runs on CUDA, the tensors are on {call.device}"
    if call.capability != extension.CAPABILITY:
        return lacks(call.capability, extension.CAPABILITY)
    reason = extension.why_not()
    if reason is not None:
        return reason
    if call.dtype not in DTYPES:
        return f"takes bfloat16 and float16, not {str(call.dtype).removeprefix('torch.')}"
    if call.head_dim not in HEAD_DIMS:
        return f"head dimension {call.head_dim} must be 64 or 128"
    obstacle: str | None = call.obstacle
    return obstacle


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention: output [B, Nq, heads, D] like q, contiguous, and LSE [B, heads, Nq] in fp32."""
    if k.shape[1] == 0:
        batch, queries, heads, _ = q.shape
        return q.new_zeros(q.shape), q.new_full((batch, heads, queries), -torch.inf, dtype=torch.float32)
    if extras.block_index is not None:
        assert extras.block_count is not None
        cut, (samples, list_heads, _, most) = _cuda_lists.layout(problem), extras.block_index.shape
        room = samples * list_heads * cut.triples * (4 + _cuda_lists.GROUPS * min(most, cut.k_tiles)) + 1
        lists = (extras.block_count, extras.block_index, extras.block_partial)
        tables = _cuda_lists.on_device(problem, q.device)
        return _list_operation()(q, k, v, max(problem.scale, LEAST_SCALE), *lists, tables, cut.integers, room)
    results: tuple[torch.Tensor, torch.Tensor] = _call(0, q, k, v, problem, extras)
    return results


def output(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, extras: Extras) -> torch.Tensor:
    """Compute the output alone, which takes the host less."""
    if extras.block_index is not None or k.shape[1] == 0:
        return run(q, k, v, problem, extras)[0]
    result: torch.Tensor = _call(1, q, k, v, problem, extras)
    return result


def _call(which: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, extras: Extras) -> Any:
    """Call the operation that gives both results (0), or the output alone (1)."""
    valid, frames = extras.valid, extras.k_frames
    if valid is not None:
        valid = valid.contiguous() if problem.grid.globals else None
    if frames is not None:
        frames = frames.contiguous()
    operations, plan = _launch(problem, q.shape[2], q.shape[3], valid is not None, frames is not None, q.device)
    return operations[which](q, k, v, *plan, valid, frames)


def launch_for(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, extras: Extras
) -> Callable[..., Any] | None:
    """Give what calls the kernels past the dispatcher for tensors like these, None for calls that go by it.

    It takes the addresses of q, k and v, ``valid``, whether LSE is asked for and whether new memory is filled, and
    returns the output, and LSE or None. The library checks these tensors and keeps what is left to say.
    """
    if extras.block_index is not None or extras.k_frames is not None or q.numel() == 0 or k.numel() == 0:
        return None
    valid, function = extras.valid if problem.grid.globals else None, extension.attention_function()
    if function is None or (valid is not None and not valid.is_contiguous()):
        return None
    _, (scale, config, plan, layout, _) = _launch(problem, q.shape[2], q.shape[3], valid is not None, False, q.device)
    kept, room = torch.ops.stattn.attention_prepare(q, k, v, scale, config, plan, layout, valid)
    made = _results(q, room)
    there = (partial(_empty, device=q.device), *made)
    # Allocates on the current device, past the dispatcher as well; but does not fill what is to be filled.
    quick = getattr(getattr(torch._C._dynamo, "guards", None), "_empty_strided_cuda", None)
    here = there if quick is None else (quick, *made)
    current = None if torch.cuda.device_count() == 1 else _current_device
    return function(kept, (torch.Tensor.data_ptr, current, here, there, plan))


def _results(q: torch.Tensor, room: int) -> list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]:
    """Give shapes, strides and dtypes of the output, of the LSE, and of ``room`` partial sums if there are any."""
    batch, queries, heads, _ = q.shape
    found = [(tuple(q.shape), q.dtype), ((batch, heads, queries), torch.float32), ((room,), torch.float32)]
    return [
        (shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))), dtype)
        for shape, dtype in found[: 3 if room else 2]
    ]


def _empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


@lru_cache(maxsize=4096)
def _launch(problem: Problem, heads: int, dim: int, valid: bool, frames: bool, device: torch.device) -> tuple[Any, ...]:
    """Give the library's operations and their arguments between v and ``valid``: one look-up for a warm call."""
    # What calls the dispatcher: by its name, an operation would choose among overloads each time.
    operations = torch.ops.stattn.attention_forward.default._op, torch.ops.stattn.attention_output.default._op
    scale = max(problem.scale, LEAST_SCALE)
    if not frames and is_dense(problem, valid) and not is_split(problem):
        return operations, (scale, 0, None, None, 0)
    config, layout, plan = on_device(problem, heads, dim, valid, device, "forward", frames)
    return operations, (scale, config, plan, torch.tensor(layout), problem.grid.t)


@cache
def _list_operation() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    operation: Callable[..., tuple[torch.Tensor, torch.Tensor]] = torch.ops.stattn.attention_forward_lists.default
    return operation
