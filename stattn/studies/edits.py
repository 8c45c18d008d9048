"""`stattn study edits`: do edits do what they say, and what does a stale cache cost?

Each check is also put to real clips, where the world itself was changed as the edit asks, and to real clips of another
request: a check that could not fail would say nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from stattn import world
from stattn.dit import DiT
from stattn.metrics import checks, psnr
from stattn.studies.length import clock
from stattn.video import edit, media, objects, paint
from stattn.video.paint import Sampling

SEED = 4_000_000
OFFSET = 12.0  # pixels of a 64-pixel picture by which a brush moves


def study(
    model: DiT, clips: int, sampling: Sampling, refreshes: Iterable[int] = (1, 2, 4, 8)
) -> tuple[dict[str, Any], Tensor]:
    """Edit ``clips`` real clips in every way; returns the checks' scores, and the edited clips as a batch."""
    rows: list[dict[str, float]] = []
    shown = []
    for number in range(clips):
        row, videos = _clip(model, SEED + number, sampling)
        rows.append(row)
        shown += videos
    found: dict[str, Any] = {"clips": clips, "steps": sampling.steps, "seed": SEED}
    for name in rows[0]:
        found[name] = round(fmean(row[name] for row in rows), 4)
    found["refresh"] = refresh_curve(model, sampling, refreshes)
    return found, torch.stack(shown)


def _clip(model: DiT, seed: int, sampling: Sampling) -> tuple[dict[str, float], list[Tensor]]:
    frames, height, width = sampling.size
    clips = world.render(1, frames, height, width, seed=seed, objects=(1, 1), cameras=("static",))
    scene, caption = clips.scene, clips.captions[0]
    video = media.to_uint8(clips.video[0])
    number = int(scene.colours[0, 0])
    source, target = world.COLOURS[number], world.COLOURS[(number + 1 + seed % 5) % 6]
    inside = scene.masks()[0, :, 0] > 0.5
    outside = ~(scene.masks()[0, :, 0] > 0)[None]
    row: dict[str, float] = {}
    sampling = dataclasses.replace(sampling, seed=seed)

    painted = edit.recolour(model, video, source, target, caption.replace(source, target), sampling)
    colours = torch.tensor([[world.COLOURS.index(target), (number + 2) % 6, (number + 3) % 6]])
    real = media.to_uint8(world.with_colours(scene, colours).draw()[0])
    row["recolour_hue"] = _hue_share(painted.video, inside, target)
    row["recolour_hue_real"] = _hue_share(real, inside, target)
    row["recolour_hue_unedited"] = _hue_share(video, inside, target)
    row["recolour_background_psnr"] = psnr(painted.video, video, outside)
    row["recolour_exact_outside"] = _exact(painted, video)
    another = media.to_uint8(world.render(1, frames, height, width, seed=seed + 250_000).video[0])
    row["background_psnr_another"] = psnr(another, video, outside)
    row["exact_outside_another"] = _exact(painted._replace(video=another), video)

    brush = objects.object_mask(video, source)
    path = edit.as_path(torch.stack((torch.zeros(2), _way(scene))), frames)
    moved = edit.motion_brush(model, video, brush, path, caption, sampling)
    asked = scene.centres[0, :, 0] + path
    real = _with_path(scene, path)
    row["brush_end_within_3px"] = _near(moved.video, asked)
    row["brush_end_within_3px_real"] = _near(real, asked)
    row["brush_end_within_3px_unedited"] = _near(video, asked)
    row["brush_exact_outside"] = _exact(moved, video)
    row["brush_others_within_2px"], row["brush_others_within_2px_real"], row["brush_others_within_2px_shifted"] = (
        _others(model, seed, sampling)
    )

    for strength in (0.2, 0.4):
        styled = edit.restyle(model, video, strength, caption, sampling)
        row[f"restyle_{strength}_background_psnr"] = psnr(styled.video, video, outside)

    box = edit.moving_box(
        (frames, height, width), (width // 6, height // 6, width // 3, height // 3), (width // 2, height // 3)
    )
    filled = edit.inpaint(model, video, box, caption, sampling)
    row["inpaint_exact_outside"] = _exact(filled, video)
    gone = edit.inpaint(model, video, objects.grown(brush, 3), "", sampling)
    row["removed_object_gone"] = _gone(gone.video)
    row["removed_object_gone_real"] = _gone(_with_path(scene, torch.full((frames, 2), -1e4)))
    row["removed_object_gone_unedited"] = _gone(video)
    small = video[:, :, height // 8 : -height // 8, width // 8 : -width // 8]
    larger = edit.outpaint(model, small, (width // 8, width // 8, height // 8, height // 8), caption, sampling)
    row["outpaint_exact_inside"] = _exact(larger, video)
    return row, [video, painted.video, moved.video, filled.video, gone.video, larger.video]


def _batch(video: Tensor) -> Tensor:
    return video[None].float() / 127.5 - 1


def _exact(result: edit.Edit, video: Tensor) -> float:
    kept = ~result.changed.expand_as(video)
    return float(torch.equal(result.video[kept], video[kept]))


def _gone(video: Tensor) -> float:
    return float(checks.classify(_batch(video)).areas[0].max() == 0)


def _hue_share(video: Tensor, inside: Tensor, colour: str) -> float:
    hue, chroma = objects.hue_and_chroma(video)
    right = (objects.apart(hue, objects.hue_of(colour)) < 0.5 / len(world.COLOURS)) & (chroma > objects.VIVID / 2)
    return float(right[inside].float().mean())


def _near(video: Tensor, asked: Tensor) -> float:
    scale = min(video.shape[2:]) / 64
    return float((checks.classify(_batch(video)).centres[0, -1] - asked[-1]).norm() <= 3 * scale)


def _others(model: DiT, seed: int, sampling: Sampling) -> tuple[float, float, float]:
    """Move the first of two objects: is the second where it is when the world moves the first one only, in the last
    frame that shows half of it?

    Also of the world's own clip, and of one that lies three pixels off.
    """
    frames, height, width = sampling.size
    scene, caption = _pair_of_objects(sampling.size, seed)
    video = media.to_uint8(scene.draw()[0])
    first, second = (world.COLOURS[int(scene.colours[0, index])] for index in (0, 1))
    path = edit.as_path(torch.stack((torch.zeros(2), _way(scene))), frames)
    if not _area(real := _with_path(scene, path), second):  # the first one would hide it all the time
        path = -path
        real = _with_path(scene, path)
    moved = edit.motion_brush(model, video, objects.object_mask(video, first), path, caption, sampling)
    shown = objects.object_mask(real, second)
    # Of a sliver that looks out behind the other the middle says nothing.
    area = shown[0].sum((1, 2))
    last = int((area >= 0.5 * area.max()).nonzero().max())

    def near(other: Tensor) -> float:
        try:
            seen = objects.object_mask(other, second)
        except ValueError:  # in no frame
            return 0.0
        apart = (objects.centroid(shown) - objects.centroid(seen))[last].norm()
        return float(apart <= 2 * min(height, width) / 64)

    return near(moved.video), near(real), near(torch.roll(real, 3, -1))


def _pair_of_objects(size: tuple[int, int, int], seed: int) -> tuple[world.Scene, str]:
    """Draw two objects of which some frame shows at least half of the second: one never seen nothing could keep."""
    number = seed + 500_000
    while True:
        scene = world.sample(1, *size, seed=number, objects=(2, 2), cameras=("static",))
        away = _with_path(scene, torch.full((size[0], 2), -1e4))
        second = world.COLOURS[int(scene.colours[0, 1])]
        if _area(media.to_uint8(scene.draw()[0]), second) >= 0.5 * _area(away, second):
            return scene, scene.captions()[0]
        number += 1000


def _area(video: Tensor, colour: str) -> int:
    try:
        return int(objects.object_mask(video, colour).sum((0, 2, 3)).max())
    except ValueError:
        return 0


def _with_path(scene: world.Scene, path: Tensor) -> Tensor:
    """Film a scene whose first object is moved along a path."""
    offset = torch.zeros_like(scene.centres)
    offset[0, :, 0] = path
    return media.to_uint8(dataclasses.replace(scene, centres=scene.centres + offset).draw()[0])


def _way(scene: world.Scene) -> Tensor:
    """Give the offset (x, y) that leaves the first object most room."""
    way = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    room = torch.stack([_room(scene, each) for each in way])
    return way[room.argmax()] * min(OFFSET, float(room.max()))


def _room(scene: world.Scene, way: Tensor) -> Tensor:
    """Give how far the object may be moved in a direction before it leaves the picture in some frame."""
    centre, radius = scene.centres[0, :, 0], 1.6 * scene.radii[0, :, 0]
    size = torch.tensor([scene.width, scene.height])
    space = torch.where(way > 0, size - centre, centre)[:, way != 0][:, 0] - radius
    return space.min().clamp(min=0)


def refresh_curve(
    model: DiT, sampling: Sampling, refreshes: Iterable[int], *, seed: int = SEED
) -> list[dict[str, float]]:
    """Inpaint one clip with caches refreshed every so many steps: time, tokens, and the error beside refresh = 1."""
    frames, height, width = sampling.size
    clips = world.render(1, frames, height, width, seed=seed, objects=(1, 1), cameras=("static",))
    box = edit.moving_box((frames, height, width), (4, 4, width * 3 // 8, height * 3 // 8), (width // 3, height // 3))
    rows: list[dict[str, float]] = []
    reference, device = None, next(model.parameters()).device
    for refresh in sorted({1, *refreshes}):
        given = dataclasses.replace(sampling, refresh=refresh, seed=seed)
        for _ in range(2 if device.type == "cuda" else 1):  # kernels are compiled for their first call
            work, began = paint.Work(), clock(device)
            made = paint.paint(model, clips.video, box[None].float(), clips.captions, given, work=work)
            seconds = clock(device) - began
        made = made.cpu()
        reference = made if reference is None else reference
        error = (made - reference)[box[None].expand_as(made)]
        rows.append(
            {
                "refresh": refresh,
                "seconds": round(seconds, 3),
                "tokens": round(work.share, 4),
                "rms_error": round(float(error.square().mean().sqrt()), 5),
                "max_error": round(float(error.abs().max()), 5),
            }
        )
    return rows


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw time and error against refresh."""
    figure, axes = media.extra("matplotlib.pyplot", "matplotlib").subplots(1, 2, figsize=(8, 3), layout="constrained")
    rows = found["refresh"]
    steps = [row["refresh"] for row in rows]
    axes[0].plot(steps, [row["seconds"] / rows[0]["seconds"] for row in rows], "o-", label="time")
    axes[0].plot(steps, [row["tokens"] for row in rows], "s--", label="tokens")
    axes[0].set(xlabel="steps between refreshes", ylabel="beside refreshing at every step", ylim=(0, 1.1))
    axes[0].legend()
    axes[1].plot(steps, [row["rms_error"] for row in rows], "o-")
    axes[1].set(xlabel="steps between refreshes", ylabel="RMS error inside the mask, range 2")
    figure.savefig(path, dpi=120)
