# mypy: allow-untyped-defs, allow-incomplete-defs
"""Rows of channels in registers, and the vectors that act on them: what the kernels of ``modulate`` and ``gate`` share.

A program holds a tile of ROWS tokens as a tuple of CHUNKS tensors [ROWS, CHUNK], so that a row may have any number of
channels: 5,120 are five chunks of 1,024, not a block of 8,192. Only the last chunk is masked, and only if C asks for
it.

Tokens are numbered through the batch, row = sample * N + token. A *group* is a run of consecutive rows under one
vector: a sample, a frame, or, when no vector is per sample or per frame, all rows. A vector is an address, a stride per
sample and a stride per group (0 when it is per sample) or per token.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from stattn.kernels._device import IN_FLIGHT, check_count

# How a vector varies.
ABSENT, GROUP, TOKEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


# Kernels' parts.


@triton.jit
def append(row, chunk):
    """Add a chunk to a row."""
    return row + (chunk,)


@triton.jit
def rows_of(tile, ROWS: tl.constexpr):
    """Number the rows of a tile within their group: a scalar, or [ROWS, 1]."""
    if ROWS == 1:
        return tile
    else:
        return tile * ROWS + tl.arange(0, ROWS)[:, None]


@triton.jit
def sum_row(row):
    """Sum over the channels of a chunk: a scalar for one row, else [ROWS, 1]."""
    if row.shape[0] == 1:
        return tl.sum(row)
    else:
        return tl.sum(row, 1)[:, None]


@triton.jit
def row_address(base, row, tokens, stride_b, stride_n):
    """Give the addresses of rows; a sample's offset may pass 2^31 elements."""
    sample = row // tokens
    return base + sample.to(tl.int64) * stride_b + (row - sample * tokens).to(tl.int64) * stride_n


@triton.jit
def group_address(base, group, groups, stride_b, stride_g):
    """Give the address of a group's vector."""
    sample = group // groups
    return base + sample.to(tl.int64) * stride_b + (group - sample * groups).to(tl.int64) * stride_g


@triton.jit
def load_row(address, live, C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, POLICY: tl.constexpr):
    """Load rows as fp32, 0 outside. address: one, or [ROWS, 1]. live: None when all rows exist, else [ROWS, 1]."""
    ALL: tl.constexpr = live is None or len(address.shape) == 0
    row = ()
    for i in tl.static_range(CHUNKS):
        cols = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        if (i + 1) * CHUNK > C:
            mask = cols < C
            if not ALL:
                mask = mask & live
            chunk = tl.load(address + cols, mask=mask, other=0.0, eviction_policy=POLICY)
        elif not ALL:
            chunk = tl.load(address + cols, mask=live, other=0.0, eviction_policy=POLICY)
        else:
            chunk = tl.load(address + cols, eviction_policy=POLICY)
        row = append(row, chunk.to(tl.float32))
    return row


@triton.jit
def store_chunk(address, chunk, live, INDEX: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
    """Round chunk INDEX of rows to the type of the address and store it."""
    cols = INDEX * CHUNK + tl.arange(0, CHUNK)[None, :]
    value = chunk.to(address.dtype.element_ty)
    if (INDEX + 1) * CHUNK > C:
        mask = cols < C
        if live is not None:
            mask = mask & live
        tl.store(address + cols, value, mask=mask)
    elif live is not None:
        tl.store(address + cols, value, mask=live)
    else:
        tl.store(address + cols, value)


@triton.jit
def constant_row(VALUE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Give rows of one value."""
    row = ()
    for _ in tl.static_range(CHUNKS):
        row = append(row, tl.full([ROWS, CHUNK], VALUE, tl.float32))
    return row


@triton.jit
def vector_address(vector, KIND: tl.constexpr, group, groups, row, tokens, stride_b, stride_r):
    """Give the address of a vector for a group or, per token, for its rows [ROWS, 1]."""
    if KIND == GROUP:
        return group_address(vector, group, groups, stride_b, stride_r)
    else:
        return row_address(vector, row, tokens, stride_b, stride_r)


@triton.jit
def load_factor(scale, weight, live, C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Give (1 + scale) * weight, the factor of a normalised row; either address may be None, for 1."""
    factor = constant_row(1.0, 1, CHUNK, CHUNKS)
    if weight is not None:
        factor = load_row(weight, None, C, CHUNK, CHUNKS, "evict_last")
    if scale is not None:
        scales = load_row(scale, live, C, CHUNK, CHUNKS, "evict_last")
        scaled = ()
        for i in tl.static_range(CHUNKS):
            scaled = append(scaled, (1.0 + scales[i]) * factor[i])
        factor = scaled
    return factor


@triton.jit
def load_term(scale, shift, bias, live, C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Give bias * (1 + scale) + shift, the term of a normalised row; None stands for no scale, shift or bias."""
    term = constant_row(0.0, 1, CHUNK, CHUNKS)
    if bias is not None:
        factor = load_factor(scale, None, live, C, CHUNK, CHUNKS)
        biases = load_row(bias, None, C, CHUNK, CHUNKS, "evict_last")
        term = ()
        for i in tl.static_range(CHUNKS):
            term = append(term, biases[i] * factor[i])
    if shift is not None:
        shifts = load_row(shift, live, C, CHUNK, CHUNKS, "evict_last")
        if bias is not None:
            shifted = ()
            for i in tl.static_range(CHUNKS):
                shifted = append(shifted, term[i] + shifts[i])
            term = shifted
        else:
            term = shifts
    return term


@triton.jit
def store_modulated(
    address, unit, factor, term, TERM: tl.constexpr, live, C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    """Store unit * factor + term, rounded once. TERM: whether there is a term."""
    for i in tl.static_range(CHUNKS):
        value = unit[i] * factor[i]
        if TERM:
            value += term[i]
        store_chunk(address, value, live, i, C, CHUNK)


@triton.jit
def divide(total, C: tl.constexpr):
    """Divide by the number of channels as IEEE does: the mean of equal values is that value."""
    return tl.div_rn(total, tl.full([], C, tl.float32))


@triton.jit
def normalise(row, eps, LAYER: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Normalise rows. Returns them with their mean (0 for "rms") and 1 / sqrt(variance + eps).

    The variance is that of the row less its mean, read again from registers: an offset cancels before it is squared.
    """
    mean = 0.0
    if LAYER:
        total = row[0]
        for i in tl.static_range(1, CHUNKS):
            total += row[i]
        mean = divide(sum_row(total), C)
        centred = ()
        for i in tl.static_range(CHUNKS):
            chunk = row[i] - mean
            if (i + 1) * CHUNK > C:
                chunk = tl.where((i * CHUNK + tl.arange(0, CHUNK)[None, :]) < C, chunk, 0.0)
            centred = append(centred, chunk)
        row = centred
    square = row[0] * row[0]
    for i in tl.static_range(1, CHUNKS):
        square += row[i] * row[i]
    rstd = tl.rsqrt(divide(sum_row(square), C) + eps)
    unit = ()
    for i in tl.static_range(CHUNKS):
        unit = append(unit, row[i] * rstd)
    return unit, mean, rstd


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def sum_row_pair(a, b):
    """Sum over the channels of two chunks at once: scalars for one row, else [ROWS, 1]."""
    first, second = tl.reduce((a, b), 1, _add_pairs)
    if a.shape[0] == 1:
        return tl.sum(first), tl.sum(second)
    else:
        return first[:, None], second[:, None]


@triton.jit
def norm_backward(unit, grad, rstd, LAYER: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Give the gradient of rows from that of their normalised form: (g - mean(g) - unit mean(g unit)) rstd.

    "rms" has no mean(g). Both means are taken in one reduction.
    """
    first = grad[0]
    second = grad[0] * unit[0]
    for i in tl.static_range(1, CHUNKS):
        first += grad[i]
        second += grad[i] * unit[i]
    result = ()
    if LAYER:
        first_sum, second_sum = sum_row_pair(first, second)
        for i in tl.static_range(CHUNKS):
            result = append(result, (grad[i] - first_sum / C - unit[i] * (second_sum / C)) * rstd)
    else:
        second_sum = sum_row(second)
        for i in tl.static_range(CHUNKS):
            result = append(result, (grad[i] - unit[i] * (second_sum / C)) * rstd)
    return result


@triton.jit
def add_rows(a, b, CHUNKS: tl.constexpr):
    """Add two rows."""
    result = ()
    for i in tl.static_range(CHUNKS):
        result = append(result, a[i] + b[i])
    return result


@triton.jit
def multiply_rows(a, b, CHUNKS: tl.constexpr):
    """Multiply two rows."""
    result = ()
    for i in tl.static_range(CHUNKS):
        result = append(result, a[i] * b[i])
    return result


@triton.jit
def load_moments(mean, rstd, group, tile, rows, ROWS: tl.constexpr):
    """Load mean and rstd of a tile's rows, 0 for rows that do not exist. mean: None for "rms"."""
    local = rows_of(tile, ROWS)
    row_rstd = tl.load(rstd + group * rows + local, mask=local < rows, other=0.0)
    if mean is not None:
        return tl.load(mean + group * rows + local, mask=local < rows, other=0.0), row_rstd
    else:
        return row_rstd, row_rstd


@triton.jit
def normalised(row, mean, rstd, LAYER: tl.constexpr, CHUNKS: tl.constexpr):
    """Normalise rows by the moments that the forward kept."""
    result = ()
    for i in tl.static_range(CHUNKS):
        chunk = row[i]
        if LAYER:
            chunk = chunk - mean
        result = append(result, chunk * rstd)
    return result


@triton.jit
def modulated_backward(
    unit, grad, rstd, factor, at_scale, at_dscale, weight, bias, plain, factored, unit_sum, live,
    LAYER: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Take rows' gradient back through the modulation and the norm, and add them to the sums over tokens.

    factor: of these rows' group, unused when the scale is per token: at_scale is then its address, and at_dscale that
    of its gradient, or None. Returns the three sums (see ``_sums``) and the gradient of the rows before the norm.
    """
    if at_scale is not None:
        if at_dscale is not None:
            weights = load_factor(None, weight, None, C, CHUNK, CHUNKS)
            biases = load_term(None, None, bias, None, C, CHUNK, CHUNKS)
            for i in tl.static_range(CHUNKS):
                store_chunk(at_dscale, grad[i] * (unit[i] * weights[i] + biases[i]), live, i, C, CHUNK)
        plain = add_rows(plain, grad, CHUNKS)
        grad = multiply_rows(grad, load_factor(at_scale, None, live, C, CHUNK, CHUNKS), CHUNKS)
        factor = load_factor(None, weight, None, C, CHUNK, CHUNKS)
    factored = add_rows(factored, grad, CHUNKS)
    unit_sum = add_rows(unit_sum, multiply_rows(grad, unit, CHUNKS), CHUNKS)
    before = norm_backward(unit, multiply_rows(grad, factor, CHUNKS), rstd, LAYER, C, CHUNK, CHUNKS)
    return plain, factored, unit_sum, before


# Launchers' parts.


class Vector(NamedTuple):
    """A vector as kernels read it: its tensor (None when absent), its kind and its strides."""

    tensor: Tensor | None
    kind: int
    stride_b: int
    stride_r: int


class Groups(NamedTuple):
    """How rows fall into groups: how many there are, how many in a sample (1 for all rows as one), and rows in each."""

    total: int
    per_sample: int
    rows: int


@overload
def unit_stride(tensor: Tensor) -> Tensor: ...


@overload
def unit_stride(tensor: Tensor | None) -> Tensor | None: ...


def unit_stride(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor itself, or a copy when its channels do not lie side by side."""
    if tensor is None or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def group_rows(x: Tensor, *vectors: Tensor | None) -> Groups:
    """Find the groups of x [B, N, C] under vectors [B, C], [B, F, C] and [B, N, C].

    Raises ValueError for more tokens than kernels can number.
    """
    batch, tokens, _ = x.shape
    check_count(batch * tokens)
    present = [vector for vector in vectors if vector is not None]
    frames = [vector.shape[1] for vector in present if vector.dim() == 3 and vector.shape[1] != tokens]
    if frames:
        return Groups(batch * frames[0], frames[0], tokens // frames[0])
    if any(vector.dim() == 2 for vector in present):
        return Groups(batch, 1, tokens)
    return Groups(1, 1, batch * tokens)


def as_vector(vector: Tensor | None, tokens: int) -> Vector:
    """Describe a vector [B, C], [B, F, C] or [B, N, C]."""
    vector = unit_stride(vector)
    if vector is None:
        return Vector(None, ABSENT.value, 0, 0)
    if vector.dim() == 2:
        return Vector(vector, GROUP.value, vector.stride(0), 0)
    kind = TOKEN if vector.shape[1] == tokens else GROUP
    return Vector(vector, kind.value, vector.stride(0), vector.stride(1))


class Tile(NamedTuple):
    """How a program holds rows: ROWS of CHUNKS times CHUNK channels, by this many warps."""

    warps: int
    rows: int
    chunk: int
    chunks: int

    @property
    def full(self) -> bool:
        """Whether one row fills the registers, so that nothing may stay there from row to row."""
        return self.warps == 16 and self.chunk * self.chunks > 16 * 32 * 16

    @property
    def constants(self) -> dict[str, int]:
        """The constants of a kernel."""
        return {"CHUNK": self.chunk, "CHUNKS": self.chunks, "ROWS": self.rows}


def stages_for(stages: int, tile: Tile, *loaded: Tensor | None) -> int:
    """Return the stages of a loop whose tiles of the loaded tensors, one stage fewer, fit into shared memory."""
    size = tile.rows * tile.chunk * tile.chunks * sum(each.element_size() for each in loaded if each is not None)
    return 1 if tile.full else max(1, min(stages, 1 + IN_FLIGHT // size))


@lru_cache(maxsize=256)
def tile_for(channels: int, vector: int, elements: int, rows: int) -> Tile:
    """Choose the tile for rows of so many channels.

    vector: consecutive elements of a thread. elements: the most that a thread holds of one row, as long as sixteen
    warps are enough for that. rows: of one program; short rows share one by more, a row that fills it has it alone.
    """
    short = 4 * 32 * vector
    width = max(16, triton.next_power_of_2(channels))
    if width <= short:
        return Tile(4, rows * (short // width), width, 1)
    for warps in (1, 2, 4, 8, 16):
        chunks = -(-channels // (32 * warps * vector))
        if chunks * vector <= elements or warps == 16:
            break
    return Tile(warps, rows if warps < 16 else 1, 32 * warps * vector, chunks)


def moments(x: Tensor, norm: str, keep: bool) -> tuple[Tensor, Tensor]:
    """Make room for mean and rstd of the tokens of x [B, N, C]: fp32 [B, N], or empty where nothing is kept."""
    shape = tuple(x.shape[:2])
    mean = torch.empty(shape if keep and norm == "layer" else (0,), dtype=torch.float32, device=x.device)
    return mean, torch.empty(shape if keep else (0,), dtype=torch.float32, device=x.device)


def gradient(vector: Tensor | None, wanted: bool) -> Tensor | None:
    """Make room for a vector's gradient, contiguous; None when it is absent or not wanted."""
    if vector is None or not wanted:
        return None
    return torch.empty(tuple(vector.shape), dtype=vector.dtype, device=vector.device)


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Return the tensor, or one without elements: an operation in a graph returns tensors only."""
    return like.new_empty(0) if tensor is None else tensor


def or_none(tensor: Tensor) -> Tensor | None:
    """Return the tensor, or None when it has no elements: kernels take None for what is absent."""
    return tensor if tensor.numel() else None
