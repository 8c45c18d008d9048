"""`stattn gallery`: what the video system does, on one page: every clip beside the command's numbers.

Clips are GIFs to look at; under the same name lie an MP4 and a lossless file. The page is written anew after every
section, so that Ctrl-C leaves what is done.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from stattn import dit, results, world
from stattn.dit import DiT
from stattn.metrics import checks, pixels
from stattn.recipes import PRESETS, AdapterRecipe
from stattn.studies.story import judge
from stattn.training import adapters
from stattn.video import adapted, edit, files, long, media, objects
from stattn.video.camera import Move, maps_of_clip, moves_seen, ray_maps
from stattn.video.paint import Sampling, paint

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;background:#14161a;"
    "color:#e6e6e6}h1,h2{font-weight:600}.clips{display:grid;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr));"
    "gap:1rem}figure{margin:0}img{width:100%;image-rendering:pixelated;border-radius:4px}figcaption{font-size:.85rem;"
    "color:#b8bcc4}code{color:#9ecbff}a{color:#9ecbff}"
)
SEED = 6_000_000


@dataclass
class Shown:
    """One clip of the page: the name of its files, and what is said about it."""

    name: str
    title: str
    said: str


@dataclass
class Section:
    """Some clips under a heading. missing: why there are none."""

    title: str
    text: str
    clips: list[Shown] = field(default_factory=list)
    missing: str = ""


class Gallery:
    """The page as it grows, in a folder."""

    def __init__(self, out: Path, model: DiT, sampling: Sampling, command: str, fps: float = 8):
        self.out, self.model, self.sampling, self.command, self.fps = out, model, sampling, command, fps
        self.sections: list[Section] = []
        self.numbers: dict[str, Any] = {}
        self.device = next(model.parameters()).device

    def show(self, section: Section, name: str, video: Tensor, title: str, said: str = "") -> None:
        """Write a clip's files and put it into a section."""
        files.write_result(self.out / "clips" / f"{name}.mp4", video, self.fps)
        media.write_gif(self.out / "clips" / f"{name}.gif", video, fps=self.fps)
        section.clips.append(Shown(name, title, said))

    def add(self, section: Section) -> None:
        """Put a finished section on the page."""
        self.sections.append(section)
        self.write()

    def write(self) -> None:
        """Write index.html and numbers.json."""
        device = results.machine(self.device)
        record = {"command": self.command, "machine": device, "versions": results.versions(), **self.numbers}
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "numbers.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (self.out / "index.html").write_text(page(self.sections, self.command, device), encoding="utf-8")


def page(sections: list[Section], command: str, machine: str) -> str:
    """Return the page as HTML."""
    body = [
        "<h1>What the video system does</h1>",
        f"<p>Made by <code>{escape(command)}</code> on {escape(machine)}; the numbers are in "
        '<a href="numbers.json">numbers.json</a>.</p>',
    ]
    for section in sections:
        body.append(f"<h2>{escape(section.title)}</h2>\n<p>{escape(section.text)}</p>")
        if section.missing:
            body.append(f"<p>Not made: {escape(section.missing)}</p>")
        figures = [
            f'<figure><img src="clips/{shown.name}.gif" alt="{escape(shown.title)}"><figcaption>{escape(shown.title)}'
            f'<br>{escape(shown.said)} <a href="clips/{shown.name}.mkv">lossless</a></figcaption></figure>'
            for shown in section.clips
        ]
        body.append('<div class="clips">\n' + "\n".join(figures) + "\n</div>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>stattn gallery</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def tasks(gallery: Gallery) -> Section:
    """One model, told by its mask what is known."""
    section = Section("One model, many tasks", "The mask says what is known; the model makes the rest.")
    frames, height, width = gallery.sampling.size
    clips = world.render(1, frames, height, width, seed=SEED)
    caption = clips.captions[0]
    gallery.show(section, "real", clips.video[0], "a real clip", caption)
    known = {
        "text": [],
        "image": [0],
        "interpolation": [0, frames - 1],
        "continuation": list(range(frames // 4)),
    }
    for name, given in known.items():
        strength = torch.ones(1, 1, frames, height, width)
        strength[:, :, given] = 0
        made = paint(gallery.model, clips.video, strength, [caption], gallery.sampling).cpu()
        seen = checks.agreement(made, clips.colours, clips.shapes)
        gallery.numbers[f"task_{name}"] = seen
        gallery.show(section, f"task-{name}", made[0], name, f"{len(given)} of {frames} frames known")
    return section


def edits(gallery: Gallery) -> Section:
    """The edits of one clip."""
    section = Section("Edits", "Outside what an edit changes, every pixel comes back as it was.")
    model, sampling = gallery.model, gallery.sampling
    frames, height, width = sampling.size
    clips = world.render(1, frames, height, width, seed=SEED + 1, objects=(1, 1), cameras=("static",))
    video, caption = media.to_uint8(clips.video[0]), clips.captions[0]
    number = int(clips.colours[0])
    source, target = world.COLOURS[number], world.COLOURS[(number + 2) % 6]
    brush = objects.object_mask(video, source)
    centre = objects.centroid(brush)[-1]
    way = torch.tensor([width / 2 - float(centre[0]), height / 2 - float(centre[1])])
    box = edit.moving_box((frames, height, width), (4, 4, width * 3 // 8, height * 3 // 8), (width // 2, height // 3))
    gallery.show(section, "given", video, "given", caption)
    made = {
        f"recolour to {target}": edit.recolour(model, video, source, target, caption.replace(source, target), sampling),
        "motion brush: to the middle": edit.motion_brush(
            model, video, brush, torch.stack((torch.zeros(2), way)), caption, sampling
        ),
        "inpaint a moving box": edit.inpaint(model, video, box, caption, sampling),
        "remove the object": edit.inpaint(model, video, objects.grown(brush, 3), "", sampling),
        "outpaint": edit.outpaint(model, video[:, :, 8:-8, 8:-8], (8, 8, 8, 8), caption, sampling),
        "restyle at 0.4": edit.restyle(model, video, 0.4, caption, sampling),
    }
    for title, result in made.items():
        changed = result.changed.float().mean().item()
        kept = "" if title == "outpaint" or changed == 1 else _kept(result, video)
        name = title.split(":")[0].replace(" ", "-").replace(".", "")
        gallery.numbers[name] = {"changed": round(changed, 4), "tokens": round(result.work.share, 4)}
        gallery.show(section, name, result.video, title, f"{changed:.0%} of the pixels free; {kept}")
    return section


def _kept(result: edit.Edit, video: Tensor) -> str:
    outside = ~result.changed.expand_as(video)
    return "the rest equal" if torch.equal(result.video[outside], video[outside]) else "THE REST DIFFERS"


def story(gallery: Gallery, minutes: float, batch: int = 8) -> Section:
    """A long clip with a plot."""
    section = Section("A long clip with a plot", "Left, right, left: keyframes first, then the frames between them.")
    caption = "a red disc moves left, camera static"
    began = time.perf_counter()
    told = long.tell(gallery.model, caption, ["left", "right", "left"], gallery.sampling, minutes=minutes, batch=batch)
    found = judge(told, caption) | {"seconds": round(time.perf_counter() - began, 1)}
    gallery.numbers["story"] = found
    said = f"identity kept in {found['identity_kept']:.0%} of {found['frames']} frames, "
    said += f"path error {found['path_error_mean']} px, at most {found['path_error_max']}"
    gallery.show(section, "story", told.video, f"{caption}; left, right, left", said)
    return section


def camera(gallery: Gallery, weights: str) -> Section:
    """Moves by numbers, and one taken from a reference clip."""
    section = Section(
        "Camera", "An adapter beside the frozen model follows a move given by numbers, or by another clip."
    )
    try:
        steered = adapted.load(weights, dtype=next(gallery.model.parameters()).dtype, device=gallery.device)
    except ValueError as error:
        section.missing = str(error)
        return section
    frames, height, width = gallery.sampling.size
    caption = ["a yellow square moves up"]
    moves = {
        "pan right by 1.50 px a frame": Move(pan_x=1.5),
        "zoom in to 1.49 times": Move(zoom=0.4),
        "dolly in by 0.9": Move(dolly=0.9),
        "roll by 0.60 rad": Move(roll=0.04),
    }
    maps = {name: ray_maps(move.path(frames, height, width), height, width) for name, move in moves.items()}
    reference = world.render(1, frames, height, width, seed=SEED + 2, cameras=("rolls left",))
    said = f"{reference.captions[0]}; {_move_seen(reference.video)}"
    gallery.show(section, "reference", reference.video[0], "a reference clip", said)
    maps["move of the reference clip"] = maps_of_clip(reference.video, height=height, width=width)
    for title, ray_map in maps.items():
        call = steered.steered(ray_map=ray_map.to(gallery.device))
        nothing = torch.zeros(1, 3, frames, height, width)
        made = paint(steered.base, nothing, torch.ones(1), caption, gallery.sampling, call=call).cpu()
        gallery.numbers[f"camera {title}"] = _move_seen(made)
        gallery.show(section, "camera-" + "-".join(title.split()[:2]), made[0], title, _move_seen(made))
    return section


def _move_seen(video: Tensor) -> str:
    right, down, zoom, roll = moves_seen(video.float())[0].tolist()
    return (
        f"seen: pan ({right:.2f}, {down:.2f}) px a frame, magnified {math.exp(zoom):.2f} times, rolled {roll:.2f} rad"
    )


def memory(gallery: Gallery, weights: str) -> Section:
    """An object that comes back."""
    section = Section("Memory", "An object leaves and comes back; no caption says what it was.")
    try:
        whole = adapted.load(weights, dtype=next(gallery.model.parameters()).dtype, device=gallery.device)
    except ValueError as error:
        section.missing = str(error)
        return section
    recipe = cast(AdapterRecipe, PRESETS["memory"])
    scene = adapters.returns(4, recipe, torch.Generator().manual_seed(SEED), gallery.device)
    video = scene.draw()
    past, real = video[:, :, : adapters.PAST_FRAMES], video[:, :, adapters.PAST_FRAMES :]
    strength = torch.ones(1, 1, *real.shape[2:])
    strength[:, :, : adapters.ABSENT] = 0
    for title, call in (
        (
            "with memory",
            whole.steered(past=past, times=adapters.times_of_past(gallery.device), guidance=adapted.RECALL),
        ),
        ("without memory", whole.steered()),
    ):
        sampling = Sampling(steps=gallery.sampling.steps, guidance=1.0, seed=SEED)
        made = paint(whole.base, real, strength, None, sampling, call=call)
        seen = checks.agreement(made[:, :, -4:], scene.colours[:, 0], scene.shapes[:, 0])
        gallery.numbers[title] = seen
        for number in range(2):
            both = torch.cat((past[number], made[number]), 1).cpu()
            gallery.show(
                section, f"{title.replace(' ', '-')}-{number}", both, title, f"colour kept in {seen['colour']:.0%}"
            )
    return section


def smoothness(gallery: Gallery) -> None:
    """Measure sampled clips beside real ones of the same captions."""
    frames, height, width = gallery.sampling.size
    clips = world.render(4, frames, height, width, seed=SEED + 3)
    made = paint(gallery.model, torch.zeros_like(clips.video), torch.ones(1), clips.captions, gallery.sampling).cpu()
    gallery.numbers["flicker_ratio"] = round(checks.flicker_ratio(made, clips.video), 4)
    for name, videos in (("made", made), ("real", clips.video)):
        gallery.numbers[f"warp_error_{name}"] = sum(pixels.warp_error(video) for video in videos) / len(videos)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stattn gallery`."""
    from stattn.cli import count, positive, triple

    parser.add_argument("--out", type=Path, default=Path("out/gallery"), metavar="DIR", help="default: out/gallery")
    parser.add_argument("--model", default="tiny", metavar="NAME", help="shipped weights, or a .safetensors file")
    parser.add_argument("--camera", default="camera", metavar="NAME", help="weights of a camera adapter")
    parser.add_argument("--memory", default="memory", metavar="NAME", help="weights of memory tokens")
    parser.add_argument("--minutes", type=float, default=0.3, help="length of the story (default: 0.3)")
    parser.add_argument("--steps", type=positive, default=16, help="of sampling (default: 16)")
    parser.add_argument("--seed", type=count, default=0)
    parser.add_argument("--size", type=triple, default=(16, 64, 64), metavar="T,H,W")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def main(args: argparse.Namespace) -> int:
    """Make the page."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = dit.load(args.model, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)
    sampling = Sampling(steps=args.steps, seed=args.seed, size=args.size, overlap=min(4, args.size[0] - 1))
    gallery = Gallery(args.out, model, sampling, args.command_line)
    for make in (
        lambda: tasks(gallery),
        lambda: edits(gallery),
        lambda: story(gallery, args.minutes),
        lambda: camera(gallery, args.camera),
        lambda: memory(gallery, args.memory),
    ):
        section = make()
        gallery.add(section)
        print(f"{section.title}: {section.missing or f'{len(section.clips)} clips'}", flush=True)
    smoothness(gallery)
    gallery.write()
    print(f"open {args.out / 'index.html'}")
    return 0
