"""``modulate_linear``: its kernel against float64, small under the interpreter, at models' sizes on a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from stattn.kernels import modulate_linear as kernels
from stattn.modules import ModulatedNorm
from stattn.ops.modulate import modulate
from stattn.ops.modulate_linear import ModulateLinearCall, modulate_linear

DEVICES = (pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu))
DTYPES = (
    pytest.param("cpu", torch.float16, marks=pytest.mark.interpreter),
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.bfloat16, torch.float16)),
)


class Case(NamedTuple):
    batch: int
    tokens: int
    channels: int
    features: int
    scale: str | None = "sample"
    shift: str | None = "sample"
    norm: str = "layer"
    affine: bool = False
    offset: float = 0.0


FRAMES = 3
SMALL = {
    "per sample": Case(2, 6, 40, 12),
    "per frame, affine": Case(2, 6, 24, 16, "frame", "frame", affine=True),
    "kinds differ, rms": Case(1, 6, 130, 3, "frame", "sample", norm="rms", affine=True),
    "nothing": Case(1, 5, 33, 17, None, None),
    "scale only": Case(1, 5, 256, 64, "sample", None),
    "shift only": Case(1, 5, 64, 8, None, "sample", affine=True),
    "far from zero": Case(1, 4, 200, 8, offset=300.0),
    "one channel": Case(2, 3, 1, 2),
}
REAL = {
    "wan-14b": Case(1, 7 * 24 * 40, 5120, 64),
    "wan-1.3b": Case(2, 6 * 15 * 26, 1536, 64, "frame", "frame", offset=2.0),
    "256 features": Case(1, 3001, 1024, 256, norm="rms", affine=True),
}


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[list[Tensor | None], dict[str, Any]]:
    """x, scale, shift, matrix and its bias, and the keywords."""
    batch, tokens, channels, features = case[:4]
    shapes = {"sample": (batch, channels), "frame": (batch, FRAMES, channels)}
    scale, shift = (None if kind is None else torch.randn(shapes[kind], device=device) / 3 for kind in case[4:6])
    x = (torch.randn(batch, tokens, channels, device=device) * 2 + case.offset).to(dtype)
    matrix = (torch.randn(features, channels, device=device) / channels**0.5).to(dtype)
    weight, bias = torch.randn(2, channels, device=device) / 3 + 1 if case.affine else (None, None)
    frames = FRAMES if "frame" in case[4:6] else None
    options = {"norm": case.norm, "weight": weight, "bias": bias, "frames": frames}
    return [x, scale, shift, matrix, torch.randn(features, device=device).to(dtype)], options


def double(each: Any) -> Any:
    return each.double() if isinstance(each, Tensor) else each


def assert_right(case: Case, dtype: torch.dtype, device: str, label: str) -> None:
    given, options = draw(case, dtype, device)
    with torch.no_grad():
        got = modulate_linear(*given, **options, impl="triton")
        eager = modulate_linear(*given, **options, impl="reference")
        wide = {name: double(each) for name, each in options.items()}
        exact = modulate_linear(*map(double, given), **wide, impl="reference")
    assert got.dtype == eager.dtype
    assert got.shape == eager.shape
    error, allowed = (got - exact).abs(), (eager - exact).abs()
    bound = 2 * (allowed.max() + torch.finfo(dtype).eps * exact.abs().max())
    assert error.max() <= bound, f"{label}: error {error.max():.3g}, bound {bound:.3g}"
    if got.numel() > 1000:
        rms, eager_rms = error.square().mean().sqrt(), allowed.square().mean().sqrt()
        assert rms <= 1.1 * eager_rms, f"{label}: RMS error {rms:.3g}, eager's {eager_rms:.3g}"


@pytest.mark.parametrize(("device", "dtype"), DTYPES)
def test_it_errs_no_more_than_the_two_operations(device, dtype):
    for label, case in (SMALL if device == "cpu" else SMALL | REAL).items():
        assert_right(case, dtype, device, label)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", range(len(kernels.CONFIGS)))
def test_every_config_is_right(device, config, monkeypatch):
    monkeypatch.setattr(kernels.forward, "__defaults__", (kernels.CONFIGS[config],))
    for label in ("per frame, affine", "kinds differ, rms", "far from zero"):
        assert_right(SMALL[label], torch.float16, device, label)
    given, options = draw(REAL["wan-1.3b"] if device == "cuda" else SMALL["per frame, affine"], torch.float16, device)
    with torch.no_grad():
        want = modulate_linear(*given, **options, impl="triton")
        for _ in range(50 if device == "cuda" else 1):
            assert torch.equal(modulate_linear(*given, **options, impl="triton"), want)


@pytest.mark.parametrize("device", DEVICES)
def test_views_give_the_same_bits_and_what_lies_around_is_not_touched(device):
    (x, scale, shift, matrix, bias), options = draw(SMALL["per frame, affine"], torch.float16, device)
    with torch.no_grad():
        want = modulate_linear(x, scale, shift, matrix, bias, **options, impl="triton")
        around = torch.full((2, 10, 40), torch.nan, device=device, dtype=x.dtype)
        view = around[:, 2:8, 8:32].copy_(x)
        got = modulate_linear(view, scale, shift, matrix.T.contiguous().T, bias, **options, impl="triton")
    assert torch.equal(got, want)
    assert int(around.isnan().sum()) == around.numel() - view.numel()


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_does_not_depend_on_its_batch(device):
    given, options = draw(SMALL["per sample"], torch.float16, device)
    with torch.no_grad():
        both = modulate_linear(*given, **options, impl="triton")
        alone = modulate_linear(*(each[1:] for each in given[:3]), *given[3:], **options, impl="triton")
    assert torch.equal(both[1:], alone)


@pytest.mark.parametrize("device", DEVICES)
def test_calls_that_one_pass_does_not_serve_are_the_two_operations(device):
    (x, scale, shift, matrix, bias), _ = draw(SMALL["per sample"], torch.float16, device)
    with torch.no_grad():
        per_token = torch.randn_like(x)
        got = modulate_linear(x, per_token, shift, matrix, bias, impl="triton")
        assert torch.equal(got, nn.functional.linear(modulate(x, per_token, shift, impl="triton"), matrix, bias))
    leaf = x.clone().requires_grad_()
    got = modulate_linear(leaf, scale, shift, matrix, bias, impl="triton")
    want = nn.functional.linear(modulate(leaf, scale, shift, impl="triton"), matrix, bias)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(each.float().sum(), leaf)[0] for each in (got, want)))


def test_what_one_pass_serves():
    call = ModulateLinearCall("cuda", (9, 0), (torch.bfloat16,), 64, False, False)
    assert call.fused
    assert not call._replace(dtypes=(torch.float32,)).fused
    assert not call._replace(features=257).fused
    assert not call._replace(per_token=True).fused
    assert not call._replace(tracked=True).fused


def test_empty_tensors_give_empty_results():
    (x, scale, shift, matrix, bias), _ = draw(SMALL["per sample"], torch.float16, "cpu")
    with torch.no_grad():
        assert modulate_linear(x[:, :0], scale, shift, matrix, bias, impl="triton").shape == (2, 0, 12)
        assert modulate_linear(x[:0], scale[:0], shift[:0], matrix, bias, impl="triton").shape == (0, 6, 12)


def test_a_norm_projects_as_the_two_modules_do():
    norm, linear = ModulatedNorm(24, affine=True), nn.Linear(24, 6)
    x, scale, shift = torch.randn(2, 5, 24), torch.randn(2, 24), torch.randn(2, 24)
    assert torch.equal(norm.project(linear, x, scale, shift), linear(norm(x, scale, shift)))
    with torch.autocast("cpu", torch.bfloat16):
        assert norm.project(linear, x, scale, shift).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"matrix": torch.zeros(6, 7)}, ValueError, r"matrix of shape \(6, 7\) must be \[E, C\] = \(6, 8\)"),
        ({"matrix_bias": torch.zeros(5)}, ValueError, r"matrix_bias of shape \(5,\)"),
        ({"matrix": torch.zeros(6, 8).double()}, TypeError, "matrix of torch.float64 must have the dtype of x"),
        ({"norm": "batch"}, ValueError, "norm='batch'"),
        ({"scale": torch.zeros(1, 9)}, ValueError, "scale of shape"),
        ({"impl": "cuda"}, ValueError, "impl='cuda'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    given = {"x": torch.zeros(1, 3, 8), "scale": None, "shift": None, "matrix": torch.zeros(6, 8)}
    modulate_linear(**given)
    with pytest.raises(error, match=message):
        modulate_linear(**given | change)


@pytest.mark.gpu
def test_opcheck_compiled_calls_graphs_and_reruns():
    given, options = draw(SMALL["per frame, affine"], torch.bfloat16, "cuda")
    x, scale, shift, matrix, bias = given
    arguments = (x, scale, shift, "layer", options["weight"], options["bias"], 1e-6, matrix, bias)
    torch.library.opcheck(torch.ops.stattn.modulate_linear, arguments)
    with torch.no_grad():
        want = modulate_linear(*given, **options)
        compiled = torch.compile(lambda *each: modulate_linear(*each, **options), fullgraph=True)
        assert torch.equal(compiled(*given), want)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                out = modulate_linear(*given, **options)
        for _ in range(20):
            x.copy_(torch.randn_like(x))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, modulate_linear(*given, **options))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            graph.replay()
            torch.cuda.synchronize()
    names = [each.name for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    assert names == ["vector_products", "modulate_linear"]


@pytest.mark.gpu
def test_250_runs_beside_another_stream_and_on_another_device_give_the_same_bits():
    given, options = draw(REAL["wan-1.3b"], torch.bfloat16, "cuda")
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    with torch.no_grad():
        want = modulate_linear(*given, **options)
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            assert torch.equal(modulate_linear(*given, **options), want)
        for _ in range(250):
            with torch.cuda.stream(other):
                noise @ noise
            assert torch.equal(modulate_linear(*given, **options), want)
        if torch.cuda.device_count() > 1:
            there = [None if each is None else each.to("cuda:1") for each in given]
            assert torch.equal(modulate_linear(*there, **options).to("cuda:0"), want)
