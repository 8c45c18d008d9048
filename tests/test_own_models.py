"""Models of stattn's own modules in PyTorch's tools: compile, export, autocast, checkpointing, the counter of flops."""

from dataclasses import replace

import pytest
import torch
from tiny_models import CROSS
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from two_processes import loss, samples, video_model

import stattn
from stattn import flops, masks
from stattn.dit import DiT
from stattn.grid import Grid
from stattn.modules import SpaceTimeAttention

WINDOW = masks.window(1, 3, 3)


def joint():
    return video_model(), samples()


def cross():
    model = DiT(replace(CROSS, layers=1, in_channels=3, out_channels=3, patch=(2, 4, 4)), mask=WINDOW)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    x, t, _ = samples()
    return model, (x, t, torch.randn(2, 6, 8))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [joint, cross])
def test_a_model_compiles_to_one_graph_with_the_same_gradients(kind):
    model, batch = kind()
    want = torch.autograd.grad(loss(model, batch), list(model.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(loss(compiled, batch), list(model.parameters()))
    torch.testing.assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [joint, cross])
def test_a_model_is_exported_saved_and_loaded(kind, tmp_path):
    model, batch = kind()
    program = torch.export.export(model, batch)
    assert "stattn.attention.default" in {str(node.target) for node in program.graph.nodes}
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(*batch), model(*batch))


@pytest.mark.parametrize("kind", [joint, cross])
def test_autocast_computes_in_its_dtype_and_leaves_gradients_in_that_of_the_weights(kind):
    model, batch = kind()
    want = model(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*batch)
        loss(model, batch).backward()
    assert out.dtype == torch.bfloat16
    assert (out - want).abs().max() < 0.02 * want.abs().max()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_functional_attention_computes_in_the_dtype_of_its_inputs_under_autocast():
    q = torch.randn(1, 24, 2, 8)
    want = stattn.attention(q, q, q, (2, 3, 4), WINDOW)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stattn.attention(q, q, q, (2, 3, 4), WINDOW), want)


def test_activation_checkpointing_repeats_the_forward_pass_bit_by_bit():
    model, batch = joint()
    want = torch.autograd.grad(loss(model, batch), list(model.parameters()))
    for block in model.blocks:
        whole = block.forward
        block.forward = lambda *inputs, whole=whole: checkpoint(whole, *inputs, use_reentrant=False)
    got = torch.autograd.grad(loss(model, batch), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# Flops.


def counted(call):
    with FlopCounterMode(display=False, custom_mapping=flops.formulas()) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("mask", [masks.full(), WINDOW, [masks.spatial(), masks.temporal()]])
def test_attention_costs_the_pairs_that_its_mask_allows(mask):
    grid = Grid(2, 3, 4, 1, 2)
    q = torch.randn(3, grid.tokens, 2, 8, requires_grad=True)
    per_head = mask if isinstance(mask, list) else [mask, mask]
    pairs = sum(int(each.allowed(grid).sum()) for each in per_head)
    out = stattn.attention(q, q, q, grid, mask)
    assert counted(lambda: stattn.attention(q, q, q, grid, mask)) == 3 * 4 * 8 * pairs
    assert counted(lambda: out.sum().backward()) == 3 * 10 * 8 * pairs


def test_block_lists_cost_the_tiles_that_they_name():
    q, k = torch.randn(2, 2, 64, 2, 16)
    grid = (4, 4, 4)
    blocks = stattn.top_k(q, k, grid, q_tile=(2, 2, 4), k_tile=(2, 2, 4), keep=2)
    assert counted(lambda: stattn.attention(q, k, k, grid, blocks)) == 2 * 4 * 16 * 2 * (4 * 2 * 16 * 16)


def test_registered_formulas_count_in_every_counter(monkeypatch):
    from torch.utils import flop_counter

    monkeypatch.setattr(flop_counter, "flop_registry", dict(flop_counter.flop_registry))
    attention = SpaceTimeAttention(24, 2, mask=WINDOW)
    x = torch.randn(1, 24, 24)

    def total():
        with FlopCounterMode(display=False) as counter:
            attention(x, (2, 3, 4))
        return counter.get_total_flops()

    projections = total()
    assert projections == 4 * 2 * 24 * 24 * 24
    flops.register()
    assert total() == projections + 4 * 24 * int(WINDOW.allowed((2, 3, 4)).sum())
