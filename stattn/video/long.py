"""Long video: a storyboard of keyframes, interpolation between neighbours, and continuation.

A model that sees a short window makes a long video from coarse to fine (as NUWA-XL, Yin et al., arXiv:2303.12346): the
keyframes of the whole plot as one sparse clip, then the frames between neighbours, in windows whose ends are known. One
model does all of it, told by its mask what is known; the windows of a level do not wait for each other; and the cost
grows with the number of windows, not with the square of the length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stattn.dit import DiT
from stattn.video import objects
from stattn.video.adapted import RECALL, Adapted
from stattn.video.paint import Sampling, Work, paint
from stattn.world import DIRECTIONS

WAYS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
KEYFRAMES_A_MINUTE = 10
PAST_FRAMES = 8


class Story(NamedTuple):
    """A long video, and how it was made.

    video: [3, T, H, W] in -1..1. Beside it: the numbers of its keyframes, where the script puts the object in them
    (x, y), and the numbers of the frames at which windows join.
    """

    video: Tensor
    keyframes: list[int]
    script: Tensor
    joints: list[int]
    work: Work


def parse_plot(text: str) -> list[str]:
    """Parse "left, right, left" as directions. Raises ValueError for other words."""
    plot = [word.strip() for word in text.replace("then", ",").split(",") if word.strip()]
    unknown = [word for word in plot if word not in DIRECTIONS]
    if unknown or not plot:
        raise ValueError(f"plot={text!r} must be directions out of {', '.join(DIRECTIONS)}, separated by commas")
    return plot


def script(plot: Sequence[str], keyframes: int, reach: float, start: tuple[float, float]) -> Tensor:
    """Write a plot as the object's centre in each keyframe: [K, 2].

    Each direction lasts equally long and covers ``reach`` pixels; start: the centre in the first keyframe.
    """
    corners = [torch.tensor(start)]
    for word in plot:
        corners.append(corners[-1] + reach * torch.tensor(WAYS[word]))
    at = torch.linspace(0, len(plot), keyframes)
    before = at.floor().long().clamp(max=len(plot) - 1)
    line = torch.stack(corners)
    return torch.lerp(line[before], line[before + 1], (at - before)[:, None])


class Stage(NamedTuple):
    """What a story is laid out on: the scenery without its object [3, 1, H, W], the object's picture, and its mask."""

    plate: Tensor
    picture: Tensor
    brush: Tensor

    def laid(self, path: Tensor) -> tuple[Tensor, Tensor]:
        """Lay the object down at each place of a path [K, 2]: frames [3, K, H, W] and its cover [1, K, H, W]."""
        many = (-1, len(path), -1, -1)
        offset = path - objects.centroid(self.brush)
        moved, cover = objects.moved(self.picture[:, None].expand(*many), self.brush.expand(*many), offset)
        return torch.lerp(self.plate.expand_as(moved), moved, cover), cover


def set_stage(
    model: DiT, picture: Tensor, colour: str, sampling: Sampling | None = None, *, work: Work | None = None
) -> Stage:
    """Paint the object of a colour out of a picture [3, H, W] in -1..1, once, so that all frames share the scenery."""
    sampling = sampling or Sampling()
    brush = objects.object_mask(picture[:, None], colour)
    hole = objects.grown(brush, 2)
    empty = torch.where(hole, objects.scenery(picture[:, None], hole), picture[:, None])
    still = empty[None].expand(1, -1, sampling.size[0], -1, -1)
    plate = paint(model, still, hole[None].float() * objects.LEFT, [""], sampling, work=work)[0, :, :1].to(picture)
    return Stage(plate, picture, brush)


def storyboard(
    model: DiT,
    stage: Stage,
    path: Tensor,
    caption: str = "",
    sampling: Sampling | None = None,
    *,
    strength: float = 0.4,
    batch: int = 8,
    work: Work | None = None,
) -> Tensor:
    """Draw keyframes: the object at each place of a path [K, 2] of centres in pixels. [3, K, H, W]

    The object is laid down at each place, and the model repaints the picture at ``strength``; to the model a keyframe
    is a clip that stands still.
    """
    sampling = sampling or Sampling()
    rough, _ = stage.laid(path)
    level = torch.tensor(strength)
    keys = []
    for part in rough.transpose(0, 1).split(batch):
        clips = part[:, :, None].expand(-1, -1, sampling.size[0], -1, -1)
        keys.append(paint(model, clips, level, [caption] * len(part), sampling, work=work)[:, :, 0])
    return torch.cat(keys).to(rough).transpose(0, 1)


def interpolate(
    model: DiT,
    frames: Tensor,
    gap: int,
    caption: str | Callable[[int, int], str] = "",
    sampling: Sampling | None = None,
    *,
    rough: Tensor | None = None,
    strength: Tensor | float = 1.0,
    batch: int = 8,
    work: Work | None = None,
) -> tuple[Tensor, list[int]]:
    """Fill in the frames between neighbours: [3, (K - 1) * gap + 1, H, W] from [3, K, H, W] in -1..1.

    gap: the distance, in frames, from one given frame to the next. A window of sampling.size[0] frames holds as many
    given ones as fit, begins and ends at one, and shares that one with the next window. caption: one for all windows,
    or a function of a window's first and last frame. rough, strength: a video of the result's size to start from, and
    how far the result may depart from it, one number or [1, T, H, W]. Given frames come back exactly. Returns the video
    and the numbers of the shared frames.
    Raises ValueError for a gap that a window does not hold, or fewer than two frames.
    """
    sampling = sampling or Sampling()
    length = sampling.size[0]
    known = frames.shape[1]
    if known < 2:
        raise ValueError(f"frames of shape {tuple(frames.shape)} must hold at least two to interpolate between")
    if not 1 <= gap < length:
        raise ValueError(f"gap={gap} must be positive and below the model's {length} frames")
    total = (known - 1) * gap + 1
    video = frames.new_zeros(3, total, *frames.shape[2:]) if rough is None else rough.clone()
    if tuple(video.shape) != (3, total, *frames.shape[2:]):
        raise ValueError(f"rough of shape {tuple(video.shape)} must be {(3, total, *frames.shape[2:])}")
    video[:, ::gap] = frames
    far = torch.as_tensor(strength, dtype=torch.float32).expand(1, *video.shape[1:])
    given = torch.zeros(total, dtype=torch.bool)
    given[::gap] = True
    span = (length - 1) // gap * gap  # from the first to the last known frame of a window
    starts = list(range(0, total - 1, span))
    for at in range(0, len(starts), batch):
        some = starts[at : at + batch]
        # The last window is short: its end is repeated as known frames, which no one reads.
        index = torch.stack([(first + torch.arange(length)).clamp(max=min(first + span, total - 1)) for first in some])
        clips = video[:, index.flatten()].unflatten(1, (len(some), length)).transpose(0, 1)
        free = (~given[index]).float()[:, None, :, None, None]
        free = free * far[:, index.flatten()].unflatten(1, index.shape).transpose(0, 1)
        words = [
            caption if isinstance(caption, str) else caption(first, min(first + span, total - 1)) for first in some
        ]
        made = paint(model, clips, free, words, sampling, work=work).to(video)
        for clip, where, level in zip(made, index, ~given[index], strict=True):
            video[:, where[level]] = clip[:, level]
    return video, starts[1:]


def tell(
    model: DiT,
    caption: str,
    plot: Sequence[str],
    sampling: Sampling | None = None,
    *,
    minutes: float = 1.0,
    stride: int = 1,
    reach: float | None = None,
    picture: Tensor | None = None,
    follow: float = 0.8,
    batch: int = 8,
) -> Story:
    """Make a long video of an object that moves according to a plot.

    caption: what is seen, "a red disc moves left, camera static"; its colour names the object. plot: directions, in the
    order in which the object moves. minutes: the length, at KEYFRAMES_A_MINUTE. stride: 1 fills in the frames between
    keyframes in one level of windows; a larger one makes a video of stride times as many frames, every stride-th in the
    first level and the rest in a second. reach: pixels covered by one direction, by default what fits the picture.
    picture: [3, H, W], the first frame, by default that of a clip sampled from the caption. follow: the strength at
    which the model repaints the object, pasted along the script, in the frames between keyframes; at 1 the model alone
    decides how it moves between them. Raises ValueError for a plot that leaves the picture.
    """
    sampling = sampling or Sampling()
    length, height, width = sampling.size
    colour = caption.split()[1] if len(caption.split()) > 1 else ""
    objects.hue_of(colour)
    work = Work()
    if picture is None:
        nothing = torch.zeros(1, 3, length, height, width)
        picture = paint(model, nothing, torch.ones(1), [caption], sampling, work=work)[0, :, 0].cpu()
    brush = objects.object_mask(picture[:, None], colour)
    start = objects.centroid(brush)[0]
    keyframes = max(2, round(minutes * KEYFRAMES_A_MINUTE) + 1)
    path = script(plot, keyframes, 1.0, (0.0, 0.0))
    rows, columns = brush[0, 0].any(1).nonzero()[:, 0], brush[0, 0].any(0).nonzero()[:, 0]
    half = torch.tensor([float(columns.max() - columns.min() + 1), float(rows.max() - rows.min() + 1)]) / 2
    room = torch.tensor([width, height]) - 2 * half
    spread = path.amax(0) - path.amin(0)
    if reach is None:
        reach = float((0.8 * room / spread)[spread > 0].min())
    low, high = half, torch.tensor([width, height]) - half
    if bool((spread * reach > high - low).any()):
        raise ValueError(f"reach={reach} leads out of the picture: the plot needs {(spread * reach).tolist()} pixels")
    path = path * reach
    # The whole path is moved into the picture, as near to where the object is as it can be.
    shift = torch.minimum(torch.maximum(start, low - path.amin(0)), high - path.amax(0))
    path = path + shift
    stage = set_stage(model, picture, colour, sampling, work=work)
    keys = storyboard(model, stage, path, caption.split(",")[0], sampling, batch=batch, work=work)
    gap = (length - 1) * stride

    def words(first: int, last: int, scale: int) -> str:
        step = at_frame(path, gap, last * scale) - at_frame(path, gap, first * scale)
        return _heading(caption, step)

    def between(frames: Tensor, gap_here: int, scale: int) -> tuple[Tensor, list[int]]:
        total = (frames.shape[1] - 1) * gap_here + 1
        rough, cover = stage.laid(torch.stack([at_frame(path, gap, frame * scale) for frame in range(total)]))
        # The scenery is known but for light and noise: there less is left to the model.
        level = torch.where(objects.grown(cover > 0.01, 3), follow, follow / 2)
        return interpolate(
            model,
            frames,
            gap_here,
            lambda first, last: words(first, last, scale),
            sampling,
            rough=rough,
            strength=level,
            batch=batch,
            work=work,
        )

    video, joints = between(keys, length - 1, stride)
    if stride > 1:
        joints = [joint * stride for joint in joints]
        video, second = between(video, stride, 1)
        joints = sorted({*second, *joints})
    video = smooth(model, video, joints, lambda first, last: words(first, last, 1), sampling, batch=batch, work=work)
    return Story(video, [gap * i for i in range(keyframes)], path, joints, work)


def smooth(
    model: DiT,
    video: Tensor,
    joints: Sequence[int],
    caption: str | Callable[[int, int], str] = "",
    sampling: Sampling | None = None,
    *,
    strength: float = 0.4,
    reach: int = 4,
    batch: int = 8,
    work: Work | None = None,
) -> Tensor:
    """Repaint the frames around the joints between windows, each in a window centred on the joint: [3, T, H, W].

    strength: at the joint, falling to 0 over ``reach`` frames on either side; frames beyond come back exactly. Joints
    closer together than a window are repainted one after the other, so that each sees the result of the one before.
    """
    sampling = sampling or Sampling()
    length, total = sampling.size[0], video.shape[1]
    made = video.clone()
    for turn in range(2):
        some = [joint for joint in list(joints)[turn::2] if total >= length]
        for at in range(0, len(some), batch):
            group = some[at : at + batch]
            index = torch.stack([torch.arange(length) + max(0, min(j - length // 2, total - length)) for j in group])
            far = (index - torch.tensor(group)[:, None]).abs() / (reach + 1)
            near = far < 1
            clips = made[:, index.flatten()].unflatten(1, index.shape).transpose(0, 1)
            level = (1 - far).clamp(min=0)[:, None, :, None, None] * strength
            words = [caption if isinstance(caption, str) else caption(int(i[0]), int(i[-1])) for i in index]
            painted = paint(model, clips, level.expand(-1, 1, -1, *video.shape[2:]), words, sampling, work=work)
            for clip, where, free in zip(painted.to(made), index, near, strict=True):
                made[:, where[free]] = clip[:, free]
    return made


def at_frame(path: Tensor, gap: int, frame: int) -> Tensor:
    """Give the scripted centre [2] in a frame between keyframes that lie ``gap`` frames apart."""
    before = min(frame // gap, len(path) - 2)
    return torch.lerp(path[before], path[before + 1], (frame - before * gap) / gap)


def _heading(caption: str, step: Tensor) -> str:
    """Let a caption say where its object goes, if it speaks of it."""
    words = caption.split()
    if "moves" in words and words.index("moves") + 1 < len(words) and bool((step.abs() > 0.5).any()):
        x, y = step.tolist()
        way = ("left" if x < 0 else "right") if abs(x) >= abs(y) else ("up" if y < 0 else "down")
        at = words.index("moves") + 1
        words[at] = way + ("," if words[at].endswith(",") else "")
    return " ".join(words)


def extend(
    model: DiT | Adapted,
    video: Tensor,
    frames: int,
    caption: str = "",
    sampling: Sampling | None = None,
    *,
    remember: bool = True,
    work: Work | None = None,
) -> Tensor:
    """Continue a video by ``frames`` frames: [3, T + frames, H, W] from [3, T, H, W] in -1..1.

    Works window by window; each begins with the last ``sampling.overlap`` frames of the one before. remember: also show
    a model with memory tokens PAST_FRAMES frames, evenly spaced over everything before the window. Raises ValueError
    for a video shorter than the overlap.
    """
    sampling = sampling or Sampling()
    length, overlap = sampling.size[0], sampling.overlap
    if video.shape[1] < overlap or frames < 1:
        raise ValueError(
            f"video of {video.shape[1]} frames must hold the overlap of {overlap}, and frames={frames} be positive"
        )
    base = model.base if isinstance(model, Adapted) else model
    total, made = video.shape[1] + frames, video
    while made.shape[1] < total:
        begin = made.shape[1] - overlap
        rough = torch.zeros(3, length, *video.shape[2:])
        rough[:, :overlap] = made[:, begin:]
        strength = torch.ones(1, 1, length, *video.shape[2:])
        strength[:, :, :overlap] = 0
        call: Callable[..., Tensor] | None = None
        if isinstance(model, Adapted) and model.memory is not None and remember and begin > 0:
            at = torch.linspace(0, begin - 1, min(PAST_FRAMES, begin)).round().long()
            device = next(base.parameters()).device
            past = made[None, :, at].to(device)
            call = model.steered(past=past, times=(at - begin).to(device), guidance=RECALL)
        part = paint(base, rough[None], strength, [caption], sampling, call=call, work=work)[0].to(made)
        made = torch.cat((made, part[:, overlap : overlap + total - made.shape[1]]), 1)
    return made


def windows(frames: int, length: int) -> int:
    """Count the windows of a length that a video of so many frames takes when they share their ends."""
    return max(1, math.ceil((frames - 1) / (length - 1)))
