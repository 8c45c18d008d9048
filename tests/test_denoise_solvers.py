"""denoise_step with the weights of Euler, DDIM, DPM-Solver++ and UniPC, step by step against diffusers' schedulers."""

import math

import numpy as np
import pytest
import torch

from stattn.ops.denoise import denoise_step

diffusers = pytest.importorskip("diffusers.schedulers")

# How many steps, and by what: the kernels run in Triton's interpreter on a CPU, slowly.
RUNS = [
    (5, "reference", "cpu"),
    (20, "reference", "cpu"),
    (50, "reference", "cpu"),
    pytest.param(5, "triton", "cpu", marks=pytest.mark.interpreter),
    *(pytest.param(steps, "triton", "cuda", marks=pytest.mark.gpu) for steps in (5, 20, 50)),
]
every_run = pytest.mark.parametrize(("steps", "impl", "device"), RUNS)


def latents(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, 3, 2, 4, 6, generator=generator).unbind()


def euler_weights(sigmas, i):
    return {"target": "velocity", "weights": (1.0, sigmas[i + 1] - sigmas[i])}


def ddim_weights(now, then, eta=0.0):
    """DDIM from (alpha, sigma) to (alpha', sigma'): target x0, and a share of the noise drawn anew."""
    (a, s), (b, r) = now, then
    fresh = eta * r / s * math.sqrt(max(1 - (a / b) ** 2, 0.0))
    direction = math.sqrt(r**2 - fresh**2) / s
    return {"weights": (direction, b - direction * a), "noise_weight": fresh}


def half_log_snr(level):
    alpha, sigma = level
    return math.inf if sigma == 0 else math.log(alpha) - math.log(sigma)


def dpm_weights(levels, i, first_order):
    """DPM-Solver++ (2M): target x0, one earlier x0."""
    (_, s), (b, r) = levels[i], levels[i + 1]
    h = half_log_snr(levels[i + 1]) - half_log_snr(levels[i])
    gain = -b * math.expm1(-h)
    if first_order:
        return (r / s, gain, 0.0)
    ratio = (half_log_snr(levels[i]) - half_log_snr(levels[i - 1])) / h
    return (r / s, gain * (1 + 0.5 / ratio), -gain * 0.5 / ratio)


def unipc_weights(levels, i, order, corrects):
    """UniPC (bh2, order 2) with its corrector: target x0, two earlier x0.

    The corrector of step i covers the interval of the predictor before it, from the same state and the same earlier x0:
    their difference is a combination of x0 alone, so that no earlier state is needed and both moves are one step.
    """
    x, new, last, oldest = 1.0, 0.0, 0.0, 0.0
    if corrects:
        h = half_log_snr(levels[i]) - half_log_snr(levels[i - 1])
        scale = -levels[i][0] * math.expm1(-h)
        if corrects == 1:
            new, last = 0.5 * scale, -0.5 * scale
        else:
            ratio = (half_log_snr(levels[i - 2]) - half_log_snr(levels[i - 1])) / h
            phi = math.expm1(-h) / -h - 1
            moments = np.array([phi, (phi / -h - 0.5) * 2]) / math.expm1(-h)
            rho, rho_new = np.linalg.solve(np.array([[1.0, 1.0], [ratio, 1.0]]), moments)
            rho = (rho - 0.5) / ratio
            new, last, oldest = scale * rho_new, -scale * (rho + rho_new), scale * rho
    (_, s), (b, r) = levels[i], levels[i + 1]
    h = half_log_snr(levels[i + 1]) - half_log_snr(levels[i])
    scale = -b * math.expm1(-h)
    weights = [r / s * each for each in (x, new, last, oldest)]
    weights[1] += scale
    if order == 2:
        ratio = (half_log_snr(levels[i - 1]) - half_log_snr(levels[i])) / h
        weights[1] -= 0.5 * scale / ratio
        weights[2] += 0.5 * scale / ratio
    return tuple(float(each) for each in weights)


def flow_levels(sigmas):
    return [(1 - float(s), float(s)) for s in sigmas]


def preserving_levels(sigmas):
    """(alpha, sigma) of variance-preserving diffusion from sigma / alpha."""
    return [(1 / math.sqrt(1 + float(s) ** 2), float(s) / math.sqrt(1 + float(s) ** 2)) for s in sigmas]


def follow(scheduler, outputs, x, step, device):
    """Walk a scheduler and ``step(i, x, output, history) -> (x', x0)`` side by side, with the same model outputs."""
    theirs = ours = x
    history = [torch.zeros_like(x).to(device)] * 2
    for i, (t, output) in enumerate(zip(scheduler.timesteps, outputs, strict=True)):
        theirs = scheduler.step(output, t, theirs, return_dict=False)[0]
        ours, clean = step(i, ours.to(device), output.to(device), history)
        history = [clean, history[0]]
        # The terms of a step are as large as the largest element, so that is what its rounding is relative to.
        error = (ours.cpu() - theirs).abs().max() / theirs.abs().max().clamp(min=1)
        assert error < 1e-5, f"step {i}: {error}"


@every_run
def test_euler_flow_matching_equals_the_scheduler_of_diffusers(steps, impl, device):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(steps)
    sigmas = [float(each) for each in scheduler.sigmas]
    x, *outputs = latents(steps + 1)

    def step(i, x, out, _):
        return denoise_step(x, out, sigma=sigmas[i], impl=impl, **euler_weights(sigmas, i))

    follow(scheduler, outputs, x, step, device)


@pytest.mark.parametrize(
    ("theirs", "ours", "zero_snr"),
    [
        ("epsilon", "noise", False),
        ("sample", "sample", False),
        ("v_prediction", "v", False),
        ("sample", "sample", True),
        ("v_prediction", "v", True),
    ],
)
@every_run
def test_ddim_equals_the_scheduler_of_diffusers(theirs, ours, zero_snr, steps, impl, device):
    scheduler = diffusers.DDIMScheduler(
        prediction_type=theirs, clip_sample=False, rescale_betas_zero_snr=zero_snr, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    products = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps]
    levels = [(math.sqrt(p), math.sqrt(1 - p)) for p in [*products, float(scheduler.final_alpha_cumprod)]]
    x, *outputs = latents(steps + 1)

    def step(i, x, out, _):
        (alpha, sigma), then = levels[i : i + 2]
        options = {"prediction": ours, **ddim_weights(levels[i], then)}
        return denoise_step(x, out, alpha=alpha, sigma=sigma, impl=impl, **options)

    follow(scheduler, outputs, x, step, device)


def test_ddim_with_fresh_noise_equals_the_scheduler_of_diffusers():
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(8)
    t = scheduler.timesteps[3]
    a, b = (float(scheduler.alphas_cumprod[each]) for each in scheduler.timesteps[3:5])
    levels = [(math.sqrt(p), math.sqrt(1 - p)) for p in (a, b)]
    x, out, noise = latents(3)
    theirs = scheduler.step(out, t, x, eta=0.8, variance_noise=noise).prev_sample
    # diffusers takes the previous level from t - 1000 // steps, which is the next timestep here.
    options = ddim_weights(*levels, eta=0.8)
    ours, _ = denoise_step(x, out, alpha=levels[0][0], sigma=levels[0][1], prediction="v", noise=noise, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flow", [True, False])
@every_run
def test_dpm_solver_2m_equals_the_scheduler_of_diffusers(flow, steps, impl, device):
    kind = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = diffusers.DPMSolverMultistepScheduler(**(kind if flow else {"prediction_type": "v_prediction"}))
    scheduler.set_timesteps(steps)
    levels = (flow_levels if flow else preserving_levels)(scheduler.sigmas)
    x, *outputs = latents(steps + 1)

    def step(i, x, out, history):
        weights = dpm_weights(levels, i, first_order=i in (0, steps - 1))
        alpha, sigma = levels[i]
        options = {"prediction": "velocity" if flow else "v", "weights": weights, "history": history[:1]}
        return denoise_step(x, out, alpha=alpha, sigma=sigma, impl=impl, **options)

    follow(scheduler, outputs, x, step, device)


@pytest.mark.parametrize("flow", [True, False])
@every_run
def test_unipc_with_its_corrector_is_one_step_and_equals_the_scheduler_of_diffusers(flow, steps, impl, device):
    kind = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = diffusers.UniPCMultistepScheduler(**(kind if flow else {"prediction_type": "v_prediction"}))
    scheduler.set_timesteps(steps)
    levels = (flow_levels if flow else preserving_levels)(scheduler.sigmas)
    x, *outputs = latents(steps + 1)

    def step(i, x, out, history):
        order = 1 if i in (0, steps - 1) else 2
        corrects = 0 if i == 0 else 1 if i == 1 else 2
        alpha, sigma = levels[i]
        weights = unipc_weights(levels, i, order, corrects)
        options = {"prediction": "velocity" if flow else "v", "weights": weights, "history": history}
        return denoise_step(x, out, alpha=alpha, sigma=sigma, impl=impl, **options)

    follow(scheduler, outputs, x, step, device)
