"""Wan's weights in our DiT: the outputs of diffusers' own model, and a config that says no to what differs."""

import dataclasses

import pytest
import torch

from stattn import convert, masks
from stattn.dit import CONFIGS, DiT

WAN_CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.42.1",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
}


def tiny_wan(head_dim=12, patch=(1, 2, 2), out_channels=4):
    """A random WanTransformer3DModel without a zero or a one among its parameters."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.WanTransformer3DModel(
        patch_size=patch,
        num_attention_heads=2,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=out_channels,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return model.eval()


@torch.no_grad()
def worst(wan, ours, size, timestep):
    """The largest difference between the outputs, which are about 5 at most."""
    x, text = torch.randn(2, 4, *size), torch.randn(2, 12, 16)
    expected = wan(x, timestep, text, return_dict=False)[0]
    assert expected.abs().max() > 1
    return (ours(x, timestep, text) - expected).abs().max().item()


@pytest.mark.parametrize("size", [(3, 8, 12), (5, 6, 10)])
@pytest.mark.parametrize("head_dim", [12, 16])
def test_outputs_equal_those_of_diffusers_wan(head_dim, size):
    wan = tiny_wan(head_dim)
    ours = convert.from_diffusers(wan)
    assert worst(wan, ours, size, torch.tensor([999, 37])) < 1e-5
    assert worst(wan, ours, size, torch.tensor([512.25, 0.5])) < 1e-5


@pytest.mark.parametrize("size", [(3, 8, 12), (5, 6, 10)])
def test_outputs_equal_those_of_wan_with_a_timestep_per_token(size):
    # Wan 2.2 TI2V: the tokens of the given first frame have timestep 0.
    wan = tiny_wan()
    timestep = torch.full((2, *size), 731.0)[:, :, ::2, ::2].flatten(1).contiguous()
    timestep[:, : size[1] * size[2] // 4] = 0
    assert worst(wan, convert.from_diffusers(wan), size, timestep) < 1e-5


def test_outputs_equal_those_of_wan_with_larger_patches_and_other_output_channels():
    wan = tiny_wan(patch=(2, 2, 4), out_channels=3)
    ours = convert.from_diffusers(wan)
    assert ours.config.patch == (2, 2, 4)
    assert worst(wan, ours, (4, 8, 12), torch.tensor([999, 37])) < 1e-5


def test_weights_go_to_diffusers_and_back():
    wan = tiny_wan()
    ours = convert.from_diffusers(wan)
    state = convert.to_diffusers_state_dict(ours.state_dict(), ours.config)
    assert state.keys() == wan.state_dict().keys()
    again = type(wan)(**convert.to_diffusers_config(ours.config)).eval()
    again.load_state_dict(state)
    assert worst(again, ours, (3, 8, 12), torch.tensor([999, 37])) < 1e-5
    assert convert.from_diffusers_config(again.config, text_len=ours.config.text_len) == ours.config


def test_converted_parameters_share_memory_with_the_originals():
    wan = tiny_wan()
    ours = convert.from_diffusers(wan, mask=masks.spatial(), impl="reference")
    assert ours.proj_out.weight.data_ptr() == wan.proj_out.weight.data_ptr()
    assert not ours.training
    assert ours.blocks[1].attn1.mask == masks.spatial()
    assert ours.blocks[1].attn1.impl == "reference"


def test_the_published_config_is_the_named_shape():
    assert convert.from_diffusers_config(WAN_CONFIG) == CONFIGS["wan2.1-1.3b"]
    large = {**WAN_CONFIG, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
    assert convert.from_diffusers_config(large) == CONFIGS["wan2.1-14b"]


@pytest.mark.parametrize(
    "message, change",
    [
        ("image_dim=1280", {"image_dim": 1280}),
        ("added_kv_proj_dim=5120", {"added_kv_proj_dim": 5120}),
        ("cross_attn_norm=False", {"cross_attn_norm": False}),
        ("qk_norm=None", {"qk_norm": None}),
        ("pos_embed_seq_len=514", {"pos_embed_seq_len": 514}),
        ("vace_layers", {"vace_layers": [0, 5]}),
        ("WanVACETransformer3DModel", {"_class_name": "WanVACETransformer3DModel"}),
    ],
)
def test_a_wan_without_a_counterpart_is_refused_by_field(message, change):
    convert.from_diffusers_config(WAN_CONFIG)
    with pytest.raises(ValueError, match=message):
        convert.from_diffusers_config({**WAN_CONFIG, **change})


def test_a_config_with_a_field_missing_is_refused():
    with pytest.raises(ValueError, match="ffn_dim"):
        convert.from_diffusers_config({name: value for name, value in WAN_CONFIG.items() if name != "ffn_dim"})


@pytest.mark.parametrize(
    "message, change",
    [
        ("kind='joint'", {"kind": "joint"}),
        ("vocab=10", {"vocab": 10}),
        ("masked_input=True", {"masked_input": True}),
        ("qk_norm='per_head'", {"qk_norm": "per_head"}),
        ("rope_theta=256.0", {"rope_theta": 256.0}),
        ("rope_split", {"rope_split": (64, 32, 32)}),
    ],
)
def test_a_dit_that_is_no_wan_is_refused_by_field(message, change):
    convert.to_diffusers_config(CONFIGS["wan2.1-1.3b"])
    with pytest.raises(ValueError, match=message):
        convert.to_diffusers_config(dataclasses.replace(CONFIGS["wan2.1-1.3b"], **change))


def test_missing_and_unknown_weights_are_named():
    config = dataclasses.replace(CONFIGS["wan2.1-1.3b"], layers=1)
    with torch.device("meta"):
        state = convert.to_diffusers_state_dict(DiT(config).state_dict(), config)
    assert len(convert.from_diffusers_state_dict(state, config)) == len(state)
    state["blocks.0.attn2.add_k_proj.weight"] = state.pop("patch_embedding.bias")
    with pytest.raises(ValueError, match=r"lacks \['patch_embedding.bias'\].*add_k_proj"):
        convert.from_diffusers_state_dict(state, config)


def test_another_model_is_refused():
    with pytest.raises(TypeError, match="Linear"):
        convert.from_diffusers(torch.nn.Linear(2, 2))
