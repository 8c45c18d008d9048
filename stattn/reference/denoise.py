"""One denoising step in plain PyTorch: guidance, conversion of the prediction, a linear combination, a kept region.

The state is x = alpha * x0 + sigma * e. A model predicts one of

    sample x0        noise e        velocity e - x0        v = alpha * e - sigma * x0

and each is a linear function of x and of any other. So every multistep solver is x' = sum_i weight_i * tensor_i with
numbers that the host computes from the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stattn.problem import Step
from stattn.reference._philox import philox_normal
from stattn.reference._precision import wide
from stattn.reference.patchify import unpatchify3d

KINDS = ("sample", "noise", "velocity", "v")


def conversion(prediction: str, target: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Return (a, b) such that target = a * x + b * prediction at noise level (alpha, sigma).

    Raises ZeroDivisionError where the prediction does not determine the target.
    """
    if prediction == target:
        return 0.0, 1.0
    # Each kind as (p, q): kind = p * x0 + q * e. With x = alpha * x0 + sigma * e this makes a 2 x 2 system for a and b.
    kinds = {"sample": (1.0, 0.0), "noise": (0.0, 1.0), "velocity": (-1.0, 1.0), "v": (-sigma, alpha)}
    p, q = kinds[prediction]
    r, s = kinds[target]
    determinant = alpha * q - sigma * p
    return (r * q - s * p) / determinant, (alpha * s - sigma * r) / determinant


def guide(cond: Tensor, uncond: Tensor, guidance: float, rescale: float, zero_star: bool) -> Tensor:
    """Extrapolate from the unconditional prediction through the conditional one: u + guidance * (c - u).

    zero_star: u is first scaled by <c, u> / (|u|^2 + 1e-8) (CFG-Zero*, arXiv:2503.18886). rescale: the share of the
    result whose standard deviation is brought back to c's (arXiv:2305.08891, section 3.4); a constant result is left
    as it is. Sums run over all axes but the batch.
    """
    axes = tuple(range(1, cond.dim()))
    if zero_star:
        product = (cond * uncond).sum(axes, keepdim=True)
        uncond = product / (uncond.square().sum(axes, keepdim=True) + 1e-8) * uncond
    guided = uncond + guidance * (cond - uncond)
    if rescale == 0:
        return guided
    spread, wanted = (
        (each - each.mean(axes, keepdim=True)).square().mean(axes, keepdim=True) for each in (guided, cond)
    )
    # Both choices lie under the square root: a gradient through a root that is not chosen would be 0 * inf.
    varies = spread > 0
    ratio = torch.sqrt(torch.where(varies, wanted / torch.where(varies, spread, 1.0), 1.0))
    return guided * (rescale * ratio + (1 - rescale))


def denoise_step(step: Step) -> tuple[Tensor, Tensor]:
    """Return the next state and the converted prediction, both in sample's dtype.

    A term whose weight is 0, and a side of the blend whose share is 0, are left out, whatever they hold. Computed in
    float32 (float64 when an input is), rounded once each.
    """
    sample, output, uncond, noise, known, generated, history, *_ = step
    dtype = wide(sample, output, uncond, noise, known, generated, *history)
    x = sample.to(dtype)

    prediction = _latent(output, sample.shape, step.patch).to(dtype)
    if uncond is not None:
        without = _latent(uncond, sample.shape, step.patch).to(dtype)
        prediction = guide(prediction, without, step.guidance, step.rescale, step.zero_star)
    prediction = _combine(step.convert, (x, prediction))

    z = noise if step.seeds is None else philox_normal(step.seeds, step.offset, sample.shape)
    terms = (x, prediction, *history) if z is None else (x, prediction, *history, z)
    weights = step.weights if z is None else (*step.weights, step.noise_weight)
    following = _combine(weights, tuple(each.to(dtype) for each in terms))
    if known is not None and generated is not None:
        sources = (known.to(dtype),) if z is None else (known.to(dtype), z.to(dtype))
        kept = _combine(step.known_weights[: len(sources)], sources)
        m = generated.to(dtype)
        blend = m * following + (1 - m) * kept
        following = torch.where(m == 1, following, torch.where(m == 0, kept, blend))
    return following.to(sample.dtype), prediction.to(sample.dtype)


def _latent(output: Tensor, shape: torch.Size, patch: Sequence[int] | None) -> Tensor:
    """Lay a model's output out as the state of a shape [B, C, T, H, W]."""
    if patch is None:
        return output
    (_, channels, frames, height, width), (pt, ph, pw) = shape, patch
    grid = (-(-frames // pt), -(-height // ph), -(-width // pw))
    return unpatchify3d(output, grid, 0, (pt, ph, pw), channels, (frames, height, width))


def _combine(weights: Sequence[float], tensors: tuple[Tensor, ...]) -> Tensor:
    """Sum weight * tensor in order over the weights that are not 0."""
    total: Tensor | None = None
    for weight, tensor in zip(weights, tensors, strict=True):
        if weight == 0:
            continue
        term = tensor if weight == 1 else weight * tensor
        total = term if total is None else total + term
    return torch.zeros_like(tensors[0]) if total is None else total
