"""One scene of the synthetic world: the numbers that make a batch of clips, their truth, and how they are drawn.

``stattn.world`` describes the world and draws scenes at random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stattn.world import words
from stattn.world.constants import constant

CAMERA_FIELDS = ("pan_x", "pan_y", "zoom", "dolly", "roll", "track")
DEPTHS = (4.0, 2.0)  # of the far and the near layer
MAX_OBJECTS = 3

# A shape of radius r has the area of a disc of radius r.
_SQUARE = math.sqrt(math.pi) / 2  # half a side
_TRIANGLE = math.sqrt(4 * math.pi / (3 * math.sqrt(3)))  # centroid to corner; half of it to an edge
EXTENT = (  # left, right, up, down from the centroid, in radii
    (1.0, 1.0, 1.0, 1.0),
    (_SQUARE, _SQUARE, _SQUARE, _SQUARE),
    (_TRIANGLE * math.sqrt(0.75), _TRIANGLE * math.sqrt(0.75), _TRIANGLE, _TRIANGLE / 2),
)
# Outward normals (x, y) of the square and of the upright triangle, and their distance from the centroid in radii.
_EDGES = (
    ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)),
    ((0.0, 1.0), (0.0, 1.0), (math.sqrt(0.75), -0.5), (-math.sqrt(0.75), -0.5)),
)
_EDGE_DISTANCE = (_SQUARE, _TRIANGLE / 2)
FIELDS = 5  # random fields: light and tint of both layers, and where the near layer is
_SLOPE = (2.5, 3.5, 2.5, 3.5, 4.0)  # power falls as frequency to the minus this


@dataclass(frozen=True, eq=False)
class Scene:
    """Hold everything that makes a batch of clips, and answer questions about it exactly.

    B clips, T frames, K = 3 object slots of which clip b uses the first ``count[b]`` (the others hold unused values).
    Lengths are pixels, x to the right and y down; centres are measured from the picture's upper left corner, so that
    pixel (i, j) covers [j, j+1] x [i, i+1]. Change a scene with ``dataclasses.replace`` (other colours, a scripted path
    in ``centres``, another ``camera``) and draw it again.
    """

    height: int
    width: int
    count: Tensor  # [B] int64, objects in the clip
    colours: Tensor  # [B, K] int64 into COLOURS
    shapes: Tensor  # [B, K] int64 into SHAPES
    directions: Tensor  # [B, K] int64 into DIRECTIONS: how the object sets out
    moves: Tensor  # [B] int64 into CAMERAS
    centres: Tensor  # [B, T, K, 2] centroid (x, y) in the picture
    radii: Tensor  # [B, T, K] radius of the disc of equal area
    camera: Tensor  # [B, T, 6]: CAMERA_FIELDS; pan and track in pixels, roll in radians, dolly in units of DEPTHS
    shades: Tensor  # [B, K, 3] hue offset in degrees, saturation, value of each object
    palette: (
        Tensor  # [B, 2, 5] light, tint angle, tint strength, contrast, cover threshold of the far and the near layer
    )
    spectrum: Tensor  # [B, 5, 2 * band + 1, band + 1, 2] Fourier coefficients of the random fields
    photos: Tensor | None = None  # [B, 3, P, P] in [0, 1], periodic: the far layer in place of its random fields

    @property
    def frames(self) -> int:
        """Count the frames."""
        return self.camera.shape[1]

    @property
    def batch(self) -> int:
        """Count the clips."""
        return self.camera.shape[0]

    @property
    def device(self) -> torch.device:
        """Say where the scene lives."""
        return self.camera.device

    def present(self) -> Tensor:
        """Say which object slots are used: [B, K] booleans."""
        return torch.arange(MAX_OBJECTS, device=self.device) < self.count[:, None]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Give the affine map from the picture to a layer of scenery (0 far, 1 near): X = A p + b.

        p is in pixels from the picture's centre, X in texture pixels. Returns A [B, T, 2, 2], a rotation times a scale,
        and b [B, T, 2].
        """
        pan_x, pan_y, zoom, dolly, roll, track = self.camera.unbind(-1)
        near = 1 - dolly / DEPTHS[index]
        cos, sin = near / zoom * roll.cos(), near / zoom * roll.sin()
        matrix = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
        return matrix, torch.stack((near * pan_x + track / DEPTHS[index], near * pan_y), -1)

    def coverage(self, index: int) -> Tensor:
        """Give the share of each pixel that object ``index`` covers, ignoring what is in front of it.

        Returns [B, T, H, W] in [0, 1], 0 where the clip has no such object.
        """
        y, x = _pixels(self.height, self.width, self.device)
        x = x - self.centres[:, :, index, 0, None, None]  # [B, T, 1, W]
        y = y - self.centres[:, :, index, 1, None, None]  # [B, T, H, 1]
        radius = self.radii[:, :, index, None, None]
        shape = self.shapes[:, index]
        polygon = (shape - 1).clamp(min=0)
        normals = constant(_EDGES, self.device)[polygon][:, :, :, None, None, None]  # [B, 4, 2, 1, 1, 1]
        inside = constant(_EDGE_DISTANCE, self.device)[polygon][:, None, None, None] * radius
        edge = normals[:, 0, 0] * x + normals[:, 0, 1] * y
        for side in range(1, 4):
            edge = torch.maximum(edge, normals[:, side, 0] * x + normals[:, side, 1] * y)
        distance = torch.where((shape == 0)[:, None, None, None], (x * x + y * y).sqrt() - radius, edge - inside)
        alpha = (0.5 - distance).clamp(0, 1)
        return alpha * (self.count > index)[:, None, None, None]

    def masks(self) -> Tensor:
        """Give the share of each pixel that shows each object, without the parts that others hide.

        Returns [B, T, K, H, W] in [0, 1].
        """
        free = torch.ones((), device=self.device)
        seen = []
        for index in range(MAX_OBJECTS):
            alpha = self.coverage(index)
            seen.append(alpha * free)
            free = free * (1 - alpha)
        return torch.stack(seen, 2)

    def flow(self) -> Tensor:
        """Give the motion of what each pixel shows, from frame t to t + 1: [B, T - 1, 2, H, W], (x, y) in pixels.

        A pixel shows whatever covers at least half of it, front to back: objects, near layer, far layer.
        """
        y, x = _pixels(self.height, self.width, self.device)
        here = torch.stack(torch.broadcast_tensors(x, y), -1) - self._middle()  # [H, W, 2]
        near = self._near_cover()[:, :-1] >= 0.5
        flow = torch.where(near[..., None], self._scenery_flow(1, here), self._scenery_flow(0, here))
        here = here + self._middle()
        for index in reversed(range(MAX_OBJECTS)):
            centre = self.centres[:, :, index, None, None]
            growth = (self.radii[:, 1:, index] / self.radii[:, :-1, index])[..., None, None, None]
            moved = centre[:, 1:] + (here - centre[:, :-1]) * growth - here
            flow = torch.where((self.coverage(index)[:, :-1] >= 0.5)[..., None], moved, flow)
        return flow.permute(0, 1, 4, 2, 3)

    def rgb(self) -> Tensor:
        """Give the colour of each object: [B, K, 3] in [0, 1]."""
        hue = (self.colours * 60.0 + self.shades[..., 0])[..., None]
        sector = (hue / 60 + constant((5.0, 3.0, 1.0), self.device)) % 6
        value, saturation = self.shades[..., 2:], self.shades[..., 1:2]
        return value * (1 - saturation * torch.minimum(sector, 4 - sector).clamp(0, 1))

    def draw(self) -> Tensor:
        """Draw the clips: [B, 3, T, H, W] fp32 in [-1, 1]."""
        fields = self._fields()
        far = self._surface(fields[:, 0], fields[:, 1], 0) if self.photos is None else self.photos
        video = self._film(far, 0)
        near = self._film(torch.cat((self._surface(fields[:, 2], fields[:, 3], 1), fields[:, 4:]), 1), 1)
        video = torch.lerp(video, near[:, :3], self._cover(near[:, 3])[:, None])
        rgb = self.rgb()
        for index in reversed(range(MAX_OBJECTS)):
            video = torch.lerp(video, rgb[:, index, :, None, None, None], self.coverage(index)[:, None])
        return video * 2 - 1

    def captions(self) -> list[str]:
        """Write one caption a clip (waits for the device)."""
        return words.write(self.count, self.colours, self.shapes, self.directions[:, 0], self.moves)

    def tokens(
        self,
        length: int = words.CAPTION_LENGTH,
        *,
        motion: Tensor | None = None,
        others: Tensor | None = None,
        camera: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Give ``words.tokenize(captions(), length)`` without leaving the device.

        motion, others, camera: [B] booleans, False where that clause of the caption is left out. Returns ids
        [B, length] int64 and counts [B] int64. Raises ValueError if a full caption of 16 words does not fit.
        """
        truth = (self.count, self.colours, self.shapes, self.directions[:, 0], self.moves)
        return words.tokens(*truth, length, motion=motion, others=others, camera=camera)

    def _middle(self) -> Tensor:
        return constant((self.width / 2, self.height / 2), self.device)

    def _scenery_flow(self, index: int, here: Tensor) -> Tensor:
        """Solve A' p' + b' = A p + b for p' - p: [B, T - 1, H, W, 2]."""
        matrix, shift = self.layer(index)
        back = (
            matrix.transpose(-1, -2) / torch.linalg.det(matrix)[..., None, None]
        )  # the inverse of a rotation times a scale
        step = back[:, 1:] @ matrix[:, :-1] - torch.eye(2, device=self.device)
        slide = back[:, 1:] @ (shift[:, :-1] - shift[:, 1:])[..., None]
        return torch.einsum("btij,hwj->bthwi", step, here) + slide[:, :, None, None, :, 0]

    def _fields(self) -> Tensor:
        """Sum the random waves: [B, 5, P, P] of unit variance and period P = twice the longer side."""
        period = 2 * max(self.height, self.width)
        band = self.spectrum.shape[3] - 1
        ky = torch.arange(-band, band + 1, device=self.device)[:, None]
        kx = torch.arange(band + 1, device=self.device)
        square = kx * kx + ky * ky
        inside = (square > 0) & (square <= band * band)
        slope = constant(_SLOPE, self.device)[:, None, None]
        power = torch.where(inside, square.clamp(min=1) ** (-slope / 2), 0.0)  # [5, 2 * band + 1, band + 1]
        total = 2 * power.sum((1, 2), keepdim=True) - power[:, :, :1].sum(
            1, keepdim=True
        )  # columns but kx = 0 count twice in a real field
        waves = torch.view_as_complex(self.spectrum * (power / total).sqrt()[..., None])
        full = waves.new_zeros(self.batch, FIELDS, period, period // 2 + 1)
        full[:, :, : band + 1, : band + 1] = waves[:, :, band:]
        full[:, :, -band:, : band + 1] = waves[:, :, :band]
        columns = torch.fft.ifft(full, dim=-2, norm="forward")
        # A real field has a real mean along x. The CPU's library ignores what is not; cuFFT turns it into stripes.
        columns.imag[..., 0] = 0
        return torch.fft.irfft(columns, n=period, norm="forward")

    def _surface(self, light: Tensor, tint: Tensor, index: int) -> Tensor:
        """Colour one layer: [B, 3, P, P] in [0, 1], greyish, so that the six colours stand out."""
        level, angle, strength, contrast, _ = self.palette[:, index, :, None, None].unbind(1)
        grey = level + contrast * light
        phase = constant((0.0, 2.0, 4.0), self.device)[:, None, None] * (math.pi / 3)
        hue = torch.cos(angle[:, None] + phase)  # [B, 3, 1, 1]
        return (grey[:, None] + hue * (strength * (1 + 0.7 * tint.clamp(-2, 2)))[:, None]).clamp(0, 1)

    def _film(self, texture: Tensor, index: int) -> Tensor:
        """Sample a periodic texture [B, C, P, P] where the camera sees it: [B, C, T, H, W]."""
        matrix, shift = self.layer(index)
        y, x = _pixels(self.height, self.width, self.device)
        x, y = x - self.width / 2, y - self.height / 2
        scale = texture.shape[-1] / (2 * max(self.height, self.width))  # photographs may have another resolution
        a, b = matrix[..., None, None], shift[..., None, None]
        at = [(a[:, :, i, 0] * x + a[:, :, i, 1] * y + b[:, :, i]) * scale for i in range(2)]  # 2 x [B, T, H, W]
        period = texture.shape[-1]
        where = torch.stack(at, -1).remainder(period) * (2 / period) - 1
        wrapped = torch.cat((texture, texture[..., :1, :]), -2)
        wrapped = torch.cat(
            (wrapped, wrapped[..., :1]), -1
        )  # one more row and column: bilinear sampling across the seam
        film = torch.nn.functional.grid_sample(wrapped, where.flatten(1, 2), mode="bilinear", align_corners=True)
        return film.unflatten(2, (self.frames, self.height))

    def _cover(self, field: Tensor) -> Tensor:
        """Turn the last random field [B, T, H, W] into the share of a pixel that the near layer covers, edges about two
        pixels wide.
        """
        steep = min(self.height, self.width) / 8
        return ((field - self.palette[:, 1, 4, None, None, None]) * steep + 0.5).clamp(0, 1)

    def _near_cover(self) -> Tensor:
        return self._cover(self._film(self._fields()[:, 4:], 1)[:, 0])


def _pixels(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Give pixel centres y [H, 1] and x [1, W]."""
    return torch.arange(height, device=device)[:, None] + 0.5, torch.arange(width, device=device)[None] + 0.5
