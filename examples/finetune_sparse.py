"""Fine-tune the shipped video model from dense attention to windows, and measure what sparsity costs afterwards.

    python examples/finetune_sparse.py --steps 150 --out finetune.json

Each run starts from the trained weights, sets the mask by ``stattn.accelerate``, and trains through stattn's attention;
runs with one seed see the same clips in the same order. The script reports the loss on clips that no run has seen,
under the run's own mask: with the shipped weights, and after training (mean and standard deviation over seeds).
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stattn
from stattn import dit, masks, results
from stattn.recipes import PRESETS
from stattn.trainer import Trainer

# All, about one half and 15 % of the pairs of 8 x 8 x 8 tokens. Among windows of their density these cost the shipped
# weights little: they see many frames, which show motion, and shapes are small.
MASKS = ("full()", "window(8, 5, 6)", "window(5, 4, 4)")
HELD_OUT = 1_000_000  # the first of the steps whose clips are kept for the end


def loss_of(model: dit.DiT, batch: tuple[Tensor, ...]) -> Tensor:
    """Velocity loss of flow matching over the region to be generated, as the model was trained with."""
    clean, noise, level, generated, ids, valid, _ = batch
    s = level[:, None, None, None, None]
    known = ~generated
    inputs = {"known": clean * known, "known_mask": known.to(clean.dtype)}
    with torch.autocast(clean.device.type, torch.bfloat16, enabled=clean.is_cuda):
        predicted = model((1 - s) * clean + s * noise, 1000 * level, ids, valid, **inputs)
    error = (predicted.float() - clean) / s.clamp(min=0.05) * generated
    return error.square().sum() / (3 * generated.sum()).clamp(min=1)


@torch.no_grad()
def held_out(model: dit.DiT, clips: Trainer, batches: int) -> float:
    """Mean loss on clips kept for the end."""
    total = 0.0
    for number in range(batches):
        clips.steps = HELD_OUT + number
        total += float(loss_of(model, clips.batch()))
    return total / batches


def run(mask: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train once. Returns the losses on the kept clips before and after."""
    device = torch.device(args.device)
    clips = Trainer(replace(PRESETS["tiny"], batch=args.batch, seed=seed, masks=((mask, 1.0),)), device)
    test = Trainer(replace(PRESETS["tiny"], batch=args.batch, masks=((mask, 1.0),)), device)
    model = dit.load("tiny", dtype=torch.float32, device=device)
    stattn.accelerate(model, masks.parse(mask))
    before = held_out(model, test, args.held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1, (step + 1) / 10) * (1 - step / args.steps)
        clips.steps = step
        loss_of(model, clips.batch()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"mask": mask, "seed": seed, "before": before, "after": held_out(model, test, args.held_out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="0: the shipped weights alone")
    parser.add_argument("--masks", nargs="+", default=MASKS, metavar="MASK")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=8, help="batches of clips kept for the end")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    grid = (8, 8, 8)
    settings = {name: str(value) for name, value in vars(args).items() if name != "out"}
    runs: list[dict[str, Any]] = []
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "settings": settings,
        "machine": results.machine(args.device),
        "versions": results.versions(),
        "density": {mask: masks.parse(mask).density(grid) for mask in args.masks},
        "runs": runs,
    }
    for mask in args.masks:
        for seed in range(1, args.seeds + 1):
            runs.append(run(mask, seed, args))
            if args.out:  # after each run, so that an interrupted one keeps them
                args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        after = [each["after"] for each in runs if each["mask"] == mask]
        spread = statistics.stdev(after) if len(after) > 1 else 0.0
        share = masks.parse(mask).density(grid)
        shipped = runs[-1]["before"]
        print(f"{mask:16} {share:6.1%}  as shipped {shipped:.4f}  after {statistics.mean(after):.4f} +- {spread:.4f}")


if __name__ == "__main__":
    main()
