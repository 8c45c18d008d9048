"""`stattn study consistency`: is video steadier when attention joins its frames?

The same small model is trained and sampled with four kinds of attention, a few seeds each. Text tokens see only each
other, so that nothing but attention between frames can carry anything from one to the next.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

import torch
from torch import Tensor

from stattn import checks, dit, media, metrics, world
from stattn.dit import DiT
from stattn.masks import parse
from stattn.metrics import extractors
from stattn.modules import SpaceTimeAttention
from stattn.sampler import sample
from stattn.trainer import Recipe, Trainer

KINDS = {
    "full": "full()",
    "windowed": "window(5, 3, 3)",
    "previous frame": "frame_causal(1, window=2)",
    "per frame": "spatial()",
}
SEED = 5_000_000
# Patches of one frame, so that frames are what masks cut.
RECIPE = Recipe(
    dataclasses.replace(dit.CONFIGS["tiny"], layers=4, heads=2, ffn_dim=512, text_dim=128, patch=(1, 8, 8)),
    frames=16,
    height=32,
    width=32,
    batch=64,
    warmup=100,
    masks=(("full()", 1.0),),
    tasks=(1, 0, 0, 0, 0, 0),
    globals_see="globals",
)


def recipe_of(kind: str, seed: int, recipe: Recipe = RECIPE) -> Recipe:
    """Give the recipe of one kind of attention. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    return dataclasses.replace(recipe, masks=((KINDS[kind], 1.0),), seed=seed)


def study(
    *,
    steps: int,
    seeds: int,
    clips: int,
    sampling_steps: int = 20,
    device: torch.device | str = "cpu",
    recipe: Recipe = RECIPE,
    say: Any = print,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train and sample every kind; returns each kind's numbers (mean, spread, and one for each seed), and clips.

    steps: of training. seeds: trainings of a kind. clips: sampled and measured.
    """
    where = torch.device(device)
    scene = world.sample(clips, recipe.frames, recipe.height, recipe.width, seed=SEED, device=where)
    real = scene.draw()
    subject, motion = extractors.load("synth-frame"), extractors.load("synth-r3d")
    wanted = features(real.cpu(), motion)
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    shown = {"real": real[:4].cpu()}
    for kind in KINDS:
        for seed in range(seeds):
            trainer = Trainer(recipe_of(kind, seed, recipe), where)
            loss = torch.zeros((), device=where)
            for step in range(steps):
                loss = trainer.step(step / steps)
            model = cast(DiT, trainer.averaged_model())
            for module in model.modules():
                if isinstance(module, SpaceTimeAttention):
                    module.mask = parse(KINDS[kind])
            ids, valid = scene.tokens(recipe.model.text_len)
            made = sample(
                model,
                real.shape,
                text=ids,
                text_valid=valid,
                steps=sampling_steps,
                guidance=1.5,
                seed=SEED,
                impl="reference",
            )
            row = measure(made.cpu(), real.cpu(), wanted, scene, subject, motion) | {"loss": float(loss)}
            rows[kind].append(row)
            shown.setdefault(kind, made[:4].cpu())
            say(f"{kind}, seed {seed}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    found = {
        kind: {
            name: {
                "mean": fmean(row[name] for row in of),
                "spread": stdev([row[name] for row in of]) if len(of) > 1 else 0.0,
                "all": [row[name] for row in of],
            }
            for name in of[0]
        }
        for kind, of in rows.items()
    }
    return {"steps": steps, "seeds": seeds, "clips": clips, "recipe": dataclasses.asdict(recipe), "kinds": found}, shown


def features(clips: Tensor, extractor: extractors.FeatureExtractor) -> Tensor:
    """Give the features of clips [B, 3, T, H, W]."""
    return extractor(torch.cat([extractors.fit(clip, extractor) for clip in clips]))


def measure(
    made: Tensor,
    real: Tensor,
    wanted: Tensor,
    scene: world.Scene,
    subject: extractors.FeatureExtractor,
    motion: extractors.FeatureExtractor,
) -> dict[str, float]:
    """Measure sampled clips [B, 3, T, H, W] beside real ones of the same captions, whose features are ``wanted``."""
    consistent = [metrics.cos_consistency(subject(extractors.fit(clip, subject))[0]) for clip in made]
    return {
        "flicker_ratio": checks.flicker_ratio(made, real),
        f"subject_consistency({subject.name})": fmean(consistent),
        f"FVD({motion.name})": metrics.frechet_distance(features(made, motion), wanted),
        "colour": checks.agreement(made, scene.colours[:, 0].cpu(), scene.shapes[:, 0].cpu())["colour"],
    }


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw a bar with its error for each kind and number."""
    kinds = found["kinds"]
    names = [name for name in next(iter(kinds.values())) if name != "loss"]
    shape = (1, len(names))
    figure, axes = media.extra("matplotlib.pyplot", "matplotlib").subplots(
        *shape, figsize=(12, 3), layout="constrained"
    )
    for axis, name in zip(axes, names, strict=True):
        values = [kinds[kind][name] for kind in kinds]
        axis.bar(
            range(len(kinds)), [each["mean"] for each in values], yerr=[each["spread"] for each in values], capsize=4
        )
        axis.set_xticks(range(len(kinds)), list(kinds), rotation=20)
        axis.set_title(name, fontsize=9)
    figure.savefig(path, dpi=120)
