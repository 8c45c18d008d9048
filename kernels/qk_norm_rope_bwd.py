# mypy: allow-untyped-defs, allow-incomplete-defs, no-warn-unreachable
# mypy: disable-error-code="assignment, misc, var-annotated"
# (Tuples grow in loops that Triton unrolls.)
"""The gradients of RMSNorm of queries and keys with 3-D rotary position embedding; the forward is ``qk_norm_rope``.

    g = dy turned back by the angle of its token,  u = g * weight
    dx = r * u - x * r^3 * mean(u * x),    dweight = sum over tokens (and heads) of g * x * r

One launch for q and one for k. A program walks over neighbouring rows, of which the next ones are on their way to
shared memory meanwhile, and counts its place in the video along instead of dividing for it. It sums its rows' share of
dweight in fp32, and a second kernel adds these partial sums in a fixed order: reruns agree bitwise, on any GPU.

All arithmetic is in fp32; dx and dweight are rounded once. Bound by memory: x and dy are read once, dx is written.
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
    SIZES,
    Angles,
    angles_at,
    constants_of,
    load_pairs,
    load_weight,
    pairs_of,
    place_of,
    shapes,
    specialize,
    store_pairs,
    strides_of,
    tables_of,
)


class Config(NamedTuple):
    """How rows are given to threads.

    elements: the most elements of a row that a thread holds, which sets the warps of a program. registers: the most of
    a thread, for 16-bit types, which say how many programs run together. stages: rows of a program in flight, one of
    them in registers.
    """

    elements: int
    registers: int
    stages: int


CONFIGS = (Config(20, 128, 3), Config(24, 168, 3), Config(24, 232, 4), Config(20, 128, 4))
SMS, REGISTERS = 132, 65536  # of an H200


# Kernels.


@triton.jit
def add_both(a, b, c, d):
    """Add two pairs."""
    return a + c, b + d


@triton.jit
def row_sums(x, y, ACROSS: tl.constexpr):
    """Sum x and y [CHUNK, HALF] as ``row_sum`` does, in one exchange between warps."""
    x, y = tl.reduce((x, y), 1, add_both, keep_dims=True)
    if ACROSS:
        x, y = tl.reduce((x, y), 0, add_both, keep_dims=True)
    return x, y


@triton.jit
def turn_back(a, b, cos, sin, ROPE: tl.constexpr):
    """Turn the gradient of rotated pairs back to that of the pairs before, in fp32."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    if ROPE:
        a, b = a * cos + b * sin, b * cos - a * sin
    return a, b


@triton.jit
def next_place(token, t, h, w, inside, tokens, h_extent, w_extent):
    """Step to the next token, and to the next place if this token was of the video; behind the last to the first."""
    token += 1
    w += inside.to(tl.int32)
    h += (w == w_extent).to(tl.int32)
    w = tl.where(w == w_extent, 0, w)
    t += (h == h_extent).to(tl.int32)
    h = tl.where(h == h_extent, 0, h)
    wraps = token == tokens
    return tl.where(wraps, 0, token), tl.where(wraps, 0, t), tl.where(wraps, 0, h), tl.where(wraps, 0, w), wraps


@triton.jit(do_not_specialize=(*SIZES, "programs"))
def qk_norm_rope_backward(
    dy_ptr, x_ptr, dx_ptr, weight_ptr, partial_ptr, t_ptr, h_ptr, w_ptr,
    rows, tokens, t_extent, h_extent, w_extent, before, programs,
    dy_batch, dy_token, dy_head, dy_feature, x_batch, x_token, x_head, x_feature, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, CHUNK: tl.constexpr,
    T_PAIRS: tl.constexpr, H_PAIRS: tl.constexpr, W_PAIRS: tl.constexpr,
    ACROSS: tl.constexpr, INTERLEAVED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store dx of q or k, contiguous, for one of ``programs`` runs of rows, and their sum of dweight as a partial."""
    program = tl.program_id(0)
    CHUNKS: tl.constexpr = (HEADS + CHUNK - 1) // CHUNK
    COUNT: tl.constexpr = HEADS * DIM if ACROSS else DIM
    NORM: tl.constexpr = weight_ptr is not None
    SUM: tl.constexpr = partial_ptr is not None
    ROPE: tl.constexpr = t_ptr is not None
    weight, sums = (), ()
    if NORM:
        weight = load_weight(weight_ptr, HEADS, DIM, HALF, CHUNK, CHUNKS, ACROSS, INTERLEAVED)
    if SUM:
        for _ in tl.static_range(CHUNKS if ACROSS else 1):
            sums = sums + ((tl.zeros((CHUNK, HALF), tl.float32), tl.zeros((CHUNK, HALF), tl.float32)),)
    share = tl.cdiv(rows, programs)
    first = program * share
    batch, token = first // tokens, first % tokens
    videos = t_extent * h_extent * w_extent
    t, h, w = place_of(tl.minimum(tl.maximum(token - before, 0), videos), h_extent, w_extent)
    inside = (token >= before) & (token < before + videos)
    if ROPE:
        cos_ahead, sin_ahead = angles_at(
            t, h, w, inside, t_ptr, h_ptr, w_ptr, t_extent, h_extent, w_extent, HALF, T_PAIRS, H_PAIRS, W_PAIRS
        )
    for i in tl.range(0, tl.minimum(share, rows - first), num_stages=STAGES):
        dy_row = dy_ptr + batch.to(tl.int64) * dy_batch + token.to(tl.int64) * dy_token
        x_row = x_ptr + batch.to(tl.int64) * x_batch + token.to(tl.int64) * x_token
        dx_row = dx_ptr + (first + i).to(tl.int64) * (HEADS * DIM)
        cos, sin = 1.0, 0.0
        if ROPE:
            cos, sin = cos_ahead[None, :], sin_ahead[None, :]
        token, t, h, w, wraps = next_place(token, t, h, w, inside, tokens, h_extent, w_extent)
        batch += wraps.to(tl.int32)
        inside = (token >= before) & (token < before + videos)
        if ROPE:
            cos_ahead, sin_ahead = angles_at(
                t, h, w, inside, t_ptr, h_ptr, w_ptr, t_extent, h_extent, w_extent, HALF, T_PAIRS, H_PAIRS, W_PAIRS
            )
        grads, values = (), ()
        for j in tl.static_range(CHUNKS):
            a, b = load_pairs(dy_row, dy_head, dy_feature, j * CHUNK, HEADS, DIM, HALF, CHUNK, INTERLEAVED)
            grads = grads + (turn_back(a, b, cos, sin, ROPE),)
            if NORM:
                a, b = load_pairs(x_row, x_head, x_feature, j * CHUNK, HEADS, DIM, HALF, CHUNK, INTERLEAVED)
                values = values + ((a.to(tl.float32), b.to(tl.float32)),)
        r, pull = 1.0, 0.0
        if NORM and ACROSS:
            square = tl.zeros((CHUNK, HALF), tl.float32)
            product = tl.zeros((CHUNK, HALF), tl.float32)
            for j in tl.static_range(CHUNKS):
                a, b = values[j]
                square += a * a + b * b
                product += grads[j][0] * weight[j][0].to(tl.float32) * a + grads[j][1] * weight[j][1].to(tl.float32) * b
            square, product = row_sums(square, product, ACROSS)
            r = tl.rsqrt(square / COUNT + eps)
            pull = product * (r * r * r) / COUNT
        added = ()
        for j in tl.static_range(CHUNKS):
            ga, gb = grads[j]
            if NORM:
                a, b = values[j]
                ua = ga * weight[j if ACROSS else 0][0].to(tl.float32)
                ub = gb * weight[j if ACROSS else 0][1].to(tl.float32)
                if not ACROSS:
                    square, product = row_sums(a * a + b * b, ua * a + ub * b, ACROSS)
                    r = tl.rsqrt(square / COUNT + eps)
                    pull = product * (r * r * r) / COUNT
                if SUM:
                    if ACROSS:
                        added = added + ((sums[j][0] + ga * a * r, sums[j][1] + gb * b * r),)
                    else:
                        sums = ((sums[0][0] + ga * a * r, sums[0][1] + gb * b * r),)
                ga, gb = r * ua - pull * a, r * ub - pull * b
            store_pairs(dx_row, ga, gb, None, 1, j * CHUNK, HEADS, DIM, HALF, CHUNK, INTERLEAVED)
        if SUM and ACROSS:
            sums = added
    if SUM:
        if ACROSS:
            partial_ptr += program.to(tl.int64) * (HEADS * DIM)
            for j in tl.static_range(CHUNKS):
                store_pairs(
                    partial_ptr, sums[j][0], sums[j][1], None, 1, j * CHUNK, HEADS, DIM, HALF, CHUNK, INTERLEAVED
                )
        else:
            a, b = tl.sum(sums[0][0], axis=0, keep_dims=True), tl.sum(sums[0][1], axis=0, keep_dims=True)
            store_pairs(partial_ptr + program * DIM, a, b, None, 1, 0, 1, DIM, HALF, 1, INTERLEAVED)


@triton.jit
def add_partials(partial_ptr, out_ptr, first, programs, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum COLUMNS columns of partial sums [programs, length], each column in a fixed order."""
    column = first + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        at = partial_ptr + row.to(tl.int64) * length + column[None, :]
        total += tl.load(at, mask=(row < programs) & (column < length)[None, :], other=0.0)
    tl.store(out_ptr + column, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=column < length)


@triton.jit(do_not_specialize=("q_programs", "k_programs"))
def qk_norm_rope_weight_gradient(
    q_partial, k_partial, q_out, k_out, q_programs, k_programs, q_length, k_length,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum the partial sums of the weights' gradients; a weight without a gradient has None and length 0."""
    first = tl.program_id(0) * COLUMNS
    q_columns = tl.cdiv(q_length, COLUMNS) * COLUMNS
    if q_partial is not None:
        if first < q_columns:
            add_partials(q_partial, q_out, first, q_programs, q_length, ROWS, COLUMNS)
    if k_partial is not None:
        if first >= q_columns:
            add_partials(k_partial, k_out, first - q_columns, k_programs, k_length, ROWS, COLUMNS)


# Launchers.

PARTIAL_TILE = {"ROWS": 64, "COLUMNS": 32}


def _backward_constants(
    heads: int, dim: int, size: int, interleaved: bool, config: Config
) -> tuple[int, int, dict[str, int]]:
    """Return the warps, the most registers of a thread and the constexprs of a backward of q or k."""
    warps, chunk = shapes(heads, dim, size, interleaved, config.elements)
    # Rows of x and of dy in flight, one of each in registers.
    stages = max(1, min(config.stages, 1 + IN_FLIGHT // (2 * heads * dim * size)))
    # Features half a head apart are loads of their own, and so are their addresses.
    wanted = config.registers if interleaved else config.registers + 40
    registers = min(wanted if size == 2 else 255, REGISTERS // (32 * warps))
    return warps, registers, {"HEADS": heads, "CHUNK": chunk, "STAGES": stages}


def backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_angles: Angles | None,
    k_angles: Angles | None,
    across: bool,
    eps: float,
    interleaved: bool,
    q_sums: bool,
    k_sums: bool,
    config: Config = CONFIGS[0],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the contiguous gradients of q and k and, where asked for by q_sums and k_sums, those of the weights."""
    shared = constants_of(q.shape[3], pairs_of(q_angles), across, interleaved)
    parts = []
    with on_device(q):
        for dy, x, weight, angles, sums in (
            (dq_out, q, q_weight, q_angles, q_sums), (dk_out, k, k_weight, k_angles, k_sums)
        ):  # fmt: skip
            parts.append(_backward_of(dy, x, weight, angles, sums, eps, shared, config))
        (dq, dq_weight, q_partial), (dk, dk_weight, k_partial) = parts
        shapes = [(0, 0) if each is None else tuple(each.shape) for each in (q_partial, k_partial)]
        if any(length for _, length in shapes):
            grid = (sum(triton.cdiv(length, PARTIAL_TILE["COLUMNS"]) for _, length in shapes),)
            (q_programs, q_length), (k_programs, k_length) = shapes
            qk_norm_rope_weight_gradient[grid](
                q_partial, k_partial, dq_weight, dk_weight, q_programs, k_programs, q_length, k_length,
                **PARTIAL_TILE, num_warps=4,
            )  # fmt: skip
    return dq, dk, dq_weight, dk_weight


def _programs(rows: int, together: int) -> int:
    """Share rows among the programs that run together, or fewer where that makes no run longer."""
    return triton.cdiv(rows, triton.cdiv(rows, together))


def _backward_of(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    angles: Angles | None,
    sums: bool,
    eps: float,
    constants: dict[str, Any],
    config: Config,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradient of q or k, room for its weight's where asked for, and the partial sums of that, or None."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device) if weight is not None and sums else None
    if x.numel() == 0:
        return dx, None if dweight is None else dweight.zero_(), None
    batch, tokens, heads, dim = x.shape
    warps, registers, rest = _backward_constants(heads, dim, x.element_size(), constants["INTERLEAVED"], config)
    rows = batch * tokens
    programs = _programs(rows, SMS * max(1, REGISTERS // (32 * warps * registers)))
    partial = None
    if dweight is not None:
        partial = torch.empty((programs, len(dweight)), dtype=torch.float32, device=x.device)
    tables, extents = tables_of(angles)
    qk_norm_rope_backward[(programs,)](
        dy, x, dx, None if weight is None else weight.contiguous(), partial, *tables, rows, tokens, *extents, programs,
        *strides_of(dy), *strides_of(x), eps, **constants, **rest, num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    return dx, dweight, partial


# Compiled ahead of time.


def specializations() -> Iterator[Specialization]:
    """List the kernels of the models that are measured: every CONFIG for Wan-14B, the default for the others."""
    for model, (heads, _, dim, pairs, across, interleaved, kind) in MODELS.items():
        for number, config in enumerate(CONFIGS if model == "wan-14b" else CONFIGS[:1]):
            size = 4 if kind == "fp32" else 2
            warps, registers, constants = _backward_constants(heads, dim, size, interleaved, config)
            constants |= constants_of(dim, pairs, across, interleaved)
            options = {"num_warps": warps, "maxnreg": registers}
            unaligned = (*SIZES, "programs")
            yield specialize(f"backward/{model}/{number}", qk_norm_rope_backward, kind, constants, options, unaligned)
    types = {"q_partial": "*fp32", "k_partial": "*fp32", "q_out": "*bf16", "k_out": "*bf16", "q_programs": "i32"}
    types |= {"k_programs": "i32", "q_length": "i32", "k_length": "i32"}
    unaligned = ("q_programs", "k_programs")
    yield Specialization(
        "weight_gradient", qk_norm_rope_weight_gradient, types, PARTIAL_TILE, {"num_warps": 4}, unaligned
    )
