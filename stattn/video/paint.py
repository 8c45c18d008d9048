"""Paint a region of a video with a model: how every edit is made.

One number for each pixel says how far it may move from a given rough video: its *strength* in 0..1. At noise level s
the pixels of strength below s are held at the rough video's own noisy value; they are let go when the level falls below
their strength. So strength 1 is generated from nothing, 0 is kept exactly, and in between the rough video's coarse
structure stays (SDEdit, Meng et al., arXiv:2108.01073; with several strengths at once, Singer et al.,
arXiv:2511.08633). The model is told which pixels are known: those of strength 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stattn import world
from stattn.dit import DiT
from stattn.masks import Mask
from stattn.ops._dispatch import impl_for
from stattn.ops.denoise import denoise_step
from stattn.sampler import FlowMatching, draw_noise, step_weights
from stattn.video.cache import TokenCache

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Sampling:
    """How an edit is sampled.

    steps: for strength 1; weaker edits take fewer. guidance: classifier-free, towards the caption. shift: of the noise
    levels. seed: of the noise. mask: of every attention, None for the model's own. refresh: run the whole model every
    so many steps, and only the tokens that change in between (``TokenCache``); 1 is exact. size: frames, height and
    width that the model works at. overlap: frames that a part of a long video shares with the part before. impl: of the
    denoising step.
    """

    steps: int = 30
    guidance: float = 1.5
    shift: float = 1.0
    seed: int = 0
    mask: Mask | None = None
    refresh: int = 1
    size: Size = (16, 64, 64)
    overlap: int = 4
    impl: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "refresh"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if min(self.size) < 1 or not 1 <= self.overlap < self.size[0]:
            raise ValueError(f"overlap={self.overlap} must be at least 1 and below the frames of size={self.size}")


@dataclass
class Work:
    """What painting cost: video tokens that passed through the layers, and those of a plain model."""

    tokens: int = 0
    whole: int = 0

    @property
    def share(self) -> float:
        """The share of the plain model's tokens."""
        return self.tokens / self.whole if self.whole else 1.0


@torch.no_grad()
def paint(
    model: DiT,
    rough: Tensor,
    strength: Tensor,
    captions: list[str] | None = None,
    sampling: Sampling | None = None,
    *,
    noise: Tensor | None = None,
    call: Callable[..., Tensor] | None = None,
    work: Work | None = None,
) -> Tensor:
    """Paint one batch of clips of a size that the model's patches divide.

    rough: [B, 3, T, H, W] in -1..1. strength: in 0..1, broadcasts against [B, 1, T, H, W]: how far a pixel may depart
    from rough. captions: one per clip, none by default. noise: like rough, by default drawn from sampling.seed. call:
    predicts in place of the model, with its arguments (an adapter). work: the count of tokens, to be added to.

    Returns [B, 3, T, H, W] in fp32, equal to rough where strength is 0. Raises ValueError for shapes and strengths that
    do not fit.
    """
    sampling = sampling or Sampling()
    batch, device = len(rough), next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    if rough.ndim != 5:
        raise ValueError(f"rough of shape {tuple(rough.shape)} must be [B, C, T, H, W]")
    if call is not None and sampling.refresh > 1:
        raise ValueError(f"refresh={sampling.refresh} is for the model alone; what call predicts is not cached")
    strength = strength.to(device, torch.float32).expand(batch, 1, *rough.shape[2:])
    if not bool(((strength >= 0) & (strength <= 1)).all()):
        raise ValueError("strength must lie in 0..1")
    most = float(strength.max())
    if most == 0:
        return rough.float()
    rough = rough.to(device, torch.float32)
    noise = draw_noise(rough.shape, seed=sampling.seed) if noise is None else noise
    noise = noise.to(device, torch.float32)
    free, guided = strength > 0, sampling.guidance != 1
    ids, valid = world.tokenize(captions or [""] * batch, model.config.text_len, device=device)
    copies = 2 if guided else 1
    keywords: dict[str, Any] = {"text_valid": torch.cat([valid, 0 * valid][:copies])}
    if sampling.mask is not None:
        keywords["mask"] = sampling.mask
    # What is generated from nothing may hold anything in rough, and must not reach the model.
    clear = torch.where(strength == 1, 0, rough)
    if model.config.masked_input:
        known = torch.where(free, 0, clear).to(dtype)
        keywords |= {"known": torch.cat([known] * copies), "known_mask": torch.cat([(~free).to(dtype)] * copies)}
    cache = None
    if call is None:
        if sampling.refresh > 1:
            cache = TokenCache(model, free, sampling.refresh)
        call = model if cache is None else cache

    # A uniform strength starts where it lets go; the levels below it are as dense as those of a whole walk.
    levels = FlowMatching(max(1, math.ceil(sampling.steps * most)), sampling.shift).levels()
    levels = [
        level._replace(alpha=1 - s, sigma=s, timestep=1000 * s) for level in levels for s in (level.sigma * most,)
    ]
    x = levels[0].alpha * clear + levels[0].sigma * noise
    text = torch.cat([ids] * copies)
    for step, (now, then) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        timestep = torch.full((copies * batch,), now.timestep, device=device)
        out = call(torch.cat([x.to(dtype)] * copies), timestep, text, **keywords)
        guide: dict[str, Any] = {}
        if guided:
            out, uncond = out.chunk(2)
            guide = {"uncond": uncond, "guidance": sampling.guidance}
        x, _ = denoise_step(
            x,
            out,
            alpha=now.alpha,
            sigma=now.sigma,
            weights=step_weights(levels, step, 1),
            prediction="sample",
            known=clear,
            generated=free & (strength >= then.sigma),
            known_alpha=then.alpha,
            known_sigma=then.sigma,
            noise=noise,
            impl=impl_for(sampling.impl, "denoise"),
            **guide,
        )
    if work is not None:
        plain = (len(levels) - 1) * _tokens(model, rough)
        work.tokens += batch * (plain if cache is None else cache.tokens)
        work.whole += batch * plain
    return torch.where(free, x, rough)


def _tokens(model: DiT, video: Tensor) -> int:
    return math.prod(size // p for size, p in zip(video.shape[2:], model.config.patch, strict=True))


def fill(
    model: DiT,
    video: Tensor,
    strength: Tensor,
    caption: str = "",
    sampling: Sampling | None = None,
    *,
    work: Work | None = None,
) -> Tensor:
    """Paint a video of any size and length: [3, T, H, W] of video's dtype, equal to it where strength is 0.

    video: uint8, or floating point in -1..1; rough where strength is above 0. strength: [1, T, H, W] in 0..1. The model
    works at sampling.size: a video of that size is painted as it is, a larger one in a window around what changes,
    scaled to that size, and only the change is scaled back. A longer one is painted in parts that share ``overlap``
    frames, the later ones continuing what the earlier ones made. work: to be added to.
    """
    sampling = sampling or Sampling()
    check_clip(video, strength)
    frames, (length, *_) = video.shape[1], sampling.size
    source = _signed(video)
    made, start = source.clone(), 0
    while True:
        stop = min(start + length, frames)
        begin = max(0, stop - length)
        part = strength[:, begin:stop].clone()
        if start > 0:
            part[:, : start + sampling.overlap - begin] = 0  # these frames are done
        if bool((part > 0).any()):
            made[:, begin:stop] = _window(model, made[:, begin:stop], part, caption, sampling, work)
        if stop == frames:
            break
        start = stop - sampling.overlap
    changed = (strength > 0).expand_as(video)
    if video.dtype == torch.uint8:
        return torch.where(changed, ((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), video)
    return torch.where(changed, made.to(video.dtype), video)


def check_clip(video: Tensor, strength: Tensor | None = None) -> None:
    """Raise ValueError unless video is [3, T, H, W] and strength, or a mask, [1, T, H, W]."""
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"video of shape {tuple(video.shape)} must be [3, T, H, W]")
    if strength is not None and tuple(strength.shape) != (1, *video.shape[1:]):
        raise ValueError(f"mask of shape {tuple(strength.shape)} must be {(1, *video.shape[1:])}, as the video")


def _signed(video: Tensor) -> Tensor:
    if video.dtype == torch.uint8:
        return video.float() / 127.5 - 1
    if not video.is_floating_point():
        raise TypeError(f"video of {video.dtype} must be uint8 or floating point")
    return video.float()


def _window(model: DiT, video: Tensor, strength: Tensor, caption: str, sampling: Sampling, work: Work | None) -> Tensor:
    """Paint at most size[0] frames: returns them, changed where strength is above 0."""
    _, height, width = sampling.size
    top, left, rows, columns = _view(strength, height, width)
    crop = (slice(None), slice(None), slice(top, top + rows), slice(left, left + columns))
    rough, level = video[crop], strength[crop]
    scale = max(rows / height, columns / width)
    if scale > 1:
        size = (max(1, round(rows / scale)), max(1, round(columns / scale)))  # both axes alike: nothing is squeezed
        scaled = F.interpolate(
            rough.transpose(0, 1), size=size, mode="bilinear", antialias=True, align_corners=False
        ).transpose(0, 1)
        # A small pixel that holds any of the region belongs to it: what is known stays clean.
        small = F.adaptive_max_pool2d(level.transpose(0, 1), size).transpose(0, 1)
    else:
        scaled, small = rough, level
    patch = model.config.patch
    missing = [-size % p for size, p in zip(scaled.shape[1:], patch, strict=True)]
    padding = (0, missing[2], 0, missing[1], 0, missing[0])
    padded = F.pad(scaled[None], padding, mode="replicate")
    strengths = F.pad(small[None], padding, mode="replicate")
    out = paint(model, padded, strengths, [caption], sampling, work=work)[0].cpu()
    out = out[:, : scaled.shape[1], : scaled.shape[2], : scaled.shape[3]]
    if out.shape != rough.shape:
        out = F.interpolate(out.transpose(0, 1), size=(rows, columns), mode="bilinear", align_corners=False).transpose(
            0, 1
        )
    result = video.clone()
    result[crop] = torch.where(level > 0, out, rough)
    return result


def _view(strength: Tensor, height: int, width: int) -> tuple[int, int, int, int]:
    """Choose the window (top, left, rows, columns) that is worked on: twice what changes, of the shape of the working
    size and no smaller than it, within the picture.
    """
    changed = (strength > 0).any(1)[0]
    extents = []
    for axis, work in ((0, height), (1, width)):
        places = changed.any(1 - axis).nonzero()[:, 0]
        extents.append((int(places.min()), int(places.max()) + 1, changed.shape[axis], work))
    scale = max(1.0, *(2 * (high - low) / work for low, high, _, work in extents))
    spans = []
    for low, high, size, work in extents:
        span = min(size, max(work, round(scale * work)))
        start = min(max(0, (low + high - span) // 2), size - span)
        spans.append((start, span))
    return spans[0][0], spans[1][0], spans[0][1], spans[1][1]
