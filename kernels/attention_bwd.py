"""Attention over a video grid, backward: one kernel for dQ, one for dK and dV, none with atomics.

Scores are computed anew, box by box, and turned into P by the LSE of the forward pass; with delta = rowsum(dout * out)
- dLSE, from a kernel of its own::

    P = exp(S - LSE)       dS = P * (dout . v - delta)
    dQ = scale dS K        dK = scale dS^T Q        dV = P^T dout

dQ tiles the queries and walks the keys, as the forward pass does. dK and dV tile the keys and walk the queries; heads
that share keys (GQA) are added up by the same program. Sums are fp32 and in a fixed order: every gradient is bitwise
reproducible and independent of the batch. P and dS are rounded to the inputs' dtype before they are multiplied (fp32
inputs: three TF32 products each), gradients once. Bound by the tensor cores: seven products against the five of a
kernel that adds dQ up with atomics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from stattn.blocks import tile_count, transpose
from stattn.kernels import _walk as walking
from stattn.kernels._compile import Specialization
from stattn.kernels._device import on_device
from stattn.kernels.attention import (
    COUNTS,
    LOG2E,
    PRECISION,
    Config,
    Plan,
    list_arguments,
    make_plan,
    plan_arguments,
    shared_arguments,
    specializations_of,
    strides,
    wide,
)
from stattn.problem import Extras, Problem

DQ_CONFIGS = (
    Config(128, 64, 8, 3, (128,), 2, 1.0, 0),
    Config(64, 64, 4, 2, (128,), 2, 0.82),
    Config(64, 64, 4, 3, (16, 32, 64), 2, 1.0),
    Config(64, 32, 8, 2, (256,), 2, 1.0, 0),
    Config(16, 16, 2, 2, (16, 32, 64, 128, 256), 2, 0.15),
    Config(64, 32, 8, 1, (16, 32, 64, 128), 4, 1.0, 64),
    Config(16, 16, 8, 1, (256,), 4, 1.0),
    Config(16, 16, 2, 1, (16, 32, 64, 128), 4, 0.4),
)
DKDV_CONFIGS = (
    Config(128, 32, 8, 3, (128,), 2, 1.0, 0),
    Config(64, 32, 4, 3, (128,), 2, 0.95),
    Config(64, 64, 4, 2, (16, 32, 64), 2, 1.0),
    Config(64, 32, 8, 2, (256,), 2, 1.0, 0),
    Config(16, 16, 2, 2, (16, 32, 64, 128, 256), 2, 0.15),
    Config(64, 32, 8, 1, (16, 32, 64, 128), 4, 1.0, 0),
    Config(16, 16, 8, 1, (256,), 4, 1.0),
    Config(16, 16, 2, 1, (16, 32, 64, 128), 4, 0.4),
)
DELTA_ROWS = 64


@triton.jit(do_not_specialize=("tokens", "heads"))
def attention_delta(
    out, dout, dlse, delta, dout_batch, dout_token, dout_head, tokens, heads,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, ROWS)
    head = tl.program_id(0) // blocks % heads
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    row = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    exists = row < tokens
    out += (batch * tokens * heads + head) * DIM
    dout += batch * dout_batch + head.to(tl.int64) * dout_head
    left = walking.load_rows(out, row, heads * DIM, exists, DIM, WIDTH).to(tl.float32)
    right = walking.load_rows(dout, row, dout_token, exists, DIM, WIDTH).to(tl.float32)
    value = tl.sum(left * right, 1)
    place = (batch * heads + head) * tokens + row
    if dlse is not None:
        value -= tl.load(dlse + place, mask=exists, other=0.0)
    tl.store(delta + place, value, mask=exists)


class ByQuery(NamedTuple):
    """What the boxes of a tile of queries have in common."""

    queries: Any  # [ROWS, WIDTH]
    douts: Any  # [ROWS, WIDTH]
    lse: Any  # [ROWS], to base 2
    delta: Any  # [ROWS]
    k: Any
    v: Any
    k_token: Any
    v_token: Any
    exponent: Any


@triton.jit
def _score_keys(context, row, near, DIM: tl.constexpr, WIDTH: tl.constexpr):
    keys = walking.load_rows(context.k, row, context.k_token, near, DIM, WIDTH)
    return tl.dot(context.queries, tl.trans(keys), input_precision=PRECISION), keys


@triton.jit
def _take_keys(context, state, scores, row, near, keys, DIM: tl.constexpr, WIDTH: tl.constexpr):
    values = walking.load_rows(context.v, row, context.v_token, near, DIM, WIDTH)
    p = tl.exp2(scores * context.exponent - context.lse[:, None])
    dp = tl.dot(context.douts, tl.trans(values), input_precision=PRECISION)
    ds = p * (dp - context.delta[:, None])
    return (tl.dot(ds.to(keys.dtype), keys, state[0], input_precision=PRECISION),)


@triton.jit(do_not_specialize=COUNTS)
def attention_dq(
    q, k, v, dout, lse, delta, dq, walks, frames, valid, count, index, partial,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, dout_batch, dout_token, dout_head,
    q_tokens, heads, group, before, after, q_first, q_video, k_video, tiles, global_tiles, slots,
    list_samples, list_heads, list_rows, list_most, list_programs, list_t, list_h, list_w,
    scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIGN: tl.constexpr,
    GLOBALS: tl.constexpr, SEE_ALL: tl.constexpr, OVERLAP: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % (tiles + global_tiles)
    head = tl.program_id(0) // (tiles + global_tiles) % heads
    batch = (tl.program_id(0) // (tiles + global_tiles) // heads).to(tl.int64)
    walk = walks + tl.load(walks + head)
    q += batch * q_batch + head.to(tl.int64) * q_head
    k += batch * k_batch + (head // group).to(tl.int64) * k_head
    v += batch * v_batch + (head // group).to(tl.int64) * v_head
    dout += batch * dout_batch + head.to(tl.int64) * dout_head
    if valid is not None:
        valid += batch * (before + after)

    is_global = tile < global_tiles
    entry_from, entries = 0, 0
    if index is None:
        rows, exists, place = walking.tile_rows(walk, tl.maximum(tile - global_tiles, 0), tl.load(walk), ROWS)
    else:
        rows, exists, place = walking.list_rows(walk, tl.maximum(tile - global_tiles, 0), list_programs, ROWS)
        list_row = ((batch % list_samples) * list_heads + head % list_heads) * list_rows + place[0]
        entry_from, entries = list_row * list_most, tl.load(count + list_row)
    row = q_first + (rows[0] * tl.load(walk + 1) + rows[1]) * tl.load(walk + 2) + rows[2]
    real = exists
    if GLOBALS:
        row, exists, real = walking.global_rows(row, exists, tile, is_global, before, after, q_video, valid, ROWS)
    queries = walking.load_rows(q, row.to(tl.int64), q_token, real, DIM, WIDTH)
    if SIGN != 1:
        queries = queries * SIGN
    douts = walking.load_rows(dout, row.to(tl.int64), dout_token, real, DIM, WIDTH)
    at = (batch * heads + head) * q_tokens + row
    value = tl.load(lse + at, mask=real, other=-float("inf"))
    value = tl.where(value == -float("inf"), float("inf"), value * LOG2E)  # P = 0 where nothing is seen

    context = ByQuery(
        queries, douts, value, tl.load(delta + at, mask=real, other=0.0), k, v, k_token, v_token, scale * LOG2E
    )
    (gradient,) = walking.visit(
        _score_keys, _take_keys, context, (tl.zeros([ROWS, WIDTH], tl.float32),), walk, rows, exists, is_global, place,
        before, before, after, k_video, 0 if GLOBALS else 2, SEE_ALL,
        frames, slots, valid, index, partial, entry_from, entries, (list_t, list_h, list_w),
        COLUMNS, DIM, WIDTH, OVERLAP, INT64,
    )  # fmt: skip
    dq += (batch * q_tokens * heads + head) * DIM
    walking.store_rows(dq, row.to(tl.int64), heads * DIM, gradient * (scale * SIGN), exists, DIM, WIDTH)


class ByKey(NamedTuple):
    """What the boxes of a tile of keys have in common."""

    own_k: Any  # [ROWS, WIDTH]
    own_v: Any  # [ROWS, WIDTH]
    q: Any
    dout: Any
    lse: Any
    delta: Any
    q_token: Any
    dout_token: Any
    exponent: Any


@triton.jit
def _score_queries(context, row, near, DIM: tl.constexpr, WIDTH: tl.constexpr):
    queries = walking.load_rows(context.q, row, context.q_token, near, DIM, WIDTH)
    return tl.dot(context.own_k, tl.trans(queries), input_precision=PRECISION), queries


@triton.jit
def _take_queries(context, state, scores, row, near, queries, DIM: tl.constexpr, WIDTH: tl.constexpr):
    dk, dv = state
    value = tl.load(context.lse + row, mask=near, other=-float("inf"))
    value = tl.where(value == -float("inf"), float("inf"), value * LOG2E)
    p = tl.exp2(scores * context.exponent - value[None, :])
    douts = walking.load_rows(context.dout, row, context.dout_token, near, DIM, WIDTH)
    dv = tl.dot(p.to(douts.dtype), douts, dv, input_precision=PRECISION)
    dp = tl.dot(context.own_v, tl.trans(douts), input_precision=PRECISION)
    ds = p * (dp - tl.load(context.delta + row, mask=near, other=0.0)[None, :])
    return tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION), dv


@triton.jit(do_not_specialize=(*COUNTS, "members", "k_tokens"))
def attention_dkdv(
    q, k, v, dout, lse, delta, dk, dv, walks, frames, valid, offset, index, partial,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, dout_batch, dout_token, dout_head,
    q_tokens, k_tokens, heads, group, members, before, after, q_first, q_video, k_video, tiles, global_tiles, slots,
    list_samples, list_heads, list_rows, list_most, list_programs, list_t, list_h, list_w,
    scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIGN: tl.constexpr,
    GLOBALS: tl.constexpr, Q_GLOBALS: tl.constexpr, SEE_ALL: tl.constexpr, OVERLAP: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % (tiles + global_tiles)
    sets = heads // members  # of query heads whose gradients one program adds up
    chosen = tl.program_id(0) // (tiles + global_tiles) % sets
    batch = (tl.program_id(0) // (tiles + global_tiles) // sets).to(tl.int64)
    walk = walks + tl.load(walks + chosen * members)
    k_place = (chosen * members // group).to(tl.int64)
    k += batch * k_batch + k_place * k_head
    v += batch * v_batch + k_place * v_head
    if valid is not None:
        valid += batch * (before + after)

    is_global = tile < global_tiles
    if index is not None:
        rows, exists, place = walking.list_rows(walk, tl.maximum(tile - global_tiles, 0), list_programs, ROWS)
    elif frames is None:
        rows, exists, place = walking.tile_rows(walk, tl.maximum(tile - global_tiles, 0), tl.load(walk), ROWS)
    else:
        rows, exists, place = walking.tile_rows(walk, tl.maximum(tile - global_tiles, 0), slots, ROWS)
    row = before + (rows[0] * tl.load(walk + 1) + rows[1]) * tl.load(walk + 2) + rows[2]
    real = exists
    if frames is not None:  # the first axis counted slots; the tables count frames
        frame = tl.load(frames + tl.minimum(place[0], slots - 1))
        real = exists & (frame >= 0)
        rows = (rows[0] * 0 + tl.maximum(frame, 0), rows[1], rows[2])
        place = (tl.where(frame < 0, 1 << 30, frame), place[1], place[2])
    known = real
    if GLOBALS:
        row, exists, real = walking.global_rows(row, exists, tile, is_global, before, after, k_video, valid, ROWS)
        real = real & (is_global | known)
    keys = walking.load_rows(k, row.to(tl.int64), k_token, real, DIM, WIDTH)
    if SIGN != 1:
        keys = keys * SIGN
    values = walking.load_rows(v, row.to(tl.int64), v_token, real, DIM, WIDTH)
    segment_from = 2
    if Q_GLOBALS:
        segment_from = 0 if SEE_ALL else tl.where(is_global, 0, 2)

    state = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for member in range(members):
        head = (chosen * members + member).to(tl.int64)
        context = ByKey(
            keys, values, q + batch * q_batch + head * q_head, dout + batch * dout_batch + head * dout_head,
            lse + (batch * heads + head) * q_tokens, delta + (batch * heads + head) * q_tokens,
            q_token, dout_token, scale * LOG2E,
        )  # fmt: skip
        entry_from, entries = 0, 0
        if index is not None:
            lists = (batch % list_samples) * list_heads + head % list_heads
            at = lists * (list_rows + 1) + place[0]
            entry_from = lists * list_most + tl.load(offset + at)
            entries = tl.load(offset + at + 1) - tl.load(offset + at)
        state = walking.visit(
            _score_queries, _take_queries, context, state, walk, rows, known, is_global, place,
            q_first, before, after, q_video, segment_from, 1,
            None, 1, valid if Q_GLOBALS else None, index, partial, entry_from, entries, (list_t, list_h, list_w),
            COLUMNS, DIM, WIDTH, OVERLAP, INT64,
        )  # fmt: skip
    gradient_k, gradient_v = state
    keep = tl.where(real, 1.0, 0.0)[:, None]
    place_of_first = (batch * k_tokens * sets + chosen) * DIM
    gradient_k = tl.where(keep > 0, gradient_k * (scale * SIGN), 0.0)
    gradient_v = tl.where(keep > 0, gradient_v, 0.0)
    walking.store_rows(dk + place_of_first, row.to(tl.int64), sets * DIM, gradient_k, exists, DIM, WIDTH)
    walking.store_rows(dv + place_of_first, row.to(tl.int64), sets * DIM, gradient_v, exists, DIM, WIDTH)


def attention_backward(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    problem: Problem,
    extras: Extras,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute dq, dk and dv from the gradients of the output and of the LSE, either of which may be None."""
    batch, tokens, heads, dim = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    dout = torch.zeros_like(out) if dout is None else dout
    dout = dout if dout.stride(3) == 1 else dout.contiguous()  # a gradient may be an expanded number
    delta = torch.empty_like(lse)
    shared = shared_arguments(q, k, problem, extras)
    given = shared | strides(q=q, k=k, v=v, dout=dout)
    key = (problem, heads, dim, q.element_size(), extras.k_frames is not None)
    grid = problem.grid
    with on_device(q):
        attention_delta[(batch * heads * triton.cdiv(tokens, DELTA_ROWS),)](
            out, dout, None if dlse is None else dlse.float().contiguous(), delta,
            dout.stride(0), dout.stride(1), dout.stride(2), tokens, heads,
            DIM=dim, WIDTH=shared["WIDTH"], ROWS=DELTA_ROWS,
        )  # fmt: skip

        made = make_plan(*key, False, DQ_CONFIGS, q.device)
        global_tiles = triton.cdiv(grid.globals, made.config.rows) if problem.q_globals else 0
        attention_dq[(batch * heads * (made.tiles + global_tiles),)](
            q, k, v, dout, lse, delta, dq, global_tiles=global_tiles, INT64=wide(k, v),
            **given, **plan_arguments(made), **list_arguments(extras, problem.k_tile, made),
        )  # fmt: skip

        # Heads that share keys are added up by one program, unless their masks differ: then each has a sum of its own.
        made = make_plan(*key, True, DKDV_CONFIGS, q.device)
        group = heads // k.shape[2]
        members = group if len(set(problem.masks)) <= 1 else 1
        sums = [dk, dv]
        if members != group:
            sums = [x.new_empty((batch, k.shape[1], heads, dim), dtype=torch.float32) for x in (k, v)]
        planned = plan_arguments(made)
        if extras.k_frames is not None:  # tiles of slots, not of frames
            planned["tiles"] = made.tiles // grid.t * shared["slots"]
        global_tiles = triton.cdiv(grid.globals, made.config.rows)
        attention_dkdv[(batch * (heads // members) * (planned["tiles"] + global_tiles),)](
            q, k, v, dout, lse, delta, *sums, k_tokens=k.shape[1], members=members, global_tiles=global_tiles,
            Q_GLOBALS=problem.q_globals and grid.globals > 0, INT64=wide(q, dout),
            **given, **planned, **_lists_by_key(problem, extras, made),
        )  # fmt: skip
    if members != group:
        for gradient, parts in zip((dk, dv), sums, strict=True):
            gradient.copy_(parts.unflatten(2, (-1, group)).sum(3))
    return dq, dk, dv


def _lists_by_key(problem: Problem, extras: Extras, made: Plan) -> dict[str, Any]:
    """Give the arguments of block lists turned round: for each key tile the query tiles that list it."""
    arguments = list_arguments(extras, problem.q_tile, made)
    del arguments["count"]
    if extras.block_count is None or extras.block_index is None or problem.k_tile is None:
        return arguments | {"offset": None}
    tiles = tile_count(problem.grid.shape, problem.k_tile)
    turned = transpose(extras.block_count, extras.block_index, extras.block_partial, tiles, impl="triton")
    partial = None if turned.partial is None else turned.partial.view(torch.uint8)
    most = turned.item.shape[-1]
    return arguments | {
        "offset": turned.offset, "index": turned.item, "partial": partial, "list_rows": tiles, "list_most": most
    }  # fmt: skip


def specializations() -> Iterator[Specialization]:
    """List what ``attention_backward`` compiles."""
    for name, fn, configs in (("dq", attention_dq, DQ_CONFIGS), ("dkdv", attention_dkdv, DKDV_CONFIGS)):
        yield from specializations_of(name, fn, configs)
    for dtype in ("bf16", "fp32"):
        types = dict.fromkeys(("out", "dout"), f"*{dtype}") | dict.fromkeys(("dlse", "delta"), "*fp32")
        types |= dict.fromkeys(("dout_batch", "dout_token", "dout_head", "tokens", "heads"), "i32")
        constants = {"DIM": 128, "WIDTH": 128, "ROWS": DELTA_ROWS}
        options = {"num_warps": 4, "num_stages": 3}
        yield Specialization(f"delta-{dtype}-128", attention_delta, types, constants, options, ("tokens", "heads"))
