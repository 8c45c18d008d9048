# mypy: allow-untyped-defs, allow-incomplete-defs
"""Normal numbers from counters: Philox4x32-10 and the Box-Muller transform, in registers or into a tensor.

Numbers 4 i ... 4 i + 3 of a sample are those of counter (i, offset) under the sample's seed, so that a number does not
depend on how a launch is cut. The transform is computed in float64, as the reference computes it, and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from stattn.kernels._compile import Specialization
from stattn.kernels._device import on_device

NORMAL_QUADS, NORMAL_WARPS = 512, 4

KEY_0, KEY_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
ROUND_0, ROUND_1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
WORD = tl.constexpr(0xFFFFFFFF)
TURN = tl.constexpr(2.0 * math.pi)
STEP, HALF_STEP = tl.constexpr(2.0**-32), tl.constexpr(2.0**-33)
# pi/2 in two parts, of which the first has so few bits that its small multiples are exact.
QUARTER, QUARTER_REST = tl.constexpr(math.floor(math.pi / 2 * 2**40) / 2**40), tl.constexpr(7.443547480486623e-13)
PER_QUARTER = tl.constexpr(2.0 / math.pi)
# Taylor's series, the highest power first: within 2^-60 on [-pi/4, pi/4].
SINE = tl.constexpr(tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(9, -1, -1)))
COSINE = tl.constexpr(tuple((-1.0) ** k / math.factorial(2 * k) for k in range(9, -1, -1)))


@triton.jit
def sine_and_cosine(angle):
    """Return sin and cos of float64 angles in [0, 2 pi], to a unit in the last place, by their Taylor series."""
    turns = tl.floor(angle * PER_QUARTER + 0.5)
    x = (angle - turns * QUARTER) - turns * QUARTER_REST
    y = x * x
    s, c = y * SINE[0] + SINE[1], y * COSINE[0] + COSINE[1]
    for i in tl.static_range(2, 9):
        s, c = s * y + SINE[i], c * y + COSINE[i]
    s, c = s * y * x + x, c * y + 1.0
    quarter = turns.to(tl.int32)
    odd = (quarter & 1) == 1
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    sine = tl.where((quarter & 2) == 2, -sine, sine)
    cosine = tl.where(((quarter + 1) & 2) == 2, -cosine, cosine)
    return sine, cosine


@triton.jit
def box_muller(first, second):
    """Turn two random words into two normal numbers."""
    u = (first.to(tl.float32) * STEP + HALF_STEP).to(tl.float64)
    v = (second.to(tl.float32) * STEP + HALF_STEP).to(tl.float64)
    radius = tl.sqrt(-2.0 * tl.log(u))
    sine, cosine = sine_and_cosine(v * TURN)
    return (radius * cosine).to(tl.float32), (radius * sine).to(tl.float32)


@triton.jit
def four_normals(seed, offset, quad):
    """Draw the four numbers of each int64 quad of a sample: Philox4x32-10 and the Box-Muller transform."""
    c0, c1 = (quad & WORD).to(tl.uint32), (quad >> 32).to(tl.uint32)
    c2, c3 = c0 * 0 + (offset & WORD).to(tl.uint32), c0 * 0 + (offset >> 32).to(tl.uint32)
    k0, k1 = c0 * 0 + (seed & WORD).to(tl.uint32), c0 * 0 + (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, c0 * 0 + ROUND_0), c0 * ROUND_0
        high1, low1 = tl.umulhi(c2, c0 * 0 + ROUND_1), c2 * ROUND_1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + KEY_0, k1 + KEY_1
    a, b = box_muller(c0, c1)
    c, d = box_muller(c2, c3)
    return a, b, c, d


@triton.jit
def in_order(a, b, c, d):
    """Put four tensors side by side along two new last axes of 2."""
    return tl.join(tl.join(a, c), tl.join(b, d))  # [..., half, place in the half]


@triton.jit(do_not_specialize=("offset",))
def philox_normal_fill(out_ptr, seeds_ptr, offset, count, QUADS: tl.constexpr):
    """Fill samples of ``count`` float32 numbers each."""
    programs = tl.cdiv(count, 4 * QUADS)
    sample, block = tl.program_id(0) // programs, tl.program_id(0) % programs
    quad = block.to(tl.int64) * QUADS + tl.arange(0, QUADS)
    a, b, c, d = four_normals(tl.load(seeds_ptr + sample), offset.to(tl.int64), quad)
    z = in_order(a, b, c, d).reshape(4 * QUADS)
    place = block.to(tl.int64) * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    tl.store(out_ptr + sample.to(tl.int64) * count + place, z, mask=place < count)


def philox_normal(seeds: Tensor, offset: int, shape: torch.Size) -> Tensor:
    """Draw float32 normal numbers of a shape [B, ...]; seeds int64 [B]."""
    out = torch.empty(shape, dtype=torch.float32, device=seeds.device)
    if out.numel():
        count = math.prod(shape[1:])
        grid = (shape[0] * triton.cdiv(count, 4 * NORMAL_QUADS),)
        with on_device(seeds):
            philox_normal_fill[grid](out, seeds.contiguous(), offset, count, QUADS=NORMAL_QUADS, num_warps=NORMAL_WARPS)
    return out


def specializations() -> Iterator[Specialization]:
    """List what the launcher compiles."""
    types = {"out_ptr": "*fp32", "seeds_ptr": "*i64", "offset": "i32", "count": "i32"}
    options = {"num_warps": NORMAL_WARPS}
    yield Specialization("normal", philox_normal_fill, types, {"QUADS": NORMAL_QUADS}, options, ("offset",))
