"""The kernel as the Hub serves it, on the machine at hand; the project's own tests are where it is proved."""

import pytest
import torch
import torch.nn.functional as F

import stattn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
GRID = (3, 5, 7)


@pytest.mark.parametrize("mask", [stattn.masks.full(), stattn.masks.window(1, 3, 3), stattn.masks.frame_causal(1)])
def test_attention_and_its_gradients_are_pytorchs_under_the_same_mask(mask):
    q, k, v = (torch.randn(2, 105, 2, 64, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in range(3))
    out = stattn.attention(q, k, v, GRID, mask)
    allowed = mask.allowed(GRID).to(DEVICE)
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=allowed).transpose(1, 2)
    torch.testing.assert_close(out, want, atol=1e-2, rtol=1e-2)
    found, right = (torch.autograd.grad(each.square().sum(), (q, k, v)) for each in (out, want))
    torch.testing.assert_close(found, right, atol=3e-2, rtol=3e-2)


def test_layers_hold_no_state():
    layer = torch.nn.Module()
    layer.mask = "window(1, 3, 3)"
    q = torch.randn(1, 105, 2, 64, device=DEVICE, dtype=DTYPE)
    out = stattn.layers.SpaceTimeAttention.forward(layer, q, q, q, GRID)
    assert torch.equal(out, stattn.attention(q, q, q, GRID, stattn.masks.window(1, 3, 3)))
