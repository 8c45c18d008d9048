# mypy: allow-untyped-defs, allow-incomplete-defs
"""The gradients of patchify; the forward, and how a patch is found in its video, are in ``patchify.py``.

    dx[place(m) + tap(k)]  = sum over e of dout[m, e] * weight[e, k]
    dweight[e, k]          = sum over m of dout[m, e] * x[place(m) + tap(k)]
    dbias[e]               = sum over m of dout[m, e]           dpos[n, e] = sum over samples of dout[sample, n, e]

Fused: the scatter of dx (each pixel belongs to one patch, so every one is written once and nothing is zeroed), the
gather of dweight, and dbias, which is summed from the tiles of dout that dweight reads. Sums are float32 (of float32
tensors they are made of sums of SPAN terms, as in the forward) and gradients are rounded once. dweight adds up shares
of the tokens: each share in its own float32 partial, and the partials then in a fixed order, so that it is reproducible
bit for bit; the shares depend on the shapes, not on the card. At Wan's 64 taps all of it is bound by reading dout, at
pixels by the tensor cores.

In 16 bits, dweight has its patches written in rows first, from where the tensor memory accelerator brings them, as it
brings dout: every tile of features would gather them again. The rows take as much memory as the video, with every patch
filled up to whole tiles of taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stattn.kernels._compile import Specialization
from stattn.kernels._device import capability, check_count, on_device
from stattn.kernels._patches import (
    PLAIN,
    Geometry,
    as_rows,
    gather_patches,
    patch_steps,
    place,
    read_patches,
    tap,
    within,
)
from stattn.kernels.patchify import POINTERS, cases, span_of

# Launch parameters.


class Config(NamedTuple):
    """The tile of one program: tokens x features x taps, of which dx sums over features and dweight over tokens.

    boxes: dweight reads tiles by the tensor memory accelerator; where it cannot, the first config without is taken.
    """

    tokens: int
    features: int
    taps: int
    warps: int
    stages: int
    boxes: bool = False


# By kernel, the default first; the others are what benchmarks/bench_patchify.py --tune times beside it.
CONFIGS: dict[str, tuple[Config, ...]] = {
    "dx": (  # up to 64 taps
        Config(64, 64, 64, 4, 5),
        Config(128, 64, 64, 8, 4),
        Config(64, 64, 64, 4, 3),
    ),
    "dx-wide": (
        Config(128, 64, 128, 8, 4),
        Config(128, 32, 128, 8, 5),
    ),
    "dx-float32": (Config(64, 16, 64, 4, 3),),
    "dweight": (  # up to 64 taps
        Config(64, 128, 64, 4, 4, boxes=True),
        Config(128, 128, 64, 4, 3, boxes=True),
        Config(32, 256, 64, 8, 3),
        Config(32, 128, 64, 4, 4),
    ),
    "dweight-wide": (
        Config(64, 128, 256, 8, 3, boxes=True),
        Config(64, 128, 128, 4, 4, boxes=True),
        Config(64, 128, 128, 8, 3),
        Config(64, 128, 64, 8, 4),
    ),
    "dweight-float32": (Config(16, 64, 32, 4, 3),),
}
SHARES = 264  # programs that dweight aims at: two for each SM of an H200
SUM_BLOCK = 1024
WRITTEN = 64  # tokens, and taps of each, that a program writes in rows


def kernel_for(kind: str, taps: int, dtype: torch.dtype) -> str:
    """Name the entry of CONFIGS for a gradient, "dx" or "dweight"."""
    return kind + ("-float32" if dtype.itemsize == 4 else "" if taps <= 64 else "-wide")


# Kernels.


@triton.jit(do_not_specialize=PLAIN)
def patchify_dx(
    gDout, gW, gDx, dout_b, dout_n, M, tokens, grid_h, grid_w, size_t, size_h, size_w, stride_b, stride_c, stride_t,
    stride_h, stride_w, E: tl.constexpr, TAPS: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    RAGGED_T: tl.constexpr, RAGGED_H: tl.constexpr, RAGGED_W: tl.constexpr, RUN: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M tokens, BLOCK_K taps of them. The strides are those of dx."""
    COLUMNS: tl.constexpr = (TAPS + BLOCK_K - 1) // BLOCK_K
    m = tl.program_id(0) // COLUMNS * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = tl.program_id(0) % COLUMNS * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    valid = m < M
    rows = gDout + ((m // tokens).to(tl.int64) * dout_b + (m % tokens).to(tl.int64) * dout_n)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for e0 in tl.range(0, E, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        dout = tl.load(rows[:, None] + e[None, :], mask=valid[:, None] & (e < E)[None, :], other=0.0)
        w = tl.load(gW + e[:, None] * TAPS + k[None, :], mask=(e < E)[:, None] & (k < TAPS)[None, :], other=0.0)
        acc = tl.dot(dout, w, acc, input_precision="ieee")
        if SPAN > 0:
            if (e0 + BLOCK_E) % SPAN == 0:
                total += acc
                acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    if SPAN > 0:
        acc += total
    dx = acc.to(gDx.dtype.element_ty)
    steps = patch_steps(stride_b, stride_c, stride_t, stride_h, stride_w, VEC)
    sizes = (size_t, size_h, size_w)
    at = place(m, tokens, grid_h, grid_w, steps, PT, PH, PW, VEC)
    if RUN * gDx.dtype.element_ty.primitive_bitwidth >= 128:
        at = (at[0][:, None], at[1][:, None], at[2][:, None], at[3][:, None])
        of = tap(k[None, :], steps, PT, PH, PW, VEC, WIDE)
        mask = within(at, of, sizes, valid[:, None] & (k < TAPS)[None, :], RAGGED_T, RAGGED_H, RAGGED_W)
        tl.store(gDx + at[0] + of[0], dx, mask=mask)
    else:
        # As read_patches: a warp writes one row of many tokens.
        j = tl.arange(0, BLOCK_K // RUN)[:, None, None]
        at = (at[0][None, :, None], at[1][None, :, None], at[2][None, :, None], at[3][None, :, None])
        of = tap(k0 + j * RUN + tl.arange(0, RUN)[None, None, :], steps, PT, PH, PW, VEC, WIDE)
        mask = within(at, of, sizes, valid[None, :, None] & (k0 + j * RUN < TAPS), RAGGED_T, RAGGED_H, RAGGED_W)
        tl.store(gDx + at[0] + of[0], dx.reshape(BLOCK_M, BLOCK_K // RUN, RUN).permute(1, 0, 2), mask=mask)


@triton.jit(do_not_specialize=[*PLAIN, "share"])
def patchify_dweight(
    gDout, gX, gDw, gDbias, dout_b, dout_n, share, M, tokens, grid_h, grid_w, size_t, size_h, size_w, stride_b,
    stride_c, stride_t, stride_h, stride_w, E: tl.constexpr, TAPS: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, RAGGED_T: tl.constexpr, RAGGED_H: tl.constexpr, RAGGED_W: tl.constexpr, RUN: tl.constexpr,
    VEC: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_E features, BLOCK_K taps, one share. gDw is [shares, E, TAPS], gDbias [shares, E]."""
    COLUMNS: tl.constexpr = (TAPS + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = COLUMNS * ((E + BLOCK_E - 1) // BLOCK_E)
    part = (tl.program_id(0) // TILES).to(tl.int64)
    tile = tl.program_id(0) % TILES
    k0 = tile % COLUMNS * BLOCK_K
    e = tile // COLUMNS * BLOCK_E + tl.arange(0, BLOCK_E)
    k = k0 + tl.arange(0, BLOCK_K)
    begin = tl.program_id(0) // TILES * share
    end = min(begin + share, M)
    steps = patch_steps(stride_b, stride_c, stride_t, stride_h, stride_w, VEC)
    sizes = (size_t, size_h, size_w)
    # Patches that go to shared memory by way of registers are asked for one step ahead.
    AHEAD: tl.constexpr = RUN * gX.dtype.element_ty.primitive_bitwidth < 128
    # dbias is a product with ones, where products are on tensor cores: sums across threads would take longer.
    ONES: tl.constexpr = gX.dtype.element_ty.primitive_bitwidth == 16
    acc = tl.zeros([BLOCK_E, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_E, BLOCK_K], tl.float32)
    bias_acc = tl.zeros([BLOCK_E, 16] if ONES else [BLOCK_E], tl.float32)
    bias_total = tl.zeros([BLOCK_E, 16] if ONES else [BLOCK_E], tl.float32)
    ones = tl.full([BLOCK_M, 16], 1.0, gX.dtype.element_ty)
    if AHEAD:
        m = begin + tl.arange(0, BLOCK_M)
        at = place(m, tokens, grid_h, grid_w, steps, PT, PH, PW, VEC)
        ahead = gather_patches(
            gX, at, m < end, k0, steps, sizes, TAPS, PT, PH, PW, RAGGED_T, RAGGED_H, RAGGED_W, RUN, VEC, WIDE, BLOCK_K
        )
    for m0 in tl.range(begin, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        valid = m < end
        rows = gDout + ((m // tokens).to(tl.int64) * dout_b + (m % tokens).to(tl.int64) * dout_n)
        dout = tl.load(rows[:, None] + e[None, :], mask=valid[:, None] & (e < E)[None, :], other=0.0)
        if AHEAD:
            x = as_rows(ahead, valid, BLOCK_K)
            m += BLOCK_M
        at = place(m, tokens, grid_h, grid_w, steps, PT, PH, PW, VEC)
        ahead = gather_patches(
            gX, at, m < end, k0, steps, sizes, TAPS, PT, PH, PW, RAGGED_T, RAGGED_H, RAGGED_W, RUN, VEC, WIDE, BLOCK_K
        )
        if not AHEAD:
            x = as_rows(ahead, valid, BLOCK_K)
        acc = tl.dot(tl.trans(dout), x, acc, input_precision="ieee")
        if gDbias is not None:
            if ONES:
                bias_acc = tl.dot(tl.trans(dout), ones, bias_acc)
            else:
                bias_acc += tl.sum(dout, axis=0)
        if SPAN > 0:
            if (m0 - begin + BLOCK_M) % SPAN == 0:
                total += acc
                acc = tl.zeros([BLOCK_E, BLOCK_K], tl.float32)
                bias_total += bias_acc
                bias_acc = tl.zeros([BLOCK_E, 16] if ONES else [BLOCK_E], tl.float32)
    if SPAN > 0:
        acc += total
        bias_acc += bias_total
    where = gDw + part * E * TAPS + e[:, None] * TAPS + k[None, :]
    tl.store(where, acc.to(gDw.dtype.element_ty), mask=(e < E)[:, None] & (k < TAPS)[None, :])
    if gDbias is not None:
        if ONES:
            bias_acc = tl.max(bias_acc, axis=1)  # the columns are the same
        tl.store(gDbias + part * E + e, bias_acc.to(gDbias.dtype.element_ty), mask=(e < E) & (k0 == 0))


@triton.jit(do_not_specialize=PLAIN)
def write_patches(
    gX, gRows, M, tokens, grid_h, grid_w, size_t, size_h, size_w, stride_b, stride_c, stride_t, stride_h, stride_w,
    TAPS: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, RAGGED_T: tl.constexpr,
    RAGGED_H: tl.constexpr, RAGGED_W: tl.constexpr, RUN: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_K taps of the patches of BLOCK_M tokens to gRows [M, WIDTH], zeros behind the last tap."""
    COLUMNS: tl.constexpr = WIDTH // BLOCK_K
    m = tl.program_id(0) // COLUMNS * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = tl.program_id(0) % COLUMNS * BLOCK_K
    steps = patch_steps(stride_b, stride_c, stride_t, stride_h, stride_w, VEC)
    at = place(m, tokens, grid_h, grid_w, steps, PT, PH, PW, VEC)
    sizes = (size_t, size_h, size_w)
    x = read_patches(
        gX, at, m < M, k0, steps, sizes, TAPS, PT, PH, PW, RAGGED_T, RAGGED_H, RAGGED_W, RUN, VEC, WIDE, BLOCK_K
    )
    where = gRows + m.to(tl.int64)[:, None] * WIDTH + k0 + tl.arange(0, BLOCK_K)[None, :]
    tl.store(where, x, mask=(m < M)[:, None])


@triton.jit(do_not_specialize=["share", "M"])
def patchify_dweight_boxes(
    dout, rows, gDw, gDbias, share, M,
    E: tl.constexpr, TAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As patchify_dweight, of dout [M, E] and what write_patches wrote, by descriptors: zeros behind token M."""
    COLUMNS: tl.constexpr = (TAPS + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = COLUMNS * ((E + BLOCK_E - 1) // BLOCK_E)
    part = (tl.program_id(0) // TILES).to(tl.int64)
    tile = tl.program_id(0) % TILES
    e0, k0 = tile // COLUMNS * BLOCK_E, tile % COLUMNS * BLOCK_K
    begin = tl.program_id(0) // TILES * share
    acc = tl.zeros([BLOCK_E, BLOCK_K], tl.float32)
    bias_acc = tl.zeros([BLOCK_E, 16], tl.float32)
    ones = tl.full([BLOCK_M, 16], 1.0, dout.dtype)
    for m0 in tl.range(begin, min(begin + share, M), BLOCK_M):
        values = tl.trans(dout.load([m0, e0]))
        acc = tl.dot(values, rows.load([m0, k0]), acc)
        if gDbias is not None:
            bias_acc = tl.dot(values, ones, bias_acc)
    e, k = e0 + tl.arange(0, BLOCK_E), k0 + tl.arange(0, BLOCK_K)
    where = gDw + part * E * TAPS + e[:, None] * TAPS + k[None, :]
    tl.store(where, acc.to(gDw.dtype.element_ty), mask=(e < E)[:, None] & (k < TAPS)[None, :])
    if gDbias is not None:
        bias = tl.max(bias_acc, axis=1)  # the columns are the same
        tl.store(gDbias + part * E + e, bias.to(gDbias.dtype.element_ty), mask=(e < E) & (k0 == 0))


@triton.jit(do_not_specialize=["parts"])
def sum_parts(gParts, gOut, parts, columns, part_stride, row_stride, BLOCK: tl.constexpr):
    """out[row, column] = sum over parts, in their order. One program: BLOCK columns of one row."""
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    source = gParts + row * row_stride + column
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in tl.range(0, parts):
        acc += tl.load(source, mask=column < columns, other=0.0).to(tl.float32)
        source += part_stride
    tl.store(gOut + row * columns + column, acc.to(gOut.dtype.element_ty), mask=column < columns)


# Launchers.


def _constants(geometry: Geometry, features: int, dtype: torch.dtype, config: Config) -> dict[str, Any]:
    blocks = {"BLOCK_M": config.tokens, "BLOCK_E": config.features, "BLOCK_K": config.taps}
    return {"E": features, **geometry.constants(), **blocks, "SPAN": span_of(dtype)}


def _row_constants(geometry: Geometry, config: Config) -> dict[str, Any]:
    width = triton.cdiv(geometry.taps, config.taps) * config.taps
    return {**geometry.constants(), "WIDTH": width, "BLOCK_M": WRITTEN, "BLOCK_K": WRITTEN}


def _rows(dout: Tensor) -> Tensor:
    """Return dout as rows of features side by side: itself, or a copy where they are not."""
    return dout if dout.stride(2) == 1 and dout.stride(1) > 0 else dout.contiguous()


def dx(dout: Tensor, weight: Tensor, size: tuple[int, ...], config: Config | None = None) -> Tensor:
    """Return the gradient of the video, [B, C, *size], contiguous, in dout's dtype. dout [B, N, E]."""
    out = torch.empty(dout.shape[0], weight.shape[1], *size, dtype=dout.dtype, device=dout.device)
    patch = weight.shape[2], weight.shape[3], weight.shape[4]
    geometry = Geometry.of(tuple(out.shape), out.stride(), patch, out.element_size())
    count, features = dout.shape[0] * geometry.tokens, weight.shape[0]
    check_count(count)
    if out.numel() == 0:
        return out
    config = config or CONFIGS[kernel_for("dx", geometry.taps, dout.dtype)][0]
    programs = triton.cdiv(count, config.tokens) * triton.cdiv(geometry.taps, config.taps)
    dout = _rows(dout)
    with on_device(dout):
        patchify_dx[(programs,)](
            dout,
            weight.contiguous(),
            out,
            *dout.stride()[:2],
            count,
            *geometry.numbers(),
            **_constants(geometry, features, dout.dtype, config),
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out


def shares(tokens: int, tiles: int, block: int) -> tuple[int, int]:
    """Return how many shares dweight cuts its tokens into, and the tokens of each: whole blocks, at least four."""
    wanted = max(1, min(SHARES // tiles, tokens // (4 * block)))
    share = triton.cdiv(triton.cdiv(tokens, wanted), block) * block
    return triton.cdiv(tokens, share), share


def dweight(
    dout: Tensor,
    x: Tensor,
    patch: tuple[int, int, int],
    bias_dtype: torch.dtype | None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight, [E, C, *patch] in x's dtype, and bias, [E] in bias_dtype (empty if None)."""
    geometry = Geometry.of(tuple(x.shape), x.stride(), patch, x.element_size())
    count, features = x.shape[0] * geometry.tokens, dout.shape[2]
    check_count(count)
    shape = (features, x.shape[1], *patch)
    if count == 0 or features == 0 or x.shape[1] == 0:
        # Without channels weight has no elements, but bias has; what is left are empty sums.
        sums = x.new_empty(0) if bias_dtype is None else dout.sum((0, 1), dtype=torch.float32).to(bias_dtype)
        return x.new_zeros(shape), sums
    configs = CONFIGS[kernel_for("dweight", geometry.taps, x.dtype)]
    config = config or configs[0]
    dout = _rows(dout)
    if config.boxes and not _takes_boxes(dout):
        config = next(each for each in configs if not each.boxes)
    tiles = triton.cdiv(features, config.features) * triton.cdiv(geometry.taps, config.taps)
    parts, share = shares(count, tiles, config.tokens)
    one = parts == 1  # is the gradient itself
    dw = torch.empty(parts, *shape, dtype=x.dtype if one else torch.float32, device=x.device)
    dbias = None
    if bias_dtype is not None:
        dbias = torch.empty(parts, features, dtype=bias_dtype if one else torch.float32, device=x.device)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    with on_device(x):
        if config.boxes:
            width = triton.cdiv(geometry.taps, config.taps) * config.taps
            rows = torch.empty(count, width, dtype=x.dtype, device=x.device)
            write_patches[(triton.cdiv(count, WRITTEN) * (width // WRITTEN),)](
                x, rows, count, *geometry.numbers(), **_row_constants(geometry, config), num_warps=4
            )
            boxes = (
                TensorDescriptor(dout, [count, features], [dout.stride(1), 1], [config.tokens, config.features]),
                TensorDescriptor(rows, [count, width], [width, 1], [config.tokens, config.taps]),
            )
            blocks = {"BLOCK_M": config.tokens, "BLOCK_E": config.features, "BLOCK_K": config.taps}
            patchify_dweight_boxes[(parts * tiles,)](
                *boxes, dw, dbias, share, count, E=features, TAPS=geometry.taps, **blocks, **options
            )
        else:
            patchify_dweight[(parts * tiles,)](
                dout,
                x,
                dw,
                dbias,
                *dout.stride()[:2],
                share,
                count,
                *geometry.numbers(),
                **_constants(geometry, features, dout.dtype, config),
                **options,
            )
    if dbias is None:
        return _sum(dw, x.dtype), x.new_empty(0)
    return _sum(dw, x.dtype), _sum(dbias, bias_dtype or x.dtype)


def _takes_boxes(dout: Tensor) -> bool:
    """Whether the tensor memory accelerator can read dout as [B * N, E]; the interpreter always does as if."""
    batch, tokens, _ = dout.shape
    one = batch == 1 or dout.stride(0) == tokens * dout.stride(1)
    aligned = dout.stride(1) * dout.element_size() % 16 == 0 and dout.data_ptr() % 16 == 0
    return one and aligned and (not dout.is_cuda or capability(dout.device) >= (9, 0))


def dpos(dout: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of pos, [N, E]: the sum over the samples of dout [B, N, E]."""
    if dout.shape[0] == 0:
        return dout.new_zeros(dout.shape[1:], dtype=dtype)
    return _sum(_rows(dout), dtype, copy=True)


def _sum(parts: Tensor, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """Add up the parts in order, in float32, and round. One part of the right dtype is returned itself, or copied."""
    if len(parts) == 1 and parts.dtype == dtype and not copy:
        return parts[0]
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    if out.numel() == 0:
        return out
    whole = parts[0].is_contiguous()
    rows, columns = (1, out.numel()) if whole else out.shape
    with on_device(parts):
        sum_parts[(rows * triton.cdiv(columns, SUM_BLOCK),)](
            parts, out, len(parts), columns, parts.stride(0), 0 if whole else parts.stride(1), SUM_BLOCK, num_warps=4
        )
    return out


# What is compiled.


def _box_specializations(
    name: str, geometry: Geometry, features: int, dtype: torch.dtype, config: Config, first: bool
) -> Iterator[Specialization]:
    """List what a config with boxes launches; patches are written by the same kernel for all, listed with the first."""
    if first:
        types = dict.fromkeys(("gX", "gRows"), POINTERS[dtype]) | dict.fromkeys(PLAIN, "i32")
        constants = _row_constants(geometry, config)
        yield Specialization(f"write_patches/{name}", write_patches, types, constants, {"num_warps": 4}, tuple(PLAIN))
    element = POINTERS[dtype][1:]
    boxes = {"dout": config.features, "rows": config.taps}
    types = {name: f"tensordesc<{element}[{config.tokens},{width}]>" for name, width in boxes.items()}
    types |= dict.fromkeys(("gDw", "gDbias"), "*fp32") | dict.fromkeys(("share", "M"), "i32")
    blocks = {"BLOCK_M": config.tokens, "BLOCK_E": config.features, "BLOCK_K": config.taps}
    constants = {"E": features, "TAPS": geometry.taps, **blocks}
    options = {"num_warps": config.warps, "num_stages": config.stages}
    label = f"patchify_dweight_boxes/{name}/{config.tokens}x{config.features}x{config.taps}"
    made = Specialization(label, patchify_dweight_boxes, types, constants, options, ("share", "M"))
    for served in (90, 100):  # which have tensor copies
        yield made._replace(only=served)


def specializations() -> Iterator[Specialization]:
    """List what the launchers compile: every CONFIG for the first case that takes it, the default for the others."""
    plain = dict.fromkeys(PLAIN, "i32")
    seen = set()
    for name, geometry, features, dtype, _ in cases():
        common = dict.fromkeys(("gDout", "gX", "gW", "gDx"), POINTERS[dtype]) | plain
        common |= {"dout_b": "i32", "dout_n": "i32", "share": "i32", "gDw": "*fp32", "gDbias": "*fp32"}
        for fn, kind in ((patchify_dx, "dx"), (patchify_dweight, "dweight")):
            kernel = kernel_for(kind, geometry.taps, dtype)
            for config in CONFIGS[kernel][:1] if kernel in seen else CONFIGS[kernel]:
                if config.boxes:
                    first = config == CONFIGS[kernel][0]
                    yield from _box_specializations(name, geometry, features, dtype, config, first)
                    continue
                constants = _constants(geometry, features, dtype, config)
                options = {"num_warps": config.warps, "num_stages": config.stages}
                label = f"{fn.__name__}/{name}/{config.tokens}x{config.features}x{config.taps}x{config.stages}"
                yield Specialization(label, fn, common, constants, options, (*PLAIN, "share"))
            seen.add(kernel)
    numbers = dict.fromkeys(("parts", "columns", "part_stride", "row_stride"), "i32")
    for source in ("*fp32", "*bf16"):
        types = {"gParts": source, "gOut": "*bf16", **numbers}
        yield Specialization(
            f"sum_parts/{source[1:]}", sum_parts, types, {"BLOCK": SUM_BLOCK}, {"num_warps": 4}, ("parts",)
        )
