"""A training run: the clock, log, pictures and checkpoints around a trainer, in one process or several."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stattn import results
from stattn.recipes import Recipe
from stattn.trainer import Trainer
from stattn.video import media


@dataclass(frozen=True)
class Kind:
    """What a kind of training run does in its own way.

    picture(model, recipe) gives clips [B, 3, T, H, W] and a caption for each; evaluate(model, recipe, clips) gives
    numbers for the record.
    """

    trainer: type[Trainer]
    picture: Callable[[nn.Module, Any], tuple[Tensor, list[str]]]
    evaluate: Callable[[nn.Module, Any, int], dict[str, Any]]


class Run:
    """The clock, log, pictures and checkpoints of a trainer, in a folder, which the first process of a group writes."""

    def __init__(self, trainer: Trainer, kind: Kind, out: Path, *, minutes: float | None, steps: int | None):
        self.trainer, self.kind, self.out, self.minutes, self.limit = trainer, kind, out, minutes, steps
        self.lead = trainer.rank == 0
        self.began = time.monotonic()
        self.total = torch.zeros((), device=trainer.device)  # of the losses since the last line of the log
        self.count = 0

    @property
    def seconds(self) -> float:
        """Count the seconds of the run, those before it was resumed included."""
        return time.monotonic() - self.began

    def clock(self, interrupted: bool) -> tuple[float, float, bool]:
        """Say how much of the run is over, by its clock or by its steps, whichever is further; its seconds; and whether
        it is interrupted. The first process decides for all.
        """
        seconds = self.seconds
        spent = seconds / (60 * self.minutes) if self.minutes is not None else 0.0
        progress = max(spent, self.trainer.steps / self.limit if self.limit is not None else 0.0)
        if self.trainer.ranks == 1:
            return progress, seconds, interrupted
        said = torch.tensor([progress, seconds, float(interrupted)], dtype=torch.float64)
        dist.broadcast(said, 0)
        return float(said[0]), float(said[1]), bool(said[2])

    def step(self, progress: float) -> None:
        """Take one step."""
        self.total += self.trainer.step(progress)
        self.count += 1

    def log(self) -> float:
        """Write the mean loss since the last line and return it (waits for the device). Raises FloatingPointError when
        it is not finite.
        """
        if self.trainer.ranks > 1:
            dist.all_reduce(self.total)
            self.total /= self.trainer.ranks
        loss = self.total.item() / max(self.count, 1)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {self.trainer.steps}; checkpoint.pt in {self.out} is from before"
            )
        self.total.zero_()
        self.count = 0
        line = {"step": self.trainer.steps, "seconds": round(self.seconds, 2), "loss": round(loss, 5)}
        if self.lead:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return loss

    def save(self) -> None:
        """Write the checkpoint; a run killed meanwhile keeps the one before."""
        trainer = self.trainer
        state = trainer.state() | {"seconds": self.seconds, "total": self.total.item(), "count": self.count}
        average = trainer.averaged_model()
        if self.lead:
            torch.save(state | {"recipe": plain(trainer.recipe)}, self.out / "checkpoint.new")
            os.replace(self.out / "checkpoint.new", self.out / "checkpoint.pt")
            trainer.write(average, self.out / "checkpoint.safetensors", steps=trainer.steps)

    def resume(self) -> None:
        """Continue from the checkpoint. Raises ValueError when there is none, or when it is of another recipe."""
        path = self.out / "checkpoint.pt"
        if not path.is_file():
            raise ValueError(f"out={str(self.out)!r} holds no checkpoint.pt to resume from")
        state = torch.load(path, map_location=self.trainer.device, weights_only=True)
        ours = plain(self.trainer.recipe)
        changed = [name for name in ours if ours[name] != state["recipe"].get(name)]
        if changed:
            raise ValueError(
                f"out={str(self.out)!r} was trained with another {', '.join(changed)}; resume with the same recipe"
            )
        self.trainer.restore(state)
        self.began = time.monotonic() - state["seconds"]
        self.total.fill_(state["total"])
        self.count = state["count"]
        if not self.lead:
            return
        # What a killed run wrote after its last checkpoint will be written again.
        log = self.out / "log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        log.write_text(
            "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= self.trainer.steps), encoding="utf-8"
        )

    def picture(self) -> None:
        """Write a contact sheet of clips sampled with the averaged weights."""
        model = self.trainer.averaged_model()
        if self.lead:
            video, captions = self.kind.picture(model, self.trainer.recipe)
            media.contact_sheet(self.out / "samples" / f"{self.trainer.steps:06d}.png", video, captions=captions)

    def finish(self, name: str, clips: int, notes: dict[str, Any]) -> dict[str, Any]:
        """Write the averaged weights in fp16, evaluated as written, and the record of the run; returns the record."""
        trainer, recipe = self.trainer, self.trainer.recipe
        model = trainer.averaged_model(torch.float16)
        if not self.lead:
            return {}
        lines = [json.loads(line) for line in (self.out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        record = {
            **notes,
            "recipe": plain(recipe),
            "parameters": sum(parameter.numel() for _, parameter in trainer.trained),
            "versions": results.versions(),
            "machine": results.machine(trainer.device),
            "processes": trainer.ranks,
            "steps": trainer.steps,
            "minutes": round(self.seconds / 60, 2),
            "losses": [[line["step"], line["loss"]] for line in lines[:: max(1, len(lines) // 50)]],
            "evaluation": self.kind.evaluate(model, recipe, clips),
        }
        trainer.write(model, self.out / f"{name}.safetensors", dtype=torch.float16, **record)
        return record


def loop(run: Run, log_every: int, sample_every: float, checkpoint_every: float, quiet: bool) -> None:
    """Take steps until the run is over or interrupted, which raises KeyboardInterrupt after its checkpoint."""
    trainer = run.trainer
    pictured = saved = run.seconds
    with _interrupted() as interrupted, _bar(quiet or not run.lead) as bar:
        while True:
            progress, seconds, stopped = run.clock(interrupted.is_set())
            if progress >= 1 or stopped:
                break
            run.step(progress)
            if trainer.steps % log_every == 0:
                loss = run.log()
                bar.set_postfix(step=trainer.steps, loss=f"{loss:.4f}", refresh=False)
                bar.update(min(100.0, 100 * progress) - bar.n)
            if seconds - pictured >= sample_every:
                run.picture()
                pictured = seconds
            if seconds - saved >= checkpoint_every:
                run.save()
                saved = seconds
    run.save()
    if stopped:
        raise KeyboardInterrupt(f"stopped at step {trainer.steps}; the checkpoint is in {run.out}")
    if run.count:
        run.log()


@contextmanager
def group(device: torch.device | str | None) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; gives this process's device."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device if device is not None else here)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield where
        return
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    # The clock is told on the host, where nothing waits for the device.
    dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
    try:
        yield where
    finally:
        dist.destroy_process_group()


@contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that a step is finished; the second one interrupts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def stop(number: int, frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _bar(quiet: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("training shows its progress with tqdm: pip install stattn[demo]") from error
    return tqdm(total=100, disable=quiet, bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}")


def plain(recipe: Recipe) -> dict[str, Any]:
    """Give a recipe as JSON holds it, so that one read back compares equal."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return plain
