"""Feature extractors: where they are kept, how they load, and what of a clip they read.

The real networks (I3D, CLIP, DINO) are loaded from files that the user has; nothing is downloaded. The small ones named
"synth-..." were trained on ``stattn.world`` (``stattn.metrics.synth``) and ship with the package. What an extractor is
says ``stattn.metrics.networks``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stattn.metrics.networks import FeatureExtractor, Network, Spec, file_sha256

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
