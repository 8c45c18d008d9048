"""Sampling: the loop that walks a video from noise to data along a schedule.

A model predicts the clean video x0 ("x"), the noise e ("noise") or a velocity ("v") from x = alpha * x0 + sigma * e at
each level of `stattn.schedules`, and one step combines x and the predicted x0 linearly. `stattn.denoise_step` does
guidance, conversion, combination and the blend with a known region in one pass. `stattn.graph` captures the whole loop
as one CUDA graph; `stattn.rollout` runs it chunk by chunk for autoregressive video.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stattn import masks, ranges
from stattn.dit import DiT
from stattn.grid import check_positive, is_int
from stattn.model.settings import Masks, check_impl
from stattn.ops import _validate
from stattn.ops._dispatch import impl_for
from stattn.ops.denoise import denoise_step
from stattn.schedules import Diffusion, FlowMatching, Level, Schedule, step_weights

__all__ = ["Diffusion", "FlowMatching", "Level", "Schedule", "draw_noise", "sample", "step_weights"]

PREDICTIONS = ("x", "v", "noise")


class Pass(NamedTuple):
    """One call of the model in a step: how many copies of the batch, their text, and what of it is valid.

    text: as given, or what the model's encode_text made of it, which then knows what is valid.
    """

    copies: int
    text: Any
    valid: Tensor | None


class Inputs(NamedTuple):
    """The tensors of a sample, checked and on its device."""

    noise: Tensor
    passes: tuple[Pass, ...]
    known: Tensor | None
    generated: Tensor | None


@dataclass(frozen=True)
class Walk:
    """The loop of a sample: everything about it but the tensors, and so what a graph of it fixes.

    advance: `stattn.denoise_step` with what is the same in all steps. keywords: of every call of the model.
    """

    model: Callable[..., Tensor]
    levels: Sequence[Level]
    order: int
    corrector: bool
    advance: Callable[..., tuple[Tensor, Tensor]]
    mask_at: Callable[[int], Masks | None]
    masked_input: bool
    dtype: torch.dtype
    keywords: Mapping[str, Any]

    def with_keywords(self, **keywords: Any) -> Walk:
        """Return the same loop with more keywords for the model."""
        return replace(self, keywords={**self.keywords, **keywords})

    def encode(self, inputs: Inputs) -> Inputs:
        """Do what the model can do with the text alone, once for all steps."""
        encode = getattr(self.model, "encode_text", None)
        if encode is None:
            return inputs
        passes = [
            each if each.text is None else Pass(each.copies, encode(each.text, each.valid), None)
            for each in inputs.passes
        ]
        return inputs._replace(passes=tuple(passes))

    def __call__(
        self,
        inputs: Inputs,
        callback: Callable[[int, int, Tensor], object] | None = None,
        only: Collection[int] | None = None,
    ) -> Tensor:
        """Walk from inputs.noise to the video. only: the numbers of steps to take, the others being left out."""
        noise, passes, known, generated = inputs
        x = noise
        keep: dict[str, Any] = {}
        reads: dict[str, Tensor] = {}
        if known is not None and generated is not None:
            kept = self.levels[0].alpha * known + self.levels[0].sigma * noise
            x = generated * noise + (1 - generated) * kept
            keep = {"known": known, "generated": generated, "noise": noise}
            if self.masked_input:
                known_mask = (1 - generated).expand(len(x), 1, *x.shape[2:])
                reads = {"known": known.to(self.dtype), "known_mask": known_mask.to(self.dtype)}
        history: tuple[Tensor, ...] = ()
        for step, (now, then) in enumerate(ranges.each("step", pairwise(self.levels))):
            if only is not None and step not in only:
                continue
            cond, uncond = self.predict(x, now.timestep, passes, step, reads)
            if keep:
                keep |= {"known_alpha": then.alpha, "known_sigma": then.sigma}
            weights = step_weights(self.levels, step, self.order, self.corrector)
            x, clean = self.advance(
                x,
                cond,
                uncond=uncond,
                alpha=now.alpha,
                sigma=now.sigma,
                weights=weights[: 2 + len(history)],
                history=history,
                **keep,
            )
            history = (clean, *history)[: self.order - 1 + self.corrector]
            if callback is not None:
                callback(step + 1, len(self.levels) - 1, clean)
        return x

    def predict(
        self, x: Tensor, timestep: float, passes: Sequence[Pass], step: int, reads: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the conditional prediction for a step and, under guidance, the unconditional one."""
        x, mask = x.to(self.dtype), self.mask_at(step)
        outputs: list[Tensor] = []
        for copies, text, valid in passes:
            t = torch.full((copies * len(x),), timestep, dtype=torch.float32, device=x.device)
            keywords: dict[str, Any] = {name: _repeat(each, copies) for name, each in (reads or {}).items()}
            keywords |= self.keywords
            if valid is not None:
                keywords["text_valid"] = valid
            if mask is not None:
                keywords["mask"] = mask
            output = self.model(_repeat(x, copies), t, *(() if text is None else (text,)), **keywords)
            if len(output) != len(t):
                raise ValueError(f"model returned shape {tuple(output.shape)} for a batch of {len(t)}")
            outputs.extend(output.chunk(copies))
        return outputs[0], outputs[1] if len(outputs) == 2 else None


def _repeat(x: Tensor, copies: int) -> Tensor:
    return x if copies == 1 else torch.cat([x] * copies)


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
    corrector: bool = False,
    guidance: float = 1.0,
    rescale: float = 0.0,
    zero_star: bool = False,
    batched: bool = True,
    mask: Masks | Callable[[int], Masks | None] | None = None,
    dense_steps: int = 0,
    dense_layers: int = 0,
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
    """Sample videos from noise.

    shape: (B, C, T, H, W). Returns a tensor of that shape, float32 (float64 when dtype is).

    model: called as model(x, timestep[, text], **keywords) with x in dtype, timestep float32 [B]; keywords are those of
    text_valid, mask, known and known_mask that are given. It returns a tensor like x or, with patch=(pt, ph, pw),
    tokens [B, N, pt*ph*pw*C], as a DiT is asked to. device, dtype: the model's where it has parameters, else the CPU
    and float32.

    Text: text [B, L, ...] with text_valid (counts [B], or booleans [B, L]). With guidance other than 1 the model also
    predicts from negative, by default the same text with none of it valid, and the two are extrapolated; rescale and
    zero_star as in `stattn.denoise_step`. batched: make both predictions in one call of twice the batch, not in two.

    Schedule: steps is a schedule, or a number of FlowMatching steps; prediction is what the model returns: "x" (the
    clean video), "v" (the schedule's velocity) or "noise"; order 2 takes DPM-Solver++ (2M) steps, with corrector
    UniPC's.

    Sparsity: mask is passed to the model; a function is called with the step's number and returns it. dense_steps: the
    number of first steps that use `masks.full`. dense_layers: passed to the model where it is not 0: the number of its
    first layers that attend fully.

    Known regions: known is shaped like the result; generated (bool or 0..1) broadcasts against [B, 1, T, H, W] and is 1
    where the video is generated. Each step sets the rest to known at that step's noise level, and there the result
    equals known bit by bit. masked_input: the model also reads known and known_mask = 1 - generated; None follows
    model.config.

    Randomness: noise shaped like the result; or a seed, of which sample b takes seed + b; or one seed or generator per
    sample; or one generator (by default torch's), from which the samples draw in order. So no sample depends on the
    batch that it is in.

    callback: called after each step with the number of steps done, their total, and the predicted clean video.
    Raises ValueError or TypeError for arguments that do not fit, each named; what the model raises is passed on.
    """
    check_callback(callback)
    walk, inputs = prepare(
        model,
        shape,
        text=text,
        text_valid=text_valid,
        negative=negative,
        negative_valid=negative_valid,
        steps=steps,
        prediction=prediction,
        order=order,
        corrector=corrector,
        guidance=guidance,
        rescale=rescale,
        zero_star=zero_star,
        batched=batched,
        mask=mask,
        dense_steps=dense_steps,
        dense_layers=dense_layers,
        known=known,
        generated=generated,
        masked_input=masked_input,
        noise=noise,
        seed=seed,
        generator=generator,
        patch=patch,
        device=device,
        dtype=dtype,
        impl=impl,
    )
    return walk(walk.encode(inputs), callback)


def prepare(
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
    corrector: bool = False,
    guidance: float = 1.0,
    rescale: float = 0.0,
    zero_star: bool = False,
    batched: bool = True,
    mask: Masks | Callable[[int], Masks | None] | None = None,
    dense_steps: int = 0,
    dense_layers: int = 0,
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
) -> tuple[Walk, Inputs]:
    """Check the arguments of `sample` and return its loop and its tensors."""
    schedule = FlowMatching(steps) if isinstance(steps, int) else steps
    if not isinstance(schedule, Schedule):
        raise TypeError(f"steps={steps!r} must be a number of steps or a schedule")
    _choice("prediction", prediction, PREDICTIONS)
    _choice("order", order, (1, 2))
    if not isinstance(corrector, bool) or (corrector and order == 1):
        raise ValueError(f"corrector={corrector!r} must be a boolean, and goes with order=2")
    guidance = _validate.number("guidance", guidance)
    if not 0 <= _validate.number("rescale", rescale) <= 1:
        raise ValueError(f"rescale={rescale!r} must lie in [0, 1]")
    if (_validate.flag("zero_star", zero_star) or rescale) and guidance == 1:
        raise ValueError(f"rescale={rescale}, zero_star={zero_star} need a guidance other than 1")
    check_positive("dense_layers", dense_layers, least=0)
    if masked_input is not None:
        _validate.flag("masked_input", masked_input)
    check_impl(impl)
    size = check_shape(shape)
    device, dtype = place(model, device, dtype)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    levels = schedule.levels()
    kind = {"x": "sample", "noise": "noise", "v": schedule.velocity}[prediction]
    mask_at = _mask_schedule(mask, dense_steps, len(levels) - 1)
    batched = _validate.flag("batched", batched)
    passes = _passes(size[0], text, text_valid, negative, negative_valid, guidance != 1, batched, device)
    noise = make_noise(size, noise, seed, generator).to(device, state)
    if known is not None or generated is not None or masked_input:
        known, generated = _known(size, known, generated, state, device)
    keywords: dict[str, Any] = {"dense_layers": dense_layers} if dense_layers else {}
    if patch is None and isinstance(model, DiT):
        keywords["tokens"], patch = True, model.config.patch
    guide: dict[str, Any] = {"guidance": guidance, "rescale": rescale, "zero_star": zero_star} if guidance != 1 else {}
    advance: Callable[..., tuple[Tensor, Tensor]] = partial(
        denoise_step,
        prediction=kind,
        target="sample",
        patch=patch,
        impl=impl_for(impl, "denoise"),
        **guide,
    )
    reads_known = _reads_known(model) if masked_input is None else masked_input
    walk = Walk(model, levels, order, corrector, advance, mask_at, reads_known, dtype, keywords)
    return walk, Inputs(noise, passes, known, generated)


def draw_noise(
    shape: Sequence[int],
    *,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Draw float32 standard normal noise sample by sample, as `sample` does: on the CPU, or where generator lives."""
    size = check_shape(shape)
    if seed is not None and generator is not None:
        raise ValueError(f"seed={seed!r} and generator exclude each other")
    sources: list[torch.Generator | None]
    if seed is not None:
        seeds: list[Any] = [seed + i for i in range(size[0])] if is_int(seed) else list(_sequence(seed))
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


def _passes(
    batch: int,
    text: Tensor | None,
    text_valid: Tensor | None,
    negative: Tensor | None,
    negative_valid: Tensor | None,
    guided: bool,
    batched: bool,
    device: torch.device,
) -> tuple[Pass, ...]:
    """List the model's calls of a step: how many copies of the batch, their text, and what of it is valid."""
    given = {"text": text, "text_valid": text_valid, "negative": negative, "negative_valid": negative_valid}
    for name, each in given.items():
        if each is not None and not isinstance(each, Tensor):
            raise TypeError(f"{name} of type {type(each).__name__} must be a tensor")
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
        return (Pass(1, text, text_valid),)
    if text is None:
        raise ValueError("guidance other than 1 needs text")
    if negative is None:
        negative, negative_valid = text, torch.zeros(batch, dtype=torch.int64, device=device)
    if not batched:
        return Pass(1, text, text_valid), Pass(1, negative, negative_valid)
    if negative.shape != text.shape:
        raise ValueError(
            f"negative of shape {tuple(negative.shape)} must have the shape of text, {tuple(text.shape)}, for one call:"
            " pad it and give negative_valid, or set batched=False"
        )
    if text_valid is None and negative_valid is None:
        return (Pass(2, torch.cat((text, negative)), None),)
    places = torch.arange(text.shape[1], device=device)
    flags = [
        torch.ones(batch, len(places), dtype=torch.bool, device=device) if each is None
        else places < each[:, None] if each.ndim == 1
        else each.bool()
        for each in (text_valid, negative_valid)
    ]  # fmt: skip
    if all(each is None or each.ndim == 1 for each in (text_valid, negative_valid)):
        return (Pass(2, torch.cat((text, negative)), torch.cat(flags).sum(1)),)
    return (Pass(2, torch.cat((text, negative)), torch.cat(flags)),)


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


def make_noise(
    size: tuple[int, ...],
    noise: Tensor | None,
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    """Return the noise that is given, or draw it. Raises TypeError or ValueError for what is not a sample's."""
    if noise is None:
        return draw_noise(size, seed=seed, generator=generator)
    if seed is not None or generator is not None:
        raise ValueError("noise and seed or generator exclude each other")
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise of type {type(noise).__name__} must be a tensor")
    if tuple(noise.shape) != size or not noise.is_floating_point():
        raise ValueError(f"noise of shape {tuple(noise.shape)} and dtype {noise.dtype} must be floating point {size}")
    return noise


def _reads_known(model: object) -> bool:
    return bool(getattr(getattr(model, "config", None), "masked_input", False))


def place(
    model: Callable[..., Tensor], device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Return where a model is called and in which dtype, by default those of its parameters."""
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if dtype is None:
        dtype = torch.float32 if weight is None else weight.dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype!r} must be a floating-point dtype")
    if device is None:
        device = "cpu" if weight is None else weight.device
    return _validate.device("device", device), dtype


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) else ()


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a video's shape. Raises ValueError when it is none."""
    if not isinstance(shape, (tuple, list)) or len(shape) != 5 or not all(is_int(n) and n > 0 for n in shape):
        raise ValueError(f"shape={shape!r} must be five positive integers (B, C, T, H, W)")
    return tuple(int(n) for n in shape)


def check_callback(callback: object) -> None:
    """Raise TypeError when what is to be called cannot be."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback={callback!r} must be a function")


def _choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")
