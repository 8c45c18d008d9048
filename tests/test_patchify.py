"""patchify3d and unpatchify3d against nn.Conv3d, against loops, and against each other."""

import pytest
import torch
from torch import nn

from stattn.grid import Grid
from stattn.ops.patchify import patchify3d, unpatchify3d

PATCHES = [(1, 2, 2), (2, 8, 8), (1, 1, 1), (3, 1, 2)]


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-2, 3, shape).float()


@pytest.mark.parametrize("patch", PATCHES)
def test_patchify_equals_the_convolution_whose_weight_it_reads(patch):
    torch.manual_seed(0)
    conv = nn.Conv3d(4, 12, patch, stride=patch).double()
    x = torch.randn(2, 4, *(n * p for n, p in zip((2, 3, 5), patch, strict=True)), dtype=torch.float64)
    expected = conv(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patchify3d(x, conv.weight, conv.bias), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_patchify_of_small_integers_is_exact_in_every_dtype(dtype):
    torch.manual_seed(1)
    x, weight, bias, pos = integers(2, 3, 2, 4, 6), integers(5, 3, 1, 2, 2), integers(5), integers(12, 5)
    tokens = patchify3d(x.to(dtype), weight.to(dtype), bias.to(dtype), pos.to(dtype))
    exact = nn.functional.conv3d(x.double(), weight.double(), bias.double(), stride=(1, 2, 2))
    exact = exact.flatten(2).transpose(1, 2) + pos.double()
    assert tokens.dtype == dtype
    assert torch.equal(tokens.double(), exact)


def test_patchify_rounds_once_after_bias_and_position():
    x = torch.full((1, 1, 1, 1, 1), 256.0, dtype=torch.bfloat16)
    weight = torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16)
    one = torch.ones(1, dtype=torch.bfloat16)
    # bf16 holds 256 and 258 but not 257: a rounding after the bias would lose both ones.
    assert patchify3d(x, weight, one, one[None]).item() == 258.0


def test_patchify_ignores_an_enclosing_autocast():
    torch.manual_seed(2)
    x, weight = torch.randn(1, 3, 2, 4, 4), torch.randn(8, 3, 1, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = patchify3d(x, weight)
    assert torch.equal(tokens, patchify3d(x, weight))


def test_padding_puts_zeros_at_the_end_of_each_axis():
    torch.manual_seed(3)
    x, weight = integers(2, 3, 3, 5, 7), integers(4, 3, 2, 2, 4)
    padded = torch.zeros(2, 3, 4, 6, 8)
    padded[:, :, :3, :5, :7] = x
    assert torch.equal(patchify3d(x, weight, pad=True), patchify3d(padded, weight))


def test_tokens_follow_t_h_w_order():
    x = torch.arange(2 * 4 * 6, dtype=torch.float32).reshape(1, 1, 2, 4, 6)
    tokens = patchify3d(x, torch.ones(1, 1, 1, 2, 2))
    for t in range(2):
        for h in range(2):
            for w in range(3):
                patch = x[0, 0, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]
                assert tokens[0, (t * 2 + h) * 3 + w, 0] == patch.sum()


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_unpatchify_puts_feature_pt_ph_pw_c_where_it_belongs(patch, dtype):
    grid, channels = (2, 3, 2), 3
    (t, h, w), (pt, ph, pw) = grid, patch
    size = t * h * w * pt * ph * pw * channels
    tokens = torch.randperm(size).remainder(251).to(dtype).reshape(1, t * h * w, -1)
    video = unpatchify3d(tokens, grid, patch, channels)
    assert video.shape == (1, channels, t * pt, h * ph, w * pw)
    assert video.dtype == dtype
    assert video.is_contiguous()
    c, z, y, x = (each.flatten() for each in torch.meshgrid(*map(torch.arange, video.shape[1:]), indexing="ij"))
    token = ((z // pt) * h + y // ph) * w + x // pw
    feature = (((z % pt) * ph + y % ph) * pw + x % pw) * channels + c
    assert torch.equal(video[0, c, z, y, x], tokens[0, token, feature])


def test_unpatchify_undoes_patchify_with_a_permutation_for_weight():
    torch.manual_seed(4)
    channels, patch = 3, (2, 2, 3)
    features = channels * 12
    x = torch.randn(2, channels, 4, 6, 6)
    # Row (pt, ph, pw, c) of the weight picks channel c at that place of the patch.
    weight = torch.eye(features).reshape(features, *patch, channels).movedim(-1, 1)
    assert torch.equal(unpatchify3d(patchify3d(x, weight), (2, 3, 2), patch, channels), x)


def test_unpatchify_crops_the_padding_and_skips_global_tokens():
    torch.manual_seed(5)
    weight = torch.eye(16).reshape(16, 2, 2, 2, 2).movedim(-1, 1)
    x = torch.randn(2, 2, 3, 5, 7)
    tokens = patchify3d(x, weight, pad=True)
    assert torch.equal(unpatchify3d(tokens, (2, 3, 4), (2, 2, 2), 2, size=(3, 5, 7)), x)
    text = torch.full((2, 3, 16), float("nan"))
    joint = torch.cat([text[:, :1], tokens, text[:, 1:]], dim=1)
    assert torch.equal(unpatchify3d(joint, Grid(2, 3, 4, 1, 2), (2, 2, 2), 2, size=(3, 5, 7)), x)


def test_gradients_of_patchify_and_unpatchify_are_right():
    torch.manual_seed(6)
    x = torch.randn(2, 2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    pos = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: patchify3d(*a, pad=True), (x, weight, bias, pos))
    tokens = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: unpatchify3d(y, (1, 2, 2), (1, 2, 2), 2, size=(1, 3, 4)), (tokens,))


def test_a_batch_of_none_and_a_video_of_no_frames_give_no_tokens():
    weight = torch.ones(5, 3, 1, 2, 2)
    assert patchify3d(torch.ones(0, 3, 2, 4, 4), weight).shape == (0, 8, 5)
    assert patchify3d(torch.ones(2, 3, 0, 4, 4), weight).shape == (2, 0, 5)
    assert unpatchify3d(torch.ones(0, 8, 12), (2, 2, 2), (1, 2, 2), 3).shape == (0, 3, 2, 4, 4)


def test_inputs_may_have_any_strides_and_are_not_modified():
    torch.manual_seed(7)
    x = torch.randn(4, 6, 2, 8, 3).permute(2, 4, 0, 1, 3)  # [2, 3, 4, 6, 8]
    weight = torch.randn(3, 5, 1, 2, 2).transpose(0, 1)
    before = x.clone()
    assert torch.equal(patchify3d(x, weight), patchify3d(x.contiguous(), weight.contiguous()))
    assert torch.equal(x, before)


def test_an_axis_that_the_patch_does_not_divide_is_refused():
    weight = torch.ones(5, 3, 1, 2, 2)
    assert patchify3d(torch.ones(1, 3, 2, 4, 6), weight).shape == (1, 12, 5)
    with pytest.raises(ValueError, match="W=7 is not a multiple of the patch's 2"):
        patchify3d(torch.ones(1, 3, 2, 4, 7), weight)
    with pytest.raises(ValueError, match="H=5"):
        patchify3d(torch.ones(1, 3, 2, 5, 6), weight)


def test_patchify_refuses_wrong_shapes_and_dtypes():
    x, weight = torch.ones(1, 3, 2, 4, 4), torch.ones(5, 3, 1, 2, 2)
    bias, pos = torch.ones(5), torch.ones(8, 5)
    patchify3d(x, weight, bias, pos)
    with pytest.raises(ValueError, match=r"x of shape \(3, 2, 4, 4\) must be \[B, C, T, H, W\]"):
        patchify3d(x[0], weight)
    with pytest.raises(ValueError, match="reads 2 channels, x has 3"):
        patchify3d(x, weight[:, :2])
    with pytest.raises(TypeError, match="weight of torch.float64 must have the dtype of x, torch.float32"):
        patchify3d(x, weight.double())
    with pytest.raises(ValueError, match=r"bias of shape \(4,\)"):
        patchify3d(x, weight, bias[:4])
    with pytest.raises(ValueError, match=r"pos of shape \(7, 5\) must be \[N, E\] = \(8, 5\)"):
        patchify3d(x, weight, bias, pos[:7])
    with pytest.raises(TypeError, match="x of torch.int64"):
        patchify3d(x.long(), weight)
    with pytest.raises(TypeError, match="pad=1 must be True or False"):
        patchify3d(x, weight, pad=1)
    with pytest.raises(ValueError, match="bias is on meta, x on cpu"):
        patchify3d(x, weight, bias.to("meta"))
    with pytest.raises(ValueError, match="impl='fast'"):
        patchify3d(x, weight, impl="fast")


def test_unpatchify_refuses_what_does_not_fit_the_grid():
    tokens = torch.ones(1, 8, 12)
    assert unpatchify3d(tokens, (2, 2, 2), (1, 2, 2), 3, size=(2, 3, 4)).shape == (1, 3, 2, 3, 4)
    with pytest.raises(ValueError, match=r"tokens of shape \(1, 8, 12\)"):
        unpatchify3d(tokens, (2, 2, 3), (1, 2, 2), 3)
    with pytest.raises(ValueError, match="channels=4"):
        unpatchify3d(tokens, (2, 2, 2), (1, 2, 2), 4)
    with pytest.raises(ValueError, match=r"patch=\(2, 8\) must be three positive integers"):
        unpatchify3d(tokens, (2, 2, 2), (2, 8), 3)
    with pytest.raises(ValueError, match=r"size=\(2, 2, 4\) must end in the last patch"):
        unpatchify3d(tokens, (2, 2, 2), (1, 2, 2), 3, size=(2, 2, 4))
    with pytest.raises(ValueError, match=r"size=\(2, 5, 4\)"):
        unpatchify3d(tokens, (2, 2, 2), (1, 2, 2), 3, size=(2, 5, 4))
    with pytest.raises(TypeError, match="tokens of type list"):
        unpatchify3d([1], (2, 2, 2), (1, 2, 2), 3)
