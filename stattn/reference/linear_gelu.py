"""A projection and its GELU in plain PyTorch.

h = x W^T + b     y = h / 2 * (1 + tanh(sqrt(2 / pi) (h + 0.044715 h^3)))
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Project x [..., C] by weight [E, C] and bias [E], then GELU's tanh form. h is rounded, and y again."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")
