"""The Triton kernels of modulate and gated residuals: small under the interpreter, at models' sizes on a GPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from stattn.kernels import _rows, _sums, gate_modulate
from stattn.kernels import gate as gate_kernels
from stattn.kernels import modulate as modulate_kernels
from stattn.ops.gate import gate_residual, gate_residual_modulate
from stattn.ops.modulate import modulate

CPU = pytest.param("cpu", marks=pytest.mark.interpreter)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = (CPU, CUDA)
DTYPES = (
    *(pytest.param("cpu", dtype, marks=pytest.mark.interpreter) for dtype in (torch.float32, torch.float16)),
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
)
OPERATIONS = ("modulate", "gate_residual", "gate_residual_modulate")


class Case(NamedTuple):
    """A call. gate, scale, shift: "sample", "frame", "token" or None. vectors: their dtype, None for x's."""

    batch: int
    tokens: int
    channels: int
    gate: str | None = "sample"
    scale: str | None = "sample"
    shift: str | None = "sample"
    frames: int = 3
    norm: str = "layer"
    affine: bool = False
    vectors: torch.dtype | None = torch.float32


SMALL = {
    "per sample": Case(2, 6, 40),
    "per frame, affine, rms": Case(2, 6, 40, "frame", "frame", "frame", norm="rms", affine=True),
    "per token, affine": Case(2, 6, 24, "token", "token", "token", affine=True),
    "kinds differ": Case(2, 6, 24, "token", "sample", "token", affine=True),
    "other kinds differ": Case(2, 6, 24, "sample", "token", "sample", affine=True, norm="rms"),
    "frames and samples": Case(2, 6, 24, "frame", "sample", "frame", affine=True),
    "samples and frames": Case(2, 6, 24, "sample", "frame", "sample", frames=2),
    "weights only": Case(3, 5, 17, None, None, None, affine=True),
    "nothing": Case(2, 3, 33, None, None, None, norm="rms"),
    "scale only": Case(1, 5, 40, None, "sample", None, vectors=None),
    "shift only, per token": Case(1, 4, 40, "token", None, "token"),
    "a tail behind four chunks": Case(1, 2, 1060, vectors=None, affine=True),
    "one token, one channel": Case(2, 1, 1, "sample", "sample", "sample"),
}
REAL = {
    "wan 14b": Case(1, 7200, 5120, frames=2),
    "wan 1.3b": Case(2, 7800, 1536, frames=5),
    "wan 1.3b per frame": Case(1, 7800, 1536, "frame", "frame", "frame", frames=5),
    "cogvideox": Case(2, 3000, 3072, affine=True, vectors=None),
    "per token": Case(1, 3000, 1536, "token", "token", "token", affine=True),
    "wan's cross-attention norm": Case(1, 6000, 5120, None, None, None, affine=True),
    "rms, an odd width": Case(2, 1999, 1111, norm="rms", affine=True),
    "wide": Case(1, 300, 20480, affine=True),
    "wide, per token": Case(1, 300, 12288, "token", "token", "sample", affine=True),
    "many samples": Case(4096, 7, 128),
}


# Those that differ in what the gate alone reads, and those that 16 bits run too under the interpreter.
GATES = "per sample", "per frame, affine, rms", "per token, affine", "weights only"
HALF = "per frame, affine, rms", "per token, affine", "other kinds differ", "scale only"


def cases(device: str, dtype: torch.dtype, operation: str = "") -> dict[str, Case]:
    """Small cases under the interpreter; on a GPU, where each compiles several kernels, all in one dtype only."""
    if device == "cpu":
        if dtype == torch.float32 and operation != "gate_residual":
            return SMALL
        labels = GATES if operation == "gate_residual" else HALF
        tail = ("a tail behind four chunks",) if dtype == torch.float32 else ()
        return {label: SMALL[label] for label in (*labels, *tail, "one token, one channel")}
    if dtype == torch.bfloat16:
        return {**REAL, **{label: SMALL[label] for label in ("kinds differ", "one token, one channel")}}
    return {"rms, an odd width": REAL["rms, an odd width"], "samples and frames": SMALL["samples and frames"]}


class Inputs(NamedTuple):
    x: Tensor
    y: Tensor
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def draw(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    """The tensors of a case. The vectors hold values that 16 bits do not."""
    batch, tokens, channels = case[:3]
    shapes = {"sample": (batch, channels), "frame": (batch, case.frames, channels), "token": (batch, tokens, channels)}

    def vector(kind: str | None) -> Tensor | None:
        if kind is None:
            return None
        return (torch.randn(shapes[kind], device=device) / 3).to(case.vectors or dtype)

    x, y = torch.randn(2, batch, tokens, channels, device=device).to(dtype)
    weight, bias = (torch.randn(2, channels, device=device) / 3).to(dtype) if case.affine else (None, None)
    return Inputs(x, y, vector(case.gate), vector(case.scale), vector(case.shift), weight, bias)


def call(operation: str, case: Case, inputs: Inputs, impl: str) -> tuple[Tensor, ...]:
    x, y, gate, scale, shift, weight, bias = inputs
    per_frame = {"gate_residual": (case.gate,), "modulate": (case.scale, case.shift)}
    kinds = per_frame.get(operation, (case.gate, case.scale, case.shift))
    frames = case.frames if "frame" in kinds else None
    if operation == "gate_residual":
        return (gate_residual(x, y, gate, frames=frames, impl=impl),)
    norm: dict[str, Any] = {"norm": case.norm, "weight": weight, "bias": bias, "frames": frames, "impl": impl}
    if operation == "modulate":
        return (modulate(x, scale, shift, **norm),)
    return gate_residual_modulate(x, y, gate, scale, shift, **norm)


def leaves(operation: str, inputs: Inputs) -> tuple[Inputs, dict[str, Tensor]]:
    """Inputs that ask for gradients, and those that the operation reads by name."""
    fields = {name: each.detach().requires_grad_() for name, each in inputs._asdict().items() if each is not None}
    names = {"gate_residual": ("x", "y", "gate"), "modulate": ("x", "scale", "shift", "weight", "bias")}
    read = names.get(operation, Inputs._fields)
    return inputs._replace(**fields), {name: each for name, each in fields.items() if name in read}


def run(operation: str, case: Case, inputs: Inputs, douts: tuple[Tensor, ...], impl: str) -> dict[str, Tensor]:
    """The outputs and the gradients of every tensor, by name."""
    given, asked = leaves(operation, inputs)
    outs = call(operation, case, given, impl)
    grads = torch.autograd.grad(outs, list(asked.values()), douts[-len(outs) :])
    named = {f"output {number}": out.detach() for number, out in enumerate(outs)}
    return {**named, **{f"d{name}": grad for name, grad in zip(asked, grads, strict=True)}}


def double(inputs: Inputs) -> Inputs:
    return Inputs(*(None if each is None else each.double() for each in inputs))


def assert_no_worse(name: str, got: Tensor, eager: Tensor, exact: Tensor, terms: float = 0.0) -> None:
    """Compare with float64 by the rule that a kernel may err twice as much as eager PyTorch.

    terms: the size of float32 terms that cancel: each may be off by half a last bit.
    """
    assert got.dtype == eager.dtype
    assert got.shape == eager.shape
    if not got.numel():
        return
    error, slack = (got - exact).abs(), torch.finfo(got.dtype).eps * exact.abs().max()
    slack += torch.finfo(torch.float32).eps * terms
    bound = 2 * ((eager - exact).abs().max() + slack)
    where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert error.max() <= bound, f"{name}: error {error.max():.3g} at {where}, bound {bound:.3g}"
    rms, eager_rms = error.square().mean().sqrt(), (eager - exact).square().mean().sqrt()
    # What is rounded to 16 bits errs alike. A float32 value differs by the order of its sum alone, a few last bits of
    # either; and over a handful of elements the root mean square says no more than the largest error.
    limit = 1.1 * eager_rms if got.dtype.itemsize == 2 and got.numel() > 1000 else 2 * eager_rms + slack
    assert rms <= limit, f"{name}: RMS error {rms:.3g}, eager's {eager_rms:.3g}"


# Right.


@pytest.mark.parametrize(("device", "dtype"), DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_results_and_gradients_err_no_more_than_eager_pytorch(device, dtype, operation, nan_memory):
    for label, case in cases(device, dtype, operation).items():
        inputs = draw(case, dtype, device)
        douts = tuple(torch.randn(2, *inputs.x.shape, device=device).to(dtype))
        exact = run(operation, case, double(inputs), tuple(each.double() for each in douts), "reference")
        eager = run(operation, case, inputs, douts, "reference")
        # The layer norm of one channel is constant: its gradient adds up terms of 1 / sqrt(eps) dout, which cancel.
        alone = case.channels == 1 and case.norm == "layer" and operation != "gate_residual"
        terms = 1e3 * float(max(each.abs().max() for each in (*douts, douts[0] * inputs.y))) if alone else 0.0
        for name, got in run(operation, case, inputs, douts, "triton").items():
            assert_no_worse(f"{name} of {label}", got, eager[name], exact[name], terms)


@pytest.mark.parametrize(("device", "dtype"), DTYPES)
def test_the_sum_is_that_of_eager_pytorch_bit_by_bit_in_both_kernels(device, dtype):
    for label, case in cases(device, dtype, "gate_residual").items():
        inputs = draw(case, dtype, device)
        want = call("gate_residual", case, inputs, "reference")[0]
        assert torch.equal(call("gate_residual", case, inputs, "triton")[0], want), label
        assert torch.equal(call("gate_residual_modulate", case, inputs, "triton")[0], want), label


@pytest.mark.parametrize("device", DEVICES)
def test_every_config_is_right(device, monkeypatch):
    case = Case(1, 3, 70, "frame", "frame", "sample") if device == "cpu" else Case(2, 2100, 5120, *["frame"] * 3)
    inputs = draw(case, torch.float16, device)
    douts = tuple(torch.randn(2, *inputs.x.shape, device=device).half())
    modules = (modulate_kernels, gate_kernels, gate_modulate)
    places = [(module, name) for module in modules for name in ("CONFIGS", "BACKWARD_CONFIGS")]
    want = {name: run(name, case, inputs, douts, "reference") for name in OPERATIONS}
    for module, name in places:
        operations = {modulate_kernels: "modulate", gate_kernels: "gate_residual"}
        operation = operations.get(module, "gate_residual_modulate")
        for config in getattr(module, name):
            with monkeypatch.context() as patched:
                patched.setattr(module, name, (config,))
                got = run(operation, case, inputs, douts, "triton")
                for _ in range(50 if device == "cuda" else 0):
                    again = run(operation, case, inputs, douts, "triton")
                    assert all(torch.equal(again[each], tensor) for each, tensor in got.items()), config
                for each, tensor in got.items():
                    exact = want[operation][each]
                    # Two roundings to fp16 apart, and a sum over 4,200 tokens in another order.
                    assert (tensor - exact).abs().max() <= 4e-3 * exact.abs().max(), (config, each)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_an_offset_of_a_thousand_and_an_outlier_cost_no_digits(device, norm):
    x = torch.randn(2, 4, 300, device=device)
    x[0] += 1000
    x[1, :, 7] = 3e4
    eager, got = (modulate(x, None, None, norm=norm, impl=impl) for impl in ("reference", "triton"))
    assert_no_worse("output", got, eager, modulate(x.double(), None, None, norm=norm, impl="reference"))


@pytest.mark.parametrize("device", DEVICES)
def test_a_constant_token_is_finite_forward_and_backward(device):
    x = torch.full((1, 2, 40), 3.0, device=device, requires_grad=True)
    y = modulate(x, torch.ones(1, 40, device=device), torch.full((1, 40), 0.5, device=device), impl="triton")
    y.sum().backward()
    assert torch.equal(y, torch.full_like(y, 0.5))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_too_long_for_sums_beside_them_are_right(device, monkeypatch):
    monkeypatch.setattr(modulate_kernels, "MAX_FUSED_CHANNELS", 16)
    monkeypatch.setattr(gate_modulate, "MAX_FUSED_CHANNELS", 16)
    labels = "per sample", "per frame, affine, rms", "per token, affine", "frames and samples"
    for label in labels:
        case = SMALL[label]
        inputs = draw(case, torch.float32, device)
        douts = tuple(torch.randn(2, *inputs.x.shape, device=device))
        for operation in ("modulate", "gate_residual_modulate"):
            want = run(operation, case, inputs, douts, "reference")
            for name, got in run(operation, case, inputs, douts, "triton").items():
                torch.testing.assert_close(got, want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_stream_in_float32_takes_a_branch_and_vectors_of_other_dtypes(device):
    case = SMALL["per sample"]
    wide, half = draw(case, torch.float32, device), draw(case, torch.float16, device)
    inputs = wide._replace(y=half.y, gate=half.gate.half())
    douts = tuple(torch.randn(2, *inputs.x.shape, device=device))
    want = run("gate_residual_modulate", case, inputs, douts, "reference")
    for name, got in run("gate_residual_modulate", case, inputs, douts, "triton").items():
        assert got.dtype == want[name].dtype
        torch.testing.assert_close(got, want[name])
    assert [want[name].dtype for name in ("dx", "dy", "dgate")] == [torch.float32, torch.float16, torch.float16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("used", [0, 1])
def test_only_one_of_the_two_outputs_may_be_used(device, used):
    case = SMALL["per frame, affine, rms"]
    inputs = draw(case, torch.float32, device)
    grads = []
    for impl in ("triton", "reference"):
        given, asked = leaves("gate_residual_modulate", inputs)
        out = call("gate_residual_modulate", case, given, impl)[used]
        grads.append(torch.autograd.grad(out.square().sum(), list(asked.values()), allow_unused=True))
    for got, want in zip(*grads, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_that_nobody_asks_for_are_not_computed(device):
    case = SMALL["kinds differ"]
    inputs = draw(case, torch.float32, device)
    douts = tuple(torch.randn(2, *inputs.x.shape, device=device))
    for operation in OPERATIONS:
        want = run(operation, case, inputs, douts, "triton")
        for name in leaves(operation, inputs)[1]:
            one = getattr(inputs, name).detach().requires_grad_()
            outs = call(operation, case, inputs._replace(**{name: one}), "triton")
            assert torch.equal(torch.autograd.grad(outs, one, douts[-len(outs) :])[0], want[f"d{name}"]), name


# Memory and layout.


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_read_or_written_beyond_the_tensors(device, monkeypatch):
    guards: list[tuple[Tensor, int]] = []

    def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
        size = math.prod(shape)
        whole = torch.full((size + 1024,), torch.nan, dtype=dtype, device=device)
        guards.append((whole, size))
        return whole[512 : 512 + size].view(shape)

    for label in ("per frame, affine, rms", "kinds differ", "nothing", "one token, one channel"):
        case = SMALL[label]
        plain = draw(case, torch.float16, device)
        inputs = Inputs(*(None if t is None else guarded(t.shape, t.dtype, device).copy_(t) for t in plain))
        douts = tuple(guarded(plain.x.shape, torch.float16, device).normal_() for _ in range(2))
        for operation in OPERATIONS:
            with monkeypatch.context() as patched:
                patched.setattr(torch, "empty", guarded)
                got = run(operation, case, inputs, douts, "triton")
            assert all(each.isfinite().all() for each in got.values()), label
        for a, b in zip(plain, inputs, strict=True):
            assert (a is None and b is None) or torch.equal(a, b), f"an input of {label} was modified"
        assert len(guards) >= 8
        for whole, size in guards:
            assert whole[:512].isnan().all()
            assert whole[512 + size :].isnan().all()
        guards.clear()


def slices(tensor: Tensor) -> Tensor:
    """The same values between NaN, off their alignment: a slice of the channels of a wider tensor."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 7), torch.nan, dtype=tensor.dtype, device=tensor.device)
    wide[..., 3:-4] = tensor
    return wide[..., 3:-4]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "slices of wider tensors": slices,
    "tokens before samples": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
}
COPIED: dict[str, Callable[[Tensor], Tensor]] = {  # before a kernel sees them
    "channels first": lambda tensor: tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other channel": lambda tensor: tensor.repeat_interleave(2, dim=-1)[..., ::2],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_tensors_of_any_strides_give_the_same_bits(device, operation):
    both = {"kinds differ": LAYOUTS | COPIED, "samples and frames": LAYOUTS}
    for label, layouts in both.items() if device == "cpu" else [("kinds differ", LAYOUTS)]:
        case = SMALL[label]
        inputs = draw(case, torch.float16, device)
        douts = tuple(torch.randn(2, *inputs.x.shape, device=device).half())
        want = run(operation, case, inputs, douts, "triton")
        for layout, move in layouts.items():
            moved = Inputs(*(each if each is None or each.dim() == 1 else move(each) for each in inputs))
            assert not moved.x.is_contiguous()
            got = run(operation, case, moved, tuple(move(each) for each in douts), "triton")
            assert all(torch.equal(got[name], want[name]) for name in want), (label, layout)


@pytest.mark.parametrize("device", DEVICES)
def test_expanded_tensors_and_gradients_are_read_right(device):
    table = torch.randn(6, 40, device=device)
    row = torch.randn(40, device=device)
    x = torch.randn(1, 5, 40, device=device).expand(3, 5, 40).requires_grad_()
    results = []
    for impl in ("triton", "reference"):
        out = modulate(x, table[1].expand(3, 40), table[4].expand(3, 5, 40), weight=row, bias=row[:1].expand(40),
                       impl=impl)  # fmt: skip
        results.append((out, *torch.autograd.grad(out.sum(), x)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements_are_found():
    far = 2**31 + 64
    memory = torch.full((far + 4096,), torch.nan, dtype=torch.bfloat16, device="cuda")
    vector = torch.randn(2, 64, device="cuda")
    for strides in ((far, 64, 1), (64, far, 1)):
        x = memory.as_strided((2, 2, 64), strides).copy_(torch.randn(2, 2, 64))
        near = x.clone(memory_format=torch.contiguous_format)
        assert torch.equal(modulate(x, vector, vector, impl="triton"), modulate(near, vector, vector, impl="triton"))
        assert torch.equal(gate_residual(x, x, vector, impl="triton"), gate_residual(near, near, vector, impl="triton"))
        x.fill_(torch.nan)
    del memory, x
    x = torch.randn(1, 1 << 20, 2064, dtype=torch.bfloat16, device="cuda")  # 2.16e9 elements
    vector = torch.randn(1, 2064, device="cuda")
    last = slice((1 << 20) - 100, None)
    for operation in (modulate, lambda x, gate, _, impl: gate_residual(x, x, gate, impl=impl)):
        out = operation(x, vector, vector, impl="triton")
        assert torch.equal(out[:, last], operation(x[:, last].clone(), vector, vector, impl="triton"))


@pytest.mark.parametrize("device", DEVICES)
def test_more_samples_than_a_grid_has_rows_are_served(device):
    batch = 70_000 if device == "cuda" else 7
    case = Case(batch, 1, 16)
    inputs = draw(case, torch.float32, device)
    douts = tuple(torch.randn(2, *inputs.x.shape, device=device))
    for operation in OPERATIONS:
        want = run(operation, case, inputs, douts, "reference")
        for name, got in run(operation, case, inputs, douts, "triton").items():
            torch.testing.assert_close(got, want[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_every_number_of_tokens_around_a_tile_is_right(device):
    assert _rows.tile_for(128, 8, 40, 1).rows == 8
    for tokens in (1, 6, 7, 8, 9, 10):
        case = Case(2, tokens, 128, norm="rms")
        inputs = draw(case, torch.float32, device)
        douts = tuple(torch.randn(2, *inputs.x.shape, device=device))
        want = run("gate_residual_modulate", case, inputs, douts, "reference")
        for name, got in run("gate_residual_modulate", case, inputs, douts, "triton").items():
            torch.testing.assert_close(got, want[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("batch", "tokens"), [(0, 6), (2, 0)])
def test_no_samples_or_tokens_give_empty_results_and_zero_gradients(device, batch, tokens):
    case = Case(batch, tokens, 24, affine=True)
    inputs = draw(case, torch.float32, device)
    for operation in OPERATIONS:
        got = run(operation, case, inputs, tuple(torch.ones(2, batch, tokens, 24, device=device)), "triton")
        assert got["output 0"].shape == inputs.x.shape
        assert not any(each.any() for each in got.values())
    assert not inputs.weight.isnan().any()


# Fixed order.


def test_programs_share_a_group_by_its_own_sizes_and_fill_the_gpu():
    assert _sums.programs_for(1, 75_600, 264) == 264
    assert _sums.programs_for(21, 3_600, 264) == 25  # 525 programs of 144 tiles in two waves
    assert _sums.programs_for(1, 3, 264) == 3
    assert _sums.programs_for(1000, 100, 264) == 1
    for groups, tiles in itertools.product((1, 21, 133, 300), (1, 7, 264, 3_600)):
        programs = _sums.programs_for(groups, tiles, 264)
        assert 1 <= programs <= tiles
        assert _sums.programs_for(groups, tiles, 264) == programs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_sample_does_not_depend_on_its_batch(device, operation):
    for gate, scale in (("frame", "sample"), ("sample", "frame")):
        small, large = Case(3, 3, 16, gate, scale, "sample"), Case(3, 3900, 1536, gate, scale, "sample")
        case = small if device == "cpu" else large
        inputs = draw(case, torch.float16, device)
        douts = tuple(torch.randn(2, *inputs.x.shape, device=device).half())
        together = run(operation, case, inputs, douts, "triton")
        for sample in range(3):
            one = slice(sample, sample + 1)
            alone = Inputs(*(None if each is None else each[one] for each in inputs))
            parts = run(operation, case._replace(batch=1), alone, tuple(each[one] for each in douts), "triton")
            assert all(torch.equal(part, together[name][one]) for name, part in parts.items())


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_250_runs_beside_another_stream_give_the_same_bits(operation):
    case = Case(1, 3000, 1536, "frame", "sample", "sample", affine=True)
    inputs = draw(case, torch.bfloat16, "cuda")
    douts = tuple(torch.randn(2, *inputs.x.shape, device="cuda").bfloat16())
    first = run(operation, case, inputs, douts, "triton")
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    for _ in range(250):
        with torch.cuda.stream(other):
            noise @ noise
        again = run(operation, case, inputs, douts, "triton")
        assert all(torch.equal(again[name], each) for name, each in first.items())
