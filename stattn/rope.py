"""Angles of the 3-D rotary position embedding: one small table per axis instead of one angle per token.

Feature pair i of a head turns by the angle of axis t for the first dt/2 pairs, of axis h for the next dh/2 and of axis
w for the last dw/2, where dt + dh + dw = D. On an axis of d features, pair j of a token at position p turns by p *
theta^(-2j/d).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from stattn.grid import Grid, Triple, as_grid, is_int


@dataclass(frozen=True, eq=False)
class RopeTables:
    """Cosines and sines of the rotary angles of a grid's three axes.

    t, h, w: float32 tensors [2, extent, d/2] of one device, cosines at [0] and sines at [1]; d/2 pairs of features
    turn with the axis. before, after: global tokens around the video, which keep their features as they are.
    Raises TypeError or ValueError for tables of another dtype, rank or device.
    """

    t: Tensor
    h: Tensor
    w: Tensor
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        for name in ("t", "h", "w"):
            table = getattr(self, name)
            if not isinstance(table, Tensor) or table.dtype != torch.float32:
                kind = table.dtype if isinstance(table, Tensor) else type(table).__name__
                raise TypeError(f"RopeTables {name} of {kind} must be a float32 tensor")
            if table.dim() != 3 or table.shape[0] != 2 or table.shape[1] == 0:
                raise ValueError(f"RopeTables {name} of shape {tuple(table.shape)} must be [2, extent, pairs]")
            if table.device != self.t.device:
                raise ValueError(f"RopeTables {name} is on {table.device}, t on {self.t.device}")
        for name in ("before", "after"):
            if not is_int(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"RopeTables {name}={getattr(self, name)!r} must be a non-negative integer")

    @property
    def grid(self) -> Grid:
        """The grid that the tables describe, global tokens included."""
        return Grid(self.t.shape[1], self.h.shape[1], self.w.shape[1], self.before, self.after)

    @property
    def head_dim(self) -> int:
        """The number of features of a head that the tables turn, dt + dh + dw."""
        return 2 * (self.t.shape[2] + self.h.shape[2] + self.w.shape[2])

    @property
    def device(self) -> torch.device:
        """The device that holds the tables."""
        return self.t.device

    def to(self, device: torch.device | str) -> RopeTables:
        """Return the tables on another device."""
        return RopeTables(self.t.to(device), self.h.to(device), self.w.to(device), self.before, self.after)


def rope_tables(
    grid: Grid | tuple[int, int, int],
    head_dim: int,
    split: tuple[int, int, int] | None = None,
    theta: float | tuple[float, float, float] = 10000.0,
    origin: tuple[float, float, float] = (0, 0, 0),
    device: torch.device | str | None = None,
    scale: tuple[float, float, float] = (1, 1, 1),
    t_positions: Tensor | Sequence[float] | None = None,
) -> RopeTables:
    """Build the rotary angle tables of a grid.

    grid: (t, h, w), or a Grid, whose global tokens are not rotated. head_dim: D, even. split: features (dt, dh, dw)
    that turn with each axis, even, of sum D; by default Wan's: dh = dw = 2 * (D // 6), dt the rest. theta: base of the
    frequencies, one or one per axis. Token i of an axis lies at position (origin + i) * scale; t_positions [t], a
    tensor or a sequence, takes the place of i on the axis t (frames of a ring cache, frame strides). device: of the
    tables; by default that of t_positions, or torch's default.

    Angles, cosines and sines are computed in float64 and rounded once to float32.
    Raises ValueError or TypeError for an odd head_dim, a split of another sum, or a wrong number of positions.
    Follows RoFormer (arXiv:2104.09864) with the axis layout of Wan, HunyuanVideo and CogVideoX.
    """
    grid = as_grid(grid)
    if not is_int(head_dim) or head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim={head_dim!r} must be a positive even integer")
    if split is None:
        side = 2 * (head_dim // 6)
        split = (head_dim - 2 * side, side, side)
    split = check_split("split", split, head_dim)
    thetas = _three("theta", (theta,) * 3 if isinstance(theta, Real) else theta)
    if min(thetas) <= 0:
        raise ValueError(f"theta={theta!r} must be positive")
    origins, scales = _three("origin", origin), _three("scale", scale)
    if device is None and isinstance(t_positions, Tensor):
        device = t_positions.device
    indices = [torch.arange(extent, dtype=torch.float64, device=device) for extent in grid.shape]
    if t_positions is not None:
        if not isinstance(t_positions, Tensor) and not all(isinstance(each, Real) for each in t_positions):
            raise TypeError(f"t_positions={t_positions!r} must be a tensor or a sequence of numbers")
        given = torch.as_tensor(t_positions, device=device)
        if given.shape != (grid.t,):
            raise ValueError(f"t_positions of shape {tuple(given.shape)} must hold one position per frame, ({grid.t},)")
        indices[0] = given.to(torch.float64)
    t, h, w = (
        _axis_angles((first + index) * unit, dim, base)
        for index, first, unit, dim, base in zip(indices, origins, scales, split, thetas, strict=True)
    )
    return RopeTables(t, h, w, grid.before, grid.after)


def check_split(name: str, split: object, head_dim: int) -> Triple:
    """Return the features that turn with each axis. Raises ValueError when they are not even or of another sum."""
    found = tuple(split) if isinstance(split, (tuple, list)) else ()
    if len(found) != 3 or any(not is_int(each) or each < 0 or each % 2 for each in found) or sum(found) != head_dim:
        raise ValueError(f"{name}={split!r} must be three even integers (dt, dh, dw) of sum head_dim={head_dim}")
    return found


def _axis_angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """Return cos and sin of position * theta^(-2j/dim) for j = 0 ... dim/2 - 1: [2, positions, dim/2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / max(dim, 1)
    angles = positions[:, None] * theta**-exponents
    return torch.stack((angles.cos(), angles.sin())).to(torch.float32)


def _three(name: str, value: object) -> tuple[float, float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 3 or not all(isinstance(each, Real) for each in value):
        raise TypeError(f"{name}={value!r} must be three numbers, one per axis (t, h, w)")
    if not all(math.isfinite(each) for each in value):
        raise ValueError(f"{name}={value!r} must be finite")
    t, h, w = (float(each) for each in value)
    return t, h, w
