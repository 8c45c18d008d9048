"""A folder of video files as training data.

Each file is one source of clips: its middle part of the wanted shape is scaled to the wanted size when it is read, and
every clip drawn from it begins at a random frame. NAME.txt beside NAME.mp4 is its caption, in the words of
``stattn.world``; without it the caption is empty. All frames are kept in memory, as uint8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stattn import world
from stattn.video import media

VIDEO_FILES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".gif")


class ClipShape(Protocol):
    """What clips are wanted: frames, height and width, and text_len words."""

    @property
    def frames(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...


def video_files(folder: str | Path) -> list[Path]:
    """List the video files of a folder by name. Raises NotADirectoryError, and ValueError when there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} is no folder")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEO_FILES)
    if not found:
        raise ValueError(f"{str(folder)!r} holds no video files ({', '.join(VIDEO_FILES)})")
    return found


def caption_of(path: Path) -> str | None:
    """Read the caption beside a video file, None when there is none."""
    beside = path.with_suffix(".txt")
    return beside.read_text(encoding="utf-8").strip() if beside.is_file() else None


class FolderClips:
    """Draw training clips from a folder's files.

    Raises ValueError naming a file that is no video, is too short, or whose caption has unknown words.
    """

    def __init__(
        self, folder: str | Path, shape: ClipShape, device: torch.device, text_len: int = world.CAPTION_LENGTH
    ):
        self.frames, self.device = shape.frames, device
        self.videos, ids, counts = [], [], []
        for path in video_files(folder):
            video, _ = media.read_video(path)
            if video.shape[1] < shape.frames:
                raise ValueError(f"{path} has {video.shape[1]} frames; clips of {shape.frames} are wanted")
            try:
                words, count = world.tokenize([caption_of(path) or ""], text_len)
            except ValueError as error:
                raise ValueError(f"{path.with_suffix('.txt')}: {error}") from error
            self.videos.append(cover(video, shape.height, shape.width))
            ids.append(words)
            counts.append(count)
        self.ids, self.counts = torch.cat(ids).to(device), torch.cat(counts).to(device)

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw clips [size, 3, T, H, W] in -1..1 with their caption's ids and count, from any files."""
        numbers = torch.rand(2, size, generator=generator, device=generator.device).cpu()
        chosen = (numbers[0] * len(self.videos)).long().clamp(max=len(self.videos) - 1)
        clips = []
        for index, where in zip(chosen.tolist(), numbers[1].tolist(), strict=True):
            start = int(where * (self.videos[index].shape[1] - self.frames + 1))
            clips.append(self.videos[index][:, start : start + self.frames])
        clean = torch.stack(clips).to(self.device).float() / 127.5 - 1
        at = chosen.to(self.device)
        return clean, self.ids[at], self.counts[at]


def cover(video: Tensor, height: int, width: int) -> Tensor:
    """Scale the middle of a video [3, T, H, W] uint8 to height x width, cut to their shape."""
    rows, columns = video.shape[2:]
    scale = min(rows / height, columns / width)
    tall, wide = min(rows, round(height * scale)), min(columns, round(width * scale))
    top, left = (rows - tall) // 2, (columns - wide) // 2
    part = video[:, :, top : top + tall, left : left + wide]
    if (tall, wide) == (height, width):
        return part
    pictures = part.transpose(0, 1).float()
    scaled = F.interpolate(pictures, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return scaled.round().clamp(0, 255).to(torch.uint8).transpose(0, 1)
