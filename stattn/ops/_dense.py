"""Dense attention by other packages: PyTorch's own kernels, and flash-attn 2, 3 or 4 when importable."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from stattn.ops._dispatch import capability_of, lacks
from stattn.problem import Extras, Problem

_aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
UNORDERED = "its backward adds up in no fixed order, and deterministic=True asks for one"


# PyTorch.


def sdpa_why_not(call: Any) -> str | None:
    """Say why PyTorch's kernels do not serve a dense call, or None. The call's metadata is an ``AttentionCall``."""
    if call.device == "cpu":
        return None
    if call.device != "cuda":
        return f"has no kernel for device {call.device}"
    if call.dtype == torch.float64:
        return "has no float64 kernel on CUDA that returns the LSE"
    if call.ordered:
        return UNORDERED
    if call.head_dim % 8 or call.head_dim > 256:
        return f"head dimension {call.head_dim} must be a multiple of 8, at most 256"
    if call.capability < (8, 0):
        return lacks(call.capability, (8, 0))
    return None


def _kernel(q: torch.Tensor) -> str:
    """Name PyTorch's kernel for a tensor: cuDNN's on Hopper and later, where it is the fastest of them."""
    if q.device.type == "cpu":
        return "cpu"
    if q.dtype not in HALF:
        return "efficient"
    major = capability_of(q.device)[0]
    return "cudnn" if major >= 9 and q.shape[3] <= 128 else "flash"


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute dense attention by PyTorch: output [B, Nq, heads, D] and LSE [B, heads, Nq]."""
    out, lse, _ = _sdpa_forward(q, *_expand(q, k, v), problem.scale)
    return out.transpose(1, 2).contiguous(), lse


def sdpa_backward(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    problem: Problem,
    extras: Extras,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute dq, dk and dv of dense attention by PyTorch.

    The kernels know no gradient of the LSE. They compute rowsum(dout * out) themselves; further columns, -1 in out and
    dLSE in dout but 0 in q, k and v, make that rowsum(dout * out) - dLSE and change nothing else.
    """
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dout = torch.zeros_like(out) if dout is None else dout
    ke, ve = _expand(q, k, v)
    dim = q.shape[3]
    if dlse is not None:
        pad = (0, 8)
        q_wide, k_wide, v_wide = (torch.nn.functional.pad(x, pad) for x in (q, ke, ve))
        out = torch.nn.functional.pad(out, pad)
        dout = torch.nn.functional.pad(dout, pad)
        out[..., dim], dout[..., dim] = -1.0, dlse.transpose(1, 2).to(dout.dtype)
        grads = _sdpa_backward(dout, q_wide, k_wide, v_wide, out, lse, problem.scale)
        dq, dk, dv = (grad[..., :dim] for grad in grads)
    else:
        dq, dk, dv = _sdpa_backward(dout, q, ke, ve, out, lse, problem.scale)
    rep = q.shape[2] // k.shape[2]
    if rep > 1:
        dk, dv = (
            x.unflatten(2, (-1, rep)).sum(3, dtype=torch.float32 if x.dtype in HALF else None).to(x.dtype)
            for x in (dk, dv)
        )
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _expand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rep = q.shape[2] // k.shape[2]
    return (k, v) if rep == 1 else (k.repeat_interleave(rep, 2), v.repeat_interleave(rep, 2))


def _sdpa_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...]]:
    """Return out [B, heads, N, D], LSE [B, heads, N] and what else the kernel's backward wants."""
    if q.numel() == 0 or k.numel() == 0:
        lse = q.new_full(
            (q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32)
        )
        return torch.zeros_like(q).transpose(1, 2), lse, ()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    kernel = _kernel(q)
    if kernel == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, False, scale=scale)
        return out, lse, ()
    if kernel == "efficient":
        out, lse, *rest = _aten._scaled_dot_product_efficient_attention.default(
            q, k, v, None, True, 0.0, False, scale=scale
        )
    elif kernel == "cudnn":
        out, lse, *rest = _aten._scaled_dot_product_cudnn_attention.default(
            q, k, v, None, True, 0.0, False, False, scale=scale
        )
    else:
        out, lse, *rest = _aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, False, False, scale=scale)
    lse = lse.squeeze(-1) if lse.ndim == 4 else lse
    return out, lse[..., : q.shape[2]], tuple(rest)


def _sdpa_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    nq, nk = q.shape[2], k.shape[2]
    kernel = _kernel(q)
    if kernel == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            dout, q, k, v, out, lse, 0.0, False, scale=scale
        )
    elif kernel == "efficient":
        padded = torch.nn.functional.pad(lse, (0, -nq % 32), value=torch.inf)  # the kernel reads whole tiles of 32
        empty = torch.zeros((), dtype=torch.int64, device=q.device)
        grads = _aten._scaled_dot_product_efficient_attention_backward.default(
            dout, q, k, v, None, out, padded, empty, empty, 0.0, [True, True, True, False], False, scale=scale
        )[:3]
    else:
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        if kernel == "cudnn":
            grads = _aten._scaled_dot_product_cudnn_attention_backward.default(
                dout, q, k, v, out, lse[..., None], seed, seed, None, None, None, nq, nk, 0.0, False, scale=scale
            )
        else:
            grads = _aten._scaled_dot_product_flash_attention_backward.default(
                dout, q, k, v, out, lse, None, None, nq, nk, 0.0, False, seed, seed, scale=scale
            )
    return tuple(grad.transpose(1, 2) for grad in grads)


# flash-attn.


@lru_cache(maxsize=1)
def flash_version() -> int | None:
    """Say which flash-attn is importable: 4 (``flash_attn.cute``), 3 (``flash_attn_interface``), 2, or None."""
    try:
        if importlib.util.find_spec("flash_attn.cute") is not None:
            return 4
    except ModuleNotFoundError:  # no flash_attn at all
        pass
    if importlib.util.find_spec("flash_attn_interface") is not None:
        return 3
    return 2 if importlib.util.find_spec("flash_attn") is not None else None


def order() -> tuple[str, str]:
    """Give the order in which ``auto`` asks: flash-attn 3 and 4 before PyTorch's kernels, flash-attn 2 after them."""
    return ("flash", "sdpa") if (flash_version() or 0) >= 3 else ("sdpa", "flash")


def flash_why_not(call: Any) -> str | None:
    """Say why flash-attn does not serve a dense call, or None."""
    version = flash_version()
    if version is None:
        return "flash-attn is not installed"
    if call.device != "cuda":
        return f"runs on CUDA, the tensors are on {call.device}"
    if call.dtype not in HALF:
        return f"takes bfloat16 and float16, not {str(call.dtype).removeprefix('torch.')}"
    if call.ordered:
        return UNORDERED
    most = {4: 128, 3: 256, 2: 256}[version]
    if call.head_dim % 8 or call.head_dim > most:
        return f"head dimension {call.head_dim} must be a multiple of 8, at most {most}, for flash-attn {version}"
    if call.capability < (8, 0):
        return lacks(call.capability, (8, 0))
    if version == 3 and call.capability[0] != 9:
        return f"flash-attn 3 {lacks(call.capability, (9, 0))}"
    return None


@lru_cache(maxsize=1)
def _flash_function() -> Callable[..., Any]:
    version = flash_version()
    if version == 4:
        from flash_attn.cute.interface import flash_attn_func
    elif version == 3:
        from flash_attn_interface import flash_attn_func
    else:
        from flash_attn import flash_attn_func
    return flash_attn_func


def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, return_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute dense attention by flash-attn, differentiable by its own backward; with the LSE if asked for.

    Raises ValueError when the LSE is asked for where a gradient is needed: flash-attn does not differentiate it.
    """
    if return_lse and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("impl='flash' does not differentiate the LSE; use another impl or return_lse=False")
    function = _flash_function()
    if not return_lse:
        result = function(q, k, v, softmax_scale=scale)
        return result[0] if isinstance(result, tuple) else result
    flag = {"return_lse": True} if flash_version() == 4 else {"return_attn_probs": True}
    out, lse, *_ = function(q, k, v, softmax_scale=scale, **flag)
    return out, lse
