"""Keys and values of earlier frames, for autoregressive video: ``RollingKVCache``.

A ring of frames: the first ones, the sinks, stay; behind them the latest frames take the places of the oldest. No frame
is ever moved: the attention is told which frame each slot holds. Keys are kept as they were projected, neither
normalised nor rotated; both are done in one pass when they are read, with the arithmetic that a pass over the whole
video has, so that results equal its own, and so that frames may be given new positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stattn.grid import Grid, Region, check_positive, is_int
from stattn.masks import Mask, frame_causal
from stattn.model.settings import Masks
from stattn.rope import RopeTables


@dataclass(frozen=True)
class LayerCache:
    """What one attention layer reads and writes.

    grid: all frames so far, the chunk's included, and the global tokens. region: the chunk. frames: int32 [slots], the
    frame of each slot, -1 for none. rope: the angles of the slots, or None.
    """

    owner: RollingKVCache
    layer: int
    grid: Grid
    region: Region
    frames: Tensor
    rope: RopeTables | None

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put the chunk's keys and values in their slots; returns those of all slots and the global tokens."""
        return self.owner.write(self.layer, k, v)

    def mask(self, mask: Any) -> Masks:
        """Return the mask of a layer, restricted to what a frame may see of the past."""
        causal = self.owner.causal
        if isinstance(mask, Mask):
            return causal & mask
        if isinstance(mask, Sequence):
            return [causal & each for each in mask]
        raise TypeError(f"mask={mask!r} must be a Mask or one per head: a cache takes no block lists")


def check_size(size: object) -> tuple[int, int]:
    """Return the size of a frame, (h, w). Raises TypeError or ValueError naming what does not fit."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"size={size!r} must be two integers (h, w)")
    return check_positive("size h", size[0]), check_positive("size w", size[1])


class RollingKVCache:
    """Hold the keys and values of the frames that the next chunk may see, in every layer.

    A ring cache: window + sinks slots of one frame each, in which new frames overwrite the oldest; the first ``sinks``
    frames stay. layers, batch, heads, head_dim: of the model; heads are those of the keys. size: tokens of a frame,
    (h, w). chunk, window, sinks: as in ``masks.frame_causal(chunk, window, sink_frames=sinks)``, which every frame
    attends under. after: global tokens behind the video (text), held with the open chunk. rebase: count the positions
    of the rotary embedding without the gap between the sinks and the window, so that they stay below window + sinks
    however long the video is. device, dtype: of keys and values. Raises TypeError or ValueError naming the argument
    that does not fit.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        size: tuple[int, int],
        heads: int,
        head_dim: int,
        *,
        chunk: int,
        window: int,
        sinks: int = 0,
        after: int = 0,
        rebase: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        for name, value in (("layers", layers), ("batch", batch), ("heads", heads), ("head_dim", head_dim)):
            check_positive(name, value)
        check_positive("window", window)
        check_positive("sinks", sinks, least=0)
        check_positive("after", after, least=0)
        if not isinstance(rebase, bool):
            raise TypeError(f"rebase={rebase!r} must be True or False")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype={dtype!r} must be a floating-point dtype")
        size = check_size(size)
        self.causal = frame_causal(chunk, window, sink_frames=sinks)
        if window % chunk:
            raise ValueError(f"window={window!r} must be a multiple of chunk={chunk}")
        self.size, self.chunk, self.window, self.sinks, self.after, self.rebase = (
            size, chunk, window, sinks, after, rebase,
        )  # fmt: skip
        self.slots = window + sinks
        tokens = self.slots * size[0] * size[1] + after
        shape = (batch, tokens, heads, head_dim)
        # Slots without a frame are multiplied by weights of 0, and so must be finite.
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.held = [-1] * self.slots
        self.frames = torch.full((self.slots,), -1, device=device, dtype=torch.int32)
        self.first, self.last = 0, 0  # the open chunk: its first frame, and the one behind its last
        self._rope: RopeTables | None = None

    @property
    def device(self) -> torch.device:
        """Where keys and values are."""
        return self.frames.device

    @property
    def grid(self) -> Grid:
        """All frames up to the end of the open chunk, with the global tokens."""
        return Grid(self.last, *self.size, after=self.after)

    def open(self, frames: int | None = None) -> Region:
        """Begin the next chunk in the slots of the oldest frames, and return its box of the grid.

        frames: by default ``chunk``. The new chunk sees of the one before what was written last. Raises ValueError for
        more frames than a chunk has, or after a chunk that was shorter.
        """
        frames = self.chunk if frames is None else frames
        if not is_int(frames) or not 1 <= frames <= self.chunk:
            raise ValueError(f"frames={frames!r} must be in 1..{self.chunk}, the chunk")
        if self.last % self.chunk:
            raise ValueError(
                f"the chunk before ended at frame {self.last}, within a chunk of {self.chunk}: it was last"
            )
        self.first, self.last = self.last, self.last + frames
        for frame in range(self.first, self.last):
            self.held[self._slot(frame)] = frame
        self.frames.copy_(torch.tensor(self.held, dtype=torch.int32))
        self._rope = None
        return self.region

    @property
    def region(self) -> Region:
        """The open chunk's box of the grid. Raises ValueError where none is open."""
        if self.last == 0:
            raise ValueError("no chunk is open: call open() first")
        return Region((self.first, 0, 0), (self.last - self.first, *self.size))

    def layer(self, layer: int) -> LayerCache:
        """Return what one layer reads and writes while the chunk is open."""
        region = self.region
        return LayerCache(self, layer, self.grid, region, self.frames, self._rope)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values [B, chunk tokens + global tokens, heads, D] of the open chunk in their slots.

        Returns views of those of all slots and the global tokens. Raises ValueError for other shapes.
        """
        keys, values = self.keys[layer], self.values[layer]
        area = self.size[0] * self.size[1]
        video = (self.last - self.first) * area
        wanted = (keys.shape[0], video + self.after, *keys.shape[2:])
        for name, given, kept in (("k", k, keys), ("v", v, values)):
            if tuple(given.shape) != wanted:
                raise ValueError(f"{name} of shape {tuple(given.shape)} must be {wanted}, the open chunk's")
            for start, slot, count in self._runs():
                kept[:, slot * area : (slot + count) * area] = given[:, start * area : (start + count) * area]
            kept[:, self.slots * area :] = given[:, video:]
        return keys, values

    def check(self, grid: Grid) -> None:
        """Raise ValueError when the tokens of a call are not those of the open chunk."""
        if (grid.shape, grid.before, grid.after) != (self.region.extent, 0, self.after):
            raise ValueError(
                f"x has {grid.shape} tokens and {grid.globals} of text, the chunk that is open {self.region.extent} "
                f"and {self.after}"
            )

    def positions(self) -> tuple[Tensor, Tensor]:
        """Return the places in time of the chunk's frames and of the slots: float64, on the cache's device."""
        gap = max(self.last - self.window - self.sinks, 0) if self.rebase else 0
        places = [frame if frame < self.sinks else frame - gap for frame in self.held]
        mine = [places[self._slot(frame)] for frame in range(self.first, self.last)]
        made = (torch.tensor(each, dtype=torch.float64, device=self.device) for each in (mine, places))
        chunk, slots = made
        return chunk, slots

    def ropes(self, tables: Callable[[Grid, Tensor], RopeTables]) -> RopeTables:
        """Return the angles of the chunk, and keep those of the slots. tables: makes them of a grid and positions."""
        chunk, slots = self.positions()
        extent = self.region.extent
        self._rope = tables(Grid(self.slots, *self.size, after=self.after), slots)
        return tables(Grid(*extent, after=self.after), chunk)

    def _slot(self, frame: int) -> int:
        return frame if frame < self.sinks else self.sinks + (frame - self.sinks) % self.window

    def _runs(self) -> list[tuple[int, int, int]]:
        """Return (first of the chunk's frames, its slot, how many follow it in slots that follow one another)."""
        runs: list[tuple[int, int, int]] = []
        for number, frame in enumerate(range(self.first, self.last)):
            slot = self._slot(frame)
            if runs and runs[-1][1] + runs[-1][2] == slot:
                start, first, count = runs[-1]
                runs[-1] = start, first, count + 1
            else:
                runs.append((number, slot, 1))
        return runs
