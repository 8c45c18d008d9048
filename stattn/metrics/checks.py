"""Automatic checks of generated clips of ``stattn.world``: no learned weights, only pixels.

The main object's colour is the hue that covers most of the picture. Its shape follows from two moments of its
silhouette a(z), with z = x + iy measured from its centroid and A the area: M3 = |sum a z^3| / A^(5/2) and M4 = |sum a
z^4| / A^3.

|          | M3     | M4   |
|----------|--------|------|
| disc     | 0      | 0    |
| square   | 0      | 1/60 |
| triangle | 0.0675 | 0    |

Both ignore rotation and size. Because z^3 and z^4 are harmonic, averaging them around a point gives their value there,
so a round blur changes neither: soft generated edges do not matter. Every frame votes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stattn.world import COLOURS, SHAPES

SQUARE_M4 = 1 / 60
TRIANGLE_M3 = 0.1 * (0.75 * 3**0.5) ** -1.5
_VIVID = 0.3  # least chroma of an object's pixel; scenery stays below 0.2, objects lie above 0.6
_LEAST_AREA = 0.004  # of the picture: less is no object
_REACH = 2.2  # silhouettes end at this many radii of their equal-area disc; a triangle's corner is at 1.56


class Classification(NamedTuple):
    """Hold what a batch of clips shows. Ids are -1 where no object is seen.

    colours, shapes, directions: [B] int64 into world.COLOURS, world.SHAPES, world.DIRECTIONS. centres: [B, T, 2]
    centroid (x, y) in pixels, NaN in frames without the object. areas: [B, T] pixels.
    """

    colours: Tensor
    shapes: Tensor
    directions: Tensor
    centres: Tensor
    areas: Tensor


def classify(video: Tensor) -> Classification:
    """Say which object each clip shows.

    video: [B, 3, T, H, W] in [-1, 1], any float dtype. Raises ValueError for any other shape.
    """
    _check(video, 1)
    parts = [_classify(part) for part in video.split(32)]  # bounds the memory
    return Classification(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def agreement(video: Tensor, colours: Tensor, shapes: Tensor) -> dict[str, float]:
    """Give the share of clips that show the asked main object: {"colour", "shape", "both"} (waits for the device).

    video: [B, 3, T, H, W] in [-1, 1]; colours, shapes: [B] ids. Raises ValueError for other shapes.
    """
    for name, ids in (("colours", colours), ("shapes", shapes)):
        if ids.shape != video.shape[:1]:
            raise ValueError(f"{name} of shape {tuple(ids.shape)} must hold one id for each of {video.shape[0]} clips")
    seen = classify(video)
    colour, shape = seen.colours == colours, seen.shapes == shapes
    return {
        "colour": colour.float().mean().item(),
        "shape": shape.float().mean().item(),
        "both": (colour & shape).float().mean().item(),
    }


def jumps(video: Tensor) -> Tensor:
    """Measure how much a clip jumps: the mean of |x[t + 1] - 2 x[t] + x[t - 1]| over channels, inner frames and pixels.

    What moves steadily adds little, what jumps from frame to frame adds four times its size. video: [B, C, T, H, W];
    returns [B] fp32. Raises ValueError for fewer than 3 frames.
    """
    _check(video, 3)
    x = video.float()
    return (x[:, :, 2:] - 2 * x[:, :, 1:-1] + x[:, :, :-2]).abs().mean((1, 2, 3, 4))


def flicker_ratio(generated: Tensor, real: Tensor) -> float:
    """Divide the mean jumps of generated clips by that of real ones (waits for the device).

    1 is as steady as real video, below 1 is smoother or frozen.
    """
    return (jumps(generated).mean() / jumps(real).mean()).item()


def _check(video: Tensor, frames: int) -> None:
    if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] < frames:
        raise ValueError(f"video of shape {tuple(video.shape)} must be [B, 3, T, H, W] with T >= {frames}")


def _classify(video: Tensor) -> Classification:
    red, green, blue = (video.float().clamp(-1, 1) / 2).unbind(1)  # [B, T, H, W]
    # The projection of a colour on the hue of red is red - (green + blue) / 2, on cyan its negative, and so on.
    axes = torch.stack((red - (green + blue) / 2, (red + green) / 2 - blue, green - (red + blue) / 2), 0)
    vivid, axis = axes.abs().max(0)
    hue = torch.where(axes.gather(0, axis[None])[0] >= 0, axis, axis + 3)
    solid = vivid > _VIVID
    area = torch.stack([((hue == c) & solid).float().mean((2, 3)) for c in range(len(COLOURS))], -1)  # [B, T, 6]
    most, winner = area.max(-1)
    votes = torch.nn.functional.one_hot(winner, len(COLOURS)) * (most > _LEAST_AREA)[..., None]
    total = area.sum(1)
    colour = (votes.sum(1) + total / (total.sum(1, keepdim=True) + 1)).argmax(1)  # areas settle a tie
    seen = votes.sum((1, 2)) > 0

    strength = torch.where((hue == colour[:, None, None, None]) & (vivid > _VIVID / 2), vivid, 0.0)
    core = torch.where(strength > _VIVID, strength, 0.0)
    peak = (core * core).sum((2, 3), keepdim=True) / core.sum((2, 3), keepdim=True).clamp(min=1e-6)
    # An edge pixel mixes object and scenery, and its chroma in the same proportion: strength / peak is coverage, here
    # steepened about one half.
    cover = (2 * strength / peak.clamp(min=_VIVID) - 0.5).clamp(0, 1)
    y = torch.arange(video.shape[3], device=video.device)[:, None] + 0.5
    x = torch.arange(video.shape[4], device=video.device)[None] + 0.5
    for _ in range(2):  # the second time without what lies far from the object
        size = cover.sum((2, 3))
        floor = size.clamp(min=1e-6)[..., None, None]
        dx = x - (cover * x).sum((2, 3), keepdim=True) / floor
        dy = y - (cover * y).sum((2, 3), keepdim=True) / floor
        cover = torch.where(dx * dx + dy * dy <= _REACH**2 / torch.pi * floor, cover, 0.0)
    size = cover.sum((2, 3)).clamp(min=1e-6)
    centre = torch.stack(((cover * x).sum((2, 3)) / size, (cover * y).sum((2, 3)) / size), -1)  # [B, T, 2]
    dx, dy = x - centre[..., 0, None, None], y - centre[..., 1, None, None]
    x2, y2 = dx * dx, dy * dy
    third = torch.hypot((cover * dx * (x2 - 3 * y2)).sum((2, 3)), (cover * dy * (3 * x2 - y2)).sum((2, 3))) / size**2.5
    fourth = (
        torch.hypot(
            (cover * (x2 * x2 - 6 * x2 * y2 + y2 * y2)).sum((2, 3)), (4 * cover * dx * dy * (x2 - y2)).sum((2, 3))
        )
        / size**3
    )
    score = torch.stack((torch.full_like(third, 0.5), fourth / SQUARE_M4, third / TRIANGLE_M3), -1)
    there = size > _LEAST_AREA * video.shape[3] * video.shape[4]  # [B, T]
    votes = torch.nn.functional.one_hot(score.argmax(-1), len(SHAPES)) * there[..., None]
    mean = (score * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp(min=1)
    shape = (votes.sum(1) + mean / (mean.sum(1, keepdim=True) + 1)).argmax(1)

    step = centre[:, video.shape[2] // 2] - centre[:, 0]
    sideways = step[:, 0].abs() >= step[:, 1].abs()
    direction = torch.where(sideways, (step[:, 0] > 0).long(), 2 + (step[:, 1] > 0).long())
    moved = there[:, 0] & there[:, video.shape[2] // 2] & (step.abs().amax(1) > 0)
    return Classification(
        torch.where(seen, colour, -1),
        torch.where(there.any(1), shape, -1),
        torch.where(moved, direction, -1),
        torch.where(there[..., None], centre, torch.nan),
        torch.where(there, size, 0.0),
    )
