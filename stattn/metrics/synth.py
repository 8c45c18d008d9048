"""Small feature extractors, trained on the synthetic world in a minute each.

==============  =============================================================  ===================
name            trained to                                                     used for
==============  =============================================================  ===================
synth-r3d       name colours, shapes, count, direction and camera of a clip    FVD, MMD
synth-frame     tell a clip's frames, augmented, from other clips' (InfoNCE)   subject consistency
synth-clip      match single frames with captions (InfoNCE both ways)          CLIPSIM
==============  =============================================================  ===================

``stattn train --preset synth-r3d`` (and so on) trains one; seed, recipe and log are in the .json beside the weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stattn import dit, results, world
from stattn.metrics.networks import FeatureExtractor, Network, Spec, file_sha256

WEIGHTS = Path(__file__).parent / "weights"
SHIPPED = ("synth-clip", "synth-frame", "synth-r3d")
RESOLUTION, FRAMES = 64, 16


class R3D(nn.Module):
    """A residual network of 3-D convolutions: [B, 3, T, H, W] to [B, dim]."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.stem = nn.Conv3d(3, width, (3, 5, 5), (1, 2, 2), (1, 2, 2), bias=False)
        self.stages = nn.Sequential(
            _Residual(width, width, 3), _Residual(width, 2 * width, 3), _Residual(2 * width, 4 * width, 3)
        )
        self.head = nn.Linear(4 * width * 2 * 2 * 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        return self.head(F.adaptive_avg_pool3d(x, 2).flatten(1))


class R2D(nn.Module):
    """A residual network of 2-D convolutions: [B, 3, H, W] to [B, dim]."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 5, 2, 2, bias=False)
        self.stages = nn.Sequential(
            _Residual(width, width, 2), _Residual(width, 2 * width, 2), _Residual(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width * 2 * 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class _Residual(nn.Module):
    """Two convolutions around a skip, half the resolution on every axis."""

    def __init__(self, inputs: int, outputs: int, axes: int):
        super().__init__()
        conv: Callable[..., nn.Module] = nn.Conv3d if axes == 3 else nn.Conv2d
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1, self.conv2 = conv(inputs, outputs, 3, 2, 1, bias=False), conv(outputs, outputs, 3, 1, 1, bias=False)
        self.skip = conv(inputs, outputs, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        return self.skip(h) + self.conv2(F.silu(self.norm2(self.conv1(h))))


class Caption(nn.Module):
    """Embed captions as a set of words that know their place: [B, L] ids and [B] counts to [B, dim]."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.words = nn.Embedding(len(world.VOCABULARY), width)
        self.places = nn.Embedding(world.CAPTION_LENGTH, width)
        self.mix = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, dim))

    def forward(self, ids: Tensor, counts: Tensor) -> Tensor:
        words = self.words(ids)
        # A word beside its predecessor: "red disc" and "red square" differ by more than their words.
        pairs = torch.cat((words, F.pad(words, (0, 0, 1, -1))), -1)
        real = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
        tokens = (words + self.places.weight[: ids.shape[1]] + self.mix(pairs)) * real[..., None]
        return self.head(tokens.sum(1) / counts.clamp(min=1)[:, None])


@dataclass(frozen=True)
class ExtractorRecipe:
    """How an extractor is trained: by AdamW, at a learning rate that falls with half a cosine."""

    name: str
    width: int = 24
    dim: int = 64
    batch: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    temperature: float = 0.1
    frames: int = FRAMES
    resolution: int = RESOLUTION
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in SHIPPED:
            raise ValueError(f"name={self.name!r} must be one of {', '.join(SHIPPED)}")


PRESETS = {
    "synth-r3d": ExtractorRecipe("synth-r3d"),
    "synth-frame": ExtractorRecipe("synth-frame", frames=8, learning_rate=1e-3),
    "synth-clip": ExtractorRecipe("synth-clip", frames=8, learning_rate=1e-3),
}


class Extractor(nn.Module):
    """The networks of one recipe: ``video`` or ``image``, and for captions ``caption``; ``heads`` serve training."""

    def __init__(self, recipe: ExtractorRecipe):
        super().__init__()
        self.recipe = recipe
        if recipe.name == "synth-r3d":
            self.net: nn.Module = R3D(recipe.width, recipe.dim)
            sizes = (
                len(world.COLOURS),
                len(world.SHAPES),
                world.MAX_OBJECTS,
                len(world.DIRECTIONS),
                len(world.CAMERAS),
            )
            self.heads = nn.ModuleList(nn.Linear(recipe.dim, size) for size in sizes)
        else:
            self.net = R2D(recipe.width, recipe.dim)
        if recipe.name == "synth-clip":
            self.caption = Caption(2 * recipe.width, recipe.dim)

    def loss(self, scene: world.Scene, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Give the loss of a batch, and the share that is right."""
        video = scene.draw()
        if self.recipe.name == "synth-r3d":
            features = F.silu(self.net(video))
            truth = (scene.colours[:, 0], scene.shapes[:, 0], scene.count - 1, scene.directions[:, 0], scene.moves)
            answers = [(head(features), each) for head, each in zip(self.heads, truth, strict=True)]
            losses = [F.cross_entropy(answer, each) for answer, each in answers]
            hits = [(answer.argmax(1) == each).float().mean() for answer, each in answers]
            return torch.stack(losses).sum(), torch.stack(hits).mean()
        clip = torch.arange(len(video), device=video.device)
        at = torch.randint(video.shape[2], (2, len(video)), generator=generator, device=generator.device).to(
            video.device
        )
        if self.recipe.name == "synth-frame":
            left, right = (self.net(_augment(video[clip, :, each], generator)) for each in at)
        else:
            still = torch.zeros(len(video), dtype=torch.bool, device=video.device)
            ids, counts = scene.tokens(motion=still, camera=still)  # one frame shows neither
            left, right = self.net(_augment(video[clip, :, at[0]], generator)), self.caption(ids, counts)
        scores = F.normalize(left, dim=1) @ F.normalize(right, dim=1).T / self.recipe.temperature
        loss = (F.cross_entropy(scores, clip) + F.cross_entropy(scores.T, clip)) / 2
        return loss, (scores.argmax(1) == clip).float().mean()


def _augment(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, brighten and roughen pictures [B, 3, H, W], each in its own way."""
    batch, device = len(picture), picture.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator, device=generator.device).to(device)

    theta = torch.eye(2, 3, device=device).repeat(batch, 1, 1) * uniform(0.9, 1.1, 1, 1)
    theta[:, :, 2] = uniform(-0.1, 0.1, 2)
    where = F.affine_grid(theta, list(picture.shape), align_corners=False)
    picture = F.grid_sample(picture, where, padding_mode="reflection", align_corners=False)
    picture = picture * uniform(0.8, 1.2, 1, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1)
    noise = torch.randn(picture.shape, generator=generator, device=generator.device).to(device)
    return picture + uniform(0, 0.08, 1, 1, 1) * noise


def train(
    recipe: ExtractorRecipe,
    out: str | Path,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    device: torch.device | str | None = None,
    log_every: int = 100,
    command: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train an extractor for ``minutes`` or ``steps``, whichever end first, and write it to the folder ``out``.

    Writes NAME.safetensors (fp16) and NAME.json (recipe and log), and returns the record in the latter. Its "held_out"
    is measured on clips that training never draws. Raises ValueError when neither minutes nor steps is given,
    FloatingPointError when the loss is not finite.
    """
    if minutes is None and steps is None:
        raise ValueError(f"minutes={minutes} and steps={steps}: give at least one of them")
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(recipe.seed)
    model = Extractor(recipe).to(where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    generator = torch.Generator(where)
    began, log, step = time.monotonic(), [], 0
    size = (recipe.batch, recipe.frames, recipe.resolution, recipe.resolution)
    progress = 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        generator.manual_seed(recipe.seed * 1_000_003 + step)
        scene = world.sample(*size, generator=generator, device=where)
        with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
            loss, right = model.loss(scene, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        spent = (time.monotonic() - began) / (60 * minutes) if minutes is not None else 0.0
        progress = max(spent, step / steps if steps is not None else 0.0)
        if step % log_every == 0 or progress >= 1:
            values = [step, round(loss.item(), 4), round(right.item(), 4)]
            if not math.isfinite(values[1]):
                raise FloatingPointError(f"the loss is {values[1]} at step {step}")
            log.append(values)
            if not quiet:
                print(f"{recipe.name}: step {values[0]}, loss {values[1]}, right {values[2]}", flush=True)
    model = model.half().float().eval()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        scene = world.sample(*size, seed=10_000_000 + recipe.seed, device=where)
        loss, right = model.loss(scene, generator)
    record = {
        "recipe": asdict(recipe),
        "command": command,
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": results.machine(where),
        "versions": results.versions(),
        "seconds": round(time.monotonic() - began, 1),
        "log": log,
        "held_out": {"loss": round(loss.item(), 4), "right": round(right.item(), 4)},
    }
    tensors = {name: each.half().cpu().contiguous() for name, each in model.state_dict().items()}
    dit.safetensors().save_file(tensors, folder / f"{recipe.name}.safetensors")
    (folder / f"{recipe.name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


class _Frames(Network):
    """The extractor of single pictures that also reads captions."""

    def __init__(self, model: Extractor, spec: Spec, sha256: str, device: torch.device | str):
        super().__init__(model.net, spec, sha256, device)
        self.model = model

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Tensor:
        """Give features of captions of the world's words: [B, dim]. What one frame cannot show is left out."""
        ids, counts = world.tokenize([_seen_in_a_frame(each) for each in captions], device=self.device)
        return self._checked(self.model.caption(ids, counts), len(ids))


def _seen_in_a_frame(caption: str) -> str:
    """Leave out motion and camera, as training does: "a red disc moves up with a ..., camera ..." -> "a red disc with
    a ...".
    """
    words = caption.lower().replace(",", " ").split()
    if "camera" in words:
        words = words[: words.index("camera")]
    if "moves" in words:
        at = words.index("moves")
        words = words[:at] + words[at + 2 :]
    return " ".join(words)


def load(name: str | Path, *, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Load a trained extractor: a shipped name, or the path of its .safetensors file, with its .json beside it.

    Raises ValueError when there are no such weights.
    """
    path = Path(name) if str(name).endswith(".safetensors") else WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        raise ValueError(f"no weights at {path}; train them: stattn train --preset {Path(name).stem}")
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    recipe = ExtractorRecipe(**record["recipe"])
    model = Extractor(recipe)
    tensors = dit.safetensors().load_file(path, device=str(device))
    model.load_state_dict({key: value.float() for key, value in tensors.items()})
    model = model.to(device).eval()
    digest = file_sha256(path)
    frames = recipe.frames if recipe.name == "synth-r3d" else 1
    spec = Spec(recipe.name, digest[:8], recipe.dim, recipe.resolution, frames)
    if recipe.name == "synth-clip":
        return _Frames(model, spec, digest, device)
    return Network(model.net if frames == 1 else _standardised(model.net), spec, digest, device)


def _standardised(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """Give a clip's features mean 0 and variance 1: a kernel of degree 3 wants them of one size."""

    def features(x: Tensor) -> Tensor:
        out: Tensor = net(x)
        return F.layer_norm(out, out.shape[1:])

    return features
