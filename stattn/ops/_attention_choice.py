"""Which implementation serves a call of attention: what it is known by, and what stands against each of them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from stattn.masks import full
from stattn.ops import _cuda, _dense, _triton
from stattn.ops._dispatch import Implementation, Operation, device_of, serves_all
from stattn.problem import Extras, Problem
from stattn.reference.attention import attention as _reference_forward

_FULL = full()


class AttentionCall(NamedTuple):
    """The metadata by which implementations say whether they serve a call."""

    device: str
    capability: tuple[int, int]
    dtype: torch.dtype
    head_dim: int
    heads: int
    key_heads: int
    dense: str | None  # None when every query sees every key, else what stands against it
    lists: bool
    obstacle: str | None  # what in tensors, masks or a needed gradient stands against the CUDA kernels
    ordered: bool  # whether gradients are needed that are bitwise reproducible


def call_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    problem: Problem,
    extras: Extras,
    grad: bool,
    deterministic: bool,
) -> AttentionCall:
    return AttentionCall(
        *device_of(q),
        q.dtype,
        q.shape[3],
        q.shape[2],
        k.shape[2],
        _not_dense(problem, extras),
        extras.block_index is not None,
        _cuda.obstacle(q, k, v, problem, extras, grad),
        grad and deterministic,
    )


def needs_grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _not_dense(problem: Problem, extras: Extras) -> str | None:
    if extras.block_index is not None:
        return "block lists"
    if any(mask != _FULL for mask in problem.masks):
        return f"mask {next(mask for mask in problem.masks if mask != _FULL)}"
    if extras.k_frames is not None:
        return "k_frames"
    if extras.valid is not None:
        return "valid"
    if problem.globals_see != "all" and problem.grid.globals and problem.q_globals:
        return "globals_see='globals'"
    return None


def _no_masks(call: AttentionCall) -> str | None:
    return None if call.dense is None else f"serves dense attention only, the call has {call.dense}"


def _triton_why_not(call: AttentionCall) -> str | None:
    if call.head_dim % 8 or not 16 <= call.head_dim <= 256:
        return f"head dimension {call.head_dim} must be a multiple of 8 from 16 to 256"
    return _triton.why_not(call.device, call.capability, call.dtype)


def _triton_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    from stattn.kernels import attention_runs as kernels

    return kernels.attention(q, k, v, problem, extras)


OPERATION = Operation(
    "attention",
    tuple(
        {
            "cuda": Implementation("cuda", _cuda.why_not, _cuda.run),
            "flash": Implementation("flash", lambda call: _no_masks(call) or _dense.flash_why_not(call), _dense.flash),
            "sdpa": Implementation("sdpa", lambda call: _no_masks(call) or _dense.sdpa_why_not(call), _dense.sdpa),
            "triton": Implementation("triton", _triton_why_not, _triton_forward),
            "reference": Implementation("reference", serves_all, _reference_forward),
        }[name]
        for name in ("cuda", *_dense.order(), "triton", "reference")
    ),
)
