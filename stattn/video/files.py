"""Video files in and out: clips, masks, and results that lose nothing.

A result is written twice: OUT.mp4 to look at, and OUT.mkv (FFV1, RGB) or a folder OUT of PNGs with exactly the pixels
that were computed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stattn.video import media

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
LOSSLESS = ("ffv1", "png")


def read_clip(path: str | Path, *, max_frames: int | None = None) -> tuple[Tensor, float]:
    """Read a video file: uint8 [3, T, H, W] and its frames a second. Errors are those of ``media.read_video``."""
    return media.read_video(path, max_frames=max_frames)


def read_mask(path: str | Path, video: Tensor) -> Tensor:
    """Read a mask for a video: [1, T, H, W] booleans, True where the file is lighter than mid-grey.

    path: a video of as many frames as the given one, or a picture for all of them, of its size. Raises ValueError when
    size or length differ, naming both, or when it is neither a video nor a picture.
    """
    path = Path(path)
    if path.suffix.lower() in PICTURES:
        images = media.extra("PIL.Image", "pillow")
        if not path.is_file():
            raise FileNotFoundError(f"mask={str(path)!r}: there is no such file")
        try:
            with images.open(path) as picture:
                grey = torch.from_numpy(np.array(picture.convert("L")))[None]
        except OSError as error:
            raise ValueError(f"mask={str(path)!r} cannot be read as a picture: {error}") from error
        grey = grey.expand(video.shape[1], *grey.shape[1:])
    else:
        frames, _ = media.read_video(path)
        grey = frames.float().mean(0)
    if grey.shape[1:] != video.shape[2:]:
        raise ValueError(
            f"mask={str(path)!r} is {grey.shape[1]} x {grey.shape[2]} pixels, the video "
            f"{video.shape[2]} x {video.shape[3]}"
        )
    if len(grey) != video.shape[1]:
        raise ValueError(f"mask={str(path)!r} has {len(grey)} frames, the video {video.shape[1]}")
    return (grey.float() > 127.5)[None]


def out_path(path: str | Path) -> Path:
    """Give the path of a result, checked before anything is computed.

    Raises ValueError for a path that does not end in .mp4.
    """
    target = Path(path)
    if target.suffix.lower() != ".mp4":
        raise ValueError(f"out={str(target)!r} must end in .mp4; the lossless file is written beside it")
    return target


def write_result(path: str | Path, video: Tensor, fps: float, *, lossless: str = "ffv1") -> list[Path]:
    """Write a video as PATH, an MP4, and without loss beside it; returns the files. video: uint8 or -1..1.

    lossless: "ffv1" writes the same name ending in .mkv, "png" a folder of that name with frame_00000.png and so on.
    Raises ValueError for a path that ``out_path`` refuses.
    """
    target = out_path(path)
    if lossless not in LOSSLESS:
        raise ValueError(f"lossless={lossless!r} must be one of {', '.join(LOSSLESS)}")
    frames = media.to_uint8(video)
    beside = target.with_suffix(".mkv") if lossless == "ffv1" else target.with_suffix("")
    if lossless == "ffv1":
        write_ffv1(beside, frames, fps=fps)
    else:
        write_pngs(beside, frames)
    # An odd size has no half-sized colour planes: the MP4, which is to be looked at, is enlarged.
    odd = frames.shape[2] % 2 or frames.shape[3] % 2
    media.write_mp4(target, frames, fps=fps, scale=2 if odd and max(frames.shape[2:]) > media.SMALL else None)
    return [target, beside]


def write_ffv1(path: str | Path, video: Tensor, *, fps: float) -> None:
    """Write a clip [3, T, H, W] as FFV1 in RGB, which reads back equal."""
    av = media.extra("av", "PyAV")
    frames = np.ascontiguousarray(media.to_uint8(video).permute(1, 2, 3, 0).numpy())
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(target), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=media.rate(fps))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "bgr0"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def write_pngs(folder: str | Path, video: Tensor) -> None:
    """Write a clip [3, T, H, W] as PNGs, frame_00000.png and so on."""
    images = media.extra("PIL.Image", "pillow")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(media.to_uint8(video).permute(1, 2, 3, 0).numpy()):
        images.fromarray(np.ascontiguousarray(frame)).save(target / f"frame_{number:05d}.png")
