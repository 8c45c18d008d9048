"""The Triton kernels of patchify and unpatchify against the reference: small under the interpreter, real on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stattn.grid import Grid
from stattn.kernels import patchify as kernels
from stattn.kernels import patchify_bwd, unpatchify
from stattn.kernels._patches import Geometry
from stattn.ops.patchify import patchify3d, unpatchify3d

CPU = pytest.param("cpu", marks=pytest.mark.interpreter)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = (CPU, CUDA)
DTYPES = (
    *(pytest.param("cpu", dtype, marks=pytest.mark.interpreter) for dtype in (torch.float32, torch.float16)),
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
)
# (batch, channels, (T, H, W), patch, features): every kernel, rows of a patch from 1 pixel to 16 bytes, ragged axes.
SMALL = (
    (2, 3, (2, 4, 6), (1, 2, 2), 5),
    (1, 2, (3, 5, 7), (2, 2, 4), 9),
    (2, 3, (4, 16, 16), (2, 8, 8), 20),
    (1, 1, (2, 3, 3), (1, 1, 1), 3),
    (1, 2, (2, 6, 28), (1, 3, 14), 8),
    (1, 36, (1, 4, 6), (1, 2, 2), 7),
    (2, 80, (2, 4, 5), (1, 2, 2), 7),
)
REAL = (
    (1, 16, (21, 60, 104), (1, 2, 2), 1536),
    (2, 16, (3, 91, 161), (1, 2, 2), 5120),
    (1, 36, (5, 90, 160), (1, 2, 2), 1536),
    (1, 3, (16, 256, 256), (4, 16, 16), 1536),
    (2, 3, (9, 122, 98), (2, 14, 14), 384),
    (3, 128, (2, 30, 52), (1, 2, 2), 1000),
)


def cases(device: str, dtype: torch.dtype = torch.bfloat16) -> tuple:
    # Each case compiles three kernels or more: on a GPU bfloat16 stands for the other types where they are alike.
    return SMALL if device == "cpu" else (*SMALL[3:5], *REAL) if dtype == torch.bfloat16 else REAL[1:5:3]


def problem(case: tuple, dtype: torch.dtype, device: str, draw: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """x, weight, bias, pos and dout of a case."""
    batch, channels, size, patch, features = case
    tokens = math.prod(-(-n // p) for n, p in zip(size, patch, strict=True))
    shapes = (batch, channels, *size), (features, channels, *patch), (features,), (tokens, features)
    return tuple(draw(shape).to(device, dtype) for shape in (*shapes, (batch, tokens, features)))


def integers(shape: tuple[int, ...]) -> Tensor:
    # Mostly zeros, so that sums over thousands of tokens stay below 2048, which fp16 holds exactly, or nearly all do.
    return (torch.randint(-2, 3, shape) * (torch.rand(shape) < 0.2)).float()


def run(inputs: tuple[Tensor, ...], impl: str) -> tuple[Tensor, ...]:
    """Tokens and the gradients of x, weight, bias and pos."""
    *tensors, dout = inputs
    leaves = [each.detach().requires_grad_() for each in tensors]
    out = patchify3d(*leaves, pad=True, impl=impl)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


# Right.


@pytest.mark.parametrize(("device", "dtype"), DTYPES)
def test_small_integers_give_the_exact_tokens_and_gradients(device, dtype, nan_memory):
    for case in cases(device, dtype):
        inputs = problem(case, dtype, device, integers)
        exact = run(tuple(each.double() for each in inputs), "reference")
        for name, got, want in zip(
            ("out", "dx", "dweight", "dbias", "dpos"), run(inputs, "triton"), exact, strict=True
        ):
            # Sums of integers are exact in float32; the one rounding at the end is that of the dtype.
            assert want.abs().max() < 2**24
            assert torch.equal(got, want.to(dtype)), f"{name} of {case}"


@pytest.mark.parametrize(("device", "dtype"), DTYPES)
def test_errors_are_at_most_twice_those_of_eager_pytorch(device, dtype):
    for case in cases(device, dtype):
        inputs = problem(case, dtype, device, torch.randn)
        exact = run(tuple(each.double() for each in inputs), "reference")
        eager = run(inputs, "reference")
        for name, got, usual, want in zip(
            ("out", "dx", "dweight", "dbias", "dpos"), run(inputs, "triton"), eager, exact, strict=True
        ):
            error, slack = (got - want).abs(), torch.finfo(dtype).eps * want.abs().max()
            bound = 2 * ((usual - want).abs().max() + slack)
            where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
            assert error.max() <= bound, f"{name} of {case}: error {error.max():.3g} at {where}, bound {bound:.3g}"
            rms, usual_rms = error.square().mean().sqrt(), (usual - want).square().mean().sqrt()
            # float32 sums of many terms differ by their order alone; what is rounded to 16 bits does not.
            limit = 1.1 * usual_rms if dtype.itemsize == 2 else 2 * usual_rms + 0.1 * slack
            assert rms <= limit, f"{name} of {case}: RMS error {rms:.3g}, eager's {usual_rms:.3g}"


def long_sum(kind: str, device: str) -> tuple[Tensor, ...]:
    """Inputs of which one sum has 1,024 terms, the 256th of them 2**28 times the others."""
    terms = 0.7 * 2.0**-28 * (0.9 + 0.2 * torch.rand(1024, device=device))
    terms[255] = 1
    one = torch.ones(1024, device=device)
    if kind == "taps":
        return terms.view(1, 4, 1, 16, 16), one.expand(2, -1).reshape(2, 4, 1, 16, 16), one[:2], one.new_ones(1, 1, 2)
    if kind == "features":
        return one[:8].view(1, 1, 1, 2, 4), one.expand(4, -1).T.reshape(-1, 1, 1, 2, 2), one, terms.expand(1, 2, -1)
    return one.expand(4, -1).reshape(1, 1, 1, 2, -1), one[:12].view(3, 1, 1, 2, 2), one[:3], terms.expand(3, -1).T[None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "results"), [("taps", [0]), ("features", [1]), ("tokens", [2, 3])])
def test_long_float32_sums_do_not_lose_small_terms_beside_a_huge_one(device, kind, results, monkeypatch):
    def errors() -> Tensor:
        """In units of the last place: 2, rule 1's slack, is what four spans of 256 terms may round."""
        got = run(inputs, "triton")
        return torch.stack([(got[i] - exact[i]).abs().max() / exact[i].abs().max() for i in results]) * 2**23

    monkeypatch.setattr(patchify_bwd, "SHARES", 1)  # one sum over all tokens
    x, weight, bias, dout = long_sum(kind, device)
    inputs = x, weight, torch.zeros_like(bias), torch.zeros_like(dout[0]), dout
    exact = run(tuple(each.double() for each in inputs), "reference")
    assert (errors() <= 2).all()
    if device == "cpu":  # in one running sum the terms after the huge one are lost: the case tells
        monkeypatch.setattr(kernels, "SPAN", 2**30)
        assert (errors() > 10).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", kernels.CONFIGS)
def test_every_forward_config_gives_the_same_exact_tokens(device, kind):
    channels, patch = {
        "resident": (16, (1, 2, 2)),
        "resident-wide": (36, (1, 2, 2)),
        "tiled": (3, (2, 8, 8)),
        "tiled-short": (80, (1, 2, 2)),
        "tiled-float32": (16, (1, 2, 2)),
    }[kind]
    dtype = torch.float32 if kind == "tiled-float32" else torch.float16
    case = (2, channels, tuple(n * p for n, p in zip((3, 5, 7), patch, strict=True)), patch, 200)
    x, weight, bias, pos, _ = problem(case, dtype, device, integers)
    assert kernels.kernel_for(Geometry.of(tuple(x.shape), x.stride(), patch, dtype.itemsize), dtype) == kind
    want = patchify3d(x.double(), weight.double(), bias.double(), pos.double(), impl="reference").to(dtype)
    for config in kernels.CONFIGS[kind]:
        assert torch.equal(kernels.forward(x, weight, bias, pos, config), want), config


@pytest.mark.parametrize("device", DEVICES)
def test_programs_that_go_on_in_the_next_row_give_the_same_exact_tokens(device):
    x, weight, bias, pos, _ = problem((2, 16, (3, 10, 6), (1, 2, 2), 91), torch.float16, device, integers)
    want = patchify3d(x.double(), weight.double(), bias.double(), pos.double(), impl="reference").half()
    for boxes in (False, True):  # features that fill no 16 bytes go without
        for n in (91, 88):
            config = kernels.Config(16, 16, 64, 4, 3, together=5, boxes=boxes, across=True)
            assert kernels._share(6, 6, config.together, True) == (8, True)
            got = kernels.forward(x, weight[:n], bias[:n], pos[:, :n], config)
            assert torch.equal(got, want[..., :n])


@pytest.mark.parametrize("rows, columns, together", [(591, 40, 264), (256, 12, 264), (5, 2, 264), (7, 3, 4), (1, 1, 1)])
def test_shares_of_tiles_are_even_where_that_is_the_shorter_run(rows, columns, together):
    within, stays = kernels._share(rows, columns, together, False)
    assert not stays
    assert 1 <= within <= columns
    share, across = kernels._share(rows, columns, together, True)
    assert across == (share != within)
    assert not across or (rows * columns - 1) // share < together


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", patchify_bwd.CONFIGS)
def test_every_backward_config_gives_the_same_exact_gradients(device, kind):
    dtype = torch.float32 if kind.endswith("float32") else torch.float16
    case = (2, 36 if kind.endswith("wide") else 4, (3, 10, 14), (1, 2, 2), 200)
    x, weight, _, _, dout = inputs = problem(case, dtype, device, integers)
    want = run(tuple(each.double() for each in inputs), "reference")
    for config in patchify_bwd.CONFIGS[kind]:
        if kind.startswith("dx"):
            got = patchify_bwd.dx(dout, weight, x.shape[2:], config)
            assert torch.equal(got, want[1].to(dtype)), config
        else:
            dweight, dbias = patchify_bwd.dweight(dout, x, case[3], torch.float32, config)
            assert torch.equal(dweight, want[2].to(dtype)), config
            assert torch.equal(dbias, want[3].float()), config


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("features", [200, 36])
def test_the_weights_gradient_is_exact_for_any_strides_of_the_tokens_gradient(device, features):
    case = (3, 4, (3, 10, 14), (1, 2, 2), features)
    x, weight, bias, pos, dout = problem(case, torch.float16, device, integers)
    want = run(tuple(each.double() for each in (x, weight, bias, pos, dout)), "reference")
    batch, tokens = dout.shape[:2]
    # Rows fill 16 bytes, and there is a tensor memory accelerator.
    whole = features % 8 == 0 and (device == "cpu" or torch.cuda.get_device_capability() >= (9, 0))
    memory = torch.full((2 * dout.numel() + 4096,), torch.nan, dtype=dout.dtype, device=device)
    for strides, offset, boxes in (
        ((tokens * features, features, 1), 0, whole),
        ((tokens * (features + 8), features + 8, 1), 64, whole),  # rows with a gap
        ((tokens * features, features, 1), 1, False),  # an address of no 16 bytes
        ((tokens * (features + 1), features + 1, 1), 0, False),
        ((tokens * features + 64, features, 1), 0, False),  # samples with a gap
    ):
        view = memory.as_strided((batch, tokens, features), strides, offset).copy_(dout)
        assert patchify_bwd._takes_boxes(view) == boxes, strides
        dweight, dbias = patchify_bwd.dweight(view, x, case[3], torch.float32)
        assert torch.equal(dweight, want[2].half())
        assert torch.equal(dbias, want[3].float())
        memory.fill_(torch.nan)


@pytest.mark.parametrize("device", DEVICES)
def test_every_number_of_tokens_around_a_tile_is_right(device):
    for tile in (64, 128):
        for tokens in range(tile - 2, tile + 3):
            inputs = problem((1, 1, (1, 2, 2 * tokens), (1, 2, 2), 3), torch.float16, device, integers)
            for got, want in zip(run(inputs, "triton"), run(inputs, "reference"), strict=True):
                assert torch.equal(got, want), tokens


@pytest.mark.parametrize("device", DEVICES)
def test_many_tokens_are_shared_out_and_summed_in_a_fixed_order(device):
    case = (3, 1, (2, 16, 28), (1, 2, 2), 20) if device == "cpu" else (3, 4, (9, 60, 104), (1, 2, 2), 200)
    x, weight, _, _, dout = problem(case, torch.float32, device, torch.randn)
    tokens = dout.shape[0] * dout.shape[1]
    assert patchify_bwd.shares(tokens, 1, 16)[0] > 8
    first = patchify_bwd.dweight(dout, x, (1, 2, 2), torch.float32)
    leaves = weight.double().requires_grad_(), dout.new_zeros(case[4], dtype=torch.float64, requires_grad=True)
    exact = torch.autograd.grad(patchify3d(x.double(), *leaves, impl="reference"), leaves, dout.double())
    for got, want in zip(first, exact, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    for _ in range(2 if device == "cpu" else 250):
        again = patchify_bwd.dweight(dout, x, (1, 2, 2), torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_shares_cover_all_tokens_and_do_not_depend_on_the_card():
    for tokens in (1, 31, 32, 1000, 75_600, 151_200):
        for tiles in (1, 20, 264, 300):
            parts, share = patchify_bwd.shares(tokens, tiles, 32)
            assert (parts - 1) * share < tokens <= parts * share
            assert share % 32 == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_does_not_depend_on_its_batch(device):
    case = (3, 4, (2, 6, 10), (1, 2, 2), 24)
    x, weight, bias, pos, dout = problem(case, torch.float32, device, torch.randn)
    out = patchify3d(x, weight, bias, pos, impl="triton")
    dx = patchify_bwd.dx(dout, weight, x.shape[2:])
    for sample in range(3):
        one = slice(sample, sample + 1)
        assert torch.equal(patchify3d(x[one], weight, bias, pos, impl="triton"), out[one])
        assert torch.equal(patchify_bwd.dx(dout[one], weight, x.shape[2:]), dx[one])


@pytest.mark.parametrize("device", DEVICES)
def test_bias_and_position_may_be_wider_than_the_video(device):
    x, weight, bias, pos, dout = problem(SMALL[0], torch.float16, device, torch.randn)
    bias, pos = bias.float() / 3, pos.float() / 3
    inputs = x, weight, bias, pos, dout
    for got, want in zip(run(inputs, "triton"), run(inputs, "reference"), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


# Memory.


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_read_or_written_beyond_the_tensors(device, monkeypatch):
    guards = []

    def guarded(*shape, dtype, device):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        size = math.prod(shape)
        whole = torch.full((size + 1024,), torch.nan, dtype=dtype, device=device)
        guards.append((whole, size))
        return whole[512 : 512 + size].view(shape)

    for case in SMALL if device == "cpu" else SMALL[1:3]:
        inputs = []
        for each in problem(case, torch.float16, device, integers):
            inputs.append(guarded(*each.shape, dtype=each.dtype, device=each.device).copy_(each))
        x, weight, bias, pos, dout = inputs
        kept = [each.clone() for each in inputs]
        want = run(tuple(inputs), "reference")
        rows, before = dout.shape[1] + 3, 2
        grid = [-(-n // p) for n, p in zip(x.shape[2:], case[3], strict=True)]
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", guarded)
            got = [kernels.forward(x, weight, bias, pos), patchify_bwd.dx(dout, weight, x.shape[2:])]
            got += [*patchify_bwd.dweight(dout, x, case[3], bias.dtype), patchify_bwd.dpos(dout, pos.dtype)]
            tokens = unpatchify.backward(x, rows, before, case[3])
            video = unpatchify.forward(tokens, before, case[3], x.shape[1], tuple(x.shape[2:]))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(video, x)
        assert tokens.shape == (x.shape[0], math.prod(grid) + 3, weight[0].numel())
        assert not tokens[:, :before].any()
        assert not tokens[:, -1:].any()
        assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True)), "an input was modified"
        assert len(guards) >= 11
        for whole, size in guards:
            assert whole[:512].isnan().all()
            assert whole[512 + size :].isnan().all()
        guards.clear()


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same video in other layouts, NaN around it."""
    wide = torch.full((*x.shape[:4], x.shape[4] + 9), torch.nan, dtype=x.dtype, device=x.device)
    wide[..., 3:-6] = x
    holes = torch.full((*x.shape[:4], 2 * x.shape[4]), torch.nan, dtype=x.dtype, device=x.device)
    holes[..., ::2] = x
    return {
        "channels last": x.contiguous(memory_format=torch.channels_last_3d),
        "crop off its alignment": wide[..., 3:-6],
        "every other column": holes[..., ::2],
        "frames before channels": x.transpose(1, 2).contiguous().transpose(1, 2),
    }


@pytest.mark.parametrize("device", DEVICES)
def test_a_video_of_any_strides_is_read_where_it_lies(device):
    for case in (SMALL[0], SMALL[2]):
        x, weight, bias, pos, dout = problem(case, torch.float16, device, integers)
        want = run((x, weight, bias, pos, dout), "reference")
        for name, view in layouts(x).items():
            assert torch.equal(view, x)
            assert view.is_contiguous() is False
            got = run((view, weight, bias, pos, dout), "triton")
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name
        same = x[:1].expand(4, -1, -1, -1, -1)
        assert torch.equal(patchify3d(same, weight, impl="triton")[3:], patchify3d(x[:1], weight, impl="triton"))


@pytest.mark.parametrize("device", DEVICES)
def test_weights_and_output_gradients_of_other_layouts_are_right(device):
    x, weight, bias, pos, dout = problem(SMALL[0], torch.float16, device, integers)
    want = run((x, weight, bias, pos, dout), "reference")
    strided = torch.full((*dout.shape[:2], 2 * dout.shape[2]), torch.nan, dtype=dout.dtype, device=device)
    strided[..., : dout.shape[2]] = dout
    for each in (dout.transpose(1, 2).contiguous().transpose(1, 2), strided[..., : dout.shape[2]]):
        other = (x, weight.contiguous(memory_format=torch.channels_last_3d), bias, pos, each)
        assert all(torch.equal(a, b) for a, b in zip(run(other, "triton"), want, strict=True))
    summed = [each.detach().requires_grad_() for each in (x, weight, bias, pos)]
    patchify3d(*summed, impl="triton").sum().backward()
    ones = run((x, weight, bias, pos, torch.ones_like(dout)), "reference")
    assert all(torch.equal(a.grad, b) for a, b in zip(summed, ones[1:], strict=True))


def test_offsets_are_wide_exactly_when_a_patch_reaches_that_far():
    def geometry(size: tuple[int, ...], strides: tuple[int, ...] | None = None) -> Geometry:
        x = torch.empty(size, device="meta")
        return Geometry.of(size, strides or x.stride(), (4, 16, 16), 2)

    assert not geometry((8, 3, 64, 256, 256)).wide
    assert not geometry((2, 3, 510, 1088, 1904)).wide  # 1.06e9 pixels a channel: samples start beyond 2**31
    assert geometry((1, 3, 600, 1344, 2560)).wide  # the third channel does
    top = 2**31 - 1 - 3 * 4096 - 15 * 256 - 15
    assert not geometry((1, 2, 4, 16, 16), (0, top, 4096, 256, 1)).wide
    assert geometry((1, 2, 4, 16, 16), (0, top + 1, 4096, 256, 1)).wide


@pytest.mark.parametrize("device", DEVICES)
def test_wide_offsets_give_the_same_bits(device, monkeypatch):
    for case in (SMALL[1], SMALL[2], SMALL[6]) if device == "cpu" else SMALL[1:3]:
        inputs = problem(case, torch.float16, device, torch.randn)
        narrow = run(inputs, "triton")
        with monkeypatch.context() as patched:
            patched.setattr(Geometry, "wide", True)
            assert all(torch.equal(a, b) for a, b in zip(run(inputs, "triton"), narrow, strict=True))


@pytest.mark.gpu
def test_samples_channels_and_tokens_beyond_two_to_the_31_are_found():
    far = 2**31 + 16
    memory = torch.full((far + 4096,), torch.nan, dtype=torch.bfloat16, device="cuda")
    for strides in ((far, 64, 16, 4, 1), (64, far, 16, 4, 1), (64, 256, far, 4, 1), (64, 256, 16, far, 1)):
        shape = tuple(2 if stride != 1 else 4 for stride in strides)
        x = memory.as_strided(shape, strides).copy_(integers(shape))
        weight, dout = integers((5, 2, 2, 2, 2)).to(x), integers((2, 2, 5)).to(x)
        near = x.clone(memory_format=torch.contiguous_format)
        assert torch.equal(patchify3d(x, weight, impl="triton"), patchify3d(near, weight, impl="reference"))
        want = patchify_bwd.dweight(dout, near, (2, 2, 2), None)[0]
        assert torch.equal(patchify_bwd.dweight(dout, x, (2, 2, 2), None)[0], want)
        tokens = unpatchify.backward(x, 2, 0, (2, 2, 2))
        assert torch.equal(unpatchify3d(tokens, (1, 1, 2), (2, 2, 2), 2, impl="reference"), near)
        x.fill_(torch.nan)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batches_and_videos_give_empty_results_and_zero_gradients(device):
    weight = torch.randn(5, 3, 1, 2, 2, device=device, requires_grad=True)
    bias = torch.randn(5, device=device, requires_grad=True)
    pos = torch.randn(8, 5, device=device, requires_grad=True)
    out = patchify3d(torch.empty(0, 3, 2, 4, 4, device=device), weight, bias, pos, impl="triton")
    assert out.shape == (0, 8, 5)
    out.sum().backward()
    assert all(each.grad.shape == each.shape and not each.grad.any() for each in (weight, bias, pos))
    assert patchify3d(torch.empty(2, 3, 0, 4, 4, device=device), weight, impl="triton").shape == (2, 0, 5)
    narrow = torch.empty(5, 0, 1, 2, 2, device=device, requires_grad=True)
    out = patchify3d(torch.empty(2, 0, 2, 4, 4, device=device), narrow, bias, pos, impl="triton")
    grads = torch.autograd.grad(out.sum(), (narrow, bias, pos))
    assert [each.unique().tolist() for each in grads] == [[], [16.0], [2.0]]  # tokens without channels are these alone
    video = unpatchify3d(torch.empty(0, 8, 12, device=device), (2, 2, 2), (1, 2, 2), 3, impl="triton")
    assert video.shape == (0, 3, 2, 4, 4)


# Unpatchify.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64],
    ids=str,
)
def test_unpatchify_moves_values_of_every_size(device, dtype):
    shapes = ((2, 2, (3, 5, 7), (2, 2, 2)), (1, 3, (2, 16, 32), (1, 16, 16)), (1, 40, (1, 4, 6), (1, 1, 3)))
    if device == "cuda":
        shapes = ((2, 16, (21, 60, 104), (1, 2, 2)), (1, 3, (17, 250, 256), (4, 16, 16)))
    for batch, channels, size, patch in shapes:
        grid = Grid(*(-(-n // p) for n, p in zip(size, patch, strict=True)), 2, 1)
        shape = (batch, grid.tokens, math.prod(patch) * channels)
        tokens = torch.randint(0, 2 if dtype == torch.bool else 251, shape, device=device).to(dtype)
        for view in (tokens, tokens.transpose(1, 2).contiguous().transpose(1, 2), tokens.expand(2, -1, -1, -1)[1]):
            got = unpatchify3d(view, grid, patch, channels, size=size, impl="triton")
            assert torch.equal(got, unpatchify3d(tokens, grid, patch, channels, size=size, impl="reference"))


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_of_unpatchify_is_its_transpose(device, nan_memory):
    for batch, channels, size, patch, _ in cases(device, torch.float32):
        grid = Grid(*(-(-n // p) for n, p in zip(size, patch, strict=True)), 1, 2)
        tokens = torch.randn(batch, grid.tokens, math.prod(patch) * channels, device=device, requires_grad=True)
        got = unpatchify3d(tokens, grid, patch, channels, size=size, impl="triton")
        want = unpatchify3d(tokens, grid, patch, channels, size=size, impl="reference")
        for dvideo in (torch.randn_like(got), torch.randn_like(got).transpose(1, 2).contiguous().transpose(1, 2)):
            grads = [torch.autograd.grad(each, tokens, dvideo, retain_graph=True)[0] for each in (got, want)]
            assert torch.equal(*grads)
