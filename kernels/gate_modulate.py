# mypy: allow-untyped-defs, allow-incomplete-defs
"""A gated residual connection and the modulated norm that follows in one pass: x' = x + gate * y, m = modulate(x').

    d = dx' + the gradient of x' through m         dx = d,  dy = gate * d,  dgate = sum(d * y)

The norm reads x' as it is stored. The sum runs over the tokens of a sample or of a frame; the rest of the backward is
that of ``modulate``. Everything is computed in fp32 and rounded once, without fused multiply-adds in the forward: x' is
the same bits as ``gate_residual`` gives.

Bound by memory: 4 passes over the activation forward (x, y, x', m) and 6 backward (dx', dm, x', y, dx, dy).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stattn.kernels import gate as gate_alone
from stattn.kernels._compile import Specialization
from stattn.kernels._device import on_device
from stattn.kernels._rows import (
    ABSENT,
    GROUP,
    TOKEN,
    Tile,
    append,
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


class Config(NamedTuple):
    """vector, elements: see ``tile_for``. stages: tiles in flight, backward.

    warps, registers: backward, as in ``stattn.kernels.modulate``, for rows that leave a thread many elements.
    """

    vector: int
    elements: int
    stages: int
    warps: int
    registers: int | None

    def together(self, tile: Tile) -> tuple[int, int | None]:
        """Return the warps that are meant to run together, and the most registers of a thread."""
        if self.registers is None and tile.chunks * self.vector <= FEW_ELEMENTS:
            return 2 * self.warps, 128
        return self.warps, self.registers


CONFIGS = (Config(8, 40, 1, 0, None), Config(4, 20, 1, 0, None))
BACKWARD_CONFIGS = (
    Config(4, 20, 3, 132 * 8, None),
    Config(4, 20, 2, 132 * 8, None),
    Config(4, 12, 2, 132 * 16, 128),
    Config(4, 12, 3, 132 * 16, 128),
)
# With so few elements of a row a thread does with 128 registers, and twice as many warps run together.
FEW_ELEMENTS = 12
# Longer rows leave no registers for the sums over tokens.
MAX_FUSED_CHANNELS = 6144


# Kernels.


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
    values = load_row(row_address(x, row, tokens, x_b, x_n), live, C, CHUNK, CHUNKS, "")
    update = load_row(row_address(y, row, tokens, y_b, y_n), live, C, CHUNK, CHUNKS, "")
    if GATE != ABSENT:
        at_gate = vector_address(gate, GATE, group, groups, row, tokens, gate_b, gate_r)
        gates = load_row(at_gate, live, C, CHUNK, CHUNKS, "evict_last")
        gated = ()
        for i in tl.static_range(CHUNKS):
            gated = append(gated, gates[i] * update[i])
        update = gated
    rounded = ()
    for i in tl.static_range(CHUNKS):
        value = (values[i] + update[i]).to(residual.dtype.element_ty)
        store_chunk(residual + row.to(tl.int64) * C, value, live, i, C, CHUNK)
        rounded = append(rounded, value.to(tl.float32))
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
    token, or None. HOIST: whether the factor and the gate of the group stay in registers.
    """
    group = tl.program_id(0) // programs
    first = tl.program_id(0) - group * programs
    group_scale = group_address(scale, group, groups, scale_b, scale_r) if SCALE == GROUP else None
    if HOIST:
        factor = load_factor(group_scale, weight, None, C, CHUNK, CHUNKS)
        if dy is not None and GATE == GROUP:
            gates = load_row(group_address(gate, group, groups, gate_b, gate_r), None, C, CHUNK, CHUNKS, "evict_last")
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
                total = append(total, before[i] + direct[i])
            before = total
        for i in tl.static_range(CHUNKS):
            store_chunk(dx + row.to(tl.int64) * C, before[i], live, i, C, CHUNK)
        if dy is not None:
            if GATE == TOKEN or not HOIST:
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
                added = append(added, gate_sum[i] + product)
            gate_sum = added
    if PLAIN != FACTORED:
        store_sums(sums, plain, PLAIN, SLOTS, C, CHUNK)
    store_sums(sums, factored, FACTORED, SLOTS, C, CHUNK)
    store_sums(sums, unit_sum, UNIT, SLOTS, C, CHUNK)
    store_sums(sums, gate_sum, GATED, SLOTS, C, CHUNK)


# Launchers.


def forward(
    keep: bool,
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x' = x + gate * y and ``modulate`` of it, [B, N, C] contiguous, and mean and rstd as ``modulate`` does."""
    vector, elements, _, _, _ = config or CONFIGS[0]
    batch, tokens, channels = x.shape
    residual = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    out = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
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
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, y, gate, scale, shift, weight and bias, each contiguous in its tensor's dtype.

    dresidual, dout: of x' (None for 0) and of the modulated x'. wanted: which of the last five to compute; the others
    are empty, as are dy without a gate, which is dx, and that of a shift per token, which is dout.
    """
    config = config or BACKWARD_CONFIGS[0]
    batch, tokens, channels = residual.shape
    dx = torch.empty((batch, tokens, channels), dtype=residual.dtype, device=residual.device)
    dy = None if gate is None else torch.empty((batch, tokens, channels), dtype=y.dtype, device=y.device)
    tile = tile_for(channels, config.vector, config.elements, 1)
    warps, registers = config.together(tile)
    wide = channels > MAX_FUSED_CHANNELS
    groups = group_rows(residual, gate, scale, shift)
    gates, scales, shifts = as_vector(gate, tokens), as_vector(scale, tokens), as_vector(shift, tokens)
    per_token, gate_per_token = scales.kind == TOKEN.value, gates.kind == TOKEN.value
    token_vectors = (scale if per_token else None, gate if gate_per_token else None)
    stages = stages_for(config.stages, tile, dresidual, dout, residual, y, *token_vectors)
    dgate, dscale = gradient(gate, wanted[0]), gradient(scale, wanted[1])
    dshift = gradient(shift, wanted[2] and shifts.kind != TOKEN.value)
    dweight, dbias = gradient(weight, wanted[3]), gradient(bias, wanted[4])
    of_vectors = (
        or_empty(dscale, residual), or_empty(dshift, residual), or_empty(dweight, residual), or_empty(dbias, residual)
    )  # fmt: skip
    if residual.numel() == 0:
        for grad in (*of_vectors, of_gate := or_empty(dgate, residual)):
            grad.zero_()
        return dx, or_empty(dy, residual), of_gate, *of_vectors
    dresidual, dout, residual, y = unit_stride(dresidual), unit_stride(dout), unit_stride(residual), unit_stride(y)
    weight, bias = unit_stride(weight), unit_stride(bias)
    slots = slots_for(
        plain=dshift is not None,
        factored=dbias is not None or (dscale is not None and bias is not None and not per_token),
        unit=dweight is not None or (dscale is not None and not per_token),
        gate=dgate is not None and not gate_per_token and not wide,
        scale_per_token=per_token,
    )
    kept = Slots() if wide else slots  # the sums that the kernel keeps beside dx
    tiles = triton.cdiv(groups.rows, tile.rows)
    programs = programs_for(groups.per_sample, tiles, warps // tile.warps) if kept.total else triton.cdiv(tiles, 4)
    sums = torch.empty((groups.total * programs, kept.total, channels), dtype=torch.float32, device=dx.device)
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
            GATE=gates.kind, SCALE=scales.kind, SLOTS=kept.total, **kept.constants,
            num_warps=tile.warps, maxnreg=registers,
        )  # fmt: skip
        if wide and slots.total:
            sums, programs = sums_by_columns(dout, residual, scales, or_none(mean), rstd, groups, slots)
        if slots.total:
            gate_sums = dgate if slots.gate >= 0 else None
            vectors = (None if per_token else dscale, dshift, gate_sums, dweight, dbias)
            finish(sums, slots, groups, programs, scales, weight, bias, *vectors)
    if wide and gate is not None:
        return dx, *gate_alone.backward(dx, y, gate, wanted[0]), *of_vectors
    return dx, or_empty(dy, residual), or_empty(dgate, residual), *of_vectors


def specializations() -> Iterator[Specialization]:
    """List what the launchers compile: every CONFIG at a width held whole and in parts, the default at one more."""
    unaligned = ("tokens", "groups", "rows", "programs")
    vectors = dict.fromkeys(("gate", "scale", "shift", "weight", "bias", "mean", "rstd", "sums"), "*fp32")
    activations = ("x", "y", "out", "residual", "dout", "dresidual", "dx", "dy")
    strided = (*activations, "gate", "scale", "shift")
    types = {
        **vectors,
        **dict.fromkeys(activations, "*bf16"),
        **dict.fromkeys(unaligned, "i32"),
        **{f"{name}_{axis}": "i32" for name in strided for axis in "bnr"},
        "eps": "fp32",
    }
    group = {"GATE": GROUP.value, "SCALE": GROUP.value, "SHIFT": GROUP.value}
    plain: dict[str, Any] = {"weight": None, "bias": None}
    for number, config in enumerate(CONFIGS):
        for channels in (5120, 20480, 1536)[: 2 if number else 3]:
            tile = tile_for(channels, config.vector, config.elements, 1)
            yield Specialization(
                f"gate_residual_modulate_forward/{channels}/config {number}", gate_residual_modulate_forward, types,
                {**plain, **group, **tile.constants, "C": channels, "LAYER": True},
                {"num_warps": tile.warps, "enable_fp_fusion": False}, unaligned,
            )  # fmt: skip
    for number, config in enumerate(BACKWARD_CONFIGS):
        for channels in (5120, 12288, 1536)[: 2 if number else 3]:
            tile = tile_for(channels, config.vector, config.elements, 1)
            wide = channels > MAX_FUSED_CHANNELS
            limit: dict[str, Any] = {"maxnreg": config.together(tile)[1]}
            slots = Slots() if wide else slots_for(True, False, True, True, False)
            absent = dict.fromkeys(("y", "dy", "sums", "dgate", "dscale") if wide else ("dgate", "dscale"))
            yield Specialization(
                f"gate_residual_modulate_backward/{channels}/config {number}", gate_residual_modulate_backward, types,
                {
                    **plain, **absent, **tile.constants, **slots.constants, "SLOTS": slots.total, "C": channels,
                    "GATE": GROUP.value, "SCALE": GROUP.value, "LAYER": True,
                    "STAGES": 1 if tile.full else config.stages, "HOIST": not tile.full,
                },
                {"num_warps": tile.warps, **limit}, unaligned,
            )  # fmt: skip
