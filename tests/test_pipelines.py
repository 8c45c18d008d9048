"""Diffusers' pipelines with accelerated transformers: guidance, schedulers and steps as a user has them."""

import pytest
import torch
from hosts import COGVIDEOX, LTX, ROTARY, WAN, Masked, model

import stattn
from stattn import masks

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")  # or diffusers has no pipelines

MASK, GRID, STEPS = masks.window(1, 2, 3), (3, 4, 6), 3


def wan():
    transformer = model("WanTransformer3DModel", **{**WAN, "in_channels": 16, "out_channels": 16})
    sizes = {"dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, **sizes),
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=transformer,
    )
    return pipe, {"height": 64, "width": 96, "num_frames": 9}, None


def cogvideox():
    transformer = model(
        "CogVideoXTransformer3DModel", **{**COGVIDEOX, **ROTARY, "sample_height": 8, "sample_width": 12}
    )
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        transformer=transformer,
    )
    return pipe, {"height": 64, "width": 96, "num_frames": 9}, "before"


def ltx():
    transformer = model("LTXVideoTransformer3DModel", **LTX)
    pipe = diffusers.LTXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
    )
    return pipe, {"height": 128, "width": 192, "num_frames": 17}, None


@pytest.mark.parametrize("kind", [wan, cogvideox, ltx])
def test_steps_are_dense_and_then_sparse_in_a_pipeline(kind):
    torch.manual_seed(0)
    pipe, size, side = kind()
    pipe.set_progress_bar_config(disable=True)
    texts = dict(zip(("prompt_embeds", "negative_prompt_embeds"), torch.randn(2, 1, 8, 10), strict=True))
    if kind is ltx:
        texts |= {f"{name.removesuffix('_embeds')}_attention_mask": torch.ones(1, 8) for name in tuple(texts)}

    def sample():
        noise = torch.Generator().manual_seed(1)
        steps = {"num_inference_steps": STEPS, "guidance_scale": 5.0}
        return pipe(**texts, **size, **steps, output_type="latent", generator=noise).frames

    dense = sample()
    with Masked(MASK, GRID, side) as mode:
        sparse = sample()
    layers = 2
    assert mode.calls in (layers * STEPS, 2 * layers * STEPS)  # guidance in one batch, or in two calls
    found = []
    for first in range(STEPS + 1):
        with stattn.accelerate(pipe.transformer, MASK, dense_steps=first) as handle:
            found.append(sample())
            torch.testing.assert_close(sample(), found[-1], atol=0, rtol=0)  # another video counts from its own first
            assert sum(each.calls for each in handle.report()) == 2 * mode.calls
    moved = (sparse - dense).abs().max()
    assert moved > 0.1
    assert (found[0] - sparse).abs().max() < 1e-4 * moved
    assert (found[-1] - dense).abs().max() < 1e-4 * moved
    apart = [(a - b).abs().max() for a, b in zip(found[1:], found[:-1], strict=True)]
    assert min(apart) > 1e-3 * moved
