"""Gated residual connections, alone and with the modulated norm that follows, forward and backward: x' = x + gate * y.

    x' = x + gate * y                             m = modulate(x'), of x' as it is stored
    d = dx' + the gradient of x' through m        dx = d,  dy = gate * d,  dgate = sum(d * y)

The sum runs over the tokens of a sample or of a frame; the rest of the backward is that of ``modulate``. Everything is
computed in fp32, without fused multiply-adds in the forward: x' is the same bits as x + gate * y in eager fp32, rounded
once, whichever kernel wrote it.

Bound by memory: alone 3 passes over the activation forward (x, y, x') and 3 backward (dx', y, dy; dx is dx' itself);
with the norm 4 forward (x, y, x', m) and 6 backward (dx', dm, x', y, dx, dy). Alone, a program takes a block of
columns, and reads its part of the gate once for several rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stattn.kernels._compile import Specialization
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
    on_device,
    or_empty,
    or_none,
    row_address,
    rows_of,
    store_chunk,
    store_modulated,
    tile_for,
    unit_stride,
    vector_address,
)
from stattn.kernels._sums import Slots, finish, programs_for, slots_for, store_sums, sums_by_columns


class Residual(NamedTuple):
    """A gate alone. vector: consecutive elements of a thread. width: the most columns of a program.

    steps: tiles of a program, forward. stages: tiles in flight, backward. warps: that the GPU is meant to run together.
    """

    vector: int
    width: int
    steps: int
    stages: int
    warps: int


class Fused(NamedTuple):
    """A gate with the norm that follows. vector, elements: see ``tile_for``. stages: tiles in flight, backward.

    warps, registers: backward, as in ``stattn.kernels.modulate``.
    """

    vector: int
    elements: int
    stages: int
    warps: int
    registers: int | None


CONFIGS = (
    Residual(8, 1024, 4, 3, 132 * 32),
    Residual(8, 1024, 2, 2, 132 * 32),
    Residual(8, 1024, 1, 3, 132 * 16),
    Residual(4, 1024, 4, 3, 132 * 32),
)
FUSED_CONFIGS = (Fused(8, 40, 1, 0, None), Fused(4, 20, 1, 0, None))
FUSED_BACKWARD_CONFIGS = (
    Fused(4, 20, 2, 132 * 8, None),
    Fused(4, 20, 3, 132 * 8, None),
    Fused(4, 20, 2, 132 * 16, 128),
    Fused(4, 12, 2, 132 * 16, 128),
)
# Longer rows leave no registers for the sums over tokens.
MAX_FUSED_CHANNELS = 6144


# ---- a gate alone


@triton.jit(do_not_specialize=["tokens", "groups", "rows", "programs"])
def gate_residual_forward(
    x, y, gate, out, tokens, groups, rows, programs, x_b, x_n, y_b, y_n, gate_b, gate_r,
    C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Add gate * y to WIDTH columns of STEPS tiles of a group's rows. All are read before the first is written."""
    BLOCKS: tl.constexpr = (C + WIDTH - 1) // WIDTH
    program = tl.program_id(0) // BLOCKS
    cols = (tl.program_id(0) - program * BLOCKS) * WIDTH + tl.arange(0, WIDTH)[None, :]
    group = program // programs
    first = (program - group * programs) * STEPS
    residual = ()
    branch = ()
    gates = ()
    if GATE == GROUP:
        at_gate = group_address(gate, group, groups, gate_b, gate_r) + cols
        shared = tl.load(at_gate, mask=cols < C, other=0.0, eviction_policy="evict_last").to(tl.float32)
    for step in tl.static_range(STEPS):
        local = rows_of(first + step, ROWS)
        row = group * rows + local
        mask = (local < rows) & (cols < C)
        at_x = row_address(x, row, tokens, x_b, x_n) + cols
        at_y = row_address(y, row, tokens, y_b, y_n) + cols
        residual = residual + (tl.load(at_x, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32),)
        branch = branch + (tl.load(at_y, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32),)
        if GATE == TOKEN:
            at_row = row_address(gate, row, tokens, gate_b, gate_r) + cols
            gates = gates + (tl.load(at_row, mask=mask, other=0.0).to(tl.float32),)
        elif GATE == GROUP:
            gates = gates + (shared,)
    for step in tl.static_range(STEPS):
        local = rows_of(first + step, ROWS)
        row = group * rows + local
        update = branch[step]
        if GATE != ABSENT:
            update = gates[step] * update
        value = (residual[step] + update).to(out.dtype.element_ty)
        tl.store(out + row.to(tl.int64) * C + cols, value, mask=(local < rows) & (cols < C))


@triton.jit(do_not_specialize=["tokens", "groups", "rows", "programs"])
def gate_residual_backward(
    dout, y, gate, dy, dgate, sums, tokens, groups, rows, programs, dout_b, dout_n, y_b, y_n, gate_b, gate_r,
    C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Walk over every ``programs``-th tile of WIDTH columns of a group: write dy, keep sum(dout * y).

    dgate: per token, or None. sums: None when nobody asks for them.
    """
    BLOCKS: tl.constexpr = (C + WIDTH - 1) // WIDTH
    program = tl.program_id(0) // BLOCKS
    cols = (tl.program_id(0) - program * BLOCKS) * WIDTH + tl.arange(0, WIDTH)[None, :]
    group = program // programs
    if GATE == GROUP:
        at_gate = group_address(gate, group, groups, gate_b, gate_r) + cols
        factor = tl.load(at_gate, mask=cols < C, other=0.0, eviction_policy="evict_last").to(tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for tile in tl.range(program - group * programs, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        local = rows_of(tile, ROWS)
        row = group * rows + local
        mask = (local < rows) & (cols < C)
        at_dout = row_address(dout, row, tokens, dout_b, dout_n) + cols
        grad = tl.load(at_dout, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if GATE == TOKEN:
            factor = tl.load(row_address(gate, row, tokens, gate_b, gate_r) + cols, mask=mask, other=0.0)
            factor = factor.to(tl.float32)
        tl.store(dy + row.to(tl.int64) * C + cols, (grad * factor).to(dy.dtype.element_ty), mask=mask)
        if dgate is not None or sums is not None:
            at_y = row_address(y, row, tokens, y_b, y_n) + cols
            grad = grad * tl.load(at_y, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if dgate is not None:
            tl.store(dgate + row.to(tl.int64) * C + cols, grad.to(dgate.dtype.element_ty), mask=mask)
        total += grad
    if sums is not None:
        flat = tl.reshape(cols, [WIDTH])
        tl.store(sums + program.to(tl.int64) * C + flat, tl.sum(total, 0), mask=flat < C)


# ---- a gate with the norm that follows


@triton.jit(do_not_specialize=["tokens", "groups", "rows"])
def gate_residual_modulate_forward(
    x, y, gate, scale, shift, weight, bias, residual, out, mean, rstd,
    tokens, groups, rows, x_b, x_n, y_b, y_n, gate_b, gate_r, scale_b, scale_r, shift_b, shift_r, eps,
    C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, LAYER: tl.constexpr,
    GATE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Write x + gate * y of one tile of a group's rows, and modulate it as it was rounded."""
    TERM: tl.constexpr = bias is not None or SHIFT != ABSENT
    tiles = tl.cdiv(rows, ROWS)
    group = tl.program_id(0) // tiles
    local = rows_of(tl.program_id(0) - group * tiles, ROWS)
    live = None if ROWS == 1 else local < rows
    row = group * rows + local
    values = load_row(row_address(x, row, tokens, x_b, x_n), live, C, CHUNK, CHUNKS, "evict_first")
    update = load_row(row_address(y, row, tokens, y_b, y_n), live, C, CHUNK, CHUNKS, "evict_first")
    if GATE != ABSENT:
        at_gate = vector_address(gate, GATE, group, groups, row, tokens, gate_b, gate_r)
        gates = load_row(at_gate, live, C, CHUNK, CHUNKS, "evict_last")
        gated = ()
        for i in tl.static_range(CHUNKS):
            gated = gated + (gates[i] * update[i],)
        update = gated
    rounded = ()
    for i in tl.static_range(CHUNKS):
        value = (values[i] + update[i]).to(residual.dtype.element_ty)
        store_chunk(residual + row.to(tl.int64) * C, value, live, i, C, CHUNK)
        rounded = rounded + (value.to(tl.float32),)
    unit, row_mean, row_rstd = normalise(rounded, eps, LAYER, C, CHUNK, CHUNKS)
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
def gate_residual_modulate_backward(
    dresidual, dout, residual, y, gate, scale, weight, bias, mean, rstd, dx, dy, dgate, dscale, sums,
    tokens, groups, rows, programs, dresidual_b, dresidual_n, dout_b, dout_n, residual_b, residual_n, y_b, y_n,
    gate_b, gate_r, scale_b, scale_r,
    C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    HOIST: tl.constexpr, LAYER: tl.constexpr, GATE: tl.constexpr, SCALE: tl.constexpr, SLOTS: tl.constexpr,
    PLAIN: tl.constexpr, FACTORED: tl.constexpr, UNIT: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Walk over every ``programs``-th tile of a group's rows: write dx and dy, keep sums.

    dresidual: of x', None for 0. y: None when the gate needs no gradient. dy: None when it is dx. dgate, dscale: per
    token, or None. HOIST: whether the factor of the group stays in registers.
    """
    group = tl.program_id(0) // programs
    first = tl.program_id(0) - group * programs
    group_scale = group_address(scale, group, groups, scale_b, scale_r) if SCALE == GROUP else None
    if HOIST:
        factor = load_factor(group_scale, weight, None, C, CHUNK, CHUNKS)
    plain = constant_row(0.0, ROWS, CHUNK, CHUNKS)
    factored = constant_row(0.0, ROWS, CHUNK, CHUNKS)
    unit_sum = constant_row(0.0, ROWS, CHUNK, CHUNKS)
    gate_sum = constant_row(0.0, ROWS, CHUNK, CHUNKS)
    next_mean, next_rstd = load_moments(mean, rstd, group, first, rows, ROWS)
    for tile in tl.range(first, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        row_mean, row_rstd = next_mean, next_rstd
        next_mean, next_rstd = load_moments(mean, rstd, group, tile + programs, rows, ROWS)
        local = rows_of(tile, ROWS)
        live = None if ROWS == 1 else local < rows
        row = group * rows + local
        at_values = row_address(residual, row, tokens, residual_b, residual_n)
        values = load_row(at_values, live, C, CHUNK, CHUNKS, "evict_first")
        grad = load_row(row_address(dout, row, tokens, dout_b, dout_n), live, C, CHUNK, CHUNKS, "evict_first")
        unit = normalised(values, row_mean, row_rstd, LAYER, CHUNKS)
        if not HOIST:
            factor = load_factor(group_scale, weight, None, C, CHUNK, CHUNKS)
        at_scale = row_address(scale, row, tokens, scale_b, scale_r) if SCALE == TOKEN else None
        at_dscale = None if dscale is None else dscale + row.to(tl.int64) * C
        plain, factored, unit_sum, before = modulated_backward(
            unit, grad, row_rstd, factor, at_scale, at_dscale, weight, bias, plain, factored, unit_sum, live,
            LAYER, C, CHUNK, CHUNKS,
        )  # fmt: skip
        if dresidual is not None:
            at_dresidual = row_address(dresidual, row, tokens, dresidual_b, dresidual_n)
            direct = load_row(at_dresidual, live, C, CHUNK, CHUNKS, "evict_first")
            total = ()
            for i in tl.static_range(CHUNKS):
                total = total + (before[i] + direct[i],)
            before = total
        for i in tl.static_range(CHUNKS):
            store_chunk(dx + row.to(tl.int64) * C, before[i], live, i, C, CHUNK)
        if dy is not None:
            at_gate = vector_address(gate, GATE, group, groups, row, tokens, gate_b, gate_r)
            gates = load_row(at_gate, live, C, CHUNK, CHUNKS, "evict_last")
            for i in tl.static_range(CHUNKS):
                store_chunk(dy + row.to(tl.int64) * C, before[i] * gates[i], live, i, C, CHUNK)
        if y is not None:
            branch = load_row(row_address(y, row, tokens, y_b, y_n), live, C, CHUNK, CHUNKS, "evict_first")
            added = ()
            for i in tl.static_range(CHUNKS):
                product = before[i] * branch[i]
                if dgate is not None:
                    store_chunk(dgate + row.to(tl.int64) * C, product, live, i, C, CHUNK)
                added = added + (gate_sum[i] + product,)
            gate_sum = added
    if PLAIN != FACTORED:
        store_sums(sums, plain, PLAIN, SLOTS, C, CHUNK)
    store_sums(sums, factored, FACTORED, SLOTS, C, CHUNK)
    store_sums(sums, unit_sum, UNIT, SLOTS, C, CHUNK)
    store_sums(sums, gate_sum, GATED, SLOTS, C, CHUNK)


# ---- launchers


class Block(NamedTuple):
    """How a program of a gate alone tiles rows and columns."""

    warps: int
    rows: int
    width: int


@lru_cache(maxsize=256)
def block_for(channels: int, vector: int, width: int) -> Block:
    """Choose the columns of a program: a power of two up to ``width`` that leaves the fewest columns over."""
    widths = [size for size in (16, 32, 64, 128, 256, 512, 1024) if size <= width]
    best = min(widths, key=lambda size: (-(-channels // size) * size, -size))
    warps = max(1, best // (32 * vector))
    return Block(warps, max(1, 32 * vector * warps // best), best)


def residual_forward(x: Tensor, y: Tensor, gate: Tensor | None, config: Residual | None = None) -> Tensor:
    """Return x + gate * y, [B, N, C] contiguous, in x's dtype. Arguments as in ``stattn.reference.gate``.

    A tensor whose channels do not lie side by side is copied first.
    """
    vector, width, steps, _, _ = config or CONFIGS[0]
    batch, tokens, channels = x.shape
    out = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    x, y, gates, groups = unit_stride(x), unit_stride(y), as_vector(gate, tokens), group_rows(x, gate)
    block = block_for(channels, vector, width)
    programs = triton.cdiv(triton.cdiv(groups.rows, block.rows), steps)
    with on_device(x):
        gate_residual_forward[(groups.total * programs * triton.cdiv(channels, block.width),)](
            x, y, gates.tensor, out, tokens, groups.per_sample, groups.rows, programs,
            x.stride(0), x.stride(1), y.stride(0), y.stride(1), gates.stride_b, gates.stride_r,
            C=channels, ROWS=block.rows, WIDTH=block.width, STEPS=steps, GATE=gates.kind,
            num_warps=block.warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def residual_backward(
    dout: Tensor, y: Tensor, gate: Tensor, wanted: bool, config: Residual | None = None
) -> tuple[Tensor, Tensor]:
    """Return dy and dgate of x + gate * y, each contiguous in its tensor's dtype; dx is dout.

    wanted: whether to compute dgate; it is empty otherwise.
    """
    vector, width, _, stages, warps = config or CONFIGS[0]
    batch, tokens, channels = y.shape
    dy = torch.empty((batch, tokens, channels), dtype=y.dtype, device=y.device)
    dgate = gradient(gate, wanted)
    if y.numel() == 0:
        return dy, or_empty(dgate, y).zero_()
    dout, y, gates, groups = unit_stride(dout), unit_stride(y), as_vector(gate, tokens), group_rows(y, gate)
    block = block_for(channels, vector, width)
    blocks, tiles = triton.cdiv(channels, block.width), triton.cdiv(groups.rows, block.rows)
    kept = Slots(gate=0) if dgate is not None and gates.kind == GROUP.value else Slots()
    programs = triton.cdiv(tiles, 8)
    if kept.count:
        programs = programs_for(groups.per_sample * blocks, tiles, warps // block.warps)
    sums = torch.empty((groups.total * programs, kept.count, channels), dtype=torch.float32, device=y.device)
    with on_device(y):
        gate_residual_backward[(groups.total * programs * blocks,)](
            dout, y, gates.tensor, dy, None if kept.count else dgate, or_none(sums),
            tokens, groups.per_sample, groups.rows, programs, dout.stride(0), dout.stride(1), y.stride(0), y.stride(1),
            gates.stride_b, gates.stride_r,
            C=channels, ROWS=block.rows, WIDTH=block.width, STAGES=stages, GATE=gates.kind, num_warps=block.warps,
        )  # fmt: skip
        if kept.count:
            finish(sums, kept, groups, programs, as_vector(None, tokens), None, None, dgate=dgate)
    return dy, or_empty(dgate, y)


def forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep: bool,
    config: Fused | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x' = x + gate * y and ``modulate`` of it, [B, N, C] contiguous, and mean and rstd as ``modulate`` does."""
    vector, elements, _, _, _ = config or FUSED_CONFIGS[0]
    batch, tokens, channels = x.shape
    residual = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    out = torch.empty_like(residual)
    mean, rstd = moments(x, norm, keep)
    if x.numel() == 0:
        return residual, out, mean, rstd
    x, y, weight, bias = unit_stride(x), unit_stride(y), unit_stride(weight), unit_stride(bias)
    groups = group_rows(x, gate, scale, shift)
    gates, scales, shifts = as_vector(gate, tokens), as_vector(scale, tokens), as_vector(shift, tokens)
    tile = tile_for(channels, vector, elements, 1)
    with on_device(x):
        gate_residual_modulate_forward[(groups.total * triton.cdiv(groups.rows, tile.rows),)](
            x, y, gates.tensor, scales.tensor, shifts.tensor, weight, bias, residual, out,
            or_none(mean), or_none(rstd), tokens, groups.per_sample, groups.rows,
            x.stride(0), x.stride(1), y.stride(0), y.stride(1), gates.stride_b, gates.stride_r,
            scales.stride_b, scales.stride_r, shifts.stride_b, shifts.stride_r, eps,
            C=channels, **tile.constants, LAYER=norm == "layer", GATE=gates.kind, SCALE=scales.kind,
            SHIFT=shifts.kind, num_warps=tile.warps, enable_fp_fusion=False,
        )  # fmt: skip
    return residual, out, mean, rstd


def backward(
    dresidual: Tensor | None,
    dout: Tensor,
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool],
    config: Fused | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, y, gate, scale, shift, weight and bias, each contiguous in its tensor's dtype.

    dresidual, dout: of x' (None for 0) and of the modulated x'. wanted: which of the last five to compute; the others
    are empty, as are dy without a gate, which is dx, and that of a shift per token, which is dout.
    """
    vector, elements, stages, warps, registers = config or FUSED_BACKWARD_CONFIGS[0]
    batch, tokens, channels = residual.shape
    dx = torch.empty((batch, tokens, channels), dtype=residual.dtype, device=residual.device)
    dy = None if gate is None else torch.empty((batch, tokens, channels), dtype=y.dtype, device=y.device)
    tile = tile_for(channels, vector, elements, 1)
    wide = channels > MAX_FUSED_CHANNELS
    stages = 1 if tile.full else stages
    groups = group_rows(residual, gate, scale, shift)
    gates, scales, shifts = as_vector(gate, tokens), as_vector(scale, tokens), as_vector(shift, tokens)
    per_token = scales.kind == TOKEN.value
    dgate, dscale = gradient(gate, wanted[0]), gradient(scale, wanted[1])
    dshift = gradient(shift, wanted[2] and shifts.kind != TOKEN.value)
    dweight, dbias = gradient(weight, wanted[3]), gradient(bias, wanted[4])
    grads = tuple(or_empty(each, residual) for each in (dy, dgate, dscale, dshift, dweight, dbias))
    if residual.numel() == 0:
        for grad in grads:
            grad.zero_()
        return (dx, *grads)
    dresidual, dout, residual, y = unit_stride(dresidual), unit_stride(dout), unit_stride(residual), unit_stride(y)
    weight, bias = unit_stride(weight), unit_stride(bias)
    gate_per_token = gates.kind == TOKEN.value
    slots = slots_for(
        plain=dshift is not None,
        factored=dbias is not None or (dscale is not None and bias is not None and not per_token),
        unit=dweight is not None or (dscale is not None and not per_token),
        gate=dgate is not None and not gate_per_token and not wide,
        scale_per_token=per_token,
    )
    kept = Slots() if wide else slots  # the sums that the kernel keeps beside dx
    tiles = triton.cdiv(groups.rows, tile.rows)
    programs = programs_for(groups.per_sample, tiles, warps // tile.warps) if kept.count else triton.cdiv(tiles, 4)
    sums = torch.empty((groups.total * programs, kept.count, channels), dtype=torch.float32, device=dx.device)
    strides = (0, 0) if dresidual is None else (dresidual.stride(0), dresidual.stride(1))
    with on_device(dx):
        gate_residual_modulate_backward[(groups.total * programs,)](
            dresidual, dout, residual, None if wide or dgate is None else y, gates.tensor, scales.tensor, weight, bias,
            or_none(mean), rstd, dx, None if wide else dy, dgate if gate_per_token and not wide else None,
            dscale if per_token else None, or_none(sums),
            tokens, groups.per_sample, groups.rows, programs, *strides, dout.stride(0), dout.stride(1),
            residual.stride(0), residual.stride(1), y.stride(0), y.stride(1), gates.stride_b, gates.stride_r,
            scales.stride_b, scales.stride_r,
            C=channels, **tile.constants, STAGES=stages, HOIST=not tile.full, LAYER=norm == "layer",
            GATE=gates.kind, SCALE=scales.kind, SLOTS=kept.count, **kept.constants,
            num_warps=tile.warps, maxnreg=registers,
        )  # fmt: skip
        if wide and slots.count:
            sums, programs = sums_by_columns(dout, residual, scales, or_none(mean), rstd, groups, slots)
        if slots.count:
            gate_sums = dgate if slots.gate >= 0 else None
            vectors = (None if per_token else dscale, dshift, gate_sums, dweight, dbias)
            finish(sums, slots, groups, programs, scales, weight, bias, *vectors)
    if wide and gate is not None:
        wide_dy, wide_dgate = residual_backward(dx, y, gate, wanted[0])
        return (dx, wide_dy, wide_dgate, *grads[2:])
    return (dx, *grads)
