"""A projection with its GELU: values, gradients, errors, and the fused product on a GPU."""

import pytest
import torch
from torch import nn

from stattn.modules import FeedForward, ModulatedNorm
from stattn.ops.linear_gelu import linear_gelu
from stattn.reference.linear_gelu import linear_gelu as reference


def draw(tokens=(2, 33), channels=48, features=80, dtype=torch.float32, device="cpu"):
    return (
        torch.randn(*tokens, channels, dtype=dtype, device=device),
        torch.randn(features, channels, dtype=dtype, device=device) / channels**0.5,
        torch.randn(features, dtype=dtype, device=device),
    )


@pytest.mark.parametrize("tokens", [(2, 33), (7,), (), (0,), (2, 0)])
def test_it_is_the_tanh_form_of_gelu_of_the_projection(tokens):
    x, weight, bias = draw(tokens, dtype=torch.float64)
    h = x @ weight.T + bias
    want = h / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    torch.testing.assert_close(linear_gelu(x, weight, bias), want, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_two_operations():
    given = [each.requires_grad_() for each in draw((3,), 5, 4, torch.float64)]
    assert torch.autograd.gradcheck(linear_gelu, given)
    assert torch.autograd.gradgradcheck(linear_gelu, given)


def test_a_feed_forward_has_the_state_and_the_values_of_a_sequence():
    plain = nn.Sequential(nn.Linear(12, 20), nn.GELU(approximate="tanh"), nn.Linear(20, 12))
    ours = FeedForward(12, 20)
    ours.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 5, 12)
    assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x of type list"),
        ({"x": torch.zeros(3, 47)}, ValueError, r"x of shape \(3, 47\) must be .* C = 48"),
        ({"weight": torch.zeros(80)}, ValueError, r"weight of shape \(80,\)"),
        ({"bias": torch.zeros(79)}, ValueError, r"bias of shape \(79,\)"),
        ({"bias": torch.zeros(80, dtype=torch.float64)}, TypeError, "bias of torch.float64 must have one dtype"),
        ({"weight": torch.zeros(80, 48, device="meta")}, ValueError, "weight is on meta"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    given = dict(zip(("x", "weight", "bias"), draw(), strict=True))
    linear_gelu(**given)
    with pytest.raises(error, match=message):
        linear_gelu(**given | change)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1, 3, 30])
def test_the_fused_product_errs_no_more_than_the_two_operations(dtype, scale):
    x, weight, bias = draw((2, 257), 96, 144, dtype, "cuda")
    x *= scale
    got = linear_gelu(x, weight, bias).double()
    eager = reference(x, weight, bias).double()
    want = reference(*(each.double() for each in (x, weight, bias)))
    error, allowed = (got - want).abs(), (eager - want).abs()
    assert error.max() <= 2 * (allowed.max() + torch.finfo(dtype).eps * want.abs().max())
    assert error.square().mean().sqrt() <= 1.1 * allowed.square().mean().sqrt()


@pytest.mark.gpu
def test_a_gpu_writes_the_projection_only_where_a_gradient_asks_for_it():
    x, weight, bias = draw((1024,), 64, 4096, torch.bfloat16, "cuda")
    linear_gelu(x, weight, bias)
    size = 2 * 1024 * 4096
    for tracked, most in ((False, 1.5 * size), (True, 2.5 * size)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_gelu(x.requires_grad_(tracked), weight, bias)
        peak = torch.cuda.max_memory_allocated() - before
        assert most - size < peak < most, f"requires_grad={tracked}: {peak / size:.2f} times the result"


@pytest.mark.gpu
def test_gradients_and_a_compiled_call_on_a_gpu():
    given = [each.requires_grad_() for each in draw((64,), dtype=torch.bfloat16, device="cuda")]
    got = torch.autograd.grad(linear_gelu(*given).sum(), given)
    want = torch.autograd.grad(reference(*given).sum(), given)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.no_grad():
        compiled = torch.compile(linear_gelu, fullgraph=True)(*given)
        torch.testing.assert_close(compiled, linear_gelu(*given), rtol=2e-2, atol=2e-2)


def test_a_layer_in_the_place_of_a_linear_one_is_called_as_it_is():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module = FeedForward(12, 20)
    module[0] = Doubled(12, 20)
    norm, last = ModulatedNorm(12), Doubled(12, 3)
    x = torch.randn(2, 5, 12)
    assert torch.equal(module(x), module[2](nn.functional.gelu(module[0](x), approximate="tanh")))
    assert torch.equal(norm.project(last, x), last(norm(x)))
