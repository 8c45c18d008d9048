"""Memory tokens: what a model remembers of frames that its window no longer sees.

A few learned queries read the finished frames by cross-attention; what they bring back stands beside the text as global
tokens, which every video token sees and which see everything. Their number does not grow with the video.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stattn.dit import DiTConfig
from stattn.modules import Patchify3D


class Memory(nn.Module):
    """Turn past video into memory tokens [B, tokens, dim] for a DiT of a config.

    tokens: how many. layers: of cross-attention. Frames [B, C, T, H, W] of any number are read in patches of one frame;
    a token knows when its frame was, in frames before the window (times [T], negative), and where in the picture it is.
    """

    def __init__(self, config: DiTConfig, tokens: int = 16, layers: int = 2, width: int = 128, heads: int = 4):
        super().__init__()
        if tokens < 1 or layers < 1:
            raise ValueError(f"tokens={tokens} and layers={layers} must be positive")
        if width % heads or width % 4:
            raise ValueError(f"width={width} must be a multiple of heads={heads} and of 4")
        self.tokens, self.heads, self.width = tokens, heads, width
        self.patchify = Patchify3D(config.in_channels, width, (1, *config.patch[1:]), impl="reference")
        self.queries = nn.Parameter(torch.randn(tokens, width) / width**0.5)
        self.layers = nn.ModuleList(_Read(width, heads) for _ in range(layers))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.dim))

    def forward(self, past: Tensor, times: Tensor) -> Tensor:
        """Read past [B, C, T, H, W] at times [T]; returns [B, tokens, dim]."""
        if past.ndim != 5 or tuple(times.shape) != past.shape[2:3]:
            raise ValueError(
                f"past of shape {tuple(past.shape)} must be [B, C, T, H, W], times of shape {tuple(times.shape)} [T]"
            )
        grid = self.patchify.grid(past)
        seen = self.patchify(past.to(self.queries.dtype))
        seen = seen + _places(times.to(past.device), grid.h, grid.w, self.width).to(seen.dtype)
        x = self.queries.expand(len(past), -1, -1)
        for layer in self.layers:
            x = layer(x, seen)
        return self.out(x)


class _Read(nn.Module):
    """Cross-attention and feed-forward, pre-norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_x, self.norm_seen, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        split = (self.heads, x.shape[-1] // self.heads)
        q = self.q(self.norm_x(x)).unflatten(-1, split).transpose(1, 2)
        k, v = self.kv(self.norm_seen(seen)).unflatten(-1, (2, *split)).transpose(1, 3).unbind(2)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm_ffn(x))


def _places(times: Tensor, height: int, width: int, dim: int) -> Tensor:
    """Embed (t, y, x) by sines and cosines: [t * h * w, dim]; half the features for t, a quarter for y, one for x."""

    def waves(positions: Tensor, features: int) -> Tensor:
        rates = torch.exp(-torch.arange(features // 2, device=positions.device) * (6.0 / max(features // 2, 1)))
        angles = positions[:, None].float() * rates
        return torch.cat((angles.sin(), angles.cos()), -1)

    t = waves(times, dim // 2)[:, None, None].expand(-1, height, width, -1)
    y = waves(torch.arange(height, device=times.device), dim // 4)[None, :, None].expand(len(times), -1, width, -1)
    x = waves(torch.arange(width, device=times.device), dim // 4)[None, None].expand(len(times), height, -1, -1)
    return torch.cat((t, y, x), -1).flatten(0, 2)
