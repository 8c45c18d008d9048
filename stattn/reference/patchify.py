"""Video to tokens and back, in plain PyTorch.

A patch of pt x ph x pw pixels of C channels is one token: token (t, h, w) holds the pixels
[t*pt, (t+1)*pt) x [h*ph, (h+1)*ph) x [w*pw, (w+1)*pw).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stattn.reference._precision import wide


def patchify3d(x: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None) -> Tensor:
    """Project each patch of a video to a token: patch . weight + bias + pos.

    x [B, C, T, H, W], weight [E, C, pt, ph, pw], bias [E], pos [N, E] -> [B, N, E]. A last patch that reaches past the
    video reads zeros there. Products and sums in float32 (float64 when an input is), rounded once to x's dtype.
    """
    dtype = wide(x, weight, bias, pos)
    batch, channels = x.shape[:2]
    patch = weight.shape[2:]
    grid = [-(-size // p) for size, p in zip(x.shape[2:], patch, strict=True)]
    short = [n * p - size for n, p, size in zip(grid, patch, x.shape[2:], strict=True)]
    x_wide = F.pad(x.to(dtype), (0, short[2], 0, short[1], 0, short[0]))
    (t, h, w), (pt, ph, pw) = grid, patch
    patches = x_wide.reshape(batch, channels, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    patches = patches.reshape(batch, t * h * w, channels * pt * ph * pw)
    # Autocast would round the operands of this product to 16 bits, and so make a second rounding.
    with torch.autocast(x.device.type, enabled=False):
        tokens = patches @ weight.to(dtype).flatten(1).T
    if bias is not None:
        tokens = tokens + bias.to(dtype)
    if pos is not None:
        tokens = tokens + pos.to(dtype)
    return tokens.to(x.dtype)


def unpatchify3d(
    tokens: Tensor,
    grid: tuple[int, int, int],
    before: int,
    patch: tuple[int, int, int],
    channels: int,
    size: tuple[int, int, int],
) -> Tensor:
    """Lay the patches that tokens hold out as a video: the inverse of patchify's gather. Values move, none is rounded.

    tokens [B, before + N + after, pt*ph*pw*C] with features ordered (pt, ph, pw, C); grid (t, h, w), N = t*h*w;
    size (T, H, W) crops at the end -> [B, C, T, H, W].
    """
    (t, h, w), (pt, ph, pw) = grid, patch
    video = tokens[:, before : before + t * h * w]
    video = video.reshape(tokens.shape[0], t, h, w, pt, ph, pw, channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
    video = video.reshape(tokens.shape[0], channels, t * pt, h * ph, w * pw)
    return video[:, :, : size[0], : size[1], : size[2]].contiguous()
