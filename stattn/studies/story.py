"""`stattn study story`: do frames between known ones keep who is in them, and do long stories follow their script?

Each check is also put to real clips, and to clips or requests that do not belong together.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from stattn import world
from stattn.dit import DiT
from stattn.metrics import checks, pair_errors
from stattn.video import long, media
from stattn.video.long import Story
from stattn.video.paint import Sampling, paint
from stattn.world import COLOURS, SHAPES

SEED = 7_000_000
JOINTS = "warp_error_at_joints_to_inside"
PLOTS = (("left", "right", "left"), ("up", "down", "up"), ("right", "left", "right"), ("down", "up", "down"))


def study(
    model: DiT, clips: int, stories: int, sampling: Sampling, *, minutes: float = 1.0
) -> tuple[dict[str, Any], list[Tensor]]:
    """Interpolate ``clips`` clips and tell ``stories`` stories; returns the checks' scores, and the stories' videos.

    Raises ValueError for fewer than two stories, or stories of one window.
    """
    if stories < 2 or minutes * long.KEYFRAMES_A_MINUTE < 2:
        raise ValueError(f"stories={stories} must be at least 2, and minutes={minutes} make at least two windows")
    told = [_tell(model, number, sampling, minutes) for number in range(stories)]
    rows = [judge(story, caption) for story, caption in told]
    real = [_filmed(story, caption, number) for number, (story, caption) in enumerate(told)]
    others = [told[(number + 1) % stories] for number in range(stories)]
    cut = [judge(_cut(story, other), "") for story, other in zip(real, real[1:] + real[:1], strict=True)]
    found: dict[str, Any] = {
        "clips": clips,
        "steps": sampling.steps,
        "seed": SEED,
        "interpolation": interpolation(model, clips, sampling),
        "stories": _means(rows),
        "stories_real": _means([judge(story, caption) for story, (_, caption) in zip(real, told, strict=True)]),
        "stories_of_other_requests": _means(
            [
                judge(story._replace(script=other.script), caption)
                for (story, _), (other, caption) in zip(told, others, strict=True)
            ]
        ),
        "stories_cut_together": {JOINTS: _means(cut)[JOINTS]},
        "all": rows,
    }
    return found, [story.video for story, _ in told]


def judge(story: Story, caption: str) -> dict[str, Any]:
    """Check a story: identity in every frame, distance from the script, warping error at joints beside that inside."""
    words = caption.lower().replace(",", " ").split()
    colour, shape = (next((names.index(word) for word in words if word in names), -1) for names in (COLOURS, SHAPES))
    frames = story.video.transpose(0, 1)[:, :, None]  # each frame a clip of its own
    seen = checks.classify(frames)
    gap = story.keyframes[1] - story.keyframes[0]
    asked = torch.stack([long.at_frame(story.script, gap, frame) for frame in range(len(frames))])
    error = (seen.centres[:, 0] - asked).norm(dim=1)
    errors = pair_errors(story.video)
    at_joint = torch.zeros(len(errors), dtype=torch.bool)
    for joint in story.joints:
        at_joint[joint - 1 : joint + 1] = True
    return {
        "frames": len(frames),
        "keyframes": len(story.keyframes),
        "colour_kept": round((seen.colours == colour).float().mean().item(), 4),
        "identity_kept": round(((seen.colours == colour) & (seen.shapes == shape)).float().mean().item(), 4),
        "path_error_mean": round(error.nanmean().item(), 3),
        "path_error_max": round(error.nan_to_num(0).max().item(), 3),
        "warp_error_at_joints": float(f"{errors[at_joint].nanmean().item():.4g}") if story.joints else None,
        "warp_error_inside": float(f"{errors[~at_joint].nanmean().item():.4g}"),
        "tokens": story.work.tokens,
    }


def interpolation(model: DiT, clips: int, sampling: Sampling, *, batch: int = 32) -> dict[str, float]:
    """Make all frames between the first and the last of real clips: the share of them that show the object."""
    frames, height, width = sampling.size
    given = world.render(clips, frames, height, width, seed=SEED, objects=(1, 1))
    strength = torch.ones(1, 1, frames, 1, 1)
    strength[:, :, [0, -1]] = 0
    strength = strength.expand(-1, -1, -1, height, width)
    made = torch.cat(
        [
            paint(model, given.video[i : i + batch], strength, given.captions[i : i + batch], sampling).cpu()
            for i in range(0, clips, batch)
        ]
    )

    def kept(video: Tensor, by: int) -> float:
        inner = video[:, :, 1:-1].transpose(1, 2).flatten(0, 1)[:, :, None]  # each frame a clip of its own
        of = [ids.roll(by, 0).repeat_interleave(frames - 2) for ids in (given.colours, given.shapes)]
        return round(checks.agreement(inner, *of)["both"], 4)

    return {"identity_kept": kept(made, 0), "real": kept(given.video, 0), "shuffled": kept(made, 1)}


def _tell(model: DiT, number: int, sampling: Sampling, minutes: float) -> tuple[Story, str]:
    colour, shape = world.COLOURS[number % len(world.COLOURS)], world.SHAPES[number % len(world.SHAPES)]
    plot = PLOTS[number % len(PLOTS)]
    caption = f"a {colour} {shape} moves {plot[0]}, camera static"
    given = dataclasses.replace(sampling, seed=SEED + number, overlap=1)
    return long.tell(model, caption, plot, given, minutes=minutes), caption


def _filmed(story: Story, caption: str, number: int) -> Story:
    """Film the same script in the world."""
    words = caption.split()
    frames, height, width = story.video.shape[1:]
    scene = world.sample(1, frames, height, width, seed=SEED + 100 + number, objects=(1, 1), cameras=("static",))
    gap = story.keyframes[1] - story.keyframes[0]
    centres, colours, shapes = scene.centres.clone(), scene.colours.clone(), scene.shapes.clone()
    centres[0, :, 0] = torch.stack([long.at_frame(story.script, gap, frame) for frame in range(frames)])
    colours[0, 0], shapes[0, 0] = world.COLOURS.index(words[1]), world.SHAPES.index(words[2])
    scene = dataclasses.replace(scene, centres=centres, colours=colours, shapes=shapes)
    return story._replace(video=scene.draw()[0])


def _cut(story: Story, other: Story) -> Story:
    """Take every second window from another story."""
    video = story.video.clone()
    for first, last in list(zip(story.joints, [*story.joints[1:], video.shape[1]], strict=True))[::2]:
        video[:, first:last] = other.video[:, first:last]
    return story._replace(video=video)


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Average what stories have in common; of the path's error also take the most."""
    names = ("colour_kept", "identity_kept", "path_error_mean", "path_error_max")
    found = {name: round(fmean(row[name] for row in rows), 4) for name in names}
    ratios = [row["warp_error_at_joints"] / row["warp_error_inside"] for row in rows]
    found["path_error_max"] = max(row["path_error_max"] for row in rows)
    return found | ({JOINTS: round(fmean(ratios), 4)})


def plot(videos: list[Tensor], path: Path, frames: int = 12) -> None:
    """Draw evenly spaced frames of each story."""
    length = min(video.shape[1] for video in videos)
    media.contact_sheet(path, torch.stack([video[:, :length] for video in videos]), columns=frames)
