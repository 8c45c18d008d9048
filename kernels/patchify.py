# mypy: allow-untyped-defs, allow-incomplete-defs
"""Video to tokens: patchify's forward. Its gradients are in ``patchify_bwd.py``, the way back in ``unpatchify.py``.

    out[m, e] = sum over k of x[place(m) + tap(k)] * weight[e, k] + bias[e] + pos[m mod N, e]

Token m = (sample, t, h, w) starts at pixel place(m); k counts the weight's own order (c, it, ih, iw), and tap(k) is
that pixel of the patch. Fused: the gather (no patch matrix is ever written), the product, bias, position and rounding:
sums are float32 and a token is rounded once, after pos. 16-bit products are exact; float32 products are IEEE, and
their sums are made of sums of SPAN terms: in one running sum the error of thousands would show.

Patches are found and read by ``_patches``: a video of any size and any strides is read where it lies.

Two kernels. ``patchify_forward_resident`` holds the patches of a tile of tokens (up to 256 taps) and walks the
features: at Wan's (1, 2, 2) x 16 = 64 taps it is bound by writing the tokens. Programs that share a row read their
patches all at once, when nothing is written; where rows are many, each takes an even share of all tiles instead, and
reads at a time of its own. ``patchify_forward_tiled`` walks the
taps, as a matrix product does: at 4 x 16 x 16 pixels, 3,072 taps, it is bound by the tensor cores. A token's bits
depend on nothing but its patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stattn.kernels._compile import Specialization
from stattn.kernels._device import capability, check_count, on_device
from stattn.kernels._patches import PLAIN, Geometry, patch_steps, place, power_of_two, read_patches

# Launch parameters.


class Config(NamedTuple):
    """The tile of one program: tokens x features, ``taps`` at a time (all at once in the resident kernel).

    together: resident programs that the GPU is meant to run at a time, among which tiles are shared out. boxes:
    tiles of tokens are written by the tensor memory accelerator, where the GPU has one and features fill 16 bytes.
    across: a program may go on in the next row of tiles. warps and stages as Triton takes them.
    """

    tokens: int
    features: int
    taps: int
    warps: int
    stages: int
    together: int = 0
    boxes: bool = False
    across: bool = False


# By kernel, the default first; the others are what benchmarks/bench_patchify.py --tune times beside it.
CONFIGS: dict[str, tuple[Config, ...]] = {
    "resident": (  # up to 64 taps
        Config(128, 128, 64, 8, 3, together=264, boxes=True, across=True),
        Config(128, 64, 64, 4, 3, together=396, boxes=True),
        Config(128, 128, 64, 8, 3, together=264),
        Config(64, 128, 64, 4, 3, together=396),
    ),
    "resident-wide": (  # up to 256 taps
        Config(128, 64, 256, 8, 2, together=132),
        Config(64, 64, 256, 4, 2, together=264),
    ),
    "tiled": (
        Config(128, 256, 64, 8, 3),
        Config(128, 128, 64, 8, 4),
        Config(64, 256, 64, 4, 3),
        Config(128, 128, 128, 8, 2),
    ),
    "tiled-short": (Config(128, 128, 64, 8, 3),),  # rows of a patch shorter than 16 bytes
    "tiled-float32": (
        Config(64, 64, 16, 4, 3),
        Config(64, 128, 16, 8, 3),
    ),
}
GROUP = 8  # rows of tiles that are walked together, so that their weights stay in the L2
SPAN = 256  # terms of a float32 sum that are added up before they join the total: a multiple of every tile's


def kernel_for(geometry: Geometry, dtype: torch.dtype) -> str:
    """Name the entry of CONFIGS that projects these patches."""
    if dtype.itemsize == 4:
        return "tiled-float32"
    if geometry.taps <= 256:
        return "resident" if geometry.taps <= 64 else "resident-wide"
    return "tiled" if geometry.run * dtype.itemsize == 16 else "tiled-short"


def span_of(dtype: torch.dtype) -> int:
    """Return how many terms are added up before they join the total; 0: all. Rounding to 16 bits hides the rest."""
    return SPAN if dtype.itemsize == 4 else 0


@triton.jit
def finish_tokens(acc, out, gBias, gPos, m, valid, e, first, e0, tokens, E: tl.constexpr, BOXES: tl.constexpr):
    """Add bias and position to the sums of tokens m and features e, from ``first`` and e0 on, round, and write."""
    mask = valid[:, None] & (e < E)[None, :]
    if gBias is not None:
        acc += tl.load(gBias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    if gPos is not None:
        rows = gPos + (m % tokens).to(tl.int64) * E
        acc += tl.load(rows[:, None] + e[None, :], mask=mask, other=0.0).to(tl.float32)
    if BOXES:
        out.store([first, e0], acc.to(out.dtype))  # what lies outside is not written
    else:
        where = out + first.to(tl.int64) * E + (m - first)[:, None] * E + e[None, :]
        tl.store(where, acc.to(out.dtype.element_ty), mask=mask)


# Forward.


@triton.jit
def _patches(
    gX, first, M, tokens, grid_h, grid_w, sizes, steps,
    TAPS: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, RAGGED_T: tl.constexpr,
    RAGGED_H: tl.constexpr, RAGGED_W: tl.constexpr, RUN: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    TAPS_A: tl.constexpr, TAPS_B: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Read the patches of tokens from ``first`` on as TAPS_A and TAPS_B columns; give the tokens, which there are."""
    m = first + tl.arange(0, BLOCK_M)
    valid = m < M
    at = place(m, tokens, grid_h, grid_w, steps, PT, PH, PW, VEC)
    x_a = read_patches(
        gX, at, valid, 0, steps, sizes, TAPS, PT, PH, PW, RAGGED_T, RAGGED_H, RAGGED_W, RUN, VEC, WIDE, TAPS_A
    )
    x_b = x_a
    if TAPS_B > 0:
        x_b = read_patches(
            gX, at, valid, TAPS_A, steps, sizes, TAPS, PT, PH, PW, RAGGED_T, RAGGED_H, RAGGED_W, RUN, VEC, WIDE, TAPS_B
        )
    return m, valid, x_a, x_b


@triton.jit
def _project(
    x_a, x_b, gW, gBias, gPos, out, m, valid, first, e0, tokens,
    E: tl.constexpr, TAPS: tl.constexpr, TAPS_A: tl.constexpr, TAPS_B: tl.constexpr, BLOCK_E: tl.constexpr,
    BOXES: tl.constexpr,
):  # fmt: skip
    """Project patches on to the features from e0 on, and write them."""
    e = e0 + tl.arange(0, BLOCK_E)
    k_a = tl.arange(0, TAPS_A)
    w_a = tl.load(gW + e[None, :] * TAPS + k_a[:, None], mask=(e < E)[None, :] & (k_a < TAPS)[:, None], other=0.0)
    acc = tl.dot(x_a, w_a)
    if TAPS_B > 0:
        k_b = TAPS_A + tl.arange(0, TAPS_B)
        mask = (e < E)[None, :] & (k_b < TAPS)[:, None]
        acc = tl.dot(x_b, tl.load(gW + e[None, :] * TAPS + k_b[:, None], mask=mask, other=0.0), acc)
    finish_tokens(acc, out, gBias, gPos, m, valid, e, first, e0, tokens, E, BOXES)


@triton.jit(do_not_specialize=[*PLAIN, "share"])
def patchify_forward_resident(
    gX,
    gW,
    gBias,
    gPos,
    out,
    M,
    tokens,
    grid_h,
    grid_w,
    size_t,
    size_h,
    size_w,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    share,
    E: tl.constexpr,
    TAPS: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RAGGED_T: tl.constexpr,
    RAGGED_H: tl.constexpr,
    RAGGED_W: tl.constexpr,
    RUN: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    TAPS_A: tl.constexpr,
    TAPS_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BOXES: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """One program: ``share`` tiles of tokens and features, of a row, or with ACROSS of as many rows as it takes."""
    COLUMNS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    steps = patch_steps(stride_b, stride_c, stride_t, stride_h, stride_w, VEC)
    sizes = (size_t, size_h, size_w)
    if ACROSS:
        begin = tl.program_id(0) * share
        end = min(begin + share, tl.cdiv(M, BLOCK_M) * COLUMNS)
        for row in range(begin // COLUMNS, tl.cdiv(end, COLUMNS)):
            first = row * BLOCK_M
            m, valid, x_a, x_b = _patches(
                gX, first, M, tokens, grid_h, grid_w, sizes, steps,
                TAPS, PT, PH, PW, RAGGED_T, RAGGED_H, RAGGED_W, RUN, VEC, WIDE, TAPS_A, TAPS_B, BLOCK_M,
            )  # fmt: skip
            for column in tl.range(max(begin - row * COLUMNS, 0), min(end - row * COLUMNS, COLUMNS)):
                e0 = column * BLOCK_E
                _project(
                    x_a, x_b, gW, gBias, gPos, out, m, valid, first, e0, tokens, E, TAPS, TAPS_A, TAPS_B, BLOCK_E, BOXES
                )
    else:
        shares = tl.cdiv(COLUMNS, share)
        first = tl.program_id(0) // shares * BLOCK_M
        begin = tl.program_id(0) % shares * share * BLOCK_E
        m, valid, x_a, x_b = _patches(
            gX, first, M, tokens, grid_h, grid_w, sizes, steps,
            TAPS, PT, PH, PW, RAGGED_T, RAGGED_H, RAGGED_W, RUN, VEC, WIDE, TAPS_A, TAPS_B, BLOCK_M,
        )  # fmt: skip
        for e0 in tl.range(begin, min(begin + share * BLOCK_E, E), BLOCK_E):
            _project(
                x_a, x_b, gW, gBias, gPos, out, m, valid, first, e0, tokens, E, TAPS, TAPS_A, TAPS_B, BLOCK_E, BOXES
            )


@triton.jit(do_not_specialize=PLAIN)
def patchify_forward_tiled(
    gX,
    gW,
    gBias,
    gPos,
    out,
    M,
    tokens,
    grid_h,
    grid_w,
    size_t,
    size_h,
    size_w,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    E: tl.constexpr,
    TAPS: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RAGGED_T: tl.constexpr,
    RAGGED_H: tl.constexpr,
    RAGGED_W: tl.constexpr,
    RUN: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    BOXES: tl.constexpr,
):
    """One program: BLOCK_M tokens, BLOCK_E features, all taps. Programs walk GROUP rows of tiles column by column."""
    COLUMNS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    row = tl.program_id(0) // (GROUP * COLUMNS) * GROUP
    rows = min(tl.cdiv(M, BLOCK_M) - row, GROUP)
    first = (row + tl.program_id(0) % (GROUP * COLUMNS) % rows) * BLOCK_M
    e0 = tl.program_id(0) % (GROUP * COLUMNS) // rows * BLOCK_E
    e = e0 + tl.arange(0, BLOCK_E)
    m = first + tl.arange(0, BLOCK_M)
    valid = m < M
    steps = patch_steps(stride_b, stride_c, stride_t, stride_h, stride_w, VEC)
    sizes = (size_t, size_h, size_w)
    at = place(m, tokens, grid_h, grid_w, steps, PT, PH, PW, VEC)
    w_rows = gW + e.to(tl.int64)[None, :] * TAPS
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for k0 in tl.range(0, TAPS, BLOCK_K):
        x = read_patches(
            gX, at, valid, k0, steps, sizes, TAPS, PT, PH, PW, RAGGED_T, RAGGED_H, RAGGED_W, RUN, VEC, WIDE, BLOCK_K
        )
        k = (k0 + tl.arange(0, BLOCK_K))[:, None]
        w = tl.load(w_rows + k, mask=(e < E)[None, :] & (k < TAPS), other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        if SPAN > 0:
            if (k0 + BLOCK_K) % SPAN == 0:
                total += acc
                acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    if SPAN > 0:
        acc += total
    finish_tokens(acc, out, gBias, gPos, m, valid, e, first, e0, tokens, E, BOXES)


def _halves(taps: int) -> tuple[int, int]:
    """Split taps into two powers of two of which a product can be made: 144 = 128 + 16; 64 and none."""
    first = max(16, 1 << (taps.bit_length() - 1))
    return first, 0 if taps <= first else max(16, power_of_two(taps - first))


@lru_cache(maxsize=1024)
def _share(rows: int, columns: int, together: int, across: bool) -> tuple[int, bool]:
    """Choose how many tiles a resident program walks, and whether they go on in the next row: the shortest run.

    The last programs to start decide; reading the patches of a row costs a program as much as a tile. across: whether
    it may go on.
    """

    def time(share: int) -> int:
        return triton.cdiv(rows * triton.cdiv(columns, share), together) * (share + 1)

    within = min((triton.cdiv(columns, parts) for parts in range(1, columns + 1)), key=time)
    even = triton.cdiv(rows * columns, together)
    read = triton.cdiv(even, columns) + 1
    return (even, True) if across and even + read < time(within) else (within, False)


def _forward_constants(
    kernel: str, geometry: Geometry, features: int, dtype: torch.dtype, config: Config, across: bool
) -> dict[str, Any]:
    constants = {"E": features, **geometry.constants(), "BLOCK_M": config.tokens, "BLOCK_E": config.features}
    constants["BOXES"] = config.boxes
    if kernel.startswith("resident"):
        first, second = _halves(geometry.taps)
        return {**constants, "TAPS_A": first, "TAPS_B": second, "ACROSS": across}
    return {**constants, "GROUP": GROUP, "BLOCK_K": config.taps, "SPAN": span_of(dtype)}


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None, config: Config | None = None) -> Tensor:
    """Return the tokens [B, N, E] of a video x [B, C, T, H, W] of any strides. Others are copied if not contiguous."""
    patch = weight.shape[2], weight.shape[3], weight.shape[4]
    geometry = Geometry.of(tuple(x.shape), x.stride(), patch, x.element_size())
    count, features = x.shape[0] * geometry.tokens, weight.shape[0]
    check_count(count)
    out = torch.empty(x.shape[0], geometry.tokens, features, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    kernel = kernel_for(geometry, x.dtype)
    if config is None:
        # What goes on in the next row was compared with float64 on a GPU for such calls alone.
        whole = not any(n % p for n, p in zip(x.shape[2:], patch, strict=True))
        config = CONFIGS[kernel][0]
        config = config._replace(across=config.across and whole and pos is None and x.dtype == torch.bfloat16)
    config = config._replace(boxes=config.boxes and _takes_boxes(out))
    rows = triton.cdiv(count, config.tokens)
    columns = triton.cdiv(features, config.features)
    resident = kernel.startswith("resident")
    share, across = _share(rows, columns, config.together, config.across) if resident else (1, False)
    programs = triton.cdiv(rows * columns, share) if across else rows * triton.cdiv(columns, share)
    target: Any = out
    if config.boxes:
        target = TensorDescriptor(out, [count, features], [features, 1], [config.tokens, config.features])
    arguments = (x, *(None if each is None else each.contiguous() for each in (weight, bias, pos)), target, count)
    with on_device(x):
        (patchify_forward_resident if resident else patchify_forward_tiled)[(programs,)](
            *arguments,
            *geometry.numbers(),
            *((share,) if resident else ()),
            **_forward_constants(kernel, geometry, features, x.dtype, config, across),
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out


def _takes_boxes(out: Tensor) -> bool:
    """Whether the tensor memory accelerator can write these tokens; the interpreter always does as if."""
    wide = out.shape[2] * out.element_size() % 16 == 0
    return wide and (not out.is_cuda or capability(out.device) >= (9, 0))


# What is compiled.


POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def describe(dtype: torch.dtype) -> dict[str, str]:
    """Give the types of the forward's arguments, for `specializations`."""
    tensors = dict.fromkeys(("gX", "gW", "gBias", "gPos", "out"), POINTERS[dtype])
    return tensors | dict.fromkeys([*PLAIN, "share"], "i32")


# (name, video, patch, features, dtype, with position): each kernel, short and long rows of a patch, ragged or not.
_CASES = (
    ("wan", (1, 16, 21, 90, 160), (1, 2, 2), 5120, torch.bfloat16, False),
    ("ragged", (1, 16, 21, 91, 161), (1, 2, 2), 1536, torch.float16, True),
    ("wan-i2v", (1, 36, 21, 90, 160), (1, 2, 2), 5120, torch.bfloat16, False),
    ("pixels", (1, 3, 64, 256, 256), (4, 16, 16), 1536, torch.bfloat16, False),
    ("channels", (1, 128, 21, 90, 160), (1, 2, 2), 1536, torch.bfloat16, False),
    ("wan", (1, 16, 21, 90, 160), (1, 2, 2), 5120, torch.float32, True),
)


def cases() -> Iterator[tuple[str, Geometry, int, torch.dtype, bool]]:
    """Yield representative videos: a name, the geometry, the features, the dtype and whether there is a position."""
    for name, size, patch, features, dtype, pos in _CASES:
        strides = tuple(torch.empty(size, device="meta").stride())
        geometry = Geometry.of(size, strides, patch, dtype.itemsize)
        yield f"{name}/{str(dtype).removeprefix('torch.')}", geometry, features, dtype, pos


def specializations() -> Iterator[Specialization]:
    """List what the launcher compiles: every CONFIG for the first case that takes it, the default for the others."""
    seen = set()
    for name, geometry, features, dtype, pos in cases():
        kernel = kernel_for(geometry, dtype)
        fn = patchify_forward_resident if kernel.startswith("resident") else patchify_forward_tiled
        for config in CONFIGS[kernel][:1] if kernel in seen else CONFIGS[kernel]:
            options = {"num_warps": config.warps, "num_stages": config.stages}
            label = f"{fn.__name__}/{name}/{config.tokens}x{config.features}x{config.taps}"
            types = describe(dtype)
            if config.boxes:
                label += "/boxes"
                types["out"] = f"tensordesc<{POINTERS[dtype][1:]}[{config.tokens},{config.features}]>"
            for across in (False, True) if config.across else (False,):
                constants = _forward_constants(kernel, geometry, features, dtype, config, across)
                constants |= {} if pos else {"gPos": None}
                yield Specialization(label + "/across" * across, fn, types, constants, options, (*PLAIN, "share"))
        seen.add(kernel)
