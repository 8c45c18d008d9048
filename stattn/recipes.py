"""Recipes: what ``stattn train`` trains, on what, and how."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from stattn import dit, world
from stattn.dit import DiTConfig


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how.

    level_mean, level_std: of the logit of s. masks: (key, weight) pairs, one drawn a step. tasks: a weight for each of
    ``training.tasks.TASKS``. data: a folder of video files (``training.folder``), or "" for the synthetic world.
    clause_dropout: how often a caption leaves out what moves, what else is there, or the camera. globals_see: "globals"
    keeps the text from carrying what one frame shows to the next. warmup: steps.
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
    data: str = ""
    globals_see: str = "all"
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


@dataclass(frozen=True)
class AdapterRecipe(Recipe):
    """What adapters of a frozen base are trained on, and how; model is the base's config.

    adapts: "camera" or "memory". base: the base's weights. adapter: the fields of ``AdapterConfig`` but base.
    """

    adapts: str = "camera"
    base: str = "tiny"
    adapter: tuple[tuple[str, int], ...] = ()


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
    # Adapters of a frozen tiny: it follows a camera, and it remembers what left the picture.
    "camera": AdapterRecipe(
        _TINY,
        adapts="camera",
        adapter=(("camera_layers", 3),),
        batch=64,
        learning_rate=5e-4,
        masks=(("full()", 1.0),),
        tasks=(0.6, 0.2, 0.05, 0.05, 0.05, 0.05),
    ),
    "memory": AdapterRecipe(
        _TINY,
        adapts="memory",
        adapter=(("memory_tokens", 16), ("memory_width", 192)),
        batch=64,
        learning_rate=5e-4,
        # What comes back, and whether anything does, is decided at the first, noisiest levels.
        level_mean=1.8,
        caption_dropout=1.0,
        masks=(("full()", 1.0),),
        tasks=(0, 0, 0, 0, 0, 1),
    ),
    # Patches as large as the published cubes: 64 tokens a clip, each of more numbers than the model is wide.
    "cubes": Recipe(
        dataclasses.replace(_TINY, heads=8, ffn_dim=2048, text_dim=512, patch=(4, 16, 16)),
        batch=128,
        learning_rate=6e-4,
        masks=(("full()", 0.7), ("window(3, 3, 3)", 0.3)),
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
