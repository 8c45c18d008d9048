"""Training of adapters beside a frozen base: ``stattn train --preset camera`` and ``--preset memory``.

- *camera*: clips of the world filmed by any mixture of moves, with their ray maps; captions never speak of the camera.
- *memory*: an object is seen, leaves the picture and comes back. The model sees the first frames of its return, which
  do not show it yet, no caption, and through the memory the frames of long ago: only they say what it looks like.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stattn import dit, world
from stattn.accelerate import accelerate
from stattn.metrics import checks
from stattn.recipes import AdapterRecipe
from stattn.trainer import Trainer, attention_bias, flow_loss, materialize_attention
from stattn.training.run import Kind
from stattn.video import adapted
from stattn.video.adapted import Adapted, AdapterConfig
from stattn.video.camera import maps_of_clip, moves_seen, paths, ray_maps
from stattn.video.paint import Sampling, paint

PAST_FRAMES, PAST_STRIDE, ABSENT = 8, 2, 4  # frames remembered, their distance, and of the return without object
MOST = (2.0, 2.0, 0.45, 1.0, 0.045, 5.0)  # of each field of Move in training
SEED = 3_000_000


class AdapterTrainer(Trainer):
    """A trainer whose base does not change."""

    recipe: AdapterRecipe

    def build(self) -> nn.Module:
        """Make the base with new adapters."""
        config = AdapterConfig(self.recipe.base, **dict(self.recipe.adapter))
        base = dit.load(config.base)
        if base.config != self.recipe.model:
            raise ValueError(f"base={config.base!r} has another config than the recipe's model")
        base.requires_grad_(False)
        accelerate(base, impl="reference")
        return materialize_attention(Adapted(base, config))

    def begin_from(self, start: str | Path) -> None:
        """Take over adapters. Raises ValueError for others than the recipe's."""
        given = adapted.load(start)
        if given.adapter_config != cast(Adapted, self.model).adapter_config:
            raise ValueError(f"start={str(start)!r} holds other adapters than the recipe's")
        self.model.load_state_dict(given.state_dict())

    def prepare(self) -> None:
        """Make the rotary tables."""
        for model in (self.model, self.average):
            cast(Adapted, model).base.rope(self.grid, self.device)

    def write(self, model: nn.Module, path: Path, *, dtype: torch.dtype = torch.float32, **notes: Any) -> None:
        """Write the adapters' weights."""
        tensors = {name: each.to(dtype) for name, each in cast(Adapted, model).adapters().items()}
        adapted.write(tensors, cast(Adapted, model).adapter_config, path, **notes)


class CameraTrainer(AdapterTrainer):
    """Train a camera adapter."""

    @staticmethod
    def objective(model: Any, *batch: Any) -> Tensor:
        """Give ``flow_loss`` of a batch that ends in a ray map and the least level."""
        *rest, ray_map, least = batch
        loss: Any = flow_loss
        return cast(Tensor, loss(model, *rest, least, ray_map=ray_map))

    @torch.no_grad()
    def batch(self) -> tuple[Tensor, ...]:
        """Draw clips of free cameras and their maps."""
        recipe, size = self.recipe, self.recipe.batch // self.ranks
        self.seed()
        scene = free_cameras(size, recipe, self.generator, self.device)
        clean = scene.draw()
        kept = self.uniform(3, size) >= recipe.clause_dropout
        still = torch.zeros_like(kept[2])
        ids, valid = scene.tokens(recipe.model.text_len, motion=kept[0], others=kept[1], camera=still)
        valid = torch.where(self.uniform(size) < recipe.caption_dropout, 0, valid)
        noise, level, generated = self.corruption(clean)
        bias = attention_bias(self.allowed[0], self.grid, valid, torch.bfloat16 if self.autocast else torch.float32)
        return clean, noise, level, generated, ids, valid, bias, ray_maps(scene.camera, recipe.height, recipe.width)


class MemoryTrainer(AdapterTrainer):
    """Train memory tokens."""

    def globals(self) -> int:
        """Count text and memory tokens."""
        return self.recipe.model.text_len + dict(self.recipe.adapter)["memory_tokens"]

    @staticmethod
    def objective(model: Any, *batch: Any) -> Tensor:
        """Give ``flow_loss`` of a batch that ends in the past, its times and the least level."""
        *rest, past, times, least = batch
        loss: Any = flow_loss
        return cast(Tensor, loss(model, *rest, least, past=past, times=times))

    @torch.no_grad()
    def batch(self) -> tuple[Tensor, ...]:
        """Draw clips of objects that come back, and their past."""
        recipe, size = self.recipe, self.recipe.batch // self.ranks
        self.seed()
        scene = returns(size, recipe, self.generator, self.device)
        video = scene.draw()
        past, clean = video[:, :, :PAST_FRAMES], video[:, :, PAST_FRAMES:]
        ids, valid = scene.tokens(recipe.model.text_len)
        valid = torch.where(self.uniform(size) < recipe.caption_dropout, 0, valid)
        noise, level, _ = self.corruption(clean)
        generated = torch.ones_like(clean[:, :1], dtype=torch.bool)
        generated[:, :, :ABSENT] = False
        real = torch.arange(recipe.model.text_len, device=self.device) < valid[:, None]
        real = torch.cat((real, real.new_ones(size, self.grid.after - real.shape[1])), 1)
        bias = attention_bias(self.allowed[0], self.grid, real, torch.bfloat16 if self.autocast else torch.float32)
        return clean, noise, level, generated, ids, valid, bias, past, times_of_past(self.device)


def free_cameras(
    batch: int, recipe: AdapterRecipe, generator: torch.Generator, device: torch.device | str
) -> world.Scene:
    """Draw scenes filmed by random mixtures of moves: each field moves in two clips of five."""
    frames = (recipe.frames, recipe.height, recipe.width)
    scene = world.sample(batch, *frames, generator=generator, device=device, cameras=("static",))
    numbers = torch.rand(2, batch, len(MOST), generator=generator, device=generator.device).to(device)
    amounts = torch.where(numbers[0] < 0.4, 2 * numbers[1] - 1, 0.0) * torch.tensor(MOST, device=device)
    return world.with_camera(scene, paths(amounts, recipe.frames, min(recipe.height, recipe.width)))


def returns(batch: int, recipe: AdapterRecipe, generator: torch.Generator, device: torch.device | str) -> world.Scene:
    """Draw scenes of one object in PAST_FRAMES frames of long ago, PAST_STRIDE apart, and its return in a window.

    In the first ABSENT frames of the window it is out of the picture; then it comes in from one side, to stop inside.
    """
    frames, height, width = recipe.frames, recipe.height, recipe.width
    ago = PAST_FRAMES * PAST_STRIDE
    scene = world.sample(
        batch, ago + frames, height, width, generator=generator, device=device, objects=(1, 1), cameras=("static",)
    )
    kept = torch.cat((torch.arange(0, ago, PAST_STRIDE), torch.arange(ago, ago + frames))).to(device)
    numbers = torch.rand(3, batch, generator=generator, device=generator.device).to(device)
    size = torch.tensor((width, height), device=device, dtype=torch.float32)
    goal = size * (0.35 + 0.3 * numbers[:2].T)  # [B, 2]
    side = (numbers[2] * 4).long().clamp(max=3)
    way = torch.tensor(((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)), device=device)[side]
    radius = scene.radii[:, 0, :1]  # [B, 1]
    # The farthest corner of a triangle is 1.56 radii from its centre.
    edge = torch.where(way.sum(1) > 0, (size - goal).mul(way.abs()).sum(1), goal.mul(way.abs()).sum(1))
    pace = (edge + 1.7 * radius[:, 0]) / (frames - 1 - ABSENT)
    left = (frames - 1 - torch.arange(frames, device=device)).float()  # frames until it is there
    window = goal[:, None] + way[:, None] * (pace[:, None] * left)[..., None]
    centres = scene.centres[:, kept].clone()
    centres[:, PAST_FRAMES:, 0] = window
    return dataclasses.replace(scene, centres=centres, radii=scene.radii[:, kept], camera=scene.camera[:, kept])


def times_of_past(device: torch.device | str) -> Tensor:
    """Give the times of the remembered frames, in frames before the window."""
    return torch.arange(-PAST_FRAMES * PAST_STRIDE, 0, PAST_STRIDE, device=device)


@torch.no_grad()
def evaluate_camera(model: nn.Module, recipe: AdapterRecipe, clips: int, *, steps: int = 30) -> dict[str, Any]:
    """Sample clips under free cameras, recover the moves, and compare: R^2 and mean error of pan, zoom and roll.

    "reference": the maps are recovered from the real clips and steer clips of other captions. The same estimator on
    the real clips says what it could reach, and on the sampled ones beside other requests what chance gives.
    """
    if not clips:
        return {}
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(SEED)
    scene = free_cameras(clips, recipe, generator, device)
    only = scene.camera.clone()
    only[..., 3], only[..., 5] = 0, 0  # dolly and track move two layers differently: no affine map says how
    scene = world.with_camera(scene, only)
    asked, real = _asked(scene), scene.draw()
    words = [caption.split(",")[0] for caption in scene.captions()]
    whole = cast(Adapted, model)

    def moves(maps: Tensor, captions: list[str]) -> Tensor:
        made = [
            paint(
                whole.base,
                torch.zeros_like(real[start : start + 32]),
                torch.ones(1),
                captions[start : start + 32],
                Sampling(steps=steps, seed=SEED, impl="reference"),
                call=whole.steered(ray_map=maps[start : start + 32]),
            )
            for start in range(0, clips, 32)
        ]
        return moves_seen(torch.cat(made))

    found = moves(ray_maps(scene.camera, recipe.height, recipe.width), words)
    maps = torch.cat([maps_of_clip(part, height=recipe.height, width=recipe.width) for part in real.split(32)])
    return {
        "clips": clips,
        "generated": agreement(found, asked),
        "reference": agreement(moves(maps.to(device), words[1:] + words[:1]), asked),
        "real": agreement(moves_seen(real), asked),
        "shuffled": agreement(found, asked.roll(1, 0)),
    }


def _asked(scene: world.Scene) -> Tensor:
    """Give the requested moves from the first to the last frame: [B, 4] of pan (x, y), log zoom, roll."""
    camera = scene.camera.cpu()
    pan = camera[:, -1, :2] / (scene.frames - 1)
    zoom = camera[:, -1, 2].log() - camera[:, 0, 2].log()
    return torch.cat((pan, zoom[:, None], camera[:, -1, 4:5]), 1).double()


def agreement(found: Tensor, asked: Tensor) -> dict[str, float]:
    """Compare recovered with requested moves: R^2 = 1 - residual / variance, and the mean error of pan in px/frame."""

    def r2(columns: slice) -> float:
        left = (found[:, columns] - asked[:, columns]).square().sum()
        spread = (asked[:, columns] - asked[:, columns].mean(0)).square().sum()
        return round(float(1 - left / spread), 4)

    error = (found[:, :2] - asked[:, :2]).norm(dim=1).mean()
    return {
        "pan_r2": r2(slice(0, 2)),
        "zoom_r2": r2(slice(2, 3)),
        "roll_r2": r2(slice(3, 4)),
        "pan_error": round(float(error), 4),
    }


@torch.no_grad()
def evaluate_memory(model: nn.Module, recipe: AdapterRecipe, clips: int, *, steps: int = 30) -> dict[str, Any]:
    """Let objects come back, with and without memory: the share whose colour, and whose shape, is as it was.

    The same check on the real clips says what could be reached, and beside another clip's object what chance gives.
    """
    if not clips:
        return {}
    device = next(model.parameters()).device
    scene = returns(clips, recipe, torch.Generator().manual_seed(SEED), device)
    video = scene.draw()
    past, real = video[:, :, :PAST_FRAMES], video[:, :, PAST_FRAMES:]
    strength = torch.ones(1, 1, recipe.frames, 1, 1).expand(1, 1, *real.shape[2:]).clone()
    strength[:, :, :ABSENT] = 0
    found: dict[str, Any] = {"clips": clips, "guidance": adapted.RECALL}
    whole = cast(Adapted, model)
    for name, call in (
        ("with", lambda part: whole.steered(past=part, times=times_of_past(device), guidance=adapted.RECALL)),
        ("without", lambda part: whole.steered()),
    ):
        made = [
            paint(
                whole.base,
                real[start : start + 32],
                strength,
                None,
                Sampling(steps=steps, guidance=1.0, seed=SEED, impl="reference"),
                call=call(past[start : start + 32]),
            )
            for start in range(0, clips, 32)
        ]
        seen = torch.cat(made)[:, :, -4:]
        found[name] = checks.agreement(seen, scene.colours[:, 0], scene.shapes[:, 0])
        if name == "with":
            found["shuffled"] = checks.agreement(seen, scene.colours[:, 0].roll(1), scene.shapes[:, 0].roll(1))
    found["real"] = checks.agreement(real[:, :, -4:], scene.colours[:, 0], scene.shapes[:, 0])
    return found


def _camera_picture(model: nn.Module, recipe: AdapterRecipe) -> tuple[Tensor, list[str]]:
    device = next(model.parameters()).device
    scene = free_cameras(6, recipe, torch.Generator().manual_seed(SEED), device)
    captions = [caption.split(",")[0] for caption in scene.captions()]
    maps = ray_maps(scene.camera, recipe.height, recipe.width)
    whole = cast(Adapted, model)
    sampling = Sampling(steps=20, seed=SEED, impl="reference")
    real = scene.draw()
    return paint(whole.base, real, torch.ones(1), captions, sampling, call=whole.steered(ray_map=maps)), captions


def _memory_picture(model: nn.Module, recipe: AdapterRecipe) -> tuple[Tensor, list[str]]:
    device = next(model.parameters()).device
    scene = returns(6, recipe, torch.Generator().manual_seed(SEED), device)
    video = scene.draw()
    past, real = video[:, :, :PAST_FRAMES], video[:, :, PAST_FRAMES:]
    strength = torch.ones(1, 1, *real.shape[2:])
    strength[:, :, :ABSENT] = 0
    whole = cast(Adapted, model)
    call = whole.steered(past=past, times=times_of_past(device), guidance=adapted.RECALL)
    sampling = Sampling(steps=20, guidance=1.0, seed=SEED, impl="reference")
    made = paint(whole.base, real, strength, None, sampling, call=call)
    return torch.cat((past[:, :, ::2].cpu(), made.cpu()), 2), scene.captions()


def kind(recipe: AdapterRecipe) -> Kind:
    """Choose the kind of run for a recipe. Raises ValueError for an unknown ``adapts``."""
    found = {
        "camera": (CameraTrainer, _camera_picture, evaluate_camera),
        "memory": (MemoryTrainer, _memory_picture, evaluate_memory),
    }
    if recipe.adapts not in found:
        raise ValueError(f"adapts={recipe.adapts!r} must be one of {', '.join(found)}")
    return Kind(*found[recipe.adapts])
