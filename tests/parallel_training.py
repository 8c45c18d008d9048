"""What test_train_parallel.py runs in two processes, under torchrun: `parallel_training.py FOLDER DEVICE`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from stattn import train
from stattn.recipes import PRESETS
from stattn.trainer import Trainer, learning_rate
from stattn.training import run

SMOKE = PRESETS["smoke"]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.averaged_model().state_dict().items()}


def both_are_one_process_with_both_shares(device: torch.device) -> None:
    """Two steps in two processes are two steps of one process that takes the mean of both losses."""
    found = {}
    for parallel in ("ddp", "fsdp"):
        trainer = Trainer(SMOKE, device, parallel=parallel)
        assert (trainer.rank, trainer.ranks) == (dist.get_rank(), 2)
        for _ in range(2):
            trainer.step(0.1)
        whole = weights(trainer)
        if parallel == "ddp" or trainer.rank == 0:
            found[parallel] = whole
    alone = Trainer(SMOKE, device)
    for _ in range(2):
        for alone.rank in range(2):
            with torch.autocast(device.type, torch.bfloat16, enabled=alone.autocast):
                loss = alone.loss(alone.model, *alone.batch(), SMOKE.least_level)
            (loss / 2).backward()
        alone.update(learning_rate(SMOKE, alone.steps, 0.1))
    # A step is as long for a gradient that is all rounding: in bf16 those of a few weights point elsewhere.
    atol, rest = (2e-6, 0.0) if device.type == "cpu" else (1e-5, 0.02)
    for name, expected in weights(alone).items():
        for parallel, tensors in found.items():
            apart = (tensors[name] - expected).abs() > atol + 1e-5 * expected.abs()
            assert apart.float().mean() <= rest, f"{parallel} {name}: {apart.float().mean():.2%} apart"


def a_run_resumes(out: Path, device: torch.device) -> None:
    """A run of four steps, stopped after two, ends where one that was not stopped ends."""
    options = {"name": "smoke", "device": device, "quiet": True, "log_every": 2, "clips": 0, "parallel": "fsdp"}
    options |= {"compile": False}
    step = train.Run.step

    def stop_after_two(run: train.Run, progress: float) -> None:
        step(run, progress)
        if run.trainer.steps == 2 and run.lead:
            signal.raise_signal(signal.SIGINT)

    train.Run.step = stop_after_two
    try:
        train.train(SMOKE, out / "parts", steps=4, **options)
        raise AssertionError("the run was not stopped")
    except KeyboardInterrupt:
        train.Run.step = step
    train.train(SMOKE, out / "parts", steps=4, resume=True, **options)
    train.train(SMOKE, out / "whole", steps=4, **options)
    if dist.get_rank() == 0:
        parts, whole = (torch.load(out / name / "checkpoint.pt", weights_only=True) for name in ("parts", "whole"))
        for part in ("model", "average"):
            for name, value in whole[part].items():
                if device.type == "cpu":
                    assert torch.equal(parts[part][name], value), (part, name)
                else:  # sums of gradients come in any order
                    assert (parts[part][name] - value).abs().max() < 1e-3, (part, name)
        assert (out / "whole" / "smoke.safetensors").is_file()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with run.group(sys.argv[2]) as here:
        both_are_one_process_with_both_shares(here)
        a_run_resumes(Path(sys.argv[1]), here)
        print(f"process {dist.get_rank()} is done")
