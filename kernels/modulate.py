# mypy: allow-untyped-defs, allow-incomplete-defs
"""Adaptive layer norm, forward and backward: y = norm(x) * (1 + scale) + shift.

    u = (x - mean) * rstd                         rstd = 1 / sqrt(mean((x - mean)^2) + eps); "rms" has mean = 0
    y = (u * weight + bias) * (1 + scale) + shift = u * factor + term

    g = dy * factor                               dx = (g - mean(g) - u * mean(g * u)) * rstd
    dshift = sum(dy)                              dscale = weight * sum(dy * u) + bias * sum(dy)
    dbias = sum(dy * (1 + scale))                 dweight = sum(dy * (1 + scale) * u)

The sums run over the tokens of a sample, of a frame, or over all of them. Everything is computed in fp32 and rounded
once. The forward keeps mean and rstd of each token (8 bytes) when a backward will follow; the backward reads x and dy
once and writes dx. A program walks over rows of one group and keeps the sums of its rows in registers; ``_sums`` adds
those of all programs in a fixed order, so gradients are reproducible, and those of a sample do not depend on its batch.
Rows too long to keep sums beside them have them taken by columns in a second reading.

Bound by memory: 2 passes over the activation forward, 3 backward. The vectors are read from L1, or held in registers
while a program walks over several rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stattn.kernels._compile import Specialization
from stattn.kernels._device import on_device
from stattn.kernels._rows import (
    ABSENT,
    GROUP,
    TOKEN,
    as_vector,
    constant_row,
    gradient,
    group_address,
    group_rows,
    load_factor,
    load_moments,
    load_row,
    load_term,
    modulated_backward,
    moments,
    normalise,
    normalised,
    or_empty,
    or_none,
    row_address,
    rows_of,
    stages_for,
    store_chunk,
    store_modulated,
    tile_for,
    unit_stride,
    vector_address,
)
from stattn.kernels._sums import Slots, finish, programs_for, slots_for, store_sums, sums_by_columns


class Forward(NamedTuple):
    """vector, elements, rows: see ``tile_for``. steps: tiles of a program, which then holds the vectors in registers.

    stages: tiles in flight in shared memory; 1 loads into registers.
    """

    vector: int
    elements: int
    rows: int
    steps: int
    stages: int


class Backward(NamedTuple):
    """vector, elements, rows, stages: as in ``Forward``.

    warps: that the GPU is meant to run together, in one wave. registers: the most a thread may have, to make room for
    them, or None.
    """

    vector: int
    elements: int
    rows: int
    stages: int
    warps: int
    registers: int | None


CONFIGS = (Forward(8, 40, 1, 1, 1), Forward(4, 20, 1, 1, 1), Forward(4, 20, 1, 8, 3), Forward(8, 24, 1, 8, 2))
BACKWARD_CONFIGS = (
    Backward(4, 20, 1, 3, 132 * 16, 128),
    Backward(4, 20, 1, 2, 132 * 16, 128),
    Backward(4, 20, 1, 4, 132 * 16, 128),
    Backward(8, 24, 1, 2, 132 * 8, None),
)
# Longer rows leave no registers for the sums over tokens.
MAX_FUSED_CHANNELS = 8192


# Kernels.


@triton.jit(do_not_specialize=["tokens", "groups", "rows", "programs"])
def modulate_forward(
    x, scale, shift, weight, bias, out, mean, rstd,
    tokens, groups, rows, programs, x_b, x_n, scale_b, scale_r, shift_b, shift_r, eps,
    C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr, LAYER: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Modulate STEPS tiles of one group's rows. mean, rstd: [B, N] to keep for a backward, or None."""
    TERM: tl.constexpr = bias is not None or SHIFT != ABSENT
    HOIST: tl.constexpr = STEPS > 1 and SCALE != TOKEN and SHIFT != TOKEN
    group = tl.program_id(0) // programs
    first = (tl.program_id(0) - group * programs) * STEPS
    if HOIST:
        group_scale = None if SCALE == ABSENT else group_address(scale, group, groups, scale_b, scale_r)
        group_shift = None if SHIFT == ABSENT else group_address(shift, group, groups, shift_b, shift_r)
        factor = load_factor(group_scale, weight, None, C, CHUNK, CHUNKS)
        term = load_term(group_scale, group_shift, bias, None, C, CHUNK, CHUNKS)
    for tile in tl.range(first, tl.minimum(first + STEPS, tl.cdiv(rows, ROWS)), num_stages=STAGES):
        local = rows_of(tile, ROWS)
        live = None if ROWS == 1 else local < rows
        row = group * rows + local
        values = load_row(row_address(x, row, tokens, x_b, x_n), live, C, CHUNK, CHUNKS, "")
        unit, row_mean, row_rstd = normalise(values, eps, LAYER, C, CHUNK, CHUNKS)
        if not HOIST:
            at_scale, at_shift = None, None
            if SCALE != ABSENT:
                at_scale = vector_address(scale, SCALE, group, groups, row, tokens, scale_b, scale_r)
            if SHIFT != ABSENT:
                at_shift = vector_address(shift, SHIFT, group, groups, row, tokens, shift_b, shift_r)
            factor = load_factor(at_scale, weight, live, C, CHUNK, CHUNKS)
            term = load_term(at_scale, at_shift, bias, live, C, CHUNK, CHUNKS)
        store_modulated(out + row.to(tl.int64) * C, unit, factor, term, TERM, live, C, CHUNK, CHUNKS)
        if rstd is not None:
            tl.store(rstd + row, row_rstd, mask=live)
        if mean is not None:
            tl.store(mean + row, row_mean, mask=live)


@triton.jit(do_not_specialize=["tokens", "groups", "rows", "programs"])
def modulate_backward(
    dy, x, scale, weight, bias, mean, rstd, dx, dscale, sums,
    tokens, groups, rows, programs, dy_b, dy_n, x_b, x_n, scale_b, scale_r,
    C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    HOIST: tl.constexpr, LAYER: tl.constexpr, SCALE: tl.constexpr, SLOTS: tl.constexpr, PLAIN: tl.constexpr,
    FACTORED: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Walk over every ``programs``-th tile of a group's rows: write dx, keep sums.

    dscale: per token, or None. HOIST: whether the factor of the group stays in registers.
    """
    group = tl.program_id(0) // programs
    first = tl.program_id(0) - group * programs
    group_scale = group_address(scale, group, groups, scale_b, scale_r) if SCALE == GROUP else None
    if HOIST:
        factor = load_factor(group_scale, weight, None, C, CHUNK, CHUNKS)
    plain = constant_row(0.0, ROWS, CHUNK, CHUNKS)
    factored = constant_row(0.0, ROWS, CHUNK, CHUNKS)
    unit_sum = constant_row(0.0, ROWS, CHUNK, CHUNKS)
    next_mean, next_rstd = load_moments(mean, rstd, group, first, rows, ROWS)
    for tile in tl.range(first, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        row_mean, row_rstd = next_mean, next_rstd
        next_mean, next_rstd = load_moments(mean, rstd, group, tile + programs, rows, ROWS)
        local = rows_of(tile, ROWS)
        live = None if ROWS == 1 else local < rows
        row = group * rows + local
        values = load_row(row_address(x, row, tokens, x_b, x_n), live, C, CHUNK, CHUNKS, "evict_first")
        grad = load_row(row_address(dy, row, tokens, dy_b, dy_n), live, C, CHUNK, CHUNKS, "evict_first")
        unit = normalised(values, row_mean, row_rstd, LAYER, CHUNKS)
        if not HOIST:
            factor = load_factor(group_scale, weight, None, C, CHUNK, CHUNKS)
        at_scale = row_address(scale, row, tokens, scale_b, scale_r) if SCALE == TOKEN else None
        at_dscale = None if dscale is None else dscale + row.to(tl.int64) * C
        plain, factored, unit_sum, before = modulated_backward(
            unit, grad, row_rstd, factor, at_scale, at_dscale, weight, bias, plain, factored, unit_sum, live,
            LAYER, C, CHUNK, CHUNKS,
        )  # fmt: skip
        for i in tl.static_range(CHUNKS):
            store_chunk(dx + row.to(tl.int64) * C, before[i], live, i, C, CHUNK)
    if PLAIN != FACTORED:
        store_sums(sums, plain, PLAIN, SLOTS, C, CHUNK)
    store_sums(sums, factored, FACTORED, SLOTS, C, CHUNK)
    store_sums(sums, unit_sum, UNIT, SLOTS, C, CHUNK)


# Launchers.


def forward(
    keep: bool,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    config: Forward | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``modulate`` of x [B, N, C], contiguous, and mean and rstd [B, N] fp32, empty unless keep (mean: "layer").

    Arguments as in ``stattn.reference.modulate``. A tensor whose channels do not lie side by side is copied first.
    """
    vector, elements, per_program, steps, stages = config or CONFIGS[0]
    batch, tokens, channels = x.shape
    out = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    mean, rstd = moments(x, norm, keep)
    if x.numel() == 0:
        return out, mean, rstd
    x, weight, bias = unit_stride(x), unit_stride(weight), unit_stride(bias)
    groups = group_rows(x, scale, shift)
    scales, shifts = as_vector(scale, tokens), as_vector(shift, tokens)
    tile = tile_for(channels, vector, elements, per_program)
    steps = 1 if tile.full else steps
    stages = stages_for(stages, tile, x)
    programs = triton.cdiv(triton.cdiv(groups.rows, tile.rows), steps)
    with on_device(x):
        modulate_forward[(groups.total * programs,)](
            x, scales.tensor, shifts.tensor, weight, bias, out,
            or_none(mean), or_none(rstd),
            tokens, groups.per_sample, groups.rows, programs, x.stride(0), x.stride(1),
            scales.stride_b, scales.stride_r, shifts.stride_b, shifts.stride_r, eps,
            C=channels, **tile.constants, STEPS=steps, STAGES=stages, LAYER=norm == "layer",
            SCALE=scales.kind, SHIFT=shifts.kind, num_warps=tile.warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out, mean, rstd


def backward(
    dout: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool],
    config: Backward | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, scale, shift, weight and bias, each contiguous in its tensor's dtype.

    dout: [B, N, C]. mean, rstd: from ``forward``. wanted: which of the last four to compute; the others are empty, as
    is that of a shift per token, which is dout.
    """
    vector, elements, per_program, stages, warps, registers = config or BACKWARD_CONFIGS[0]
    batch, tokens, channels = x.shape
    dx = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    tile = tile_for(channels, vector, elements, per_program)
    groups = group_rows(x, scale, shift)
    scales, shifts = as_vector(scale, tokens), as_vector(shift, tokens)
    per_token = scales.kind == TOKEN.value
    dscale, dweight, dbias = gradient(scale, wanted[0]), gradient(weight, wanted[2]), gradient(bias, wanted[3])
    dshift = gradient(shift, wanted[1] and shifts.kind != TOKEN.value)
    grads = (or_empty(dscale, x), or_empty(dshift, x), or_empty(dweight, x), or_empty(dbias, x))
    if x.numel() == 0:
        for grad in grads:
            grad.zero_()
        return dx, *grads
    stages = stages_for(stages, tile, dout, x, scale if per_token else None)
    dout, x, weight, bias = unit_stride(dout), unit_stride(x), unit_stride(weight), unit_stride(bias)
    slots = slots_for(
        plain=dshift is not None,
        factored=dbias is not None or (dscale is not None and bias is not None and not per_token),
        unit=dweight is not None or (dscale is not None and not per_token),
        gate=False,
        scale_per_token=per_token,
    )
    wide = channels > MAX_FUSED_CHANNELS
    kept = Slots() if wide else slots  # the sums that the kernel keeps beside dx
    tiles = triton.cdiv(groups.rows, tile.rows)
    programs = programs_for(groups.per_sample, tiles, warps // tile.warps) if kept.total else triton.cdiv(tiles, 4)
    sums = torch.empty((groups.total * programs, kept.total, channels), dtype=torch.float32, device=x.device)
    with on_device(x):
        modulate_backward[(groups.total * programs,)](
            dout, x, scales.tensor, weight, bias, or_none(mean), rstd, dx, dscale if per_token else None,
            or_none(sums), tokens, groups.per_sample, groups.rows, programs, dout.stride(0), dout.stride(1),
            x.stride(0), x.stride(1), scales.stride_b, scales.stride_r,
            C=channels, **tile.constants, STAGES=stages, HOIST=not tile.full, LAYER=norm == "layer",
            SCALE=scales.kind, SLOTS=kept.total, **kept.of_norm, num_warps=tile.warps, maxnreg=registers,
        )  # fmt: skip
        if slots.total:
            if wide:
                sums, programs = sums_by_columns(dout, x, scales, or_none(mean), rstd, groups, slots)
            vectors = (None if per_token else dscale, dshift, None, dweight, dbias)
            finish(sums, slots, groups, programs, scales, weight, bias, *vectors)
    return dx, *grads


def specializations() -> Iterator[Specialization]:
    """List what the launchers compile: every CONFIG at a width held whole and in parts, the default in more ways."""
    unaligned = ("tokens", "groups", "rows", "programs")
    types = {
        **dict.fromkeys(("scale", "shift", "weight", "bias", "mean", "rstd", "sums", "dscale"), "*fp32"),
        **dict.fromkeys(("x", "dy", "out", "dx"), "*bf16"),
        **dict.fromkeys(unaligned, "i32"),
        **{f"{name}_{axis}": "i32" for name in ("x", "dy", "scale", "shift") for axis in "bnr"},
        "eps": "fp32",
    }
    absent: dict[str, Any] = {"weight": None, "bias": None}
    for number, config in enumerate(CONFIGS):
        for channels in (5120, 20480, 1536)[: 2 if number else 3]:
            tile = tile_for(channels, config.vector, config.elements, config.rows)
            steps, stages = (1, 1) if tile.full else (config.steps, config.stages)
            constants = {
                **absent, "C": channels, **tile.constants, "STEPS": steps, "STAGES": stages,
                "LAYER": True, "SCALE": GROUP.value, "SHIFT": GROUP.value,
            }  # fmt: skip
            options: dict[str, Any] = {"num_warps": tile.warps, "enable_fp_fusion": False}
            name = f"modulate_forward/{channels}/config {number}"
            yield Specialization(name, modulate_forward, types, constants, options, unaligned)
    for number, back in enumerate(BACKWARD_CONFIGS):
        cases = (5120, GROUP), (12288, GROUP), (5120, TOKEN), (1536, GROUP)
        for channels, scale in cases[: 2 if number else 4]:
            tile = tile_for(channels, back.vector, back.elements, back.rows)
            per_token = scale.value == TOKEN.value
            slots = slots_for(not per_token, False, not per_token, False, per_token)
            if channels > MAX_FUSED_CHANNELS:
                slots = Slots()
            constants = {
                **absent, "C": channels, **tile.constants, "STAGES": 1 if tile.full else back.stages,
                "HOIST": not tile.full, "LAYER": True, "SCALE": scale.value, "SLOTS": slots.total, **slots.of_norm,
            }  # fmt: skip
            constants |= {} if per_token else {"dscale": None}
            constants |= {} if slots.total else {"sums": None}
            kind = "token" if per_token else "group"
            name = f"modulate_backward/{channels}/{kind}/config {number}"
            options = {"num_warps": tile.warps, "maxnreg": back.registers}
            yield Specialization(name, modulate_backward, types, constants, options, unaligned)
