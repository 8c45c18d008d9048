"""Masked-region tasks: which part of a clip is given, and which is to be generated.

One model learns them all at once, because it reads [x | known | mask]: text to video, image to video, interpolation
between two frames, inpainting behind a moving box, outpainting around one, continuation of a clip's beginning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stattn.world.constants import constant

TASKS = ("text", "image", "interpolation", "inpaint", "outpaint", "continuation")


def draw_tasks(
    batch: int, weights: Sequence[float], *, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw a task for each clip: [batch] int64 into TASKS. weights: one for each task, in proportion.

    The numbers are drawn where the generator lives. Raises ValueError for weights that are not six, not negative, not
    all zero.
    """
    if len(weights) != len(TASKS) or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(
            f"weights={tuple(weights)} must be {len(TASKS)} numbers, none negative and not all zero, for {TASKS}"
        )
    edges = constant(tuple(map(float, weights)), torch.device(device)).cumsum(0)
    uniform = torch.rand(batch, generator=generator, device=generator.device).to(device)
    # A draw that rounds up to the total lands on the last task of positive weight.
    return torch.searchsorted(edges, uniform * edges[-1], right=True).clamp(
        max=max(i for i, w in enumerate(weights) if w > 0)
    )


def generated_region(tasks: Tensor, frames: int, height: int, width: int, *, generator: torch.Generator) -> Tensor:
    """Draw the region that each task leaves to be generated: [B, 1, T, H, W] booleans, on the device of tasks.

    text: everything. image: all but the first frame. interpolation: all but the first and last frame. continuation: all
    after the first 1/8 to 1/2 of the frames, at least one. inpaint: a box of 0.3 to 0.6 of each side that moves in a
    straight line. outpaint: all outside a still box of 0.4 to 0.75 of each side.
    """
    device, batch = tasks.device, len(tasks)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, device=generator.device).to(device)

    inpaint, outpaint = (tasks == TASKS.index(name) for name in ("inpaint", "outpaint"))
    share = torch.where(inpaint[:, None], 0.3 + 0.3 * uniform(2), 0.4 + 0.35 * uniform(2))  # [B, 2] of height, width
    ends = uniform(2, 2) * (1 - share[:, None])  # [B, start or end, 2]: the box's corner
    run = torch.arange(frames, device=device) / max(frames - 1, 1) * inpaint[:, None]  # [B, T]
    corner = torch.lerp(ends[:, None, 0], ends[:, None, 1], run[..., None])  # [B, T, 2]
    sides = []
    for axis, size in enumerate((height, width)):
        place = (torch.arange(size, device=device) + 0.5) / size
        low = corner[:, :, axis, None]
        sides.append((place >= low) & (place < low + share[:, None, axis, None]))  # [B, T, size]
    inside = sides[0][..., None] & sides[1][:, :, None]

    frame = torch.arange(frames, device=device)
    given = ((1 / 8 + 3 / 8 * uniform(1)) * frames).floor().clamp(min=1)
    first, last = frame == 0, frame == frames - 1
    names = {"image": first, "interpolation": first | last, "continuation": frame < given}
    whole = torch.zeros(batch, frames, dtype=torch.bool, device=device)
    for name, known in names.items():
        whole = whole | ((tasks == TASKS.index(name))[:, None] & known)
    region = ~whole[:, :, None, None] & torch.where(
        inpaint[:, None, None, None], inside, ~(inside & outpaint[:, None, None, None])
    )
    return region[:, None]
