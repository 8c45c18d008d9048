"""Small models that several suites take: ``JOINT`` and ``CROSS``, and one of them with all its parameters drawn."""

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
