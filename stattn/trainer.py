"""One training step of a video DiT on the synthetic world: the recipe, the loss, the trainer. ``stattn.train`` is the
run around it.

Flow matching: x_t = (1 - s) x0 + s e, and the model, told s, predicts the clean clip x0. Its loss is that of the
velocity, |(x_hat - x0) / max(s, 0.05)|^2, over the region to be generated (x-prediction with v-loss, Li and He,
arXiv:2511.13720: large pixel patches hold more numbers than the model is wide, and only clean video lies on a thin
set). s is logit-normal (Esser et al., arXiv:2403.03206). Captions are dropped for classifier-free guidance; attention
masks and masked-region tasks are mixed.

Nothing in a step waits for the device: clips are drawn there, from a generator seeded by the step's number, so that a
resumed run continues as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stattn import dit, masks, tasks, world
from stattn.dit import DiT, DiTConfig
from stattn.grid import Grid
from stattn.masks import Mask
from stattn.modules import SpaceTimeAttention
from stattn.ops._dispatch import impl_for
from stattn.ops.qk_norm_rope import qk_norm_rope


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how.

    level_mean, level_std: of the logit of s. masks: (key, weight) pairs, one drawn a step. tasks: a weight for each of
    ``tasks.TASKS``. clause_dropout: how often a caption leaves out what moves, what else is there, or the camera.
    warmup: steps.
    """

    model: DiTConfig
    frames: int = 16
    height: int = 64
    width: int = 64
    batch: int = 96
    learning_rate: float = 1e-3
    warmup: int = 200
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    level_mean: float = 1.2
    level_std: float = 1.2
    least_level: float = 0.05
    caption_dropout: float = 0.1
    clause_dropout: float = 0.15
    masks: tuple[tuple[str, float], ...] = (("full()", 0.5), ("window(5, 7, 7)", 0.2), ("window(5, 5, 5)", 0.3))
    tasks: tuple[float, ...] = (0.5, 0.1, 0.1, 0.1, 0.1, 0.1)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model.vocab < len(world.VOCABULARY) or self.model.text_len < world.CAPTION_LENGTH:
            raise ValueError(
                f"model.vocab={self.model.vocab}, model.text_len={self.model.text_len} must hold the world's "
                f"{len(world.VOCABULARY)} words and captions of {world.CAPTION_LENGTH}"
            )
        if not self.model.masked_input:
            raise ValueError("model.masked_input=False: the tasks need a model that reads the known region")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Give the token grid of a clip."""
        t, h, w = (size // p for size, p in zip((self.frames, self.height, self.width), self.model.patch, strict=True))
        return t, h, w


# A score whose exponential is 0 beside any score of normalised queries and keys, and finite: kernels need no special
# case for a tile of keys that are all hidden.
HIDDEN = -1e4
_TINY = dit.CONFIGS["tiny"]
PRESETS: dict[str, Recipe] = {
    "tiny": Recipe(_TINY),
    # A 32-pixel world and a model to see the machinery work on one CPU core; it learns colours in minutes.
    "small": Recipe(
        dataclasses.replace(_TINY, layers=4, heads=2, ffn_dim=512, text_dim=128),
        frames=8,
        height=32,
        width=32,
        batch=32,
        masks=(("full()", 0.6), ("window(3, 3, 3)", 0.4)),
    ),
    "smoke": Recipe(
        dataclasses.replace(_TINY, layers=2, heads=2, head_dim=16, ffn_dim=64, text_dim=32, freq_dim=32),
        frames=4,
        height=32,
        width=32,
        batch=4,
        warmup=2,
        masks=(("full()", 0.5), ("window(2, 3, 3)", 0.5)),
    ),
}


def materialize_attention(model: DiT) -> DiT:
    """Let every SpaceTimeAttention of a model write its mask out and call PyTorch's scaled dot product attention.

    For training on small grids: one dense kernel with a bias beats everything at 512 tokens, ``torch.compile`` sees
    plain PyTorch, and captions of all lengths share a batch. Outputs of video tokens equal those of
    ``stattn.attention``; those of unreal text tokens, which nothing reads, do not. The model may also be called with
    ``mask=`` a bias of ``attention_bias``. Changes the instances, not their class, and returns the model.
    """
    for module in model.modules():
        if isinstance(module, SpaceTimeAttention):
            module.forward = MethodType(_attend, module)  # type: ignore[method-assign]
    return model


def attention_bias(allowed: Tensor, grid: Grid, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Write a mask out as additive scores [B or 1, 1, N, N]: 0 where a key is seen, ``HIDDEN`` elsewhere.

    allowed: booleans [N, N] of ``Mask.allowed(grid)``. valid: [B] counts of the real tokens among the grid.after global
    ones behind the video.
    """
    seen = allowed[None]
    if valid is not None:
        place = torch.arange(grid.tokens, device=allowed.device) - grid.video
        seen = seen & (place < valid[:, None])[:, None]
    return torch.zeros((), dtype=dtype, device=allowed.device).masked_fill(~seen, HIDDEN)[:, None]


@lru_cache(maxsize=32)
def _allowed(mask: Mask, grid: Grid, device: torch.device) -> Tensor:
    return mask.allowed(grid).to(device)


def _attend(
    self: SpaceTimeAttention,
    x: Tensor,
    grid: Grid,
    *,
    rope: Any = None,
    valid: Tensor | None = None,
    mask: Any = None,
    cache: None = None,
) -> Tensor:
    q, k, v = (proj(x).unflatten(-1, (self.heads, self.head_dim)) for proj in (self.to_q, self.to_k, self.to_v))
    q, k = qk_norm_rope(
        q,
        k,
        None if self.norm_q is None else self.norm_q.weight,
        None if self.norm_k is None else self.norm_k.weight,
        rope,
        across_heads=self.qk_norm == "across_heads",
        eps=self.eps,
        interleaved=self.interleaved,
        impl=impl_for(self.impl, "qk_norm_rope"),
    )
    if not isinstance(mask, Tensor):
        mask = attention_bias(_allowed(self.mask if mask is None else mask, grid, x.device), grid, valid, q.dtype)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return self.to_out[0](out.transpose(1, 2).flatten(2))


def flow_loss(
    model: DiT,
    clean: Tensor,
    noise: Tensor,
    level: Tensor,
    generated: Tensor,
    ids: Tensor,
    valid: Tensor,
    bias: Tensor,
    least_level: float,
) -> Tensor:
    """Compute the loss of one batch: the mean of |(x_hat - x0) / max(s, least_level)|^2 over the generated region.

    clean, noise: [B, 3, T, H, W]; level: s [B]; generated: [B, 1, T, H, W] booleans; ids [B, L] and valid [B]:
    captions; bias: of ``attention_bias``.
    """
    s = level[:, None, None, None, None]
    known = ~generated
    predicted = model(
        (1 - s) * clean + s * noise,
        1000 * level,
        ids,
        valid,
        known=clean * known,
        known_mask=known.to(clean.dtype),
        mask=cast(Mask, bias),
    )
    error = (predicted.float() - clean) / s.clamp(min=least_level) * generated
    return error.square().sum() / (3 * generated.sum()).clamp(min=1)


class Trainer:
    """Hold a model, its average, its optimizer and the number of steps taken; take one step at a time."""

    def __init__(self, recipe: Recipe, device: torch.device, *, compile: bool = False):
        torch.manual_seed(recipe.seed)
        self.recipe, self.steps = recipe, 0
        self.model = materialize_attention(DiT(recipe.model, impl="reference").to(device))
        self.device = device = next(self.model.parameters()).device  # with its index
        self.average = (
            materialize_attention(DiT(recipe.model, impl="reference").to(device)).requires_grad_(False).eval()
        )
        self.average.load_state_dict(self.model.state_dict())
        decay = [p for p in self.model.parameters() if p.ndim >= 2]
        plain = [p for p in self.model.parameters() if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=recipe.learning_rate,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.generator = torch.Generator(device)
        self.grid = Grid(*recipe.grid, after=recipe.model.text_len)
        self.model.rope(self.grid, device)  # made before the loss is compiled, which would have to trace how
        self.allowed = [masks.parse(key).allowed(self.grid).to(device) for key, _ in recipe.masks]
        self.loss: Callable[..., Tensor] = (
            torch.compile(flow_loss, dynamic=False, fullgraph=True) if compile else flow_loss
        )
        self.autocast = device.type == "cuda"

    def step(self, progress: float) -> Tensor:
        """Take one step at a learning rate for ``progress`` in [0, 1) through the run; returns the loss, on the
        device.
        """
        recipe = self.recipe
        rate = learning_rate(recipe, self.steps, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Of PyTorch's kernels this one takes a bias that all heads share without copying it.
        kernel = sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if self.autocast else nullcontext()
        with kernel, torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self.model, *self.batch(), recipe.least_level)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        # The average of a young run forgets its first steps faster.
        decay = min(recipe.ema, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.detach()

    @torch.no_grad()
    def batch(self) -> tuple[Tensor, ...]:
        """Draw this step's clips, noise, levels, regions, captions and mask: the tensors of ``flow_loss``."""
        recipe, generator, device, size = self.recipe, self.generator, self.device, self.recipe.batch
        generator.manual_seed(recipe.seed * 1_000_003 + self.steps)
        choice = random.Random(recipe.seed * 1_000_003 + self.steps)
        index = choice.choices(range(len(self.allowed)), [weight for _, weight in recipe.masks])[0]

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        scene = world.sample(size, recipe.frames, recipe.height, recipe.width, generator=generator, device=device)
        clean = scene.draw()
        kept = uniform(3, size) >= recipe.clause_dropout
        ids, valid = scene.tokens(recipe.model.text_len, motion=kept[0], others=kept[1], camera=kept[2])
        valid = torch.where(uniform(size) < recipe.caption_dropout, 0, valid)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        normal = torch.randn(size, generator=generator, device=device)
        level = torch.sigmoid(recipe.level_mean + recipe.level_std * normal)
        task = tasks.draw_tasks(size, recipe.tasks, generator=generator, device=device)
        generated = tasks.generated_region(task, recipe.frames, recipe.height, recipe.width, generator=generator)
        bias = attention_bias(self.allowed[index], self.grid, valid, torch.bfloat16 if self.autocast else torch.float32)
        return clean, noise, level, generated, ids, valid, bias

    def state(self) -> dict[str, Any]:
        """Give all that a continued run needs."""
        return {
            "steps": self.steps,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """Rise linearly over the warm-up steps, fall with half a cosine to 0 at progress 1."""
    return (
        recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    )
