"""Metrics of one clip that need only its pixels, or its optical flow.

A clip is [3, T, H, W], uint8 in 0..255 or floating point in -1..1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stattn.metrics.motion import occlusion, optical_flow, warp


def levels(video: Tensor) -> Tensor:
    """Return a clip in 0..1. Raises ValueError for anything that is not [3, T, H, W], TypeError for other dtypes."""
    if not isinstance(video, Tensor):
        raise TypeError(f"video of type {type(video).__name__} must be a tensor [3, T, H, W]")
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"video of shape {tuple(video.shape)} must be [3, T, H, W]")
    if video.dtype == torch.uint8:
        return video.float() / 255
    if not video.is_floating_point():
        raise TypeError(f"video of {video.dtype} must be uint8 or floating point")
    return (video.float().clamp(-1, 1) + 1) / 2


def flicker(video: Tensor) -> float:
    """Measure temporal flickering as VBench does: 1 minus the mean of |f_(t+1) - f_t|, in 0..1, higher is steadier.

    video: [3, T, H, W]. VBench applies it to clips with a still camera and subject, because motion lowers it too;
    ``stattn.metrics.checks.jumps`` separates jumps from steady motion. Raises ValueError for fewer than two frames.
    """
    x = _at_least(video, 2)
    return 1 - float((x[:, 1:] - x[:, :-1]).abs().mean())


def warp_error(video: Tensor, flow: Tensor | None = None, hidden: Tensor | None = None) -> float:
    """Measure the warping error: how badly the next frame, warped back along the flow, predicts each frame.

    video: [3, T, H, W]. flow: [T - 1, 2, H, W] in pixels from frame t to t + 1; None estimates it (``optical_flow``).
    hidden: [T - 1, 1, H, W] booleans, the occluded pixels, which are not counted; None finds them by a
    forward-backward check (``occlusion``), which also estimates the flow back. The result is the mean of
    |f_t - warp(f_(t+1))|^2 with colours in 0..1, over visible pixels and channels and then over pairs of frames; pairs
    without a visible pixel are left out, and NaN is returned when all are. Follows Lai et al., arXiv:1808.00449.
    """
    return _mean(pair_errors(video, flow, hidden))


def pair_errors(video: Tensor, flow: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
    """Measure the warping error of every pair of neighbouring frames: [T - 1], NaN where no pixel stays visible."""
    x = _at_least(video, 2).transpose(0, 1)
    pairs = (len(x) - 1, 2, *x.shape[2:])
    flow = optical_flow(x[:-1], x[1:]) if flow is None else flow
    if tuple(flow.shape) != pairs:
        raise ValueError(f"flow of shape {tuple(flow.shape)} must be {pairs}")
    if hidden is None:
        hidden = occlusion(flow, optical_flow(x[1:], x[:-1]))
    if hidden.dtype != torch.bool or tuple(hidden.shape) != (pairs[0], 1, *pairs[2:]):
        raise ValueError(f"hidden of shape {tuple(hidden.shape)} must be booleans {(pairs[0], 1, *pairs[2:])}")
    error = (x[:-1] - warp(x[1:], flow.to(x))).square().mean(1, keepdim=True)
    seen = (~hidden).sum((1, 2, 3))
    return torch.where(seen > 0, (error * ~hidden).sum((1, 2, 3)) / seen, torch.nan)


def motion_smoothness(video: Tensor, interpolate: Callable[[Tensor, Tensor], Tensor] | None = None) -> float:
    """Measure motion smoothness as VBench does: how well dropped frames are interpolated from their neighbours.

    video: [3, T, H, W]. Every second frame is dropped and interpolated; the result is 1 minus the mean absolute
    difference, in 0..1, higher is smoother. interpolate: takes two batches of frames [B, 3, H, W] in 0..1 and returns
    the frames half-way. VBench uses the network AMT-S; the default here is ``midway``, which has no weights, so say
    with the result which one was used.
    """
    x = _at_least(video, 3).transpose(0, 1)
    before, dropped, after = x[:-2:2], x[1:-1:2], x[2::2]
    made = (midway if interpolate is None else interpolate)(before, after)
    return 1 - float((made - dropped).abs().mean())


def midway(a: Tensor, b: Tensor) -> Tensor:
    """Interpolate the frames half-way between a and b, [B, 3, H, W], along optical flow from both sides."""
    forward, backward = optical_flow(a, b), optical_flow(b, a)
    # The flow half-way is looked up where it starts, and then once more from where that says it came.
    from_a, from_b = warp(forward, -forward / 2), warp(backward, -backward / 2)
    return (warp(a, -from_a / 2) + warp(b, -from_b / 2)) / 2


def psnr(a: Tensor, b: Tensor, where: Tensor | None = None) -> float:
    """Measure the peak signal-to-noise ratio of two clips in dB; infinite when they are equal.

    a, b: [3, T, H, W]. where: [1, T, H, W] booleans, the pixels to compare; all when None. Raises ValueError for
    unequal shapes and for a ``where`` that does not fit or leaves no pixel.
    """
    x, y = levels(a), levels(b)
    if x.shape != y.shape:
        raise ValueError(f"a and b of shapes {tuple(x.shape)} and {tuple(y.shape)} must be equal")
    error = (x - y).square()
    if where is not None:
        if not isinstance(where, Tensor) or where.dtype != torch.bool or where.shape != x[:1].shape:
            raise ValueError(f"where must be booleans of shape {tuple(x[:1].shape)}, [1, T, H, W]")
        error = error[where.expand_as(error)]
    if error.numel() == 0:
        raise ValueError("where leaves no pixel to compare")
    return float(-10 * error.double().mean().log10())


def _at_least(video: Tensor, frames: int) -> Tensor:
    x = levels(video)
    if x.shape[1] < frames:
        raise ValueError(f"video has {x.shape[1]} frames; at least {frames} are needed")
    return x


def _mean(values: Tensor) -> float:
    return float(values[values.isfinite()].mean())
