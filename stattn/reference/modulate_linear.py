"""The last layer of a model in plain PyTorch: adaptive layer norm, then a projection."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stattn.reference.modulate import modulate


def modulate_linear(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    matrix: Tensor,
    matrix_bias: Tensor | None,
) -> Tensor:
    """Modulate the tokens of x [B, N, C] and project them by matrix [E, C]; arguments as ``modulate``. Rounds twice."""
    return F.linear(modulate(x, scale, shift, norm, weight, bias, eps), matrix, matrix_bias)
