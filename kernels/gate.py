# mypy: allow-untyped-defs, allow-incomplete-defs
"""Gated residual connections, forward and backward: x' = x + gate * y. With the norm that follows: ``gate_modulate``.

    dx = dx'             dy = gate * dx'             dgate = sum(dx' * y)

The sum runs over the tokens of a sample or of a frame. Everything is computed in fp32, without fused multiply-adds in
the forward: x' is the same bits as x + gate * y in eager fp32, rounded once.

Bound by memory: 3 passes over the activation forward (x, y, x') and 3 backward (dx', y, dy; dx is dx' itself). A
program takes a block of columns: forward of one row, which asks for no masks where blocks divide the row; backward of
many rows, for which it reads its part of the gate once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stattn.kernels._compile import Specialization
from stattn.kernels._device import on_device
from stattn.kernels._rows import (
    GROUP,
    TOKEN,
    append,
    as_vector,
    gradient,
    group_address,
    group_rows,
    or_empty,
    or_none,
    row_address,
    rows_of,
    unit_stride,
)
from stattn.kernels._sums import Slots, finish, programs_for


class Forward(NamedTuple):
    """vector: consecutive elements of a thread. width: the most columns of a program. steps: tiles of a program."""

    vector: int
    width: int
    steps: int


class Backward(NamedTuple):
    """vector, width: as in ``Forward``. stages: tiles in flight. warps: that the GPU is meant to run together."""

    vector: int
    width: int
    stages: int
    warps: int


# H200, Wan-14B and Wan-1.3B, us: 528 and 71.4; 626 and 83.6; not measured; 634 and 83.3. A copy: 542 and 72.9.
CONFIGS = (Forward(8, 1024, 1), Forward(4, 512, 1), Forward(8, 1024, 4), Forward(4, 1024, 1))
BACKWARD_CONFIGS = (
    Backward(8, 1024, 3, 132 * 32),
    Backward(8, 1024, 2, 132 * 32),
    Backward(8, 1024, 3, 132 * 16),
    Backward(4, 1024, 3, 132 * 32),
)


# Kernels.


@triton.jit
def _store_tiles(out, tiles, group, first, rows, cols, C: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    for step in tl.static_range(len(tiles)):
        local = rows_of(first + step, ROWS)
        row = group * rows + local
        value = tiles[step].to(out.dtype.element_ty)
        mask = None if WHOLE else (local < rows) & (cols < C)
        tl.store(out + row.to(tl.int64) * C + cols, value, mask=mask)


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
    WHOLE: tl.constexpr = ROWS * STEPS == 1 and C % WIDTH == 0  # nothing to mask: as many programs as rows
    total = ()
    if GATE == GROUP:
        at_gate = group_address(gate, group, groups, gate_b, gate_r) + cols
        shared = tl.load(at_gate, mask=cols < C, other=0.0, eviction_policy="evict_last").to(tl.float32)
    for step in tl.static_range(STEPS):
        local = rows_of(first + step, ROWS)
        row = group * rows + local
        mask = None if WHOLE else (local < rows) & (cols < C)
        at_x = row_address(x, row, tokens, x_b, x_n) + cols
        at_y = row_address(y, row, tokens, y_b, y_n) + cols
        residual = tl.load(at_x, mask=mask, eviction_policy="evict_last").to(tl.float32)
        update = tl.load(at_y, mask=mask, eviction_policy="evict_last").to(tl.float32)
        if GATE == TOKEN:
            at_row = row_address(gate, row, tokens, gate_b, gate_r) + cols
            update = tl.load(at_row, mask=mask).to(tl.float32) * update
        elif GATE == GROUP:
            update = shared * update
        total = append(total, residual + update)
    _store_tiles(out, total, group, first, rows, cols, C, ROWS, WHOLE)


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
        grad = tl.load(at_dout, mask=mask, other=0.0).to(tl.float32)
        if GATE == TOKEN:
            factor = tl.load(row_address(gate, row, tokens, gate_b, gate_r) + cols, mask=mask, other=0.0)
            factor = factor.to(tl.float32)
        tl.store(dy + row.to(tl.int64) * C + cols, (grad * factor).to(dy.dtype.element_ty), mask=mask)
        if dgate is not None or sums is not None:
            at_y = row_address(y, row, tokens, y_b, y_n) + cols
            grad = grad * tl.load(at_y, mask=mask, other=0.0).to(tl.float32)
        if dgate is not None:
            tl.store(dgate + row.to(tl.int64) * C + cols, grad.to(dgate.dtype.element_ty), mask=mask)
        total += grad
    if sums is not None:
        flat = tl.reshape(cols, [WIDTH])
        tl.store(sums + program.to(tl.int64) * C + flat, tl.sum(total, 0), mask=flat < C)


# Launchers.


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


def forward(x: Tensor, y: Tensor, gate: Tensor | None, config: Forward | None = None) -> Tensor:
    """Return x + gate * y, [B, N, C] contiguous, in x's dtype. Arguments as in ``stattn.reference.gate``.

    A tensor whose channels do not lie side by side is copied first.
    """
    vector, width, steps = config or CONFIGS[0]
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


def backward(
    dout: Tensor, y: Tensor, gate: Tensor, wanted: bool, config: Backward | None = None
) -> tuple[Tensor, Tensor]:
    """Return dy and dgate of x + gate * y, each contiguous in its tensor's dtype; dx is dout.

    wanted: whether to compute dgate; it is empty otherwise.
    """
    vector, width, stages, warps = config or BACKWARD_CONFIGS[0]
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
    if kept.total:
        programs = programs_for(groups.per_sample * blocks, tiles, warps // block.warps)
    sums = torch.empty((groups.total * programs, kept.total, channels), dtype=torch.float32, device=y.device)
    with on_device(y):
        gate_residual_backward[(groups.total * programs * blocks,)](
            dout, y, gates.tensor, dy, None if kept.total else dgate, or_none(sums),
            tokens, groups.per_sample, groups.rows, programs, dout.stride(0), dout.stride(1), y.stride(0), y.stride(1),
            gates.stride_b, gates.stride_r,
            C=channels, ROWS=block.rows, WIDTH=block.width, STAGES=stages, GATE=gates.kind, num_warps=block.warps,
        )  # fmt: skip
        if kept.total:
            finish(sums, kept, groups, programs, as_vector(None, tokens), None, None, dgate=dgate)
    return dy, or_empty(dgate, y)


def specializations() -> Iterator[Specialization]:
    """List what the launchers compile for fp32 gates, per sample or frame: every CONFIG, the default at two widths."""
    unaligned = ("tokens", "groups", "rows", "programs")
    types = {
        **dict.fromkeys(("x", "y", "out", "dout", "dy"), "*bf16"),
        **dict.fromkeys(("gate", "sums"), "*fp32"),
        **dict.fromkeys(unaligned, "i32"),
        **{f"{name}_{axis}": "i32" for name in ("x", "y", "dout", "gate") for axis in "bnr"},
    }
    for number, config in enumerate(CONFIGS):
        for channels in (5120, 1536)[: 1 if number else 2]:
            block = block_for(channels, config.vector, config.width)
            shape = {"C": channels, "ROWS": block.rows, "WIDTH": block.width, "GATE": GROUP.value}
            yield Specialization(
                f"gate_residual_forward/{channels}/config {number}", gate_residual_forward, types,
                {**shape, "STEPS": config.steps}, {"num_warps": block.warps, "enable_fp_fusion": False}, unaligned,
            )  # fmt: skip
    for number, back in enumerate(BACKWARD_CONFIGS):
        for channels in (5120, 1536)[: 1 if number else 2]:
            block = block_for(channels, back.vector, back.width)
            shape = {"C": channels, "ROWS": block.rows, "WIDTH": block.width, "GATE": GROUP.value}
            yield Specialization(
                f"gate_residual_backward/{channels}/config {number}", gate_residual_backward, types,
                {**shape, "STAGES": back.stages, "dgate": None}, {"num_warps": block.warps}, unaligned,
            )  # fmt: skip
