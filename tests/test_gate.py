"""gate_residual and gate_residual_modulate against the formula, against each other, and by their gradients."""

import pytest
import torch

from stattn.ops.gate import gate_residual, gate_residual_modulate
from stattn.ops.modulate import modulate


def test_gate_residual_is_x_plus_gate_times_y_for_each_kind_of_gate():
    torch.manual_seed(0)
    x, y = torch.randn(2, 2, 12, 8)
    sample, frame, token = torch.randn(2, 8), torch.randn(2, 3, 8), torch.randn(2, 12, 8)
    assert torch.equal(gate_residual(x, y, sample), x + sample[:, None] * y)
    assert torch.equal(gate_residual(x, y, frame, frames=3), x + frame.repeat_interleave(4, dim=1) * y)
    assert torch.equal(gate_residual(x, y, token), x + token * y)
    assert torch.equal(gate_residual(x, y, None), x + y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once_and_the_product_is_not(dtype):
    torch.manual_seed(1)
    x, y = torch.randn(2, 2, 64, 32).to(dtype)
    gate = torch.randn(2, 32) / 3
    z = gate_residual(x, y, gate)
    assert z.dtype == dtype
    assert torch.equal(z, (x.float() + gate[:, None] * y.float()).to(dtype))
    assert not torch.equal(z, x + gate[:, None].to(dtype) * y)


def test_a_stream_in_float32_takes_a_branch_in_bfloat16():
    torch.manual_seed(2)
    x, y, gate = torch.randn(2, 6, 8), torch.randn(2, 6, 8).bfloat16(), torch.randn(2, 8)
    z = gate_residual(x, y, gate)
    assert z.dtype == torch.float32
    assert torch.equal(z, x + gate[:, None] * y.float())


def test_a_gate_of_zero_returns_x_bitwise():
    x = torch.randn(2, 6, 8).bfloat16()
    assert torch.equal(gate_residual(x, torch.randn(2, 6, 8).bfloat16(), torch.zeros(2, 8)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_fused_pair_equals_its_two_halves_bitwise(dtype, norm):
    torch.manual_seed(3)
    x, y = torch.randn(2, 2, 12, 32).to(dtype)
    gate, scale, shift = torch.randn(3, 2, 3, 32)
    weight, bias = torch.randn(2, 32)
    options = {"norm": norm, "weight": weight, "bias": bias, "eps": 1e-5, "frames": 3}
    fused, modulated = gate_residual_modulate(x, y, gate, scale, shift, **options)
    residual = gate_residual(x, y, gate, frames=3)
    assert torch.equal(fused, residual)
    assert torch.equal(modulated, modulate(residual, scale, shift, **options))


def test_the_fused_pair_without_a_gate_is_a_plain_residual_before_a_norm():
    torch.manual_seed(4)
    x, y = torch.randn(2, 2, 6, 8)
    fused, modulated = gate_residual_modulate(x, y, None, None, None)
    assert torch.equal(fused, x + y)
    assert torch.equal(modulated, modulate(x + y, None, None))


def test_gradients_are_right_for_every_tensor():
    torch.manual_seed(5)
    shapes = [(2, 6, 5), (2, 6, 5), (2, 3, 5), (2, 5), (2, 3, 5)]
    x, y, gate, scale, shift = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(lambda *a: gate_residual(*a, frames=3), (x, y, gate))
    assert torch.autograd.gradcheck(lambda *a: gate_residual_modulate(*a, frames=3), (x, y, gate, scale, shift))
    assert torch.autograd.gradcheck(lambda x, y: gate_residual_modulate(x, y, None, None, None, norm="rms"), (x, y))


def test_inputs_of_any_strides_are_read_in_place_and_not_modified():
    torch.manual_seed(6)
    x, y = torch.randn(2, 8, 6).transpose(1, 2), torch.randn(6, 2, 8).transpose(0, 1)
    gate = torch.randn(2, 3, 8)[:, 1]
    copies = [each.clone() for each in (x, y, gate)]
    assert torch.equal(gate_residual(x, y, gate), gate_residual(*copies))
    assert all(torch.equal(a, b) for a, b in zip((x, y, gate), copies, strict=True))


@pytest.mark.parametrize(("batch", "tokens"), [(0, 6), (2, 0)])
def test_an_empty_batch_or_no_tokens_give_an_empty_result(batch, tokens):
    x, vector = torch.ones(batch, tokens, 8), torch.ones(batch, 8)
    assert gate_residual(x, x, vector).shape == x.shape
    assert [each.shape for each in gate_residual_modulate(x, x, vector, vector, vector)] == [x.shape] * 2


def test_gate_residual_refuses_wrong_shapes_dtypes_and_devices():
    x, gate = torch.ones(2, 6, 8), torch.ones(2, 8)
    gate_residual(x, x, gate)
    with pytest.raises(ValueError, match=r"y of shape \(2, 5, 8\) must be \[B, N, C\] = \(2, 6, 8\)"):
        gate_residual(x, x[:, :5], gate)
    with pytest.raises(ValueError, match=r"gate of shape \(8,\)"):
        gate_residual(x, x, gate[0])
    with pytest.raises(ValueError, match=r"gate of shape \(2, 1, 8\)"):
        gate_residual(x, x, gate[:, None])
    with pytest.raises(ValueError, match="frames=4 must be a positive integer that divides the 6 tokens"):
        gate_residual(x, x, torch.ones(2, 4, 8), frames=4)
    with pytest.raises(ValueError, match="frames=2 has no effect"):
        gate_residual(x, x, gate, frames=2)
    with pytest.raises(TypeError, match="y of torch.int64"):
        gate_residual(x, x.long(), gate)
    with pytest.raises(ValueError, match="y is on meta, x on cpu"):
        gate_residual(x, x.to("meta"), gate)
    with pytest.raises(ValueError, match="gate is on meta, x on cpu"):
        gate_residual(x, x, gate.to("meta"))
    with pytest.raises(ValueError, match="impl='cuda'"):
        gate_residual(x, x, gate, impl="cuda")


def test_gate_residual_modulate_refuses_what_its_halves_refuse():
    x, vector = torch.ones(2, 6, 8), torch.ones(2, 8)
    gate_residual_modulate(x, x, vector, vector, vector)
    with pytest.raises(ValueError, match=r"y of shape \(1, 6, 8\)"):
        gate_residual_modulate(x, x[:1], vector, vector, vector)
    with pytest.raises(ValueError, match=r"scale of shape \(2, 7\)"):
        gate_residual_modulate(x, x, vector, vector[:, :7], vector)
    with pytest.raises(ValueError, match="norm=None"):
        gate_residual_modulate(x, x, vector, vector, vector, norm=None)
    with pytest.raises(ValueError, match="eps=-1"):
        gate_residual_modulate(x, x, vector, vector, vector, eps=-1)
