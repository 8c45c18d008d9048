"""Train a video DiT on the synthetic world: ``python -m stattn.train --preset tiny --minutes 8.5 --out runs/tiny``.

A run lasts for a number of minutes or of steps, and the learning rate falls to 0 exactly then. Its folder holds
log.jsonl, samples/, checkpoint.pt, from which ``--resume`` continues, checkpoint.safetensors, the averaged weights so
far, and at the end NAME.safetensors, the averaged weights in fp16, and NAME.json, the record of the run with its
evaluation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stattn import checks, dit, masks, media, results, world
from stattn.accelerate import accelerate
from stattn.dit import DiT
from stattn.masks import Mask
from stattn.metrics import synth
from stattn.sampler import FlowMatching, sample
from stattn.trainer import PARALLEL, PRESETS, AdapterRecipe, Recipe, Trainer, materialize_attention

EVALUATION_SEED, PICTURE_SEED = 1_000_000, 2_000_000
# Guidance of 2 makes motion jump (flicker 1.3 to 1.5 times that of real clips), 1 blurs it (0.8).
GUIDANCE, SHIFT = 1.5, 1.0


@torch.no_grad()
def evaluate(
    model: DiT,
    n: int = 128,
    *,
    mask: Mask | None = None,
    steps: int = 30,
    guidance: float = GUIDANCE,
    shift: float = SHIFT,
    size: tuple[int, int, int] = (16, 64, 64),
    seed: int = EVALUATION_SEED,
    batch: int = 128,
    impl: str | Mapping[str, str] = "auto",
) -> dict[str, float]:
    """Sample ``n`` captions of the world and compare what is seen with what was asked.

    mask: of every attention, None for the model's own. steps, guidance, shift: of the sampling. size: frames, height,
    width. seed: of the captions, of the real clips beside them, and of the noise. batch: clips sampled at once. impl:
    of the sampler's step. Returns "colour", "shape", "both", "direction": shares of the clips whose main object is, and
    sets out, as asked;
    "flicker_ratio": mean flicker over that of the real clips of the same captions.
    """
    generated, real = [], []
    for start in range(0, n, batch):
        clips = world.render(min(batch, n - start), *size, seed=seed + start, device=next(model.parameters()).device)
        real.append(clips)
        generated.append(_sample(model, clips.scene, mask, FlowMatching(steps, shift), guidance, seed + start, impl))
    video = torch.cat(generated)
    colours, shapes = (torch.cat([getattr(clips, name) for clips in real]) for name in ("colours", "shapes"))
    flicker = checks.flicker_ratio(video, torch.cat([clips.video for clips in real]))
    directions = torch.cat([clips.directions for clips in real])
    moved = (checks.classify(video).directions == directions).float().mean().item()
    return {**checks.agreement(video, colours, shapes), "direction": moved, "flicker_ratio": flicker}


def evaluate_masks(model: DiT, recipe: Recipe, clips: int) -> dict[str, Any]:
    """Evaluate a model under each of a recipe's masks, 0 clips for none; returns settings and results by mask."""
    found = {
        key: evaluate(model, clips, mask=masks.parse(key), size=_size(recipe), impl="reference")
        for key, _ in (recipe.masks if clips else ())
    }
    return {"clips": clips, "guidance": GUIDANCE, "shift": SHIFT, "masks": found}


def _sample(
    model: DiT,
    scene: world.Scene,
    mask: Mask | None,
    schedule: FlowMatching,
    guidance: float,
    seed: int,
    impl: str | Mapping[str, str],
) -> Tensor:
    ids, valid = scene.tokens(model.config.text_len)
    shape = (scene.batch, 3, scene.frames, scene.height, scene.width)
    return sample(
        model, shape, text=ids, text_valid=valid, steps=schedule, guidance=guidance, mask=mask, seed=seed, impl=impl
    )


@dataclass(frozen=True)
class Kind:
    """What a kind of training run does in its own way.

    picture(model, recipe) gives clips [B, 3, T, H, W] and a caption for each; evaluate(model, recipe, clips) gives
    numbers for the record.
    """

    trainer: type[Trainer]
    picture: Callable[[nn.Module, Any], tuple[Tensor, list[str]]]
    evaluate: Callable[[nn.Module, Any, int], dict[str, Any]]


def _picture(model: nn.Module, recipe: Recipe, clips: int = 6) -> tuple[Tensor, list[str]]:
    device = next(model.parameters()).device
    scene = world.sample(clips, *_size(recipe), seed=PICTURE_SEED, device=device)
    schedule = FlowMatching(20, SHIFT)
    video = _sample(cast(DiT, model), scene, None, schedule, GUIDANCE, PICTURE_SEED, "reference")
    return video, scene.captions()


VIDEO = Kind(Trainer, _picture, lambda model, recipe, clips: evaluate_masks(cast(DiT, model), recipe, clips))


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
            torch.save(state | {"recipe": _plain(trainer.recipe)}, self.out / "checkpoint.new")
            os.replace(self.out / "checkpoint.new", self.out / "checkpoint.pt")
            trainer.write(average, self.out / "checkpoint.safetensors", steps=trainer.steps)

    def resume(self) -> None:
        """Continue from the checkpoint. Raises ValueError when there is none, or when it is of another recipe."""
        path = self.out / "checkpoint.pt"
        if not path.is_file():
            raise ValueError(f"out={str(self.out)!r} holds no checkpoint.pt to resume from")
        state = torch.load(path, map_location=self.trainer.device, weights_only=True)
        ours = _plain(self.trainer.recipe)
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
            "recipe": _plain(recipe),
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


def train(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    name: str = "model",
    minutes: float | None = None,
    steps: int | None = None,
    device: torch.device | str | None = None,
    compile: bool | None = None,
    resume: bool = False,
    log_every: int = 50,
    sample_every: float = 60.0,
    checkpoint_every: float = 120.0,
    clips: int = 128,
    quiet: bool = False,
    command: str | None = None,
    parallel: str = "ddp",
    start: str | None = None,
) -> dict[str, Any]:
    """Train until ``minutes`` or ``steps`` are over, whichever comes first, evaluate, and write everything to ``out``;
    returns the record of the run.

    name: of the final files. device: by default CUDA where there is one. compile: compile the loss, by default on CUDA.
    resume: continue from the checkpoint in ``out``. log_every: steps; the only times at which the loop waits for the
    device. sample_every, checkpoint_every: seconds. clips: to evaluate, under each of the recipe's masks; 0 skips it.
    parallel: how the processes of a group started by ``torchrun`` share the work, "ddp" or "fsdp"; each calls this, and
    the first writes. start: weights to begin from, a shipped model's name or a .safetensors file. Ctrl-C finishes the
    step, writes the checkpoint and raises KeyboardInterrupt. Raises ValueError without minutes and
    steps, for an ``out`` whose run would be overwritten, and for a checkpoint of another recipe; FloatingPointError
    when the loss is not finite.
    """
    if minutes is None and steps is None:
        raise ValueError(f"minutes={minutes} and steps={steps}: give at least one of them")
    for argument, value in (("minutes", minutes), ("steps", steps), ("log_every", log_every)):
        if value is not None and value <= 0:
            raise ValueError(f"{argument}={value} must be positive")
    folder = Path(out)
    if not resume and (folder / "checkpoint.pt").exists():
        raise ValueError(
            f"out={str(folder)!r} holds the checkpoint of another run: resume it, or choose another folder"
        )
    kind = kinds(recipe)
    with _group(device) as where:
        folder.mkdir(parents=True, exist_ok=True)
        fast = where.type == "cuda" if compile is None else compile
        trainer = kind.trainer(recipe, where, compile=fast, parallel=parallel, start=start)
        run = Run(trainer, kind, folder, minutes=minutes, steps=steps)
        if resume:
            run.resume()
        elif run.lead:
            (folder / "log.jsonl").write_text("", encoding="utf-8")
        precision = torch.get_float32_matmul_precision()
        # TF32 for the patch embedding, the only product that autocast leaves in fp32
        torch.set_float32_matmul_precision("high")
        try:
            _loop(run, log_every, sample_every, checkpoint_every, quiet)
        finally:
            torch.set_float32_matmul_precision(precision)
        run.picture()
        return run.finish(name, clips, {"name": name, "command": command, "seed": recipe.seed})


def kinds(recipe: Recipe) -> Kind:
    """Choose the kind of run for a recipe."""
    if isinstance(recipe, AdapterRecipe):
        from stattn.video import train_adapters

        return train_adapters.kind(recipe)
    return VIDEO


def _loop(run: Run, log_every: int, sample_every: float, checkpoint_every: float, quiet: bool) -> None:
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
def _group(device: torch.device | str | None) -> Iterator[torch.device]:
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``stattn train`` to a parser."""
    parser.add_argument(
        "--preset", choices=sorted([*PRESETS, *synth.PRESETS]), default="tiny", help="what is trained (default: tiny)"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder of the run (default: runs/PRESET)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=None,
        help="length of the run (default: 8.5, of extractors 1, unless --steps is given)",
    )
    parser.add_argument("--steps", type=int, default=None, help="length of the run in steps")
    parser.add_argument("--device", default=None, help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile the loss (default: on cuda)",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--batch", type=int, default=None, help="clips a step (default: the preset's)")
    parser.add_argument("--learning-rate", type=float, default=None, help="peak learning rate (default: the preset's)")
    parser.add_argument("--seed", type=int, default=None, help="of weights and clips (default: 0)")
    parser.add_argument(
        "--data", default=None, metavar="DIR", help="a folder of video files with captions in .txt (default: the world)"
    )
    parser.add_argument("--start", default=None, metavar="WEIGHTS", help="weights to begin from (default: random)")
    parser.add_argument(
        "--parallel", choices=PARALLEL, default="ddp", help="how processes under torchrun share the work (default: ddp)"
    )
    parser.add_argument("--log-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--sample-every", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--checkpoint-every", type=float, default=120.0, metavar="SECONDS")
    parser.add_argument(
        "--clips", type=int, default=128, help="clips to evaluate at the end under each mask, 0 for none (default: 128)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--evaluate",
        default=None,
        metavar="WEIGHTS",
        help="train nothing: evaluate weights, a shipped model's name or a file, and write evaluation.json to --out",
    )


def main(args: argparse.Namespace) -> int:
    """Run ``stattn train`` with the options of ``add_arguments``; returns the exit code, 130 after Ctrl-C."""
    if args.preset in synth.PRESETS:
        return _train_extractor(args)
    if args.evaluate is not None:
        return _evaluate_weights(args)
    given = {name: getattr(args, name) for name in ("batch", "learning_rate", "seed", "data")}
    recipe = dataclasses.replace(
        PRESETS[args.preset], **{name: value for name, value in given.items() if value is not None}
    )
    try:
        record = train(
            recipe,
            args.out if args.out is not None else Path("runs") / args.preset,
            name=args.preset,
            minutes=8.5 if args.minutes is None and args.steps is None else args.minutes,
            steps=args.steps,
            device=args.device,
            compile=args.compile,
            resume=args.resume,
            log_every=args.log_every,
            sample_every=args.sample_every,
            checkpoint_every=args.checkpoint_every,
            clips=args.clips,
            quiet=args.quiet,
            command=_command(args),
            parallel=args.parallel,
            start=args.start,
        )
    except KeyboardInterrupt as stopped:
        print(stopped, file=sys.stderr)
        return 130
    if record:
        found = record["evaluation"]
        print(
            json.dumps({"steps": record["steps"], "minutes": record["minutes"], **found.get("masks", found)}, indent=2)
        )
    return 0


def _train_extractor(args: argparse.Namespace) -> int:
    given = {name: getattr(args, name) for name in ("batch", "learning_rate", "seed")}
    recipe = dataclasses.replace(
        synth.PRESETS[args.preset], **{name: value for name, value in given.items() if value is not None}
    )
    record = synth.train(
        recipe,
        args.out if args.out is not None else Path("runs") / args.preset,
        minutes=1.0 if args.minutes is None and args.steps is None else args.minutes,
        steps=args.steps,
        device=args.device,
        log_every=args.log_every,
        command=_command(args),
        quiet=args.quiet,
    )
    print(json.dumps(record["held_out"]))
    return 0


def _evaluate_weights(args: argparse.Namespace) -> int:
    """Evaluate ready weights as a run evaluates its own, and write evaluation.json."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    recipe = PRESETS[args.preset]
    model: nn.Module
    if isinstance(recipe, AdapterRecipe):
        from stattn.video import adapted

        model = adapted.load(args.evaluate, device=device)
    else:
        model = dit.load(args.evaluate, dtype=torch.float32, device=device).eval()
    accelerate(model, impl="reference")
    record = {
        "command": _command(args),
        "weights": args.evaluate,
        "versions": results.versions(),
        "machine": results.machine(device),
        "evaluation": kinds(recipe).evaluate(materialize_attention(model), recipe, args.clips),
    }
    out = args.out if args.out is not None else Path("runs") / args.preset
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    found: Any = record["evaluation"]
    print(json.dumps(found.get("masks", found), indent=2))
    return 0


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


def _size(recipe: Recipe) -> tuple[int, int, int]:
    return recipe.frames, recipe.height, recipe.width


def _plain(recipe: Recipe) -> dict[str, Any]:
    """Give a recipe as JSON holds it, so that one read back compares equal."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return plain


def _command(args: argparse.Namespace) -> str:
    """Give a command that starts the same run: the options that are not the defaults."""
    words = ["python", "-m", "stattn.train", "--preset", args.preset]
    for name, default in vars(_parse([])).items():
        value, option = getattr(args, name), "--" + name.replace("_", "-")
        if name in ("preset", "resume") or value == default:
            continue
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [option, str(value)]
    return shlex.join(words)


def _parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stattn.train", description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(_parse()))
