"""Camera control: how a camera move is written down, and the adapter that makes a frozen model follow it.

A move is a *ray map*: for every pixel of every frame, where its ray meets the scenery, as a displacement from where
that point stood in frame 0, in halves of the picture's shorter side; one (x, y) for each of the world's two depths. A
move given by numbers moves near scenery differently from far; one recovered from a reference clip moves both alike.

The adapter is a ControlNet (Zhang et al., arXiv:2302.05543): copies of the base's first blocks read the tokens and the
map, and what they say enters the base through projections that start at 0, so that before training nothing changes.
"""

from __future__ import annotations

import copy
import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stattn.dit import DiT, Embedded
from stattn.metrics.motion import camera_track
from stattn.modules import Patchify3D
from stattn.world.scene import CAMERA_FIELDS, DEPTHS

MAP_CHANNELS = 2 * len(DEPTHS)


@dataclass(frozen=True)
class Move:
    """A camera move at a steady pace.

    pan_x, pan_y, track: pixels of a 64-pixel picture a frame; track moves near scenery twice as fast. zoom: the
    logarithm of the magnification over the whole clip. dolly: over the whole clip, in units of the depths 4 and 2.
    roll: radians a frame. All as in ``stattn.world``.
    """

    pan_x: float = 0.0
    pan_y: float = 0.0
    zoom: float = 0.0
    dolly: float = 0.0
    roll: float = 0.0
    track: float = 0.0

    def __post_init__(self) -> None:
        for name in CAMERA_FIELDS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name}={value!r} must be a number")
            if not math.isfinite(value):
                raise ValueError(f"{name}={value} must be finite")
        if abs(self.dolly) >= 2 * min(DEPTHS):
            raise ValueError(f"dolly={self.dolly} must stay before the nearest scenery, within {2 * min(DEPTHS)}")

    def path(self, frames: int, height: int = 64, width: int = 64) -> Tensor:
        """Give the camera of every frame: [1, T, 6] as in ``Scene.camera``."""
        values = torch.tensor([[getattr(self, name) for name in CAMERA_FIELDS]])
        return paths(values, frames, min(height, width))


def paths(amounts: Tensor, frames: int, side: int) -> Tensor:
    """Give the cameras [B, T, 6] of moves [B, 6] (fields of Move) in pictures of a shorter side."""
    frame = torch.arange(frames, device=amounts.device)
    run = frame / max(frames - 1, 1) - 0.5
    scale = side / 64
    along = torch.stack((frame * scale, frame * scale, run, run, frame, frame * scale), -1)
    track = amounts[:, None] * along
    zoom = torch.arange(len(CAMERA_FIELDS), device=amounts.device) == CAMERA_FIELDS.index("zoom")
    return torch.where(zoom, track.exp(), track)


def ray_maps(camera: Tensor, height: int, width: int) -> Tensor:
    """Write cameras [B, T, 6] as ray maps [B, 4, T, H, W]."""
    pan_x, pan_y, zoom, dolly, roll, track = camera.unbind(-1)
    maps = []
    for depth in DEPTHS:
        near = 1 - dolly / depth
        cos, sin = near / zoom * roll.cos(), near / zoom * roll.sin()
        matrix = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
        shift = torch.stack((near * pan_x + track / depth, near * pan_y), -1)
        back = torch.linalg.inv(matrix[:, :1])
        maps.append(torch.cat((back @ matrix, back @ (shift - shift[:, :1])[..., None]), -1))
    return _draw(torch.stack(maps, 2), height, width)


def maps_of_track(track: Tensor, height: int, width: int) -> Tensor:
    """Write affine maps from frame 0 to every frame, [B, T, 2, 3], as ray maps [B, 4, T, H, W]."""
    back = torch.linalg.inv(track[..., :2])
    maps = torch.cat((back, -back @ track[..., 2:]), -1)
    return _draw(maps[:, :, None].expand(-1, -1, len(DEPTHS), -1, -1).float(), height, width)


def maps_of_clip(video: Tensor, *, weight: Tensor | None = None, height: int = 64, width: int = 64) -> Tensor:
    """Recover the move of reference clips [B, 3, T, H, W] as ray maps of another picture: [B, 4, T, height, width].

    weight: [B, 1, T, H, W], 0 where objects move on their own; the fit also leaves out what does not fit.
    """
    track = camera_track(video, weight=weight).float()
    scale = min(height, width) / min(video.shape[-2:])
    track = torch.cat((track[..., :2], track[..., 2:] * scale), -1)
    return maps_of_track(track, height, width)


def _draw(maps: Tensor, height: int, width: int) -> Tensor:
    """Draw affine maps [B, T, depths, 2, 3] minus the identity, at every pixel: [B, 2 * depths, T, H, W]."""
    y = (torch.arange(height, device=maps.device) + 0.5 - height / 2)[:, None]
    x = torch.arange(width, device=maps.device) + 0.5 - width / 2
    a = maps[..., None, None]
    moved = a[..., 0, :, :] * x + a[..., 1, :, :] * y + a[..., 2, :, :]  # [B, T, depths, 2, H, W]
    still = torch.stack(torch.broadcast_tensors(x, y))
    return ((moved - still) * (2 / min(height, width))).flatten(2, 3).transpose(1, 2)


def moves_seen(video: Tensor) -> Tensor:
    """Recover the moves of clips [B, 3, T, H, W] from their pixels: [B, 4], on the host.

    Pan (x, y) in pixels a frame; from the first frame to the last, the logarithm of the zoom, and the roll in radians.
    """
    # With X = A p + b the map from frame 0 to t is A_t^-1 A_0 p + A_t^-1 (b_0 - b_t), A = R / zoom and b = pan.
    track = camera_track(video)[:, -1].cpu()
    zoom = torch.linalg.det(track[:, :, :2]).clamp(min=1e-6).sqrt()
    roll = torch.atan2(track[:, 0, 1] - track[:, 1, 0], track[:, 0, 0] + track[:, 1, 1])
    # In frame 0 the zoom is exp(-change / 2): a shift of the scenery by pan is seen enlarged by the last frame's zoom.
    cos, sin = roll.cos(), roll.sin()
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    pan = -(turn @ track[:, :, 2:])[..., 0] / zoom.sqrt()[:, None] / (video.shape[2] - 1)
    return torch.cat((pan, zoom.log()[:, None], roll[:, None]), 1)


class CameraAdapter(nn.Module):
    """An adapter that makes a frozen DiT follow a camera move, given as a ray map.

    base: the DiT. Its first ``layers`` blocks are copied with their weights; the copies' outputs are added to the
    base's tokens through projections that start at 0, so that an untrained adapter changes nothing.
    """

    def __init__(self, base: DiT, layers: int):
        super().__init__()
        if not 1 <= layers <= len(base.blocks):
            raise ValueError(f"layers={layers} must lie in 1..{len(base.blocks)}, the blocks of the base")
        dim = base.config.dim
        self.layers = layers
        self.patchify = Patchify3D(MAP_CHANNELS, dim, base.config.patch, impl=base.patchify.impl)
        self.encode = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(copy.deepcopy(base.blocks[i]) for i in range(layers)).requires_grad_(True)
        self.out = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, inputs: Embedded, e: Tensor, e_text: Tensor | None, ray_map: Tensor) -> list[Tensor]:
        """Give the hints for the base's first layers, [B, N, dim] each. ray_map: [B, 4, T, H, W]."""
        tokens, text, keys, at = inputs
        h = tokens + self.encode(self.patchify(ray_map.to(tokens.dtype)))
        hints = []
        for layer, (block, out) in enumerate(zip(self.blocks, self.out, strict=True)):
            h, text = block(h, keys[layer] if keys else text, e, e_text, at)
            hints.append(out(h))
        return hints
