"""The Triton kernels of denoise_step and philox_normal: small under the interpreter, at Wan's size on a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stattn.kernels import denoise as kernels
from stattn.kernels._philox import NORMAL_QUADS
from stattn.ops.denoise import DENOISE_STEP, DenoiseCall, denoise_step, philox_normal
from stattn.problem import Step
from stattn.reference.denoise import conversion
from stattn.reference.denoise_backward import denoise_step_backward

CPU = pytest.param("cpu", marks=pytest.mark.interpreter)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = (CPU, CUDA)
# (device, state, output)
DTYPES = (
    pytest.param("cpu", torch.float32, torch.float32, marks=pytest.mark.interpreter),
    pytest.param("cpu", torch.float32, torch.float16, marks=pytest.mark.interpreter),
    pytest.param("cpu", torch.float16, torch.float16, marks=pytest.mark.interpreter),
    pytest.param("cuda", torch.float32, torch.float32, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float32, torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, torch.bfloat16, marks=pytest.mark.gpu),
)
SMALL = ((2, 3, 2, 4, 6), (1, 5, 1, 3, 5))
WAN = (1, 16, 21, 90, 160)

# What a step is made of, each alone and all together. An int is how many earlier tensors.
STEPS: dict[str, dict[str, Any]] = {
    "euler": {"target": "velocity", "weights": (1.0, -0.1)},
    "guided": {"guidance": 5.0, "weights": (0.8, 0.2)},
    "rescaled": {"guidance": 4.0, "rescale": 0.7, "weights": (0.8, 0.2), "prediction": "noise"},
    "zero star": {"guidance": 4.0, "zero_star": True, "weights": (0.8, 0.2), "prediction": "v"},
    "both": {"guidance": 7.5, "rescale": 0.4, "zero_star": True, "weights": (0.8, 0.2)},
    "unipc": {"guidance": 3.0, "history": 2, "weights": (0.9, 0.3, -0.15, 0.05)},
    "three": {"history": 3, "weights": (0.9, 0.3, -0.15, 0.05, 0.02)},
    "noise": {"noise": True, "noise_weight": 0.3, "weights": (0.8, 0.2)},
    "seed": {"seed": 5, "offset": 2**33 + 3, "noise_weight": 0.3, "weights": (0.8, 0.2)},
    "kept": {"known": True, "weights": (0.8, 0.2)},
    "kept and noised": {"known": True, "seed": 2**40, "known_sigma": 0.3, "weights": (0.8, 0.2, -0.1), "history": 1},
    "blended": {"known": "soft", "noise": True, "known_sigma": 0.3, "guidance": 2.0, "weights": (0.8, 0.2)},
}


def problem(
    name: str, size: tuple[int, ...], state: torch.dtype, output: torch.dtype, device: str, patch: Any = None
) -> dict[str, Any]:
    """The arguments of a step, by keyword."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = state) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    options = dict(STEPS[name])
    prediction = size
    if patch is not None:
        tokens = math.prod(-(-n // p) for n, p in zip(size[2:], patch, strict=True))
        prediction = (size[0], tokens, math.prod(patch) * size[1])
    options |= {"sample": draw(*size), "output": draw(*prediction, dtype=output), "sigma": 0.6, "patch": patch}
    if "guidance" in options:
        # Close to the conditional output, as models' are, where the spread of the guided one is a small difference.
        options["uncond"] = (options["output"].float() + 0.3 * draw(*prediction).float() + 0.1).to(output)
    options["history"] = tuple(draw(*size) for _ in range(options.get("history", 0)))
    if options.get("noise"):
        options["noise"] = draw(*size)
    kind = options.get("known")
    if kind:
        mask = torch.rand((size[0], 1, *size[2:]), generator=generator).to(device)
        options |= {"known": draw(*size), "generated": mask.clamp(0.1, 0.9) if kind == "soft" else mask > 0.5}
    return {"weights": (1.0, 0.5), **options}


def call(options: dict[str, Any], impl: str) -> tuple[Tensor, Tensor]:
    rest = {name: value for name, value in options.items() if name not in ("sample", "output")}
    return denoise_step(options["sample"], options["output"], impl=impl, **rest)


def changed(options: dict[str, Any], change: Any) -> dict[str, Any]:
    """Apply a function to every floating-point tensor."""

    def each(x: Any) -> Any:
        if isinstance(x, Tensor):
            return change(x) if x.is_floating_point() else x
        return tuple(each(y) for y in x) if isinstance(x, tuple) else x

    return {name: each(value) for name, value in options.items()}


def assert_right(options: dict[str, Any], got: tuple[Tensor, Tensor] | None = None) -> None:
    """Refuse more error than twice that of eager code, or 1.1 times its root mean square (proof.md 1)."""
    got = call(options, "triton") if got is None else got
    eager, exact = call(options, "reference"), call(changed(options, Tensor.double), "reference")
    for name, a, b, c in zip(("x'", "p"), got, eager, exact, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        error, eager_error = (a.double() - c).abs(), (b.double() - c).abs()
        bound = 2 * (eager_error.max() + torch.finfo(b.dtype).eps * c.abs().max())
        at = torch.unravel_index(error.argmax(), error.shape)
        assert error.max() <= bound, f"{name}{[int(i) for i in at]}: error {error.max():.3e} above {bound:.3e}"
        rms, eager_rms = (each.square().mean().sqrt() for each in (error, eager_error))
        # The factors of a sample are rounded to float32: an error that all its elements share.
        slack = torch.finfo(torch.float32).eps * c.square().mean().sqrt()
        assert rms <= 1.1 * eager_rms + slack, f"{name}: RMS error {rms:.3e}, eager {eager_rms:.3e}"


def assert_same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# Right.


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("device", "state", "output"), DTYPES)
def test_every_step_is_as_close_to_float64_as_eager_code(
    device: str, state: torch.dtype, output: torch.dtype, name: str, nan_memory: None
) -> None:
    for size, patch in ((SMALL[0], None), (SMALL[1], None), (SMALL[0], (1, 2, 2)), (SMALL[1], (2, 2, 3))):
        assert_right(problem(name, size, state, output, device, patch))
    if device == "cuda":
        assert_right(problem(name, WAN, state, output, device))
        assert_right(problem(name, WAN, state, output, device, (1, 2, 2)))


@pytest.mark.parametrize("config", range(len(kernels.CONFIGS)))
@pytest.mark.parametrize("device", DEVICES)
def test_every_config_is_right(config: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.advance, "__defaults__", (kernels.CONFIGS[config],))
    for name, patch in (("kept and noised", None), ("both", (1, 2, 2)), ("both", None)):
        options = problem(name, WAN if device == "cuda" else SMALL[0], torch.float32, torch.float16, device, patch)
        assert_right(options)
        got = call(options, "triton")
        for _ in range(50 if device == "cuda" else 1):
            assert_same(call(options, "triton"), got)


@pytest.mark.parametrize("device", DEVICES)
def test_sums_over_many_tiles_are_right(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MOST_PARTIALS", 2)
    tiny = kernels.CONFIGS[0]._replace(elements=16, warps=1, drawn_elements=16, sum_elements=16, sum_warps=1)
    monkeypatch.setattr(kernels.advance, "__defaults__", (tiny,))
    for patch in (None, (1, 2, 2)):
        assert_right(problem("both", SMALL[0], torch.float32, torch.float32, device, patch))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shift", [0.0, 3.0, 1e3])
def test_rescaling_is_right_far_from_zero_and_leaves_constants_alone(device: str, shift: float) -> None:
    options = problem("rescaled", SMALL[0], torch.float32, torch.float32, device)
    options |= {"output": options["output"] + shift, "uncond": options["uncond"] + shift}
    # A spread around a large mean is what rounding leaves of it: eager float32 is no better than the bound here.
    assert_right(options)
    flat = torch.full_like(options["output"], 0.7 + shift)
    got = call(options | {"output": flat, "uncond": flat, "prediction": "sample"}, "triton")
    torch.testing.assert_close(got[1], flat, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_zero_star_of_nothing_is_nothing(device: str) -> None:
    options = problem("both", SMALL[0], torch.float32, torch.float32, device)
    nothing = torch.zeros_like(options["output"])
    _, clean = call(options | {"output": nothing, "uncond": nothing}, "triton")
    assert torch.equal(clean, call(options | {"output": nothing, "uncond": nothing}, "reference")[1])


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_of_weight_zero_are_left_out_whatever_they_hold(device: str) -> None:
    options = problem("three", SMALL[0], torch.float32, torch.float32, device)
    nan = torch.full_like(options["sample"], torch.nan)
    past = options["history"]
    got = call(options | {"history": (nan, past[1], nan), "weights": (0.9, 0.3, 0.0, 0.05, 0.0)}, "triton")
    assert_same(got, call(options | {"history": past, "weights": (0.9, 0.3, 0.0, 0.05, 0.0)}, "triton"))
    alone = {"sample": nan, "weights": (0.0, 0.5), "history": (), "prediction": "sample"}
    ahead, clean = call(options | alone, "triton")
    assert torch.equal(ahead, 0.5 * options["output"])
    assert torch.equal(clean, options["output"])
    noisy = problem("noise", SMALL[0], torch.float32, torch.float32, device) | {"noise": nan, "noise_weight": 0.0}
    assert call(noisy, "triton")[0].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_kept_region_is_known_bitwise_and_the_rest_never_reads_it(device: str) -> None:
    options = problem("kept", SMALL[0], torch.float32, torch.float32, device)
    made = options["generated"].expand(SMALL[0])
    known = options["known"].clone()
    known[~made] = torch.where(known[~made] > 1, -0.0, known[~made])
    output = options["output"].masked_fill(~made, torch.nan)
    ahead, _ = call(options | {"known": known.masked_fill(made, torch.inf), "output": output}, "triton")
    assert torch.equal(ahead[~made].view(torch.int32), known[~made].view(torch.int32))
    assert torch.equal(ahead[made], call(options, "triton")[0][made])


@pytest.mark.parametrize("device", DEVICES)
def test_the_masks_may_broadcast_over_any_axes(device: str) -> None:
    options = problem("kept", SMALL[0], torch.float32, torch.float32, device)
    for shape in ((1, 1, 1, 1, 1), (2, 1, 1, 1, 1), (1, 3, 1, 1, 1), (1, 1, 2, 1, 6), (2, 1, 1, 4, 1), SMALL[0]):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(device) > 0.5
        assert_right(options | {"generated": mask})


# Random numbers.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (5, 3), (2**40 + 9, 2**33 + 1), (2**63 - 3, 2**63 - 1)])
def test_numbers_equal_those_of_the_reference_bitwise(device: str, seed: int, offset: int) -> None:
    sizes = ((1, 1), (2, 7), (2, 3, 5), (1, 4 * NORMAL_QUADS + 5))
    for shape in (*sizes, *((WAN, (3, 1000001)) if device == "cuda" else ())):
        got, want = (philox_normal(shape, seed, offset=offset, device=device, impl=x) for x in ("triton", "reference"))
        # One fp64 library's logarithm may end a unit of float64 away from another's: once in some 2^27 numbers that
        # crosses a rounding to float32.
        different = int((got != want).sum())
        assert different <= got.numel() * 2.0**-20, f"{different} of {got.numel()} numbers differ"
        torch.testing.assert_close(got, want, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_draws_what_philox_normal_draws(device: str) -> None:
    for size in SMALL:
        for patch in (None, (1, 2, 2)):
            options = problem("kept and noised", size, torch.float32, torch.float32, device, patch)
            drawn = philox_normal(size, options["seed"], device=device, impl="triton")
            given = {k: v for k, v in options.items() if k not in ("seed", "offset")} | {"noise": drawn}
            assert_same(call(options, "triton"), call(given, "triton"))


@pytest.mark.parametrize("device", DEVICES)
def test_seeds_may_have_any_stride(device: str) -> None:
    options = problem("seed", SMALL[0], torch.float32, torch.float32, device, None)
    assert SMALL[0][0] == 2
    for seeds in (torch.tensor([3, 8, 5], device=device)[::2], torch.tensor([7], device=device).expand(2)):
        for impl in ("triton", "reference"):
            given = options | {"seed": seeds}
            assert_same(call(given, impl), call(given | {"seed": seeds.contiguous()}, impl))


# Layout.


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_and_latents_give_the_same_bits(device: str) -> None:
    from stattn.ops.patchify import unpatchify3d

    for size, patch in ((SMALL[0], (1, 2, 2)), (SMALL[1], (2, 2, 3))):
        options = problem("unipc", size, torch.float32, torch.float16, device, patch)
        grid = tuple(-(-n // p) for n, p in zip(size[2:], patch, strict=True))
        laid = {
            name: unpatchify3d(options[name], grid, patch, size[1], size=size[2:], impl="reference")
            for name in ("output", "uncond")
        }
        assert_same(call(options, "triton"), call(options | laid | {"patch": None}, "triton"))


def guarded(x: Tensor, front: int) -> Tensor:
    """Return a copy of x between NaNs, beginning ``front`` elements into its buffer."""
    buffer = torch.full((front + x.numel() + 512,), torch.nan, dtype=x.dtype, device=x.device)
    buffer[front : front + x.numel()] = x.flatten()
    return buffer[front : front + x.numel()].view(x.shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("front", [512, 509])
def test_nothing_outside_the_tensors_is_read_or_written(device: str, front: int, nan_memory: None) -> None:
    for name, patch in (("blended", None), ("both", (2, 2, 3))):
        options = problem(name, SMALL[1], torch.float32, torch.float32, device, patch)
        inside = changed(options, lambda x: guarded(x, front))
        buffers = {k: v.untyped_storage() for k, v in inside.items() if isinstance(v, Tensor) and v.is_floating_point()}
        before = {name: bytes(storage.cpu()) for name, storage in buffers.items()}
        assert_same(call(inside, "triton"), call(options, "triton"))
        assert before == {name: bytes(storage.cpu()) for name, storage in buffers.items()}


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_of_any_strides_are_read_in_place(device: str) -> None:
    def channels_last(x: Tensor) -> Tensor:
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() == 5 else x.transpose(1, 2).contiguous().mT

    def cropped(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype, device=x.device)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]

    for name, patch in (("blended", None), ("both", (1, 2, 2)), ("unipc", None)):
        options = problem(name, SMALL[0], torch.float32, torch.float32, device, patch)
        expected = call(options, "triton")
        assert_same(call(changed(options, channels_last), "triton"), expected)
        assert_same(call(changed(options, cropped), "triton"), expected)
    both = torch.cat((options["output"], options["uncond"]))
    halves = dict(zip(("output", "uncond"), both.chunk(2), strict=True))
    assert_same(call(options | halves, "triton"), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_of_64_bits_give_the_same_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, patch in (("blended", None), ("both", (1, 2, 2)), ("kept and noised", None)):
        options = problem(name, SMALL[0], torch.float32, torch.float32, device, patch)
        options = changed(options, lambda x: x.mT.contiguous().mT)
        expected = call(options, "triton")
        with monkeypatch.context() as patched:
            patched.setattr(kernels, "_reach", lambda x: 2**31)
            assert_same(call(options, "triton"), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_does_not_depend_on_its_batch(device: str) -> None:
    options = problem("both", SMALL[0], torch.float32, torch.float32, device) | {"noise_weight": 0.3}
    both = call(options | {"seed": 7, "offset": 2}, "triton")
    alone = call(changed(options, lambda x: x[1:]) | {"seed": 8, "offset": 2}, "triton")
    assert_same(tuple(x[1:] for x in both), alone)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(0, 3, 2, 4, 6), (2, 3, 0, 4, 6)])
def test_empty_tensors_give_empty_results(device: str, size: tuple[int, ...]) -> None:
    x = torch.ones(size, device=device)
    outs = denoise_step(x, x, uncond=x, guidance=2, rescale=0.5, zero_star=True, seed=0, sigma=0.4, weights=(1, 1),
                        noise_weight=1, impl="triton")  # fmt: skip
    assert [each.shape for each in outs] == [x.shape] * 2
    assert philox_normal(size, 0, device=device, impl="triton").shape == x.shape


# Errors.


@pytest.mark.interpreter
def test_what_the_kernels_do_not_serve_is_refused_with_its_reason() -> None:
    x = torch.ones(SMALL[0])
    good = {"sigma": 0.5, "weights": (1.0, 0.5), "impl": "triton"}
    denoise_step(x, x, **good)
    for tensors in ((x.double(), x), (x, x.double())):
        with pytest.raises(ValueError, match="has no float64 kernel"):
            denoise_step(*tensors, **good)
    with pytest.raises(ValueError, match="has no float64 kernel"):
        denoise_step(x, x, noise=x.double(), noise_weight=0.1, **good)
    with pytest.raises(ValueError, match="impl='cuda'"):
        denoise_step(x, x, **(good | {"impl": "cuda"}))


def test_auto_takes_triton_for_cuda_tensors_only() -> None:
    served = DenoiseCall("cuda", (9, 0), torch.float32, torch.bfloat16, (1, 2, 2), True, (torch.bool,))
    assert DENOISE_STEP.choose("auto", served).name == "triton"
    assert DENOISE_STEP.choose("auto", served._replace(device="cpu")).name == "reference"


# Gradients, determinism, graphs, compilation.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("patch", [None, (2, 2, 3)])
@pytest.mark.parametrize("name", ["blended", "rescaled", "zero star", "both", "unipc", "kept and noised"])
def test_gradients_are_those_of_the_reference(device: str, name: str, patch: Any) -> None:
    options = problem(name, SMALL[1] if patch else SMALL[0], torch.float32, torch.float32, device, patch)
    grads = []
    for impl in ("triton", "reference"):
        leaves: list[Tensor] = []

        def leaf(x: Tensor, leaves: list[Tensor] = leaves) -> Tensor:
            leaves.append(x.detach().requires_grad_(len(leaves) != 1))  # not output
            return leaves[-1]

        outs = call(changed(options, leaf), impl)
        grads.append(torch.autograd.grad(outs, [x for x in leaves if x.requires_grad], [torch.cos(x) for x in outs]))
    for got, want in zip(*grads, strict=True):
        # A dozen roundings of terms as large as the largest.
        few = 16 * torch.finfo(want.dtype).eps * float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=1e-5, atol=few)


@pytest.mark.parametrize("patch", [None, (2, 2, 3)])
@pytest.mark.parametrize("name", STEPS)
def test_the_written_out_gradients_are_those_of_autograd_in_float64(name: str, patch: Any) -> None:
    options = changed(problem(name, SMALL[1], torch.float32, torch.float32, "cpu", patch), Tensor.double)
    names = ("sample", "output", "uncond", "noise", "known", "generated")
    leaves = [options.get(name) for name in names] + list(options["history"])
    leaves = [x.requires_grad_() if x is not None and x.is_floating_point() else None for x in leaves]
    outs = call(options, "reference")
    douts = [torch.cos(x.detach()) for x in outs]
    given = [x for x in leaves if x is not None]
    want = iter(torch.autograd.grad(outs, given, douts, allow_unused=True))
    seed = options.get("seed")
    sigma = options.get("known_sigma", 0.0)
    step = Step(
        **{name: options[name] for name in Step._fields if name in options} | {"sample": options["sample"].detach()},
        seeds=None if seed is None else torch.tensor([seed]),
        convert=conversion(options.get("prediction", "velocity"), options.get("target", "sample"), 0.4, 0.6),
        known_weights=(1 - sigma, sigma),
    )
    got = denoise_step_backward(*douts, step)
    for leaf, grad in zip(leaves, got, strict=True):
        if leaf is not None:
            torch.testing.assert_close(grad, next(want), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_reruns_agree_bitwise(device: str) -> None:
    big = device == "cuda"
    options = problem("both", WAN if big else SMALL[0], torch.float32, torch.float16, device, (1, 2, 2))
    options |= {"seed": 3, "noise_weight": 0.1}
    expected = call(options, "triton")
    side = torch.cuda.Stream() if big else None
    load = torch.randn(2048, 2048, device=device) if big else None
    for _ in range(250 if big else 2):
        if side is not None and load is not None:
            with torch.cuda.stream(side):
                load @ load
        assert_same(call(options, "triton"), expected)


def arguments(options: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of the operation behind denoise_step."""
    names = ("sample", "output", "uncond", "noise", "known", "generated")
    seeds = torch.arange(2, device=options["sample"].device)
    return (
        *(options.get(name) for name in names), list(options["history"]), seeds, 3, 2.5, 0.5, True, [0.3, 0.8],
        [0.9, 0.3, -0.1][: 2 + len(options["history"])], 0.1, [0.7, 0.3], options["patch"],
    )  # fmt: skip


def test_a_step_has_the_arguments_of_the_operation_in_their_order() -> None:
    for operation, more in ((torch.ops.stattn.denoise_step, ()), (torch.ops.stattn.denoise_step_backward, ("needed",))):
        names = [each.name for each in operation.default._schema.arguments]
        assert tuple(names[-len(Step._fields) - len(more) :]) == (*Step._fields, *more)


@pytest.mark.parametrize("device", DEVICES)
def test_the_operations_pass_opcheck(device: str) -> None:
    options = problem("kept and noised", SMALL[0], torch.float32, torch.float32, device, (1, 2, 2))
    options["uncond"] = options["output"] + 0.1
    given = arguments(changed(options, lambda x: x.clone().requires_grad_()))
    torch.library.opcheck(torch.ops.stattn.denoise_step, given)
    plain = arguments(options)
    douts = torch.randn(SMALL[0], device=device), torch.randn(SMALL[0], device=device)
    needed = [True, False, True, True, False, True]
    torch.library.opcheck(torch.ops.stattn.denoise_step_backward, (*douts, *plain, needed))
    torch.library.opcheck(torch.ops.stattn.philox_normal, (plain[7], 5, [2, 3, 5]))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_calls_are_one_graph_and_give_the_same_bits_at_every_size(device: str) -> None:
    torch.compiler.reset()

    def step(x: Tensor, cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
        return denoise_step(
            x * 2, cond, uncond=uncond, guidance=3.0, rescale=0.5, sigma=0.4, weights=(1, 0.5), seed=3,
            noise_weight=0.1, impl="triton",
        )  # fmt: skip

    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    duck = torch.fx.experimental._config.patch(use_duck_shape=False)
    for number, size in enumerate(((2, 3, 2, 4, 6), (2, 3, 3, 2, 5))):
        x, cond, uncond = torch.randn(3, *size, device=device).unbind()
        x.requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=number > 0), duck:
            got = compiled(x, cond, uncond)
            got = (*got, *torch.autograd.grad(got, x, (cond, uncond)))
        want = step(x, cond, uncond)
        want = (*want, *torch.autograd.grad(want, x, (cond, uncond)))
        assert_same(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "launches"), [("unipc", 1), ("both", 2), ("kept and noised", 1)])
def test_a_graph_replays_with_new_inputs(name: str, launches: int) -> None:
    options = problem(name, SMALL[0], torch.float32, torch.bfloat16, "cuda", (1, 2, 2))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(options, "triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outs = call(options, "triton")
    torch.cuda.synchronize()
    for _ in range(20):
        for each in (options["sample"], options["output"]):
            each.copy_(torch.randn_like(each))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(outs, call(options, "triton"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    assert sum("denoise" in each.name for each in profile.events()) == launches


@pytest.mark.gpu
def test_other_streams_and_devices_give_the_same_bits() -> None:
    options = problem("both", SMALL[0], torch.float32, torch.bfloat16, "cuda", (1, 2, 2))
    expected = call(options, "triton")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = call(options, "triton")
    stream.synchronize()
    assert_same(got, expected)
    if torch.cuda.device_count() > 1:
        there = call(changed(options, lambda x: x.to("cuda:1")), "triton")
        assert_same(tuple(x.to("cuda:0") for x in there), expected)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31st_are_right() -> None:
    size = (2, 3, 1, 20000, 20000)  # 2.4e9 elements
    x, out = (torch.randn(1, *size[1:], device="cuda", dtype=torch.bfloat16).expand(size).contiguous() for _ in "xo")
    ahead, clean = denoise_step(x, out, sigma=0.4, weights=(0.5, 0.5))
    alone = denoise_step(x[1:], out[1:], sigma=0.4, weights=(0.5, 0.5))
    assert torch.equal(ahead[1:], alone[0])
    assert torch.equal(clean[1:], alone[1])
    assert torch.equal(ahead[0], ahead[1])
