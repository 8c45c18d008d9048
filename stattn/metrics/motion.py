"""Motion seen in video without learned weights: shifts, affine moves and dense flow.

Flow follows the convention of ``Scene.flow``: w(p) = (x, y) in pixels, so that what frame t shows at p, frame t + 1
shows at p + w(p).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def phase_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Estimate by how many pixels pictures b are shifted from pictures a.

    a, b: [B, C, H, W]. Returns [B, 2], (x, y), each within half the picture's size. Finds the peak of the whitened
    cross-correlation (Kuglin and Hines 1975) under a Hann window, refined to fractions of a pixel by its neighbours.
    """
    _pair(a, b)
    a, b = a.double().mean(1), b.double().mean(1)
    height, width = a.shape[-2:]
    window = _hann(height, a)[:, None] * _hann(width, a)
    fa, fb = (torch.fft.rfft2((x - x.mean((-2, -1), keepdim=True)) * window) for x in (a, b))
    cross = fb * fa.conj()
    surface = torch.fft.irfft2(cross / cross.abs().clamp(min=1e-9), s=(height, width))
    peak = surface.flatten(1).argmax(1)
    y, x = peak // width, peak % width
    clip = torch.arange(len(a), device=a.device)

    def refine(at: Tensor, size: int, along: int) -> Tensor:
        before, after = ((at + step) % size for step in (-1, 1))
        low, mid, high = (surface[clip, y, each] if along else surface[clip, each, x] for each in (before, at, after))
        # The peak of a shift between pixels falls off on the side where the rest of it lies (Foroosh et al. 2002).
        low, high = low.clamp(min=0), high.clamp(min=0)
        side = torch.where(high > low, high / (mid + high), -low / (mid + low))
        return torch.where(at > size / 2, at - size, at) + side.nan_to_num(0)

    return torch.stack((refine(x, width, 1), refine(y, height, 0)), 1)


def affine_motion(
    a: Tensor, b: Tensor, *, weight: Tensor | None = None, levels: int = 3, iterations: int = 8
) -> Tensor:
    """Fit the affine motion from pictures a to pictures b.

    a, b: [B, C, H, W]. weight: [B, 1, H, W] in 0..1, how much each pixel of a counts. Returns M, [B, 2, 3]: what a
    shows at p, b shows at p' = M [p, 1], with p = (x, y) in pixels from the picture's centre. Least squares by
    Gauss-Newton from coarse to fine, starting at the phase correlation. Pixels that fit badly count less
    (Geman-McClure), so that objects with a motion of their own do not disturb the fit to the scenery.
    """
    _pair(a, b)
    a, b = a.double(), b.double()
    weight = torch.ones_like(a[:, :1]) if weight is None else weight.to(a)
    matrix = torch.eye(2, 3, dtype=a.dtype, device=a.device).repeat(len(a), 1, 1)
    levels = max(1, min(levels, 1 + int(math.log2(min(a.shape[-2:]) / 16))))
    matrix[:, :, 2] = phase_correlation(a, b)
    tries = [matrix, torch.eye(2, 3, dtype=a.dtype, device=a.device).expand_as(matrix)]
    # The correlation may have locked onto an object or missed: the better of the two starts goes on.
    costs = torch.stack([_misfit(a, b, weight, each) for each in tries])
    matrix = torch.where((costs[0] <= costs[1])[:, None, None], tries[0], tries[1])
    for level in reversed(range(levels)):
        scale = 2**level
        first, second, counts = (F.avg_pool2d(x, scale) for x in (_blur(a), _blur(b), weight))
        matrix = matrix.clone()
        matrix[:, :, 2] /= scale
        for _ in range(iterations):
            matrix = matrix + _gauss_newton(first, second, counts, matrix)
        matrix[:, :, 2] *= scale
    return matrix


def camera_track(video: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Recover the camera's motion as affine maps of the scenery from frame 0 to every frame.

    video: [B, 3, T, H, W]; weight: [B, 1, T, H, W] in 0..1, 0 on what is not scenery. Returns [B, T, 2, 3]. Fits
    neighbouring frames (``affine_motion``) and chains the maps.
    """
    if not isinstance(video, Tensor):
        raise TypeError(f"video of type {type(video).__name__} must be a tensor [B, 3, T, H, W]")
    if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] < 2:
        raise ValueError(f"video of shape {tuple(video.shape)} must be [B, 3, T, H, W] with T >= 2")
    batch, _, frames = video.shape[:3]
    a, b = (x.transpose(1, 2).flatten(0, 1) for x in (video[:, :, :-1], video[:, :, 1:]))
    counts = None if weight is None else weight[:, :, :-1].transpose(1, 2).flatten(0, 1)
    steps = affine_motion(a, b, weight=counts).unflatten(0, (batch, frames - 1))
    track = [torch.eye(3, dtype=steps.dtype, device=steps.device)[:2].expand(batch, 2, 3)]
    for step in steps.unbind(1):
        last = track[-1]
        track.append(torch.cat((step[..., :2] @ last[..., :2], step[..., :2] @ last[..., 2:] + step[..., 2:]), -1))
    return torch.stack(track, 1)


def optical_flow(a: Tensor, b: Tensor, *, radius: int = 3, levels: int = 4, iterations: int = 4) -> Tensor:
    """Estimate dense optical flow from pictures a to b: [B, 2, H, W], (x, y) in pixels.

    a, b: [B, C, H, W]. Lucas-Kanade least squares over windows of 2 * radius + 1 pixels and all channels, from coarse
    to fine, each level smoothed by a 3 x 3 median.
    """
    _pair(a, b)
    a, b = a.float(), b.float()
    levels = max(1, min(levels, 1 + int(math.log2(min(a.shape[-2:]) / 8))))
    pyramid = [(a, b)]
    for _ in range(levels - 1):
        pyramid.append((F.avg_pool2d(_blur(pyramid[-1][0]), 2), F.avg_pool2d(_blur(pyramid[-1][1]), 2)))
    flow = torch.zeros_like(pyramid[-1][0][:, :2])
    for first, second in reversed(pyramid):
        if flow.shape[-2:] != first.shape[-2:]:
            ratio = [n / m for n, m in zip(first.shape[-2:], flow.shape[-2:], strict=True)]
            flow = F.interpolate(flow, size=first.shape[-2:], mode="bilinear", align_corners=False)
            flow = flow * flow.new_tensor([ratio[1], ratio[0]])[:, None, None]
        flow = _lucas_kanade(first, second, flow, radius, iterations)
    return flow


def warp(picture: Tensor, flow: Tensor) -> Tensor:
    """Sample pictures where a flow points, bilinearly: out(p) = picture(p + flow(p)).

    picture: [B, C, H, W]. flow: [B, 2, H, W], (x, y) in pixels. Returns [B, C, H, W].
    """
    height, width = picture.shape[-2:]
    y = torch.arange(height, device=picture.device)[:, None] + flow[:, 1]
    x = torch.arange(width, device=picture.device) + flow[:, 0]
    where = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1).to(picture.dtype)
    return F.grid_sample(picture, where, mode="bilinear", padding_mode="border", align_corners=False)


def occlusion(forward: Tensor, backward: Tensor) -> Tensor:
    """Find the pixels of frame t that are hidden in frame t + 1.

    forward: [B, 2, H, W], flow from t to t + 1; backward: the same from t + 1 to t. Returns [B, 1, H, W] booleans. A
    pixel is taken as hidden where the two flows do not cancel, |f + b|^2 > 0.01 (|f|^2 + |b|^2) + 0.5, where it leaves
    the picture, and at motion boundaries, |grad f|^2 > 0.01 |f|^2 + 0.002 (Ruder et al., arXiv:1604.08610).
    """
    height, width = forward.shape[-2:]
    back = warp(backward, forward)
    length = forward.square().sum(1, keepdim=True)
    apart = (forward + back).square().sum(1, keepdim=True) > 0.01 * (length + back.square().sum(1, keepdim=True)) + 0.5
    dx = F.pad(forward.diff(dim=3), (0, 1, 0, 0))
    dy = F.pad(forward.diff(dim=2), (0, 0, 0, 1))
    edge = (dx.square() + dy.square()).sum(1, keepdim=True) > 0.01 * length + 0.002
    x = torch.arange(width, device=forward.device) + forward[:, :1]
    y = torch.arange(height, device=forward.device)[:, None] + forward[:, 1:]
    gone = (x < 0) | (x > width - 1) | (y < 0) | (y > height - 1)
    return apart | edge | gone


def _pair(a: Tensor, b: Tensor) -> None:
    for name, x in (("a", a), ("b", b)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} of type {type(x).__name__} must be a tensor [B, C, H, W]")
        if x.ndim != 4:
            raise ValueError(f"{name} of shape {tuple(x.shape)} must be [B, C, H, W]")
    if a.shape != b.shape:
        raise ValueError(f"b of shape {tuple(b.shape)} must have the shape of a, {tuple(a.shape)}")


def _hann(size: int, like: Tensor) -> Tensor:
    return torch.hann_window(size + 2, periodic=False, dtype=like.dtype, device=like.device)[1:-1]


def _blur(x: Tensor) -> Tensor:
    kernel = x.new_tensor([0.25, 0.5, 0.25])
    channels = x.shape[1]
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = F.conv2d(x, kernel.view(1, 1, 1, 3).expand(channels, 1, 1, 3), groups=channels)
    return F.conv2d(x, kernel.view(1, 1, 3, 1).expand(channels, 1, 3, 1), groups=channels)


def _gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return (
        (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2,
        (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2,
    )


def _places(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Give pixel centres measured from the picture's centre: x [W], y [H, 1]."""
    height, width = picture.shape[-2:]
    x = torch.arange(width, device=picture.device, dtype=picture.dtype) + 0.5 - width / 2
    y = torch.arange(height, device=picture.device, dtype=picture.dtype)[:, None] + 0.5 - height / 2
    return x, y


def affine_flow(matrix: Tensor, height: int, width: int) -> Tensor:
    """Write affine maps [B, 2, 3] (pixels from the centre) as flow [B, 2, H, W]."""
    x, y = _places(matrix.new_zeros(height, width))
    moved = matrix[:, :, 0, None, None] * x + matrix[:, :, 1, None, None] * y + matrix[:, :, 2, None, None]
    return moved - torch.stack(torch.broadcast_tensors(x, y))


def _misfit(a: Tensor, b: Tensor, weight: Tensor, matrix: Tensor) -> Tensor:
    difference = (warp(b, affine_flow(matrix, *a.shape[-2:])) - a).abs().mean(1, keepdim=True)
    return (difference * weight).mean((1, 2, 3))


def _gauss_newton(a: Tensor, b: Tensor, weight: Tensor, matrix: Tensor) -> Tensor:
    """Give the next step of the fit: [B, 2, 3]."""
    x, y = _places(a)
    flow = affine_flow(matrix, *a.shape[-2:])
    seen = warp(b, flow)
    residual = seen - a
    gx, gy = (warp(each, flow) for each in _gradient(b))
    columns = torch.stack((gx * x, gx * y, gx, gy * x, gy * y, gy), -1)  # [B, C, H, W, 6]
    height, width = a.shape[-2:]
    at = flow + torch.stack(torch.broadcast_tensors(x, y))
    inside = (at[:, 0].abs() <= width / 2 - 0.5) & (at[:, 1].abs() <= height / 2 - 0.5)
    square = residual.square().sum(1, keepdim=True)
    spread = square.flatten(1).median(1).values.clamp(min=1e-6)[:, None, None, None]
    counts = weight * inside[:, None] / (1 + square / (4 * spread)) ** 2
    left = torch.einsum("bchwi,bchwj,bchw->bij", columns, columns, counts.expand_as(residual))
    right = torch.einsum("bchwi,bchw->bi", columns, counts * residual)
    damping = 1e-6 * left.diagonal(dim1=1, dim2=2).clamp(min=1e-9)
    return -torch.linalg.solve(left + torch.diag_embed(damping), right).unflatten(1, (2, 3))


def _lucas_kanade(a: Tensor, b: Tensor, flow: Tensor, radius: int, iterations: int) -> Tensor:
    size = 2 * radius + 1

    def around(x: Tensor) -> Tensor:
        padded = F.pad(x.sum(1, keepdim=True), (radius,) * 4, mode="replicate")
        return F.avg_pool2d(padded, size, stride=1)

    gx, gy = _gradient(a)
    xx, xy, yy = around(gx * gx), around(gx * gy), around(gy * gy)
    # Where a window shows an edge only, or nothing, the ridge keeps the step small along what is not seen.
    ridge = 1e-4 + 0.02 * (xx + yy)
    xx, yy = xx + ridge, yy + ridge
    det = xx * yy - xy * xy
    for _ in range(iterations):
        residual = warp(b, flow) - a
        rx, ry = around(gx * residual), around(gy * residual)
        step = torch.cat(((xy * ry - yy * rx) / det, (xy * rx - xx * ry) / det), 1).clamp(-2, 2)
        flow = _median(flow + step)
    return flow


def _median(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    windows = F.unfold(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3).view(batch, channels, 9, height, width)
    return windows.median(2).values
