"""What test_train_parallel.py runs in two processes, under torchrun: `parallel_training.py FOLDER`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from stattn import run, train
from stattn.trainer import PRESETS, Trainer, learning_rate

SMOKE, CPU = PRESETS["smoke"], torch.device("cpu")


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.averaged_model().state_dict().items()}


def both_are_one_process_with_both_shares() -> None:
    """Two steps in two processes are two steps of one process that takes the mean of both losses."""
    found = {}
    for parallel in ("ddp", "fsdp"):
        trainer = Trainer(SMOKE, CPU, parallel=parallel)
        assert (trainer.rank, trainer.ranks) == (dist.get_rank(), 2)
        for _ in range(2):
            trainer.step(0.1)
        whole = weights(trainer)
        if parallel == "ddp" or trainer.rank == 0:
            found[parallel] = whole
    alone = Trainer(SMOKE, CPU)
    for _ in range(2):
        for alone.rank in range(2):
            (alone.loss(alone.model, *alone.batch(), SMOKE.least_level) / 2).backward()
        alone.update(learning_rate(SMOKE, alone.steps, 0.1))
    for name, expected in weights(alone).items():
        for parallel, tensors in found.items():
            torch.testing.assert_close(tensors[name], expected, atol=2e-6, rtol=1e-5, msg=f"{parallel} {name}")


def a_run_resumes(out: Path) -> None:
    """A run of four steps, stopped after two, ends where one that was not stopped ends."""
    options = {"name": "smoke", "device": "cpu", "quiet": True, "log_every": 2, "clips": 0, "parallel": "fsdp"}
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
                assert torch.equal(parts[part][name], value), (part, name)
        assert (out / "whole" / "smoke.safetensors").is_file()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with run.group("cpu"):
        both_are_one_process_with_both_shares()
        a_run_resumes(Path(sys.argv[1]))
        print(f"process {dist.get_rank()} is done")
