"""What several suites hold results to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_rule_1(found: Sequence[Tensor], eager: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """Hold 16-bit results to rule 1 of the proof: twice the largest error of eager, 1.1 times its RMS error, at most.

    Several tensors (outputs of several calls, gradients) count together, each in units of its truth's norm.
    """
    scales = [float(each.norm()) for each in truth]
    eps = torch.finfo(found[0].dtype).eps
    found, eager, truth = (
        torch.cat([x.detach().double().cpu().flatten() / scale for x, scale in zip(each, scales, strict=True)])
        for each in (found, eager, truth)
    )
    errors = [(x - truth).abs() for x in (found, eager)]
    most = 2 * (errors[1].max() + eps * truth.abs().max())
    assert errors[0].max() <= most, f"error {errors[0].max():.2e} at {errors[0].argmax()}, of {most:.2e} allowed"
    rms = [x.square().mean().sqrt() for x in errors]
    assert rms[0] <= 1.1 * rms[1], f"rms error {rms[0]:.3e}, eager has {rms[1]:.3e}"
