"""What `stattn demo` times: the sampler's step with the demo's model, and two layers of a published shape.

A contender is a mask and an implementation of attention. Its output is compared with the mask's definition in higher
precision first; what differs is reported, not timed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stattn import masks, results
from stattn.accelerate import accelerate
from stattn.dit import CONFIGS, DiT
from stattn.grid import Grid
from stattn.masks import Mask
from stattn.model.settings import STEMS
from stattn.ops._attention_choice import OPERATION
from stattn.ops.attention import attention
from stattn.reports.demo_page import STEP
from stattn.results import Result
from stattn.sampler import draw_noise, sample

# Largest RMS error relative to the exact output. A step is 6 layers of bf16 rounding, each about 2^-9.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
WAN, WAN_GRID = "wan2.1-1.3b", (21, 30, 52)  # 81 frames of 480 x 832
# Both allow about a tenth of all pairs.
WAN_MASKS = (masks.full(), masks.sliding_tile((3, 6, 4), (3, 3, 5)), masks.window(9, 17, 21))


def implementations() -> list[str]:
    """List the names of attention's implementations, the preferred one first."""
    return [each.name for each in OPERATION.implementations]


def serving(try_it: Callable[[str], object]) -> tuple[list[str], dict[str, str]]:
    """Return the implementations of attention under which a call works, and the reasons of those that refuse it.

    try_it: makes the call under one implementation, and raises ValueError where that refuses it.
    """
    names, reasons = [], {}
    for name in implementations():
        if name == "triton" and not torch.cuda.is_available():
            reasons[name] = "runs on CUDA; on a CPU it is interpreted, for tests"
            continue
        try:
            try_it(name)
        except ValueError as error:
            reasons[name] = str(error)
        except torch.OutOfMemoryError:
            reasons[name] = "ran out of memory"
        else:
            names.append(name)
    return names, reasons


def around_attention(try_it: Callable[[dict[str, str]], object]) -> tuple[dict[str, str], list[str]]:
    """Choose for every operation but attention: "auto" where something serves it, else the reference, with the reason.

    try_it: makes a call under a mapping from stem to implementation, and raises ValueError where one refuses it.
    """
    reference = {"attention": "reference", "*": "reference"}
    try:
        try_it(reference | {"*": "auto"})
    except ValueError:
        pass
    else:
        return {"*": "auto"}, []
    chosen, reasons = {}, []
    for stem in STEMS:
        if stem == "attention":
            continue
        try:
            try_it(reference | {stem: "auto"})
        except ValueError as error:
            chosen[stem] = "reference"
            reasons.append(f"{stem} runs as its reference: {error}")
        else:
            chosen[stem] = "auto"
    return chosen, reasons


class Timings:
    """Collect results and notes, group by group."""

    def __init__(self, *, rounds: int, budget: float, tick: Callable[[str], object]):
        self.rounds, self.budget, self.tick = rounds, budget, tick
        self.results: list[Result] = []
        self.notes: list[str] = []
        self.wrong: list[str] = []

    def steps(
        self,
        model: DiT,
        shape: tuple[int, ...],
        ids: Tensor,
        valid: Tensor,
        guidance: float,
        wanted: Sequence[Mask],
        rest: dict[str, str],
    ) -> None:
        """Time one sampler step of the model under each mask and implementation, guidance included.

        rest: the implementations of all operations but attention.
        """
        device, dtype = ids.device, next(model.parameters()).dtype
        noise = draw_noise(shape, seed=0).to(device)
        options: dict[str, Any] = {"steps": 1, "guidance": guidance, "impl": rest}

        def step(each: nn.Module, mask: Mask) -> Tensor:
            return sample(each, shape, text=ids, text_valid=valid, noise=noise, mask=mask, **options)

        def exact(mask: Mask) -> Tensor:
            double = copy.deepcopy(model).double()
            accelerate(double, impl="reference")
            one = (1, *shape[1:])
            return sample(double, one, text=ids[:1], text_valid=valid[:1], noise=noise[:1], mask=mask, **options)

        contenders: dict[str, Callable[[], Any]] = {}
        for mask in wanted:
            trials: dict[str, nn.Module] = {}
            outputs: dict[str, Tensor] = {}

            def attempt(name: str, mask: Mask = mask, trials: Any = trials, outputs: Any = outputs) -> None:
                self.tick(f"checking {mask.key}, {name}")
                trials[name] = copy.deepcopy(model)
                accelerate(trials[name], impl={"attention": name, **rest})
                outputs[name] = step(trials[name], mask)[:1]

            names, reasons = serving(attempt)
            truth = exact(mask)
            for name in names:
                if self._right(f"{mask.key}, {name}", _error(outputs[name], truth), TOLERANCE[dtype]):
                    contenders[f"{mask.key}, {name}"] = partial(step, trials[name], mask)
            self._refused("the sampler's step", mask, reasons)
        self._time(f"{STEP} of {shape[0]} clips", contenders, device)

    def layers(self, device: torch.device, wanted: Sequence[Mask] = WAN_MASKS, count: int = 2) -> None:
        """Time a forward pass of `count` layers of the Wan 1.3B shape in bf16, 480p, random weights."""
        config = CONFIGS[WAN]
        torch.manual_seed(0)
        with torch.device(device):
            model = DiT(config, layers=count).to(torch.bfloat16).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # zeros would switch fewer transistors, and so time another clock
                if not parameter.any():
                    parameter.normal_(0, 0.02)
        generator = torch.Generator(device).manual_seed(0)
        size = [n * p for n, p in zip(WAN_GRID, config.patch, strict=True)]
        x = torch.randn(1, config.in_channels, *size, device=device, dtype=torch.bfloat16, generator=generator)
        text = torch.randn(
            1, config.text_len, config.text_dim, device=device, dtype=torch.bfloat16, generator=generator
        )
        level = torch.full((1,), 500.0, device=device)

        @torch.no_grad()
        def forward(each: nn.Module, mask: Mask) -> Tensor:
            return each(x, level, text, mask=mask)

        def trial_of(impl: dict[str, str]) -> nn.Module:
            trial = copy.deepcopy(model)
            accelerate(trial, impl=impl)
            return trial

        rest, reasons_around = around_attention(lambda impl: forward(trial_of(impl), masks.spatial()))
        self.notes += [f"two Wan layers: {reason}" for reason in reasons_around]
        contenders: dict[str, Callable[[], Any]] = {}
        for mask in wanted:
            errors: dict[str, float] = {}

            def attempt(name: str, mask: Mask = mask, errors: dict[str, float] = errors) -> None:
                self.tick(f"checking {mask.key}, {name}")
                errors[name] = check_rows(mask, name, WAN_GRID, device)

            names, reasons = serving(attempt)
            truth = None
            for name in reversed(names):  # the reference is the last
                trial = trial_of({"attention": name, **rest})
                try:
                    output = forward(trial, mask)
                except torch.OutOfMemoryError:
                    reasons[name] = "ran out of memory"
                    continue
                truth = output if truth is None else truth
                error = max(errors[name], _error(output, truth))
                if self._right(f"{mask.key}, {name}", error, TOLERANCE[torch.bfloat16]):
                    contenders[f"{mask.key}, {name}"] = partial(forward, trial, mask)
            self._refused("two Wan layers", mask, reasons)
        grid = "x".join(map(str, WAN_GRID))
        self._time(f"Forward pass of {count} layers of the Wan 1.3B shape, {grid} tokens, bf16", contenders, device)

    def _right(self, label: str, error: float, tolerance: float) -> bool:
        if error <= tolerance:  # false for NaN too
            return True
        self.wrong.append(f"{label}: the output is wrong (error {error:.2e}, at most {tolerance:.0e} is rounding)")
        return False

    def _refused(self, what: str, mask: Mask, reasons: dict[str, str]) -> None:
        for name, reason in reasons.items():
            self.notes.append(f"{what} under {mask.key}, not timed with {name}: {reason}")

    def _time(self, group: str, contenders: dict[str, Callable[[], Any]], device: torch.device) -> None:
        if not contenders:
            return
        self.tick(f"timing {len(contenders)} contenders")
        timings = results.time_contenders(contenders, device=device, rounds=self.rounds, warmup=1, budget=self.budget)
        dense = [name for name in timings if name.startswith("full()")]
        base = min(dense or timings, key=lambda name: timings[name].median)
        for name, timing in timings.items():
            baseline = None if name == base else (base, timings[base])
            self.results.append(Result.of(f"{group}: {name}", timing, baseline=baseline, checked=True))


def check_rows(mask: Mask, impl: str, grid: tuple[int, int, int], device: torch.device, rows: int = 64) -> float:
    """Return the error of attention in bf16 on a grid: 64 rows and the first and last, against the mask written out.

    The error is the relative RMS of the output, or infinite when the number of keys that a row sees, read from the LSE
    of equal scores, is not the mask's: random values cannot see one key of thousands. Raises what the implementation
    raises.
    """
    heads, dim, tokens = 2, 128, math.prod(grid)
    generator = torch.Generator(device).manual_seed(1)
    q, k, v = torch.randn(
        3, 1, tokens, heads, dim, device=device, dtype=torch.bfloat16, generator=generator
    ).unbind(0)  # fmt: skip
    chosen = torch.randperm(tokens, generator=torch.Generator().manual_seed(2))[:rows]
    chosen = torch.cat((chosen, torch.tensor([0, tokens - 1])))
    allowed = mask.allowed(Grid(*grid), chosen).to(device)  # [rows, tokens]
    out = attention(q, k, v, grid, mask, impl=impl)
    scores = torch.einsum("nhd,mhd->hnm", q[0, chosen].float(), k[0].float()) / dim**0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    wanted = torch.einsum("hnm,mhd->nhd", weights, v[0].float())
    assert isinstance(out, Tensor)
    _, lse = attention(torch.zeros_like(q), k, v, grid, mask, return_lse=True, impl=impl)
    counts = lse[0][:, chosen].exp()
    if not bool(((counts - allowed.sum(1)).abs() < 0.5).all()):
        return math.inf
    return _error(out[0, chosen], wanted)


def _error(output: Tensor, exact: Tensor) -> float:
    """Return the RMS of output - exact relative to that of exact; 0 where both are 0."""
    difference = (output.double() - exact.double()).square().mean().sqrt()
    size = exact.double().square().mean().sqrt()
    return 0.0 if difference == 0 else (difference / size).item()
