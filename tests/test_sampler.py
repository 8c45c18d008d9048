"""The sampling loop: guidance, text, masks, known regions, randomness. Its schedules: ``test_sampler_schedules.py``."""

from __future__ import annotations

import inspect

import pytest
import torch

from stattn import masks
from stattn.dit import DiT, DiTConfig
from stattn.sampler import Diffusion, FlowMatching, draw_noise, prepare, sample

SHAPE = (2, 3, 4, 6, 6)
SCHEDULES = [FlowMatching(7), FlowMatching(7, shift=5.0), Diffusion(10), Diffusion(10, betas="cosine", snr_shift=3.0)]


def _clips(seed: int = 3, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


# Guidance and text.


class Reader:
    """Answer with the sum of the valid text, and record the calls."""

    def __init__(self):
        self.calls: list[dict] = []

    def __call__(self, x, timestep, text=None, **keywords):
        self.calls.append({"batch": len(x), "text": text, "timestep": timestep, **keywords})
        valid = keywords.get("text_valid")
        if valid is None:
            valid = torch.full((len(x),), text.shape[1])
        if valid.ndim == 1:
            valid = torch.arange(text.shape[1]) < valid[:, None]
        value = (text * valid).sum(1).to(x.dtype)
        return value.view(-1, 1, 1, 1, 1) + torch.tanh(x)


TEXT, NEGATIVE = torch.tensor([[1, 2, 4], [3, 1, 1]]), torch.tensor([[5, 0, 1], [2, 2, 2]])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"text_valid": torch.tensor([3, 1])},
        {"negative": NEGATIVE},
        {"negative": NEGATIVE, "negative_valid": torch.tensor([1, 2])},
        {"negative": NEGATIVE, "negative_valid": torch.tensor([[True, False, True], [False, True, True]])},
        {"negative": NEGATIVE, "rescale": 0.7},
        {"negative": NEGATIVE, "zero_star": True},
    ],
    ids=lambda given: "+".join(given) or "text",
)
def test_guidance_in_one_call_equals_guidance_in_two(given):
    one, two = Reader(), Reader()
    options = {"text": TEXT, "steps": 3, "guidance": 2.5, "seed": 1, "prediction": "v"} | given
    both = [sample(model, SHAPE, batched=batched, **options) for model, batched in ((one, True), (two, False))]
    assert torch.equal(*both)
    assert [call["batch"] for call in one.calls] == [4] * 3
    assert [call["batch"] for call in two.calls] == [2] * 6


@pytest.mark.smoke
def test_guidance_extrapolates_from_empty_text_and_guidance_one_asks_for_no_second_prediction():
    x0 = [sample(Reader(), SHAPE, text=TEXT, steps=1, guidance=g, seed=1) for g in (0.0, 1.0, 3.0)]
    torch.testing.assert_close(x0[2], x0[0] + 3 * (x0[1] - x0[0]))
    torch.testing.assert_close(x0[1] - x0[0], torch.tensor([7.0, 5.0]).view(2, 1, 1, 1, 1).expand(SHAPE))
    model = Reader()
    sample(model, SHAPE, text=TEXT, negative=NEGATIVE, steps=2, seed=1)
    assert [call["batch"] for call in model.calls] == [2, 2]


def test_rescale_and_zero_star_change_the_result():
    def model(x, t, text, text_valid):
        return torch.tanh(x + text_valid.view(-1, 1, 1, 1, 1)) * (1 + text_valid).view(-1, 1, 1, 1, 1)

    plain, *others = (
        sample(model, SHAPE, text=TEXT, text_valid=torch.tensor([1, 2]), steps=3, guidance=4.0, seed=1, **each)
        for each in ({}, {"rescale": 0.5}, {"zero_star": True})
    )
    assert all((plain - each).abs().max() > 1e-2 for each in others)


def test_a_model_is_called_with_what_is_given_and_nothing_else():
    calls = []

    def model(*arguments, **keywords):
        calls.append((arguments, keywords))
        return arguments[0]

    sample(model, SHAPE, steps=1, seed=0)
    sample(model, SHAPE, steps=1, seed=0, text=TEXT, text_valid=torch.tensor([1, 2]), mask=masks.spatial())
    assert (len(calls[0][0]), calls[0][1]) == (2, {})
    assert calls[0][0][1].dtype == torch.float32
    assert calls[0][0][1].tolist() == [1000.0, 1000.0]
    assert (len(calls[1][0]), sorted(calls[1][1])) == (3, ["mask", "text_valid"])


def test_the_model_works_in_its_dtype_and_the_state_stays_in_float32():
    layer = torch.nn.Conv3d(3, 3, 1).to(torch.bfloat16)
    seen = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, timestep):
            seen.append(x.dtype)
            return self.layer(x)

    out = sample(Model(), SHAPE, steps=2, seed=0)
    assert (out.dtype, seen) == (torch.float32, [torch.bfloat16] * 2)
    assert not out.requires_grad
    assert sample(lambda x, t: x, SHAPE, steps=2, seed=0, dtype=torch.float64).dtype == torch.float64


def test_a_model_may_return_tokens():
    from stattn.ops.patchify import unpatchify3d

    def tokens(x, t):
        return torch.tanh(x).flatten().view(2, 12, 36)  # 4 x 6 x 6 in patches of 2 x 2 x 3

    whole = sample(lambda x, t: unpatchify3d(tokens(x, t), (2, 3, 2), (2, 2, 3), 3), SHAPE, steps=3, seed=0)
    assert torch.equal(sample(tokens, SHAPE, steps=3, seed=0, patch=(2, 2, 3)), whole)


@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_a_dit_encodes_its_text_once_and_is_asked_for_tokens(kind):
    config = DiTConfig(
        kind=kind, layers=2, heads=2, head_dim=12, ffn_dim=16, in_channels=3, out_channels=3, patch=(1, 2, 3),
        text_dim=8, text_len=3, freq_dim=16,
    )  # fmt: skip
    model = DiT(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    text = torch.randn(2, 3, 8)
    options = {"text": text, "steps": 3, "seed": 0, "guidance": 2.0, "prediction": "v"}
    plain = sample(lambda *arguments, **keywords: model(*arguments, **keywords), SHAPE, **options)
    calls, embed = [], model.embed_text
    model.embed_text = lambda *arguments: calls.append(arguments) or embed(*arguments)
    forward, asked = model.forward, []
    model.forward = lambda *arguments, **keywords: asked.append(keywords["tokens"]) or forward(*arguments, **keywords)
    assert torch.equal(sample(model, SHAPE, **options), plain)
    assert (len(calls), asked) == (1, [True] * 3)


# Masks.


def test_dense_layers_are_for_the_model_to_make():
    model = Reader()
    sample(model, SHAPE, text=TEXT, steps=2, seed=0, mask=masks.spatial(), dense_layers=3)
    assert [call["dense_layers"] for call in model.calls] == [3, 3]
    with pytest.raises(ValueError, match="dense_layers=-1"):
        sample(model, SHAPE, text=TEXT, steps=2, dense_layers=-1)


def test_the_first_steps_are_dense_and_a_function_chooses_per_step():
    window = masks.window(1, 3, 3)
    model = Reader()
    sample(model, SHAPE, text=TEXT, steps=4, seed=0, mask=window, dense_steps=2)
    assert [call["mask"] for call in model.calls] == [masks.full()] * 2 + [window] * 2
    model = Reader()
    sample(model, SHAPE, text=TEXT, steps=4, seed=0, mask=lambda step: window if step % 2 else None)
    assert [call.get("mask") for call in model.calls] == [None, window, None, window]


# Known regions.


def _hole() -> torch.Tensor:
    generated = torch.zeros(2, 1, 4, 6, 6)
    generated[0, :, 1:] = 1
    generated[1, :, :, 2:5, 1:4] = 1
    return generated


@pytest.mark.smoke
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("boolean", [False, True])
def test_the_result_equals_the_known_video_bitwise_outside_the_generated_region(schedule, boolean):
    known, generated = _clips(), _hole()
    known[0, 0, 0, 0, :2] = torch.tensor([-0.0, 1e-30])
    out = sample(
        lambda x, t: torch.tanh(3 * x), SHAPE, steps=schedule, seed=0, known=known,
        generated=generated.bool() if boolean else generated,
    )  # fmt: skip
    kept = (generated == 0).expand(SHAPE)
    assert torch.equal(out[kept].view(torch.int32), known[kept].view(torch.int32))
    assert (out - known)[~kept].abs().min() > 0


def test_the_known_region_is_at_the_right_noise_level_before_every_step():
    known, generated, noise = _clips(), _hole(), draw_noise(SHAPE, seed=7)
    schedule = FlowMatching(5, shift=2.0)
    kept, seen = (generated == 0).expand(SHAPE), []
    sample(
        lambda x, t: seen.append(x) or torch.zeros_like(x),
        SHAPE,
        steps=schedule,
        noise=noise,
        known=known,
        generated=generated,
    )
    for x, level in zip(seen, schedule.levels()[:-1], strict=True):
        torch.testing.assert_close(x[kept], (level.alpha * known + level.sigma * noise)[kept])
        if level.sigma == 1:
            torch.testing.assert_close(x[~kept], noise[~kept])


def test_the_content_of_known_where_it_is_generated_changes_nothing_even_nan():
    known, generated = _clips(), _hole()
    spoiled = torch.where(generated == 1, torch.nan, known)
    seen = []

    def model(x, t, known, known_mask):
        seen.append((known, known_mask))
        return torch.tanh(x + known)

    both = [
        sample(model, SHAPE, steps=3, seed=0, known=k, generated=generated, masked_input=True) for k in (known, spoiled)
    ]
    assert torch.equal(*both)
    assert torch.equal(seen[0][0], torch.where(generated == 1, 0, known))
    assert torch.equal(seen[0][1], 1 - generated)


def test_a_model_with_masked_input_reads_the_known_video_and_others_do_not():
    class Config:
        masked_input = True

    model = Reader()
    options = {"text": TEXT, "guidance": 2.0, "steps": 1, "seed": 0, "known": _clips(), "generated": _hole()[:1]}
    sample(model, SHAPE, **options)
    assert "known" not in model.calls[0]
    model.config = Config
    sample(model, SHAPE, **options)
    assert model.calls[1]["known"].shape == (4, *SHAPE[1:])
    assert model.calls[1]["known_mask"].shape == (4, 1, *SHAPE[2:])


def test_a_soft_edge_blends():
    known, generated = torch.ones(SHAPE), torch.full((1, 1, 1, 1, 1), 0.25)
    out = sample(lambda x, t: torch.zeros_like(x), SHAPE, steps=4, seed=0, known=known, generated=generated)
    torch.testing.assert_close(out, torch.full(SHAPE, 0.75))


# Randomness.


def _pointwise(x, t):
    return torch.tanh(1.7 * x - 0.2)


@pytest.mark.smoke
def test_a_sample_does_not_depend_on_its_batch():
    whole = sample(_pointwise, (3, *SHAPE[1:]), steps=4, seed=[5, 6, 7])
    assert torch.equal(whole, sample(_pointwise, (3, *SHAPE[1:]), steps=4, seed=5))
    for i in range(3):
        assert torch.equal(whole[i : i + 1], sample(_pointwise, (1, *SHAPE[1:]), steps=4, seed=5 + i))
    generators = [torch.Generator().manual_seed(5 + i) for i in range(3)]
    assert torch.equal(whole, sample(_pointwise, (3, *SHAPE[1:]), steps=4, generator=generators))


def test_one_generator_and_the_global_one_are_drawn_from_sample_by_sample():
    small, large = ((n, *SHAPE[1:]) for n in (1, 3))
    a, b = (draw_noise(shape, generator=torch.Generator().manual_seed(1)) for shape in (small, large))
    assert torch.equal(a[0], b[0])
    torch.manual_seed(1)
    assert torch.equal(draw_noise(large), b)
    assert not torch.equal(draw_noise(large), b)


def test_the_noise_is_standard_normal_and_differs_between_samples():
    noise = draw_noise((4, 3, 8, 32, 32), seed=0)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert (torch.corrcoef(noise.flatten(1)) - torch.eye(4)).abs().max() < 0.03


def test_inputs_are_not_modified():
    known, generated, noise = _clips(), _hole(), draw_noise(SHAPE, seed=1)
    copies = [each.clone() for each in (known, generated, noise)]
    sample(_pointwise, SHAPE, steps=3, noise=noise, known=known, generated=generated)
    assert all(torch.equal(a, b) for a, b in zip((known, generated, noise), copies, strict=True))


def test_the_callback_sees_every_step_and_the_predicted_video():
    seen, clean = [], _clips()
    sample(lambda x, t: clean, SHAPE, steps=3, seed=0, callback=lambda *each: seen.append(each))
    assert [each[:2] for each in seen] == [(1, 3), (2, 3), (3, 3)]
    assert all(torch.equal(each[2], clean) for each in seen)


# Errors.


REFUSED = [
    ({"shape": (2, 3, 4, 6)}, r"shape=\(2, 3, 4, 6\)"),
    ({"shape": (0, 3, 4, 6, 6)}, r"shape=\(0, 3"),
    ({"steps": "30"}, "steps='30'"),
    ({"steps": True}, "steps=True"),
    ({"prediction": "velocity"}, "prediction='velocity'"),
    ({"prediction": "noise"}, "prediction='noise' does not determine"),
    ({"order": 3}, "order=3"),
    ({"corrector": True}, "corrector=True.*order=2"),
    ({"rescale": 1.5}, "rescale=1.5"),
    ({"order": True}, "order=True"),
    ({"guidance": 2.0}, "needs text"),
    ({"guidance": "2"}, "guidance='2' must be a number"),
    ({"rescale": 0.5}, "rescale=0.5.*need a guidance other than 1"),
    ({"zero_star": True}, "zero_star=True need a guidance other than 1"),
    ({"zero_star": 1}, "zero_star=1 must be True or False"),
    ({"batched": "no"}, "batched='no' must be True or False"),
    ({"masked_input": 1}, "masked_input=1 must be True or False"),
    ({"text": "a red disc"}, "text of type str must be a tensor"),
    ({"text": TEXT, "text_valid": [1, 1]}, "text_valid of type list must be a tensor"),
    ({"callback": 3}, "callback=3 must be a function"),
    ({"device": "tpu"}, "device='tpu' is no device"),
    ({"impl": {"atention": "triton"}}, "the stem 'atention'"),
    ({"text": TEXT[:1]}, r"text of shape \(1, 3\)"),
    ({"text_valid": torch.tensor([1, 1])}, "text_valid is given without text"),
    ({"text": TEXT, "negative_valid": torch.tensor([1, 1])}, "negative_valid is given without negative"),
    ({"text": TEXT, "text_valid": torch.tensor([1])}, r"text_valid of shape \(1,\)"),
    ({"text": TEXT, "guidance": 2.0, "negative": NEGATIVE[:, :2]}, r"negative of shape \(2, 2\)"),
    ({"dense_steps": 1}, "dense_steps=1 needs a mask"),
    ({"dense_steps": 3, "mask": masks.spatial()}, r"dense_steps=3 must be an integer in 0..2"),
    ({"dense_steps": 1, "mask": lambda step: None}, "dense_steps=1 and a mask that is a function"),
    ({"known": torch.zeros(SHAPE)}, "known and generated go together"),
    ({"generated": torch.zeros(1, 1, 1, 1, 1)}, "known and generated go together"),
    ({"masked_input": True}, "known and generated go together"),
    ({"known": torch.zeros(1, *SHAPE[1:]), "generated": torch.ones(1, 1, 1, 1, 1)}, r"known of shape \(1, 3"),
    ({"known": torch.zeros(SHAPE).double(), "generated": torch.ones(1, 1, 1, 1, 1)}, "known of torch.float64"),
    ({"known": torch.zeros(SHAPE), "generated": torch.ones(2, 3, 4, 6, 6)}, r"generated of shape \(2, 3"),
    ({"known": torch.zeros(SHAPE), "generated": torch.ones(2, 1, 4)}, r"generated of shape \(2, 1, 4\)"),
    ({"known": torch.zeros(SHAPE), "generated": torch.full((1, 1, 1, 1, 1), 2.0)}, "generated must lie in 0..1"),
    ({"known": torch.zeros(SHAPE), "generated": torch.ones(1, 1, 1, 1, 1).long()}, "generated of torch.int64"),
    ({"seed": 0, "generator": torch.Generator()}, "exclude each other"),
    ({"seed": 0, "noise": torch.zeros(SHAPE)}, "exclude each other"),
    ({"seed": [1]}, r"seed=\[1\]"),
    ({"seed": True}, "seed=True"),
    ({"noise": [0.0]}, "noise of type list must be a tensor"),
    ({"shape": 5}, "shape=5 must be five positive integers"),
    ({"seed": 1.5}, "seed=1.5"),
    ({"seed": -1}, "seed=-1"),
    ({"generator": [torch.Generator()]}, "generator="),
    ({"noise": torch.zeros(1, 3, 4, 6, 6)}, r"noise of shape \(1, 3"),
    ({"dtype": torch.int32}, "dtype=torch.int32"),
    ({"impl": "fast"}, "impl='fast'"),
    ({"patch": (3, 2, 2)}, "output of shape"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_bad_arguments_are_refused_by_name(change, message):
    def model(x, t, text=None, **keywords):
        return x

    assert sample(model, SHAPE, steps=2, seed=0, text=TEXT, guidance=2.0).shape == SHAPE
    arguments = {"shape": SHAPE, "steps": 2} | change
    with pytest.raises((ValueError, TypeError), match=message):
        sample(model, **arguments)


def test_an_unknown_keyword_and_a_model_of_the_wrong_shape_are_refused():
    with pytest.raises(TypeError, match="stepz"):
        sample(_pointwise, SHAPE, stepz=2)
    with pytest.raises(ValueError, match=r"output of shape \(2, 2, 4, 6, 6\)"):
        sample(lambda x, t: x[:, :2], SHAPE, steps=2, seed=0)
    with pytest.raises(ValueError, match=r"model returned shape \(1, 3, 4, 6, 6\) for a batch of 2"):
        sample(lambda x, t: x[:1], SHAPE, steps=2, seed=0)


def test_a_graph_and_a_rollout_take_what_sample_takes_with_the_same_defaults():
    asked, prepared = (dict(inspect.signature(each).parameters) for each in (sample, prepare))
    assert asked.pop("callback").default is None
    assert asked == prepared
