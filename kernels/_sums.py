# mypy: allow-untyped-defs, allow-incomplete-defs
"""Sums over tokens, for the gradients of the vectors: what the backward kernels of ``modulate`` and ``gate`` share.

Every program leaves the sums over its own rows, fp32 [groups * programs, slots, C]; ``finish_sums`` adds them in a
fixed order and turns them into gradients. How many programs share a group depends on the sizes within a sample only, so
the gradients of a sample are the same bits in any batch; there are no atomics.

With u the normalised row, f = 1 + scale where the scale is per token and 1 elsewhere, the slots are, when asked for:
``plain`` sum(dy), ``factored`` sum(f dy), ``unit`` sum(f dy u), ``gate`` sum(dx' y). Where f = 1, ``plain`` is
``factored``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stattn.kernels._rows import TOKEN, Groups, Vector, row_address

# Programs that a walk over columns is shared out among, and the tile of each.
COLUMN_PROGRAMS, COLUMN_ROWS, COLUMN_WIDTH = 1056, 16, 256
# The tile of partial sums that a program of the second pass adds at once.
FINISH_ROWS, FINISH_WIDTH = 64, 32


class Slots(NamedTuple):
    """Where each sum lies among a program's; -1 when nobody asks for it."""

    plain: int = -1
    factored: int = -1
    unit: int = -1
    gate: int = -1

    @property
    def total(self) -> int:
        """How many sums a program leaves."""
        return max(self) + 1

    @property
    def of_norm(self) -> dict[str, int]:
        """The constants of a kernel without a gate."""
        return {"PLAIN": self.plain, "FACTORED": self.factored, "UNIT": self.unit}

    @property
    def constants(self) -> dict[str, int]:
        """The constants of a kernel with a gate."""
        return {**self.of_norm, "GATED": self.gate}


def slots_for(plain: bool, factored: bool, unit: bool, gate: bool, scale_per_token: bool) -> Slots:
    """Number the sums that are asked for."""
    numbers: list[int] = []
    used = 0
    for wanted in (plain and scale_per_token, factored or (plain and not scale_per_token), unit, gate):
        numbers.append(used if wanted else -1)
        used += wanted
    if plain and not scale_per_token:
        numbers[0] = numbers[1]
    return Slots(*numbers)


@lru_cache(maxsize=1024)
def programs_for(groups: int, tiles: int, at_once: int) -> int:
    """Choose how many programs walk over the ``tiles`` tiles of a group.

    groups: of a sample. at_once: programs that the GPU runs together. The longest program decides; every program costs
    about two tiles more, for its vectors and its sums.
    """

    def time(programs: int) -> int:
        return -(-groups * programs // at_once) * (-(-tiles // programs) + 2)

    return min(range(1, min(tiles, max(1, 4 * at_once // groups)) + 1), key=time)


# Kernels.


@triton.jit
def store_sums(sums, row, SLOT: tl.constexpr, SLOTS: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
    """Leave the sum over the rows of each chunk as one slot of a program."""
    if SLOT >= 0:
        address = sums + (tl.program_id(0).to(tl.int64) * SLOTS + SLOT) * C
        for i in tl.static_range(len(row)):
            cols = i * CHUNK + tl.arange(0, CHUNK)
            tl.store(address + cols, tl.sum(row[i], 0), mask=cols < C)


@triton.jit(do_not_specialize=["tokens", "rows", "programs"])
def sum_columns(
    dy, x, scale, mean, rstd, sums, tokens, rows, programs, dy_b, dy_n, x_b, x_n, scale_b, scale_r,
    C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, PLAIN: tl.constexpr,
    FACTORED: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Sum WIDTH columns of dy, f dy and f dy u over a program's rows. scale: per token, or None."""
    BLOCKS: tl.constexpr = (C + WIDTH - 1) // WIDTH
    program = tl.program_id(0) // BLOCKS
    cols = (tl.program_id(0) - program * BLOCKS) * WIDTH + tl.arange(0, WIDTH)[None, :]
    group = program // programs
    plain = tl.zeros([ROWS, WIDTH], tl.float32)
    factored = tl.zeros([ROWS, WIDTH], tl.float32)
    unit = tl.zeros([ROWS, WIDTH], tl.float32)
    for tile in range(program - group * programs, tl.cdiv(rows, ROWS), programs):
        local = tile * ROWS + tl.arange(0, ROWS)[:, None]
        row = group * rows + local
        mask = (local < rows) & (cols < C)
        grad = tl.load(row_address(dy, row, tokens, dy_b, dy_n) + cols, mask=mask, other=0.0).to(tl.float32)
        plain += grad
        if scale is not None:
            at = row_address(scale, row, tokens, scale_b, scale_r) + cols
            grad *= 1.0 + tl.load(at, mask=mask, other=0.0).to(tl.float32)
        factored += grad
        if UNIT >= 0:
            value = tl.load(row_address(x, row, tokens, x_b, x_n) + cols, mask=mask, other=0.0).to(tl.float32)
            if mean is not None:
                value -= tl.load(mean + row, mask=local < rows, other=0.0)
            unit += grad * (value * tl.load(rstd + row, mask=local < rows, other=0.0))
    flat = tl.reshape(cols, [WIDTH])
    address = sums + program.to(tl.int64) * (SLOTS * C) + flat
    if PLAIN >= 0 and PLAIN != FACTORED:
        tl.store(address + PLAIN * C, tl.sum(plain, 0), mask=flat < C)
    if FACTORED >= 0:
        tl.store(address + FACTORED * C, tl.sum(factored, 0), mask=flat < C)
    if UNIT >= 0:
        tl.store(address + UNIT * C, tl.sum(unit, 0), mask=flat < C)


@triton.jit
def _total(
    sums, scale, first, count, programs, groups, scale_b, scale_g, cols,
    SLOT: tl.constexpr, SLOTS: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add ``count`` programs' sums from ``first`` on, times 1 + scale of their group when a scale is given."""
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(0, count, ROWS, num_stages=3):
        local = start + tl.arange(0, ROWS)[:, None]
        mask = (local < count) & (cols[None, :] < C)
        part = first + local
        values = tl.load(sums + (part.to(tl.int64) * SLOTS + SLOT) * C + cols[None, :], mask=mask, other=0.0)
        if scale is not None:
            group = part // programs
            sample = group // groups
            at = scale + sample.to(tl.int64) * scale_b + (group - sample * groups).to(tl.int64) * scale_g
            values *= 1.0 + tl.load(at + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        total += values
    return tl.sum(total, 0)


@triton.jit
def _store_row(out, row, value, cols, C: tl.constexpr):
    tl.store(out + row.to(tl.int64) * C + cols, value.to(out.dtype.element_ty), mask=cols < C)


@triton.jit(do_not_specialize=["parts", "programs", "groups", "scale_rows", "shift_rows", "gate_rows"])
def finish_sums(
    sums, scale, weight, bias, dscale, dshift, dgate, dweight, dbias,
    parts, programs, groups, scale_rows, shift_rows, gate_rows, scale_b, scale_g,
    C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, PLAIN: tl.constexpr,
    FACTORED: tl.constexpr, UNIT: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Turn programs' sums into gradients: a program for WIDTH columns of one row of one of them.

    parts: how many programs left sums. scale: per sample or frame, or None. A gradient that is None is not wanted; the
    rows of the others follow one another: dscale, dshift, dgate, dweight, dbias.
    """
    BLOCKS: tl.constexpr = (C + WIDTH - 1) // WIDTH
    task = tl.program_id(0) // BLOCKS
    cols = (tl.program_id(0) - task * BLOCKS) * WIDTH + tl.arange(0, WIDTH)
    if dscale is not None:
        if task < scale_rows:
            run = parts // scale_rows
            value = _total(sums, None, task * run, run, programs, groups, 0, 0, cols, UNIT, SLOTS, C, ROWS, WIDTH)
            if weight is not None:
                value *= tl.load(weight + cols, mask=cols < C, other=0.0).to(tl.float32)
            if bias is not None:
                plain = _total(
                    sums, None, task * run, run, programs, groups, 0, 0, cols, FACTORED, SLOTS, C, ROWS, WIDTH
                )
                value += plain * tl.load(bias + cols, mask=cols < C, other=0.0).to(tl.float32)
            _store_row(dscale, task, value, cols, C)
        task -= scale_rows
    if dshift is not None:
        if (task >= 0) & (task < shift_rows):
            run = parts // shift_rows
            value = _total(sums, None, task * run, run, programs, groups, 0, 0, cols, PLAIN, SLOTS, C, ROWS, WIDTH)
            _store_row(dshift, task, value, cols, C)
        task -= shift_rows
    if dgate is not None:
        if (task >= 0) & (task < gate_rows):
            run = parts // gate_rows
            value = _total(sums, None, task * run, run, programs, groups, 0, 0, cols, GATED, SLOTS, C, ROWS, WIDTH)
            _store_row(dgate, task, value, cols, C)
        task -= gate_rows
    if dweight is not None:
        if task == 0:
            value = _total(sums, scale, 0, parts, programs, groups, scale_b, scale_g, cols, UNIT, SLOTS, C, ROWS, WIDTH)
            _store_row(dweight, task, value, cols, C)
        task -= 1
    if dbias is not None:
        if task == 0:
            value = _total(
                sums, scale, 0, parts, programs, groups, scale_b, scale_g, cols, FACTORED, SLOTS, C, ROWS, WIDTH
            )
            _store_row(dbias, task, value, cols, C)


# Launchers.


def sums_by_columns(
    dy: Tensor, x: Tensor, scale: Vector, mean: Tensor | None, rstd: Tensor, groups: Groups, slots: Slots
) -> tuple[Tensor, int]:
    """Take the sums of a backward by columns. Returns them and how many programs a group has."""
    batch, tokens, channels = x.shape
    blocks = triton.cdiv(channels, COLUMN_WIDTH)
    tiles = triton.cdiv(groups.rows, COLUMN_ROWS)
    programs = programs_for(groups.per_sample * blocks, tiles, COLUMN_PROGRAMS)
    sums = torch.empty((groups.total * programs, slots.total, channels), dtype=torch.float32, device=x.device)
    per_token = scale.kind == TOKEN.value
    sum_columns[(groups.total * programs * blocks,)](
        dy, x, scale.tensor if per_token else None, mean, rstd, sums, tokens, groups.rows, programs,
        dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), scale.stride_b, scale.stride_r,
        C=channels, ROWS=COLUMN_ROWS, WIDTH=COLUMN_WIDTH, SLOTS=slots.total, **slots.of_norm, num_warps=4,
    )  # fmt: skip
    return sums, programs


def finish(
    sums: Tensor,
    slots: Slots,
    groups: Groups,
    programs: int,
    scale: Vector,
    weight: Tensor | None,
    bias: Tensor | None,
    dscale: Tensor | None = None,
    dshift: Tensor | None = None,
    dgate: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
) -> None:
    """Add programs' sums and write the gradients that are given, each contiguous."""
    channels = sums.shape[2]
    rows = [0 if out is None else out.numel() // channels for out in (dscale, dshift, dgate, dweight, dbias)]
    per_group = scale.tensor is not None and scale.kind != TOKEN.value
    finish_sums[(sum(rows) * triton.cdiv(channels, FINISH_WIDTH),)](
        sums, scale.tensor if per_group else None, weight, bias, dscale, dshift, dgate, dweight, dbias,
        groups.total * programs, programs, groups.per_sample, *rows[:3], scale.stride_b, scale.stride_r,
        C=channels, ROWS=FINISH_ROWS, WIDTH=FINISH_WIDTH, SLOTS=slots.total, **slots.constants, num_warps=4,
    )  # fmt: skip
