"""Sampling: noise levels, and the loop that walks a video from noise to data.

A noisy video is x = alpha * x0 + sigma * e, with e standard normal. A schedule lists the levels (alpha, sigma) from
noise to data; a model predicts x0 ("x"), e ("noise") or a velocity ("v") at each; and one step is a linear combination
of x and the predicted x0, whatever the schedule and the kind of prediction:

    x' = (sigma' / sigma) * x + (alpha' - alpha * sigma' / sigma) * x0

which is Euler's step for flow matching and DDIM's for diffusion. `stattn.denoise_step` does guidance, conversion,
combination and the blend with a known region in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stattn import masks, ranges
from stattn.grid import is_int
from stattn.ops._dispatch import impl_for
from stattn.ops.denoise import denoise_step

Masks = masks.Mask | Sequence[masks.Mask]
PREDICTIONS = ("x", "v", "noise")


class Level(NamedTuple):
    """Hold one noise level, x = alpha * x0 + sigma * e, and the timestep by which a model knows it."""

    alpha: float
    sigma: float
    timestep: float


@dataclass(frozen=True)
class FlowMatching:
    """Walk the straight line x = (1 - s) * x0 + s * e from s = 1 to 0; "v" is e - x0, the timestep 1000 * s.

    steps: how many steps, equal in s before the shift. shift: k > 0 moves them towards noise, s' = k * s / (1 + (k - 1)
    * s); larger videos want more (Wan 3 to 5, HunyuanVideo 7). Follows Lipman et al., arXiv:2210.02747, and Esser et
    al., arXiv:2403.03206.
    """

    steps: int
    shift: float = 1.0
    velocity = "velocity"

    def __post_init__(self) -> None:
        _positive_int("steps", self.steps)
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift={self.shift!r} must be a positive number")

    def levels(self) -> list[Level]:
        """Return the steps + 1 levels, from noise to data."""
        line = [1 - i / self.steps for i in range(self.steps)] + [0.0]
        shifted = [self.shift * s / (1 + (self.shift - 1) * s) for s in line]
        return [Level(1 - s, s, 1000 * s) for s in shifted]


@dataclass(frozen=True)
class Diffusion:
    """Walk a variance-preserving diffusion, alpha^2 + sigma^2 = 1, by DDIM; "v" is alpha * e - sigma * x0.

    steps: at most train_steps, spaced evenly and ending at the noisiest ("trailing"). betas: "scaled_linear" (0.00085
    to 0.012, linear in the square root) or "cosine". zero_snr: rescale so that the noisiest level holds no signal; a
    model that predicts "noise" cannot start there. snr_shift: divide the signal-to-noise ratio (CogVideoX-2B: 3).
    Follows Song et al., arXiv:2010.02502, Nichol and Dhariwal, arXiv:2102.09672, and Lin et al., arXiv:2305.08891.
    """

    steps: int
    betas: str = "scaled_linear"
    zero_snr: bool = True
    snr_shift: float = 1.0
    train_steps: int = 1000
    velocity = "v"

    def __post_init__(self) -> None:
        _positive_int("steps", self.steps)
        _positive_int("train_steps", self.train_steps)
        if self.steps > self.train_steps:
            raise ValueError(f"steps={self.steps} must be at most train_steps={self.train_steps}")
        if self.betas not in ("scaled_linear", "cosine"):
            raise ValueError(f"betas={self.betas!r} must be 'scaled_linear' or 'cosine'")
        if not (math.isfinite(self.snr_shift) and self.snr_shift > 0):
            raise ValueError(f"snr_shift={self.snr_shift!r} must be a positive number")

    def levels(self) -> list[Level]:
        """Return the steps + 1 levels, from noise to data."""
        signal = self.signal()
        last = self.train_steps - 1
        times = [max(0, round(last - i * self.train_steps / self.steps)) for i in range(self.steps)]
        noisy = [Level(math.sqrt(signal[t]), math.sqrt(1 - signal[t]), float(t)) for t in times]
        return [*noisy, Level(1.0, 0.0, 0.0)]

    def signal(self) -> np.ndarray:
        """Return alpha^2 at each of the training's timesteps, float64 [train_steps]."""
        if self.betas == "cosine":
            at = np.cos((np.arange(self.train_steps + 1) / self.train_steps + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - at[1:] / at[:-1], 0.999)
        else:
            betas = np.linspace(0.00085**0.5, 0.012**0.5, self.train_steps) ** 2
        signal = np.cumprod(1 - betas)
        signal = signal / (self.snr_shift + (1 - self.snr_shift) * signal)
        if self.zero_snr:
            alpha = np.sqrt(signal)
            signal = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
        return signal


Schedule = FlowMatching | Diffusion


def step_weights(levels: Sequence[Level], step: int, order: int) -> tuple[float, ...]:
    """Return the weights of x, of x0 and, at order 2, of the step before's x0 that give x at levels[step + 1].

    Order 2 is DPM-Solver++ (2M), Lu et al., arXiv:2211.01095; it falls to order 1 where the logarithm of the
    signal-to-noise ratio is not finite, at pure noise and at data, and at the first step.
    """
    now, then = levels[step], levels[step + 1]
    ratio = then.sigma / now.sigma
    clean = then.alpha - now.alpha * ratio
    if order == 1 or step == 0:
        return ratio, clean
    before, here, after = (
        math.log(a / s) if a > 0 and s > 0 else math.inf for a, s, _ in (levels[step - 1], now, then)
    )
    if math.inf in (before, here, after):
        return ratio, clean, 0.0
    extrapolated = clean * (after - here) / (here - before) / 2
    return ratio, clean + extrapolated, -extrapolated


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    shape: Sequence[int],
    *,
    text: Tensor | None = None,
    text_valid: Tensor | None = None,
    negative: Tensor | None = None,
    negative_valid: Tensor | None = None,
    steps: int | Schedule = 30,
    prediction: str = "x",
    order: int = 1,
    guidance: float = 1.0,
    rescale: float = 0.0,
    zero_star: bool = False,
    batched: bool = True,
    mask: Masks | Callable[[int], Masks | None] | None = None,
    dense_steps: int = 0,
    known: Tensor | None = None,
    generated: Tensor | None = None,
    masked_input: bool | None = None,
    noise: Tensor | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    patch: tuple[int, int, int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    impl: str | Mapping[str, str] = "auto",
    callback: Callable[[int, int, Tensor], object] | None = None,
) -> Tensor:
    """Sample videos from noise. shape: (B, C, T, H, W); returns such a tensor, float32 (float64 when dtype is).

    model: called as model(x, timestep[, text], **keywords) with x in dtype, timestep float32 [B]; keywords are those of
    text_valid, mask, known and known_mask that are given. It returns a tensor like x or, with patch=(pt, ph, pw),
    tokens [B, N, pt*ph*pw*C]. device, dtype: the model's where it has parameters, else the CPU and float32.

    Text: text [B, L, ...] with text_valid (counts [B], or booleans [B, L]). guidance other than 1 also predicts from
    negative, by default the same text with none of it valid, and extrapolates; rescale and zero_star as in
    `stattn.denoise_step`. batched: both predictions in one call of twice the batch, or in two calls.

    Schedule: steps is a count (FlowMatching of so many) or a schedule; prediction is what the model returns, "x" (the
    clean video), "v" (the schedule's velocity) or "noise"; order 2 takes DPM-Solver++ (2M) steps.

    Sparsity: mask is passed to the model; a function is called with the step's number. dense_steps: so many first steps
    use `masks.full`.

    Known regions: known like the result, generated (bool or 0..1) broadcasting against [B, 1, T, H, W], 1 where the
    video is generated. Each step sets the rest to known at that step's noise level, and the result equals known there
    bitwise. masked_input: the model also reads known and known_mask = 1 - generated; None asks model.config.

    Randomness: noise like the result; or a seed, of which sample b takes seed + b; or one seed or generator per sample;
    or one generator (or by default torch's), from which the samples draw in order. So no sample depends on the batch
    that it is in.

    callback: called after each step with the steps done, their number, and the predicted clean video.
    Raises ValueError or TypeError for arguments that do not fit, each named; what the model raises is passed on.
    """
    schedule = FlowMatching(steps) if isinstance(steps, int) else steps
    if not isinstance(schedule, Schedule):
        raise TypeError(f"steps={steps!r} must be a number of steps or a schedule")
    _choice("prediction", prediction, PREDICTIONS)
    _choice("order", order, (1, 2))
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale={rescale!r} must lie in [0, 1]")
    size = _shape(shape)
    device, dtype = _place(model, device, dtype)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    levels = schedule.levels()
    kind = {"x": "sample", "noise": "noise", "v": schedule.velocity}[prediction]
    mask_at = _mask_schedule(mask, dense_steps, len(levels) - 1)
    passes = _passes(size[0], text, text_valid, negative, negative_valid, guidance != 1, batched, device)
    noise = _noise(size, noise, seed, generator).to(device, state)
    x = noise
    keep: dict[str, Any] = {}
    reads: dict[str, Tensor] = {}
    if known is not None or generated is not None or masked_input:
        known, generated = _known(size, known, generated, state, device)
        kept = levels[0].alpha * known + levels[0].sigma * noise
        x = generated * noise + (1 - generated) * kept
        keep = {"known": known, "generated": generated, "noise": noise}
        if masked_input or (masked_input is None and _reads_known(model)):
            reads = {"known": known.to(dtype), "known_mask": (1 - generated).expand(size[0], 1, *size[2:]).to(dtype)}

    guide: dict[str, Any] = {"guidance": guidance, "rescale": rescale, "zero_star": zero_star} if guidance != 1 else {}
    advance: Callable[..., tuple[Tensor, Tensor]] = partial(
        denoise_step, prediction=kind, target="sample", patch=patch, impl=impl_for(impl, "denoise"), **guide
    )

    history: tuple[Tensor, ...] = ()
    for step, (now, then) in enumerate(ranges.each("step", pairwise(levels))):
        cond, uncond = _predict(model, x.to(dtype), now.timestep, passes, reads, mask_at(step))
        if keep:
            keep |= {"known_alpha": then.alpha, "known_sigma": then.sigma}
        weights = step_weights(levels, step, order)
        x, clean = advance(
            x, cond, uncond=uncond, alpha=now.alpha, sigma=now.sigma, weights=weights, history=history, **keep
        )
        history = (clean,) if order == 2 else ()
        if callback is not None:
            callback(step + 1, len(levels) - 1, clean)
    return x


def draw_noise(
    shape: Sequence[int],
    *,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Draw float32 standard normal noise sample by sample, as `sample` does: on the CPU, or where generator lives."""
    size = _shape(shape)
    if seed is not None and generator is not None:
        raise ValueError(f"seed={seed!r} and generator exclude each other")
    sources: list[torch.Generator | None]
    if seed is not None:
        seeds: list[Any] = [seed + i for i in range(size[0])] if isinstance(seed, int) else list(_sequence(seed))
        if len(seeds) != size[0] or not all(is_int(each) and each >= 0 for each in seeds):
            raise ValueError(f"seed={seed!r} must be a non-negative integer, or one for each of {size[0]} samples")
        sources = [torch.Generator().manual_seed(each) for each in seeds]
    elif generator is None or isinstance(generator, torch.Generator):
        sources = [generator] * size[0]
    else:
        sources = list(_sequence(generator))
        if len(sources) != size[0] or not all(isinstance(each, torch.Generator) for each in sources):
            raise ValueError(f"generator={generator!r} must be a generator, or one for each of {size[0]} samples")
    return torch.stack(
        [torch.randn(size[1:], generator=each, device=each.device if each is not None else "cpu") for each in sources]
    )


def _predict(
    model: Callable[..., Tensor],
    x: Tensor,
    timestep: float,
    passes: list[tuple[int, Tensor | None, Tensor | None]],
    reads: dict[str, Tensor],
    mask: Masks | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the conditional prediction and, under guidance, the unconditional one."""
    outputs: list[Tensor] = []
    for copies, text, valid in passes:
        t = torch.full((copies * len(x),), timestep, dtype=torch.float32, device=x.device)
        keywords: dict[str, Any] = {name: torch.cat([each] * copies) for name, each in reads.items()}
        if valid is not None:
            keywords["text_valid"] = valid
        if mask is not None:
            keywords["mask"] = mask
        output = model(torch.cat([x] * copies), t, *(() if text is None else (text,)), **keywords)
        if len(output) != len(t):
            raise ValueError(f"model returned shape {tuple(output.shape)} for a batch of {len(t)}")
        outputs.extend(output.chunk(copies))
    return outputs[0], outputs[1] if len(outputs) == 2 else None


def _passes(
    batch: int,
    text: Tensor | None,
    text_valid: Tensor | None,
    negative: Tensor | None,
    negative_valid: Tensor | None,
    guided: bool,
    batched: bool,
    device: torch.device,
) -> list[tuple[int, Tensor | None, Tensor | None]]:
    """List the model's calls of a step: how many copies of the batch, their text, and what of it is valid."""
    for name, each in (("text", text), ("negative", negative)):
        if each is not None and (each.ndim < 2 or len(each) != batch):
            raise ValueError(f"{name} of shape {tuple(each.shape)} must be [B, L, ...] with B = {batch}")
    for name, valid, of in (("text_valid", text_valid, text), ("negative_valid", negative_valid, negative)):
        if valid is not None and of is None:
            raise ValueError(f"{name} is given without {name.removesuffix('_valid')}")
        if valid is not None and of is not None and valid.shape not in ((batch,), of.shape[:2]):
            raise ValueError(f"{name} of shape {tuple(valid.shape)} must be [B] = ({batch},) or {tuple(of.shape[:2])}")
    text, text_valid, negative, negative_valid = (
        None if each is None else each.to(device) for each in (text, text_valid, negative, negative_valid)
    )
    if not guided:
        return [(1, text, text_valid)]
    if text is None:
        raise ValueError("guidance other than 1 needs text")
    if negative is None:
        negative, negative_valid = text, torch.zeros(batch, dtype=torch.int64, device=device)
    if not batched:
        return [(1, text, text_valid), (1, negative, negative_valid)]
    if negative.shape != text.shape:
        raise ValueError(
            f"negative of shape {tuple(negative.shape)} must have the shape of text, {tuple(text.shape)}, for one call:"
            " pad it and give negative_valid, or set batched=False"
        )
    if text_valid is None and negative_valid is None:
        return [(2, torch.cat((text, negative)), None)]
    places = torch.arange(text.shape[1], device=device)
    flags = [
        torch.ones(batch, len(places), dtype=torch.bool, device=device) if each is None
        else places < each[:, None] if each.ndim == 1
        else each.bool()
        for each in (text_valid, negative_valid)
    ]  # fmt: skip
    if all(each is None or each.ndim == 1 for each in (text_valid, negative_valid)):
        return [(2, torch.cat((text, negative)), torch.cat(flags).sum(1))]
    return [(2, torch.cat((text, negative)), torch.cat(flags))]


def _mask_schedule(
    mask: Masks | Callable[[int], Masks | None] | None, dense_steps: int, steps: int
) -> Callable[[int], Masks | None]:
    if not is_int(dense_steps) or not 0 <= dense_steps <= steps:
        raise ValueError(f"dense_steps={dense_steps!r} must be an integer in 0..{steps}, the number of steps")
    if callable(mask):
        if dense_steps:
            raise ValueError(f"dense_steps={dense_steps} and a mask that is a function of the step exclude each other")
        return mask
    if dense_steps and mask is None:
        raise ValueError(f"dense_steps={dense_steps} needs a mask for the steps after them")
    return lambda step: masks.full() if step < dense_steps else mask


def _known(
    size: tuple[int, ...], known: Tensor | None, generated: Tensor | None, state: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    if known is None or generated is None:
        raise ValueError("known and generated go together: the video to keep, and 1 where it is generated")
    if tuple(known.shape) != size:
        raise ValueError(f"known of shape {tuple(known.shape)} must be {size}")
    if not known.is_floating_point() or torch.promote_types(known.dtype, state) != state:
        raise TypeError(f"known of {known.dtype} must be a floating-point tensor that {state} holds exactly")
    wanted = (size[0], 1, *size[2:])
    if generated.ndim != 5 or any(n not in (1, m) for n, m in zip(generated.shape, wanted, strict=True)):
        raise ValueError(f"generated of shape {tuple(generated.shape)} must broadcast against {wanted}")
    if generated.dtype != torch.bool and not generated.is_floating_point():
        raise TypeError(f"generated of {generated.dtype} must be bool or floating point")
    generated = generated.to(device, state)
    if not bool(((generated >= 0) & (generated <= 1)).all()):
        raise ValueError("generated must lie in 0..1")
    # Nothing that is to be generated may reach the model, NaN included.
    return torch.where(generated == 1, 0, known.to(device, state)), generated


def _noise(
    size: tuple[int, ...],
    noise: Tensor | None,
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    if noise is None:
        return draw_noise(size, seed=seed, generator=generator)
    if seed is not None or generator is not None:
        raise ValueError("noise and seed or generator exclude each other")
    if tuple(noise.shape) != size or not noise.is_floating_point():
        raise ValueError(f"noise of shape {tuple(noise.shape)} and dtype {noise.dtype} must be floating point {size}")
    return noise


def _reads_known(model: object) -> bool:
    return bool(getattr(getattr(model, "config", None), "masked_input", False))


def _place(
    model: Callable[..., Tensor], device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if dtype is None:
        dtype = torch.float32 if weight is None else weight.dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype!r} must be a floating-point dtype")
    if device is None:
        device = "cpu" if weight is None else weight.device
    return torch.device(device), dtype


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) else ()


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    if len(shape) != 5 or not all(is_int(n) and n > 0 for n in shape):
        raise ValueError(f"shape={tuple(shape)} must be five positive integers (B, C, T, H, W)")
    return tuple(int(n) for n in shape)


def _positive_int(name: str, value: object) -> None:
    if not is_int(value) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer")


def _choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")
