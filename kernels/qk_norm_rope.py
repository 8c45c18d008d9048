# mypy: allow-untyped-defs, allow-incomplete-defs, no-warn-unreachable
# mypy: disable-error-code="assignment, misc, var-annotated"
# (Tuples grow in loops that Triton unrolls.)
"""RMSNorm of queries and keys with 3-D rotary position embedding, in one pass; the backward is ``qk_norm_rope_bwd``.

    n = x * r * weight,  r = 1 / sqrt(mean(x^2) + eps)         mean over one head, or over all heads of a token
    y = (n_a cos - n_b sin, n_a sin + n_b cos)                  for the pairs (a, b) of features

One launch serves q and k: the first programs take rows of q, the rest rows of k. A row, the heads of one token, stays
in registers between the sum and the rotation, so that memory sees it once. It is held as chunks of heads in which every
thread owns 16 bytes or 8: pairs never leave their thread, and 40 heads are five chunks of 8, not 64 with masks. Angles
come from the axis tables (a few KB, always cached) by index.

All arithmetic is in fp32; y is rounded once. Bound by memory: q and k are read and written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from stattn.kernels._compile import Specialization
from stattn.kernels._device import check_count, on_device


class Config(NamedTuple):
    """How rows are given to threads.

    elements: the most elements of a row that a thread holds, which sets the warps of a program. rows: rows one after
    the other in a program.
    """

    elements: int
    rows: int


CONFIGS = (Config(64, 1), Config(32, 1), Config(64, 4), Config(32, 4))
MOST_WARPS = 16


# Kernels.


@triton.jit
def place_of(video, h_extent, w_extent):
    """Return t, h and w of a video token."""
    return video // w_extent // h_extent, video // w_extent % h_extent, video % w_extent


@triton.jit
def angles_at(
    t, h, w, inside, t_ptr, h_ptr, w_ptr, t_extent, h_extent, w_extent, HALF: tl.constexpr,
    T_PAIRS: tl.constexpr, H_PAIRS: tl.constexpr, W_PAIRS: tl.constexpr,
):  # fmt: skip
    """Return cos and sin of a place, [HALF] each; 1 and 0 where not ``inside`` and for pairs behind the last."""
    pair = tl.arange(0, HALF)
    on_t = pair < T_PAIRS
    on_h = pair < T_PAIRS + H_PAIRS
    t_at = t_ptr + t * T_PAIRS + pair
    h_at = h_ptr + h * H_PAIRS + (pair - T_PAIRS)
    w_at = w_ptr + w * W_PAIRS + (pair - T_PAIRS - H_PAIRS)
    at = tl.where(on_t, t_at, tl.where(on_h, h_at, w_at))
    to_sin = tl.where(on_t, t_extent * T_PAIRS, tl.where(on_h, h_extent * H_PAIRS, w_extent * W_PAIRS))
    inside = inside & (pair < T_PAIRS + H_PAIRS + W_PAIRS)
    return tl.load(at, mask=inside, other=1.0), tl.load(at + to_sin, mask=inside, other=0.0)


@triton.jit
def token_angles(
    token, t_ptr, h_ptr, w_ptr, t_extent, h_extent, w_extent, before, HALF: tl.constexpr,
    T_PAIRS: tl.constexpr, H_PAIRS: tl.constexpr, W_PAIRS: tl.constexpr,
):  # fmt: skip
    """Return cos and sin of a token, [1, HALF] each; 1 and 0 for global tokens."""
    video = token - before
    inside = (video >= 0) & (video < t_extent * h_extent * w_extent)
    t, h, w = place_of(tl.where(inside, video, 0), h_extent, w_extent)
    cos, sin = angles_at(
        t, h, w, inside, t_ptr, h_ptr, w_ptr, t_extent, h_extent, w_extent, HALF, T_PAIRS, H_PAIRS, W_PAIRS
    )
    return cos[None, :], sin[None, :]


@triton.jit
def heads_at(ptr, head_stride, FIRST: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """Return where the heads of a chunk start, [CHUNK, 1]. head_stride None: each lies behind the one before it."""
    if head_stride is None:
        return ptr + FIRST * DIM + tl.arange(0, CHUNK)[:, None] * DIM
    else:
        return ptr + (FIRST + tl.arange(0, CHUNK)[:, None]).to(tl.int64) * head_stride


@triton.jit
def load_pairs(
    ptr, head_stride, stride, FIRST: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    CHUNK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Load heads FIRST ... FIRST + CHUNK - 1 of a row as their pairs of features, two tiles [CHUNK, HALF]."""
    WHOLE: tl.constexpr = FIRST + CHUNK <= HEADS and 2 * HALF == DIM
    head = FIRST + tl.arange(0, CHUNK)[:, None]
    at = heads_at(ptr, head_stride, FIRST, DIM, CHUNK)
    if INTERLEAVED:
        feature = tl.arange(0, 2 * HALF)[None, :]
        if WHOLE:
            x = tl.load(at + feature * stride)
        else:
            x = tl.load(at + feature * stride, mask=(head < HEADS) & (feature < DIM), other=0.0)
        a, b = tl.split(x.reshape(CHUNK, HALF, 2))
    else:
        pair = tl.arange(0, HALF)[None, :]
        if WHOLE:
            a = tl.load(at + pair * stride)
            b = tl.load(at + (pair + DIM // 2) * stride)
        else:
            inside = (head < HEADS) & (pair < DIM // 2)
            a = tl.load(at + pair * stride, mask=inside, other=0.0)
            b = tl.load(at + (pair + DIM // 2) * stride, mask=inside, other=0.0)
    return a, b


@triton.jit
def store_pairs(
    ptr, a, b, head_stride, stride, FIRST: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    CHUNK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Round two tiles [CHUNK, HALF] of pairs and store them where ``load_pairs`` finds them."""
    WHOLE: tl.constexpr = FIRST + CHUNK <= HEADS and 2 * HALF == DIM
    head = FIRST + tl.arange(0, CHUNK)[:, None]
    at = heads_at(ptr, head_stride, FIRST, DIM, CHUNK)
    a, b = a.to(ptr.dtype.element_ty), b.to(ptr.dtype.element_ty)
    if INTERLEAVED:
        feature = tl.arange(0, 2 * HALF)[None, :]
        x = tl.join(a, b).reshape(CHUNK, 2 * HALF)
        if WHOLE:
            tl.store(at + feature * stride, x)
        else:
            tl.store(at + feature * stride, x, mask=(head < HEADS) & (feature < DIM))
    else:
        pair = tl.arange(0, HALF)[None, :]
        inside = (head < HEADS) & (pair < DIM // 2)
        tl.store(at + pair * stride, a, mask=inside)
        tl.store(at + (pair + DIM // 2) * stride, b, mask=inside)


@triton.jit
def load_weight(
    ptr, HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    ACROSS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Load a weight as pairs of tiles [CHUNK, HALF]: of every chunk, or of one head, repeated, that serves all."""
    tiles = ()
    for i in tl.static_range(CHUNKS if ACROSS else 1):
        a, b = load_pairs(ptr, None if ACROSS else 0, 1, i * CHUNK, HEADS, DIM, HALF, CHUNK, INTERLEAVED)
        tiles = tiles + ((a, b),)
    return tiles


@triton.jit
def row_sum(x, ACROSS: tl.constexpr):
    """Sum x [CHUNK, HALF] over all of it, [1, 1], or over each head, [CHUNK, 1]."""
    total = tl.sum(x, axis=1, keep_dims=True)
    if ACROSS:
        total = tl.sum(total, axis=0, keep_dims=True)
    return total


@triton.jit
def forward_row(
    row, x_ptr, y_ptr, w, t_ptr, h_ptr, w_ptr, tokens, t_extent, h_extent, w_extent, before,
    x_batch, x_token, x_head, x_feature, y_batch, y_token, y_head, y_feature, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    T_PAIRS: tl.constexpr, H_PAIRS: tl.constexpr, W_PAIRS: tl.constexpr,
    NORM: tl.constexpr, ACROSS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate one token. w: the weight's tiles."""
    COUNT: tl.constexpr = HEADS * DIM if ACROSS else DIM
    batch, token = (row // tokens).to(tl.int64), row % tokens
    x_ptr += batch * x_batch + token.to(tl.int64) * x_token
    y_ptr += batch * y_batch + token.to(tl.int64) * y_token
    chunks = ()
    for i in tl.static_range(CHUNKS):
        a, b = load_pairs(x_ptr, x_head, x_feature, i * CHUNK, HEADS, DIM, HALF, CHUNK, INTERLEAVED)
        chunks = chunks + ((a, b),)
    if t_ptr is not None:
        cos, sin = token_angles(
            token, t_ptr, h_ptr, w_ptr, t_extent, h_extent, w_extent, before, HALF, T_PAIRS, H_PAIRS, W_PAIRS
        )
    r = 1.0
    if NORM and ACROSS:
        square = tl.zeros((CHUNK, HALF), tl.float32)
        for i in tl.static_range(CHUNKS):
            a, b = chunks[i][0].to(tl.float32), chunks[i][1].to(tl.float32)
            square += a * a + b * b
        r = tl.rsqrt(row_sum(square, ACROSS) / COUNT + eps)
    for i in tl.static_range(CHUNKS):
        a, b = chunks[i][0].to(tl.float32), chunks[i][1].to(tl.float32)
        if NORM:
            if not ACROSS:
                r = tl.rsqrt(row_sum(a * a + b * b, ACROSS) / COUNT + eps)
            a = a * r * w[i if ACROSS else 0][0].to(tl.float32)
            b = b * r * w[i if ACROSS else 0][1].to(tl.float32)
        if t_ptr is not None:
            a, b = a * cos - b * sin, a * sin + b * cos
        store_pairs(y_ptr, a, b, y_head, y_feature, i * CHUNK, HEADS, DIM, HALF, CHUNK, INTERLEAVED)


@triton.jit
def forward_rows(
    first, x_ptr, y_ptr, weight_ptr, t_ptr, h_ptr, w_ptr, rows, tokens, t_extent, h_extent, w_extent, before,
    x_batch, x_token, x_head, x_feature, y_batch, y_token, y_head, y_feature, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, CHUNK: tl.constexpr,
    T_PAIRS: tl.constexpr, H_PAIRS: tl.constexpr, W_PAIRS: tl.constexpr,
    ACROSS: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate the tokens first ... first + ROWS - 1."""
    CHUNKS: tl.constexpr = (HEADS + CHUNK - 1) // CHUNK
    NORM: tl.constexpr = weight_ptr is not None
    w = ()
    if NORM:
        w = load_weight(weight_ptr, HEADS, DIM, HALF, CHUNK, CHUNKS, ACROSS, INTERLEAVED)
    if ROWS == 1:
        forward_row(
            first, x_ptr, y_ptr, w, t_ptr, h_ptr, w_ptr, tokens, t_extent, h_extent, w_extent, before,
            x_batch, x_token, x_head, x_feature, y_batch, y_token, y_head, y_feature, eps,
            HEADS, DIM, HALF, CHUNK, CHUNKS, T_PAIRS, H_PAIRS, W_PAIRS, NORM, ACROSS, INTERLEAVED,
        )  # fmt: skip
    else:
        for i in range(tl.minimum(ROWS, rows - first)):
            forward_row(
                first + i, x_ptr, y_ptr, w, t_ptr, h_ptr, w_ptr, tokens, t_extent, h_extent, w_extent, before,
                x_batch, x_token, x_head, x_feature, y_batch, y_token, y_head, y_feature, eps,
                HEADS, DIM, HALF, CHUNK, CHUNKS, T_PAIRS, H_PAIRS, W_PAIRS, NORM, ACROSS, INTERLEAVED,
            )  # fmt: skip


# Sizes vary from clip to clip: a kernel for every property of theirs would compile again and again.
SIZES = ("rows", "tokens", "t_extent", "h_extent", "w_extent", "before")
UNSPECIALIZED = tuple(f"{x}_{size}" for x in "qk" for size in SIZES)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def qk_norm_rope_forward(
    q_ptr, k_ptr, q_out, k_out, q_weight, k_weight, q_t, q_h, q_w, k_t, k_h, k_w,
    q_rows, q_tokens, q_t_extent, q_h_extent, q_w_extent, q_before,
    k_rows, k_tokens, k_t_extent, k_h_extent, k_w_extent, k_before,
    q_batch, q_token, q_head, q_feature, k_batch, k_token, k_head, k_feature,
    q_out_batch, q_out_token, q_out_head, q_out_feature, k_out_batch, k_out_token, k_out_head, k_out_feature, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    Q_CHUNK: tl.constexpr, K_CHUNK: tl.constexpr,
    T_PAIRS: tl.constexpr, H_PAIRS: tl.constexpr, W_PAIRS: tl.constexpr,
    ACROSS: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate q and k."""
    pid = tl.program_id(0)
    q_programs = tl.cdiv(q_rows, ROWS)
    if pid < q_programs:
        forward_rows(
            pid * ROWS, q_ptr, q_out, q_weight, q_t, q_h, q_w,
            q_rows, q_tokens, q_t_extent, q_h_extent, q_w_extent, q_before,
            q_batch, q_token, q_head, q_feature, q_out_batch, q_out_token, q_out_head, q_out_feature, eps,
            Q_HEADS, DIM, HALF, Q_CHUNK, T_PAIRS, H_PAIRS, W_PAIRS, ACROSS, INTERLEAVED, ROWS,
        )  # fmt: skip
    else:
        forward_rows(
            (pid - q_programs) * ROWS, k_ptr, k_out, k_weight, k_t, k_h, k_w,
            k_rows, k_tokens, k_t_extent, k_h_extent, k_w_extent, k_before,
            k_batch, k_token, k_head, k_feature, k_out_batch, k_out_token, k_out_head, k_out_feature, eps,
            K_HEADS, DIM, HALF, K_CHUNK, T_PAIRS, H_PAIRS, W_PAIRS, ACROSS, INTERLEAVED, ROWS,
        )  # fmt: skip


# Launchers.


class Angles(NamedTuple):
    """Axis tables [2, extent, pairs] of cosines and sines, and the number of global tokens before the video."""

    t: Tensor
    h: Tensor
    w: Tensor
    before: int


def shapes(heads: int, dim: int, size: int, interleaved: bool, elements: int) -> tuple[int, int]:
    """Return the warps of a program that holds a row in ``elements`` elements a thread, and the heads of a chunk.

    size: bytes of a feature. A thread owns 16 bytes of a chunk, of each half of a head if pairs lie half a head apart;
    or 8, where that leaves fewer threads idle in the last chunk.
    """
    half = triton.next_power_of_2(dim // 2)
    warps = min(max(triton.next_power_of_2(triton.cdiv(heads * 2 * half, 32 * elements)), 1), MOST_WARPS)
    width = 2 * half if interleaved else half
    chunk = min(max(warps * 32 * 16 // (size * width), 1), triton.next_power_of_2(heads))
    if chunk > 1 and triton.cdiv(heads, chunk // 2) % 2:
        chunk //= 2
    return warps, chunk


def constants_of(dim: int, pairs: tuple[int, int, int], across: bool, interleaved: bool) -> dict[str, Any]:
    """Return the constexprs that forward and backward share."""
    return {
        "DIM": dim,
        "HALF": triton.next_power_of_2(dim // 2),
        "T_PAIRS": pairs[0],
        "H_PAIRS": pairs[1],
        "W_PAIRS": pairs[2],
        "ACROSS": across,
        "INTERLEAVED": interleaved,
    }


def _forward_constants(
    q_heads: int, k_heads: int, dim: int, size: int, interleaved: bool, config: Config
) -> tuple[int, dict[str, int]]:
    """Return the warps and the constexprs of a forward."""
    warps, chunk = shapes(max(q_heads, k_heads), dim, size, interleaved, config.elements)
    chunks = [min(chunk, triton.next_power_of_2(heads)) for heads in (q_heads, k_heads)]
    rest = {"Q_HEADS": q_heads, "K_HEADS": k_heads, "Q_CHUNK": chunks[0], "K_CHUNK": chunks[1], "ROWS": config.rows}
    return warps, rest


def pairs_of(angles: Angles | None) -> tuple[int, int, int]:
    return (0, 0, 0) if angles is None else (angles.t.shape[2], angles.h.shape[2], angles.w.shape[2])


def tables_of(angles: Angles | None) -> tuple[Any, ...]:
    """Return the contiguous tables and their extents; the tables are tiny, so a view of them is copied."""
    if angles is None:
        return (None, None, None), (1, 1, 1, 0)
    tables = tuple(each.contiguous() for each in angles[:3])
    return tables, (*(each.shape[1] for each in tables), angles.before)


def strides_of(x: Tensor) -> tuple[int | None, ...]:
    """Return the strides of x [B, N, heads, D], None for that of heads where one lies behind the other."""
    batch, token, head, feature = x.stride()
    return batch, token, None if feature == 1 and (head == x.shape[3] or x.shape[2] == 1) else head, feature


def forward(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_angles: Angles | None,
    k_angles: Angles | None,
    across: bool,
    eps: float,
    interleaved: bool,
    config: Config = CONFIGS[0],
) -> None:
    """Write the normalised and rotated q and k [B, N, heads, D] to q_out and k_out, which may be q and k themselves."""
    if q.numel() + k.numel() == 0:
        return
    warps, constants = _forward_constants(q.shape[2], k.shape[2], q.shape[3], q.element_size(), interleaved, config)
    constants |= constants_of(q.shape[3], pairs_of(q_angles), across, interleaved)
    (q_tables, q_extents), (k_tables, k_extents) = tables_of(q_angles), tables_of(k_angles)
    q_rows, k_rows = (0 if x.numel() == 0 else x.shape[0] * x.shape[1] for x in (q, k))
    check_count(q_rows, "q")
    check_count(k_rows, "k")
    programs = triton.cdiv(q_rows, config.rows) + triton.cdiv(k_rows, config.rows)
    weights = (None if each is None else each.contiguous() for each in (q_weight, k_weight))
    with on_device(q):
        qk_norm_rope_forward[(programs,)](
            q, k, q_out, k_out, *weights, *q_tables, *k_tables,
            q_rows, q.shape[1], *q_extents, k_rows, k.shape[1], *k_extents,
            *strides_of(q), *strides_of(k), *strides_of(q_out), *strides_of(k_out), eps,
            **constants, num_warps=warps,
        )  # fmt: skip


# Compiled ahead of time.


# q heads, k heads, head dim, pairs, across heads, interleaved, type
MODELS = {
    "wan-14b": (40, 40, 128, (22, 21, 21), True, True, "bf16"),
    "wan-1.3b": (12, 12, 128, (22, 21, 21), True, True, "bf16"),
    "wan-1.3b-fp32": (12, 12, 128, (22, 21, 21), True, True, "fp32"),
    "hunyuanvideo": (24, 24, 128, (8, 28, 28), False, True, "bf16"),
    "half-gqa": (16, 8, 128, (22, 21, 21), False, False, "bf16"),
}


def specializations() -> Iterator[Specialization]:
    """List the kernels of the models that are measured: every CONFIG for Wan-14B, the default for the others."""
    for model, (q_heads, k_heads, dim, pairs, across, interleaved, kind) in MODELS.items():
        for number, config in enumerate(CONFIGS if model == "wan-14b" else CONFIGS[:1]):
            size = 4 if kind == "fp32" else 2
            warps, constants = _forward_constants(q_heads, k_heads, dim, size, interleaved, config)
            constants |= constants_of(dim, pairs, across, interleaved)
            options = {"num_warps": warps}
            yield specialize(f"forward/{model}/{number}", qk_norm_rope_forward, kind, constants, options, UNSPECIALIZED)


def specialize(
    name: str, kernel: Any, kind: str, constants: dict[str, Any], options: dict[str, int], unaligned: tuple[str, ...]
) -> Specialization:
    """Describe a kernel of this file or of the backward, for heads that lie one behind the other."""
    dense = {arg: 1 for arg in kernel.arg_names if arg.endswith("_feature")}
    dense |= {arg: None for arg in kernel.arg_names if arg.endswith("_head")}
    types = {}
    for arg in kernel.arg_names:
        number = arg in unaligned or arg.endswith(("_batch", "_token", "_head", "_feature"))
        single = arg.endswith(("_t", "_h", "_w")) or arg in ("t_ptr", "h_ptr", "w_ptr", "partial_ptr")
        types[arg] = "fp32" if arg == "eps" else "i32" if number else "*fp32" if single else f"*{kind}"
    return Specialization(name, kernel, types, constants | dense, options, unaligned)
