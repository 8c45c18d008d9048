"""A synthetic video world whose truth is known exactly.

A clip shows one to three coloured shapes in front of two textured layers of scenery, filmed by a moving camera.

- The **scenery** is two periodic textures at depths 4 and 2, the nearer one in patches. A point p of the picture
  (pixels from its centre, y down) shows the point ``X = (1 - dolly / Z) * (R(roll) p / zoom + pan) + track / Z`` of the
  layer at depth Z: a zoom magnifies both layers alike, a dolly the near one more; a pan moves both alike, a track the
  near one twice as fast.
- The **objects** bounce elastically inside a glass box carried by the camera, whose walls are the picture's edges at
  the longest zoom of the clip: pans, rolls and dollies move the scenery behind them, a zoom magnifies them too, and no
  object ever leaves the picture. The first object is the largest and is drawn in front; no two share a colour.
- The **caption** names the objects, the way the first one sets out, and the camera: "a red disc moves left with a blue
  square, camera pans right".

Everything is a tensor expression over the whole batch: no loop over clips or pixels, and no wait for the device.
Lengths scale with the shorter side of the picture, so that one seed is one scene at every resolution.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stattn.world.constants import constant
from stattn.world.scene import CAMERA_FIELDS, DEPTHS, EXTENT, FIELDS, MAX_OBJECTS, Scene
from stattn.world.words import CAMERAS, CAPTION_LENGTH, COLOURS, DIRECTIONS, SHAPES, VOCABULARY, tokenize

__all__ = [
    "CAMERAS",
    "CAMERA_FIELDS",
    "CAPTION_LENGTH",
    "COLOURS",
    "DEPTHS",
    "DIRECTIONS",
    "MAX_OBJECTS",
    "SHAPES",
    "VOCABULARY",
    "Clips",
    "Scene",
    "photographs",
    "render",
    "sample",
    "tokenize",
    "with_camera",
    "with_colours",
]

# What a camera move changes, and how fast: pixels of a 64-pixel picture a frame, radians a frame, and for zoom (in log
# units) and dolly the change over the whole clip.
_MOVES = (
    (0, 0, 0, 0, 0, 0),
    (-1, 0, 0, 0, 0, 0),
    (1, 0, 0, 0, 0, 0),
    (0, -1, 0, 0, 0, 0),
    (0, 1, 0, 0, 0, 0),
    (0, 0, 1, 0, 0, 0),
    (0, 0, -1, 0, 0, 0),
    (0, 0, 0, 1, 0, 0),
    (0, 0, 0, -1, 0, 0),
    (0, 0, 0, 0, -1, 0),
    (0, 0, 0, 0, 1, 0),
    (0, 0, 0, 0, 0, -1),
    (0, 0, 0, 0, 0, 1),
)
_RATE = ((0.8, 2.0), (0.8, 2.0), (0.25, 0.45), (0.6, 1.0), (0.02, 0.045), (2.4, 5.0))
_MAX_ZOOM = math.exp(_RATE[2][1] / 2)
_MAIN_RADIUS, _OTHER_RADIUS = (8.5, 11.5), (5.0, 6.8)  # pixels of a 64-pixel picture; 1.56 in area between them
_SPEED = (0.8, 1.8)
_BAND = 10  # cycles of the finest scenery per texture, which is two pictures wide: 12.8 pixels of 64


@dataclass(frozen=True, eq=False)
class Clips:
    """Hold rendered clips beside their truth. video: [B, 3, T, H, W] fp32 in [-1, 1]."""

    video: Tensor
    scene: Scene

    @cached_property
    def captions(self) -> list[str]:
        """Write one caption a clip (waits for the device)."""
        return self.scene.captions()

    @property
    def colours(self) -> Tensor:
        """Give the colour id of the first object: [B]."""
        return self.scene.colours[:, 0]

    @property
    def shapes(self) -> Tensor:
        """Give the shape id of the first object: [B]."""
        return self.scene.shapes[:, 0]

    @property
    def directions(self) -> Tensor:
        """Give the direction id in which the first object sets out: [B]."""
        return self.scene.directions[:, 0]


def sample(
    batch: int,
    frames: int = 16,
    height: int = 64,
    width: int = 64,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    objects: tuple[int, int] = (1, 3),
    cameras: Sequence[str] = CAMERAS,
    textures: Tensor | None = None,
) -> Scene:
    """Draw the scenes of ``batch`` clips at random, without rendering them.

    All random numbers come from one generator. With ``seed`` it is a CPU generator: the same seed gives the same scenes
    on every device, at every resolution, and a prefix of the frames' motion does not depend on the device. With
    ``generator`` the numbers are drawn on that generator's device; a CUDA generator draws other numbers than a CPU one,
    and nothing waits for the device. objects: fewest and most objects in a clip. cameras: the moves to choose from.
    textures: photographs [n, 3, P, P] in [0, 1], periodic, used as the far layer. Raises ValueError unless exactly one
    of seed and generator is given, and for sizes, counts, moves or textures out of range.
    """
    _check(batch, frames, height, width, objects, cameras, textures)
    if (seed is None) == (generator is None):
        raise ValueError(f"seed={seed} and generator={generator}: give exactly one of them")
    if generator is None:
        assert seed is not None
        generator = torch.Generator().manual_seed(seed)
    device = torch.device(device)
    side = min(height, width) / 64

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, device=generator.device).to(device)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * uniform(*shape)

    def pick(choices: int, *shape: int) -> Tensor:
        return (uniform(*shape) * choices).long().clamp(max=choices - 1)

    count = objects[0] + pick(objects[1] - objects[0] + 1)
    colours = uniform(len(COLOURS)).argsort(1)[:, :MAX_OBJECTS]
    shapes, directions = pick(len(SHAPES), MAX_OBJECTS), pick(len(DIRECTIONS), MAX_OBJECTS)
    chosen = constant(tuple(CAMERAS.index(name) for name in cameras), device)
    moves = chosen[pick(len(cameras))]
    camera = _camera(moves, uniform(), frames, side)
    radius = torch.cat((between(*_MAIN_RADIUS, 1), between(*_OTHER_RADIUS, MAX_OBJECTS - 1)), 1) * side
    box = constant((width / (2 * _MAX_ZOOM), height / (2 * _MAX_ZOOM)), device)
    speed = between(*_SPEED, MAX_OBJECTS) * side
    path = _bounce(
        shapes, directions, radius, speed, box, uniform(MAX_OBJECTS, 2), between(-0.4, 0.4, MAX_OBJECTS), frames
    )
    zoom = camera[:, :, 2, None]
    centres = path * zoom[..., None] + constant((width / 2, height / 2), device)
    shades = torch.stack((between(-8, 8, MAX_OBJECTS), between(0.85, 1, MAX_OBJECTS), between(0.8, 1, MAX_OBJECTS)), -1)
    light = between(0.3, 0.7)
    step = between(0.15, 0.25) * torch.where(
        light > 0.5, -1.0, 1.0
    )  # the near layer is lighter than a dark far one, and darker than a light one
    palette = torch.stack(
        (
            torch.stack((light, light + step), 1),
            between(0, 2 * math.pi, 2),
            between(0.0, 0.04, 2),
            between(0.06, 0.12, 2),
            between(0.0, 0.8, 2),
        ),
        -1,
    )
    normals = torch.randn(batch, FIELDS, 2 * _BAND + 1, _BAND + 1, 2, generator=generator, device=generator.device).to(
        device
    )
    photos = None if textures is None else textures.to(device)[pick(textures.shape[0])]
    return Scene(
        height=height,
        width=width,
        count=count,
        colours=colours,
        shapes=shapes,
        directions=directions,
        moves=moves,
        centres=centres,
        radii=radius[:, None] * zoom,
        camera=camera,
        shades=shades,
        palette=palette,
        spectrum=normals / math.sqrt(2),
        photos=photos,
    )


def render(
    batch: int,
    frames: int = 16,
    height: int = 64,
    width: int = 64,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    objects: tuple[int, int] = (1, 3),
    cameras: Sequence[str] = CAMERAS,
    textures: Tensor | None = None,
) -> Clips:
    """Draw clips of random scenes, with the video.

    Arguments and errors are those of ``sample``; the video is [batch, 3, frames, height, width] fp32 in [-1, 1].
    """
    scene = sample(
        batch,
        frames,
        height,
        width,
        seed=seed,
        generator=generator,
        device=device,
        objects=objects,
        cameras=cameras,
        textures=textures,
    )
    return Clips(scene.draw(), scene)


def photographs(period: int = 256) -> Tensor:
    """Load the photographs that scikit-image carries as textures for the far layer: [n, 3, period, period] in [0, 1].

    Each is mirrored in both directions, which makes it periodic, and three quarters of its colour are taken away.
    Raises ImportError naming the extra, and ValueError for an odd period.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError("photographs need scikit-image: pip install stattn[demo]") from error
    if period < 2 or period % 2:
        raise ValueError(f"period={period} must be a positive even number")
    pictures = []
    for load in (data.astronaut, data.coffee, data.chelsea, data.rocket, data.hubble_deep_field):
        photo = torch.from_numpy(load().copy()).permute(2, 0, 1)[None].float() / 255
        side = min(photo.shape[-2:])
        photo = photo[..., :side, :side]
        photo = torch.nn.functional.interpolate(photo, size=(period // 2,) * 2, mode="bilinear", antialias=True)[0]
        photo = torch.lerp(photo.mean(0, keepdim=True), photo, 0.25)
        photo = torch.cat((photo, photo.flip(-1)), -1)
        pictures.append(torch.cat((photo, photo.flip(-2)), -2))
    return torch.stack(pictures).clamp(0, 1)


def _camera(moves: Tensor, pace: Tensor, frames: int, side: float) -> Tensor:
    """Give the camera of every frame [B, T, 6] for moves [B] made at a pace [B] in [0, 1]."""
    rate = constant(_RATE, moves.device)
    amount = constant(_MOVES, moves.device)[moves] * (rate[:, 0] + (rate[:, 1] - rate[:, 0]) * pace[:, None])
    frame = torch.arange(frames, device=moves.device)
    run = frame / max(frames - 1, 1) - 0.5  # zoom and dolly pass their neutral value in mid-clip
    along = torch.stack((frame * side, frame * side, run, run, frame, frame * side), -1)
    track = amount[:, None] * along
    return torch.where(torch.arange(len(CAMERA_FIELDS), device=moves.device) == 2, track.exp(), track)


def _bounce(
    shapes: Tensor,
    directions: Tensor,
    radius: Tensor,
    speed: Tensor,
    box: Tensor,
    start: Tensor,
    slope: Tensor,
    frames: int,
) -> Tensor:
    """Move the objects between the walls: [B, T, K, 2] centroids from the middle of the box, at zoom 1.

    An object starts where it can move for half the clip in its direction before it meets a wall, if the box is wide
    enough. start: [B, K, 2] in [0, 1); slope: speed across over speed along.
    """
    extent = constant(EXTENT, shapes.device)[shapes] * radius[..., None]  # [B, K, 4]
    low, high = extent[..., 0::2] - box, box - extent[..., 1::2]  # [B, K, 2]
    span = high - low
    along = directions >= 2  # axis of the direction: 0 is x, 1 is y
    forward = directions % 2 == 1
    axis = torch.stack((~along, along), -1)
    velocity = torch.where(axis, torch.where(forward, speed, -speed)[..., None], (slope * speed)[..., None])
    room = (span - speed[..., None] * (frames // 2)).clamp(min=0)
    place = torch.where(axis, torch.where(forward[..., None], start * room, span - start * room), start * span)
    frame = torch.arange(frames, device=shapes.device)[:, None, None]
    travelled = (place[:, None] + velocity[:, None] * frame).remainder(2 * span[:, None])
    return low[:, None] + torch.minimum(travelled, 2 * span[:, None] - travelled)


def _check(
    batch: int,
    frames: int,
    height: int,
    width: int,
    objects: tuple[int, int],
    cameras: Sequence[str],
    textures: Tensor | None,
) -> None:
    for name, value, least in (
        ("batch", batch, 0),
        ("frames", frames, 1),
        ("height", height, 16),
        ("width", width, 16),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if not 1 <= objects[0] <= objects[1] <= MAX_OBJECTS:
        raise ValueError(f"objects={objects} must be (fewest, most) within 1..{MAX_OBJECTS}")
    unknown = [name for name in cameras if name not in CAMERAS]
    if unknown or not cameras:
        raise ValueError(f"cameras={tuple(cameras)} must be moves out of {CAMERAS}")
    if textures is not None and (
        textures.ndim != 4 or textures.shape[1] != 3 or textures.shape[2] != textures.shape[3]
    ):
        raise ValueError(f"textures of shape {tuple(textures.shape)} must be [n, 3, P, P]")


def with_colours(scene: Scene, colours: Tensor) -> Scene:
    """Recolour the objects: the same scene in every other respect. colours: [B, K] ids into COLOURS."""
    if colours.shape != scene.colours.shape:
        raise ValueError(f"colours of shape {tuple(colours.shape)} must be {tuple(scene.colours.shape)}")
    return dataclasses.replace(scene, colours=colours)


def with_camera(scene: Scene, camera: Tensor) -> Scene:
    """Film the same scene by another camera: objects keep their way in the glass box. camera: [B, T, 6]."""
    if camera.shape != scene.camera.shape:
        raise ValueError(f"camera of shape {tuple(camera.shape)} must be {tuple(scene.camera.shape)}")
    zoom = CAMERA_FIELDS.index("zoom")
    growth = (camera[..., zoom] / scene.camera[..., zoom])[..., None]
    middle = constant((scene.width / 2, scene.height / 2), scene.device)
    centres = (scene.centres - middle) * growth[..., None] + middle
    return dataclasses.replace(scene, camera=camera, centres=centres, radii=scene.radii * growth)
