"""denoise_step against hand-written formulas and diffusers' guiders; its noise against Philox's known answers."""

import math

import numpy as np
import pytest
import torch

from stattn.ops.denoise import denoise_step, philox_normal
from stattn.ops.patchify import unpatchify3d
from stattn.reference._philox import philox4x32

SHAPE = (2, 3, 2, 4, 6)


def latents(count, *shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *(shape or SHAPE), generator=generator, dtype=dtype).unbind()


def combination(*weights):
    """Options of a step that only combines, from the state and a prediction taken as it is."""
    return {"sigma": 0.5, "prediction": "sample", "target": "sample", "weights": weights}


def state_and_kinds(alpha, sigma):
    """A state at a noise level, and every kind of prediction that is right for it."""
    x0, e = latents(2)
    kinds = {"sample": x0, "noise": e, "velocity": e - x0, "v": alpha * e - sigma * x0}
    return alpha * x0 + sigma * e, kinds


@pytest.mark.parametrize("target", ["sample", "noise", "velocity", "v"])
@pytest.mark.parametrize("prediction", ["sample", "noise", "velocity", "v"])
@pytest.mark.parametrize(("alpha", "sigma"), [(0.3, 0.7), (0.6, 0.8), (1.0, 14.6)])
def test_every_prediction_converts_to_every_target(prediction, target, alpha, sigma):
    x, kinds = state_and_kinds(alpha, sigma)
    options = {"alpha": alpha, "sigma": sigma, "prediction": prediction, "target": target}
    following, converted = denoise_step(x, kinds[prediction], weights=(0.0, 2.0), **options)
    torch.testing.assert_close(converted, kinds[target], rtol=1e-10, atol=1e-10)
    assert torch.equal(following, 2 * converted)


def test_alpha_is_one_minus_sigma_unless_given():
    x, kinds = state_and_kinds(0.3, 0.7)
    options = {"sigma": 0.7, "weights": (1.0, 0.0)}
    default, given = (denoise_step(x, kinds["velocity"], **options, **each)[1] for each in ({}, {"alpha": 1 - 0.7}))
    torch.testing.assert_close(default, kinds["sample"], rtol=1e-12, atol=1e-12)
    assert torch.equal(default, given)
    with pytest.raises(ValueError, match="sigma=1.5 is above 1, so that alpha must be given"):
        denoise_step(x, x, sigma=1.5, weights=(1, 0))


def test_a_conversion_that_the_noise_level_does_not_determine_is_refused():
    x, out = latents(2)
    denoise_step(x, out, sigma=1.0, prediction="velocity", target="sample", weights=(1, 0))
    with pytest.raises(ValueError, match="prediction='noise' does not determine target='sample' at alpha=0"):
        denoise_step(x, out, sigma=1.0, prediction="noise", target="sample", weights=(1, 0))
    with pytest.raises(ValueError, match="prediction='sample' does not determine target='velocity'"):
        denoise_step(x, out, sigma=0.0, prediction="sample", target="velocity", weights=(1, 0))


def test_the_next_state_is_the_linear_combination_of_five_tensors():
    x, out, first, second, noise = latents(5)
    following, _ = denoise_step(
        x, out, **combination(0.5, -2.0, 0.25, 3.0), history=(first, second), noise=noise, noise_weight=-0.75
    )
    expected = 0.5 * x - 2 * out + 0.25 * first + 3 * second - 0.75 * noise
    torch.testing.assert_close(following, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="combine more than 5 tensors"):
        denoise_step(x, out, **combination(1, 1, 1, 1, 1), history=(x, x, x), noise=noise, noise_weight=1)


def test_a_weight_of_zero_leaves_its_tensor_out_whatever_it_holds():
    x, out = latents(2)
    bad = torch.full_like(x, float("nan"))
    options = {"history": (bad,), "noise": bad}
    assert torch.equal(denoise_step(x, out, **combination(1, 1, 0), **options)[0], x + out)
    assert torch.equal(denoise_step(bad, out, **combination(0, 1, 0), **options)[0], out)
    assert torch.equal(denoise_step(x, bad, **combination(0, 0, 0), **options)[0], torch.zeros_like(x))


def test_guidance_extrapolates_from_the_unconditional_output():
    x, cond, uncond = latents(3)
    _, guided = denoise_step(x, cond, uncond=uncond, guidance=5.5, **combination(1, 0))
    torch.testing.assert_close(guided, uncond + 5.5 * (cond - uncond), rtol=1e-12, atol=1e-12)
    for guidance, expected in ((1.0, cond), (0.0, uncond)):
        _, guided = denoise_step(x, cond, uncond=uncond, guidance=guidance, **combination(1, 0))
        torch.testing.assert_close(guided, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("zero_star", [False, True])
def test_rescaled_and_zero_star_guidance_equal_those_of_diffusers(rescale, zero_star):
    guiders = pytest.importorskip("diffusers.guiders")
    if zero_star:
        guider = guiders.ClassifierFreeZeroStarGuidance(4.0, zero_init_steps=0, guidance_rescale=rescale)
    else:
        guider = guiders.ClassifierFreeGuidance(4.0, guidance_rescale=rescale)
    guider.set_state(step=0, num_inference_steps=1, timestep=torch.tensor(500))
    x, cond, uncond = latents(3, dtype=torch.float32)
    expected = guider.forward(cond, uncond).pred
    _, guided = denoise_step(
        x, cond, uncond=uncond, guidance=4.0, rescale=rescale, zero_star=zero_star, **combination(1, 0)
    )
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)


def test_rescaling_gives_each_sample_the_deviation_of_its_conditional_output():
    x, cond, uncond = latents(3)
    cond = cond * torch.tensor([1.0, 5.0]).view(2, 1, 1, 1, 1)
    _, guided = denoise_step(x, cond, uncond=uncond, guidance=7.0, rescale=1.0, **combination(1, 0))
    torch.testing.assert_close(guided.flatten(1).std(1), cond.flatten(1).std(1))


def test_guidance_of_outputs_that_are_all_zero_is_zero_and_its_gradient_finite():
    x = latents(1)[0]
    cond, uncond = torch.zeros(2, *SHAPE, dtype=torch.float64).requires_grad_().unbind()
    _, guided = denoise_step(x, cond, uncond=uncond, guidance=3.0, rescale=0.7, zero_star=True, **combination(1, 0))
    assert torch.equal(guided, torch.zeros_like(guided))
    assert all(each.isfinite().all() for each in torch.autograd.grad(guided.sum(), (cond, uncond)))


def test_outputs_may_come_as_tokens_of_patches_with_padding():
    x, cond, uncond = latents(3, 2, 3, 3, 5, 6)
    tokens = torch.randn(2, 2, 2 * 3 * 3, 2 * 2 * 2 * 3, dtype=torch.float64)
    as_latents = [unpatchify3d(each, (2, 3, 3), (2, 2, 2), 3, size=(3, 5, 6)) for each in tokens]
    options = {"guidance": 4.0, "rescale": 0.5, "zero_star": True, "sigma": 0.4, "weights": (1.0, 0.5)}
    from_tokens = denoise_step(x, tokens[0], uncond=tokens[1], patch=(2, 2, 2), **options)
    from_latents = denoise_step(x, as_latents[0], uncond=as_latents[1], **options)
    assert all(torch.equal(a, b) for a, b in zip(from_tokens, from_latents, strict=True))


def test_outputs_in_bfloat16_update_a_state_in_float32():
    x, out = latents(2, dtype=torch.float32)
    following, clean = denoise_step(x, out.bfloat16(), sigma=0.4, weights=(0.5, 0.5))
    wide = denoise_step(x, out.bfloat16().float(), sigma=0.4, weights=(0.5, 0.5))
    assert following.dtype == clean.dtype == torch.float32
    assert torch.equal(following, wide[0])
    assert torch.equal(clean, wide[1])


def test_a_state_in_bfloat16_is_rounded_once_from_the_unrounded_prediction():
    x, out = (each.bfloat16() for each in latents(2, dtype=torch.float32))
    following, clean = denoise_step(x, out, sigma=0.4, weights=(0.3, 0.7))
    wide = denoise_step(x.float(), out.float(), sigma=0.4, weights=(0.3, 0.7))
    assert torch.equal(following, wide[0].bfloat16())
    assert torch.equal(clean, wide[1].bfloat16())


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
def test_the_known_region_is_noised_to_the_next_level_and_the_rest_generated(mask_dtype):
    x, out, known, noise = latents(4)
    generated = torch.zeros(1, 1, 2, 4, 6, dtype=mask_dtype)
    generated[:, :, 1, 1:3] = 1
    plain, _ = denoise_step(x, out, **combination(0.2, 0.8))
    options = {"known": known, "generated": generated, "noise": noise}
    following, _ = denoise_step(x, out, **combination(0.2, 0.8), **options, known_sigma=0.3)
    torch.testing.assert_close(following, torch.where(generated.bool(), plain, 0.7 * known + 0.3 * noise))
    assert torch.equal(following[:, :, 1, 1:3], plain[:, :, 1, 1:3])
    following, _ = denoise_step(x, out, **combination(0.2, 0.8), **options, known_sigma=0.6, known_alpha=0.8)
    torch.testing.assert_close(following, torch.where(generated.bool(), plain, 0.8 * known + 0.6 * noise))


def test_a_known_region_without_noise_is_kept_bitwise_and_shields_from_nan():
    x, out, known = latents(3, dtype=torch.float32)
    generated = torch.ones(2, 1, 1, 4, 6, dtype=torch.bool)
    generated[0, :, :, :2] = False
    out = out.masked_fill(~generated, float("nan"))
    known = known.masked_fill(generated, float("inf"))
    following, _ = denoise_step(x, out, **combination(0.2, 0.8), known=known, generated=generated)
    kept = (~generated).expand_as(x)
    assert torch.equal(following[kept].view(torch.int32), known[kept].view(torch.int32))
    assert following.isfinite().all()


def test_a_soft_mask_blends():
    x, out, known = latents(3)
    generated = torch.rand(2, 3, 2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, _ = denoise_step(x, out, **combination(0.2, 0.8))
    following, _ = denoise_step(x, out, **combination(0.2, 0.8), known=known, generated=generated)
    torch.testing.assert_close(following, generated * plain + (1 - generated) * known)


def test_gradients_are_right_for_every_tensor():
    small = (2, 1, 1, 2, 3)
    x, cond, uncond, past, noise, known = (each.requires_grad_() for each in latents(6, *small))
    generated = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)[None, None, None, None].requires_grad_()
    soft = generated.detach().clamp(0.1, 0.9).requires_grad_()

    def step(mask, *tensors):
        x, cond, uncond, past, noise, known = tensors
        return denoise_step(
            x, cond, uncond=uncond, guidance=3.0, rescale=0.4, zero_star=True, sigma=0.6, weights=(0.5, 0.7, -0.2),
            history=(past,), noise=noise, noise_weight=0.1, known=known, generated=mask, known_sigma=0.3,
        )  # fmt: skip

    tensors = (x, cond, uncond, past, noise, known)
    assert torch.autograd.gradcheck(lambda *a: step(generated.detach(), *a), tensors)
    assert torch.autograd.gradcheck(step, (soft, *tensors))


def test_a_sample_does_not_depend_on_its_batch():
    x, cond, uncond = latents(3, dtype=torch.float32)
    options = {"guidance": 4.0, "rescale": 0.7, "zero_star": True, "sigma": 0.4, "weights": (1.0, 0.5)}
    both = denoise_step(x, cond, uncond=uncond, seed=7, offset=3, noise_weight=0.2, **options)[0]
    second = denoise_step(x[1:], cond[1:], uncond=uncond[1:], seed=8, offset=3, noise_weight=0.2, **options)[0]
    assert torch.equal(both[1:], second)


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 6), (2, 3, 0, 4, 6)])
def test_an_empty_batch_or_no_frames_give_an_empty_result(shape):
    x = torch.ones(shape)
    outs = denoise_step(x, x, uncond=x, guidance=2, rescale=0.5, zero_star=True, seed=0, sigma=0.4, weights=(1, 1),
                        noise_weight=1)  # fmt: skip
    assert [tuple(each.shape) for each in outs] == [shape, shape]
    assert philox_normal(shape, 0).shape == shape


def test_inputs_of_any_strides_are_read_in_place_and_not_modified():
    x, cond, uncond, past = latents(4, dtype=torch.float32)
    views = [each.transpose(2, 4).contiguous().transpose(2, 4) for each in (x, cond, uncond, past)]
    options = {"guidance": 3.0, "sigma": 0.4, "weights": (1.0, 0.5, 0.2)}
    copies = [each.clone() for each in views]
    a = denoise_step(views[0], views[1], uncond=views[2], history=(views[3],), **options)
    b = denoise_step(x, cond, uncond=uncond, history=(past,), **options)
    assert all(torch.equal(left, right) for left, right in zip(a, b, strict=True))
    assert all(torch.equal(left, right) for left, right in zip(views, copies, strict=True))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, words):
    outs = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(each) for each in outs) == words


def philox_words(counter, key):
    """Philox4x32-10 in Python integers."""
    a, b, c, d = counter
    k, j = key
    for _ in range(10):
        high, low = divmod(a * 0xD2511F53, 1 << 32)
        High, Low = divmod(c * 0xCD9E8D57, 1 << 32)
        a, b, c, d = High ^ b ^ k, Low, high ^ d ^ j, low
        k, j = (k + 0x9E3779B9) % (1 << 32), (j + 0xBB67AE85) % (1 << 32)
    return a, b, c, d


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (5, 3), (2**40 + 9, 2**33 + 1), (2**63 - 2, 2**63 - 1)])
def test_each_normal_number_is_a_function_of_seed_offset_and_place(seed, offset):
    numbers = philox_normal((2, 3, 5), seed, offset=offset)
    for sample in range(2):
        for place in range(15):
            key = divmod(seed + sample, 1 << 32)[::-1]
            words = philox_words((place // 4, 0, offset % (1 << 32), offset >> 32), key)
            pair = place % 4 // 2 * 2
            u, v = (
                float(np.float32(np.float32(w) * np.float32(2**-32) + np.float32(2**-33))) for w in words[pair:][:2]
            )
            radius, angle = math.sqrt(-2 * math.log(u)), 2 * math.pi * v
            expected = radius * (math.sin(angle) if place % 2 else math.cos(angle))
            assert numbers[sample].flatten()[place].item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_philox_numbers_are_standard_normal_and_independent_of_their_neighbours():
    stats = pytest.importorskip("scipy.stats")
    n = 2**18
    numbers = philox_normal((2, n), 1234)
    assert stats.kstest(numbers.flatten().numpy(), "norm").pvalue > 1e-3
    assert numbers.isfinite().all()
    others = philox_normal((2, n), 1234, offset=1)
    bound = 5 / math.sqrt(n)  # five standard deviations of a correlation of n pairs
    for a, b in ((numbers[0], numbers[1]), (numbers, others), (numbers[:, 1:], numbers[:, :-1])):
        assert abs((a * b).mean()) < bound
        assert abs((a.square() * b.square()).mean() - 1) < 8 * bound


def test_noise_of_a_seed_is_that_of_philox_normal():
    x, out = latents(2, dtype=torch.float32)
    drawn = philox_normal(SHAPE, 11, offset=4)
    options = combination(1.0, 0.5) | {"noise_weight": 0.3, "known": out, "known_sigma": 0.4}
    options["generated"] = torch.tensor([0, 1, 0, 1, 0, 1]).bool()[None, None, None, None]
    from_seed = denoise_step(x, out, seed=11, offset=4, **options)[0]
    assert torch.equal(from_seed, denoise_step(x, out, noise=drawn, **options)[0])
    assert torch.equal(from_seed, denoise_step(x, out, seed=torch.tensor([11, 12]), offset=4, **options)[0])
    assert not torch.equal(from_seed, denoise_step(x, out, seed=11, offset=5, **options)[0])


def test_arguments_without_effect_are_refused():
    x, out = latents(2)
    options = combination(1, 1)
    denoise_step(x, out, **options)
    for extra in ({"guidance": 2.0}, {"rescale": 0.5}, {"zero_star": True}):
        denoise_step(x, out, uncond=x, **extra, **options)
        with pytest.raises(ValueError, match="need uncond"):
            denoise_step(x, out, **extra, **options)
    with pytest.raises(ValueError, match="known_sigma=0.5, known_alpha=None have no effect without known"):
        denoise_step(x, out, known_sigma=0.5, **options)
    with pytest.raises(ValueError, match="known and generated go together"):
        denoise_step(x, out, known=x, **options)
    with pytest.raises(ValueError, match="offset=3 has no effect without seed"):
        denoise_step(x, out, offset=3, **options)
    with pytest.raises(ValueError, match="noise_weight=0.5 and known_sigma=0.0 need noise or seed"):
        denoise_step(x, out, noise_weight=0.5, **options)
    with pytest.raises(ValueError, match="known_sigma=0.5 need noise or seed"):
        denoise_step(x, out, known=x, generated=torch.ones(1, 1, 1, 1, 1), known_sigma=0.5, **options)
    with pytest.raises(ValueError, match="noise and seed=1 exclude each other"):
        denoise_step(x, out, noise=x, seed=1, **options)


def test_wrong_numbers_and_names_are_refused():
    x, out = latents(2)
    good = {"sigma": 0.5, "weights": (1.0, 0.5)}
    denoise_step(x, out, **good)
    for wrong, message in [
        ({"sigma": -0.1}, "sigma=-0.1 must not be negative"),
        ({"sigma": float("nan")}, "sigma=nan must be finite"),
        ({"guidance": 10**400, "uncond": x}, "guidance=10+ must be finite"),
        ({"alpha": -1.0}, "alpha=-1.0 must not be negative"),
        ({"prediction": "x0"}, "prediction='x0' must be one of sample, noise, velocity, v"),
        ({"target": "epsilon"}, "target='epsilon' must be one of"),
        ({"weights": (1.0,)}, "weights=.* must be 2 numbers"),
        ({"weights": (1.0, 0.5, 0.1)}, "weights=.* must be 2 numbers"),
        ({"weights": (1.0, float("inf"))}, r"weights\[1\]=inf must be finite"),
        ({"uncond": x, "rescale": 1.5}, r"rescale=1.5 must lie in \[0, 1\]"),
        ({"patch": (1, 2)}, r"patch=\(1, 2\) must be three positive integers"),
        ({"seed": -1}, r"seed=-1 must be an integer in \[0, 2\^63 - B\]"),
        ({"seed": 1, "offset": -1}, "offset=-1 must be an integer"),
        ({"impl": "slow"}, "impl='slow'"),
    ]:
        with pytest.raises(ValueError, match=message):
            denoise_step(x, out, **(good | wrong))
    for wrong, message in [
        ({"sigma": torch.tensor(0.5)}, "sigma=.* must be a number"),
        ({"guidance": "high", "uncond": x}, "guidance='high' must be a number"),
        ({"zero_star": 1, "uncond": x}, "zero_star=1 must be True or False"),
        ({"seed": torch.tensor([1.0, 2.0])}, "seed of torch.float32"),
        ({"weights": 1.0}, "weights of type float must be a sequence of numbers"),
        ({"history": None}, "history of type NoneType must be a sequence of tensors"),
    ]:
        with pytest.raises(TypeError, match=message):
            denoise_step(x, out, **(good | wrong))


def test_wrong_shapes_dtypes_and_devices_are_refused():
    x, out = latents(2)
    tokens, mask = torch.ones(2, 12, 12), torch.ones(1, 1, 1, 1, 1)
    good = {"sigma": 0.5, "weights": (1.0, 0.5)}
    denoise_step(x, out, uncond=out, noise=x, known=x, generated=mask, **good)
    denoise_step(x, tokens, patch=(1, 2, 2), **good)
    with pytest.raises(ValueError, match=r"sample of shape \(3, 2, 4, 6\) must be \[B, C, T, H, W\]"):
        denoise_step(x[0], out, **good)
    with pytest.raises(ValueError, match=r"output of shape \(2, 3, 2, 4, 5\)"):
        denoise_step(x, out[..., :5], **good)
    with pytest.raises(ValueError, match=r"output of shape \(2, 12, 12\) holds tokens: patch"):
        denoise_step(x, tokens, **good)
    with pytest.raises(
        ValueError, match=r"output of shape \(2, 12, 12\) must be \[B, N, pt\*ph\*pw\*C\] = \(2, 6, 24\)"
    ):
        denoise_step(x, tokens, patch=(2, 2, 2), **good)
    with pytest.raises(TypeError, match="uncond of torch.float32 must have the dtype of output, torch.float64"):
        denoise_step(x, out, uncond=out.float(), **good)
    with pytest.raises(ValueError, match=r"history\[0\] of shape \(1, 3, 2, 4, 6\)"):
        denoise_step(x, out, sigma=0.5, weights=(1, 1, 1), history=(x[:1],))
    with pytest.raises(ValueError, match=r"noise of shape \(1, 3, 2, 4, 6\)"):
        denoise_step(x, out, noise=x[:1], **good)
    with pytest.raises(ValueError, match=r"known of shape \(1, 3, 2, 4, 6\)"):
        denoise_step(x, out, known=x[:1], generated=mask, **good)
    with pytest.raises(ValueError, match=r"generated of shape \(2, 4, 6\) must broadcast"):
        denoise_step(x, out, known=x, generated=torch.ones(2, 4, 6), **good)
    with pytest.raises(TypeError, match="generated of torch.int64"):
        denoise_step(x, out, known=x, generated=mask.long(), **good)
    with pytest.raises(ValueError, match=r"seed of shape \(3,\)"):
        denoise_step(x, out, seed=torch.arange(3), **good)
    with pytest.raises(ValueError, match="uncond is on meta, sample on cpu"):
        denoise_step(x, out, uncond=out.to("meta"), **good)


def test_philox_normal_refuses_wrong_seeds():
    assert philox_normal((2, 3), torch.tensor([4, 5])).equal(philox_normal((2, 3), 4))
    with pytest.raises(ValueError, match="seed=1.5"):
        philox_normal((2, 3), 1.5)
    with pytest.raises(ValueError, match=r"seed of shape \(2,\)"):
        philox_normal((3, 3), torch.tensor([4, 5]))
    with pytest.raises(ValueError, match=r"shape=\(\) must be"):
        philox_normal((), 4)
    with pytest.raises(ValueError, match=r"shape=\(-1, 2\) must be"):
        philox_normal((-1, 2), 4)
    with pytest.raises(ValueError, match="device='tpu' is no device"):
        philox_normal((2, 3), 4, device="tpu")
