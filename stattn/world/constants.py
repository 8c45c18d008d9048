"""Small tables of numbers as tensors, copied to a device once: each copy from the host would wait for the device."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache(maxsize=512)
def constant(values: Any, device: torch.device) -> Tensor:
    """Return ``torch.tensor(values)`` on a device, the same tensor every time: read it only. values: nested tuples."""
    with torch.inference_mode(False):  # a tensor made in inference mode would be of no use outside it
        return torch.tensor(values, device=device)
