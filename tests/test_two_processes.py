"""Processes compute together what one does: Ulysses and rings of transformers, DDP and FSDP2 of our modules."""

import pytest
import torch
import two_processes
from two_processes import context_parallel, loss, samples, video_model

pytestmark = pytest.mark.slow
CONTEXT_PARALLEL = [(name, how) for name in ("wan2.2-ti2v", "ltx") for how in ("ulysses", "ring")]
TASKS = [
    *(("context_parallel", each) for each in CONTEXT_PARALLEL),
    ("refused", ()),
    ("data_parallel", ()),
    ("sharded", ()),
    ("host", ()),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return two_processes.together(tmp_path_factory.mktemp("processes"), TASKS)


@pytest.mark.parametrize("name, how", CONTEXT_PARALLEL)
def test_processes_share_tokens_heads_and_their_masks(found, name, how):
    out, grads = found[str(("context_parallel", (name, how)))]
    want, want_grads = context_parallel(name, how)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads, want_grads, atol=1e-4, rtol=1e-4)


def test_rings_and_ulysses_work_together(tmp_path):
    task = ("context_parallel", ("wan2.2-ti2v", "both"))
    out, grads = two_processes.together(tmp_path, [task], size=4)[str(task)]
    want, want_grads = context_parallel("wan2.2-ti2v", "both")
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads, want_grads, atol=1e-4, rtol=1e-4)


def test_uneven_shares_are_refused(found):
    assert found[str(("refused", ()))] == [
        f"{how}=True is not served; use tokens and heads that the processes divide evenly"
        for how in ("ring_anything", "ulysses_anything")
    ]


@pytest.mark.parametrize("how", ["data_parallel", "sharded"])
def test_gradients_are_those_of_one_process(found, how):
    model = video_model()
    loss(model, samples()).backward()
    want = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(found[str((how, ()))], want, atol=1e-6, rtol=1e-4)


def test_an_accelerated_transformer_is_sharded_like_any(found):
    torch.testing.assert_close(found[str(("host", ()))], two_processes.host(shard=False), atol=1e-6, rtol=1e-4)
