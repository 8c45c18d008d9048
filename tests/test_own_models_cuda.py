"""Models of stattn's own modules on a Hopper GPU, in bf16: accelerate, compile, checkpointing, export by its kernels.

What is right is the same model by the reference in fp32 on a CPU; how near, the reference in bf16 on the GPU says.
"""

import copy
from dataclasses import replace

import pytest
import torch
from rules import check_rule_1
from test_attention_cuda import HOPPER
from tiny_models import CROSS, JOINT, inputs, make
from torch.utils.checkpoint import checkpoint

from stattn import extension, masks
from stattn.accelerate import accelerate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER or not extension.LIBRARY.exists(), reason="no Hopper GPU, or no CUDA library"),
]
MASKS = {"full": masks.full(), "window": masks.window(3, 3, 5)}
SIZE = (4, 24, 32)  # 4 x 6 x 8 tokens


def build(kind):
    """Make a model in bf16 on the GPU, the same in fp32 on the CPU, and their inputs."""
    small = {"joint": replace(JOINT, masked_input=False), "cross": CROSS}[kind]
    config = replace(small, head_dim=64, ffn_dim=256, patch=(1, 4, 4))
    made = make(config).to(torch.bfloat16)
    for parameter in made.parameters():
        if parameter.ndim > 1:  # so wide a model keeps its size through its layers with these
            torch.nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5)
    x, timestep, text = inputs(config, size=SIZE)
    narrow = [x.bfloat16(), timestep, text if config.vocab else text.bfloat16(), torch.tensor([3, 4])]
    wide = [each.float() if each.dtype == torch.bfloat16 else each for each in narrow]
    return copy.deepcopy(made).cuda(), made.float(), [each.cuda() for each in narrow], wide


def both(model, given):
    """Run a model and its backward pass. Returns the output, and the gradients one behind the other."""
    out = model(*given)
    out.square().mean().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return out.detach(), grads


def run_all(kind, mask, change=None):
    """Run a model by its kernels, by the reference on the GPU, and in fp32. change: gives what runs in its place."""
    model, truth, narrow, wide = build(kind)
    with accelerate(model, mask, impl="reference"):
        eager = both(model, narrow)
    accelerate(model, mask)
    accelerate(truth, mask)
    # Gradients under masks are Triton's unless they are asked for by name.
    accelerate(model, impl={"attention": "cuda"})
    found = both(model if change is None else change(model), narrow)
    return found, eager, both(truth, wide), (model, narrow)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["joint", "cross"])
def test_accelerated_models_are_right_in_both_passes(kind, mask):
    (out, grads), (eager, eager_grads), (want, want_grads), _ = run_all(kind, MASKS[mask])
    check_rule_1([out], [eager], [want])
    check_rule_1(grads, eager_grads, want_grads)


@pytest.mark.parametrize("kind", ["joint", "cross"])
def test_a_compiled_model_is_one_graph_and_right_in_both_passes(kind):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        (out, grads), (eager, eager_grads), (want, want_grads), _ = run_all(
            kind, MASKS["window"], lambda model: torch.compile(model, fullgraph=True)
        )
    check_rule_1([out], [eager], [want])
    check_rule_1(grads, eager_grads, want_grads)


def test_activation_checkpointing_repeats_the_forward_pass_bit_by_bit():
    model, _, given, _ = build("joint")
    accelerate(model, MASKS["window"])
    want = both(model, given)
    for block in model.blocks:
        whole = block.forward
        block.forward = lambda *args, whole=whole: checkpoint(whole, *args, use_reentrant=False)
    got = both(model, given)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))


def test_an_exported_model_runs_the_same_kernels(tmp_path):
    model, _, given, _ = build("joint")
    accelerate(model, MASKS["window"])
    with torch.no_grad():
        want = model(*given)
        torch.export.save(torch.export.export(model, tuple(given)), tmp_path / "model.pt2")
        assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(*given), want)
