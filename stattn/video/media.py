"""Video files: MP4 (H.264), GIF and contact sheets written from tensors, and video read back.

A video is [3, T, H, W] (a batch [B, 3, T, H, W] where said), uint8 in 0..255 or floating point in -1..1; floating point
is clamped and rounded to the nearest of 256 levels. Small clips are enlarged four times by repeating pixels, to be
looked at. Needs the `demo` extra: `av` for MP4 and reading, `pillow` for GIF and PNG.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

SMALL = 128  # pixels: a clip whose longer side is at most this is enlarged unless told otherwise
ENLARGED = 4


def extra(module: str, package: str) -> Any:
    """Import a module of the `demo` extra; raise ImportError naming the package and the extra when it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{package} is needed here and is not installed: pip install stattn[demo]") from error


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """Return the video as uint8 on the CPU. video: [..., 3, T, H, W], uint8 in 0..255 or floating point in -1..1."""
    if not isinstance(video, torch.Tensor):
        raise TypeError(f"video={type(video).__name__} must be a tensor")
    if video.ndim not in (4, 5) or video.shape[-4] != 3 or 0 in video.shape[-4:]:
        shape = tuple(video.shape)
        raise ValueError(f"video.shape={shape} must be [3, T, H, W] or [B, 3, T, H, W], without an empty axis")
    if video.dtype == torch.uint8:
        return video.detach().cpu()
    if not video.is_floating_point():
        raise TypeError(f"video.dtype={video.dtype} must be uint8 or floating point")
    levels = video.detach().float()
    if not bool(torch.isfinite(levels).all()):
        raise ValueError("video holds values that are not finite")
    return ((levels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def enlarge(video: torch.Tensor, scale: int | None = None) -> torch.Tensor:
    """Repeat every pixel scale x scale times. scale: None means 4 for clips of at most 128 pixels a side, else 1."""
    height, width = video.shape[-2:]
    if scale is None:
        scale = ENLARGED if max(height, width) <= SMALL else 1
    if isinstance(scale, bool) or not isinstance(scale, int) or scale < 1:
        raise ValueError(f"scale={scale!r} must be a positive integer")
    return video.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def _frames(video: torch.Tensor, scale: int | None) -> np.ndarray:
    """Return [T, H, W, 3] uint8 frames of one clip."""
    if isinstance(video, torch.Tensor) and video.ndim != 4:
        raise ValueError(f"video.shape={tuple(video.shape)} must be [3, T, H, W]: one clip a file")
    return np.ascontiguousarray(enlarge(to_uint8(video), scale).permute(1, 2, 3, 0).numpy())


def rate(fps: float) -> Fraction:
    """Give frames a second as containers hold them. Raises ValueError outside (0, 1000]."""
    if isinstance(fps, bool) or not isinstance(fps, int | float | Fraction) or not 0 < fps <= 1000:
        raise ValueError(f"fps={fps!r} must be above 0 and at most 1000 frames a second")
    return Fraction(fps).limit_denominator(1001)


def write_mp4(path: str | os.PathLike[str], video: torch.Tensor, *, fps: float = 8, scale: int | None = None) -> None:
    """Write one clip as H.264 in yuv420p, which every browser plays. video: [3, T, H, W]; fps in frames a second.

    Raises ValueError when the enlarged height or width is odd: the colour planes of yuv420p are half as large.
    """
    exact = rate(fps)
    frames = _frames(video, scale)
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"video is {height} x {width} pixels: yuv420p needs even sizes (scale=2 makes them even)")
    av = extra("av", "PyAV")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(target), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=exact)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Flat synthetic colours show compression first: nearly lossless costs a few kilobytes at these sizes.
        stream.options = {"crf": "12", "preset": "medium"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def write_gif(path: str | os.PathLike[str], video: torch.Tensor, *, fps: float = 8, scale: int | None = None) -> None:
    """Write one clip as a GIF that loops. video: [3, T, H, W]. One palette of 256 colours serves all frames."""
    seconds = 1 / rate(fps)
    frames = _frames(video, scale)
    images = extra("PIL.Image", "pillow")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A palette per frame would make still colours flicker from frame to frame.
    strip = images.fromarray(frames.reshape(-1, *frames.shape[2:])).quantize(256, dither=images.Dither.NONE)
    height, width = frames.shape[1:3]
    pictures = [strip.crop((0, i * height, width, (i + 1) * height)) for i in range(len(frames))]
    # GIF counts hundredths of a second, and browsers slow anything below two of them down to ten.
    duration = max(20, round(float(seconds) * 100) * 10)
    pictures[0].save(target, format="GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)


def contact_sheet(
    path: str | os.PathLike[str],
    videos: torch.Tensor,
    *,
    captions: Sequence[str] | None = None,
    columns: int = 8,
    scale: int | None = None,
) -> None:
    """Write a PNG with one row per clip: frames evenly spaced from the first to the last, under the clip's caption.

    videos: [B, 3, T, H, W]; captions: B strings; columns: frames a row, at most T.
    """
    images, draws = extra("PIL.Image", "pillow"), extra("PIL.ImageDraw", "pillow")
    if not isinstance(videos, torch.Tensor) or videos.ndim != 5 or videos.shape[0] == 0:
        raise ValueError(f"videos={tuple(getattr(videos, 'shape', ()))} must be [B, 3, T, H, W] with at least one clip")
    if captions is not None and len(captions) != len(videos):
        raise ValueError(f"captions holds {len(captions)} strings for {len(videos)} clips")
    if isinstance(columns, bool) or not isinstance(columns, int) or columns < 1:
        raise ValueError(f"columns={columns!r} must be a positive integer")
    clips = enlarge(to_uint8(videos), scale)
    count, _, frames, height, width = clips.shape
    at = torch.linspace(0, frames - 1, min(columns, frames)).round().long()
    gap, line = 4, 16 if captions is not None else 0
    sheet = images.new("RGB", (gap + len(at) * (width + gap), gap + count * (line + height + gap)), (24, 26, 30))
    pen = draws.Draw(sheet)
    for row, clip in enumerate(clips):
        top = gap + row * (line + height + gap)
        if captions is not None:
            pen.text((gap, top), captions[row], fill=(230, 230, 230))
        for column, t in enumerate(at.tolist()):
            image = images.fromarray(np.ascontiguousarray(clip[:, t].permute(1, 2, 0).numpy()))
            sheet.paste(image, (gap + column * (width + gap), top + line))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target, format="PNG")


def read_video(path: str | os.PathLike[str], *, max_frames: int | None = None) -> tuple[torch.Tensor, float]:
    """Return the first video stream of a file as uint8 [3, T, H, W], and its frames a second.

    max_frames: stop after so many frames; None reads all. Raises FileNotFoundError when there is no such file,
    ValueError when it holds no video.
    """
    if max_frames is not None and (isinstance(max_frames, bool) or not isinstance(max_frames, int) or max_frames < 1):
        raise ValueError(f"max_frames={max_frames!r} must be a positive integer or None")
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={os.fspath(path)!r}: there is no such file")
    av = extra("av", "PyAV")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"path={os.fspath(path)!r} holds no video stream")
            stream = container.streams.video[0]
            frames = []
            for frame in container.decode(stream):
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == max_frames:
                    break
            average = stream.average_rate
    except av.FFmpegError as error:
        raise ValueError(f"path={os.fspath(path)!r} cannot be read as video: {error}") from error
    if not frames or not average:
        raise ValueError(f"path={os.fspath(path)!r} holds no frames with a frame rate")
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).contiguous(), float(average)
