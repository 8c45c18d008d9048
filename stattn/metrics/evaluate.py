"""`stattn evaluate A B`: metrics of two folders of video files, of each and between them."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from stattn.metrics import checks, distances, extractors, pixels
from stattn.metrics.networks import FeatureExtractor, TextExtractor
from stattn.training.folder import caption_of, video_files
from stattn.video import media


@dataclass(frozen=True)
class Networks:
    """Names of the extractors that a metric goes by, as ``stattn.metrics.load`` takes them; None leaves it out."""

    clips: str | None = "synth-r3d"
    frames: str | None = "synth-frame"
    text: str | None = "synth-clip"


def evaluate(
    a: str | Path,
    b: str | Path | None = None,
    networks: Networks | None = None,
    *,
    max_clips: int | None = None,
    device: torch.device | str = "cpu",
    on_clip: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure the clips of folder a, and of folder b and between them when it is given.

    Each clip: flicker (VBench's temporal flickering), jumps (``metrics.checks.jumps``), warping error along classical
    flow, motion smoothness by classical interpolation, subject consistency; CLIPSIM where each clip NAME.mp4 has its
    caption in NAME.txt. Between folders: Frechet distance and unbiased polynomial MMD of clip features. Whatever a
    network has a part in carries its name. max_clips: of each folder, the first by name. on_clip: called after each
    clip with the number of clips that are done and that of all.

    Returns {"a": {...}, "b": {...}, "between": {...}, "extractors": {...}}; means over clips, and their number. Raises
    ValueError for files that are no video or too short, naming the file, and for folders of one clip to compare.
    """
    networks = networks or Networks()
    if max_clips is not None and max_clips < 1:
        raise ValueError(f"max_clips={max_clips} must be positive")
    folders = {key: video_files(each)[:max_clips] for key, each in (("a", a), ("b", b)) if each is not None}
    loaded = {
        key: None if name is None else extractors.load(name, device=device) for key, name in vars(networks).items()
    }
    text = loaded["text"]
    if text is not None and not isinstance(text, TextExtractor):
        raise ValueError(f"text extractor {text.name} reads no captions")
    found: dict[str, Any] = {}
    features: list[Tensor] = []
    total = sum(map(len, folders.values()))
    done = itertools.count(1)

    def after() -> None:
        if on_clip is not None:
            on_clip(next(done), total)

    for key, files in folders.items():
        one, rows = _folder(files, loaded, after)
        found[key] = {"folder": str(files[0].parent), **one}
        features.append(rows)
    clips = loaded["clips"]
    if b is not None and clips is not None:
        title = f"({clips.name})"
        found["between"] = {
            f"FVD{title}": distances.frechet_distance(*features),
            f"MMD{title}": distances.mmd_poly(*features),
        }
    found["extractors"] = {
        each.name: {"version": each.version, "sha256": each.sha256, "dim": each.dim, "frames": each.frames}
        for each in loaded.values()
        if each is not None
    }
    return found


def _folder(files: Sequence[Path], loaded: dict[str, Any], after: Callable[[], None]) -> tuple[dict[str, Any], Tensor]:
    rows: list[dict[str, float]] = []
    features = []
    captions = [caption_of(path) for path in files]
    text = loaded["text"] if all(caption is not None for caption in captions) else None
    for path, caption in zip(files, captions, strict=True):
        video, _ = media.read_video(path)
        try:
            rows.append(clip_metrics(video, loaded["frames"], text, caption))
            if loaded["clips"] is not None:
                features.append(loaded["clips"](extractors.fit(video, loaded["clips"])))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        after()
    means = {name: fmean(row[name] for row in rows) for name in rows[0]}
    return {"clips": len(files), **means}, torch.cat(features) if features else torch.empty(0, 0)


def clip_metrics(
    video: Tensor, frames: FeatureExtractor | None, text: Any = None, caption: str | None = None
) -> dict[str, float]:
    """Measure one clip [3, T, H, W]; see ``evaluate``."""
    found = {
        "flicker": pixels.flicker(video),
        "jumps": float(checks.jumps(pixels.levels(video)[None] * 2 - 1)),
        "warp_error(lucas-kanade)": pixels.warp_error(video),
        "motion_smoothness(midway)": pixels.motion_smoothness(video),
    }
    if frames is not None:
        rows = frames(extractors.fit(video, frames))[0]
        found[f"subject_consistency({frames.name})"] = distances.cos_consistency(rows)
    if text is not None and caption is not None:
        pictures, words = text(extractors.fit(video, text))[0], text.text([caption])[0]
        found[f"CLIPSIM({text.name})"] = distances.clipsim(pictures, words)
    return found


def table(found: dict[str, Any]) -> str:
    """Write what ``evaluate`` found as text."""
    sides = [key for key in ("a", "b") if key in found]
    names = [name for name in found["a"] if name not in ("folder", "clips")]
    lines = [["", *(found[key]["folder"] for key in sides)], ["clips", *(str(found[key]["clips"]) for key in sides)]]
    lines += [[name, *(f"{found[key][name]:.5g}" if name in found[key] else "-" for key in sides)] for name in names]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rows += [f"{name}: {value:.5g}" for name, value in found.get("between", {}).items()]
    if len(sides) == 2 and found["a"]["clips"] != found["b"]["clips"]:
        rows.append("The folders hold unequal numbers of clips: the Frechet distance is biased by the smaller one.")
    return "\n".join(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stattn evaluate`."""
    from stattn.cli import positive

    parser.add_argument("a", metavar="A", help="folder of video files; NAME.txt beside NAME.mp4 is its caption")
    parser.add_argument("b", metavar="B", nargs="?", help="folder to compare with")
    help_text = "a registered name, NAME=FILE, or none (default: %(default)s)"
    parser.add_argument("--clip-features", default="synth-r3d", metavar="NAME", help=f"for FVD and MMD: {help_text}")
    parser.add_argument("--frame-features", default="synth-frame", metavar="NAME", help=f"of frames: {help_text}")
    parser.add_argument("--text-features", default="synth-clip", metavar="NAME", help=f"for CLIPSIM: {help_text}")
    parser.add_argument("--max-clips", type=positive, default=None, help="of each folder (default: all)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def main(args: argparse.Namespace) -> int:
    """Run `stattn evaluate`."""
    names = (args.clip_features, args.frame_features, args.text_features)
    networks = Networks(*(None if name == "none" else name for name in names))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    media.extra("tqdm", "tqdm")
    from tqdm import tqdm

    with tqdm(unit="clip", delay=1) as bar:

        def on_clip(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = evaluate(args.a, args.b, networks, max_clips=args.max_clips, device=device, on_clip=on_clip)
    print(table(found))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0
