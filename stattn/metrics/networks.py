"""What a network must say about itself to be used in a metric, and how one that does is called.

An extractor's name is part of every result, because a distance means nothing without it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class FeatureExtractor(Protocol):
    """The interface of a network that turns video into features.

    name, version: of the network. dim: the number of features. resolution: the side, in pixels, of the square pictures
    that it reads. frames: how many it reads at once; 1 for a network of single pictures, which gives one row per
    frame. sha256: of the file with its weights.
    """

    name: str
    version: str
    dim: int
    resolution: int
    frames: int
    sha256: str

    def __call__(self, video: Tensor) -> Tensor:
        """Compute the features of video [B, 3, T, resolution, resolution] in -1..1.

        Returns [B, dim] for clips of T = frames frames, or, when frames is 1, [B, T, dim].
        """
        ...


@runtime_checkable
class TextExtractor(FeatureExtractor, Protocol):
    """The interface of an extractor that also turns captions into features of the same space."""

    def text(self, captions: Sequence[str]) -> Tensor:
        """Compute the features of captions: [B, dim]."""
        ...


@dataclass(frozen=True)
class Spec:
    """What a network file does not say about itself.

    mean, std: of the colours that it reads, in 0..1. keywords: passed to it at every call.
    """

    name: str
    version: str
    dim: int
    resolution: int
    frames: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    keywords: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name in ("dim", "resolution", "frames"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a positive integer")
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        object.__setattr__(self, "keywords", tuple((str(key), value) for key, value in self.keywords))


class Network:
    """An extractor made of a module and its Spec."""

    def __init__(self, module: Callable[..., Tensor], spec: Spec, sha256: str, device: torch.device | str = "cpu"):
        self.module, self.spec, self.sha256, self.device = module, spec, sha256, torch.device(device)
        self.name, self.version, self.dim = spec.name, spec.version, spec.dim
        self.resolution, self.frames = spec.resolution, spec.frames

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """Give features; see FeatureExtractor. Raises ValueError when video or the module's answer does not fit."""
        side = self.resolution
        if video.ndim != 5 or video.shape[1] != 3 or tuple(video.shape[3:]) != (side, side):
            raise ValueError(f"video of shape {tuple(video.shape)} must be [B, 3, T, {side}, {side}] for {self.name}")
        if self.frames > 1 and video.shape[2] != self.frames:
            raise ValueError(f"video has {video.shape[2]} frames; {self.name} reads {self.frames}")
        x = video.to(self.device, torch.float32)
        mean, std = (x.new_tensor(each)[:, None, None, None] for each in (self.spec.mean, self.spec.std))
        x = ((x + 1) / 2 - mean) / std
        keywords = dict(self.spec.keywords)
        if self.frames > 1:
            return self._checked(self.module(x, **keywords), len(x))
        pictures = x.transpose(1, 2).flatten(0, 1)
        return self._checked(self.module(pictures, **keywords), len(pictures)).unflatten(0, (len(x), -1))

    def _checked(self, features: Tensor, rows: int) -> Tensor:
        if tuple(features.shape) != (rows, self.dim):
            raise ValueError(f"{self.name} gave features of shape {tuple(features.shape)}, not {(rows, self.dim)}")
        return features.float().cpu()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hash a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
