"""The precision in which the reference computes."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 when any tensor is float64, else float32: 16-bit and 32-bit inputs are computed in float32."""
    doubles = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if doubles else torch.float32
