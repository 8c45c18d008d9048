"""A call of many arguments, checked: what every implementation receives.

Of attention ``Problem`` is static and hashable: plans and tables are cached by it. The tensors that come with a call
(which slots hold which frame, which global tokens are real, block lists) travel beside it in ``Extras``. ``Step`` is a
denoising step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch

from stattn.grid import Grid, Region, Triple
from stattn.masks import Mask


@dataclass(frozen=True)
class Problem:
    """The static part of a call.

    masks: one mask for all heads, or one per query head; with block lists, the mask of their partial entries or none.
    q_box, k_box: the parts of the grid that q, and k and v, hold. With k_frames the slots of k take the place of
    frames: k_box then spans the slots from 0, and its t extent is their number. q_globals: whether q holds the global
    tokens.
    """

    grid: Grid
    masks: tuple[Mask, ...]
    q_box: Region
    k_box: Region
    q_globals: bool
    globals_see: str
    scale: float
    q_tile: Triple | None = None  # of block lists
    k_tile: Triple | None = None
    _hash: ClassVar[int]  # of each problem, once it was asked for

    def __hash__(self) -> int:
        """Hash once: every call looks up plans and tables by its problem."""
        try:
            return self._hash
        except AttributeError:
            value = hash(tuple(getattr(self, each.name) for each in fields(self)))
            object.__setattr__(self, "_hash", value)
            return value

    def __getstate__(self) -> dict[str, object]:
        """Leave the hash out: another process hashes strings otherwise."""
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    @property
    def q_tokens(self) -> int:
        """The rows of q."""
        return self.q_box.video + (self.grid.globals if self.q_globals else 0)

    @property
    def k_tokens(self) -> int:
        """The rows of k and v."""
        return self.k_box.video + self.grid.globals


class Extras(NamedTuple):
    """The tensors of a call beside q, k and v; each may be None.

    k_frames: int32 [slots], the frame that each key slot holds, -1 for none. valid: booleans [B, before + after].
    block_count, block_index, block_partial: the block lists.
    """

    k_frames: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    block_count: torch.Tensor | None = None
    block_index: torch.Tensor | None = None
    block_partial: torch.Tensor | None = None


class Step(NamedTuple):
    """A denoising step, in the order of the operation's schema; what the defaults stand for is left out.

        p  = convert[0] * sample + convert[1] * guided output
        x' = weights[0] * sample + weights[1] * p + sum_i weights[2 + i] * history[i] + noise_weight * z
        x' = m * x' + (1 - m) * (known_weights[0] * known + known_weights[1] * z)             with m = generated

    sample, history, noise, known: [B, C, T, H, W]. output, uncond: the same, or tokens [B, N, pt*ph*pw*C] of patches
    (pt, ph, pw). generated: broadcasts against sample. z: noise, or Philox numbers of seeds [B] and offset. guidance,
    rescale, zero_star: as in ``stattn.denoise_step``, of output and uncond.
    """

    sample: torch.Tensor
    output: torch.Tensor
    uncond: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    known: torch.Tensor | None = None
    generated: torch.Tensor | None = None
    history: Sequence[torch.Tensor] = ()
    seeds: torch.Tensor | None = None
    offset: int = 0
    guidance: float = 1.0
    rescale: float = 0.0
    zero_star: bool = False
    convert: Sequence[float] = (0.0, 1.0)
    weights: Sequence[float] = (1.0, 0.0)
    noise_weight: float = 0.0
    known_weights: Sequence[float] = (1.0, 0.0)
    patch: Sequence[int] | None = None
