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
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stattn import dit, masks, results, world
from stattn.accelerate import accelerate
from stattn.dit import DiT
from stattn.masks import Mask
from stattn.metrics import checks, synth
from stattn.recipes import PRESETS, AdapterRecipe, Recipe
from stattn.sampler import FlowMatching, sample
from stattn.trainer import PARALLEL, Trainer, materialize_attention
from stattn.training.run import Kind, Run, group, loop

EVALUATION_SEED, PICTURE_SEED = 1_000_000, 2_000_000
# Guidance of 2 makes motion jump (flicker 1.3 to 1.5 times that of real clips), 1 blurs it (0.8).
GUIDANCE, SHIFT = 1.4, 1.0


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
    """Evaluate a model under each of a recipe's masks; 0 clips evaluate nothing.

    Returns the settings, the results by mask, and for comparison what the same checks give for real clips with their
    own captions and with those of other clips. For flicker the latter are other real clips, and the clips with their
    frames shuffled.
    """
    found = {
        key: evaluate(model, clips, mask=masks.parse(key), size=_size(recipe), impl="reference")
        for key, _ in (recipe.masks if clips else ())
    }
    settings = {"clips": clips, "guidance": GUIDANCE, "shift": SHIFT, "masks": found}
    if not clips:
        return settings
    device = next(model.parameters()).device
    real, others = (world.render(clips, *_size(recipe), seed=EVALUATION_SEED + i, device=device) for i in (0, 1))
    mixed = real.video[:, :, torch.randperm(recipe.frames, generator=torch.Generator().manual_seed(0)).to(device)]
    return {
        **settings,
        "real": {**_asked(real.video, real), "flicker_ratio": checks.flicker_ratio(others.video, real.video)},
        "shuffled": {
            **_asked(real.video.roll(1, 0), real),
            "flicker_ratio": checks.flicker_ratio(mixed, real.video),
        },
    }


def _asked(video: Tensor, clips: world.Clips) -> dict[str, float]:
    """Give the shares of a video's clips whose main object is, and sets out, as in other clips."""
    moved = (checks.classify(video).directions == clips.directions).float().mean().item()
    return {**checks.agreement(video, clips.colours, clips.shapes), "direction": moved}


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


def _picture(model: nn.Module, recipe: Recipe, clips: int = 6) -> tuple[Tensor, list[str]]:
    device = next(model.parameters()).device
    scene = world.sample(clips, *_size(recipe), seed=PICTURE_SEED, device=device)
    schedule = FlowMatching(20, SHIFT)
    video = _sample(cast(DiT, model), scene, None, schedule, GUIDANCE, PICTURE_SEED, "reference")
    return video, scene.captions()


VIDEO = Kind(Trainer, _picture, lambda model, recipe, clips: evaluate_masks(cast(DiT, model), recipe, clips))


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
    """Train a recipe, evaluate the model, and write everything to the folder ``out``; returns the record of the run.

    minutes, steps: the run ends at whichever comes first. name: of the final files. device: by default CUDA where there
    is one. compile: compile the loss; by default on CUDA, but never for adapters, since PyTorch 2.11 gives wrong
    gradients beside a frozen base, from the second step on. resume: continue from the checkpoint in ``out``. log_every:
    in steps; only then the loop waits for the device. sample_every, checkpoint_every: in seconds. clips: the number to
    evaluate under each of the recipe's masks; 0 skips it. parallel: how the processes of a group started by
    ``torchrun`` share the work, "ddp" or "fsdp"; each process calls this function, and the first writes. start: weights
    to begin from, a shipped model's name or a .safetensors file.

    Ctrl-C finishes the step, writes the checkpoint and raises KeyboardInterrupt. Raises ValueError when neither minutes
    nor steps is given, for an ``out`` whose run would be overwritten, for adapters that are to be compiled, and for a
    checkpoint of another recipe; FloatingPointError when the loss is not finite.
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
    adapts = isinstance(recipe, AdapterRecipe)
    if compile and adapts:
        raise ValueError(f"compile={compile}: adapters of a frozen base are trained without")
    kind = kinds(recipe)
    with group(device) as where:
        folder.mkdir(parents=True, exist_ok=True)
        fast = where.type == "cuda" and not adapts if compile is None else compile
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
            loop(run, log_every, sample_every, checkpoint_every, quiet)
        finally:
            torch.set_float32_matmul_precision(precision)
        run.picture()
        return run.finish(name, clips, {"name": name, "command": command, "seed": recipe.seed})


def kinds(recipe: Recipe) -> Kind:
    """Choose the kind of run for a recipe."""
    if isinstance(recipe, AdapterRecipe):
        from stattn.training import adapters

        return adapters.kind(recipe)
    return VIDEO


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
        help="torch.compile the loss (default: on cuda, and never of adapters)",
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


def _size(recipe: Recipe) -> tuple[int, int, int]:
    return recipe.frames, recipe.height, recipe.width


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
