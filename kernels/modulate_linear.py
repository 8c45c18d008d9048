# mypy: allow-untyped-defs, allow-incomplete-defs
"""The last layer of a model in one pass: adaptive layer norm and a narrow projection, no modulated token ever written.

    f = weight * (1 + scale)                      s = bias * (1 + scale) + shift
    out = (((x - mean) * rstd) * f + s) W^T + b   = (((x - p) f) W^T - (mean - p) (f W^T)) rstd + (s W^T + b)

p is any number for each token; the mean of its first channels keeps x - p as small as x - mean. "rms" has mean = p = 0.
So tokens are read once: their sums, of x - p and its square, and their product with W go on at the same time. A first,
small kernel makes f W^T and s W^T + b for each group of tokens with the same vectors.

Sums and vectors are fp32; (x - p) f is rounded to x's dtype for the tensor cores, in place of the modulated token, and
the result once. Bound by reading x.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stattn.kernels._compile import Specialization
from stattn.kernels._device import on_device, roomy
from stattn.kernels._rows import (
    ABSENT,
    GROUP,
    as_vector,
    group_address,
    group_rows,
    row_address,
    unit_stride,
)


class Config(NamedTuple):
    """The tile of a program, tokens x channels; warps and stages as Triton takes them."""

    tokens: int
    channels: int
    warps: int
    stages: int


CONFIGS = (Config(64, 64, 4, 4), Config(64, 64, 4, 5), Config(128, 64, 8, 4))
# Features that one tile of sums holds.
MAX_FEATURES = 256
LITTLE_STAGES = 3  # with more than 128 features, where shared memory is short
# The tile of the small kernel, features x channels.
VECTOR_FEATURES, VECTOR_CHANNELS = 8, 512


# Kernels.


@triton.jit
def load_vectors(scale, shift, weight, bias, cols, C: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """Load f and s of some channels. scale, shift: the addresses of a group's."""
    inside = cols < C
    ones = tl.full(cols.shape, 1.0, tl.float32)
    scaled, added = ones, ones - 1.0
    if SCALE != ABSENT:
        scaled += tl.load(scale + cols, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        added = tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32) * scaled
    if SHIFT != ABSENT:
        added += tl.load(shift + cols, mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        scaled *= tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    return scaled, added


@triton.jit
def vector_products(
    scale, shift, weight, bias, matrix, matrix_bias, of_factor, of_term, groups, scale_b, scale_r, shift_b, shift_r,
    C: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """Store f W^T and s W^T + b of a group, fp32 [groups, N]: BLOCK_N features."""
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // BLOCKS
    features = tl.program_id(0) % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    at_scale = group_address(scale, group, groups, scale_b, scale_r) if SCALE != ABSENT else None
    at_shift = group_address(shift, group, groups, shift_b, shift_r) if SHIFT != ABSENT else None
    factors = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    terms = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for c in tl.range(0, C, BLOCK_C):
        cols = c + tl.arange(0, BLOCK_C)
        factor, term = load_vectors(at_scale, at_shift, weight, bias, cols, C, SCALE, SHIFT)
        mask = (features < N)[:, None] & (cols < C)[None, :]
        w = tl.load(matrix + features[:, None] * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        factors += w * factor[None, :]
        terms += w * term[None, :]
    term = tl.sum(terms, 1)
    if matrix_bias is not None:
        term += tl.load(matrix_bias + features, mask=features < N, other=0.0).to(tl.float32)
    tl.store(of_factor + group * N + features, tl.sum(factors, 1), mask=features < N)
    tl.store(of_term + group * N + features, term, mask=features < N)


@triton.jit(do_not_specialize=["tokens", "groups", "rows"])
def modulate_linear(
    x, scale, weight, matrix, of_factor, of_term, out, tokens, groups, rows, x_b, x_n, scale_b, scale_r, eps,
    C: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr, LAYER: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Modulate and project BLOCK_M tokens of one group."""
    tiles = tl.cdiv(rows, BLOCK_M)
    group = tl.program_id(0) // tiles
    local = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    live = local < rows
    row = group * rows + tl.where(live, local, 0)
    at_x = row_address(x, row, tokens, x_b, x_n)[:, None]
    at_scale = group_address(scale, group, groups, scale_b, scale_r) if SCALE != ABSENT else None
    features = tl.arange(0, BLOCK_N)
    pivot = tl.zeros([BLOCK_M], tl.float32)
    if LAYER:
        cols = tl.arange(0, BLOCK_C)
        start = tl.load(at_x + cols[None, :], mask=(cols < C)[None, :], other=0.0).to(tl.float32)
        pivot = tl.sum(start, 1) / min(C, BLOCK_C)
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    plain = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for c in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        cols = c + tl.arange(0, BLOCK_C)
        values = tl.load(at_x + cols[None, :], mask=(cols < C)[None, :], other=0.0).to(tl.float32)
        apart = tl.where((cols < C)[None, :], values - pivot[:, None], 0.0)
        if LAYER:
            plain += apart
        square += apart * apart
        factor, _ = load_vectors(at_scale, None, weight, None, cols, C, SCALE, ABSENT)
        mask = (features < N)[None, :] & (cols < C)[:, None]
        w = tl.load(matrix + features[None, :] * C + cols[:, None], mask=mask, other=0.0)
        product = tl.dot((apart * factor[None, :]).to(w.dtype), w, product)
    mean = tl.sum(plain, 1) / C
    rstd = tl.rsqrt(tl.sum(square, 1) / C - mean * mean + eps)
    inside = features < N
    factor = tl.load(of_factor + group * N + features, mask=inside, other=0.0)
    term = tl.load(of_term + group * N + features, mask=inside, other=0.0)
    result = (product - mean[:, None] * factor[None, :]) * rstd[:, None] + term[None, :]
    at = out + row.to(tl.int64)[:, None] * N + features[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


# Launchers.


def forward(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    matrix: Tensor,
    matrix_bias: Tensor | None,
    config: Config = CONFIGS[0],
) -> Tensor:
    """Return ``modulate`` of x [B, N, C], projected by matrix [E, C] and matrix_bias [E]: [B, N, E], contiguous.

    scale, shift: per sample or per frame, or None. A tensor whose channels do not lie side by side is copied first.
    """
    batch, tokens, channels = x.shape
    features = matrix.shape[0]
    out = torch.empty((batch, tokens, features), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if features > 128 and not roomy(x.device):
        config = config._replace(stages=LITTLE_STAGES)
    x, weight, bias = unit_stride(x), unit_stride(weight), unit_stride(bias)
    matrix = matrix.contiguous()
    groups = group_rows(x, scale, shift)
    scales, shifts = as_vector(scale, tokens), as_vector(shift, tokens)
    of_factor, of_term = torch.empty((2, groups.total, features), dtype=torch.float32, device=x.device)
    with on_device(x):
        vector_products[(groups.total * triton.cdiv(features, VECTOR_FEATURES),)](
            scales.tensor, shifts.tensor, weight, bias, matrix,
            None if matrix_bias is None else matrix_bias.contiguous(), of_factor, of_term, groups.per_sample,
            scales.stride_b, scales.stride_r, shifts.stride_b, shifts.stride_r,
            C=channels, N=features, BLOCK_N=VECTOR_FEATURES, BLOCK_C=VECTOR_CHANNELS, SCALE=scales.kind,
            SHIFT=shifts.kind, num_warps=4,
        )  # fmt: skip
        modulate_linear[(groups.total * triton.cdiv(groups.rows, config.tokens),)](
            x, scales.tensor, weight, matrix, of_factor, of_term, out, tokens, groups.per_sample, groups.rows,
            x.stride(0), x.stride(1), scales.stride_b, scales.stride_r, eps,
            C=channels, N=features, LAYER=norm == "layer", SCALE=scales.kind, **_blocks(features, config),
            num_warps=_warps(features, config),
        )  # fmt: skip
    return out


def _warps(features: int, config: Config) -> int:
    """Return the warps of a program: twice as many hold the sums of more than 128 features."""
    return config.warps if features <= 128 else 2 * config.warps


def _blocks(features: int, config: Config) -> dict[str, int]:
    return {
        "BLOCK_M": config.tokens,
        "BLOCK_N": max(16, triton.next_power_of_2(features)),
        "BLOCK_C": config.channels,
        "STAGES": config.stages,
    }


def specializations() -> Iterator[Specialization]:
    """List what the launcher compiles for Wan's last layer: every CONFIG, and the small kernel."""
    types = {
        **dict.fromkeys(("x", "matrix", "out", "matrix_bias"), "*bf16"),
        **dict.fromkeys(("scale", "shift", "weight", "bias", "of_factor", "of_term"), "*fp32"),
        **dict.fromkeys(("tokens", "groups", "rows"), "i32"),
        **{f"{name}_{axis}": "i32" for name in ("x", "scale", "shift") for axis in "bnr"},
        "eps": "fp32",
    }
    unaligned = ("tokens", "groups", "rows")
    shape: dict[str, Any] = {"C": 5120, "weight": None, "SCALE": GROUP.value}
    for number, config in enumerate(CONFIGS):
        for features in (64, MAX_FEATURES)[: 1 if number else 2]:
            constants = {**shape, "N": features, **_blocks(features, config), "LAYER": True}
            options = {"num_warps": _warps(features, config)}
            name = f"modulate_linear/{features}/{number}"
            made = Specialization(name, modulate_linear, types, constants, options, unaligned, little=features <= 128)
            yield made
            if not made.little:
                constants = constants | {"STAGES": LITTLE_STAGES}
                yield made._replace(name=f"{name}/little", constants=constants, only=80, little=True)
    small = {"N": 64, "BLOCK_N": VECTOR_FEATURES, "BLOCK_C": VECTOR_CHANNELS, "bias": None, "SHIFT": GROUP.value}
    yield Specialization("vector_products", vector_products, types, {**shape, **small}, {"num_warps": 4}, unaligned)
