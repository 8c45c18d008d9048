# mypy: allow-untyped-defs, allow-incomplete-defs
"""Tokens to video: unpatchify and its gradient. Patchify's gather is fused with its projection, in ``patchify.py``.

    video[b, c, t*pt + it, h*ph + ih, w*pw + iw] = tokens[b, before + (t, h, w), ((it*ph + ih)*pw + iw)*C + c]

Values are moved, none is rounded, so the kernels see integers of the values' size. Tokens lie channel by channel and
the video row by row: a program reads row (it, ih) of the patches of some tokens, turns it in shared memory and writes
it, so that both sides are read and written in order. Any strides of the input are used as they are; offsets are 64 bits
wide where a token, a row or a channel starts. Bound by memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stattn.kernels._compile import Specialization
from stattn.kernels._device import check_count, on_device
from stattn.kernels._patches import Geometry, power_of_two

CONFIGS = (1024, 2048)  # values that one program moves, the default first
WARPS = 4

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# As in _patches.py: alignment in the video is told by VEC. What is missing here tells the alignment of tokens.
PLAIN = ["M", "before", "video_tokens", "grid_h", "grid_w", "size_t", "size_h", "size_w"]
PLAIN += ["video_b", "video_c", "video_t", "video_h", "video_w"]


@triton.jit
def pair_up(
    numbers,
    C: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    VEC: tl.constexpr,
    CUT_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Offsets in the tokens and in the video of a program's values, [BLOCK_M, BLOCK_W, BLOCK_C], and which exist."""
    M, token_b, token_n, token_f, tokens, before, video_tokens, grid_h, grid_w, sizes, steps = numbers
    COLUMNS: tl.constexpr = (PW + BLOCK_W - 1) // BLOCK_W
    CHANNELS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    PARTS: tl.constexpr = PT * PH * COLUMNS * CHANNELS
    m = tl.program_id(0) // PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(0) % PARTS
    row = part // (COLUMNS * CHANNELS)
    it, ih = row // PH, row % PH
    iw = (part // CHANNELS % COLUMNS * BLOCK_W + tl.arange(0, BLOCK_W))[None, :, None]
    c = (part % CHANNELS * BLOCK_C + tl.arange(0, BLOCK_C))[None, None, :]
    b, n = (m // tokens).to(tl.int64), m % tokens
    starts = b * token_b + n.to(tl.int64) * token_n
    features = (row * PW * C + iw * C + c).to(tl.int64) * token_f
    n -= before
    t, h, w = n // (grid_h * grid_w) * PT + it, n // grid_w % grid_h * PH + ih, n % grid_w * PW
    rows = (b * steps[0] + t.to(tl.int64) * steps[2] + h.to(tl.int64) * steps[3]) * VEC + w.to(tl.int64) * steps[4]
    pixels = c.to(tl.int64) * steps[1] * VEC + iw.to(tl.int64) * steps[4]
    written = (m < M)[:, None, None] & (iw < PW) & (c < C)
    seen = ((n >= 0) & (n < video_tokens) & (t < sizes[0]) & (h < sizes[1]))[:, None, None] & written
    if CUT_W:
        seen = seen & (w[:, None, None] + iw < sizes[2])
    return starts[:, None, None] + features, rows[:, None, None] + pixels, written, seen


@triton.jit(do_not_specialize=PLAIN)
def unpatchify_forward(
    gTokens,
    gVideo,
    M,
    tokens,
    before,
    video_tokens,
    grid_h,
    grid_w,
    size_t,
    size_h,
    size_w,
    video_b,
    video_c,
    video_t,
    video_h,
    video_w,
    token_b,
    token_n,
    token_f,
    C: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    VEC: tl.constexpr,
    CUT_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: a row of the patches of BLOCK_M tokens, BLOCK_W columns and BLOCK_C channels of it."""
    sizes, steps = (size_t, size_h, size_w), (video_b, video_c, video_t, video_h, 1 if VEC > 1 else video_w)
    numbers = (M, token_b, token_n, token_f, tokens, before, video_tokens, grid_h, grid_w, sizes, steps)
    source, target, _, seen = pair_up(numbers, C, PT, PH, PW, VEC, CUT_W, BLOCK_M, BLOCK_W, BLOCK_C)
    values = tl.load(gTokens + source, mask=seen)
    # [channel, token, column]: a warp writes the columns of many tokens, which lie side by side.
    tl.store(gVideo + target.permute(2, 0, 1), values.permute(2, 0, 1), mask=seen.permute(2, 0, 1))


@triton.jit(do_not_specialize=PLAIN)
def unpatchify_backward(
    gVideo,
    gTokens,
    M,
    tokens,
    before,
    video_tokens,
    grid_h,
    grid_w,
    size_t,
    size_h,
    size_w,
    video_b,
    video_c,
    video_t,
    video_h,
    video_w,
    token_b,
    token_n,
    token_f,
    C: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    VEC: tl.constexpr,
    CUT_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """As unpatchify_forward, from the video's gradient to the tokens'; zero where a token has no pixel."""
    sizes, steps = (size_t, size_h, size_w), (video_b, video_c, video_t, video_h, 1 if VEC > 1 else video_w)
    numbers = (M, token_b, token_n, token_f, tokens, before, video_tokens, grid_h, grid_w, sizes, steps)
    target, source, written, seen = pair_up(numbers, C, PT, PH, PW, VEC, CUT_W, BLOCK_M, BLOCK_W, BLOCK_C)
    values = tl.load(gVideo + source.permute(2, 0, 1), mask=seen.permute(2, 0, 1), other=0)
    tl.store(gTokens + target, values.permute(1, 2, 0), mask=written)


# Launchers.


def _constants(geometry: Geometry, values: int) -> dict[str, Any]:
    pt, ph, pw = geometry.patch
    columns, channels = min(power_of_two(pw), 64), min(power_of_two(geometry.size[1]), 32)
    return {
        "C": geometry.size[1],
        "PT": pt,
        "PH": ph,
        "PW": pw,
        "VEC": geometry.vec,
        "CUT_W": geometry.size[4] % pw != 0,
        "BLOCK_M": max(1, values // (columns * channels)),
        "BLOCK_W": columns,
        "BLOCK_C": channels,
    }


def _launch(kernel: Any, source: Tensor, out: Tensor, video: Tensor, tokens: Tensor, before: int, *rest: Any) -> None:
    """Run a kernel from ``source`` to ``out``, of which one is the video and one the tokens."""
    patch, values = rest
    integer = INTEGERS[source.element_size()]
    geometry = Geometry.of(tuple(video.shape), video.stride(), patch, video.element_size())
    count = tokens.shape[0] * tokens.shape[1]
    check_count(count)
    constants = _constants(geometry, values or CONFIGS[0])
    parts = patch[0] * patch[1] * triton.cdiv(patch[2], constants["BLOCK_W"])
    parts *= triton.cdiv(geometry.size[1], constants["BLOCK_C"])
    video_tokens, grid_h, grid_w, *numbers = geometry.numbers()
    with on_device(source):
        kernel[(triton.cdiv(count, constants["BLOCK_M"]) * parts,)](
            source.view(integer),
            out.view(integer),
            count,
            tokens.shape[1],
            before,
            video_tokens,
            grid_h,
            grid_w,
            *numbers,
            *tokens.stride(),
            **constants,
            num_warps=WARPS,
        )


def forward(
    tokens: Tensor,
    before: int,
    patch: tuple[int, int, int],
    channels: int,
    size: tuple[int, int, int],
    values: int | None = None,
) -> Tensor:
    """Return the video [B, C, *size] that tokens [B, N, pt*ph*pw*C] hold from their row ``before`` on."""
    video = torch.empty(tokens.shape[0], channels, *size, dtype=tokens.dtype, device=tokens.device)
    if video.numel():
        _launch(unpatchify_forward, tokens, video, video, tokens, before, patch, values)
    return video


def backward(video: Tensor, rows: int, before: int, patch: tuple[int, int, int], values: int | None = None) -> Tensor:
    """Return the gradient of tokens [B, rows, pt*ph*pw*C] from the video's: zero for rows that hold none of it."""
    features = patch[0] * patch[1] * patch[2] * video.shape[1]
    tokens = torch.empty(video.shape[0], rows, features, dtype=video.dtype, device=video.device)
    if tokens.numel():
        _launch(unpatchify_backward, video, tokens, video, tokens, before, patch, values)
    return tokens


# What is compiled.

_CASES = (
    ("wan", (1, 16, 21, 90, 160), (1, 2, 2), torch.bfloat16),
    ("pixels", (1, 3, 64, 256, 256), (4, 16, 16), torch.float32),
    ("cut", (1, 3, 15, 63, 61), (2, 8, 8), torch.float16),
)


def specializations() -> Iterator[Specialization]:
    """List what the launchers compile, for every CONFIG."""
    for name, size, patch, dtype in _CASES:
        strides = tuple(torch.empty(size, device="meta").stride())
        geometry = Geometry.of(size, strides, patch, dtype.itemsize)
        pointer = {2: "*i16", 4: "*i32"}[dtype.itemsize]
        types = {"gTokens": pointer, "gVideo": pointer}
        types |= dict.fromkeys([*PLAIN, "tokens", "token_b", "token_n"], "i32")
        for values in CONFIGS:
            constants = {**_constants(geometry, values), "token_f": 1}
            for fn in (unpatchify_forward, unpatchify_backward):
                label = f"{fn.__name__}/{name}/{values}"
                yield Specialization(label, fn, types, constants, {"num_warps": WARPS}, (*PLAIN, "tokens"))
