"""Seeds of the fuzzer that run every time; ``python tests/fuzz.py --seeds 0 10000`` runs more."""

from __future__ import annotations

import fuzz
import pytest
import torch

import stattn
from stattn import masks
from stattn.reference import attention as reference

SEEDS = 20


@pytest.mark.parametrize("first", range(0, 200, SEEDS))
def test_random_calls_agree_with_a_dense_softmax(first: int) -> None:
    assert sum(fuzz.check(seed) for seed in range(first, first + SEEDS)) > SEEDS // 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_random_calls_agree_when_they_are_cut_into_small_parts(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reference.CHUNK_BYTES, "cpu", 1 << 12)
    for seed in range(1000, 1030):
        fuzz.check(seed, impl="reference", dtype=dtype)


def test_the_fuzzer_sees_one_key_more_or_less() -> None:
    call = next(
        call for seed in range(100) if (call := fuzz.random_call(seed, torch.float32)) and call.allowed.sum() > 999
    )
    assert fuzz.failure(call) is None
    b, h, row, key = (int(x) for x in call.allowed.nonzero()[500])
    call.allowed[b, h, row, key] = False
    assert (fuzz.failure(call) or "").startswith("out")


def test_the_fuzzer_prints_how_to_repeat_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "failure", lambda call, impl: "out is off")
    repro = "repro: python tests/fuzz.py --seeds 3 4 --impl auto --device cpu"
    with pytest.raises(AssertionError, match=rf"out is off\n(.|\n)*{repro}"):
        fuzz.check(3)


def test_gradients_on_several_threads_are_the_same_every_time() -> None:
    threads = torch.get_num_threads()
    shape, mask = (4, 12, 16), masks.window(3, 5, 7)
    q = torch.randn(1, 768, 4, 16, requires_grad=True)
    k, v = (torch.randn(1, 768, 1, 16, requires_grad=True) for _ in range(2))  # all heads add to the same keys
    dout = torch.randn(1, 768, 4, 16)
    torch.set_num_threads(2)
    try:
        runs = []
        for _ in range(4):
            out = stattn.attention(q, k, v, shape, mask, deterministic=True)
            runs.append(torch.autograd.grad(out, (q, k, v), dout))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
