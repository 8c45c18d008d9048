"""Find and change vivid objects in video by their hue: masks, and hues turned.

What counts as an object here is what stands out from greyish scenery by its colour, as in the synthetic world. For
other video, give a mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stattn.metrics.pixels import levels
from stattn.video.paint import check_clip
from stattn.world import COLOURS

# The strength at which the place that an object left is painted: from nothing a model fills it with another like it.
LEFT = 0.75
VIVID = 0.3  # least chroma of an object's pixel, of a range of 2: that of ``stattn.metrics.checks``


def hue_of(colour: str) -> float:
    """Give a colour's hue in turns. Raises ValueError for a word that is none of the world's colours."""
    if colour not in COLOURS:
        raise ValueError(f"colour={colour!r} must be one of {', '.join(COLOURS)}")
    return COLOURS.index(colour) / len(COLOURS)


def hue_and_chroma(video: Tensor) -> tuple[Tensor, Tensor]:
    """Give hue in turns and chroma in 0..1 of every pixel of a clip [3, T, H, W]: two [T, H, W]."""
    red, green, blue = levels(video)
    most, least = torch.stack((red, green, blue)).amax(0), torch.stack((red, green, blue)).amin(0)
    chroma = most - least
    safe = chroma.clamp(min=1e-6)
    hue = torch.where(
        most == red,
        (green - blue) / safe,
        torch.where(most == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    return (hue / 6) % 1, chroma


def apart(hue: Tensor, other: float | Tensor) -> Tensor:
    """Give the distance of hues on their circle, in turns: 0 to 0.5."""
    return ((hue - other + 0.5) % 1 - 0.5).abs()


def object_mask(video: Tensor, colour: str, *, grow: int = 0) -> Tensor:
    """Find the object of a colour in every frame: [1, T, H, W] booleans.

    A pixel belongs to it when its hue is nearer to the colour than to any other and it is vivid. grow: pixels to widen
    the mask by, for soft edges. Raises ValueError when no frame shows such an object.
    """
    check_clip(video)
    mask = _of_hue(*hue_and_chroma(video), colour)
    if not bool(mask.any()):
        raise ValueError(f"colour={colour!r}: no frame shows an object of that colour")
    return grown(mask[None], grow)


def _of_hue(hue: Tensor, chroma: Tensor, colour: str) -> Tensor:
    mask = (apart(hue, hue_of(colour)) < 0.5 / len(COLOURS)) & (chroma > VIVID)
    # A lone pixel is noise: an object fills most of some 3 x 3 square.
    solid = F.avg_pool2d(mask[:, None].float(), 3, 1, 1) > 0.6
    return mask & (F.max_pool2d(solid.float(), 5, 1, 2)[:, 0] > 0)


def grown(mask: Tensor, pixels: int) -> Tensor:
    """Widen a mask [1, T, H, W] in each frame by so many pixels."""
    if pixels == 0:
        return mask
    return F.max_pool2d(mask.transpose(0, 1).float(), 2 * pixels + 1, 1, pixels).transpose(0, 1) > 0


def turn_hue(video: Tensor, mask: Tensor, turns: float) -> Tensor:
    """Rotate the hue of what a mask covers, keeping the lightness and chroma of each pixel.

    mask: [1, T, H, W]. Returns [3, T, H, W] in -1..1. Pixels are mixed on a hue circle in linear combination: value =
    most, chroma = most - least.
    """
    x = levels(video)
    hue, chroma = hue_and_chroma(video)
    most = x.amax(0)
    sector = ((hue + turns) % 1) * 6
    shifted = torch.stack([(sector + each) % 6 for each in (5.0, 3.0, 1.0)])
    turned = most - chroma * torch.minimum(shifted, 4 - shifted).clamp(0, 1)
    return torch.where(mask, turned, x) * 2 - 1


def centroid(mask: Tensor) -> Tensor:
    """Give the centroid (x, y) in pixels of a mask [1, T, H, W] in each frame: [T, 2], NaN where it is empty."""
    weight = mask[0].float()
    y = torch.arange(mask.shape[2], device=mask.device)[:, None] + 0.5
    x = torch.arange(mask.shape[3], device=mask.device) + 0.5
    area = weight.sum((1, 2))
    return torch.stack(((weight * x).sum((1, 2)) / area, (weight * y).sum((1, 2)) / area), 1)


def moved(video: Tensor, mask: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Move what a mask covers in each frame: returns video [3, T, H, W] and the moved cover [1, T, H, W] in 0..1.

    offset: [T, 2] (x, y) in pixels. What leaves the picture is lost; nothing is said about what was uncovered.
    """
    frames, height, width = video.shape[1:]
    y = torch.arange(height, device=video.device)[:, None] + 0.5
    x = torch.arange(width, device=video.device) + 0.5
    at = torch.stack(
        torch.broadcast_tensors(
            2 * (x - offset[:, 0, None, None]) / width - 1, 2 * (y - offset[:, 1, None, None]) / height - 1
        ),
        -1,
    ).expand(frames, height, width, 2)
    both = torch.cat((video.float(), mask.float())).transpose(0, 1)
    # Colours are weighted by the mask, so that the edge does not take the scenery along.
    both = torch.cat((both[:, :3] * both[:, 3:], both[:, 3:]), 1)
    looked = F.grid_sample(both, at.float(), mode="bilinear", padding_mode="zeros", align_corners=False).transpose(0, 1)
    cover = looked[3:]
    return looked[:3] / cover.clamp(min=1e-6), cover


def uncovered(video: Tensor, brush: Tensor, hole: Tensor) -> tuple[Tensor, Tensor]:
    """Guess what lies behind a brushed object: scenery, and the parts of other objects that it hides.

    video: [3, T, H, W] in -1..1. brush: [1, T, H, W], the object; hole: the brush and what else is not to be trusted.
    Another object is put together from all frames that show some of it, and is laid where the rest of it is seen to be.
    Returns the guess, a video of which only the hole matters, and where it shows such an object: [1, T, H, W].
    """
    hue, chroma = hue_and_chroma(video)
    others = []
    for colour in COLOURS:
        mask = _of_hue(hue, chroma, colour)[None]
        if bool(mask.any()) and float((mask & brush).sum()) < 0.5 * float(mask.sum()):
            others.append(mask & ~hole)
    vivid = torch.stack(others).any(0) if others else torch.zeros_like(hole)
    guess, shown = scenery(video, hole | grown(vivid, 2)), torch.zeros_like(hole)
    for seen in others:
        if bool((grown(seen, 1) & hole).any()):
            laid, cover = _completed(video, seen, ~hole)
            guess, shown = torch.lerp(guess, laid, cover), shown | (cover > 0.5)
    return guess, shown & hole


def _completed(video: Tensor, seen: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Complete an object in every frame: a video of it, and its cover. seen: its pixels, out of those known."""
    offset = _followed(seen[0], known[0])
    still, parts = moved(video, seen, -offset)  # every frame on the one where it is seen best
    _, trusted = moved(video, known, -offset)
    once = (still * parts).sum(1, keepdim=True) / parts.sum(1, keepdim=True).clamp(min=1e-6)
    whole = parts.sum(1, keepdim=True) > 0.5 * trusted.sum(1, keepdim=True).clamp(min=0.5)
    return moved(once.expand_as(video), whole.expand_as(seen), offset)


def _followed(seen: Tensor, known: Tensor) -> Tensor:
    """Follow a partly hidden object: [T, 2] offsets (x, y) from where it is in the frame that shows most of it.

    seen, known: [T, H, W]. In each frame the silhouette of that best frame is laid where it agrees best with what is
    known; what is hidden speaks for nothing, and the pace of the frames before decides.
    """
    frames, height, width = seen.shape
    best = int(seen.sum((1, 2)).argmax())
    votes = torch.where(known, torch.where(seen, 1.0, -1.0), 0.0)
    padded = (2 * height, 2 * width)
    product = torch.fft.rfft2(votes, s=padded) * torch.fft.rfft2(seen[best].float(), s=padded).conj()
    score = torch.fft.irfft2(product, s=padded)  # [T, 2 H, 2 W], of every shift down and to the right
    y, x = ((torch.arange(2 * n) + n) % (2 * n) - n for n in (height, width))
    offset = torch.zeros(frames, 2)
    for way in (1, -1):
        for frame in range(best + way, frames if way > 0 else -1, way):
            back = min(4, abs(frame - way - best))
            before = offset[frame - way]
            pace = (before - offset[frame - way * (1 + back)]) / max(1, back)
            far = (x - before[0] - pace[0]) ** 2 + (y[:, None] - before[1] - pace[1]) ** 2
            place = int((score[frame] - 0.1 * far).argmax())
            offset[frame] = torch.stack((x[place % (2 * width)], y[place // (2 * width)])).float()
    return offset


def scenery(video: Tensor, hole: Tensor) -> Tensor:
    """Fill a hole with what other frames show at its place, or else what lies around it: a rough guess. [3, T, H, W]"""
    seen = (~hole).float()
    behind = (video * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)
    known = (seen.sum(1, keepdim=True) > 0).float()
    picture, weight = (behind * known).transpose(0, 1), known.transpose(0, 1)
    around = torch.zeros_like(picture)
    for size in (min(video.shape[2:]) // 2 * 2 - 1, 31, 15, 7):  # the nearest surroundings count last, and most
        share = F.avg_pool2d(weight, size, 1, size // 2)
        near = F.avg_pool2d(picture, size, 1, size // 2) / share.clamp(min=1e-6)
        around = torch.where(share > 0.02, near, around)
    return torch.where(known > 0, behind, around.transpose(0, 1)).expand_as(video)
