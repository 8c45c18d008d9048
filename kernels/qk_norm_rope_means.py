# mypy: allow-untyped-defs, allow-incomplete-defs, no-warn-unreachable
# mypy: disable-error-code="assignment, misc, var-annotated"
# (Tuples grow in loops that Triton unrolls.)
"""``qk_norm_rope`` that also leaves the mean key of every tile, for the selection of key tiles (``select``).

    y as in ``qk_norm_rope``,  mean(tile) = sum of the tile's y, as they are stored, / their number

A program owns a tile of keys and walks over its tokens, the next ones on their way to shared memory meanwhile, with
their sum in registers: the keys are not read again. Queries, and keys of global tokens, take the kernel of
``qk_norm_rope``. Sums are fp32 in the order of the tokens. Bound by memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stattn.kernels._compile import Specialization
from stattn.kernels._device import IN_FLIGHT, on_device
from stattn.kernels.qk_norm_rope import (
    MODELS,
    Angles,
    angles_at,
    constants_of,
    forward,
    load_pairs,
    load_weight,
    pairs_of,
    row_sum,
    shapes,
    specialize,
    store_pairs,
    strides_of,
    tables_of,
)


class Config(NamedTuple):
    """elements: the most elements of a row that a thread holds. stages: rows in flight, one of them in registers."""

    elements: int
    stages: int


CONFIGS = (Config(20, 3), Config(24, 4))
UNSPECIALIZED = ("t_extent", "h_extent", "w_extent", "before")


@triton.jit
def place_in_tile(i, t0, h0, w0, tile_h, tile_w):
    """Return t, h and w of token i of a tile that is tile_h x tile_w wide."""
    return t0 + i // (tile_h * tile_w), h0 + i // tile_w % tile_h, w0 + i % tile_w


@triton.jit(do_not_specialize=UNSPECIALIZED)
def qk_norm_rope_tile(
    x_ptr, y_ptr, means_ptr, weight_ptr, t_ptr, h_ptr, w_ptr, t_extent, h_extent, w_extent, before,
    x_batch, x_token, x_head, x_feature, y_batch, y_token, y_head, y_feature, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, CHUNK: tl.constexpr,
    T_PAIRS: tl.constexpr, H_PAIRS: tl.constexpr, W_PAIRS: tl.constexpr, ACROSS: tl.constexpr,
    INTERLEAVED: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate the keys of one tile and store their mean. means: fp32 [B, heads, tiles, D]."""
    CHUNKS: tl.constexpr = (HEADS + CHUNK - 1) // CHUNK
    COUNT: tl.constexpr = HEADS * DIM if ACROSS else DIM
    NORM: tl.constexpr = weight_ptr is not None
    w_tiles = ()
    if NORM:
        w_tiles = load_weight(weight_ptr, HEADS, DIM, HALF, CHUNK, CHUNKS, ACROSS, INTERLEAVED)
    along_h, along_w = tl.cdiv(h_extent, TILE_H), tl.cdiv(w_extent, TILE_W)
    tiles = tl.cdiv(t_extent, TILE_T) * along_h * along_w
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    t0, h0, w0 = tile // (along_h * along_w) * TILE_T, tile // along_w % along_h * TILE_H, tile % along_w * TILE_W
    tile_h, tile_w = tl.minimum(TILE_H, h_extent - h0), tl.minimum(TILE_W, w_extent - w0)
    count = tl.minimum(TILE_T, t_extent - t0) * tile_h * tile_w
    sums = ()
    for _ in tl.static_range(CHUNKS):
        sums = sums + ((tl.zeros((CHUNK, HALF), tl.float32), tl.zeros((CHUNK, HALF), tl.float32)),)
    cos_ahead, sin_ahead = angles_at(
        t0, h0, w0, count > 0, t_ptr, h_ptr, w_ptr, t_extent, h_extent, w_extent, HALF, T_PAIRS, H_PAIRS, W_PAIRS
    )
    for i in tl.range(0, count, num_stages=STAGES):
        t, h, w = place_in_tile(i, t0, h0, w0, tile_h, tile_w)
        token = (before + (t * h_extent + h) * w_extent + w).to(tl.int64)
        x_row = x_ptr + batch * x_batch + token * x_token
        y_row = y_ptr + batch * y_batch + token * y_token
        cos, sin = cos_ahead[None, :], sin_ahead[None, :]
        t, h, w = place_in_tile(i + 1, t0, h0, w0, tile_h, tile_w)
        cos_ahead, sin_ahead = angles_at(
            t, h, w, i + 1 < count, t_ptr, h_ptr, w_ptr, t_extent, h_extent, w_extent, HALF, T_PAIRS, H_PAIRS, W_PAIRS
        )
        chunks = ()
        for j in tl.static_range(CHUNKS):
            a, b = load_pairs(x_row, x_head, x_feature, j * CHUNK, HEADS, DIM, HALF, CHUNK, INTERLEAVED)
            chunks = chunks + ((a.to(tl.float32), b.to(tl.float32)),)
        r = 1.0
        if NORM and ACROSS:
            square = tl.zeros((CHUNK, HALF), tl.float32)
            for j in tl.static_range(CHUNKS):
                square += chunks[j][0] * chunks[j][0] + chunks[j][1] * chunks[j][1]
            r = tl.rsqrt(row_sum(square, ACROSS) / COUNT + eps)
        added = ()
        for j in tl.static_range(CHUNKS):
            a, b = chunks[j]
            if NORM:
                if not ACROSS:
                    r = tl.rsqrt(row_sum(a * a + b * b, ACROSS) / COUNT + eps)
                a = a * r * w_tiles[j if ACROSS else 0][0].to(tl.float32)
                b = b * r * w_tiles[j if ACROSS else 0][1].to(tl.float32)
            a, b = a * cos - b * sin, a * sin + b * cos
            a, b = a.to(y_ptr.dtype.element_ty), b.to(y_ptr.dtype.element_ty)
            store_pairs(y_row, a, b, y_head, y_feature, j * CHUNK, HEADS, DIM, HALF, CHUNK, INTERLEAVED)
            added = added + ((sums[j][0] + a.to(tl.float32), sums[j][1] + b.to(tl.float32)),)
        sums = added
    at = means_ptr + (batch * HEADS * tiles + tile) * DIM
    for j in tl.static_range(CHUNKS):
        a, b = sums[j][0] / count, sums[j][1] / count
        store_pairs(at, a, b, tiles * DIM, 1, j * CHUNK, HEADS, DIM, HALF, CHUNK, INTERLEAVED)


# Launchers.


def forward_with_means(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_angles: Angles,
    k_angles: Angles,
    across: bool,
    eps: float,
    interleaved: bool,
    tile: tuple[int, int, int],
    config: Config = CONFIGS[0],
) -> Tensor:
    """Do what ``qk_norm_rope.forward`` does and return the means of k_out's tiles, fp32 [B, heads, tiles, D]."""
    tables, (*extents, before) = tables_of(k_angles)
    batch, _, heads, dim = k.shape
    tiles = 1
    for extent, each in zip(extents, tile, strict=True):
        tiles *= triton.cdiv(extent, each)
    means = torch.empty((batch, heads, tiles, dim), dtype=torch.float32, device=k.device)
    end = before + extents[0] * extents[1] * extents[2]
    rest = (across, eps, interleaved)
    forward(q, k[:, :before], q_out, k_out[:, :before], q_weight, k_weight, q_angles, None, *rest)
    forward(q[:, :0], k[:, end:], q_out[:, :0], k_out[:, end:], q_weight, k_weight, None, None, *rest)
    if means.numel():
        warps, constants = _constants(heads, dim, k.element_size(), interleaved, config)
        constants |= constants_of(dim, pairs_of(k_angles), across, interleaved)
        with on_device(k):
            qk_norm_rope_tile[(batch * tiles,)](
                k, k_out, means, None if k_weight is None else k_weight.contiguous(), *tables, *extents, before,
                *strides_of(k), *strides_of(k_out), eps, **constants, **_tile(tile), num_warps=warps,
            )  # fmt: skip
    return means


def _constants(heads: int, dim: int, size: int, interleaved: bool, config: Config) -> tuple[int, dict[str, int]]:
    """Return the warps and the constexprs of a program that owns a tile."""
    warps, chunk = shapes(heads, dim, size, interleaved, config.elements)
    stages = max(1, min(config.stages, 1 + IN_FLIGHT // (heads * dim * size)))
    return warps, {"HEADS": heads, "CHUNK": chunk, "STAGES": stages}


def _tile(tile: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("TILE_T", "TILE_H", "TILE_W"), tile, strict=True))


def specializations() -> Iterator[Specialization]:
    """List the kernels of the models that are measured: every CONFIG for Wan-14B, the default for the others."""
    for model, (_, heads, dim, pairs, across, interleaved, kind) in MODELS.items():
        for number, config in enumerate(CONFIGS if model == "wan-14b" else CONFIGS[:1]):
            warps, rest = _constants(heads, dim, 4 if kind == "fp32" else 2, interleaved, config)
            constants: dict[str, Any] = {**constants_of(dim, pairs, across, interleaved), **rest, **_tile((4, 4, 8))}
            each = specialize(
                f"tile/{model}/{number}", qk_norm_rope_tile, kind, constants, {"num_warps": warps}, UNSPECIALIZED
            )
            yield each._replace(types={**each.types, "means_ptr": "*fp32"})
