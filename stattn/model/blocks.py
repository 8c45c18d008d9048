"""The two kinds of block of the reference DiT: ``CrossBlock``, Wan's, and ``JointBlock``, with text in its attention.

Both are called as block(x, text, e, e_text, at) and return x and text for the next one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stattn.blocks import BlockList
from stattn.cache import LayerCache
from stattn.grid import Grid
from stattn.model.config import DiTConfig
from stattn.model.settings import Impl, Masks
from stattn.modules import CrossAttention, FeedForward, GatedResidual, ModulatedNorm, SpaceTimeAttention
from stattn.rope import RopeTables


class Layout(NamedTuple):
    """Where the tokens of one call are, the same for all blocks but for the mask and the cache.

    frames: number of frames when the modulation is per frame, else None. mask: overrides every layer's mask, or None.
    cache: of the block's attention, or None.
    """

    grid: Grid
    rope: RopeTables | None
    frames: int | None
    text_valid: Tensor | None
    mask: Masks | BlockList | None
    cache: LayerCache | None = None


def modulation(table: Tensor, e: Tensor) -> tuple[Tensor, ...]:
    """Add a block's table [1, K, C] to the projected noise level [..., K, C] in fp32 or wider; K tensors [..., C]."""
    return (table + e.to(torch.promote_types(e.dtype, torch.float32))).unbind(-2)


Text = Tensor | tuple[Tensor, Tensor]  # of a block: tokens, or the keys and values of its cross-attention


class CrossBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward: Wan's block."""

    def __init__(self, config: DiTConfig, *, mask: Masks | None, impl: Impl):
        super().__init__()
        dim, heads, head_dim, eps = config.dim, config.heads, config.head_dim, config.eps
        self.norm1 = ModulatedNorm(dim, eps=eps, impl=impl)
        self.attn1 = SpaceTimeAttention(dim, heads, head_dim, qk_norm=config.qk_norm, eps=eps, mask=mask, impl=impl)
        self.norm2 = ModulatedNorm(dim, affine=True, eps=eps, impl=impl)
        self.attn2 = CrossAttention(dim, heads, head_dim, qk_norm=config.qk_norm, eps=eps, impl=impl)
        self.norm3 = ModulatedNorm(dim, eps=eps, impl=impl)
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.add = GatedResidual(impl=impl)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(self, x: Tensor, text: Text, e: Tensor, e_text: Tensor | None, at: Layout) -> tuple[Tensor, Text]:
        """Return video x [B, N, C] after the block, and text as it came: [B, L, C], or keys and values made of it.

        e: [B, 6, C] or [B, frames or N, 6, C].
        """
        shift1, scale1, gate1, shift3, scale3, gate3 = modulation(self.scale_shift_table, e)
        h = self.norm1(x, scale1, shift1, at.frames)
        x, h = self.add.then(
            self.norm2, x, self.attn1(h, at.grid, rope=at.rope, mask=at.mask, cache=at.cache), gate1, frames=at.frames
        )
        x, h = self.add.then(self.norm3, x, self.attn2(h, text, at.text_valid), None, scale3, shift3, at.frames)
        return self.add(x, self.ffn(h), gate3, at.frames), text


class JointBlock(nn.Module):
    """Attention of video and text together, feed-forward: shared weights, a modulation for each."""

    def __init__(self, config: DiTConfig, *, mask: Masks | None, impl: Impl):
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = ModulatedNorm(dim, eps=eps, impl=impl)
        self.attn1 = SpaceTimeAttention(
            dim, config.heads, config.head_dim, qk_norm=config.qk_norm, eps=eps, mask=mask, impl=impl
        )
        self.norm2 = ModulatedNorm(dim, eps=eps, impl=impl)
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.add = GatedResidual(impl=impl)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, dim))
        self.text_scale_shift_table = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(self, x: Tensor, text: Tensor, e: Tensor, e_text: Tensor, at: Layout) -> tuple[Tensor, Tensor]:
        """Return video x [B, N, C] and text [B, L, C] after the block; e as in CrossBlock, e_text [B, 6, C]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self.scale_shift_table, e)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = modulation(self.text_scale_shift_table, e_text)
        both = [x.shape[1], text.shape[1]]

        h = torch.cat((self.norm1(x, scale1, shift1, at.frames), self.norm1(text, t_scale1, t_shift1)), dim=1)
        h = self.attn1(h, at.grid, rope=at.rope, valid=at.text_valid, mask=at.mask, cache=at.cache)
        a, t_a = h.split(both, dim=1)
        x, h = self.add.then(self.norm2, x, a, gate1, scale2, shift2, at.frames)
        text, t_h = self.add.then(self.norm2, text, t_a, t_gate1, t_scale2, t_shift2)
        f, t_f = self.ffn(torch.cat((h, t_h), dim=1)).split(both, dim=1)
        return self.add(x, f, gate2, at.frames), self.add(text, t_f, t_gate2)
