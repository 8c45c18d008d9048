"""The reference DiT: shapes, conditioning, and what may and may not influence its output."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CROSS, JOINT, inputs, make
from torch.utils.flop_counter import FlopCounterMode

import stattn
from stattn import dit, masks
from stattn.dit import CONFIGS, DiT, Layout
from stattn.grid import Grid
from stattn.rope import rope_tables

BOTH = pytest.mark.parametrize("config", [JOINT, CROSS], ids=["joint", "cross"])


@BOTH
def test_the_output_has_the_shape_of_the_video_on_any_grid(config):
    model = make(config)
    for extents in ((3, 4, 5), (1, 1, 1), (5, 1, 3)):
        size = tuple(extent * p for extent, p in zip(extents, config.patch, strict=True))
        out = model(*inputs(config, size=size))
        assert out.shape == (2, config.out_channels, *size)
        assert out.isfinite().all()


@BOTH
def test_a_new_model_is_the_zero_function(config):
    x, timestep, text = inputs(config)
    assert torch.equal(DiT(config)(x, timestep, text), torch.zeros_like(x))


def test_a_new_model_learns_in_every_part_within_four_steps():
    model = DiT(JOINT)
    x, timestep, text = inputs(JOINT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # The zeros open one after the other: the last projection and its modulation first, then the gates, then the rest.
    for _ in range(4):
        optimizer.zero_grad()
        (model(x, timestep, text) - x).square().mean().backward()
        optimizer.step()
    idle = [name for name, each in model.named_parameters() if each.grad is None or not each.grad.abs().max() > 0]
    assert idle == []


@BOTH
def test_every_parameter_receives_a_gradient(config):
    model = make(config)
    model(*inputs(config)).square().sum().backward()
    idle = [name for name, each in model.named_parameters() if each.grad is None or not each.grad.abs().max() > 0]
    assert idle == []


@BOTH
def test_every_input_matters(config):
    model = make(config)
    x, timestep, text = inputs(config)
    out = model(x, timestep, text)
    assert not torch.allclose(model(x + 0.1, timestep, text), out, atol=1e-3)
    assert not torch.allclose(model(x, timestep / 2, text), out, atol=1e-3)
    assert not torch.allclose(model(x, timestep, text.flip(1) if config.vocab else text + 1), out, atol=1e-4)
    assert not torch.allclose(model(x, timestep), out, atol=1e-4)
    assert not torch.allclose(model(x, timestep, text, mask=masks.spatial()), out, atol=1e-4)


def test_a_joint_block_is_its_formula_in_plain_pytorch():
    block = make(JOINT).blocks[0]
    attn, dim, grid = block.attn1, JOINT.dim, Grid(3, 4, 5, after=6)
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(2, length, dim, generator=generator) for length in (60, 6))
    e, e_text = (torch.randn(2, *axes, 6, dim, generator=generator) for axes in ((3,), ()))
    valid, mask = torch.tensor([6, 4]), masks.window(1, 3, 3)

    def norm(x):
        return F.layer_norm(x, (dim,), eps=1e-6)

    def heads(projection, weight=None):
        y = projection(h).unflatten(-1, (2, 12)).transpose(1, 2)
        return y if weight is None else F.rms_norm(y, (12,), weight, 1e-6)

    m = [each.repeat_interleave(20, 1) for each in (block.scale_shift_table + e).unbind(-2)]
    n = [each[:, None] for each in (block.text_scale_shift_table + e_text).unbind(-2)]
    h = torch.cat((norm(x) * (1 + m[1]) + m[0], norm(text) * (1 + n[1]) + n[0]), 1)
    allowed = torch.stack([mask.allowed(grid, valid=torch.arange(6) < count) for count in valid])[:, None]
    allowed[1, :, -2:, 0] = True  # padded text: whatever it reads, nothing reads it
    a = F.scaled_dot_product_attention(
        heads(attn.to_q, attn.norm_q.weight), heads(attn.to_k, attn.norm_k.weight), heads(attn.to_v), allowed
    )
    a = attn.to_out[0](a.transpose(1, 2).flatten(2))
    x_next, text_next = x + m[2] * a[:, :60], text + n[2] * a[:, 60:]
    x_next = x_next + m[5] * block.ffn(norm(x_next) * (1 + m[4]) + m[3])
    text_next = text_next + n[5] * block.ffn(norm(text_next) * (1 + n[4]) + n[3])

    got, got_text = block(x, text, e, e_text, Layout(grid, None, 3, valid, mask))
    torch.testing.assert_close(got, x_next, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got_text[0], text_next[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got_text[1, :4], text_next[1, :4], atol=1e-5, rtol=1e-4)


def test_token_ids_are_read_in_order():
    # A caption such as "a disc moves left, camera pans right" says another thing with its words exchanged.
    model = make(JOINT)
    x, timestep, _ = inputs(JOINT, batch=1)
    text = torch.tensor([[1, 2, 3]])
    assert not torch.allclose(model(x, timestep, text), model(x, timestep, text.flip(1)), atol=1e-4)


@BOTH
def test_padded_text_has_no_influence(config):
    model = make(config)
    x, timestep, text = inputs(config)
    valid = torch.tensor([2, 6])
    out = model(x, timestep, text, valid)
    other = text.clone()
    other[0, 2:] = (other[0, 2:] + 1) % 10
    assert torch.equal(model(x, timestep, other, valid), out)
    assert torch.equal(model(x, timestep, text, torch.arange(6) < valid[:, None]), out)
    cut = model(x[:1], timestep[:1], text[:1, :2])
    torch.testing.assert_close(out[:1], cut, atol=1e-5, rtol=1e-4)
    other[0, 1] = (other[0, 1] + 1) % 10
    assert not torch.allclose(model(x, timestep, other, valid), out, atol=1e-4)


@BOTH
def test_no_text_is_text_of_which_nothing_is_valid(config):
    model = make(config)
    x, timestep, text = inputs(config)
    torch.testing.assert_close(
        model(x, timestep), model(x, timestep, text, torch.zeros(2, dtype=torch.int64)), atol=1e-5, rtol=1e-4
    )


@BOTH
def test_a_sample_does_not_depend_on_its_batch(config):
    model = make(config)
    x, timestep, text = inputs(config, batch=3)
    together = model(x, timestep, text)
    for i in range(3):
        alone = model(x[i : i + 1], timestep[i : i + 1], text[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], atol=2e-5, rtol=1e-4)


@BOTH
@torch.no_grad()
def test_an_encoded_text_stands_for_the_text(config):
    model = make(config)
    x, timestep, text = inputs(config)
    valid = torch.tensor([4, 2])
    for given in ((text,), (text, valid)):
        encoded = model.encode_text(*given)
        assert torch.equal(model(x, timestep, encoded), model(x, timestep, *given))
    with pytest.raises(ValueError, match="text_valid"):
        model(x, timestep, encoded, valid)
    with pytest.raises(ValueError, match="batch of 2"):
        model(x[:1], timestep[:1], encoded)


@BOTH
@torch.no_grad()
def test_the_first_layers_may_be_dense(config):
    model = make(config)
    x, timestep, text = inputs(config)
    near = masks.window(1, 1, 1)
    whole, sparse = model(x, timestep, text), model(x, timestep, text, mask=near)
    assert torch.equal(model(x, timestep, text, mask=near, dense_layers=2), whole)
    some = model(x, timestep, text, mask=near, dense_layers=1)
    assert not torch.equal(some, whole)
    assert not torch.equal(some, sparse)
    with stattn.accelerate(model, near, layers=[1]):
        assert torch.equal(model(x, timestep, text), some)


@BOTH
def test_timesteps_per_frame_and_per_token_equal_one_per_sample_when_constant(config):
    model = make(config)
    x, timestep, text = inputs(config)
    out = model(x, timestep, text)
    for length in (3, 60):
        spread = timestep[:, None].expand(2, length)
        torch.testing.assert_close(model(x, spread, text), out, atol=1e-5, rtol=1e-4)


@BOTH
def test_timesteps_per_token_equal_those_per_frame_when_constant_in_a_frame(config):
    model = make(config)
    x, _, text = inputs(config)
    frames = torch.tensor([[0.0, 300.0, 900.0], [500.0, 500.0, 10.0]])
    per_frame = model(x, frames, text)
    torch.testing.assert_close(model(x, frames.repeat_interleave(20, 1), text), per_frame, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(x, frames.flip(1), text), per_frame, atol=1e-3)


def test_text_follows_the_noisiest_frame():
    model = make(JOINT)
    seen = []
    model.text_time_proj.register_forward_hook(lambda module, arguments, out: seen.append(out))
    x, _, text = inputs(JOINT, batch=1)
    for timestep in ([[0.0, 900.0, 300.0]], [900.0]):
        model(x, torch.tensor(timestep), text)
    torch.testing.assert_close(seen[0], seen[1])


def test_what_is_known_is_read_where_the_mask_says_and_nowhere_else():
    model = make(JOINT)
    x, timestep, text = inputs(JOINT)
    known, known_mask = torch.randn_like(x), torch.zeros_like(x[:, :1])
    nothing = model(x, timestep, text)
    assert torch.equal(model(x, timestep, text, known=known, known_mask=known_mask), nothing)
    assert torch.equal(model(x, timestep, text, known=known * torch.nan, known_mask=known_mask), nothing)
    known_mask[:, :, :2] = 1
    first = model(x, timestep, text, known=known, known_mask=known_mask.bool())
    assert not torch.allclose(first, nothing, atol=1e-3)
    other = known.clone()
    other[:, :, 2:] += 1
    assert torch.equal(model(x, timestep, text, known=other, known_mask=known_mask), first)
    other[:, :, :2] += 1
    assert not torch.allclose(model(x, timestep, text, known=other, known_mask=known_mask), first, atol=1e-3)


@BOTH
def test_a_window_as_large_as_the_grid_is_full_attention(config):
    model = make(config)
    x, timestep, text = inputs(config)
    out = model(x, timestep, text)
    whole = model(x, timestep, text, mask=masks.window(None, None, None))
    torch.testing.assert_close(whole, out, atol=1e-5, rtol=1e-4)
    per_head = model(x, timestep, text, mask=[masks.spatial(), masks.temporal()])
    assert not torch.allclose(per_head, out, atol=1e-4)


def test_spatial_masks_keep_frames_apart_but_for_the_text():
    model = make(JOINT, mask=masks.spatial())
    x, timestep, text = inputs(JOINT)
    other = x.clone()
    other[:, :, 2:4] += 1
    frame = (slice(None), slice(None), slice(0, 2))
    assert torch.equal(model(x, timestep)[frame], model(other, timestep)[frame])
    # Text sees every frame and every frame sees the text.
    assert not torch.equal(model(x, timestep, text)[frame], model(other, timestep, text)[frame])


def test_predicted_tokens_are_the_patches_of_the_prediction():
    model = make(JOINT)
    arguments = inputs(JOINT)
    tokens = model(*arguments, tokens=True)
    assert tokens.shape == (2, 60, 2 * 4 * 4 * 3)
    out = model(*arguments)
    # Token (1, 2, 3); features in the order (pt, ph, pw, C).
    patch = out[:, :, 2:4, 8:12, 12:16].permute(0, 2, 3, 4, 1).flatten(1)
    assert torch.equal(tokens[:, (1 * 4 + 2) * 5 + 3], patch)


@BOTH
def test_the_model_runs_in_bfloat16_and_modulates_in_float32(config):
    model = make(config)
    x, timestep, text = inputs(config)
    out = model(x, timestep, text)
    half = copy.deepcopy(model).bfloat16()
    seen = []
    norm = half.blocks[0].norm1
    norm.register_forward_pre_hook(lambda module, arguments: seen.append([each.dtype for each in arguments[:3]]))
    low = half(x, timestep, text)
    assert low.dtype == torch.bfloat16
    assert seen[0] == [torch.bfloat16, torch.float32, torch.float32]
    assert (low - out).norm() < 0.1 * out.norm()


def test_autocast_does_not_round_the_noise_level():
    model = make(JOINT)
    seen = []
    model.time_proj.register_forward_hook(lambda module, arguments, out: seen.append(out))
    arguments = inputs(JOINT)
    with torch.autocast("cpu", torch.bfloat16):
        model(*arguments)
    model(*arguments)
    assert torch.equal(seen[0], seen[1])


def test_rotary_tables_made_in_inference_mode_serve_training_later():
    model = make(JOINT)
    arguments = inputs(JOINT)
    with torch.inference_mode():
        model(*arguments)
    model(*arguments).sum().backward()
    assert len(model._angles) == 1
    assert all(not table.is_inference() for tables in model._angles.values() for table in tables)


def test_rotary_tables_are_those_of_the_config_and_the_grid():
    model = make(dataclasses.replace(JOINT, rope_split=(8, 2, 2), rope_theta=256.0))
    device = torch.device("cpu")
    # Two grids of as many tokens, the first of them twice.
    for grid in (Grid(3, 4, 5), Grid(5, 4, 3), Grid(3, 4, 5, after=6)):
        got = model.rope(grid, device)
        expected = rope_tables(grid, 12, split=(8, 2, 2), theta=256.0)
        assert got.grid == grid
        assert all(torch.equal(getattr(got, axis), getattr(expected, axis)) for axis in "thw")


@pytest.mark.parametrize("stem", ["attention", "patchify", "modulate", "gate", "qk_norm_rope"])
def test_the_implementation_of_every_stem_reaches_its_operation(stem):
    make(JOINT, impl={stem: "reference"})(*inputs(JOINT))
    with pytest.raises(ValueError, match="impl='cuda'"):
        make(JOINT, impl={stem: "cuda"})(*inputs(JOINT))


def test_rotary_tables_are_no_part_of_the_state():
    model = make(JOINT)
    before = set(model.state_dict())
    model(*inputs(JOINT))
    assert set(model.state_dict()) == before


def test_sinusoids_are_cosines_then_sines_of_falling_frequencies():
    got = dit.sinusoid(torch.tensor([0.0, 250.0]), 8)
    angles = [250.0 * 1e4 ** (-i / 4) for i in range(4)]
    expected = torch.tensor([[1.0] * 4 + [0.0] * 4, [*map(math.cos, angles), *map(math.sin, angles)]])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name, billions", [("tiny", 0.00615), ("wan2.1-1.3b", 1.419), ("wan2.1-14b", 14.288), ("cogvideox-5b", 4.905)]
)
def test_named_shapes_have_the_published_number_of_parameters(name, billions):
    with torch.device("meta"):
        model = DiT(name)
    assert model.num_parameters == pytest.approx(billions * 1e9, rel=2e-3)


@pytest.mark.parametrize(
    "name, heads, head_dim, layers, video, size",
    [
        ("tiny", 4, 64, 6, 512, (16, 64, 64)),
        ("wan2.1-1.3b", 12, 128, 30, 32_760, (21, 60, 104)),
        ("wan2.1-14b", 40, 128, 40, 75_600, (21, 90, 160)),
        ("hunyuanvideo", 24, 128, 60, 118_800, (33, 90, 160)),
        ("cogvideox-5b", 48, 64, 42, 17_550, (13, 60, 90)),
    ],
)
def test_named_shapes_have_the_published_tokens_heads_and_layers(name, heads, head_dim, layers, video, size):
    with torch.device("meta"):
        model = DiT(name, layers=1)
        x = torch.empty(1, model.config.in_channels, *size)
    assert CONFIGS[name].layers == layers
    assert len(model.blocks) == model.config.layers == 1
    assert (model.config.heads, model.config.head_dim) == (heads, head_dim)
    assert model.patchify.grid(x).video == video


def test_the_tiny_model_stays_small():
    with torch.device("meta"):
        assert DiT("tiny").num_parameters <= 7_000_000


@BOTH
def test_flops_count_what_the_counter_of_pytorch_counts(config):
    model = make(config)
    arguments = inputs(config)
    with FlopCounterMode(display=False) as counter:
        model(*arguments)
    grid = model.patchify.grid(arguments[0])
    text = config.text_len
    # The counter does not look into attention.
    tokens, dim = grid.video + (text if config.kind == "joint" else 0), config.dim
    attention = 4 * dim * tokens**2 + (4 * dim * grid.video * text if config.kind == "cross" else 0)
    assert model.flops(grid, batch=2) == counter.get_total_flops() + 2 * config.layers * attention


def test_flops_follow_the_density_of_the_mask():
    with torch.device("meta"):
        model = DiT("wan2.1-1.3b")
    grid = Grid(21, 30, 52)
    full = model.flops(grid)
    window = masks.window(7, 11, 11)
    attention = 4 * 1536 * grid.video**2 * 30
    assert attention == pytest.approx(6.6e12 * 30, rel=0.01)
    assert full - model.flops(grid, window) == pytest.approx(attention * (1 - window.density(grid)), rel=1e-9)
    assert model.flops(grid, [window] * 12) == model.flops(grid, window)


@BOTH
def test_weights_survive_a_round_trip_through_a_file(config, tmp_path):
    pytest.importorskip("safetensors")
    model = make(config)
    dit.save(model, tmp_path / "model.safetensors", steps=3)
    loaded = dit.load(tmp_path / "model.safetensors")
    assert loaded.config == config
    assert not loaded.training
    assert torch.equal(loaded(*inputs(config)), model(*inputs(config)))
    assert json.loads((tmp_path / "model.json").read_text())["steps"] == 3
    half = dit.load(tmp_path / "model.safetensors", dtype=torch.bfloat16)
    assert {each.dtype for each in half.parameters()} == {torch.bfloat16}


def test_weights_that_do_not_exist_are_named(tmp_path):
    with pytest.raises(ValueError, match="huge"):
        dit.load("huge")
    with pytest.raises(ValueError, match="missing.safetensors"):
        dit.load(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="weights.pt"):
        dit.save(make(JOINT), tmp_path / "weights.pt")
