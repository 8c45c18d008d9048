"""Edits of video: inpaint, outpaint, recolour, restyle, motion brush.

A video is [3, T, H, W], uint8 or floating point in -1..1, and comes back in its dtype; outside the region that an edit
says it changes, the returned pixels are the given ones, exactly. Any DiT with masked_input and the world's words will
do; every edit is ``stattn.video.paint.fill`` with a rough video and a strength for each pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stattn.dit import DiT
from stattn.metrics.pixels import levels
from stattn.video import objects
from stattn.video.paint import Sampling, Work, check_clip, fill


class Edit(NamedTuple):
    """An edited video, the pixels that were free to change ([1, T, H, W] booleans), and what it cost."""

    video: Tensor
    changed: Tensor
    work: Work


def inpaint(model: DiT, video: Tensor, mask: Tensor, caption: str = "", sampling: Sampling | None = None) -> Edit:
    """Generate anew what a mask covers.

    video: [3, T, H, W]. mask: [1, T, H, W] booleans, any region in each frame. Raises ValueError for a mask that does
    not match the video, or that covers nothing.
    """
    check_clip(video, mask)
    _some("mask", mask)
    return _painted(model, video, mask.float(), caption, sampling)


def outpaint(
    model: DiT,
    video: Tensor,
    margins: tuple[int, int, int, int],
    caption: str = "",
    sampling: Sampling | None = None,
) -> Edit:
    """Extend the picture beyond its borders.

    margins: pixels at the left, right, top and bottom. The video comes back larger, with the given one inside,
    unchanged. Raises ValueError for negative margins, or when all are 0.
    """
    check_clip(video)
    if len(margins) != 4 or min(margins) < 0 or max(margins) == 0:
        raise ValueError(f"margins={margins} must be four numbers (left, right, top, bottom), none negative, not all 0")
    left, right, top, bottom = margins
    canvas = F.pad(video.transpose(0, 1).float(), (left, right, top, bottom), mode="replicate").transpose(0, 1)
    outside = F.pad(torch.zeros(1, *video.shape[1:]), (left, right, top, bottom), value=1.0)
    return _painted(model, canvas.to(video.dtype), outside, caption, sampling)


def recolour(
    model: DiT,
    video: Tensor,
    source: str,
    target: str,
    caption: str = "",
    sampling: Sampling | None = None,
    *,
    mask: Tensor | None = None,
    strength: float = 0.4,
) -> Edit:
    """Give one object another colour in all frames; it keeps its place, its shape and its motion.

    source, target: colours of ``world.COLOURS``. The object is found by the source's hue (``objects.object_mask``), or
    given by mask, [1, T, H, W] booleans. Its hue is rotated from source to target, and the model repaints the result.
    strength: how far the model may depart from it, 0 to 1. Raises ValueError for unknown colours, and when no such
    object is found.
    """
    check_clip(video, mask)
    turn = objects.hue_of(target) - objects.hue_of(source)
    _unit("strength", strength)
    found = objects.object_mask(video, source, grow=2) if mask is None else mask
    _some("mask", found)
    hue, chroma = objects.hue_and_chroma(video)
    # In the soft edge only what carries the object's hue is turned; the scenery in it keeps its own.
    carries = found & ((objects.apart(hue, objects.hue_of(source)) < 0.15) & (chroma > 0.05))[None]
    rough = _like(objects.turn_hue(video, carries, turn), video)
    return _painted(model, video, found.float() * strength, caption, sampling, rough)


def restyle(
    model: DiT,
    video: Tensor,
    strength: float,
    caption: str = "",
    sampling: Sampling | None = None,
    *,
    mask: Tensor | None = None,
) -> Edit:
    """Generate a video anew from its own coarse structure (SDEdit): strength 0 keeps it, 1 forgets it.

    mask: [1, T, H, W] booleans, where the video may change; everywhere when None.
    """
    check_clip(video, mask)
    _unit("strength", strength)
    where = torch.ones(1, *video.shape[1:]) if mask is None else mask.float()
    _some("mask", where > 0)
    return _painted(model, video, where * strength, caption, sampling)


def motion_brush(
    model: DiT,
    video: Tensor,
    brush: Tensor,
    path: Sequence[tuple[float, float]] | Tensor,
    caption: str = "",
    sampling: Sampling | None = None,
    *,
    strength: float = 0.5,
    grow: int = 2,
) -> Edit:
    """Move the brushed object along a path, and leave everything else where it is.

    brush: [1, T, H, W] booleans, the object in every frame. path: [T, 2] offsets (x, y) in pixels, one per frame, or
    just the first and the last, joined by a line. The object is cut out and pasted along the path, and the model
    repaints it at ``strength`` (as in Time-to-Move, Singer et al., arXiv:2511.08633). The place that it left is filled
    from other frames or from its surroundings and repainted at ``objects.LEFT``; parts of other vivid objects that it
    hid are completed from frames that show them. grow: pixels by which both regions are widened. Raises ValueError for
    a brush or path that does not fit.
    """
    check_clip(video, brush)
    _some("brush", brush)
    _unit("strength", strength)
    offset = as_path(path, video.shape[1])
    laid, cover = objects.moved(levels(video) * 2 - 1, brush, offset)
    hole, there = objects.grown(brush, grow), objects.grown(cover > 0.01, grow)
    base = levels(video) * 2 - 1
    behind, others = objects.uncovered(base, brush, hole)
    rough = torch.lerp(torch.where(hole, behind, base), laid, cover)
    level = torch.where(there | others, strength, torch.where(hole, objects.LEFT, 0.0))
    return _painted(model, video, level, caption, sampling, _like(rough, video))


def as_path(path: Sequence[tuple[float, float]] | Tensor, frames: int) -> Tensor:
    """Give a path as offsets [frames, 2]: from one a frame, or joined by a line from two."""
    offset = torch.as_tensor(path, dtype=torch.float32)
    if offset.ndim != 2 or offset.shape[1] != 2 or len(offset) not in (2, frames):
        raise ValueError(f"path of shape {tuple(offset.shape)} must be [{frames}, 2] or [2, 2]: (x, y) offsets")
    if len(offset) != frames:
        run = torch.linspace(0, 1, frames)[:, None]
        offset = torch.lerp(offset[:1], offset[1:], run)
    return offset


def moving_box(
    size: tuple[int, int, int], start: tuple[int, int, int, int], end: tuple[int, int] | None = None
) -> Tensor:
    """Give a box (x, y, width, height) that moves in a line to the corner ``end`` (x, y): [1, T, H, W] booleans."""
    frames, height, width = size
    x, y, across, down = start
    if across < 1 or down < 1:
        raise ValueError(f"start={start} must have a positive width and height")
    run = torch.linspace(0, 1, frames) if frames > 1 else torch.zeros(1)
    left, top = ((a + (b - a) * run).round()[:, None] for a, b in zip((x, y), end or (x, y), strict=True))
    columns, rows = torch.arange(width), torch.arange(height)
    inside = ((rows >= top) & (rows < top + down))[:, :, None] & ((columns >= left) & (columns < left + across))[
        :, None
    ]
    return inside[None]


def _painted(
    model: DiT,
    video: Tensor,
    strength: Tensor,
    caption: str,
    sampling: Sampling | None,
    rough: Tensor | None = None,
) -> Edit:
    work = Work()
    made = fill(model, video if rough is None else rough, strength, caption, sampling, work=work)
    changed = strength > 0
    return Edit(torch.where(changed, made, video), changed, work)


def _like(signed: Tensor, video: Tensor) -> Tensor:
    if video.dtype == torch.uint8:
        return ((signed.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return signed.to(video.dtype)


def _some(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} of {mask.dtype} must be boolean")
    if not bool(mask.any()):
        raise ValueError(f"{name} covers no pixel")


def _unit(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value} must lie in (0, 1]")
