"""Gradients of one denoising step in plain PyTorch, for implementations that have no autograd of their own.

With D = sum over a sample of do * o~, o~ the guided output before rescaling and f its factor (``denoise.guide``):

    do~ = f * do - D * share * ratio / var(o~) * (o~ - mean(o~)) / n
    dc  = guidance * do~ + D * share * ratio / var(c) * (c - mean(c)) / n          var(o~) = 0: no terms with D
    du~ = (1 - guidance) * do~,  u~ = s * u,  s = <c, u> / b,  b = |u|^2 + 1e-8
    dc += <du~, u> / b * u,  du = s * du~ + <du~, u> / b * (c - 2 s u)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stattn.problem import Step
from stattn.reference._philox import philox_normal
from stattn.reference._precision import wide
from stattn.reference.denoise import _combine, _latent, guide


def guide_backward(
    do: Tensor, cond: Tensor, uncond: Tensor, guidance: float, rescale: float, zero_star: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of cond and uncond from that of ``guide``'s result."""
    axes = tuple(range(1, cond.dim()))
    scale, scaled, below = torch.ones_like(cond[:1]), uncond, uncond
    if zero_star:
        below = uncond.square().sum(axes, keepdim=True) + 1e-8
        scale = (cond * uncond).sum(axes, keepdim=True) / below
        scaled = scale * uncond
    dcond = torch.zeros_like(cond)
    if rescale != 0:
        guided = guide(cond, scaled, guidance, 0.0, False)
        centred, c = (each - each.mean(axes, keepdim=True) for each in (guided, cond))
        spread, wanted = (each.square().mean(axes, keepdim=True) for each in (centred, c))
        flat, varies = spread == 0, (spread > 0) & (wanted > 0)
        spread, wanted = (torch.where(varies, each, 1.0) for each in (spread, wanted))
        ratio = torch.sqrt(wanted / spread)
        pull = torch.where(varies, rescale * ratio * (do * guided).mean(axes, keepdim=True), 0.0)
        dcond = pull / wanted * c
        factor = torch.where(varies | flat, ratio, 0.0)
        do = do * (rescale * factor + (1 - rescale)) - pull / spread * centred
    dcond = dcond + guidance * do
    dscaled = (1 - guidance) * do
    duncond = scale * dscaled
    if zero_star:
        slope = (dscaled * uncond).sum(axes, keepdim=True) / below
        dcond = dcond + slope * uncond
        duncond = duncond + slope * (cond - 2 * scaled)
    return dcond, duncond


def denoise_step_backward(dfollowing: Tensor, dtarget: Tensor, step: Step) -> tuple[Tensor | None, ...]:
    """Return the gradients of sample, output, uncond, noise, known, generated and each of history; None where absent.

    In float64 or float32, as ``denoise_step`` computes. The noise of seeds has no gradient.
    """
    sample, output, uncond, noise, known, generated, history, *_ = step
    guided, weights, patch = (step.guidance, step.rescale, step.zero_star), step.weights, step.patch
    dtype = wide(sample, output, uncond, noise, known, generated, *history)
    x, c = sample.to(dtype), _latent(output, sample.shape, patch).to(dtype)
    u = None if uncond is None else _latent(uncond, sample.shape, patch).to(dtype)
    d, dp = dfollowing.to(dtype), dtarget.to(dtype)
    dknown = dgenerated = dnoise = duncond = None
    dz = torch.zeros_like(d)
    if known is not None and generated is not None:
        m = generated.to(dtype)
        if generated.is_floating_point():
            o = c if u is None else guide(c, u, *guided)
            z = noise if step.seeds is None else philox_normal(step.seeds, step.offset, sample.shape)
            extra = () if z is None else (z.to(dtype),)
            past = tuple(each.to(dtype) for each in history)
            scales = weights if z is None else (*weights, step.noise_weight)
            following = _combine(scales, (x, _combine(step.convert, (x, o)), *past, *extra))
            kept = _combine(step.known_weights[: 1 + len(extra)], (known.to(dtype), *extra))
            soft = torch.where((m == 0) | (m == 1), 0.0, (following - kept) * d)
            dgenerated = soft.sum_to_size(generated.shape).to(generated.dtype)
        share = torch.where(m == 0, 0.0, m * d)
        dkept = torch.where(m == 1, 0.0, (1 - m) * d)
        dknown = (step.known_weights[0] * dkept).to(known.dtype)
        dz, d = step.known_weights[1] * dkept, share
    if noise is not None:
        dnoise = (dz + step.noise_weight * d).to(noise.dtype)
    dpast = tuple((weight * d).to(each.dtype) for weight, each in zip(weights[2:], history, strict=True))
    dp = dp + weights[1] * d
    dsample = (weights[0] * d + step.convert[0] * dp).to(sample.dtype)
    dcond = step.convert[1] * dp
    if uncond is not None and u is not None:
        dcond, du = guide_backward(dcond, c, u, *guided)
        duncond = _tokens(du, patch).to(uncond.dtype)
    return dsample, _tokens(dcond, patch).to(output.dtype), duncond, dnoise, dknown, dgenerated, *dpast


def _tokens(video: Tensor, patch: Sequence[int] | None) -> Tensor:
    """Lay a gradient [B, C, T, H, W] out as the output it belongs to; padding of the last patches gets 0."""
    if patch is None:
        return video
    batch, channels = video.shape[:2]
    grid = [-(-size // p) for size, p in zip(video.shape[2:], patch, strict=True)]
    short = [n * p - size for n, p, size in zip(grid, patch, video.shape[2:], strict=True)]
    (t, h, w), (pt, ph, pw) = grid, patch
    video = F.pad(video, (0, short[2], 0, short[1], 0, short[0])).reshape(batch, channels, t, pt, h, ph, w, pw)
    return video.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(batch, t * h * w, pt * ph * pw * channels)
