"""A projection whose GELU rides on it: ``linear_gelu``, the first half of a feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor

from stattn.ops import _validate
from stattn.reference.linear_gelu import linear_gelu as reference


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Project tokens and apply GELU (in its tanh form): gelu(x W^T + b).

    x: [..., C]. weight: [E, C]. bias: [E]. All of one dtype, or as autocast makes them.

    Returns [..., E] in that dtype. On a CUDA device, in 16 bits and where no gradient is asked for, cuBLASLt applies
    bias and GELU to the float32 sums of the product, so that h = x W^T + b is never written, and rounds once. Elsewhere
    h is rounded and written (a backward reads it), and the result rounded again: the reference. Differentiable as often
    as PyTorch's own operations. Raises ValueError or TypeError for wrong shapes, dtypes or devices.
    """
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise TypeError(f"x of type {type(x).__name__} must be a tensor [..., C]")
    weight = _validate.tensor("weight", weight, "[E, C]")
    features, channels = weight.shape
    _validate.shaped("bias", bias, "[E]", (features,))
    if x.shape[-1] != channels:
        raise ValueError(f"x of shape {tuple(x.shape)} must be [..., C] with C = {channels}, weight's last size")
    _validate.one_device("x", x, weight=weight, bias=bias)
    cast = torch.is_autocast_enabled(x.device.type)
    if not cast and not x.dtype == weight.dtype == bias.dtype:
        raise TypeError(f"x of {x.dtype}, weight of {weight.dtype} and bias of {bias.dtype} must have one dtype")
    tracked = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    # Only on CUDA does the fused product mean the tanh form; in float32 it errs four times as much as two operations.
    # Autocast does not know it.
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16) or tracked or cast:
        return reference(x, weight, bias)
    rows = torch._addmm_activation(bias, x.reshape(-1, channels), weight.t(), use_gelu=True)
    return rows.view(*x.shape[:-1], features)
