"""Diffusers' video transformers under stattn: each family equals the same model under a dense mask of PyTorch."""

import types

import pytest
import torch
import torch.utils._python_dispatch
from hosts import FAMILIES, LTX, WAN, ltx, model, run, run_masked, wan
from torch import nn

import stattn
from stattn import Grid, Region, masks
from stattn.integrations import diffusers as families

diffusers = pytest.importorskip("diffusers")

MASK = masks.window(1, 2, 3)
GRID = (3, 4, 6)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def transformer(family):
    torch.manual_seed(0)
    return family.build()


def layers_of(transformer):
    with stattn.accelerate(transformer) as handle:
        return len(handle.report())


def test_every_family_equals_a_dense_masked_run_on_two_grids_and_undo_restores_it_bitwise(family, transformer):
    layers = layers_of(transformer)
    # A batch of two has texts of two lengths where the model takes masks of them; Mochi attends sample by sample.
    for grid, batch in ((GRID, 2), ((2, 5, 4), 1)):
        call = family.inputs(grid, batch)
        before = run(transformer, call)
        want, masked = run_masked(transformer, call, MASK, grid, family.side)
        assert masked in (layers, layers * batch)
        assert (want - before).abs().max() > 0.1
        with stattn.accelerate(transformer, MASK):
            torch.testing.assert_close(run(transformer, call), want, **CLOSE)
        assert torch.equal(run(transformer, call), before)


def test_a_window_as_large_as_the_grid_and_dense_attention_equal_the_original(family, transformer):
    call = family.inputs(GRID, 2)
    before = run(transformer, call)
    for mask in (None, masks.window(*GRID)):
        with stattn.accelerate(transformer, mask, verify=True) as handle:
            torch.testing.assert_close(run(transformer, call), before, **CLOSE)
        (line,) = handle.report().verified
        assert "dense differs from PyTorch by" in line


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.fullgraph])
def test_it_compiles_without_graph_breaks_where_the_original_does(name):
    family = FAMILIES[name]
    transformer = family.build()
    # Another grid compiles once more; the family that does so speaks for the others.
    calls = [family.inputs(grid, 1) for grid in (GRID, (2, 5, 4))[: 2 if name == "wan" else 1]]
    with stattn.accelerate(transformer, MASK):
        want = [run(transformer, call) for call in calls]
        torch._dynamo.reset()
        compiled = torch.compile(transformer, backend="eager", fullgraph=True)
        for call, out in zip(calls, want, strict=True):
            torch.testing.assert_close(run(compiled, call), out, **CLOSE)
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(run(compiled, calls[0]), want[0], **CLOSE)


@pytest.fixture
def tiny():
    return model("WanTransformer3DModel", **WAN)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "hunyuanvideo-1.5", "mochi"])
def test_blocks_that_are_compiled_for_themselves_share_one_graph(name):
    family = FAMILIES[name]
    transformer, call = family.build(num_layers=2), family.inputs(GRID, 1)
    blocks = transformer.blocks if name == "wan" else transformer.transformer_blocks
    with stattn.accelerate(transformer, MASK):
        want = run(transformer, call)
        torch._dynamo.reset()
        for block in blocks:
            block.compile(backend="eager", fullgraph=True)
        with torch._dynamo.config.patch(error_on_recompile=name != "mochi"):  # the last of Mochi has no text behind it
            torch.testing.assert_close(run(transformer, call), want, **CLOSE)


@pytest.mark.parametrize("how", ["compile", "compile_repeated_blocks"])
def test_a_compiled_model_is_accelerated_and_given_back(tiny, how):
    call = wan(GRID, 1)
    dense, (want, _) = run(tiny, call), run_masked(tiny, call, MASK, GRID, None)
    torch._dynamo.reset()
    getattr(tiny, how)(backend="eager", fullgraph=True)
    torch.testing.assert_close(run(tiny, call), dense, **CLOSE)
    for _ in range(2):
        with stattn.accelerate(tiny, MASK):
            torch.testing.assert_close(run(tiny, call), want, **CLOSE)
        torch.testing.assert_close(run(tiny, call), dense, **CLOSE)


def test_compiled_blocks_become_sparse_behind_the_dense_steps(tiny):
    calls = [wan(GRID, 1) | {"timestep": torch.tensor([each])} for each in (900.0, 800.0, 900.0)]
    want = [run(tiny, calls[0]), run_masked(tiny, calls[1], MASK, GRID, None)[0], run(tiny, calls[2])]
    torch._dynamo.reset()
    tiny.compile_repeated_blocks(backend="eager", fullgraph=True)
    with stattn.accelerate(tiny, MASK, dense_steps=1):
        for call, out in zip(calls, want, strict=True):
            torch.testing.assert_close(run(tiny, call), out, **CLOSE)


def test_the_report_knows_what_compiled_blocks_run(tiny):
    tiny.compile_repeated_blocks(backend="eager", fullgraph=True)
    with stattn.accelerate(tiny, MASK) as handle:
        torch._dynamo.reset()
        run(tiny, wan(GRID, 1))
        last = handle.report()[1]
        assert "without calls: layers that ran in compiled code" in str(handle.report())
    assert (last.impl, last.grid, last.density, last.calls) == ("reference", "3x4x6", MASK.density(GRID), 0)


def test_layers_and_dense_layers_choose_what_changes(tiny):
    call = wan(GRID, 1)
    before = run(tiny, call)
    with stattn.accelerate(tiny, MASK, layers=[1]) as handle:
        assert [each.name for each in handle.report()] == ["blocks.1.attn1"]
        some = run(tiny, call)
    with stattn.accelerate(tiny, MASK, dense_layers=[0]) as handle:
        assert [each.mask for each in handle.report()] == ["full()", MASK.key]
        torch.testing.assert_close(run(tiny, call), some, **CLOSE)
    with stattn.accelerate(tiny, masks.temporal(), layers=[0]), stattn.accelerate(tiny, MASK, layers=[1]):
        both = run(tiny, call)
    with stattn.accelerate(tiny, MASK, dense_layers=[0, 1]):
        torch.testing.assert_close(run(tiny, call), before, **CLOSE)
    assert (both - some).abs().max() > 1e-3


def test_each_head_can_have_its_own_mask(tiny):
    call, per_head = wan(GRID, 1), [masks.spatial(), masks.temporal()]
    with stattn.accelerate(tiny, per_head, impl="reference"):
        out = run(tiny, call)
    with stattn.accelerate(tiny, per_head[::-1]):
        assert (run(tiny, call) - out).abs().max() > 1e-3


def test_the_first_steps_are_dense_by_the_changes_of_the_timestep(tiny):
    call = wan(GRID, 1)

    def at(timestep):
        return run(tiny, call | {"timestep": torch.tensor([timestep])})

    dense = [at(t) for t in (900.0, 500.0, 100.0)]
    with stattn.accelerate(tiny, MASK):
        sparse = [at(t) for t in (900.0, 500.0, 100.0)]
    with stattn.accelerate(tiny, MASK, dense_steps=2):
        for _ in range(2):  # another video begins where the timestep grows
            steps = [at(t) for t in (900.0, 900.0, 500.0, 500.0, 100.0)]  # two calls a step: cond and uncond
            want = [dense[0], dense[0], dense[1], dense[1], sparse[2]]
            torch.testing.assert_close(steps, want, **CLOSE)
    with stattn.accelerate(tiny, MASK, dense_steps=1):
        torch._dynamo.reset()
        tiny.compile_repeated_blocks(backend="eager", fullgraph=True)
        torch.testing.assert_close([at(t) for t in (900.0, 500.0)], [dense[0], sparse[1]], **CLOSE)
        with pytest.raises(RuntimeError, match="compile_repeated_blocks"):
            run(torch.compile(tiny, backend="eager", fullgraph=True), call)


def test_the_report_says_what_ran_and_why(tiny):
    handle = stattn.accelerate(tiny, MASK, dense_layers=[0])
    assert [(each.density, each.grid, each.calls) for each in handle.report()] == [(None, None, 0)] * 2
    run(tiny, wan(GRID, 1))
    dense, sparse = handle.report()
    assert (dense.impl, sparse.impl) == ("sdpa", "reference")
    assert (sparse.density, sparse.grid, sparse.calls, sparse.heads) == (MASK.density(GRID), "3x4x6", 1, 2)
    assert sparse.norm_rope == "fused"
    text = str(handle.report())
    assert f"{MASK.density(GRID):.2%}" in text
    assert "serves dense attention only, the call has mask window(1, 2, 3)" in text
    assert repr(handle) == "<accelerated WanTransformer3DModel: 2 layers, full(), window(1, 2, 3)>"
    assert "undone" not in text
    assert "compiled" not in text
    handle.undo()
    assert "undone: the transformer runs its own attention" in str(handle.report())


def test_verify_refuses_what_is_not_dense_attention(tiny, monkeypatch):
    from stattn.integrations import _layers

    call, right = wan(GRID, 1), _layers.attention

    def wrong(q, k, v, *rest, **options):
        return right(q, k, v.flip(1), *rest, **options)

    monkeypatch.setattr(_layers, "attention", wrong)
    with (
        stattn.accelerate(tiny, MASK, verify=True),
        pytest.raises(RuntimeError, match="dense attention differs from PyTorch's by"),
    ):
        run(tiny, call)


def test_what_was_verified_compiles_and_nothing_is_verified_in_compiled_code(tiny):
    call = wan(GRID, 1)
    with stattn.accelerate(tiny, MASK, verify=True):
        torch._dynamo.reset()
        compiled = torch.compile(tiny, backend="eager", fullgraph=True)
        with pytest.raises(RuntimeError, match="run one forward pass before compiling"):
            run(compiled, call)
        want = run(tiny, call)
        torch.testing.assert_close(run(compiled, call), want, **CLOSE)


@pytest.mark.parametrize("name, side", [("ltx", "before"), ("ltx-2", "after")])
def test_tokens_of_conditions_beside_the_grid_are_global(name, side):
    family = FAMILIES[name]
    transformer, call = family.build(), family.inputs(GRID, 1)
    parts = [torch.randn(1, 5, 8), call["hidden_states"]]
    call["hidden_states"] = torch.cat(parts if side == "before" else parts[::-1], dim=1)
    call["video_coords"] = torch.rand(1, 3, 5 + 72) if name == "ltx" else torch.rand(1, 3, 5 + 72, 2)
    want, masked = run_masked(transformer, call, MASK, GRID, side)
    assert masked == 2
    with stattn.accelerate(transformer, MASK) as handle:
        torch.testing.assert_close(run(transformer, call), want, **CLOSE)
        assert handle.report()[0].grid == "3x4x6 +5"


class Pairs(torch.utils._python_dispatch.TorchDispatchMode):
    """Count the boolean tensors that hold a value for every pair of tokens."""

    def __init__(self, tokens):
        super().__init__()
        self.shape, self.found = (tokens, tokens), 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.bool and tuple(out.shape[-2:]) == self.shape:
            self.found += 1
        return out


def test_hunyuanvideo_15_builds_no_mask_of_all_pairs():
    family = FAMILIES["hunyuanvideo-1.5"]
    transformer, call = family.build(), family.inputs(GRID, 2)
    tokens = 72 + call["encoder_hidden_states"].shape[1] + 5 + 3
    with Pairs(tokens) as original:
        run(transformer, call)
    with stattn.accelerate(transformer), Pairs(tokens) as ours:
        run(transformer, call)
    assert (original.found > 0, ours.found) == (True, 0)


def test_the_causal_blocks_of_skyreels_are_part_of_the_mask():
    transformer = model("SkyReelsV2Transformer3DModel", **WAN, num_frame_per_block=2)
    call = wan((4, 4, 6), 1)
    before = run(transformer, call)
    want, _ = run_masked(transformer, call, masks.window(3, 2, 3), (4, 4, 6), None)
    with stattn.accelerate(transformer) as dense:
        torch.testing.assert_close(run(transformer, call), before, **CLOSE)
    dense.undo()
    with stattn.accelerate(transformer, masks.window(3, 2, 3)) as handle:
        torch.testing.assert_close(run(transformer, call), want, **CLOSE)
        assert handle.report()[0].mask == "(window(3, 2, 3) & frame_causal(2))"
        transformer.register_to_config(num_frame_per_block=4)
        with pytest.raises(RuntimeError, match="num_frame_per_block=4 was 2"):
            run(transformer, call)


# Refusals.


def test_models_and_processors_that_are_not_served_are_refused_by_name(tiny):
    class HunyuanVideoFramepackTransformer3DModel(nn.Linear):
        __module__ = "diffusers.models.transformers.transformer_hunyuan_video_framepack"

    with pytest.raises(TypeError, match="Framepack.*several grids.*served are WanTransformer3DModel"):
        stattn.accelerate(HunyuanVideoFramepackTransformer3DModel(1, 1), MASK)
    image = diffusers.SD3Transformer2DModel(
        sample_size=4, num_layers=1, attention_head_dim=4, num_attention_heads=1, caption_projection_dim=4
    )
    with pytest.raises(TypeError, match="SD3Transformer2DModel, which is not served: no adapter"):
        stattn.accelerate(image, MASK)

    class Strange:
        pass

    tiny.blocks[1].attn1.processor = Strange()
    with pytest.raises(TypeError, match=r"blocks.1.attn1 has a Strange; served are WanAttnProcessor"):
        stattn.accelerate(tiny, MASK)
    with stattn.accelerate(tiny, MASK, layers=[0]):
        run_is_refused = pytest.raises(TypeError, match="blocks.0.attn1 has a Strange")
        tiny.blocks[0].attn1.processor = Strange()
        with run_is_refused:
            run(tiny, wan(GRID, 1))


def test_parts_of_a_ring_are_boxes_of_the_grid():
    grid = Grid(3, 4, 5)
    for start in range(grid.video):
        for stop in range(start + 1, grid.video + 1):
            found = families.boxes(grid, start, stop)
            assert len(found) <= 5
            places = torch.arange(grid.video).view(grid.shape)
            boxes = [[slice(o, o + e) for o, e in zip(each.origin, each.extent, strict=True)] for each in found]
            assert torch.cat([places[tuple(box)].flatten() for box in boxes]).tolist() == list(range(start, stop))


def test_a_ring_does_not_cut_what_stands_beside_the_grid():
    group = types.SimpleNamespace(get_group=lambda: None)
    config = types.SimpleNamespace(ulysses_degree=1, ring_degree=2, _ulysses_mesh=group, _ring_mesh=group)
    config._ulysses_local_rank, config._ring_local_rank = 0, 1
    ring = families.Exchange(config)
    assert ring.regions(Grid(2, 3, 4)) == [Region((1, 0, 0), (1, 3, 4))]
    with pytest.raises(ValueError, match="ring_degree=2 cuts 5 tokens beside the grid out of their place"):
        ring.regions(Grid(2, 3, 4, before=5))


@pytest.mark.parametrize(
    "error, message, keywords",
    [
        (TypeError, "mask='full'", {"mask": "full"}),
        (ValueError, "3 masks for 2 heads", {"mask": [masks.full()] * 3}),
        (ValueError, "layers has 2; the model has attention layers 0 to 1", {"layers": [2]}),
        (ValueError, "dense_layers has 1, which is not among layers", {"layers": [0], "dense_layers": [1]}),
        (ValueError, "dense_steps=-1", {"dense_steps": -1}),
        (TypeError, "verify=1", {"verify": 1}),
        (ValueError, "'fastest'", {"impl": "fastest"}),
        (ValueError, r"impl='cuda': qk_norm_rope is one of .*impl=\{'attention': 'cuda'\}", {"impl": "cuda"}),
    ],
)
def test_wrong_arguments_are_named_and_change_nothing(tiny, error, message, keywords):
    processors = dict(tiny.attn_processors)
    stattn.accelerate(tiny, MASK, layers=[0]).undo()
    with pytest.raises(error, match=message):
        stattn.accelerate(tiny, **{"mask": MASK, **keywords})
    assert dict(tiny.attn_processors) == processors
    assert not tiny._forward_pre_hooks


def test_a_layer_is_accelerated_once(tiny):
    with stattn.accelerate(tiny, MASK, layers=[0]):
        with pytest.raises(ValueError, match="blocks.0.attn1 is accelerated already"):
            stattn.accelerate(tiny, MASK)
        stattn.accelerate(tiny, MASK, layers=[1]).undo()
    stattn.accelerate(tiny, MASK).undo()


def test_a_window_over_its_axis_and_masks_of_the_caller_are_refused(tiny):
    with (
        stattn.accelerate(tiny, masks.window(4, 2, 3)),
        pytest.raises(ValueError, match="exceeds|shorter|longer|window"),
    ):
        run(tiny, wan(GRID, 1))
    family = FAMILIES["ltx-2"]
    transformer = family.build()
    call = family.inputs(GRID, 1)
    run(transformer, call | {"video_self_attention_mask": torch.ones(1, 72, 72)})
    with stattn.accelerate(transformer, MASK), pytest.raises(ValueError, match="is given an attention mask of shape"):
        run(transformer, call | {"video_self_attention_mask": torch.ones(1, 72, 72)})
    transformer = model("LTXVideoTransformer3DModel", **LTX)
    call = ltx(GRID, 1) | {"video_coords": torch.rand(1, 3, 72), "height": 5}
    run(transformer, call)
    with stattn.accelerate(transformer, MASK), pytest.raises(ValueError, match=r"72 tokens .* expected 3\*5\*6"):
        run(transformer, call)
