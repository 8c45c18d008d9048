"""stattn as an attention backend of diffusers: dense, chosen for one model, and no default of another."""

import pickle

import pytest
import torch
from hosts import LTX, WAN, ltx, model, run, wan, wan_image

from stattn.integrations import diffusers_backend

pytest.importorskip("diffusers")
GRID = (3, 4, 6)


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of attention by their numbers of queries and keys."""
    found, attention = [], diffusers_backend.attention

    def counting(q, k, *rest, **options):
        found.append((q.shape[1], k.shape[1]))
        return attention(q, k, *rest, **options)

    monkeypatch.setattr(diffusers_backend, "attention", counting)
    return found


def test_one_model_uses_it_for_self_and_cross_attention_and_no_other(calls):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    active = _AttentionBackendRegistry.get_active_backend()
    tiny, other = (model("WanTransformer3DModel", **WAN, image_dim=8, added_kv_proj_dim=24) for _ in range(2))
    call = wan_image(GRID, 1)
    before = run(tiny, call), run(other, call)
    diffusers_backend.use(tiny)
    torch.testing.assert_close(run(tiny, call), before[0], atol=1e-5, rtol=1e-5)
    assert calls == [(72, 72), (72, 5), (72, 512)] * 2
    assert torch.equal(run(other, call), before[1])
    assert len(calls) == 6
    tiny.reset_attention_backend()
    assert torch.equal(run(tiny, call), before[0])
    assert _AttentionBackendRegistry.get_active_backend() == active


def test_diffusers_finds_it_by_name(calls):
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    assert diffusers_backend.register() is diffusers_backend.register() is AttentionBackendName("stattn")
    assert AttentionBackendName.__members__["STATTN"].value == AttentionBackendName.STATTN == "stattn"
    assert pickle.loads(pickle.dumps(AttentionBackendName.STATTN)) is AttentionBackendName.STATTN
    tiny, call = model("WanTransformer3DModel", **WAN), wan(GRID, 1)
    before = run(tiny, call)
    with attention_backend("stattn"):
        torch.testing.assert_close(run(tiny, call), before, atol=1e-5, rtol=1e-5)
    assert len(calls) == 4
    tiny.blocks[0].attn1.set_attention_backend("stattn")
    run(tiny, call)
    assert len(calls) == 5


def test_it_compiles_without_graph_breaks():
    tiny, call = model("WanTransformer3DModel", **{**WAN, "num_layers": 1}), wan(GRID, 1)
    diffusers_backend.use(tiny)
    want = run(tiny, call)
    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(tiny, fullgraph=True, backend="eager"), call), want)


def test_what_is_not_dense_is_refused_by_name():
    transformer = model("LTXVideoTransformer3DModel", **LTX)
    diffusers_backend.use(transformer)
    with pytest.raises(ValueError, match=r"attn_mask of shape \(1, 2, 1, 8\)"):
        run(transformer, ltx(GRID, 1))
    run(transformer, ltx(GRID, 1) | {"encoder_attention_mask": None})
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="is_causal=True"):
        diffusers_backend._attend(q, q, q, is_causal=True)
    with pytest.raises(ValueError, match="key has 1 heads, query 2"):
        diffusers_backend._attend(q, q[:, :, :1], q[:, :, :1])
    with pytest.raises(TypeError, match="Linear has no attention"):
        diffusers_backend.use(torch.nn.Linear(1, 1))
