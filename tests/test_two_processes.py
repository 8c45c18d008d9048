"""Two processes compute what one does: Ulysses under accelerated transformers, DDP and FSDP2 around our modules."""

import pytest
import torch
import two_processes
from two_processes import loss, samples, ulysses, video_model

pytestmark = pytest.mark.slow
TASKS = [
    ("ulysses", ("wan2.2-ti2v",)),
    ("ulysses", ("ltx",)),
    ("ring", ()),
    ("data_parallel", ()),
    ("sharded", ()),
    ("host", ()),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return two_processes.together(tmp_path_factory.mktemp("processes"), TASKS)


@pytest.mark.parametrize("name", ["wan2.2-ti2v", "ltx"])
def test_ulysses_shares_heads_and_their_masks(found, name):
    out, grads = found[str(("ulysses", (name,)))]
    want, want_grads = ulysses(name)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads, want_grads, atol=1e-4, rtol=1e-4)


def test_ring_attention_is_refused_with_advice(found):
    assert found[str(("ring", ()))] == "ring_degree=2: ring attention knows no masks; use ulysses_degree"


@pytest.mark.parametrize("how", ["data_parallel", "sharded"])
def test_gradients_are_those_of_one_process(found, how):
    model = video_model()
    loss(model, samples()).backward()
    want = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(found[str((how, ()))], want, atol=1e-6, rtol=1e-4)


def test_an_accelerated_transformer_is_sharded_like_any(found):
    torch.testing.assert_close(found[str(("host", ()))], two_processes.host(shard=False), atol=1e-6, rtol=1e-4)
