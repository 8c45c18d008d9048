"""Feature extractors: what a network must say about itself to be used in a metric, where they are kept, how they load.

An extractor's name is part of every result, because a distance means nothing without it. The real networks (I3D, CLIP,
DINO) are loaded from files that the user has; nothing is downloaded. The small ones named "synth-..." were trained on
``stattn.world`` (``stattn.metrics.synth``) and ship with the package.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


# The files that the field uses, as they are handed round: I3D in TorchScript (the logits of 400 classes), a ViT-B/16 of
# DINO, the image encoder of CLIP ViT-B/32.
SPECS = {
    "i3d": Spec(
        "i3d", "kinetics-400 logits", 400, 224, 16,
        keywords=(("rescale", False), ("resize", False), ("return_features", True)),
    ),
    "dino": Spec("dino", "vitb16", 768, 224, 1, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": Spec(
        "clip", "vit-b-32", 512, 224, 1, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ),
}  # fmt: skip


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


_REGISTRY: dict[str, Callable[..., FeatureExtractor]] = {}


def register(name: str, make: Callable[..., FeatureExtractor]) -> None:
    """Register an extractor under a name, for ``load``.

    make: called as make(device=...) when the name is loaded. Raises ValueError for a name that is taken.
    """
    if name in _REGISTRY:
        raise ValueError(f"name={name!r} is registered already")
    _REGISTRY[name] = make


def registered() -> tuple[str, ...]:
    """List the names that ``load`` takes without a path."""
    from stattn.metrics import synth

    return tuple(sorted({*_REGISTRY, *synth.SHIPPED}))


def load(name: str, *, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Load an extractor by a registered name, or from a file of yours by "NAME=PATH".

    PATH is a TorchScript file, whose NAME is one of SPECS or is described by a .json file with Spec's fields beside it;
    or a .safetensors file written by ``stattn.metrics.synth``. Raises ValueError for unknown names, FileNotFoundError
    without the file.
    """
    kind, equals, path = name.partition("=")
    if equals:
        return _load_file(kind, Path(path), device)
    if name in _REGISTRY:
        return _REGISTRY[name](device=device)
    from stattn.metrics import synth

    if name in synth.SHIPPED:
        return synth.load(name, device=device)
    raise ValueError(
        f"extractor {name!r} is none of {', '.join(registered())}; a file of your own is NAME=PATH, as in i3d=i3d.pt"
    )


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hash a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_file(kind: str, path: Path, device: torch.device | str) -> FeatureExtractor:
    if not path.is_file():
        raise FileNotFoundError(f"extractor {kind}={path}: there is no such file")
    if path.suffix == ".safetensors":
        from stattn.metrics import synth

        return synth.load(path, device=device)
    described = path.with_suffix(".json")
    if described.is_file():
        try:
            spec = Spec(**{"name": kind, **json.loads(described.read_text(encoding="utf-8"))})
        except TypeError as error:
            raise ValueError(f"{described} does not describe an extractor: {error}") from error
        if spec.name != kind:
            raise ValueError(f"{described} describes {spec.name!r}, not {kind!r}")
    elif kind in SPECS:
        spec = SPECS[kind]
    else:
        raise ValueError(f"extractor {kind}={path} is none of {', '.join(SPECS)}: describe it in {described}")
    try:
        module: nn.Module = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read as TorchScript: {str(error).splitlines()[0]}") from error
    digest = file_sha256(path)
    return Network(partial(_call, module), replace(spec, version=f"{spec.version}, {digest[:8]}"), digest, device)


def _call(module: nn.Module, x: Tensor, **keywords: Any) -> Tensor:
    out = module(x, **keywords)
    return out[0] if isinstance(out, (tuple, list)) else out


def fit(video: Tensor, extractor: FeatureExtractor) -> Tensor:
    """Bring one clip to what an extractor reads: [1, 3, T, R, R] in -1..1 from [3, T, H, W].

    The middle square is scaled to R pixels (antialiased); of the frames the first ``extractor.frames`` are taken, all
    by an extractor of single pictures. video: uint8 or -1..1. Raises ValueError for a clip that is too short.
    """
    from stattn.metrics.pixels import levels

    x = levels(video)
    if x.shape[1] < extractor.frames:
        raise ValueError(f"video has {x.shape[1]} frames; {extractor.name} reads {extractor.frames}")
    if extractor.frames > 1:
        x = x[:, : extractor.frames]
    side = min(x.shape[2:])
    top, left = (x.shape[2] - side) // 2, (x.shape[3] - side) // 2
    x = x[:, :, top : top + side, left : left + side].transpose(0, 1)
    if side != extractor.resolution:
        x = F.interpolate(x, size=(extractor.resolution,) * 2, mode="bilinear", antialias=True, align_corners=False)
    return (x * 2 - 1).transpose(0, 1)[None]
