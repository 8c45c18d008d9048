"""Small models that several suites take: ``JOINT`` and ``CROSS``, all their parameters drawn, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch

from stattn.dit import DiT, DiTConfig

JOINT = DiTConfig(
    kind="joint",
    layers=2,
    heads=2,
    head_dim=12,
    ffn_dim=32,
    in_channels=3,
    out_channels=3,
    patch=(2, 4, 4),
    text_dim=8,
    text_len=6,
    vocab=10,
    masked_input=True,
    freq_dim=16,
    qk_norm="per_head",
)
CROSS = DiTConfig(
    kind="cross",
    layers=2,
    heads=2,
    head_dim=12,
    ffn_dim=32,
    in_channels=4,
    out_channels=4,
    patch=(1, 2, 2),
    text_dim=8,
    text_len=6,
    freq_dim=16,
)


def make(config: DiTConfig, seed: int = 0, **keywords: Any) -> DiT:
    """Make a model whose parameters are all drawn anew: nothing is zero, nothing is one."""
    generator = torch.Generator().manual_seed(seed)
    model = DiT(config, **keywords)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return model.eval()


def inputs(
    config: DiTConfig, batch: int = 2, size: tuple[int, int, int] | None = None, seed: int = 1
) -> tuple[torch.Tensor, ...]:
    """x, timestep, text for a 3 x 4 x 5 grid."""
    generator = torch.Generator().manual_seed(seed)
    size = size or tuple(extent * p for extent, p in zip((3, 4, 5), config.patch, strict=True))
    x = torch.randn(batch, config.in_channels, *size, generator=generator)
    timestep = torch.rand(batch, generator=generator) * 1000
    if config.vocab:
        text = torch.randint(config.vocab, (batch, config.text_len), generator=generator)
    else:
        text = torch.randn(batch, config.text_len, config.text_dim, generator=generator)
    return x, timestep, text
