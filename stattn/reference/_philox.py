"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

Words are 32-bit integers held in int64 tensors. Every product below stays under 2^63, so that no result rests on
overflow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four random words for each counter of four words and key of two; the words broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def philox_normal(seeds: Tensor, offset: int, shape: torch.Size) -> Tensor:
    """Draw float32 standard normals of a shape [B, ...], each a function of its sample's seed, offset and place alone.

    seeds: int64 [B]. Element i of a sample, counted in row-major order over the other axes, is number i % 4 of the
    four made from key (seed, seed >> 32) and counter (i // 4, i // 4 >> 32, offset, offset >> 32), all words of 32
    bits. A word x becomes the uniform number u = float32(x) * 2^-32 + 2^-33, in (0, 1], and two of them sqrt(-2 ln u0)
    * (cos, sin)(2 pi u1) (Box and Muller, 1958): words 0 and 1 make numbers 0 and 1, words 2 and 3 make 2 and 3. u is
    rounded to float32; the rest is computed in float64, rounded once.
    """
    count = math.prod(shape[1:])
    quad = torch.arange(-(-count // 4), dtype=torch.int64, device=seeds.device)
    step = torch.tensor([offset & WORD, (offset >> 32) & WORD], dtype=torch.int64, device=seeds.device)
    key = (seeds[:, None] & WORD, (seeds[:, None] >> 32) & WORD)
    words = torch.stack(philox4x32((quad & WORD, quad >> 32, step[0], step[1]), key), dim=-1)  # [B, quads, 4]
    uniform = (words.to(torch.float32) * 2.0**-32 + 2.0**-33).to(torch.float64)
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2]))
    angle = 2.0 * math.pi * uniform[..., 1::2]
    normal = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)  # [B, quads, 2, 2]
    return normal.flatten(1)[:, :count].reshape(shape).to(torch.float32)


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of word * multiplier, by 16-bit halves of the multiplier."""
    low = word * (multiplier & 0xFFFF)
    middle = word * (multiplier >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
