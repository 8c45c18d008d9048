"""`accelerate` changes masks and implementations, never parameters, and puts everything back."""

import copy
import types
from dataclasses import replace

import pytest
import torch
from tiny_models import JOINT
from torch import nn

from stattn import masks
from stattn.accelerate import accelerate
from stattn.dit import DiT
from stattn.modules import Patchify3D

CONFIG = replace(JOINT, layers=3, masked_input=False, qk_norm="across_heads")
GRID = (3, 4, 5)


@pytest.fixture
def model():
    model = DiT(CONFIG)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model.eval()


@torch.no_grad()
def run(model, **keywords):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 3, 6, 16, 20, generator=generator)
    return model(x, torch.tensor([500.0]), torch.tensor([[1, 2, 3]]), **keywords)


def settings(model):
    return [(module.impl, getattr(module, "mask", None)) for module in model.modules() if hasattr(module, "impl")]


def test_the_mask_is_that_of_every_layer_and_undo_restores_the_outputs_bitwise(model):
    before, kept = run(model), settings(model)
    handle = accelerate(model, mask=masks.spatial())
    assert torch.equal(run(model), run(model, mask=masks.spatial()))
    assert not torch.equal(run(model), before)
    handle.undo()
    assert torch.equal(run(model), before)
    assert settings(model) == kept
    handle.undo()
    assert torch.equal(run(model), before)


def test_a_window_as_large_as_the_grid_leaves_the_outputs(model):
    before = run(model)
    with accelerate(model, mask=masks.window(None, None, None)):
        torch.testing.assert_close(run(model), before, atol=1e-5, rtol=1e-4)


def test_leaving_the_context_undoes_even_after_an_error(model):
    before = run(model)

    def fail():
        with accelerate(model, mask=masks.temporal()):
            assert not torch.equal(run(model), before)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(run(model), before)


def test_parameters_and_state_dict_are_not_touched(model):
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    values = copy.deepcopy(model.state_dict())
    with accelerate(model, mask=masks.spatial(), impl="reference"):
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
        assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


def test_layers_choose_which_attention_layers_change(model):
    accelerate(model, mask=masks.spatial(), impl="reference", layers=[0, 2])
    assert [block.attn1.mask for block in model.blocks] == [masks.spatial(), masks.full(), masks.spatial()]
    assert [block.attn1.impl for block in model.blocks] == ["reference", "auto", "reference"]
    assert model.blocks[0].norm1.impl == "auto"


def test_dense_layers_stay_dense_among_those_that_change(model):
    accelerate(model, mask=masks.temporal(), layers=[2])
    accelerate(model, mask=masks.spatial(), layers=[0, 2], dense_layers=[2])
    assert [block.attn1.mask for block in model.blocks] == [masks.spatial(), masks.full(), masks.full()]


def test_each_head_can_have_its_own_mask(model):
    per_head = [masks.spatial(), masks.temporal()]
    with accelerate(model, mask=per_head):
        assert torch.equal(run(model), run(model, mask=per_head))


def test_an_implementation_reaches_every_module(model):
    accelerate(model, impl="reference")
    assert {impl for impl, _ in settings(model)} == {"reference"}
    accelerate(model, impl={"attention": "flash"})
    # The mapping changes the stems that it lists.
    assert {str(impl) for impl, _ in settings(model)} == {"{'*': 'reference', 'attention': 'flash'}"}
    with pytest.raises(ValueError, match="flash"):
        run(model)
    accelerate(model, impl={"attention": "reference"})
    assert run(model).isfinite().all()
    accelerate(model, impl={"*": "auto"})
    assert {str(impl) for impl, _ in settings(model)} == {"{'*': 'auto'}"}


def test_handles_are_undone_in_reverse_order_only(model):
    before = run(model)
    first = accelerate(model, mask=masks.spatial())
    second = accelerate(model, mask=masks.temporal())
    with pytest.raises(RuntimeError, match=r"attn1\.mask was changed since"):
        first.undo()
    assert model.blocks[0].attn1.mask == masks.temporal()
    second.undo()
    first.undo()
    assert torch.equal(run(model), before)


def test_the_report_lists_layers_masks_and_densities(model):
    window = masks.window(3, 3, 3)
    handle = accelerate(model, mask=window, impl={"attention": "reference"}, layers=[1])
    report = handle.report(GRID)
    assert [each.layer for each in report] == [0, 1, 2]
    assert report[1].name == "blocks.1.attn1"
    assert report[1].heads == 2
    assert [each.mask for each in report] == ["full()", window.key, "full()"]
    assert [each.density for each in report] == [1.0, window.density(GRID), 1.0]
    assert report[1].impl == "{'*': 'auto', 'attention': 'reference'}"
    assert f"{window.density(GRID):.2%}" in str(report)
    assert [each.density for each in handle.report()] == [None] * 3
    lines = str(handle.report()).splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["layer", "name", "heads", "mask", "density", "impl"]


def test_the_report_gives_the_mean_density_over_heads(model):
    per_head = [masks.spatial(), masks.full()]
    report = accelerate(model, mask=per_head).report(GRID)
    assert report[0].density == pytest.approx((masks.spatial().density(GRID) + 1) / 2)


def test_any_model_of_our_modules_is_served(model):
    pair = nn.ModuleDict(
        {"video": model, "other": nn.Sequential(nn.Linear(2, 2), copy.deepcopy(model.blocks[0].attn1))}
    )
    handle = accelerate(pair, mask=masks.spatial(), layers=[3])
    assert handle.report()[3].name == "other.1"
    assert model.blocks[0].attn1.mask == masks.full()
    assert pair["other"][1].mask == masks.spatial()


@pytest.mark.parametrize(
    "error, message, keywords",
    [
        (ValueError, "layers has 3; the model has attention layers 0 to 2", {"layers": [0, 3]}),
        (ValueError, "layers has -1", {"layers": [-1]}),
        (ValueError, "twice", {"layers": [1, 1]}),
        (TypeError, "'blocks.0'", {"layers": ["blocks.0"]}),
        (TypeError, "True", {"layers": [True]}),
        (TypeError, "layers=1 must list", {"layers": 1}),
        (TypeError, "layers='all' must list", {"layers": "all"}),
        (TypeError, "dense_layers=0 must list", {"dense_layers": 0}),
        (TypeError, "mask='full' must be .* masks.parse", {"mask": "full"}),
        (ValueError, "3 masks for 2 heads", {"mask": [masks.full()] * 3}),
        (ValueError, "'fastest'", {"impl": "fastest"}),
        (ValueError, "'attn'", {"impl": {"attn": "auto"}}),
        (TypeError, "impl=3", {"impl": 3}),
        (ValueError, "modulate", {"impl": {"modulate": "reference"}, "layers": [0]}),
        (ValueError, "dense_layers has 3; the model", {"dense_layers": [3]}),
        (ValueError, r"dense_layers has 1, which is not among layers=\[0, 2\]", {"dense_layers": [1]}),
        (ValueError, "dense_steps=2: .* stattn.sampler", {"dense_steps": 2}),
        (ValueError, "verify=True", {"verify": True}),
    ],
)
def test_wrong_arguments_are_named_and_change_nothing(model, error, message, keywords):
    kept = settings(model)
    good = {"mask": masks.spatial(), "impl": {"attention": "auto"}, "layers": [0, 2]}
    accelerate(model, **good).undo()
    with pytest.raises(error, match=message):
        accelerate(model, **{**good, **keywords})
    assert settings(model) == kept


def test_models_without_our_attention_are_refused_by_name():
    with pytest.raises(TypeError, match="Sequential without a SpaceTimeAttention"):
        accelerate(nn.Sequential(Patchify3D(3, 8, (1, 2, 2))), mask=masks.spatial())
    with pytest.raises(TypeError, match="str"):
        accelerate("tiny")
    with pytest.raises(TypeError, match="SimpleNamespace .* give its transformer"):
        accelerate(types.SimpleNamespace(transformer=nn.Linear(1, 1)))
