"""`stattn study length`: what a longer video costs, in windows and in one piece.

A video of n windows takes n times the work of one in windows that share their ends, and n^2 times the attention in one
piece: the token counts say it, the measured times show it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stattn import world
from stattn.dit import DiT
from stattn.grid import Grid
from stattn.video import long, media


@torch.no_grad()
def study(
    model: DiT, lengths: Iterable[int], size: tuple[int, int, int] = (16, 64, 64), rounds: int = 3
) -> dict[str, Any]:
    """Time one step of the model on videos of so many windows, in one piece and in windows; medians of ``rounds``."""
    frames, height, width = size
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    ids, valid = world.tokenize(["a red disc moves left, camera static"], model.config.text_len, device=device)
    level = torch.full((1,), 500.0, device=device)
    patch = model.config.patch

    def step(videos: Iterable[torch.Tensor]) -> None:
        for video in videos:
            model(video, level, ids, valid)

    rows = []
    for windows in lengths:
        total = windows * frames
        whole = torch.randn(1, 3, total, height, width, device=device, dtype=dtype)
        parts = whole.split(frames, 2)
        grid = Grid(total // patch[0], height // patch[1], width // patch[2])
        window = Grid(frames // patch[0], height // patch[1], width // patch[2])
        rows.append(
            {
                "windows": windows,
                "frames": total,
                "seconds_windows": _median(partial(step, parts), rounds, device),
                "seconds_one_piece": _median(partial(step, [whole]), rounds, device),
                "flops_windows": windows * model.flops(window),
                "flops_one_piece": model.flops(grid),
            }
        )
    return {"size": list(size), "rows": rows}


def _median(call: Any, rounds: int, device: torch.device) -> float:
    call()
    times = []
    for _ in range(rounds):
        began = clock(device)
        call()
        times.append(clock(device) - began)
    return round(sorted(times)[len(times) // 2], 4)


def clock(device: torch.device) -> float:
    """Tell the time in seconds: on a CPU that of this process alone, whatever else runs there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def exponents(found: dict[str, Any]) -> dict[str, float]:
    """Fit seconds ~ length^p over the longer half of the lengths: {"windows": p, "one_piece": p}."""
    rows = found["rows"][len(found["rows"]) // 2 - 1 :]
    logs = torch.tensor([row["frames"] for row in rows], dtype=torch.float64).log()
    fitted = {}
    for name in ("windows", "one_piece"):
        times = torch.tensor([row[f"seconds_{name}"] for row in rows], dtype=torch.float64).log()
        centred = logs - logs.mean()
        fitted[name] = round(float((centred * (times - times.mean())).sum() / centred.square().sum()), 3)
    return fitted


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw seconds against frames, both axes logarithmic."""
    figure, axis = media.extra("matplotlib.pyplot", "matplotlib").subplots(figsize=(5, 3.5), layout="constrained")
    frames = [row["frames"] for row in found["rows"]]
    for name, label in (("windows", "in windows"), ("one_piece", "in one piece")):
        axis.loglog(frames, [row[f"seconds_{name}"] for row in found["rows"]], "o-", label=label)
    axis.set(xlabel="frames", ylabel="seconds a step")
    axis.legend()
    figure.savefig(path, dpi=120)


def minute(frames_a_window: int) -> int:
    """Count the windows of a minute at ten keyframes."""
    return long.windows(long.KEYFRAMES_A_MINUTE * (frames_a_window - 1) + 1, frames_a_window)
