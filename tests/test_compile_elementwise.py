"""The operations around attention under torch.compile: one graph, the same bits, no recompilation for other sizes."""

import pytest
import torch

from stattn.ops.denoise import denoise_step
from stattn.ops.gate import gate_residual, gate_residual_modulate
from stattn.ops.linear_gelu import linear_gelu
from stattn.ops.modulate import modulate
from stattn.ops.modulate_linear import modulate_linear
from stattn.ops.patchify import patchify3d, unpatchify3d
from stattn.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_
from stattn.ops.qk_norm_rope_means import qk_norm_rope_means
from stattn.rope import rope_tables

TABLES = rope_tables((3, 2, 2), 12)
HEAD = torch.ones(12)
OPERATIONS = {
    "patchify3d": lambda video, tokens, vector, heads: patchify3d(video, torch.ones(5, 3, 1, 2, 2)),
    "unpatchify3d": lambda video, tokens, vector, heads: unpatchify3d(tokens, (3, 2, 2), (1, 2, 2), 6),
    "modulate": lambda video, tokens, vector, heads: modulate(tokens, vector, vector, frames=3),
    "gate_residual": lambda video, tokens, vector, heads: gate_residual(tokens, tokens, vector, frames=3),
    "gate_residual_modulate": lambda video, tokens, vector, heads: gate_residual_modulate(
        tokens, tokens, vector, vector, None, frames=3
    ),
    "qk_norm_rope": lambda video, tokens, vector, heads: qk_norm_rope(
        heads[:, :, 0], heads[:, :, 1], HEAD, HEAD, TABLES
    ),
    "qk_norm_rope_": lambda video, tokens, vector, heads: qk_norm_rope_(heads.clone(), HEAD, HEAD, TABLES),
    "denoise_step": lambda video, tokens, vector, heads: denoise_step(
        video, video, uncond=-video, guidance=3.0, rescale=0.5, sigma=0.4, weights=(1, 0.5), seed=3, noise_weight=0.1
    ),
    "denoise_step from tokens": lambda video, tokens, vector, heads: denoise_step(
        video, tokens[:, :8, :12], patch=(1, 2, 2), sigma=0.4, weights=(1, 0.5), target="velocity"
    ),
    "modulate_linear": lambda video, tokens, vector, heads: modulate_linear(
        tokens, vector, vector, torch.ones(5, 24), frames=3
    ),
    "linear_gelu": lambda video, tokens, vector, heads: linear_gelu(tokens, torch.ones(5, 24), torch.ones(5)),
    "qk_norm_rope_means": lambda video, tokens, vector, heads: qk_norm_rope_means(
        heads[:, :, 0], heads[:, :, 1], HEAD, HEAD, TABLES, k_tile=(2, 1, 2)
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_compiled_call_is_one_graph_and_gives_the_same_bits(name):
    torch.manual_seed(0)
    torch.compiler.reset()
    inputs = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 12, 24), torch.randn(2, 3, 24), torch.randn(2, 12, 3, 2, 12)
    compiled = torch.compile(OPERATIONS[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), OPERATIONS[name](*inputs), rtol=0, atol=0)


# Of tokens [B, N, 24], a vector [B, 24] and a video [B, 3, T, H, W], of which no two sizes are alike at first.
SIZES = {
    "patchify3d": lambda tokens, vector, video: patchify3d(video, torch.ones(5, 3, 1, 2, 2)),
    "modulate": lambda tokens, vector, video: modulate(tokens, vector, vector),
    "gate_residual": lambda tokens, vector, video: gate_residual(tokens, tokens, vector),
    "gate_residual_modulate": lambda tokens, vector, video: gate_residual_modulate(
        tokens, tokens, vector, vector, None
    ),
    "denoise_step": lambda tokens, vector, video: denoise_step(
        video, video, uncond=-video, guidance=3.0, sigma=0.4, weights=(1, 0.5)
    ),
    "modulate_linear": lambda tokens, vector, video: modulate_linear(tokens, vector, vector, torch.ones(5, 24)),
    "linear_gelu": lambda tokens, vector, video: linear_gelu(tokens, torch.ones(5, 24), torch.ones(5)),
}


@pytest.mark.parametrize("name", SIZES)
def test_other_sizes_do_not_recompile(name):
    torch.compiler.reset()
    compiled = torch.compile(SIZES[name], fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens, size in ((12, (7, 4, 6)), (13, (9, 8, 10)), (50, (5, 16, 14))):
            inputs = torch.randn(2, tokens, 24), torch.randn(2, 24), torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(*inputs), SIZES[name](*inputs), rtol=0, atol=0)
