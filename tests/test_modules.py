"""The drop-in modules: the parameters of what they replace, and the mathematics of what they replace."""

import math

import pytest
import torch
from torch import nn

from stattn import masks
from stattn.grid import Grid
from stattn.modules import (
    CrossAttention,
    DenoiseStep,
    FeedForward,
    GatedResidual,
    ModulatedNorm,
    Patchify3D,
    QKNormRope,
    SpaceTimeAttention,
)
from stattn.rope import rope_tables

GRID = Grid(3, 4, 5)


def randomise(module, seed=0):
    """Draw every parameter anew, so that no zero or one hides a path; return the module."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return module


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def naive_attention(module, x, allowed, rope_module=None, rope=None):
    """Attention as a table of scores, for the parameters of a SpaceTimeAttention; allowed [heads or 1, N, N]."""
    heads, kv_heads, dim = module.heads, module.kv_heads, module.head_dim
    q, k, v = (f(x).unflatten(-1, (-1, dim)) for f in (module.to_q, module.to_k, module.to_v))
    q, k = rope_module(q, k, rope)
    k, v = (each.repeat_interleave(heads // kv_heads, dim=2) for each in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(dim)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0)
    return module.to_out[0](torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


def test_patchify_has_the_state_of_a_conv3d_and_gives_its_tokens():
    conv = randomise(nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4)))
    ours = Patchify3D(3, 8, (2, 4, 4))
    assert shapes(ours) == shapes(conv)
    ours.load_state_dict(conv.state_dict())
    x = randn(2, 3, 4, 8, 12)
    torch.testing.assert_close(ours(x), conv(x).flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert ours.grid(x, after=7) == Grid(2, 2, 3, after=7)


def test_patchify_starts_from_the_distribution_of_a_conv3d():
    torch.manual_seed(0)
    conv, ours = nn.Conv3d(3, 256, (2, 8, 8), stride=(2, 8, 8)), Patchify3D(3, 256, (2, 8, 8))
    for name in ("weight", "bias"):
        theirs, mine = getattr(conv, name), getattr(ours, name)
        assert mine.abs().max() <= 1 / math.sqrt(3 * 128)
        assert abs(mine.std() / theirs.std() - 1) < 0.15


def test_patchify_without_bias_and_with_positions():
    ours = randomise(Patchify3D(1, 4, (1, 2, 2), bias=False))
    assert shapes(ours) == {"weight": (4, 1, 1, 2, 2)}
    x, pos = randn(1, 1, 2, 4, 4), randn(8, 4, seed=2)
    torch.testing.assert_close(ours(x, pos), ours(x) + pos)


def test_patchify_refuses_a_size_that_is_no_multiple_unless_it_pads():
    x = randn(1, 1, 2, 5, 4)
    with pytest.raises(ValueError, match="5"):
        Patchify3D(1, 4, (1, 2, 2))(x)
    padded = Patchify3D(1, 4, (1, 2, 2), pad=True)
    assert padded(x).shape == (1, 2 * 3 * 2, 4)
    assert padded.grid(x).shape == (2, 3, 2)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_modulated_norm_has_the_state_of_the_norm_and_its_values(norm, affine):
    kind = nn.LayerNorm if norm == "layer" else nn.RMSNorm
    theirs = randomise(kind(12, eps=1e-6, elementwise_affine=affine))
    ours = ModulatedNorm(12, norm=norm, affine=affine)
    assert shapes(ours) == shapes(theirs)
    ours.load_state_dict(theirs.state_dict())
    x, scale, shift = randn(2, 6, 12), randn(2, 12, seed=2), randn(2, 12, seed=3)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    expected = theirs(x) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(ours(x, scale, shift), expected, atol=1e-5, rtol=1e-5)


def test_a_modulation_per_frame_acts_on_the_tokens_of_its_frame():
    ours = ModulatedNorm(8)
    x, scale, shift = randn(1, 6, 8), randn(1, 3, 8, seed=2), randn(1, 3, 8, seed=3)
    per_token = ours(x, scale.repeat_interleave(2, 1), shift.repeat_interleave(2, 1))
    assert torch.equal(ours(x, scale, shift, frames=3), per_token)
    assert not torch.equal(per_token, ours(x, scale.repeat(1, 2, 1), shift.repeat(1, 2, 1)))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_gated_residual_has_no_state_and_its_fused_form_is_the_two_steps(kind):
    add, norm = GatedResidual(), randomise(ModulatedNorm(8, norm=kind, affine=True, eps=1e-2))
    assert shapes(add) == {}
    x, y = randn(2, 6, 8), randn(2, 6, 8, seed=2)
    gate, scale, shift = (randn(2, 3, 8, seed=seed) for seed in (3, 4, 5))
    torch.testing.assert_close(add(x, y, gate, frames=3), x + gate.repeat_interleave(2, 1) * y)
    both = add.then(norm, x, y, gate, scale, shift, frames=3)
    assert torch.equal(both[0], add(x, y, gate, frames=3))
    assert torch.equal(both[1], norm(both[0], scale, shift, frames=3))
    plain = add.then(norm, x, y, None)
    torch.testing.assert_close(plain[0], x + y)
    assert torch.equal(plain[1], norm(plain[0]))


@pytest.mark.parametrize("qk_norm, width", [("across_heads", (6 * 4, 2 * 4)), ("per_head", (4, 4)), (None, None)])
def test_qk_norm_rope_has_the_state_of_two_rms_norms(qk_norm, width):
    ours = QKNormRope(6, 4, kv_heads=2, qk_norm=qk_norm)
    assert shapes(ours) == ({} if width is None else {"norm_q.weight": (width[0],), "norm_k.weight": (width[1],)})
    randomise(ours)
    q, k = randn(2, 60, 6, 4), randn(2, 60, 2, 4, seed=2)
    dims = {"across_heads": (2, 3), "per_head": (3,)}.get(qk_norm)
    plain = ours(q, k)
    for x, got, norm in ((q, plain[0], ours.norm_q), (k, plain[1], ours.norm_k)):
        expected = x
        if dims:
            scale = torch.rsqrt(x.square().mean(dims, keepdim=True) + 1e-6)
            expected = x * scale * norm.weight.view(-1, 4)
        torch.testing.assert_close(got, expected)
    rotated = ours(q, k, rope_tables(GRID, 4, split=(0, 2, 2)))
    assert not torch.allclose(rotated[0], plain[0])
    torch.testing.assert_close(rotated[0].norm(dim=-1), plain[0].norm(dim=-1))


@pytest.mark.parametrize("interleaved, pair", [(True, (0, 1)), (False, (0, 2))])
def test_rotation_turns_neighbours_or_halves(interleaved, pair):
    q = torch.zeros(1, 2, 1, 4)
    q[..., 0] = 1
    rope = rope_tables((2, 1, 1), 4, split=(4, 0, 0))
    # The token of frame 1 turns its first pair by one radian.
    expected = torch.zeros(4)
    expected[list(pair)] = torch.tensor([math.cos(1), math.sin(1)])
    rotated, _ = QKNormRope(1, 4, qk_norm=None, interleaved=interleaved)(q, q, rope)
    torch.testing.assert_close(rotated[0, 1, 0], expected)
    attention = SpaceTimeAttention(4, 1, qk_norm=None, interleaved=interleaved)
    other = SpaceTimeAttention(4, 1, qk_norm=None, interleaved=not interleaved)
    other.load_state_dict(attention.state_dict())
    x = randn(1, 2, 4)
    assert not torch.allclose(attention(x, (2, 1, 1), rope=rope), other(x, (2, 1, 1), rope=rope))


def test_space_time_attention_has_the_state_of_a_diffusers_attention():
    ours = SpaceTimeAttention(24, heads=2)
    assert shapes(ours) == {
        **{f"to_{name}.weight": (24, 24) for name in ("q", "k", "v", "out.0")},
        **{f"to_{name}.bias": (24,) for name in ("q", "k", "v", "out.0")},
        "norm_q.weight": (24,),
        "norm_k.weight": (24,),
    }
    assert shapes(SpaceTimeAttention(24, heads=2, qk_norm="per_head"))["norm_q.weight"] == (12,)


def test_space_time_attention_loads_diffusers_own_attention_modules():
    pytest.importorskip("diffusers")
    from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

    theirs = randomise(WanAttention(24, heads=2, dim_head=12, eps=1e-6, processor=WanAttnProcessor()))
    ours = SpaceTimeAttention(24, heads=2)
    assert shapes(ours) == shapes(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = randn(2, GRID.tokens, 24)
    torch.testing.assert_close(ours(x, GRID), theirs(x, None, None, None), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("qk_norm", ["across_heads", "per_head", None])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_space_time_attention_is_masked_softmax_attention(qk_norm, kv_heads):
    mask = masks.window(1, 3, 3)
    grid = Grid(3, 4, 5, after=6)
    ours = randomise(SpaceTimeAttention(32, 4, 12, kv_heads=kv_heads, qk_norm=qk_norm, mask=mask))
    rope_module = QKNormRope(4, 12, kv_heads=kv_heads, qk_norm=qk_norm)
    rope_module.load_state_dict({k: v for k, v in ours.state_dict().items() if k.startswith("norm")})
    x, rope = randn(2, grid.tokens, 32), rope_tables(grid, 12)
    valid = torch.tensor([6, 2])
    allowed = torch.stack([mask.allowed(grid, valid=torch.arange(6) < count) for count in valid])[:, None]
    expected = naive_attention(ours, x, allowed, rope_module, rope)
    torch.testing.assert_close(ours(x, grid, rope=rope, valid=valid), expected, atol=1e-5, rtol=1e-4)


def test_a_sequence_of_masks_gives_each_head_its_own():
    per_head = [masks.spatial(), masks.temporal()]
    ours = randomise(SpaceTimeAttention(16, 2, mask=per_head))
    rope_module = QKNormRope(2, 8, qk_norm="across_heads")
    rope_module.load_state_dict({k: v for k, v in ours.state_dict().items() if k.startswith("norm")})
    x = randn(1, GRID.tokens, 16)
    allowed = torch.stack([mask.allowed(GRID) for mask in per_head])
    torch.testing.assert_close(ours(x, GRID), naive_attention(ours, x, allowed, rope_module), atol=1e-5, rtol=1e-4)


def test_a_window_as_large_as_the_grid_is_full_attention():
    ours = randomise(SpaceTimeAttention(24, 2))
    x, rope = randn(2, GRID.tokens, 24), rope_tables(GRID, 12)
    full = ours(x, GRID, rope=rope)
    whole = ours(x, GRID, rope=rope, mask=masks.window(None, None, None))
    torch.testing.assert_close(whole, full, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours(x, GRID, rope=rope, mask=masks.window(3, 3, 5)).shape, full.shape)
    assert not torch.allclose(ours(x, GRID, rope=rope, mask=masks.window(3, 3, 5)), full, atol=1e-3)


def test_a_mask_for_one_call_does_not_stay():
    ours = randomise(SpaceTimeAttention(24, 2))
    x = randn(1, GRID.tokens, 24)
    before = ours(x, GRID)
    assert not torch.equal(ours(x, GRID, mask=masks.spatial()), before)
    assert torch.equal(ours(x, GRID), before)
    assert ours.mask == masks.full()


@pytest.mark.parametrize("globals_see", ["all", "globals"])
def test_globals_see_all_or_each_other(globals_see):
    grid = Grid(2, 2, 2, after=3)
    ours = randomise(SpaceTimeAttention(8, 1, globals_see=globals_see))
    x = randn(1, grid.tokens, 8)
    other = x.clone()
    other[:, 0] += 1
    text, other_text = ours(x, grid)[:, 8:], ours(other, grid)[:, 8:]
    assert torch.allclose(text, other_text, atol=1e-6) == (globals_see == "globals")


def test_padded_text_has_no_influence_on_cross_attention():
    ours = randomise(CrossAttention(24, 2))
    x, text = randn(2, 7, 24), randn(2, 5, 24, seed=2)
    valid = torch.tensor([2, 5])
    other = text.clone()
    other[0, 2:] = 1e4
    assert torch.equal(ours(x, text, valid), ours(x, other, valid))
    torch.testing.assert_close(ours(x, text, valid)[:1], ours(x[:1], text[:1, :2]))
    torch.testing.assert_close(ours(x, text, torch.arange(5) < valid[:, None]), ours(x, text, valid))


def test_cross_attention_to_no_text_is_the_bias():
    ours = randomise(CrossAttention(24, 2))
    x, text = randn(2, 7, 24).requires_grad_(), randn(2, 5, 24, seed=2)
    bias = ours.to_out[0].bias.expand(2, 7, 24)
    empty = ours(x, text, torch.tensor([0, 0]))
    torch.testing.assert_close(empty, bias)
    torch.testing.assert_close(ours(x, text[:, :0]), bias)
    empty.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_cross_attention_to_one_token_is_its_value():
    ours = randomise(CrossAttention(24, 2))
    x, text = randn(2, 7, 24), randn(2, 1, 24, seed=2)
    torch.testing.assert_close(ours(x, text), ours.to_out[0](ours.to_v(text)).expand(2, 7, 24))


@pytest.mark.parametrize(
    "module, call",
    [
        (Patchify3D(2, 8, (1, 2, 2)), lambda m: m(randn(1, 2, 2, 4, 4))),
        (SpaceTimeAttention(24, 2), lambda m: m(randn(1, 60, 24), GRID, rope=rope_tables(GRID, 12))),
        (SpaceTimeAttention(24, 4, 8, kv_heads=2, qk_norm="per_head"), lambda m: m(randn(1, 60, 24), GRID)),
        (CrossAttention(24, 2), lambda m: m(randn(1, 7, 24), randn(1, 5, 24, seed=2))),
        (ModulatedNorm(8, affine=True), lambda m: m(randn(1, 6, 8))),
        (QKNormRope(2, 4), lambda m: torch.cat(m(randn(1, 60, 2, 4), randn(1, 60, 2, 4, seed=2)))),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_parameter_receives_a_gradient(module, call):
    module = randomise(module)
    # Squares, because the sum of a normalised vector is constant.
    call(module).pow(2).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_denoise_step_with_defaults_is_an_euler_step():
    step = DenoiseStep(prediction="velocity", target="velocity")
    x, v = randn(1, 2, 2, 4, 4), randn(1, 2, 2, 4, 4, seed=2)
    after, _ = step(x, v, sigma=0.8, weights=(1.0, -0.3))
    torch.testing.assert_close(after, x - 0.3 * v)
    overridden, _ = step(x, v, sigma=0.8, weights=(0.0, 1.0), target="sample")
    torch.testing.assert_close(overridden, x - 0.8 * v)
    assert shapes(step) == {}
    with pytest.raises(TypeError, match="predicts"):
        DenoiseStep(predicts="velocity")


@pytest.mark.parametrize("impl", ["reference", {"attention": "reference"}, {"*": "reference"}, {}, "auto"])
def test_an_implementation_that_exists_is_used(impl):
    ours = SpaceTimeAttention(24, 2, impl=impl)
    assert ours(randn(1, 60, 24), GRID).shape == (1, 60, 24)


@pytest.mark.parametrize("impl", [{"attention": "flash"}, {"*": "flash", "qk_norm_rope": "auto"}])
def test_an_implementation_that_cannot_serve_is_refused_with_its_name(impl):
    ours = SpaceTimeAttention(24, 2, impl=impl, mask=masks.spatial())
    with pytest.raises(ValueError, match="flash"):
        ours(randn(1, 60, 24), GRID)


@pytest.mark.parametrize(
    "kind", [Patchify3D, ModulatedNorm, GatedResidual, QKNormRope, SpaceTimeAttention, DenoiseStep]
)
def test_unknown_implementations_and_stems_are_refused_by_every_module(kind):
    arguments = {
        Patchify3D: (3, 8, (1, 2, 2)),
        ModulatedNorm: (8,),
        QKNormRope: (2, 4),
        SpaceTimeAttention: (8, 2),
    }.get(kind, ())
    kind(*arguments, impl={"attention": "auto", "*": "reference"})
    with pytest.raises(ValueError, match="'fastest'"):
        kind(*arguments, impl="fastest")
    with pytest.raises(ValueError, match="'attn'"):
        kind(*arguments, impl={"attn": "auto"})
    with pytest.raises(TypeError, match="impl=3"):
        kind(*arguments, impl=3)


@pytest.mark.parametrize(
    "error, message, make",
    [
        (ValueError, r"patch=\(2, 8\)", lambda: Patchify3D(3, 8, (2, 8))),
        (ValueError, r"patch=\(0, 8, 8\)", lambda: Patchify3D(3, 8, (0, 8, 8))),
        (ValueError, "in_channels=0", lambda: Patchify3D(0, 8, (1, 2, 2))),
        (TypeError, "dim=8.0", lambda: Patchify3D(3, 8.0, (1, 2, 2))),
        (TypeError, "pad='yes'", lambda: Patchify3D(3, 8, (1, 2, 2), pad="yes")),
        (ValueError, "norm='batch'", lambda: ModulatedNorm(8, norm="batch")),
        (ValueError, "dim=-8", lambda: ModulatedNorm(-8)),
        (ValueError, "eps=nan", lambda: ModulatedNorm(8, eps=float("nan"))),
        (ValueError, "eps=-1e-06", lambda: SpaceTimeAttention(8, 2, eps=-1e-6)),
        (ValueError, "heads=0", lambda: SpaceTimeAttention(8, 0)),
        (TypeError, "heads=2.0", lambda: CrossAttention(8, 2.0)),
        (ValueError, "head_dim=0", lambda: SpaceTimeAttention(8, 2, 0)),
        (ValueError, "kv_heads=0", lambda: SpaceTimeAttention(8, 2, kv_heads=0)),
        (ValueError, "head_dim=-4", lambda: QKNormRope(2, -4)),
        (ValueError, "kv_heads=3", lambda: QKNormRope(2, 4, kv_heads=3)),
        (ValueError, "ffn_dim=0", lambda: FeedForward(8, 0)),
        (ValueError, "qk_norm='layer'", lambda: QKNormRope(2, 4, qk_norm="layer")),
        (ValueError, "qk_norm='layer'", lambda: SpaceTimeAttention(8, 2, qk_norm="layer")),
        (ValueError, "qk_norm='layer'", lambda: CrossAttention(8, 2, qk_norm="layer")),
        (ValueError, "dim=9", lambda: SpaceTimeAttention(9, 2)),
        (ValueError, "dim=9", lambda: CrossAttention(9, 2)),
        (ValueError, "kv_heads=3", lambda: SpaceTimeAttention(8, 4, kv_heads=3)),
        (ValueError, "globals_see='none'", lambda: SpaceTimeAttention(8, 2, globals_see="none")),
        (TypeError, "mask='full'", lambda: SpaceTimeAttention(8, 2, mask="full")),
        (TypeError, "mask=3", lambda: SpaceTimeAttention(8, 2, mask=3)),
        (ValueError, "3 masks for 2 heads", lambda: SpaceTimeAttention(8, 2, mask=[masks.full()] * 3)),
        (ValueError, r"x of shape \(1, 24, 7\)", lambda: SpaceTimeAttention(8, 2)(randn(1, 24, 7), (2, 3, 4))),
        (ValueError, r"x of shape \(4, 8\)", lambda: CrossAttention(8, 2)(randn(4, 8), randn(2, 4, 8))),
        (ValueError, r"text of shape \(2, 4, 9\)", lambda: CrossAttention(8, 2)(randn(2, 4, 8), randn(2, 4, 9))),
        (ValueError, r"\(3,\)", lambda: CrossAttention(8, 2)(randn(2, 4, 8), randn(2, 4, 8), torch.tensor([1, 2, 3]))),
        (ValueError, r"\(2, 3\)", lambda: CrossAttention(8, 2)(randn(2, 4, 8), randn(2, 4, 8), torch.ones(2, 3) > 0)),
        (ValueError, "torch.float32", lambda: CrossAttention(8, 2)(randn(2, 4, 8), randn(2, 4, 8), torch.ones(2, 4))),
    ],
)
def test_wrong_arguments_are_named(error, message, make):
    with pytest.raises(error, match=message):
        make()


def test_both_forms_of_a_gated_residual_obey_the_implementation():
    x, gate = randn(1, 6, 8), randn(1, 8)
    add, norm = GatedResidual(impl={"gate": "cuda"}), ModulatedNorm(8)
    with pytest.raises(ValueError, match="impl='cuda'"):
        add(x, x, gate)
    with pytest.raises(ValueError, match="impl='cuda'"):
        add.then(norm, x, x, gate)
    add.impl = "reference"
    assert torch.equal(add.then(norm, x, x, gate)[0], add(x, x, gate))


def test_modules_print_their_settings():
    text = str(SpaceTimeAttention(8, 2, mask=[masks.spatial(), masks.temporal()], impl={"attention": "sdpa"}))
    assert "mask=[spatial(), temporal()]" in text
    assert "impl={'attention': 'sdpa'}" in text
    assert "mask=2 x window(3, 3, 3)" in str(SpaceTimeAttention(8, 2, mask=[masks.window(3, 3, 3)] * 2))
    assert "patch=(2, 8, 8)" in str(Patchify3D(3, 8, (2, 8, 8)))
    assert "norm=rms, affine=True" in str(ModulatedNorm(8, norm="rms", affine=True))
    assert "qk_norm=per_head" in str(QKNormRope(2, 4))
    assert "prediction=sample" in str(DenoiseStep(prediction="sample"))
