"""modulate against torch's own norms, against itself per sample, frame and token, and by its gradients."""

import pytest
import torch
import torch.nn.functional as F

from stattn.ops.modulate import modulate


def expected(x, scale, shift, norm, weight, bias, eps):
    """The same formula from torch's norms, in float64; scale and shift [B, N, C]."""
    x, scale, shift = x.double(), scale.double(), shift.double()
    weight = None if weight is None else weight.double()
    channels = (x.shape[-1],)
    if norm == "layer":
        y = F.layer_norm(x, channels, weight, None if bias is None else bias.double(), eps)
    else:
        y = F.rms_norm(x, channels, weight, eps) + (0 if bias is None else bias.double())
    return y * (1 + scale) + shift


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_modulate_equals_the_norm_of_torch_scaled_and_shifted(norm, affine, eps):
    torch.manual_seed(0)
    x, scale, shift = torch.randn(3, 2, 12, 40, dtype=torch.float64)
    weight, bias = torch.randn(2, 40, dtype=torch.float64) if affine else (None, None)
    y = modulate(x, scale, shift, norm=norm, weight=weight, bias=bias, eps=eps)
    torch.testing.assert_close(y, expected(x, scale, shift, norm, weight, bias, eps), rtol=1e-12, atol=1e-12)


def test_layer_norm_with_affine_parameters_equals_torch_with_an_offset_of_a_thousand():
    torch.manual_seed(1)
    x, zero = torch.randn(2, 6, 64) + 1000, torch.zeros(2, 64)
    ref64 = F.layer_norm(x.double(), (64,), eps=1e-6)
    eager = F.layer_norm(x, (64,), eps=1e-6)
    error, eager_error = ((y.double() - ref64).abs().max() for y in (modulate(x, zero, zero), eager))
    assert error <= 2 * (eager_error + torch.finfo(torch.float32).eps * ref64.abs().max())


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_vectors_per_sample_per_frame_and_per_token_agree(norm):
    torch.manual_seed(2)
    x, scale, shift = torch.randn(2, 12, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    y = modulate(x, scale, shift, norm=norm, frames=3)
    tokens = (each.repeat_interleave(4, dim=1) for each in (scale, shift))
    assert torch.equal(y, modulate(x, *tokens, norm=norm))
    for frame in range(3):
        part = slice(4 * frame, 4 * frame + 4)
        assert torch.equal(y[:, part], modulate(x[:, part], scale[:, frame], shift[:, frame], norm=norm))


def test_scale_and_shift_may_be_of_different_kinds_or_absent():
    torch.manual_seed(3)
    x, per_sample, per_frame = torch.randn(2, 6, 8), torch.randn(2, 8), torch.randn(2, 3, 8)
    zero = torch.zeros(2, 8)
    mixed = modulate(x, per_sample, per_frame, frames=3)
    assert torch.equal(mixed, modulate(x, per_sample[:, None].repeat(1, 6, 1), per_frame.repeat_interleave(2, dim=1)))
    assert torch.equal(modulate(x, per_sample, None), modulate(x, per_sample, zero))
    assert torch.equal(modulate(x, None, per_sample), modulate(x, zero, per_sample))
    torch.testing.assert_close(modulate(x, None, None), F.layer_norm(x, (8,), eps=1e-6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_sixteen_bit_inputs_are_rounded_once(dtype, norm):
    torch.manual_seed(4)
    x = torch.randn(2, 10, 32).to(dtype)
    scale, shift = torch.randn(2, 2, 32) / 3  # float32 values that 16 bits do not hold
    weight = torch.randn(32).to(dtype)
    y = modulate(x, scale, shift, norm=norm, weight=weight)
    wide = modulate(x.float(), scale, shift, norm=norm, weight=weight.float())
    assert y.dtype == dtype
    assert torch.equal(y, wide.to(dtype))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_gradients_are_right_for_every_tensor(norm):
    torch.manual_seed(5)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in
               [(2, 6, 5), (2, 3, 5), (2, 5), (5,), (5,)]]  # fmt: skip
    assert torch.autograd.gradcheck(
        lambda x, scale, shift, weight, bias: modulate(x, scale, shift, norm=norm, weight=weight, bias=bias, frames=3),
        tensors,
    )


def test_gradients_have_the_dtype_of_their_tensor():
    x = torch.randn(2, 6, 8, dtype=torch.bfloat16, requires_grad=True)
    scale = torch.randn(2, 8, requires_grad=True)
    modulate(x, scale, None).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert scale.grad.dtype == torch.float32
    assert scale.grad.shape == (2, 8)


def test_a_token_depends_on_no_other_and_no_input_is_modified():
    torch.manual_seed(6)
    x, scale, shift = torch.randn(3, 10, 8), torch.randn(3, 8), torch.randn(3, 8)
    copies = [each.clone() for each in (x, scale, shift)]
    y = modulate(x, scale, shift)
    assert torch.equal(modulate(x[1:2, 4:7], scale[1:2], shift[1:2]), y[1:2, 4:7])
    assert all(torch.equal(a, b) for a, b in zip(copies, (x, scale, shift), strict=True))


def test_views_of_one_table_of_modulations_are_read_in_place():
    torch.manual_seed(7)
    table = torch.randn(2, 6, 8)
    x = torch.randn(8, 2, 5).permute(1, 2, 0)
    scale, shift = table[:, 1], table[:, 4]
    assert not scale.is_contiguous()
    assert torch.equal(modulate(x, scale, shift), modulate(x.contiguous(), scale.contiguous(), shift.contiguous()))


@pytest.mark.parametrize(("batch", "tokens"), [(0, 6), (2, 0), (0, 0)])
def test_an_empty_batch_or_no_tokens_give_an_empty_result(batch, tokens):
    x = torch.ones(batch, tokens, 8, requires_grad=True)
    y = modulate(x, torch.ones(batch, 3, 8), torch.ones(batch, 8), frames=3)
    assert y.shape == (batch, tokens, 8)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert modulate(x, torch.ones(batch, tokens, 8), None).shape == (batch, tokens, 8)


def test_a_constant_token_is_finite_forward_and_backward():
    x = torch.full((1, 2, 8), 3.0, requires_grad=True)
    y = modulate(x, torch.ones(1, 8), torch.full((1, 8), 0.5))
    y.sum().backward()
    assert torch.equal(y, torch.full_like(y, 0.5))
    assert x.grad.isfinite().all()


def test_frames_that_do_not_divide_the_tokens_are_refused():
    x, scale = torch.ones(2, 12, 8), torch.ones(2, 3, 8)
    modulate(x, scale, scale, frames=3)
    with pytest.raises(ValueError, match="frames=5 must be a positive integer that divides the 12 tokens"):
        modulate(x, torch.ones(2, 5, 8), None, frames=5)
    with pytest.raises(ValueError, match="frames=0"):
        modulate(x, scale, scale, frames=0)
    with pytest.raises(ValueError, match=r"scale of shape \(2, 3, 8\) must be \[B, F, C\] = \(2, 4, 8\)"):
        modulate(x, scale, scale, frames=4)
    with pytest.raises(ValueError, match=r"scale of shape \(2, 3, 8\) must be \[B, N, C\] without frames"):
        modulate(x, scale, scale)
    with pytest.raises(ValueError, match="frames=3 has no effect"):
        modulate(x, torch.ones(2, 8), None, frames=3)


def test_modulate_refuses_wrong_shapes_dtypes_and_devices():
    x, vector, row = torch.ones(2, 6, 8), torch.ones(2, 8), torch.ones(8)
    modulate(x, vector, vector, weight=row, bias=row)
    with pytest.raises(ValueError, match=r"x of shape \(6, 8\) must be \[B, N, C\]"):
        modulate(x[0], vector, vector)
    with pytest.raises(ValueError, match=r"shift of shape \(1, 8\) must be \[B, C\] = \(2, 8\)"):
        modulate(x, vector, vector[:1])
    with pytest.raises(ValueError, match=r"weight of shape \(7,\)"):
        modulate(x, vector, vector, weight=row[:7])
    with pytest.raises(ValueError, match=r"bias of shape \(2, 8\)"):
        modulate(x, vector, vector, bias=vector)
    with pytest.raises(TypeError, match="scale of torch.int64"):
        modulate(x, vector.long(), vector)
    with pytest.raises(TypeError, match="scale of type float must be a tensor"):
        modulate(x, 1.0, vector)
    with pytest.raises(ValueError, match="shift is on meta, x on cpu"):
        modulate(x, vector, vector.to("meta"))
    with pytest.raises(ValueError, match="weight is on meta, x on cpu"):
        modulate(x, vector, vector, weight=row.to("meta"))


def test_modulate_refuses_an_unknown_norm_and_a_wrong_eps():
    x, vector = torch.ones(2, 6, 8), torch.ones(2, 8)
    modulate(x, vector, vector, norm="rms", eps=0)
    with pytest.raises(ValueError, match="norm='batch' must be 'layer' or 'rms'"):
        modulate(x, vector, vector, norm="batch")
    with pytest.raises(ValueError, match="eps=-1.0 must not be negative"):
        modulate(x, vector, vector, eps=-1.0)
    with pytest.raises(ValueError, match="eps=nan must be finite"):
        modulate(x, vector, vector, eps=float("nan"))
    with pytest.raises(TypeError, match="eps='small' must be a number"):
        modulate(x, vector, vector, eps="small")
    with pytest.raises(ValueError, match="impl='flash'"):
        modulate(x, vector, vector, impl="flash")
