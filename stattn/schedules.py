"""Schedules: the noise levels that a sampler walks, and the weights of its steps.

A noisy video is x = alpha * x0 + sigma * e, with e standard normal. A schedule lists the levels (alpha, sigma) from
noise to data, and one step from a level to the next is a linear combination of x and the predicted x0, whatever the
schedule:

    x' = (sigma' / sigma) * x + (alpha' - alpha * sigma' / sigma) * x0

which is Euler's step for flow matching and DDIM's for diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stattn.grid import is_int
from stattn.ops._validate import flag, number


class Level(NamedTuple):
    """Hold one noise level, x = alpha * x0 + sigma * e, and the timestep by which a model knows it."""

    alpha: float
    sigma: float
    timestep: float


@dataclass(frozen=True)
class FlowMatching:
    """The schedule of flow matching: the straight line x = (1 - s) * x0 + s * e, from s = 1 to 0.

    The velocity "v" is e - x0, and the timestep is 1000 * s. steps: their number, equally spaced in s before the shift.
    shift: k > 0 moves them towards noise, s' = k * s / (1 + (k - 1) * s); larger videos need more (Wan 3 to 5,
    HunyuanVideo 7). Follows Lipman et al., arXiv:2210.02747, and Esser et al., arXiv:2403.03206.
    """

    steps: int
    shift: float = 1.0
    velocity = "velocity"

    def __post_init__(self) -> None:
        _positive_int("steps", self.steps)
        if number("shift", self.shift) <= 0:
            raise ValueError(f"shift={self.shift!r} must be a positive number")

    def levels(self) -> list[Level]:
        """Return the steps + 1 levels, from noise to data."""
        line = [1 - i / self.steps for i in range(self.steps)] + [0.0]
        shifted = [self.shift * s / (1 + (self.shift - 1) * s) for s in line]
        return [Level(1 - s, s, 1000 * s) for s in shifted]


@dataclass(frozen=True)
class Diffusion:
    """The schedule of a variance-preserving diffusion, alpha^2 + sigma^2 = 1, sampled by DDIM.

    "v" is alpha * e - sigma * x0. steps: at most train_steps, evenly spaced and ending at the noisiest ("trailing").
    betas: "scaled_linear" (0.00085 to 0.012, linear in the square root) or "cosine". zero_snr: rescale so that the
    noisiest level holds no signal; a model that predicts "noise" cannot start there. snr_shift: divide the
    signal-to-noise ratio by this (CogVideoX-2B: 3). Follows Song et al., arXiv:2010.02502, Nichol and Dhariwal,
    arXiv:2102.09672, and Lin et al., arXiv:2305.08891.
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
        flag("zero_snr", self.zero_snr)
        if number("snr_shift", self.snr_shift) <= 0:
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


def step_weights(levels: Sequence[Level], step: int, order: int, corrector: bool = False) -> tuple[float, ...]:
    """Return the weights of x, of x0 and of the steps' before, latest first, that give x at levels[step + 1].

    Order 1 has no history. Order 2 is DPM-Solver++ (2M), Lu et al., arXiv:2211.01095, with one earlier x0; it falls to
    order 1 where the logarithm of the signal-to-noise ratio is not finite, at pure noise and at data, and at the first
    step. corrector: UniPC (bh2), Zhao et al., arXiv:2302.04867, with up to two: the step before is first done again,
    now that x0 at its end is known. Both moves start from the same x, so they are one combination.
    """
    now, then = levels[step], levels[step + 1]
    ratio = then.sigma / now.sigma
    clean = then.alpha - now.alpha * ratio
    if order == 1 or step == 0:
        return ratio, clean
    before, here, after = (_half_log_snr(levels[step + i]) for i in (-1, 0, 1))
    extrapolated = 0.0
    if math.isfinite(before) and math.isfinite(here) and math.isfinite(after):
        extrapolated = clean * (after - here) / (here - before) / 2
    predicted = clean + extrapolated, -extrapolated
    if not corrector:
        return ratio, *predicted
    corrected = [ratio * each for each in _correction(levels, step)]
    return ratio, predicted[0] + corrected[0], predicted[1] + corrected[1], *corrected[2 : step + 1]


def _half_log_snr(level: Level) -> float:
    if level.alpha > 0 and level.sigma > 0:
        return math.log(level.alpha / level.sigma)
    return math.inf if level.sigma == 0 else -math.inf


def _correction(levels: Sequence[Level], step: int) -> tuple[float, float, float]:
    """Return what UniPC's corrector adds to x at a step >= 1: weights of x0 there, one step and two steps before."""
    here, before = _half_log_snr(levels[step]), _half_log_snr(levels[step - 1])
    h = here - before
    scale = -levels[step].alpha * math.expm1(-h)
    oldest = _half_log_snr(levels[step - 2]) if step > 1 else -math.inf
    if not math.isfinite(oldest):
        return 0.5 * scale, -0.5 * scale, 0.0
    # The weights r of x0's differences that integrate polynomials of degree 0 and 1 exactly.
    far = (oldest - before) / h
    phi = math.expm1(-h) / -h - 1
    first, second = phi / math.expm1(-h), (phi / -h - 0.5) * 2 / math.expm1(-h)
    r = (first - second) / (1 - far)
    new = first - r
    r = (r - 0.5) / far
    return scale * new, -scale * (r + new), scale * r


def _positive_int(name: str, value: object) -> None:
    if not is_int(value) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer")
