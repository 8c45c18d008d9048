"""Fifty steps of sampling by the fused kernels, beside PyTorch's operations in the same dtype and beside float64.

Rounding differs between the two and is fed back fifty times: what counts is that the fused sampler is as near to
float64 as the other, and that the two end in the same video.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

import stattn
from stattn import dit, masks
from stattn.accelerate import accelerate
from stattn.bench.models import ModelShape, psnr, random_model
from stattn.dit import CONFIGS, WEIGHTS, DiT
from stattn.graph import SampleGraph
from stattn.grid import Grid, as_grid
from stattn.model import attention as attention_modules
from stattn.model.attention import valid_tokens
from stattn.sampler import FlowMatching, sample

SEEDS = 5
EAGER = {"*": "reference"}
STEPS = FlowMatching(50, shift=3.0)
MASKS = {"full": masks.full(), "window": masks.window(3, 5, 5)}


def plain_attention(q, k, v, grid, mask, *, valid=None, globals_see="all", impl="auto"):
    """Attention by PyTorch under a boolean mask of all pairs: in few launches, which fifty steps want."""
    grid = as_grid(grid)
    seen = allowed(mask, grid).to(q.device)[None, None]
    real = torch.ones(len(q), grid.tokens, dtype=torch.bool, device=q.device)
    if valid is not None:
        real[:, grid.video :] = valid_tokens(valid, len(q), grid.after)
    # Rows that see nothing see all, and count for nothing.
    out = F.scaled_dot_product_attention(
        *(each.transpose(1, 2) for each in (q, k, v)), attn_mask=(seen & real[:, None, None]) | ~real[:, None, :, None]
    )
    return out.transpose(1, 2) * real[:, :, None, None]


@lru_cache
def allowed(mask, grid) -> torch.Tensor:
    return mask.allowed(grid)


def trained() -> tuple[DiT, tuple[int, ...], dict]:
    """The model that ships, at the size of clips that it was trained on, with words of its vocabulary."""
    if not (WEIGHTS / "tiny.safetensors").is_file():
        pytest.fail("the trained weights, stattn/weights/tiny.safetensors, are not here")
    text = torch.randint(1, 40, (SEEDS, 12), generator=torch.Generator().manual_seed(4))
    options = {"text": text.cuda(), "guidance": 1.5, "prediction": "x"}
    return dit.load("tiny", dtype=torch.float64, device="cuda"), (SEEDS, 3, 8, 64, 96), options


def wan_shaped() -> tuple[DiT, tuple[int, ...], dict]:
    """Four layers of Wan 2.1 1.3B, whose gates are drawn from N(0, 0.3)."""
    config = replace(CONFIGS["wan2.1-1.3b"], layers=4)
    size = (5, 16, 24)
    shape = ModelShape("proof", config, size, MASKS["full"], MASKS["window"])
    text = torch.randn(SEEDS, 64, config.text_dim, generator=torch.Generator().manual_seed(4)).cuda()
    options = {"text": text, "guidance": 3.0, "negative": torch.zeros_like(text), "prediction": "v"}
    return random_model(shape, "cuda", torch.float64), (SEEDS, 16, *size), options


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("make", [trained, wan_shaped], ids=lambda make: make.__name__)
def test_fifty_fused_steps_end_where_pytorch_s_operations_end(make, mask, monkeypatch):
    exact, shape, options = make()
    options |= {"steps": STEPS, "mask": MASKS[mask], "seed": 0}
    fused = copy.deepcopy(exact).to(torch.bfloat16)
    # All three start from the same weights and texts, which bf16 holds.
    exact.load_state_dict({name: each.double() for name, each in fused.state_dict().items()})
    for name, each in options.items():
        if isinstance(each, torch.Tensor) and each.is_floating_point():
            options[name] = each.to(torch.bfloat16)
    by_hand = []
    for model in (exact, fused):
        with monkeypatch.context() as patched, accelerate(model, impl=EAGER):
            patched.setattr(attention_modules, "attention", plain_attention)
            by_hand.append(sample(model, shape, impl=EAGER, **options))
    want, eager = by_hand
    got = sample(fused, shape, **options)
    assert (want - want.mean()).abs().max() > 0.1
    error, allowed = ((each.double() - want).square().mean().sqrt().item() for each in (got, eager))
    worst = [psnr(ours, theirs) for ours, theirs in zip(got, eager, strict=True)]
    print(f"{make.__name__} {mask}: error {error:.3e}, eager {allowed:.3e}; PSNR {min(worst):.1f} dB at the least")
    assert error <= 1.2 * allowed
    assert min(worst) >= 34
    assert torch.equal(SampleGraph(fused, shape, **options)(seed=0), got)


@pytest.mark.parametrize("mask", MASKS)
def test_the_plain_attention_is_the_reference(mask):
    grid = Grid(3, 5, 6, after=4)
    q, k, v = torch.randn(3, 2, grid.tokens, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for valid in (None, torch.tensor([2, 0])):
        want = stattn.attention(q, k, v, grid, MASKS[mask], valid=valid, impl="reference")
        torch.testing.assert_close(plain_attention(q, k, v, grid, MASKS[mask], valid=valid), want)
