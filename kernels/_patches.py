# mypy: allow-untyped-defs, allow-incomplete-defs
"""Where patches lie in a video of any strides, and how they are read: what patchify and unpatchify share.

A patch's start is 64 bits wide, its taps 32 where they fit (``Geometry.wide``), so that a video of any size and any
strides is read where it lies. Past the end of an axis that the patch does not divide zeros are assumed, never read.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# Launchers' parts.


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()


class Geometry(NamedTuple):
    """A video [B, C, T, H, W] with its strides, cut in patches.

    run: pixels of a patch's row that lie side by side in the order of taps: a power of two. vec: how many of them one
    access may move, given the strides.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    patch: tuple[int, int, int]
    grid: tuple[int, int, int]
    run: int
    vec: int

    @classmethod
    def of(
        cls, size: tuple[int, ...], strides: tuple[int, ...], patch: tuple[int, int, int], itemsize: int
    ) -> Geometry:
        """Describe a video and its patches."""
        t, h, w = (-(-n // p) for n, p in zip(size[2:], patch, strict=True))
        run = min(patch[2] & -patch[2], 16 // itemsize)
        vec = run if strides[4] == 1 else 1
        while any(stride % vec for n, stride in zip(size[:4], strides[:4], strict=True) if n > 1):
            vec //= 2
        return cls(size, strides, patch, (t, h, w), run, vec)

    @property
    def tokens(self) -> int:
        """Tokens of one sample."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def taps(self) -> int:
        """Pixels of a patch, all channels counted."""
        return self.size[1] * self.patch[0] * self.patch[1] * self.patch[2]

    @property
    def wide(self) -> bool:
        """Whether a patch reaches farther than 32 bits count; where patches start is always counted with 64."""
        extent = (self.size[1], *self.patch)
        return sum((n - 1) * stride for n, stride in zip(extent, self.strides[1:], strict=True)) >= 2**31

    def numbers(self) -> tuple[int, ...]:
        """Give the arguments that change from video to video, in the kernels' order."""
        steps = (stride // self.vec for stride in self.strides[:4])
        return self.tokens, self.grid[1], self.grid[2], *self.size[2:], *steps, self.strides[4]

    def constants(self) -> dict[str, int | bool]:
        """Give the kernels' constants: the patch, which axes are ragged, and how rows may be read."""
        ragged = {f"RAGGED_{n}": bool(size % p) for n, size, p in zip("THW", self.size[2:], self.patch, strict=True)}
        pt, ph, pw = self.patch
        return {
            "TAPS": self.taps,
            "PT": pt,
            "PH": ph,
            "PW": pw,
            "RUN": self.run,
            "VEC": self.vec,
            "WIDE": self.wide,
            **ragged,
        }


# Numbers that change from call to call. A version for each that is 1 or a multiple of 16 would gain nothing: alignment
# is told by VEC.
PLAIN = ["M", "tokens", "grid_h", "grid_w", "size_t", "size_h", "size_w"]
PLAIN += ["stride_b", "stride_c", "stride_t", "stride_h", "stride_w"]


# Kernels' parts.


@triton.jit
def place(m, tokens, grid_h, grid_w, steps, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, VEC: tl.constexpr):
    """Where the patch of token m starts: its offset in the video, and t, h, w."""
    n = m % tokens
    t, h, w = n // (grid_h * grid_w) * PT, n // grid_w % grid_h * PH, n % grid_w * PW
    start = (m // tokens).to(tl.int64) * steps[0] + t.to(tl.int64) * steps[2] + h.to(tl.int64) * steps[3]
    return start * VEC + w.to(tl.int64) * steps[4], t, h, w


@triton.jit
def tap(k, steps, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Where tap k lies in a patch: its offset from the patch's start, 64 bits wide if WIDE, and t, h, w."""
    t, h, w = k // (PH * PW) % PT, k // PW % PH, k % PW
    c = k // (PT * PH * PW)
    if WIDE:
        start = c.to(tl.int64) * steps[1] + t.to(tl.int64) * steps[2] + h.to(tl.int64) * steps[3]
        return start * VEC + w.to(tl.int64) * steps[4], t, h, w
    else:
        return (c * steps[1] + t * steps[2] + h * steps[3]) * VEC + w * steps[4], t, h, w


@triton.jit
def within(at, of, sizes, mask, RAGGED_T: tl.constexpr, RAGGED_H: tl.constexpr, RAGGED_W: tl.constexpr):
    """Narrow a mask to the taps that the video has."""
    if RAGGED_T:
        mask = mask & (at[1] + of[1] < sizes[0])
    if RAGGED_H:
        mask = mask & (at[2] + of[2] < sizes[1])
    if RAGGED_W:
        mask = mask & (at[3] + of[3] < sizes[2])
    return mask


@triton.jit
def patch_steps(stride_b, stride_c, stride_t, stride_h, stride_w, VEC: tl.constexpr):
    """The strides in units of VEC pixels. Rows read VEC at a time have a unit stride: told as a constant."""
    if VEC > 1:
        return stride_b, stride_c, stride_t, stride_h, 1
    else:
        return stride_b, stride_c, stride_t, stride_h, stride_w


@triton.jit
def gather_patches(
    gX, at, valid, k0, steps, sizes,
    TAPS: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, RAGGED_T: tl.constexpr,
    RAGGED_H: tl.constexpr, RAGGED_W: tl.constexpr, RUN: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Load taps k0 ... of the tokens that start at ``at``, zero where there is none, for ``as_rows``."""
    if RUN * gX.dtype.element_ty.primitive_bitwidth >= 128:
        # Rows of a patch fill 16-byte accesses: read in the order of taps, straight to shared memory.
        k = (k0 + tl.arange(0, BLOCK_K))[None, :]
        at = (at[0][:, None], at[1][:, None], at[2][:, None], at[3][:, None])
        of = tap(k, steps, PT, PH, PW, VEC, WIDE)
        mask = within(at, of, sizes, valid[:, None] & (k < TAPS), RAGGED_T, RAGGED_H, RAGGED_W)
    else:
        # Rows are short, but neighbouring tokens lie side by side: a warp reads one row of many tokens.
        j = tl.arange(0, BLOCK_K // RUN)[:, None, None]
        k = k0 + j * RUN + tl.arange(0, RUN)[None, None, :]
        at = (at[0][None, :, None], at[1][None, :, None], at[2][None, :, None], at[3][None, :, None])
        of = tap(k, steps, PT, PH, PW, VEC, WIDE)
        mask = within(at, of, sizes, valid[None, :, None] & (k0 + j * RUN < TAPS), RAGGED_T, RAGGED_H, RAGGED_W)
    return tl.load(gX + at[0] + of[0], mask=mask, other=0.0)


@triton.jit
def as_rows(patches, valid, BLOCK_K: tl.constexpr):
    """Order what ``gather_patches`` loaded as [tokens, BLOCK_K]."""
    if len(patches.shape) == 2:
        return patches
    else:
        patches = patches.permute(1, 0, 2).reshape(valid.shape[0], BLOCK_K)
        # Changes nothing, but keeps Triton 3.6 from moving the reshape to shared memory, where some shapes crash it.
        return tl.where(valid[:, None], patches, 0.0)


@triton.jit
def read_patches(
    gX, at, valid, k0, steps, sizes,
    TAPS: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, RAGGED_T: tl.constexpr,
    RAGGED_H: tl.constexpr, RAGGED_W: tl.constexpr, RUN: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Read taps k0 ... of the tokens that start at ``at``, zero where there is none. [tokens, BLOCK_K]"""
    patches = gather_patches(
        gX, at, valid, k0, steps, sizes, TAPS, PT, PH, PW, RAGGED_T, RAGGED_H, RAGGED_W, RUN, VEC, WIDE, BLOCK_K
    )
    return as_rows(patches, valid, BLOCK_K)
