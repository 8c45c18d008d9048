"""Training through the CUDA kernels: the shipped model, fine-tuned with them and with the formula from one seed.

    python -m pytest -m gpu tests/test_training_cuda.py --record benchmarks/results/h200/attention_cuda_training.json

The formula stands for the reference, which walks the samples of a batch by their numbers of real words, one group after
the other: on a GPU that is half a million operations a step.
"""

from __future__ import annotations

import dataclasses
import random
from functools import lru_cache
from typing import Any

import pytest
import torch
from test_attention_cuda import HOPPER

import stattn
from stattn import dit, extension, masks
from stattn.grid import Grid
from stattn.masks import Mask
from stattn.model import attention as attention_modules
from stattn.modules import SpaceTimeAttention
from stattn.recipes import PRESETS
from stattn.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.apart,
    pytest.mark.skipif(not HOPPER or not extension.LIBRARY.exists(), reason="no Hopper GPU, or no CUDA library"),
]
STEPS, BATCH, WINDOW, RATE = 200, 16, 20, 2e-4
MASKS = (masks.full(), masks.window(5, 7, 7), masks.window(5, 5, 5))


@lru_cache
def seen_by(mask: Mask, grid: Grid, see: str, device: torch.device) -> torch.Tensor:
    return mask.allowed(grid, globals_see=see).to(device)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: Grid, **given: Any) -> torch.Tensor:
    """Attention as the model asks for it, written down where it asks for the reference."""
    if given["impl"] != "reference":
        return stattn.attention(q, k, v, grid, **given)
    words, valid = grid.before + grid.after, given["valid"]
    if valid.dtype != torch.bool:
        valid = torch.arange(words, device=q.device) < valid[:, None]
    real = torch.ones(len(q), grid.tokens, dtype=torch.bool, device=q.device)
    real[:, : grid.before], real[:, grid.tokens - grid.after :] = valid.split([grid.before, grid.after], 1)
    seen = seen_by(given["mask"], grid, given["globals_see"], q.device) & real[:, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[3] ** -0.5
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v) * real[..., None, None]


VARIANTS = {"exact": ("reference", False), "eager": ("reference", True), "ours": ("cuda", True)}


def losses(seed: int, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Fine-tune ``tiny`` on the same batches with each implementation, in fp32 or with products in bf16.

    Returns the losses of all steps.
    """
    models, optimizers = {}, {}
    for name, (impl, _) in VARIANTS.items():
        models[name] = dit.load("tiny", device="cuda").train()
        for module in models[name].modules():
            if isinstance(module, SpaceTimeAttention):
                module.impl = {"attention": impl, "*": "reference"}
        parameters = models[name].parameters()
        optimizers[name] = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    data = Trainer(dataclasses.replace(PRESETS["tiny"], batch=BATCH, seed=seed), torch.device("cuda"))
    choice = random.Random(seed)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in VARIANTS}
    for _ in range(steps):
        clean, noise, level, generated, ids, valid, _ = data.batch()
        data.steps += 1
        s, known, mask = level[:, None, None, None, None], ~generated, choice.choice(MASKS)
        for name, model in models.items():
            with torch.autocast("cuda", torch.bfloat16, enabled=VARIANTS[name][1]):
                predicted = model(
                    (1 - s) * clean + s * noise,
                    1000 * level,
                    ids,
                    valid,
                    known=clean * known,
                    known_mask=known.to(clean.dtype),
                    mask=mask,
                )
            error = (predicted.float() - clean) / s.clamp(min=data.recipe.least_level) * generated
            loss = error.square().sum() / (3 * generated.sum()).clamp(min=1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), data.recipe.clip)
            optimizers[name].step()
            optimizers[name].zero_grad()
            found[name].append(loss.detach())
    return {name: torch.stack(each).cpu() for name, each in found.items()}


def smooth(curve: torch.Tensor) -> torch.Tensor:
    return curve.unflatten(0, (-1, WINDOW)).mean(1)


@pytest.mark.parametrize("seed", range(3))
def test_a_model_is_fine_tuned_as_by_the_formula(seed: int) -> dict[str, float]:
    """What the kernels change in the loss is less than what bf16 changes in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_modules, "attention", attend)
        curves = losses(seed)
    exact, eager, ours = (smooth(curves[name]) for name in VARIANTS)
    by_bf16, by_kernels = ((one - eager).abs().max().item() for one in (exact, ours))
    assert by_kernels <= 1.5 * by_bf16
    assert (ours - exact).abs().max() <= 2 * by_bf16
    return {
        "loss_first": round(eager[0].item(), 5),
        "loss_last": round(eager[-1].item(), 5),
        "changed_by_bf16": round(by_bf16, 6),
        "changed_by_kernels": round(by_kernels, 6),
    }
