"""One training step of a video DiT on the synthetic world: the loss, the trainer. ``stattn.train`` is the run around
it, and ``stattn.recipes`` says what is trained.

Flow matching: x_t = (1 - s) x0 + s e, and the model, told s, predicts the clean clip x0. Its loss is that of the
velocity, |(x_hat - x0) / max(s, 0.05)|^2, over the region to be generated (x-prediction with v-loss, Li and He,
arXiv:2511.13720: large pixel patches hold more numbers than the model is wide, and only clean video lies on a thin
set). s is logit-normal (Esser et al., arXiv:2403.03206). Captions are dropped for classifier-free guidance; attention
masks and masked-region tasks are mixed.

Nothing in a step waits for the device: clips are drawn there, from a generator seeded by the step's number, so that a
resumed run continues as if it had never stopped.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stattn import dit, masks, world
from stattn.dit import CrossBlock, DiT, JointBlock
from stattn.grid import Grid
from stattn.masks import Mask
from stattn.modules import SpaceTimeAttention
from stattn.ops._dispatch import impl_for
from stattn.ops.qk_norm_rope import qk_norm_rope
from stattn.recipes import Recipe
from stattn.training import tasks
from stattn.training.folder import FolderClips

Model = TypeVar("Model", bound=nn.Module)
# A score whose exponential is 0 beside any score of normalised queries and keys, and finite: kernels need no special
# case for a tile of keys that are all hidden.
HIDDEN = -1e4
# The steps at which a compiled run compares its gradients with those of plain PyTorch, and by how much they may differ:
# rounding makes 0.02, and what PyTorch 2.11 compiles for CUDA has been wrong by many times their norm.
CHECKED, MOST_APART = (2, 20, 200), 0.2


def materialize_attention(model: Model) -> Model:
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

    allowed: booleans [N, N] of ``Mask.allowed(grid)``. valid: which of the grid.after global tokens behind the video
    are real, [B] counts or [B, after] booleans.
    """
    seen = allowed[None]
    if valid is not None and valid.ndim == 2:
        seen = seen & F.pad(valid, (grid.video, 0), value=True)[:, None]
    elif valid is not None:
        place = torch.arange(grid.tokens, device=allowed.device) - grid.video
        seen = seen & (place < valid[:, None])[:, None]
    return torch.zeros((), dtype=dtype, device=allowed.device).masked_fill(~seen, HIDDEN)[:, None]


@lru_cache(maxsize=32)
def allowed_pairs(mask: Mask, grid: Grid, device: torch.device, globals_see: str = "all") -> Tensor:
    """Write a mask out as booleans [N, N]; with globals_see "globals", global tokens see no video token."""
    allowed = mask.allowed(grid)
    if globals_see == "globals":
        video = torch.zeros(grid.tokens, dtype=torch.bool)
        video[grid.before : grid.before + grid.video] = True
        allowed = allowed & (video[:, None] | ~video)
    return allowed.to(device)


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
        mask = attention_bias(
            allowed_pairs(self.mask if mask is None else mask, grid, x.device, self.globals_see), grid, valid, q.dtype
        )
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
    **read: Tensor,
) -> Tensor:
    """Compute the loss of one batch: the mean of |(x_hat - x0) / max(s, least_level)|^2 over the generated region.

    clean, noise: [B, 3, T, H, W]; level: s [B]; generated: [B, 1, T, H, W] booleans; ids [B, L] and valid [B]:
    captions; bias: of ``attention_bias``; read: what else the model is called with.
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
        **read,
    )
    error = (predicted.float() - clean) / s.clamp(min=least_level) * generated
    return error.square().sum() / (3 * generated.sum()).clamp(min=1)


class Trainer:
    """Hold a model, its average, its optimizer and the number of steps taken; take one step at a time.

    In a group of processes (``torchrun``) each draws its share of the batch, and gradients are averaged: "ddp" keeps
    the whole model in every process, "fsdp" a shard of it (FSDP2).
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        *,
        compile: bool = False,
        parallel: str = "ddp",
        start: str | Path | None = None,
    ):
        if parallel not in PARALLEL:
            raise ValueError(f"parallel={parallel!r} must be one of {', '.join(PARALLEL)}")
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if recipe.batch % self.ranks:
            raise ValueError(f"batch={recipe.batch} must be a multiple of the {self.ranks} processes")
        torch.manual_seed(recipe.seed)
        self.recipe, self.steps = recipe, 0
        self.model = self.build().to(device)
        if start is not None:
            self.begin_from(start)
        self.device = device = next(self.model.parameters()).device  # with its index
        self.average = self.build().to(device).requires_grad_(False).eval()
        self.average.load_state_dict(self.model.state_dict())
        self.sharded = parallel == "fsdp" and self.ranks > 1
        if self.sharded:
            shard(self.model)
            shard(self.average)
        self.trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        names = {name for name, _ in self.trained}
        self.averaged = [parameter for name, parameter in self.average.named_parameters() if name in names]
        decay = [p for _, p in self.trained if p.ndim >= 2]
        plain = [p for _, p in self.trained if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=recipe.learning_rate,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.generator = torch.Generator(device)
        self.grid = Grid(*recipe.grid, after=self.globals())
        self.clips = FolderClips(recipe.data, recipe, device, recipe.model.text_len) if recipe.data else None
        self.allowed = [
            allowed_pairs(masks.parse(key), self.grid, device, recipe.globals_see) for key, _ in recipe.masks
        ]
        # The rotary tables are made before the loss is compiled, which would have to trace how.
        self.prepare()
        self.loss: Callable[..., Tensor] = (
            torch.compile(self.objective, dynamic=False, fullgraph=True) if compile else self.objective
        )
        self.compiled, self.autocast = compile, device.type == "cuda"

    @staticmethod
    def objective(model: Any, *batch: Any) -> Tensor:
        """Compute the loss of a batch and the least level."""
        return flow_loss(model, *batch)

    def build(self) -> nn.Module:
        """Make the model, as it is before training."""
        model = materialize_attention(DiT(self.recipe.model, impl="reference"))
        for module in model.modules():
            if isinstance(module, SpaceTimeAttention):
                module.globals_see = self.recipe.globals_see
        return model

    def globals(self) -> int:
        """Count the tokens beside the video's."""
        return self.recipe.model.text_len

    def begin_from(self, start: str | Path) -> None:
        """Take over weights: a shipped model's name, or a .safetensors file. Raises ValueError for another config."""
        given = dit.load(start, device="cpu")
        if given.config != self.recipe.model:
            raise ValueError(f"start={str(start)!r} has another config than the recipe's model")
        self.model.load_state_dict(given.state_dict())

    def prepare(self) -> None:
        """Make what a step looks up."""
        for model in (self.model, self.average):
            cast(DiT, model).rope(self.grid, self.device)

    def step(self, progress: float) -> Tensor:
        """Take one training step; returns the loss, on the device.

        progress: in [0, 1), the share of the run that is over, which sets the learning rate.
        """
        batch = self.batch()
        loss = self.backward(self.loss, batch)
        if self.compiled and self.steps in CHECKED:
            self.check_gradients(batch)
        if self.ranks > 1 and not self.sharded:
            average_gradients([parameter for _, parameter in self.trained], self.ranks)
        self.update(learning_rate(self.recipe, self.steps, progress))
        return loss.detach()

    def backward(self, loss: Callable[..., Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        """Add the gradients of a batch's loss to those of the weights; returns the loss."""
        # Of PyTorch's kernels this one takes a bias that all heads share without copying it.
        kernel = sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if self.autocast else nullcontext()
        with kernel, torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            value = loss(self.model, *batch, self.recipe.least_level)
        value.backward()
        return value

    def check_gradients(self, batch: tuple[Tensor, ...]) -> None:
        """Compare the gradients that the compiled loss left with those of plain PyTorch (waits for the device).

        Raises RuntimeError when they differ by more than rounding explains.
        """
        parameters = [parameter for _, parameter in self.trained]
        compiled = [parameter.grad for parameter in parameters]
        self.optimizer.zero_grad()
        self.backward(self.objective, batch)
        plain = [parameter.grad for parameter in parameters]
        for parameter, gradient in zip(parameters, compiled, strict=True):
            parameter.grad = gradient
        pairs = [(a, b) for a, b in zip(compiled, plain, strict=True) if a is not None and b is not None]
        apart = sum((_local(a) - _local(b)).square().sum() for a, b in pairs) / sum(
            _local(b).square().sum() for _, b in pairs
        )
        error = float(apart) ** 0.5
        if not error <= MOST_APART:
            raise RuntimeError(
                f"the compiled loss's gradients differ from those of plain PyTorch by {error:.3g} times their norm at "
                f"step {self.steps}: train with --no-compile"
            )

    def update(self, rate: float) -> None:
        """Move the weights along their gradients, and the average after them."""
        parameters = [parameter for _, parameter in self.trained]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(parameters, self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        # The average of a young run forgets its first steps faster.
        decay = min(self.recipe.ema, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_([_local(p) for p in self.averaged], [_local(p) for p in parameters], 1 - decay)

    @torch.no_grad()
    def batch(self) -> tuple[Tensor, ...]:
        """Draw this step's clips, noise, levels, regions, captions and mask: the tensors of ``flow_loss``."""
        recipe, size = self.recipe, self.recipe.batch // self.ranks
        choice = self.seed()
        index = choice.choices(range(len(self.allowed)), [weight for _, weight in recipe.masks])[0]
        clean, ids, valid = self.draw(size)
        noise, level, generated = self.corruption(clean)
        dtype = torch.bfloat16 if self.autocast else torch.float32
        return clean, noise, level, generated, ids, valid, attention_bias(self.allowed[index], self.grid, valid, dtype)

    def seed(self) -> random.Random:
        """Seed the generator for this step and process, and give another for what the host decides."""
        seed = self.recipe.seed * 1_000_003 + self.steps * self.ranks + self.rank
        self.generator.manual_seed(seed)
        return random.Random(seed)

    def uniform(self, *shape: int) -> Tensor:
        """Draw numbers in [0, 1) on the device."""
        return torch.rand(*shape, generator=self.generator, device=self.device)

    def draw(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw clips with captions: [size, 3, T, H, W], ids and counts."""
        recipe = self.recipe
        if self.clips is not None:
            clean, ids, valid = self.clips.draw(size, self.generator)
        else:
            frames = (recipe.frames, recipe.height, recipe.width)
            scene = world.sample(size, *frames, generator=self.generator, device=self.device)
            clean = scene.draw()
            kept = self.uniform(3, size) >= recipe.clause_dropout
            ids, valid = scene.tokens(recipe.model.text_len, motion=kept[0], others=kept[1], camera=kept[2])
        return clean, ids, torch.where(self.uniform(size) < recipe.caption_dropout, 0, valid)

    def corruption(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw noise, its levels [B], and the regions to be generated."""
        recipe, generator, size = self.recipe, self.generator, len(clean)
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        normal = torch.randn(size, generator=generator, device=self.device)
        level = torch.sigmoid(recipe.level_mean + recipe.level_std * normal)
        task = tasks.draw_tasks(size, recipe.tasks, generator=generator, device=self.device)
        generated = tasks.generated_region(task, recipe.frames, recipe.height, recipe.width, generator=generator)
        return noise, level, generated

    def state(self) -> dict[str, Any]:
        """Give all that a continued run needs; every process must ask, and of a sharded model the first gets it."""
        model, average = self.model.state_dict(), self.average.state_dict()
        optimizer = self.optimizer.state_dict()
        if self.sharded:
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            model, average = (get_model_state_dict(each, options=whole) for each in (self.model, self.average))
            optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=whole)
        return {"steps": self.steps, "model": model, "average": average, "optimizer": optimizer}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self.steps = state["steps"]
        if self.sharded:
            whole = StateDictOptions(full_state_dict=True)
            set_model_state_dict(self.model, state["model"], options=whole)
            set_model_state_dict(self.average, state["average"], options=whole)
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=whole)
            return
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])

    def averaged_model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Give the averaged model as it will be stored, rounded to a dtype and unsharded.

        Every process must call this; when the model is sharded, the first process gets the result.
        """
        tensors = self.state()["average"] if self.sharded else self.average.state_dict()
        if (not self.sharded and dtype == torch.float32) or not tensors:
            return self.average
        model = self.build().to(self.device).requires_grad_(False).eval()
        model.load_state_dict({name: each.to(dtype) for name, each in tensors.items()})
        return model

    def write(self, model: nn.Module, path: Path, *, dtype: torch.dtype = torch.float32, **notes: Any) -> None:
        """Write a model's weights, and notes about them."""
        plain = DiT(self.recipe.model).to(dtype)
        plain.load_state_dict({name: each.to(dtype) for name, each in model.state_dict().items()})
        dit.save(plain, path, **notes)


PARALLEL = ("ddp", "fsdp")


def shard(model: nn.Module) -> None:
    """Shard a model's parameters over the processes: its blocks one by one, then the rest."""
    for module in model.modules():
        if isinstance(module, (CrossBlock, JointBlock)):
            fully_shard(module)
    fully_shard(model)


def average_gradients(parameters: list[nn.Parameter], ranks: int) -> None:
    """Average the gradients of all processes, in one message."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= ranks
    for gradient, mean in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """Rise linearly over the warm-up steps, fall with half a cosine to 0 at progress 1."""
    return (
        recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    )
