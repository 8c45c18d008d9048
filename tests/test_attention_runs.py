"""The kernels of runs under Triton's interpreter: which calls take them, that they see what they should, and numbers.

On a GPU ``test_attention_proof.py`` runs them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import fuzz
import pytest
import torch
from probes import Case, check
from test_attention import draw
from test_attention_kernels import VALID, check_guards, check_numbers, gradients, same

from stattn import masks
from stattn.blocks import lower
from stattn.grid import Grid, Region
from stattn.kernels import attention as general
from stattn.kernels import attention_bwd as general_bwd
from stattn.kernels import attention_runs as kernels
from stattn.kernels.attention import Config

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are made for the GPU here; tests/test_attention_proof.py runs them on it"
)
HALF = torch.float16


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Small tiles, taken wherever they serve. Gives the kernels that ran."""
    small = (Config(16, 16, 4, 2, (16, 64), 2, 100.0),)
    for name in ("CONFIGS", "DQ_CONFIGS", "DKDV_CONFIGS"):
        monkeypatch.setattr(kernels, name, small)
    ran: list[str] = []

    class Noted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, launch: Any) -> Any:
            ran.append(self.name)
            return self.kernel[launch]

    for module in (kernels, general, general_bwd):
        for name in vars(module):
            if name.startswith("attention_") and hasattr(getattr(module, name), "arg_names"):
                monkeypatch.setattr(module, name, Noted(name, getattr(module, name)))
    return ran


FORWARD = ["attention_runs_forward"]
ALL = [*FORWARD, "attention_runs_stats", "attention_runs_dq", "attention_runs_dkdv"]


def options(**given: Any) -> dict[str, Any]:
    return {"heads": 1, "options": given}


CASES: dict[str, tuple[Case, dict[str, Any]]] = {
    "full": (Case(Grid(2, 3, 7), masks.full()), {"batch": 2}),
    "spatial": (Case(Grid(3, 4, 5), masks.spatial()), {}),
    "frame causal": (Case(Grid(4, 3, 5), masks.frame_causal(2, 3, 1), heads=1), {}),
    "chunks in parts": (Case(Grid(5, 3, 5), masks.frame_causal(1, 2, 1), heads=1), {}),
    "windows of frames": (Case(Grid(4, 3, 5), masks.window(3, None, None), heads=1), {}),
    "windows of lines": (Case(Grid(3, 4, 5), masks.window(3, 3, None), heads=1), {}),
    "grouped": (Case(Grid(2, 3, 7), masks.full(), heads=4), {"key_heads": 2}),
    "globals": (Case(Grid(2, 3, 5, 2, 19), masks.spatial(), heads=1), {}),
    "globals alone": (Case(Grid(2, 3, 5, 2, 3), masks.frame_causal(1), **options(globals_see="globals")), {}),
    "keys only globals": (Case(Grid(2, 3, 5, 2, 3), masks.frame_causal(1), heads=1, q_globals=False), {}),
    "globals, one side": (Case(Grid(2, 3, 5, 0, 4), masks.full(), heads=1), {"dim": 64}),
    "regions": (
        Case(
            Grid(4, 3, 5),
            masks.full(),
            **options(k_region=Region((1, 1, 1), (2, 2, 3)), q_region=Region((0, 1, 2), (3, 2, 3))),
        ),
        {},
    ),
    "scale 0": (Case(Grid(2, 3, 4), masks.full(), **options(scale=0.0)), {}),
    "negative scale": (Case(Grid(2, 3, 4), masks.spatial(), **options(scale=-0.3)), {}),
    "empty rows": (Case(Grid(4, 2, 4), masks.tables(t=([4, 0, 0, 2], [3, 1, 3, 2])), heads=1), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_within_rule_1(name: str, taken: list[str]) -> None:
    case, given = CASES[name]
    check_numbers(case, **(given | {"dtype": HALF}))
    assert taken == ALL


def test_random_calls_agree_with_a_dense_softmax(monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    large = (Config(64, 64, 4, 2, (16,), 2, 100.0),)  # few tiles are quick to interpret
    for name in ("CONFIGS", "DQ_CONFIGS", "DKDV_CONFIGS"):
        monkeypatch.setattr(kernels, name, large)
    for seed in range(5):
        assert fuzz.check(seed, "triton", dims=(16,), runs=True)
    assert taken == ALL * 5


@pytest.mark.parametrize("name", ["frame causal", "globals", "globals alone", "keys only globals", "empty rows"])
def test_what_is_seen_is_what_the_mask_allows(name: str, taken: list[str]) -> None:
    check(CASES[name][0], impl="triton", dtype=HALF, dim=64)
    assert set(taken) == set(ALL)


def test_nothing_outside_the_tensors_is_read_or_written(taken: list[str]) -> None:
    check_guards(dim=64, given_dtype=HALF, runs=masks.full())
    assert ALL[0] in taken
    assert ALL[3] in taken


def test_a_run_is_all_that_is_read(taken: list[str]) -> None:
    """Keys and values of a frame that no query of a part sees may be anything."""
    grid, whole = Grid(3, 4, 5), masks.spatial()
    q, k, v = draw(1, 60, 1, 16, dtype=HALF)
    q = q[:, 20:40]
    dout = torch.randn_like(q)
    for x in (k, v):
        x[:, :20], x[:, 40:] = torch.nan, torch.inf
    given = {"q_region": Region((1, 0, 0), (1, 4, 5))}
    found = gradients((q, k, v), dout, None, grid, whole, **given)[:3]
    want = gradients((q, k[:, 20:40], v[:, 20:40]), dout, None, (1, 4, 5), masks.full())[:3]
    assert all(bool(x.isfinite().all()) for x in found)
    assert same(found, want)
    assert taken == ALL * 2


def test_a_sample_depends_on_nothing_but_itself_bitwise() -> None:
    grid = Grid(3, 3, 5, 0, 2)
    tensors = draw(2, grid.tokens, 1, 16, dtype=HALF)
    dout = torch.randn_like(tensors[0])
    together = gradients(tensors, dout, None, grid, masks.frame_causal(1))
    for one in (slice(0, 1), slice(1, 2)):
        alone = gradients(tuple(x[one] for x in tensors), dout[one], None, grid, masks.frame_causal(1))
        assert same(alone, [x[one] for x in together])


def test_a_gradient_that_tensor_copies_do_not_read_is_copied_for_them(taken: list[str]) -> None:
    """That of a sum is one number; others lie at odd strides, or begin at an odd address."""
    tensors = draw(1, 24, 2, 16, dtype=HALF)
    dout = torch.randn(1, 24, 2, 16, dtype=HALF)
    odd, shifted = torch.zeros(1, 24, 2, 19, dtype=HALF)[..., :16], torch.zeros(24 * 32 + 1, dtype=HALF)[1:]
    number = torch.full((), 0.5, dtype=HALF).expand(1, 24, 2, 16)
    heads = dout[:, :, :1].expand(-1, -1, 2, -1)
    for given in (number, heads, dout, odd.copy_(dout), shifted.view(1, 24, 2, 16).copy_(dout)):
        found = gradients(tensors, given, None, (2, 3, 4))
        assert taken == ALL
        taken.clear()
        assert same(found, gradients(tensors, given.clone(memory_format=torch.contiguous_format), None, (2, 3, 4)))
        taken.clear()


def test_a_gradient_of_the_lse_alone_is_left_to_other_kernels(taken: list[str]) -> None:
    tensors = draw(1, 24, 1, 16, dtype=HALF)
    found = gradients(tensors, None, torch.randn(1, 1, 24), (2, 3, 4))
    assert taken[0] == "attention_runs_forward"
    assert "attention_dkdv" in taken
    assert (found[4] == 0).all()


def forward(tensors: tuple[torch.Tensor, ...], grid: Any, mask: Any, **given: Any) -> None:
    import stattn

    stattn.attention(*tensors, grid, mask, impl="triton", **given)


def test_calls_that_are_not_served_take_other_kernels(taken: list[str]) -> None:
    grid, text = Grid(2, 3, 4), Grid(2, 3, 4, 3, 2)
    fit = draw(1, 24, 2, 16, dtype=HALF)
    odd = torch.zeros(1, 24, 2, 19, dtype=HALF)[..., :16]
    shifted = torch.zeros(24 * 2 * 16 + 1, dtype=HALF)[1:].view(1, 24, 2, 16)
    lists = lower(masks.full(), grid.shape, (1, 3, 4), (1, 3, 4))
    forward(fit, grid, masks.full())
    assert taken == FORWARD
    taken.clear()
    for tensors, where, mask, given in (
        (fit, grid, masks.temporal(), {}),
        (fit, grid, masks.window(1, 3, 3), {}),
        (fit, grid, masks.temporal() | masks.spatial(), {}),
        (fit, grid, [masks.full(), masks.spatial()], {}),
        (fit, grid, dataclasses.replace(lists), {}),
        ((fit[0], odd, fit[2]), grid, masks.full(), {}),
        ((shifted, *fit[1:]), grid, masks.full(), {}),
        ((fit[0], fit[1][:, :, :1].expand(-1, -1, 2, -1), fit[2]), grid, masks.full(), {}),
        (draw(1, 24, 2, 16), grid, masks.full(), {}),
        (draw(1, 24, 2, 32, dtype=HALF), grid, masks.full(), {}),
        (draw(1, 29, 2, 16, dtype=HALF), text, masks.full(), {"valid": VALID[None]}),
        (fit, grid, masks.full(), {"k_frames": torch.tensor([1, 0], dtype=torch.int32)}),
    ):
        forward(tensors, where, mask, **given)
        assert taken == ["attention_forward"], mask
        taken.clear()


def test_runs_are_taken_only_where_they_cost_less(monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    monkeypatch.setattr(kernels, "CONFIGS", (Config(64, 64, 4, 2, (16,), 2, 1.0),))
    monkeypatch.setattr(general, "CONFIGS", (Config(16, 16, 4, 2, (16,), 2, 0.2),))
    tensors = draw(1, 64, 1, 16, dtype=HALF)
    forward(tensors, (1, 8, 8), masks.full())
    forward(tensors, (16, 2, 2), masks.spatial())  # frames of 4 tokens, of which a tile of 64 rows is too much
    assert taken == ["attention_runs_forward", "attention_forward"]
