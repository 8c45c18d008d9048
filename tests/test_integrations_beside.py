"""Accelerated transformers beside what else diffusers does to a model: fusion, LoRA, caches, guiders, offloading."""

import copy
import pickle

import pytest
import torch
from hosts import COGVIDEOX, FAMILIES, WAN, Masked, cogvideox, first, model, run, run_masked, wan

import stattn
from stattn import masks

diffusers = pytest.importorskip("diffusers")

MASK = masks.window(1, 2, 3)
GRID = (3, 4, 6)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def tiny():
    return model("WanTransformer3DModel", **WAN)


@pytest.mark.parametrize("name", ["wan", "wan-i2v", "skyreels-v2", "ltx"])
def test_fused_projections_work_before_and_after(name):
    family = FAMILIES[name]
    transformer, call = family.build(), family.inputs(GRID, 1)
    with stattn.accelerate(transformer, MASK) as handle:
        want = run(transformer, call)
        transformer.fuse_qkv_projections()
        assert all(layer.module.fused_projections for layer in handle._host.layers)
        torch.testing.assert_close(run(transformer, call), want, **CLOSE)
    with stattn.accelerate(transformer, MASK):
        torch.testing.assert_close(run(transformer, call), want, **CLOSE)


def test_a_processor_that_is_set_later_is_taken_over_and_given_back():
    from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0

    transformer = model("CogVideoXTransformer3DModel", **COGVIDEOX, use_rotary_positional_embeddings=True)
    call = cogvideox(GRID, 1)
    handle = stattn.accelerate(transformer, MASK)
    want = run(transformer, call)
    transformer.fuse_qkv_projections()
    assert type(transformer.transformer_blocks[0].attn1.processor) is FusedCogVideoXAttnProcessor2_0
    torch.testing.assert_close(run(transformer, call), want, **CLOSE)
    transformer.unfuse_qkv_projections()
    torch.testing.assert_close(run(transformer, call), want, **CLOSE)
    handle.undo()
    assert type(transformer.transformer_blocks[0].attn1.processor) is CogVideoXAttnProcessor2_0


def test_adapters_of_lora_act(tiny):
    peft = pytest.importorskip("peft")
    tiny.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    call = wan(GRID, 1)
    want, _ = run_masked(tiny, call, MASK, GRID, None)
    with stattn.accelerate(tiny, MASK):
        torch.testing.assert_close(run(tiny, call), want, **CLOSE)


CACHES = {
    "pyramid": lambda timestep: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=["blocks"],
        current_timestep_callback=lambda: float(timestep),
    ),
    "faster": lambda timestep: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 800),
        spatial_attention_block_identifiers=["blocks"],
        current_timestep_callback=lambda: float(timestep),
        is_guidance_distilled=True,
    ),
    "first_block": lambda timestep: diffusers.FirstBlockCacheConfig(threshold=10.0),
    "mag": lambda timestep: diffusers.MagCacheConfig(
        threshold=10.0, retention_ratio=0.25, num_inference_steps=4, mag_ratios=[0.9, 1.1, 1.0, 0.9]
    ),
    "taylor": lambda timestep: diffusers.TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"blocks\.\d+\.attn1"],
    ),
    "sea": lambda timestep: diffusers.SeaCacheConfig(
        threshold=10.0, raw_vision_callback=lambda module, args, kwargs: list(kwargs["hidden_states"])
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_skip_and_repeat_attention_as_without_us(tiny, name):
    calls = [wan(GRID, 1)]
    calls += [calls[0] | {"hidden_states": calls[0]["hidden_states"] + 0.1 * step} for step in range(1, 4)]

    def outputs():
        found, timestep = [], torch.tensor(900.0)
        tiny.enable_cache(CACHES[name](timestep))
        for step, call in enumerate(calls):
            timestep.fill_(900 - 200 * step)
            with tiny.cache_context("cond", step_index=step, sigma=1 - step / 4, num_inference_steps=4):
                found.append(run(tiny, call))
        tiny.disable_cache()
        return found

    with Masked(MASK, GRID, None) as mode:
        want = outputs()
    assert 2 <= mode.calls < 8
    with stattn.accelerate(tiny, MASK) as handle:
        torch.testing.assert_close(outputs(), want, **CLOSE)
        assert sum(each.calls for each in handle.report()) == mode.calls
        run(tiny, calls[0])
        assert sum(each.calls for each in handle.report()) == mode.calls + 2


@pytest.mark.parametrize("skipped", ["attention", "attention_scores"])
def test_guiders_that_skip_attention_skip_ours(tiny, skipped):
    from diffusers.hooks import HookRegistry, LayerSkipConfig
    from diffusers.hooks.layer_skip import _apply_layer_skip_hook

    call = wan(GRID, 1)
    config = LayerSkipConfig(
        indices=[1],
        fqn="blocks",
        skip_attention=skipped == "attention",
        skip_attention_scores=skipped == "attention_scores",
        skip_ff=False,
    )
    with stattn.accelerate(tiny, MASK) as handle:
        whole = run(tiny, call)
        _apply_layer_skip_hook(tiny, config, name="skip")
        out = run(tiny, call)
        assert [each.calls for each in handle.report()] == [2, 1]
        HookRegistry.check_if_exists_or_initialize(tiny).remove_hook("skip", recurse=True)
        assert torch.equal(run(tiny, call), whole)
    assert (out - whole).abs().max() > 1e-3


def test_offloading_brings_weights_before_they_are_used(tiny):
    accelerate = pytest.importorskip("accelerate")
    call = wan(GRID, 1)
    want, _ = run_masked(tiny, call, MASK, GRID, None)
    accelerate.cpu_offload(tiny, execution_device=torch.device("cpu"))
    with stattn.accelerate(tiny, MASK) as handle:
        torch.testing.assert_close(run(tiny, call), want, **CLOSE)
        assert handle.report()[0].norm_rope == "norm by the model (hooks), RoPE fused"


@pytest.mark.parametrize("level", ["block", "leaf"])
def test_offloading_in_groups_works(tiny, level):
    pytest.importorskip("accelerate")
    call, cpu = wan(GRID, 1), torch.device("cpu")
    tiny.enable_group_offload(cpu, cpu, offload_type=f"{level}_level", num_blocks_per_group=1)
    want, _ = run_masked(tiny, call, MASK, GRID, None)
    with stattn.accelerate(tiny, MASK):
        torch.testing.assert_close(run(tiny, call), want, **CLOSE)


def test_weights_may_be_stored_in_fewer_bits(tiny):
    tiny.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    call = wan(GRID, 1)
    want, _ = run_masked(tiny, call, MASK, GRID, None)
    with stattn.accelerate(tiny, MASK):
        torch.testing.assert_close(run(tiny, call), want, **CLOSE)


def test_the_backend_that_diffusers_is_told_reaches_the_other_layers_alone(tiny):
    call = wan(GRID, 1)
    with stattn.accelerate(tiny, MASK):
        want = run(tiny, call)
        try:
            tiny.set_attention_backend("_native_math")
            torch.testing.assert_close(run(tiny, call), want, **CLOSE)
        finally:
            tiny.reset_attention_backend()
            from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

            _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def test_gradients_flow_and_checkpointing_repeats_them():
    transformer = model("WanTransformer3DModel", **WAN).requires_grad_(True).train()
    call = wan(GRID, 1)
    grads = []
    with stattn.accelerate(transformer, MASK):
        for checkpointing in (False, True):
            if checkpointing:
                transformer.enable_gradient_checkpointing()
            first(transformer(**call)).square().sum().backward()
            grads.append([parameter.grad.clone() for parameter in transformer.parameters()])
            transformer.zero_grad()
    assert all(grad.abs().max() > 0 for grad in grads[0])
    torch.testing.assert_close(grads[0], grads[1])


def test_angles_of_inference_mode_are_not_kept_for_training():
    transformer = model("CogVideoXTransformer3DModel", **COGVIDEOX, use_rotary_positional_embeddings=True)
    call, kept = cogvideox(GRID, 1), []
    with stattn.accelerate(transformer.requires_grad_(True), MASK) as handle:
        for mode in (torch.inference_mode, torch.enable_grad, torch.enable_grad):
            with mode():
                first(transformer(**call))
            kept.append(handle._host._rope[2])
    assert [tables.t.is_inference() for tables in kept] == [True, False, False]
    assert kept[1] is kept[2]  # the same angles are not gathered twice


def test_autocast_attends_in_its_dtype(tiny):
    call = wan(GRID, 1)
    with stattn.accelerate(tiny, MASK):
        want = run(tiny, call)
        with torch.autocast("cpu", torch.bfloat16):
            out = run(tiny, call)
    assert out.dtype == torch.bfloat16
    assert (out.float() - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_a_copy_and_a_pickle_are_accelerated_like_the_original(name):
    family = FAMILIES[name]
    transformer = family.build()
    call = family.inputs(GRID, 1)
    with stattn.accelerate(transformer, MASK):
        want = run(transformer, call)
        copies = copy.deepcopy(transformer), pickle.loads(pickle.dumps(transformer))
    assert (run(transformer, call) - want).abs().max() > 1e-3
    for each in copies:
        assert torch.equal(run(each, call), want)


def test_weights_and_names_are_not_touched(tiny):
    state = {name: tensor.data_ptr() for name, tensor in tiny.state_dict().items()}
    other = model("WanTransformer3DModel", **WAN)
    call = wan(GRID, 1)
    untouched = run(other, call)
    with stattn.accelerate(tiny, MASK):
        assert {name: tensor.data_ptr() for name, tensor in tiny.state_dict().items()} == state
        assert torch.equal(run(other, call), untouched)
