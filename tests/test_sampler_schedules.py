"""Noise schedules and solvers: against models whose answer is known, and step by step against diffusers' schedulers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stattn.sampler import Diffusion, FlowMatching, Level, draw_noise, sample, step_weights

SHAPE = (2, 3, 4, 6, 6)
SCHEDULES = [FlowMatching(7), FlowMatching(7, shift=5.0), Diffusion(10), Diffusion(10, betas="cosine", snr_shift=3.0)]


def _clips(seed: int = 3, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


class Oracle:
    """Know the clean video, and answer with the prediction that it implies at each level."""

    def __init__(self, clean: torch.Tensor, schedule, prediction: str):
        self.clean, self.prediction, self.schedule = clean, prediction, schedule
        self.levels = {round(level.timestep, 6): level for level in schedule.levels()[:-1]}

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        alpha, sigma, _ = self.levels[min(self.levels, key=lambda t: abs(t - timestep[0].item()))]
        clean = self.clean.to(x)
        noise = (x - alpha * clean) / sigma
        velocity = noise - clean if isinstance(self.schedule, FlowMatching) else alpha * noise - sigma * clean
        return {"x": clean, "noise": noise, "v": velocity}[self.prediction]


def _gaussian(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Predict E[x0 | x] for data N(0.3, 0.5^2) under flow matching."""
    s = (timestep / 1000).double().view(-1, 1, 1, 1, 1)
    variance = (1 - s) ** 2 * 0.25 + s**2
    return (0.3 + (1 - s) * 0.25 / variance * (x.double() - (1 - s) * 0.3)).to(x.dtype)


# Schedules.


def test_flow_matching_levels_run_from_noise_to_data_and_the_shift_moves_them_towards_noise():
    plain, shifted = FlowMatching(4).levels(), FlowMatching(4, shift=3.0).levels()
    assert [level.sigma for level in plain] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [level.timestep for level in plain] == [1000.0, 750.0, 500.0, 250.0, 0.0]
    assert [level.sigma for level in shifted] == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert all(level.alpha == 1 - level.sigma for level in shifted)


@pytest.mark.parametrize("schedule", SCHEDULES[2:], ids=str)
def test_diffusion_levels_keep_the_variance_and_start_without_signal(schedule):
    levels = schedule.levels()
    assert len(levels) == 11
    assert all(level.alpha**2 + level.sigma**2 == pytest.approx(1) for level in levels)
    assert (levels[0].alpha, levels[0].timestep) == (0.0, 999.0)
    assert (levels[-1].alpha, levels[-1].sigma) == (1.0, 0.0)
    sigmas = [level.sigma for level in levels]
    assert sigmas == sorted(sigmas, reverse=True)


def test_the_snr_shift_divides_the_signal_to_noise_ratio():
    plain, shifted = (Diffusion(5, zero_snr=False, snr_shift=k).signal() for k in (1.0, 3.0))
    np.testing.assert_allclose(shifted / (1 - shifted), plain / (1 - plain) / 3, rtol=1e-9)


@pytest.mark.parametrize("betas", ["scaled_linear", "cosine"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_signals_equal_those_of_diffusers(betas, zero_snr):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule={"scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}[betas],
        rescale_betas_zero_snr=zero_snr,
    )
    ours = Diffusion(10, betas=betas, zero_snr=zero_snr).signal()
    torch.testing.assert_close(torch.from_numpy(ours).float(), theirs.alphas_cumprod, rtol=2e-4, atol=2e-7)


# Exactness and order.


# The noise does not determine the video where there is nothing but noise, so that it has schedules of its own.
ALL_PREDICTIONS = [
    *((schedule, prediction) for schedule in SCHEDULES for prediction in ("x", "v")),
    (Diffusion(10, zero_snr=False), "noise"),
    (Diffusion(10, betas="cosine", zero_snr=False), "noise"),
]


@pytest.mark.parametrize("schedule, prediction", ALL_PREDICTIONS, ids=str)
@pytest.mark.parametrize("order", [1, 2])
def test_a_model_that_knows_the_video_is_sampled_exactly(schedule, prediction, order):
    clean = _clips()
    out = sample(
        Oracle(clean, schedule, prediction), SHAPE, steps=schedule, prediction=prediction, order=order, seed=0,
        dtype=torch.float64,
    )  # fmt: skip
    # Dividing by alpha at the noisiest level of the cosine schedule (5e-5) magnifies rounding by its inverse.
    torch.testing.assert_close(out, clean.double(), rtol=0, atol=1e-9)


@pytest.mark.smoke
def test_a_clean_prediction_is_returned_bitwise():
    clean = _clips()
    out = sample(lambda x, t: clean, SHAPE, steps=5, seed=0)
    assert torch.equal(out, clean)


@pytest.mark.parametrize(
    ("order", "corrector", "steps", "low", "high"),
    [(1, False, 40, 0.9, 1.1), (2, False, 160, 1.7, 2.2), (2, True, 160, 1.7, 3.2)],
)
def test_the_error_falls_with_the_order_of_the_solver(order, corrector, steps, low, high):
    shape = (1, 1, 1, 2, 2)
    noise = torch.linspace(-1.5, 1.5, 4, dtype=torch.float64).view(shape)
    exact = 0.3 + 0.5 * noise  # the flow of a Gaussian carries quantiles to quantiles
    errors = [
        (sample(_gaussian, shape, steps=n, order=order, corrector=corrector, noise=noise, dtype=torch.float64) - exact)
        .abs()
        .max()
        .item()
        for n in (steps, 2 * steps)
    ]
    assert errors[0] < 0.05
    assert low < math.log2(errors[0] / errors[1]) < high


def test_order_two_weights_sum_to_order_one_weights_and_fall_back_at_the_ends():
    levels = FlowMatching(5).levels()
    for step in range(5):
        first, second = step_weights(levels, step, 1), step_weights(levels, step, 2)
        assert second[0] == first[0]
        assert sum(second[1:]) == pytest.approx(first[1])
        assert (len(second), second[2:] in ((), (0.0,))) == (2 if step == 0 else 3, step in (0, 1, 4))


# Against diffusers.


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_steps_equal_those_of_diffusers_flow_matching(shift):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 0.0, 9)[:-1].tolist())
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))

    def model(x, t):
        return torch.tanh(torch.einsum("dc,bcthw->bdthw", weight, x) * (t / 1000).view(-1, 1, 1, 1, 1))

    noise = draw_noise(SHAPE, seed=4)
    x = noise
    for t in theirs.timesteps:
        x = theirs.step(model(x, t.expand(2)), t, x, return_dict=False)[0]
    ours = sample(model, SHAPE, steps=FlowMatching(8, shift=shift), prediction="v", noise=noise)
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "prediction, zero_snr", [("v", False), ("v", True), ("x", False), ("x", True), ("noise", False)]
)
def test_ddim_steps_equal_those_of_diffusers(prediction, zero_snr):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type={"v": "v_prediction", "noise": "epsilon", "x": "sample"}[prediction],
        timestep_spacing="trailing",
        rescale_betas_zero_snr=zero_snr,
    )
    theirs.set_timesteps(20)

    def model(x, t):
        return torch.tanh(x.roll(1, 1) + (t / 1000).view(-1, 1, 1, 1, 1))

    noise = draw_noise(SHAPE, seed=4)
    x = noise
    for t in theirs.timesteps:
        x = theirs.step(model(x, t.expand(2).float()), t, x, return_dict=False)[0]
    ours = sample(model, SHAPE, steps=Diffusion(20, zero_snr=zero_snr), prediction=prediction, noise=noise)
    torch.testing.assert_close(ours, x, rtol=2e-4, atol=2e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers under numpy 2
def test_second_order_steps_equal_those_of_diffusers_dpm_solver():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        solver_order=2,
        lower_order_final=True,
    )
    theirs.set_timesteps(20)

    def model(x, t):
        return torch.tanh(x.roll(1, 1) + (t / 1000).view(-1, 1, 1, 1, 1))

    noise = draw_noise(SHAPE, seed=4)
    x = noise
    for t in theirs.timesteps:
        x = theirs.step(model(x, t.expand(2).float()), t, x, return_dict=False)[0]
    ours = sample(model, SHAPE, steps=Diffusion(20, zero_snr=False), prediction="v", order=2, noise=noise)
    torch.testing.assert_close(ours, x, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("shift", [None, 3.0])
def test_corrected_steps_equal_those_of_diffusers_unipc(shift):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UniPCMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction" if shift is None else "flow_prediction",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        solver_order=2,
        lower_order_final=True,
        use_flow_sigmas=shift is not None,
        flow_shift=shift,
    )
    theirs.set_timesteps(20)
    schedule = Diffusion(20, zero_snr=False)
    if shift is not None:

        class Theirs(FlowMatching):
            def levels(self):
                sigmas = [float(each) for each in theirs.sigmas]
                return [Level(1 - s, s, 1000 * s) for s in sigmas]

        schedule = Theirs(20)

    def model(x, t):
        return torch.tanh(x.roll(1, 1) + (t / 1000).view(-1, 1, 1, 1, 1))

    noise = draw_noise(SHAPE, seed=4)
    x = noise
    for level, t in zip(schedule.levels(), theirs.timesteps, strict=False):
        at = torch.full((2,), level.timestep)
        x = theirs.step(model(x, at), t, x, return_dict=False)[0]
    ours = sample(model, SHAPE, steps=schedule, prediction="v", order=2, corrector=True, noise=noise)
    torch.testing.assert_close(ours, x, rtol=2e-4, atol=2e-4)
    plain = sample(model, SHAPE, steps=schedule, prediction="v", order=2, noise=noise)
    assert (plain - x).abs().max() > 1e-3


# Errors.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowMatching(0), "steps=0"),
        (lambda: FlowMatching(2.0), "steps=2.0"),
        (lambda: FlowMatching(True), "steps=True"),
        (lambda: FlowMatching(2, shift=0), "shift=0"),
        (lambda: FlowMatching(2, shift=math.inf), "shift=inf"),
        (lambda: Diffusion(0), "steps=0"),
        (lambda: Diffusion(1001), "steps=1001"),
        (lambda: Diffusion(10, betas="linear"), "betas='linear'"),
        (lambda: Diffusion(10, snr_shift=-1), "snr_shift=-1"),
        (lambda: Diffusion(10, train_steps=0), "train_steps=0"),
    ],
)
def test_a_schedule_refuses_bad_numbers_by_name(make, message):
    assert len(FlowMatching(1, shift=1).levels()) == len(Diffusion(1).levels()) == 2
    with pytest.raises(ValueError, match=message):
        make()
