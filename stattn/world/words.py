"""The words of the synthetic world: what a caption may say, and how it becomes token ids.

A caption is "a COLOUR SHAPE [moves DIRECTION] [with a COLOUR SHAPE [and a COLOUR SHAPE]][, camera MOVE]".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stattn.world.constants import constant

COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")  # hue: 60 degrees times the id
SHAPES = ("disc", "square", "triangle")
DIRECTIONS = ("left", "right", "up", "down")
CAMERAS = (
    "static",
    "pans left",
    "pans right",
    "tilts up",
    "tilts down",
    "zooms in",
    "zooms out",
    "dollies in",
    "dollies out",
    "rolls left",
    "rolls right",
    "tracks left",
    "tracks right",
)
CAPTION_LENGTH = 16

_WORDS = ["", "a", "with", "and", "moves", "camera", *COLOURS, *SHAPES, *DIRECTIONS]
VOCABULARY = tuple(dict.fromkeys(_WORDS + [word for camera in CAMERAS for word in camera.split()]))
_ID = {word: index for index, word in enumerate(VOCABULARY)}
_MOVES = tuple(tuple(_ID[word] for word in f"{name} ".split(" ")[:2]) for name in CAMERAS)  # 0 where one word is all


def write(count: Tensor, colours: Tensor, shapes: Tensor, direction: Tensor, move: Tensor) -> list[str]:
    """Write one caption a clip (waits for the device).

    count [B]: objects; colours, shapes [B, K]: their ids; direction [B]: of the first object; move [B]: of the camera.
    """
    captions = []
    for n, colour, shape, way, camera in zip(
        count.tolist(), colours.tolist(), shapes.tolist(), direction.tolist(), move.tolist(), strict=True
    ):
        names = [f"a {COLOURS[c]} {SHAPES[s]}" for c, s in zip(colour[:n], shape[:n], strict=True)]
        others = " with " + " and ".join(names[1:]) if n > 1 else ""
        captions.append(f"{names[0]} moves {DIRECTIONS[way]}{others}, camera {CAMERAS[camera]}")
    return captions


def tokens(
    count: Tensor,
    colours: Tensor,
    shapes: Tensor,
    direction: Tensor,
    move: Tensor,
    length: int = CAPTION_LENGTH,
    *,
    motion: Tensor | None = None,
    others: Tensor | None = None,
    camera: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Give ``tokenize(write(...), length)`` without leaving the device.

    motion, others, camera: [B] booleans, False where that clause of the caption is left out. Returns ids [B, length]
    int64 and counts [B] int64. Raises ValueError if a full caption does not fit.
    """
    if length < CAPTION_LENGTH:
        raise ValueError(f"length={length} must be at least {CAPTION_LENGTH}, the longest caption")
    always = torch.ones_like(count, dtype=torch.bool)
    motion, others, camera = (always if keep is None else keep for keep in (motion, others, camera))
    colours, shapes = colours + _ID[COLOURS[0]], shapes + _ID[SHAPES[0]]
    moves = constant(_MOVES, count.device)[move]
    second, third = others & (count > 1), others & (count > 2)
    slots: list[tuple[Tensor | str, Tensor]] = [("a", always), (colours[:, 0], always), (shapes[:, 0], always)]
    slots += [("moves", motion), (direction + _ID[DIRECTIONS[0]], motion)]
    slots += [("with", second), ("a", second), (colours[:, 1], second), (shapes[:, 1], second)]
    slots += [("and", third), ("a", third), (colours[:, 2], third), (shapes[:, 2], third)]
    slots += [("camera", camera), (moves[:, 0], camera), (moves[:, 1], camera & (moves[:, 1] > 0))]
    ids = torch.stack([torch.full_like(count, _ID[word]) if isinstance(word, str) else word for word, _ in slots], 1)
    keep = torch.stack([kept for _, kept in slots], 1)
    order = torch.argsort(keep, dim=1, descending=True, stable=True)  # words kept move to the front, in order
    ids = torch.where(keep, ids, 0).gather(1, order)
    return torch.nn.functional.pad(ids, (0, length - CAPTION_LENGTH)), keep.sum(1)


def tokenize(
    captions: Sequence[str], length: int = CAPTION_LENGTH, *, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Turn captions into word ids of VOCABULARY. Commas and capitals do not count; "" is the empty caption.

    Returns ids [B, length] int64, 0 beyond the words, and the numbers of words [B] int64. Raises ValueError naming an
    unknown word, or a caption longer than ``length`` words; TypeError for a string in place of a sequence.
    """
    if isinstance(captions, str):
        raise TypeError(f"captions={captions!r} must be a sequence of captions, not one string")
    rows, counts = [], []
    for caption in captions:
        words = caption.lower().replace(",", " ").split()
        unknown = [word for word in words if word not in _ID]
        if unknown:
            known = ", ".join(VOCABULARY[1:])
            raise ValueError(f"unknown word {unknown[0]!r} in caption {caption!r}; the words are {known}")
        if len(words) > length:
            raise ValueError(f"caption {caption!r} has {len(words)} words, more than length={length}")
        rows.append([_ID[word] for word in words] + [0] * (length - len(words)))
        counts.append(len(words))
    ids = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length)
    return ids.to(device), torch.tensor(counts, dtype=torch.int64).to(device)
