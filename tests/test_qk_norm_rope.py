"""qk_norm_rope, its in-place form and its tables, against complex numbers, torch's norms and diffusers."""

import math

import pytest
import torch
import torch.nn.functional as F

from stattn.grid import Grid
from stattn.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_
from stattn.rope import RopeTables, rope_tables

GRIDS = [Grid(1, 1, 1), Grid(3, 5, 7), Grid(2, 4, 3, before=3, after=2), Grid(1, 1, 6, before=0, after=1)]
DIMS = [(12, None), (16, (4, 6, 6)), (10, (0, 4, 6)), (128, (44, 42, 42))]


def turned(x, grid, split, theta=(1e4,) * 3, origin=(0, 0, 0), scale=(1, 1, 1), frames=None, interleaved=True):
    """Rotate x [B, N, heads, D] token by token, as complex numbers in float64."""
    x = x.double()
    half = x.shape[-1] // 2
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    z = torch.complex(a, b)
    frames = range(grid.t) if frames is None else frames
    for n in range(grid.video):
        index = (frames[n // (grid.h * grid.w)], n // grid.w % grid.h, n % grid.w)
        angles = [
            (start + i) * unit * base ** (-2 * j / dim)
            for i, start, unit, base, dim in zip(index, origin, scale, theta, split, strict=True)
            for j in range(dim // 2)
        ]
        z[:, grid.before + n] *= torch.polar(torch.ones(half).double(), torch.tensor(angles, dtype=torch.float64))
    return torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)


def wan_split(dim):
    side = 2 * (dim // 6)
    return dim - 2 * side, side, side


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("dim", "split"), DIMS)
@pytest.mark.parametrize("interleaved", [True, False])
def test_the_rotation_is_a_complex_product_and_leaves_global_tokens_alone(grid, dim, split, interleaved):
    torch.manual_seed(0)
    q = torch.randn(2, grid.tokens, 3, dim, dtype=torch.float64)
    k = torch.randn(2, grid.tokens, 1, dim, dtype=torch.float64)
    tables = rope_tables(grid, dim, split)
    outs = qk_norm_rope(q, k, None, None, tables, interleaved=interleaved)
    for out, x in zip(outs, (q, k), strict=True):
        expected = turned(x, grid, split or wan_split(dim), interleaved=interleaved)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
        assert torch.equal(out[:, : grid.before], x[:, : grid.before])
        assert torch.equal(out[:, grid.before + grid.video :], x[:, grid.before + grid.video :])


def test_origin_scale_theta_and_frame_positions_move_the_angles():
    torch.manual_seed(1)
    grid, split = Grid(3, 2, 4), (4, 6, 6)
    q, k = torch.randn(2, 1, 24, 2, 16, dtype=torch.float64)
    places = {"theta": (256.0, 1e3, 1e4), "origin": (5, 0, 2.5), "scale": (0.5, 2, 1)}
    out, _ = qk_norm_rope(q, k, None, None, rope_tables(grid, 16, split, **places))
    torch.testing.assert_close(out, turned(q, grid, split, **places), rtol=0, atol=1e-6)
    for frames in ([7, 2, 4], torch.tensor([7, 2, 4], dtype=torch.int32)):
        tables = rope_tables(grid, 16, split, **places, t_positions=frames)
        out, _ = qk_norm_rope(q, k, None, None, tables)
        torch.testing.assert_close(out, turned(q, grid, split, **places, frames=[7, 2, 4]), rtol=0, atol=1e-6)


def test_a_chunk_at_an_origin_turns_as_that_part_of_the_clip():
    whole, chunk = rope_tables((6, 2, 3), 24), rope_tables((2, 2, 3), 24, origin=(4, 0, 0))
    assert torch.equal(chunk.t, whole.t[:, 4:])
    assert torch.equal(chunk.h, whole.h)
    assert torch.equal(rope_tables((2, 2, 3), 24, t_positions=[4, 5]).t, chunk.t)


def test_tables_are_float64_angles_rounded_once():
    tables = rope_tables((1, 1, 2000), 8, (0, 0, 8))
    exact = [math.cos(1999 * 10000 ** (-2 * j / 8)) for j in range(4)]
    assert torch.equal(tables.w[0, 1999], torch.tensor(exact, dtype=torch.float64).float())


def test_scores_depend_on_the_distance_of_two_tokens_only():
    torch.manual_seed(2)
    q, k = torch.randn(2, 1, 1, 1, 48, dtype=torch.float64).expand(2, 1, 60, 1, 48)
    q, k = qk_norm_rope(q, k, None, None, rope_tables((3, 4, 5), 48))
    scores = (q[0, :, 0] @ k[0, :, 0].T).reshape(3, 4, 5, 3, 4, 5)
    assert torch.allclose(scores[0, 1, 2, 1, 2, 4], scores[1, 2, 0, 2, 3, 2], atol=1e-6)
    assert not torch.allclose(scores[0, 1, 2, 1, 2, 4], scores[0, 1, 2, 1, 2, 3], atol=1e-3)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_the_norm_is_that_of_torch_per_head_and_across_heads(eps):
    torch.manual_seed(3)
    q, k = torch.randn(2, 6, 4, 8, dtype=torch.float64), torch.randn(2, 6, 2, 8, dtype=torch.float64)
    row = torch.randn(32, dtype=torch.float64)
    q_out, k_out = qk_norm_rope(q, k, row[:8], row[8:16], None, eps=eps)
    torch.testing.assert_close(q_out, F.rms_norm(q, (8,), row[:8], eps))
    torch.testing.assert_close(k_out, F.rms_norm(k, (8,), row[8:16], eps))
    q_out, k_out = qk_norm_rope(q, k, row, row[:16], None, across_heads=True, eps=eps)
    torch.testing.assert_close(q_out, F.rms_norm(q.flatten(2), (32,), row, eps).view_as(q))
    torch.testing.assert_close(k_out, F.rms_norm(k.flatten(2), (16,), row[:16], eps).view_as(k))


@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_and_rotation_in_sixteen_bits_are_rounded_once(across_heads, interleaved, dtype):
    torch.manual_seed(4)
    grid = Grid(2, 3, 2, 1, 1)
    q, k = torch.randn(2, 2, 14, 2, 12).to(dtype)
    weights = torch.randn(2, 24 if across_heads else 12)
    options = {"across_heads": across_heads, "interleaved": interleaved}
    tables = rope_tables(grid, 12)
    outs = qk_norm_rope(q, k, *weights, tables, **options)
    wide = qk_norm_rope(q.float(), k.float(), *weights, tables, **options)
    for out, x, expected in zip(outs, (q, k), wide, strict=True):
        assert out.dtype == dtype
        assert out.data_ptr() != x.data_ptr()
        assert torch.equal(out, expected.to(dtype))


def test_keys_of_a_cache_are_turned_by_angles_of_their_own():
    torch.manual_seed(5)
    q, cache = torch.randn(2, 6, 4, 12), torch.randn(2, 18, 2, 12)
    rope = rope_tables((1, 2, 3), 12, origin=(7, 0, 0))
    k_rope = rope_tables((3, 2, 3), 12, t_positions=[6, 4, 5])
    q_out, k_out = qk_norm_rope(q, cache, None, None, rope, k_rope=k_rope)
    assert torch.equal(q_out, qk_norm_rope(q, q, None, None, rope)[0])
    assert torch.equal(k_out, qk_norm_rope(cache, cache, None, None, k_rope)[1])
    with pytest.raises(ValueError, match="k has 18 tokens, q 6"):
        qk_norm_rope(q, cache, None, None, rope)
    with pytest.raises(ValueError, match="k_rope needs rope"):
        qk_norm_rope(q, cache, None, None, None, k_rope=k_rope)
    with pytest.raises(ValueError, match=r"k_rope turns \(8, 2, 2\) features .*, rope \(4, 4, 4\): they must be equal"):
        qk_norm_rope(q, cache, None, None, rope, k_rope=rope_tables((3, 2, 3), 12, split=(8, 2, 2)))


@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_are_right_for_queries_keys_and_weights(across_heads, interleaved):
    torch.manual_seed(6)
    q = torch.randn(2, 5, 2, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 5, 1, 6, dtype=torch.float64, requires_grad=True)
    q_weight = torch.randn(12 if across_heads else 6, dtype=torch.float64, requires_grad=True)
    k_weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    tables = rope_tables(Grid(2, 1, 2, 0, 1), 6)
    assert torch.autograd.gradcheck(
        lambda *a: qk_norm_rope(*a, tables, across_heads=across_heads, interleaved=interleaved),
        (q, k, q_weight, k_weight),
    )


@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_in_place_equals_the_functional_one_bitwise(across_heads, dtype):
    torch.manual_seed(7)
    qkv = torch.randn(2, 14, 3, 4, 12).to(dtype)
    weights = torch.randn(2, 48 if across_heads else 12)
    tables = rope_tables(Grid(2, 3, 2, 1, 1), 12)
    before = qkv.clone()
    expected = qk_norm_rope(qkv[:, :, 0], qkv[:, :, 1], *weights, tables, across_heads=across_heads)
    assert qk_norm_rope_(qkv, *weights, tables, across_heads=across_heads) is qkv
    assert torch.equal(qkv[:, :, 0], expected[0])
    assert torch.equal(qkv[:, :, 1], expected[1])
    assert torch.equal(qkv[:, :, 2], before[:, :, 2])


def test_the_update_in_place_takes_a_buffer_with_fewer_key_heads_and_strides():
    torch.manual_seed(8)
    wide = torch.randn(2, 12, 9, 12)
    qkv = wide[:, :, 1:]  # 4 heads of queries, 2 of keys, 2 of values
    before, weights = wide.clone(), torch.randn(2, 12)
    tables = rope_tables((2, 3, 2), 12)
    expected = qk_norm_rope(qkv[:, :, :4], qkv[:, :, 4:6], *weights, tables, interleaved=False)
    qk_norm_rope_(qkv, *weights, tables, kv_heads=2, interleaved=False)
    assert torch.equal(torch.cat(expected, dim=2), wide[:, :, 1:7])
    assert torch.equal(wide[:, :, :1], before[:, :, :1])
    assert torch.equal(wide[:, :, 7:], before[:, :, 7:])


def test_the_update_in_place_is_refused_when_a_gradient_is_needed():
    qkv, weight, tables = torch.randn(1, 4, 3, 2, 6), torch.ones(6), rope_tables((1, 2, 2), 6)
    qk_norm_rope_(qkv.clone(), weight, weight, tables)
    needy = weight.clone().requires_grad_()
    with pytest.raises(ValueError, match="qkv requires grad"):
        qk_norm_rope_(qkv.clone().requires_grad_(), weight, weight, tables)
    with pytest.raises(ValueError, match="k_weight requires grad"):
        qk_norm_rope_(qkv.clone(), weight, needy, tables)
    with torch.no_grad():
        recorded, plain = (qk_norm_rope_(qkv.clone(), each, each, tables) for each in (needy, weight))
        assert torch.equal(recorded, plain)
        with pytest.raises(ValueError, match="qkv requires grad"):
            qk_norm_rope_(qkv.clone().requires_grad_(), weight, weight, tables)


def test_the_update_in_place_refuses_buffers_of_other_layouts():
    qkv, row = torch.randn(1, 4, 3, 2, 6), torch.ones(6)
    qk_norm_rope_(qkv.clone(), row, row, None)
    qk_norm_rope_(qkv.flatten(2, 3), row, row, None, kv_heads=2)
    with pytest.raises(ValueError, match=r"qkv of shape \(1, 4, 2, 2, 6\) must be \[B, N, 3, heads, D\]"):
        qk_norm_rope_(qkv[:, :, :2], row, row, None)
    with pytest.raises(ValueError, match=r"qkv of shape \(1, 4, 6, 6\)"):
        qk_norm_rope_(qkv.flatten(2, 3), row, row, None)
    with pytest.raises(ValueError, match="kv_heads=3 must be positive and leave queries among the 6 heads"):
        qk_norm_rope_(qkv.flatten(2, 3), row, row, None, kv_heads=3)
    with pytest.raises(ValueError, match="is expanded"):
        qk_norm_rope_(qkv.expand(2, 4, 3, 2, 6), row, row, None)
    with pytest.raises(TypeError, match="qkv of type tuple"):
        qk_norm_rope_((qkv,), row, row, None)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (2, 0)])
def test_an_empty_batch_or_no_tokens_give_an_empty_result(batch, tokens):
    q, row = torch.ones(batch, tokens, 2, 6), torch.ones(12)
    tables = rope_tables((1, 2, 2), 6) if tokens else None
    outs = qk_norm_rope(q, q[:, :, :1], row, row[:6], tables, across_heads=True)
    assert [tuple(each.shape) for each in outs] == [(batch, tokens, 2, 6), (batch, tokens, 1, 6)]
    assert qk_norm_rope_(torch.ones(batch, tokens, 3, 2, 6), None, None, tables).shape[:2] == (batch, tokens)


def test_views_of_a_fused_projection_give_what_copies_give_and_are_not_modified():
    torch.manual_seed(9)
    qkv = torch.randn(2, 4, 3, 2, 6)
    before, row = qkv.clone(), torch.randn(12)
    tables = rope_tables((1, 2, 2), 6)
    q, k = qkv[:, :, 0], qkv.permute(0, 3, 2, 1, 4)[:, :, 1].transpose(1, 2)
    outs = qk_norm_rope(q, k, row, row, tables, across_heads=True)
    copies = qk_norm_rope(q.contiguous(), k.contiguous(), row, row, tables, across_heads=True)
    assert all(torch.equal(a, b) for a, b in zip(outs, copies, strict=True))
    assert torch.equal(qkv, before)


def test_qk_norm_rope_refuses_wrong_shapes_dtypes_and_devices():
    q, k, row, tables = torch.ones(2, 4, 2, 6), torch.ones(2, 4, 1, 6), torch.ones(12), rope_tables((1, 2, 2), 6)
    qk_norm_rope(q, k, row, row[:6], tables, across_heads=True)
    with pytest.raises(ValueError, match=r"q of shape \(4, 2, 6\)"):
        qk_norm_rope(q[0], k, None, None, tables)
    with pytest.raises(ValueError, match=r"k of shape \(1, 4, 1, 6\) must share B=2 and D=6 with q"):
        qk_norm_rope(q, k[:1], None, None, tables)
    with pytest.raises(TypeError, match="k of torch.float64 must have the dtype of q"):
        qk_norm_rope(q, k.double(), None, None, tables)
    with pytest.raises(ValueError, match=r"q_weight of shape \(12,\) must be \[D\] = \(6,\)"):
        qk_norm_rope(q, k, row, row[:6], tables)
    with pytest.raises(ValueError, match=r"k_weight of shape \(12,\) must be \[heads\*D\] = \(6,\)"):
        qk_norm_rope(q, k, row, row, tables, across_heads=True)
    with pytest.raises(ValueError, match="k is on meta, q on cpu"):
        qk_norm_rope(q, k.to("meta"), None, None, tables)
    with pytest.raises(TypeError, match="interleaved='half' must be True or False"):
        qk_norm_rope(q, k, None, None, tables, interleaved="half")
    with pytest.raises(ValueError, match="eps=-1"):
        qk_norm_rope(q, k, None, None, tables, eps=-1)
    with pytest.raises(ValueError, match="impl='cuda'"):
        qk_norm_rope(q, k, None, None, tables, impl="cuda")


def test_tables_of_another_grid_head_or_device_are_refused():
    q = torch.ones(2, 4, 2, 6)
    qk_norm_rope(q, q, None, None, rope_tables((1, 2, 2), 6))
    with pytest.raises(ValueError, match="rope holds 5 tokens"):
        qk_norm_rope(q, q, None, None, rope_tables(Grid(1, 2, 2, 1), 6))
    with pytest.raises(ValueError, match="rope turns 8 features, a head has 6"):
        qk_norm_rope(q, q, None, None, rope_tables((1, 2, 2), 8))
    with pytest.raises(ValueError, match="rope is on meta, the tokens on cpu"):
        qk_norm_rope(q, q, None, None, rope_tables((1, 2, 2), 6).to("meta"))
    with pytest.raises(TypeError, match="must be RopeTables"):
        qk_norm_rope(q, q, None, None, (q, q))


def test_rope_tables_refuse_what_describes_no_rotation():
    assert rope_tables((2, 3, 4), 16, (4, 6, 6)).head_dim == 16
    with pytest.raises(ValueError, match="head_dim=7 must be a positive even integer"):
        rope_tables((2, 3, 4), 7)
    for split in [(4, 6, 8), (5, 5, 6), (16, 0), (20, -4, 0)]:
        with pytest.raises(ValueError, match="must be three even integers"):
            rope_tables((2, 3, 4), 16, split)
    with pytest.raises(ValueError, match="theta=0 must be positive"):
        rope_tables((2, 3, 4), 16, theta=0)
    with pytest.raises(TypeError, match="origin=3 must be three numbers"):
        rope_tables((2, 3, 4), 16, origin=3)
    with pytest.raises(ValueError, match="scale=.* must be finite"):
        rope_tables((2, 3, 4), 16, scale=(1, float("inf"), 1))
    with pytest.raises(ValueError, match=r"t_positions of shape \(3,\)"):
        rope_tables((2, 3, 4), 16, t_positions=[0, 1, 2])
    good = rope_tables((2, 3, 4), 16)
    assert RopeTables(good.t, good.h, good.w, 1, 2).grid == Grid(2, 3, 4, 1, 2)
    with pytest.raises(TypeError, match="RopeTables h of torch.float64"):
        RopeTables(good.t, good.h.double(), good.w)
    with pytest.raises(ValueError, match=r"RopeTables w of shape \(4, 2\) must be \[2, extent, pairs\]"):
        RopeTables(good.t, good.h, good.w[0])
    with pytest.raises(ValueError, match="RopeTables after=-1"):
        RopeTables(good.t, good.h, good.w, 0, -1)


def test_tables_equal_those_of_diffusers_wan():
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    torch.manual_seed(10)
    embed = wan.WanRotaryPosEmbed(128, (1, 2, 2), 32)
    cos, sin = embed(torch.empty(1, 16, 3, 8, 10))
    x = torch.randn(1, 60, 2, 128)
    out, _ = qk_norm_rope(x, x, None, None, rope_tables((3, 4, 5), 128))
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = cos[..., ::2], sin[..., ::2]
    expected = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_tables_equal_those_of_diffusers_cogvideox_on_its_scaled_grid():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    torch.manual_seed(11)
    # A crop of 6 x 8 shown on a grid of 4 x 5: positions advance by 6/4 and 8/5 from the crop's corner (1, 2).
    angles = embeddings.get_3d_rotary_pos_embed(64, ((1, 2), (7, 10)), (4, 5), 3)
    unit = ((7 * 3 / 4 - 1) / 3, (10 * 4 / 5 - 2) / 4)
    tables = rope_tables((3, 4, 5), 64, (16, 24, 24), origin=(0, 1 / unit[0], 2 / unit[1]), scale=(1, *unit))
    x = torch.randn(1, 60, 2, 64)
    out, _ = qk_norm_rope(x, x, None, None, tables)
    expected = embeddings.apply_rotary_emb(x, angles, sequence_dim=1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_half_rotation_equals_that_of_diffusers_cosmos():
    cosmos = pytest.importorskip("diffusers.models.transformers.transformer_cosmos")
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    torch.manual_seed(12)
    embed = cosmos.CosmosRotaryPosEmbed(128, max_size=(8, 16, 16), patch_size=(1, 2, 2), rope_scale=(1.0, 3.0, 3.0))
    angles = embed(torch.empty(1, 16, 3, 8, 10))
    dims = (44, 42, 42)
    theta = tuple(1e4 * factor ** (d / (d - 2)) for factor, d in zip((1, 3, 3), dims, strict=True))
    x = torch.randn(1, 60, 2, 128)
    out, _ = qk_norm_rope(x, x, None, None, rope_tables((3, 4, 5), 128, dims, theta), interleaved=False)
    expected = embeddings.apply_rotary_emb(x, angles, use_real_unbind_dim=-2, sequence_dim=1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
