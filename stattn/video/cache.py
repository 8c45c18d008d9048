"""Spend work where the mask is: recompute only tokens that are generated, remember the others' keys and values.

In every layer a token that is kept enters others' results through its key and value alone. ``TokenCache`` runs the
whole model every ``refresh`` calls and remembers those of all tokens; in the calls between, only tokens that touch the
generated region (and the text) pass through the layers, and attend to their own fresh keys and the others' remembered
ones. With refresh = 1 every call is a whole one, and nothing differs from the plain model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stattn import masks
from stattn.dit import DiT, EncodedText
from stattn.grid import Grid, Region
from stattn.model.attention import SpaceTimeAttention, norm_and_rotate
from stattn.ops._dispatch import impl_for
from stattn.ops.attention import attention
from stattn.ops.patchify import unpatchify3d
from stattn.rope import RopeTables


class TokenCache:
    """A DiT for a sampling loop in which only part of the video changes.

    model: a DiT. generated: [B, 1, T, H, W] or [1, 1, T, H, W] booleans, True where the video is generated. refresh:
    run the whole model every so many noise levels. Called like the model (scalar timesteps, masks but no block lists);
    what it returns outside the patches that hold generated pixels is 0 in the calls between. Counts ``tokens``, the
    video tokens that passed through the layers, beside ``whole``, as many as a plain model had passed. Raises
    ValueError for a mask that is not made of whole patches of the model, for nothing to generate, and for refresh < 1.
    """

    def __init__(self, model: DiT, generated: Tensor, refresh: int = 1):
        if refresh < 1:
            raise ValueError(f"refresh={refresh} must be at least 1")
        patch = model.config.patch
        if generated.ndim != 5 or any(size % p for size, p in zip(generated.shape[2:], patch, strict=True)):
            raise ValueError(f"generated of shape {tuple(generated.shape)} must be [B, 1, T, H, W] of patches {patch}")
        active = F.max_pool3d(generated.any(0)[None].float(), patch, patch)[0, 0] > 0  # [t, h, w]
        if not bool(active.any()):
            raise ValueError("generated leaves nothing to generate")
        self.model, self.refresh, self.config = model, refresh, model.config
        self.shape = tuple(active.shape)
        self.scattered = active.flatten().nonzero()[:, 0]
        self.region = _bounding(active)
        self.boxed = _within(self.region, self.shape, active.device)
        self.tokens = self.whole = 0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._level: float | None = None
        self._calls = -1

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Give the model's parameters."""
        return self.model.parameters()

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor | EncodedText | None = None,
        text_valid: Tensor | None = None,
        *,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        mask: Any = None,
    ) -> Tensor:
        """Predict like the model; see the class."""
        model = self.model
        if timestep.ndim != 1 or bool((timestep != timestep[0]).any()):
            raise ValueError(f"timestep of shape {tuple(timestep.shape)} must hold one noise level for all")
        level = float(timestep[0])
        if level != self._level:
            self._level, self._calls = level, self._calls + 1
        inputs = model.embed(x, timestep, text, text_valid, known=known, known_mask=known_mask, mask=mask)
        at = inputs.at
        if at.grid.shape != self.shape:
            raise ValueError(f"x has the token grid {at.grid.shape}; the cache was made for {self.shape}")
        self.whole += at.grid.video
        layers = [module for module in model.modules() if isinstance(module, SpaceTimeAttention)]
        if self._calls % self.refresh == 0:
            self.tokens += at.grid.video
            with _patched(layers, _Recording(self._kept)):
                out = model.transform(inputs, timestep)
        else:
            used = [layer.mask if mask is None else mask for layer in layers]
            dense = all(each == masks.full() for each in used)
            index = self.scattered if dense else self.boxed
            self.tokens += len(index)
            text_tokens = inputs.text.shape[1] if at.grid.after else 0
            place = torch.cat((index, at.grid.video + torch.arange(text_tokens, device=index.device)))
            assert at.rope is not None
            active = _Active(self._kept, place, _rope_of(at.rope, index, text_tokens), None if dense else self.region)
            with _patched(layers, active):
                part = model.transform(inputs._replace(tokens=inputs.tokens[:, index]), timestep)
            out = part.new_zeros(len(part), at.grid.video, part.shape[2]).index_copy_(1, index, part)
        impl = impl_for(model.patchify.impl, "patchify")
        return unpatchify3d(out, at.grid.shape, model.config.patch, model.config.out_channels, impl=impl)


class _Recording:
    """Attend as SpaceTimeAttention does, and keep the keys and values."""

    def __init__(self, kept: dict[int, tuple[Tensor, Tensor]]):
        self.kept = kept

    def __call__(
        self, layer: int, module: SpaceTimeAttention, x: Tensor, grid: Grid, rope: Any, valid: Any, mask: Any
    ) -> Tensor:
        q, k, v = _project(module, x, rope)
        self.kept[layer] = (k, v)
        return _attend(module, q, k, v, grid, valid, mask, None)


class _Active:
    """Attend from some tokens to their own fresh keys and to the others' kept ones."""

    def __init__(self, kept: dict[int, tuple[Tensor, Tensor]], place: Tensor, rope: RopeTables, region: Region | None):
        self.kept, self.place, self.rope, self.region = kept, place, rope, region

    def __call__(
        self, layer: int, module: SpaceTimeAttention, x: Tensor, grid: Grid, rope: Any, valid: Any, mask: Any
    ) -> Tensor:
        q, k, v = _project(module, x, self.rope)
        old_k, old_v = self.kept[layer]
        k, v = old_k.index_copy(1, self.place, k), old_v.index_copy(1, self.place, v)
        if self.region is None:
            # Under full attention a query's place means nothing: any tokens may stand at the head of one long row.
            queries = q.shape[1] - grid.after
            row = Grid(1, 1, grid.video, after=grid.after)
            return _attend(module, q, k, v, row, valid, mask, Region((0, 0, 0), (1, 1, queries)))
        return _attend(module, q, k, v, grid, valid, mask, self.region)


def _project(module: SpaceTimeAttention, x: Tensor, rope: RopeTables | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = module.project(x)
    return *norm_and_rotate(module, q, k, rope), v


def _attend(
    module: SpaceTimeAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    valid: Tensor | None,
    mask: Any,
    region: Region | None,
) -> Tensor:
    out = attention(
        q,
        k,
        v,
        grid,
        mask=module.mask if mask is None else mask,
        q_region=region,
        valid=valid,
        globals_see=module.globals_see,
        impl=impl_for(module.impl, "attention"),
    )
    return module.to_out[0](out.flatten(2))


@contextmanager
def _patched(layers: list[SpaceTimeAttention], attend: Any) -> Iterator[None]:
    """Let the layers call attend(number, module, x, grid, rope, valid, mask) for a while."""

    def forward_of(layer: int) -> Any:
        def forward(
            self: SpaceTimeAttention,
            x: Tensor,
            grid: Grid,
            *,
            rope: Any = None,
            valid: Any = None,
            mask: Any = None,
            cache: None = None,
        ) -> Tensor:
            return attend(layer, self, x, grid, rope, valid, mask)

        return forward

    before = [module.__dict__.get("forward") for module in layers]
    for layer, module in enumerate(layers):
        module.forward = MethodType(forward_of(layer), module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, forward in zip(layers, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward  # type: ignore[method-assign]


def _rope_of(rope: RopeTables, index: Tensor, text: int) -> RopeTables:
    """Give the angles of some video tokens, as if they lay behind one another on the axis t."""
    _, height, width = rope.grid.shape
    t, h, w = index // (height * width), index // width % height, index % width
    row = torch.cat((rope.t[:, t], rope.h[:, h], rope.w[:, w]), -1)
    still = row[:, :1, :0]
    return RopeTables(row, still, still, 0, text)


def _bounding(active: Tensor) -> Region:
    ends = [active.any(dim=tuple(other for other in range(3) if other != axis)).nonzero()[:, 0] for axis in range(3)]
    low = [int(end.min()) for end in ends]
    high = [int(end.max()) for end in ends]
    return Region((low[0], low[1], low[2]), (high[0] - low[0] + 1, high[1] - low[1] + 1, high[2] - low[2] + 1))


def _within(region: Region, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """List the tokens of a box, int64."""
    index = torch.arange(shape[0] * shape[1] * shape[2], device=device).view(shape)
    (t, h, w), (nt, nh, nw) = region.origin, region.extent
    return index[t : t + nt, h : h + nh, w : w + nw].flatten()
