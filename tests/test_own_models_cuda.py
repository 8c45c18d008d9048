"""Models of stattn's own modules on a Hopper GPU, in bf16: accelerate, compile, checkpointing, export by its kernels.

What is right is the same model by the reference in fp32 on a CPU; how near, the reference in bf16 on the GPU says.
"""

import copy

import pytest
import torch
from rules import check_rule_1
from test_attention_cuda import HOPPER
from torch.utils.checkpoint import checkpoint

from stattn import extension, masks
from stattn.accelerate import accelerate
from stattn.dit import DiT, DiTConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER or not extension.LIBRARY.exists(), reason="no Hopper GPU, or no CUDA library"),
]
MASKS = {"full": masks.full(), "window": masks.window(3, 3, 5)}
SIZE = (3, 4, 24, 32)  # 4 x 6 x 8 tokens


def build(kind):
    """Make a model in bf16 on the GPU, the same in fp32 on the CPU, and their inputs."""
    config = DiTConfig(
        kind=kind,
        layers=2,
        heads=2,
        head_dim=64,
        ffn_dim=256,
        in_channels=3,
        out_channels=3,
        patch=(1, 4, 4),
        text_dim=16,
        text_len=6,
        vocab=10 if kind == "joint" else 0,
        freq_dim=16,
    )
    made = DiT(config).to(torch.bfloat16)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5)
    x = torch.randn(2, *SIZE).bfloat16()
    text = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]) if kind == "joint" else torch.randn(2, 6, 16).bfloat16()
    valid = torch.tensor([3, 4])
    narrow = [each.cuda() for each in (x, torch.tensor([500.0, 300.0]), text, valid)]
    wide = [each.cpu().float() if each.dtype == torch.bfloat16 else each.cpu() for each in narrow]
    return copy.deepcopy(made).cuda(), made.float(), narrow, wide


def both(model, inputs):
    """Run a model and its backward pass. Returns the output, and the gradients one behind the other."""
    out = model(*inputs)
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
    model, _, inputs, _ = build("joint")
    accelerate(model, MASKS["window"])
    want = both(model, inputs)
    for block in model.blocks:
        whole = block.forward
        block.forward = lambda *given, whole=whole: checkpoint(whole, *given, use_reentrant=False)
    got = both(model, inputs)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))


def test_an_exported_model_runs_the_same_kernels(tmp_path):
    model, _, inputs, _ = build("joint")
    accelerate(model, MASKS["window"])
    with torch.no_grad():
        want = model(*inputs)
        torch.export.save(torch.export.export(model, tuple(inputs)), tmp_path / "model.pt2")
        assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(*inputs), want)
