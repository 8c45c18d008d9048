"""One denoising step in one pass over the latent: ``denoise_step``, and the numbers it draws: ``philox_normal``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stattn.grid import is_int
from stattn.ops import _triton, _validate
from stattn.ops._dispatch import Implementation, Operation, device_of, serves_all
from stattn.problem import Step
from stattn.reference._philox import philox_normal as reference_normal
from stattn.reference.denoise import KINDS, conversion
from stattn.reference.denoise import denoise_step as reference
from stattn.reference.denoise_backward import denoise_step_backward as reference_backward

MOST_TENSORS = 5


class DenoiseCall(NamedTuple):
    """What the choice of an implementation depends on.

    dtype: of the state; output: of the model's output; patch: the patch of an output in tokens, None for latents;
    reduces: a sum over each sample is needed first (rescale, zero_star). others: the dtypes of the other tensors.
    """

    device: str
    capability: tuple[int, int]
    dtype: torch.dtype
    output: torch.dtype
    patch: tuple[int, int, int] | None
    reduces: bool
    others: tuple[torch.dtype, ...]


class NormalCall(NamedTuple):
    """What the choice of an implementation depends on."""

    device: str
    capability: tuple[int, int]


def denoise_step(
    sample: Tensor,
    output: Tensor,
    *,
    sigma: float,
    weights: Sequence[float],
    alpha: float | None = None,
    prediction: str = "velocity",
    target: str = "sample",
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    rescale: float = 0.0,
    zero_star: bool = False,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    noise_weight: float = 0.0,
    known: Tensor | None = None,
    generated: Tensor | None = None,
    known_sigma: float = 0.0,
    known_alpha: float | None = None,
    patch: tuple[int, int, int] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Take one denoising step: guide, convert the prediction, combine linearly, and keep the known region.

    The state is x = alpha * x0 + sigma * e. With o the guided output::

        p  = o converted from ``prediction`` to ``target``
        x' = weights[0] * sample + weights[1] * p + sum_i weights[2 + i] * history[i] + noise_weight * z
        x' = generated * x' + (1 - generated) * (known_alpha * known + known_sigma * z)

    sample: [B, C, T, H, W], the state, float32 in a sampling loop. output: what the model returns, [B, C, T, H, W] or,
    with patch=(pt, ph, pw), tokens [B, N, pt*ph*pw*C] with features ordered (pt, ph, pw, C); padding of the last
    patches is cut off.
    sigma, alpha: the noise level of sample; alpha is by default 1 - sigma (flow matching).
    prediction, target: "sample" x0, "noise" e, "velocity" e - x0, or "v" alpha * e - sigma * x0.
    uncond: the output without the condition, laid out like output. o = u + guidance * (c - u) with c = output;
    zero_star first scales u by <c, u> / (|u|^2 + 1e-8) (CFG-Zero*); rescale, in [0, 1], is the share of o brought back
    to c's standard deviation. Both sum over all axes but the batch, in the space in which the model predicts.
    weights, history: the solver's numbers and its earlier tensors, shaped like sample; with the noise at most five
    tensors. Euler is target="velocity", weights=(1, sigma' - sigma); DDIM, DPM-Solver++ (2M) and UniPC combine sample,
    x0 and earlier x0.
    z: noise, a tensor like sample, or Philox numbers of seed: see ``philox_normal`` for seed and offset (a new offset
    for every step).
    known, generated: the clip to keep, and 1 where the sample is generated, 0 where known is kept (bool or float,
    broadcast against sample); known_sigma, known_alpha (by default 1 - known_sigma): the noise level of x'.
    Numbers are Python numbers, not tensors. impl: see ``stattn.explain``.

    Returns (x', p), of sample's shape and dtype. Computed in float32 (float64 when an input is) from the unrounded p,
    each rounded once. A term of weight 0 is left out whatever it holds, and where generated is exactly 0 or 1 the
    other side is: with known_sigma=0 the kept region equals known. Differentiable in every floating-point tensor, by
    Triton once.
    Raises ValueError or TypeError for wrong shapes, dtypes, devices or kinds, for a conversion that the noise level
    does not determine, and for arguments that would have no effect: guidance without uncond, known_sigma without known.
    Follows classifier-free guidance (arXiv:2207.12598), its rescaling (arXiv:2305.08891), CFG-Zero*
    (arXiv:2503.18886), flow matching (arXiv:2210.02747), DDIM (arXiv:2010.02502), DPM-Solver++ (arXiv:2211.01095) and
    UniPC (arXiv:2302.04867).
    """
    sample = _validate.tensor("sample", sample, "[B, C, T, H, W]")
    shape = tuple(sample.shape)
    patch = _check_output(sample, output, uncond, patch)
    guidance, rescale = _check_guidance(uncond, guidance, rescale, zero_star)
    sigma, alpha = _check_level("sigma", sigma, "alpha", alpha)
    convert = _check_kinds(prediction, target, alpha, sigma)

    noise_weight = _validate.number("noise_weight", noise_weight)
    history = _sequence("history", history, "tensors shaped like sample")
    for i, each in enumerate(history):
        _validate.shaped(f"history[{i}]", each, "[B, C, T, H, W]", shape)
    weights = _sequence("weights", weights, "numbers")
    weights = tuple(_validate.number(f"weights[{i}]", each) for i, each in enumerate(weights))
    if len(weights) != 2 + len(history):
        raise ValueError(
            f"weights={weights} must be {2 + len(history)} numbers: of sample, the target and each history"
        )
    if len(weights) + (noise_weight != 0) > MOST_TENSORS:
        raise ValueError(f"weights={weights} and noise_weight={noise_weight} combine more than {MOST_TENSORS} tensors")

    seeds = _check_noise(sample, noise, seed, offset)
    known_weights = _check_known(sample, known, generated, known_sigma, known_alpha)
    if noise is None and seeds is None and (noise_weight != 0 or known_weights[1] != 0):
        raise ValueError(f"noise_weight={noise_weight} and known_sigma={known_sigma} need noise or seed")

    for name, other in (
        ("output", output),
        ("uncond", uncond),
        ("noise", noise),
        ("known", known),
        ("generated", generated),
    ):
        _validate.one_device("sample", sample, **{name: other})
    for i, each in enumerate(history):
        _validate.one_device("sample", sample, **{f"history[{i}]": each})
    others = tuple(each.dtype for each in (*history, noise, known, generated) if each is not None)
    call = DenoiseCall(*device_of(sample), sample.dtype, output.dtype, patch, zero_star or rescale != 0, others)
    step = Step(
        sample=sample,
        output=output,
        uncond=uncond,
        noise=noise,
        known=known,
        generated=generated,
        history=history,
        seeds=seeds,
        offset=offset,
        guidance=guidance,
        rescale=rescale,
        zero_star=zero_star,
        convert=convert,
        weights=weights,
        noise_weight=noise_weight,
        known_weights=known_weights,
        patch=patch,
    )
    return DENOISE_STEP.choose(impl, call).run(step)


def philox_normal(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    offset: int = 0,
    device: torch.device | str | None = None,
    impl: str = "auto",
) -> Tensor:
    """Draw standard normal numbers that depend on seed, offset and place alone, not on device, batch or call order.

    shape: [B, ...]. seed: an int in [0, 2^63 - B], of which sample b takes seed + b, or an int64 tensor [B], one seed
    per sample.
    offset: an int in [0, 2^63), the number of the draw; numbers of different offsets are independent. device: of the
    result; by default that of seed, or torch's default. impl: see ``stattn.explain``.

    Returns float32. Bits are Philox4x32-10 (Salmon et al., SC 2011): element i of a sample, in row-major order, is
    number i % 4 of key seed and counter (i // 4, offset), 64 bits each, low word first. Pairs of words become pairs of
    normals by the Box-Muller transform: words rounded to float32 uniforms, the rest computed in float64 and rounded
    once.
    Raises ValueError or TypeError for a seed or offset out of range, or seeds of another shape or device.
    """
    if not isinstance(shape, (tuple, list)) or not all(is_int(each) and each >= 0 for each in shape) or not shape:
        raise ValueError(f"shape={shape!r} must be [B, ...], integers that are not negative")
    size = torch.Size(shape)
    if device is None and isinstance(seed, Tensor):
        device = seed.device
    elif device is not None:
        device = _validate.device("device", device)
    seeds = _seeds(seed, offset, size[0], torch.empty(0, device=device).device)
    return PHILOX_NORMAL.choose(impl, NormalCall(*device_of(seeds))).run(seeds, offset, size)


def _check_output(
    sample: Tensor, output: Tensor, uncond: Tensor | None, patch: tuple[int, int, int] | None
) -> tuple[int, int, int] | None:
    """Check the model's outputs against the state and return the patch."""
    if patch is None:
        if isinstance(output, Tensor) and output.dim() == 3:
            raise ValueError(
                f"output of shape {tuple(output.shape)} holds tokens: patch=(pt, ph, pw) must say of which patches"
            )
        axes, shape = "[B, C, T, H, W]", tuple(sample.shape)
    else:
        patch = _validate.triple("patch", patch)
        t, h, w = (-(-size // p) for size, p in zip(sample.shape[2:], patch, strict=True))
        tokens = t * h * w  # not math.prod: torch.compile does not trace it over a generator
        axes, shape = "[B, N, pt*ph*pw*C]", (sample.shape[0], tokens, math.prod(patch) * sample.shape[1])
    _validate.shaped("output", output, axes, shape)
    if uncond is not None:
        _validate.shaped("uncond", uncond, axes, shape)
        if uncond.dtype != output.dtype:
            raise TypeError(f"uncond of {uncond.dtype} must have the dtype of output, {output.dtype}")
    return patch


def _sequence(name: str, value: object, of: str) -> tuple[Any, ...]:
    try:
        return tuple(value)  # type: ignore[arg-type]  # that is what is asked
    except TypeError:
        raise TypeError(f"{name} of type {type(value).__name__} must be a sequence of {of}") from None


def _check_guidance(uncond: Tensor | None, guidance: float, rescale: float, zero_star: bool) -> tuple[float, float]:
    guidance, rescale = _validate.number("guidance", guidance), _validate.number("rescale", rescale)
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale={rescale} must lie in [0, 1]")
    if _validate.flag("zero_star", zero_star) or guidance != 1 or rescale != 0:
        if uncond is None:
            raise ValueError(f"guidance={guidance}, rescale={rescale}, zero_star={zero_star} need uncond")
    return guidance, rescale


def _check_level(sigma_name: str, sigma: float, alpha_name: str, alpha: float | None) -> tuple[float, float]:
    """Return the noise level (sigma, alpha) of x = alpha * x0 + sigma * e."""
    sigma = _validate.number(sigma_name, sigma)
    if sigma < 0:
        raise ValueError(f"{sigma_name}={sigma} must not be negative")
    if alpha is None:
        if sigma > 1:
            raise ValueError(f"{sigma_name}={sigma} is above 1, so that {alpha_name} must be given")
        return sigma, 1 - sigma
    alpha = _validate.number(alpha_name, alpha)
    if alpha < 0:
        raise ValueError(f"{alpha_name}={alpha} must not be negative")
    return sigma, alpha


def _check_kinds(prediction: str, target: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Return (a, b) such that target = a * x + b * prediction."""
    for name, kind in (("prediction", prediction), ("target", target)):
        if kind not in KINDS:
            raise ValueError(f"{name}={kind!r} must be one of {', '.join(KINDS)}")
    try:
        return conversion(prediction, target, alpha, sigma)
    except ZeroDivisionError:
        raise ValueError(
            f"prediction={prediction!r} does not determine target={target!r} at alpha={alpha}, sigma={sigma}"
        ) from None


def _check_noise(sample: Tensor, noise: Tensor | None, seed: int | Tensor | None, offset: int) -> Tensor | None:
    """Return the seed of each sample, or None."""
    if noise is not None:
        if seed is not None:
            raise ValueError(f"noise and seed={seed!r} exclude each other")
        _validate.shaped("noise", noise, "[B, C, T, H, W]", tuple(sample.shape))
    if seed is None:
        if offset != 0:
            raise ValueError(f"offset={offset!r} has no effect without seed")
        return None
    return _seeds(seed, offset, sample.shape[0], sample.device)


def _seeds(seed: int | Tensor, offset: int, batch: int, device: torch.device) -> Tensor:
    if not is_int(offset) or not 0 <= offset < 2**63:
        raise ValueError(f"offset={offset!r} must be an integer in [0, 2^63)")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed of {seed.dtype} must be an int, or an int64 tensor [B]")
        if tuple(seed.shape) != (batch,) or seed.device != device:
            raise ValueError(f"seed of shape {tuple(seed.shape)} on {seed.device} must be [B] = ({batch},) on {device}")
        return seed
    if not is_int(seed) or not 0 <= seed <= 2**63 - max(batch, 1):
        raise ValueError(f"seed={seed!r} must be an integer in [0, 2^63 - B]")
    return torch.arange(batch, dtype=torch.int64, device=device) + seed


def _check_known(
    sample: Tensor, known: Tensor | None, generated: Tensor | None, known_sigma: float, known_alpha: float | None
) -> tuple[float, float]:
    """Return the weights of known and of the noise in the kept region."""
    sigma, alpha = _check_level("known_sigma", known_sigma, "known_alpha", known_alpha)
    if (known is None) != (generated is None):
        raise ValueError("known and generated go together: the clip to keep, and where it is not kept")
    if known is None or generated is None:
        if sigma != 0 or known_alpha is not None:
            raise ValueError(f"known_sigma={known_sigma}, known_alpha={known_alpha} have no effect without known")
        return alpha, sigma
    _validate.shaped("known", known, "[B, C, T, H, W]", tuple(sample.shape))
    if not isinstance(generated, Tensor) or generated.dtype not in (torch.bool, *_validate.FLOATS):
        kind = generated.dtype if isinstance(generated, Tensor) else type(generated).__name__
        raise TypeError(f"generated of {kind} must be a bool or floating-point tensor")
    pairs = zip(generated.shape, sample.shape, strict=False)
    if generated.dim() != 5 or any(have not in (1, want) for have, want in pairs):
        raise ValueError(
            f"generated of shape {tuple(generated.shape)} must broadcast against sample, {tuple(sample.shape)}"
        )
    return alpha, sigma


# Choice of implementation.


def _triton_why_not(call: DenoiseCall) -> str | None:
    return _triton.why_not(call.device, call.capability, call.dtype, call.output, *call.others)


def _triton_normal_why_not(call: NormalCall) -> str | None:
    return _triton.why_not(call.device, call.capability)


def _triton_run(step: Step) -> tuple[Tensor, Tensor]:
    return torch.ops.stattn.denoise_step(*step)


def _triton_normal(seeds: Tensor, offset: int, size: torch.Size) -> Tensor:
    return torch.ops.stattn.philox_normal(seeds, offset, size)


DENOISE_STEP = Operation(
    "denoise_step",
    (
        Implementation("triton", _triton_why_not, _triton_run),
        Implementation("reference", serves_all, reference),
    ),
)
PHILOX_NORMAL = Operation(
    "philox_normal",
    (
        Implementation("triton", _triton_normal_why_not, _triton_normal),
        Implementation("reference", serves_all, reference_normal),
    ),
)


# torch.library: the Triton kernels; the reference is differentiable PyTorch, called directly.

_LIBRARY = torch.library.Library("stattn", "FRAGMENT")
_TENSORS = (
    "Tensor sample, Tensor output, Tensor? uncond, Tensor? noise, Tensor? known, Tensor? generated, Tensor[] history"
)
_NUMBERS = (
    "Tensor? seeds, int offset, float guidance, float rescale, bool zero_star, float[] convert, float[] weights, "
    "float noise_weight, float[] known_weights, int[]? patch"
)
_LIBRARY.define(f"denoise_step({_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"denoise_step_backward(Tensor dfollowing, Tensor dtarget, {_TENSORS}, {_NUMBERS}, bool[] needed) -> Tensor[]"
)
_LIBRARY.define("philox_normal(Tensor seeds, int offset, SymInt[] size) -> Tensor")


# Kernel files are imported when one runs: `import stattn` must work without Triton.


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from stattn.kernels import denoise

    return denoise.advance(Step(*arguments))


def _backward(dfollowing: Tensor, dtarget: Tensor, *arguments: Any) -> list[Tensor]:
    """Return the gradients that are needed, by PyTorch: a step is differentiated too rarely for a kernel of its own."""
    *step, needed = arguments
    *single, history = step[:7]
    given = [x is not None for x in (*single, *history)]
    grads = reference_backward(dfollowing, dtarget, Step(*step))
    needed = iter(needed)
    wanted = [grad for grad, there in zip(grads, given, strict=True) if there and next(needed)]
    return [grad.contiguous() for grad in wanted if grad is not None]


def _normal(seeds: Tensor, offset: int, size: Sequence[int]) -> Tensor:
    from stattn.kernels._philox import philox_normal

    return philox_normal(seeds, offset, torch.Size(size))


class _DenoiseStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        """Take the history's tensors one by one: autograd does not look into a list."""
        ctx.save_for_backward(*tensors, numbers[0])
        ctx.numbers = numbers[1:]
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.stattn.denoise_step(*tensors[:6], tensors[6:], *numbers)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dfollowing: Tensor, dtarget: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, seeds = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        needed = [need for need, each in zip(needs, tensors, strict=True) if each is not None]
        grads = torch.ops.stattn.denoise_step_backward(
            dfollowing, dtarget, *tensors[:6], tensors[6:], seeds, *ctx.numbers, needed
        )
        rest = iter(grads)
        return None, *(next(rest) if need else None for need in needs)


def _autograd(*arguments: Any) -> tuple[Tensor, Tensor]:
    *single, history = arguments[:7]
    tensors = (*single, *history)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _DenoiseStep.apply(arguments[7:], *tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.stattn.denoise_step(*arguments)


def _fake(sample: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return sample.new_empty(sample.shape), sample.new_empty(sample.shape)


def _fake_backward(dfollowing: Tensor, dtarget: Tensor, *arguments: Any) -> list[Tensor]:
    *single, history = arguments[:7]
    tensors = [x for x in (*single, *history) if x is not None]
    return [x.new_empty(x.shape) for x, need in zip(tensors, arguments[-1], strict=True) if need]


def _fake_normal(seeds: Tensor, offset: int, size: Sequence[int]) -> Tensor:
    return seeds.new_empty(size, dtype=torch.float32)


for _name, _run, _fake_run in (
    ("denoise_step", _forward, _fake),
    ("denoise_step_backward", _backward, _fake_backward),
    ("philox_normal", _normal, _fake_normal),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stattn::{_name}", _fake_run, lib=_LIBRARY)
_LIBRARY.impl("denoise_step", _autograd, "Autograd")
