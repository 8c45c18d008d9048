"""`stattn study consistency`: is video steadier when attention joins its frames?

The same small model is trained and sampled with four kinds of attention, a few seeds each. Text tokens see only each
other, so that nothing but attention between frames can carry anything from one to the next.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

import torch
from torch import Tensor

from stattn import dit, metrics, world
from stattn.dit import DiT
from stattn.masks import parse
from stattn.metrics import checks, extractors, networks
from stattn.modules import SpaceTimeAttention
from stattn.recipes import Recipe
from stattn.sampler import sample
from stattn.trainer import Trainer
from stattn.training.run import plain
from stattn.video import media

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
    out: Path,
    sampling_steps: int = 20,
    device: torch.device | str = "cpu",
    recipe: Recipe = RECIPE,
    part: tuple[int, int] = (1, 1),
    say: Any = print,
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Train and sample every kind; returns each kind's numbers (mean, spread, and one for each seed), and clips.

    steps: of training. seeds: trainings of a kind. clips: sampled and measured. out: a folder where what each training
    gave is kept; one that is there, made with the same settings, is not repeated. part: (i, n) makes every n-th
    training from the i-th; None is returned while others are missing.
    """
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part={part} must be (i, n) with i in 1..n")
    where = torch.device(device)
    given = (steps, clips, sampling_steps, recipe)
    settings = {"steps": steps, "clips": clips, "sampling_steps": sampling_steps, "recipe": plain(recipe)}
    ruler = Ruler(clips, recipe, where)
    trainings = [(kind, seed) for seed in range(seeds) for kind in KINDS]
    for kind, seed in trainings[part[0] - 1 :: part[1]]:
        path = _place(out, kind, seed)
        if _kept(path, settings) is None:
            row, made = _train(kind, seed, ruler, *given, where)
            path.parent.mkdir(parents=True, exist_ok=True)
            dit.safetensors().save_file({"clips": media.to_uint8(made[:4])}, path.with_suffix(".safetensors"))
            path.write_text(json.dumps({**settings, "found": row}) + "\n", encoding="utf-8")
            say(f"{kind}, seed {seed}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    found = {(kind, seed): _kept(_place(out, kind, seed), settings) for kind, seed in trainings}
    rows = {each: row for each, row in found.items() if row is not None}
    if len(rows) < len(trainings):
        return None
    kinds = {
        kind: {
            name: {"mean": fmean(values), "spread": stdev(values) if len(values) > 1 else 0.0, "all": values}
            for name in rows[kind, 0]
            for values in ([rows[kind, seed][name] for seed in range(seeds)],)
        }
        for kind in KINDS
    }
    shown = {"real": ruler.real[:4].cpu()}
    for kind in KINDS:
        saved = dit.safetensors().load_file(_place(out, kind, 0).with_suffix(".safetensors"))["clips"]
        shown[kind] = saved.float() / 127.5 - 1
    others = world.render(clips, recipe.frames, recipe.height, recipe.width, seed=SEED + 1, device=where)
    return {"seeds": seeds, **settings, "kinds": kinds, "other real clips": ruler.measure(others.video)}, shown


def _place(out: Path, kind: str, seed: int) -> Path:
    return out / "trainings" / f"{kind.replace(' ', '-')}-{seed}.json"


def _kept(path: Path, settings: dict[str, Any]) -> dict[str, float] | None:
    """Give what a training with these settings found, if it is there."""
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, float] = record.pop("found")
    return found if record == settings else None


def _train(
    kind: str,
    seed: int,
    ruler: Ruler,
    steps: int,
    clips: int,
    sampling_steps: int,
    recipe: Recipe,
    device: torch.device,
) -> tuple[dict[str, float], Tensor]:
    """Train and sample once; returns the numbers and the clips."""
    trainer = Trainer(recipe_of(kind, seed, recipe), device)
    last = max(1, steps // 10)
    loss = torch.zeros((), device=device)
    for step in range(steps):
        here = trainer.step(step / steps)
        loss += here / last if step >= steps - last else 0
    model = cast(DiT, trainer.averaged_model())
    for module in model.modules():
        if isinstance(module, SpaceTimeAttention):
            module.mask = parse(KINDS[kind])
    ids, valid = ruler.scene.tokens(recipe.model.text_len)
    made = sample(
        model,
        ruler.real.shape,
        text=ids,
        text_valid=valid,
        steps=sampling_steps,
        guidance=1.5,
        seed=SEED,
        impl="reference",
    )
    return ruler.measure(made) | {"loss": float(loss)}, made.cpu()


class Ruler:
    """Real clips, and what sampled clips of the same captions are measured by."""

    def __init__(self, clips: int, recipe: Recipe, device: torch.device):
        self.scene = world.sample(clips, recipe.frames, recipe.height, recipe.width, seed=SEED, device=device)
        self.real = self.scene.draw()
        self.subject, self.motion = extractors.load("synth-frame"), extractors.load("synth-r3d")
        self.wanted = features(self.real.cpu(), self.motion)

    def measure(self, made: Tensor) -> dict[str, float]:
        """Measure clips [B, 3, T, H, W]."""
        made, real = made.cpu(), self.real.cpu()
        consistent = [metrics.cos_consistency(self.subject(extractors.fit(clip, self.subject))[0]) for clip in made]
        colours, shapes = (ids[:, 0].cpu() for ids in (self.scene.colours, self.scene.shapes))
        return {
            "flicker_ratio": checks.flicker_ratio(made, real),
            f"subject_consistency({self.subject.name})": fmean(consistent),
            f"FVD({self.motion.name})": metrics.frechet_distance(features(made, self.motion), self.wanted),
            "colour": checks.agreement(made, colours, shapes)["colour"],
        }


def features(clips: Tensor, extractor: networks.FeatureExtractor) -> Tensor:
    """Give the features of clips [B, 3, T, H, W]."""
    return extractor(torch.cat([extractors.fit(clip, extractor) for clip in clips]))


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw a bar with its error for each kind and number, and a line where other real clips lie."""
    kinds = found["kinds"]
    names = [name for name in next(iter(kinds.values())) if name != "loss"]
    shape = (1, len(names))
    figure, axes = media.extra("matplotlib.pyplot", "matplotlib").subplots(
        *shape, figsize=(12, 3), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=True):
        values = [kinds[kind][name] for kind in kinds]
        axis.bar(
            range(len(kinds)), [each["mean"] for each in values], yerr=[each["spread"] for each in values], capsize=4
        )
        real = found["other real clips"][name]
        axis.axhline(real, color="black", linewidth=0.8, linestyle="--")
        axis.set_xticks(range(len(kinds)), list(kinds), rotation=20)
        axis.set_title(name, fontsize=9)
    figure.savefig(path, dpi=120)
