"""The attention benchmark's own parts, at small sizes: what it compares with, what it compares, and what it records."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import stattn
from stattn import masks, results
from stattn.blocks import BlockList, block_list
from stattn.grid import Grid
from stattn.reports.report import SHAPES

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import attention_peers as peers
from attention_cases import CASES, Case
from attention_truth import Truth, WrongResult
from bench_attention import Field, lines

GRID, TILE = Grid(4, 4, 6), (2, 2, 3)
TILES = masks.sliding_tile(TILE, (1, 2, 2))
WINDOW = masks.window(3, 2, 5)


def lists(device: str) -> BlockList:
    kinds = torch.from_numpy(TILES.tiles(GRID, TILE, TILE)).to(device)
    return block_list(GRID.shape, TILE, TILE, kinds[None, None], most=4)


def drawn(grid: Grid, heads: int = 2, dim: int = 16) -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, grid.tokens, heads, dim) for _ in range(3))


def report() -> results.Report:
    return results.new_report("python -m pytest benchmarks", "cpu", limits=False)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "compiled", lambda function: function)


@pytest.mark.parametrize(
    "grid, mask",
    [
        (GRID, masks.full()),
        (GRID, WINDOW),
        (GRID, masks.spatial() | masks.temporal()),
        (Grid(4, 4, 6, before=2, after=3), WINDOW),
        (GRID, lists("cpu")),
    ],
    ids=["full", "window", "union", "text", "lists"],
)
def test_the_truth_agrees_with_the_reference_and_sees_one_key_too_many(grid: Grid, mask: Any) -> None:
    qkv = tuple(x.requires_grad_() for x in drawn(grid))
    out = stattn.attention(*qkv, grid, mask, impl="reference")
    dout = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, qkv, dout)
    truth = Truth(qkv, grid, mask, dout)
    truth.check_output(out)
    truth.check_gradients(dq, dk, dv)
    with pytest.raises(WrongResult, match="head 0"):
        truth.check_output(out.roll(1, 1))
    for name, wrong in (("dQ", (dk, dk, dv)), ("dK", (dq, dv, dv)), ("dV", (dq, dk, dv.roll(1, 1)))):
        with pytest.raises(WrongResult, match=name):
            truth.check_gradients(*wrong)
    with pytest.raises(WrongResult):
        truth.check_output(torch.full_like(out, torch.nan))


def test_the_truth_takes_queries_of_the_last_frames() -> None:
    q, k, v = drawn(GRID)
    region = stattn.Region((2, 0, 0), (2, 4, 6))
    mask = masks.frame_causal(2)
    out = stattn.attention(q[:, -48:], k, v, GRID, mask, q_region=region, impl="reference")
    Truth((q[:, -48:], k, v), GRID, mask).check_output(out)


@pytest.mark.parametrize("heads_first", [True, False])
def test_tile_order_and_back_is_the_identity(heads_first: bool) -> None:
    x = drawn(GRID)[0]
    tiled = peers.to_tiles(x, GRID, TILE, heads_first)
    order = stattn.blocks.tile_of(GRID, TILE).argsort(stable=True)
    assert torch.equal(tiled.transpose(1, 2) if heads_first else tiled, x[:, order])
    assert torch.equal(peers.from_tiles(tiled, GRID, TILE, heads_first), x)


PEERS: dict[str, tuple[Any, peers.Make]] = {
    "dense": (masks.full(), peers.sdpa),
    "spatial": (masks.spatial(), partial(peers.sdpa, there=peers.frames, back=peers.from_frames)),
    "temporal": (masks.temporal(), partial(peers.sdpa, there=peers.places, back=peers.from_places)),
    "temporal, copied": (
        masks.temporal(),
        partial(peers.sdpa, there=peers.places, back=peers.from_places, copies=True),
    ),
    "flex": (masks.full(), peers.flex),
    "flex window": (WINDOW, partial(peers.flex_window, size=(3, 2, 5), device="cpu")),
    "flex tiles": (TILES, partial(peers.flex_tiles, tile=TILE, device="cpu")),
}


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_computes_its_case(name: str, eager: None) -> None:
    mask, make = PEERS[name]
    qkv = drawn(GRID)
    peer = make(GRID, mask)
    Truth(qkv, GRID, mask).check_output(peer.forward(*qkv))
    for call in peer.parts.values():
        call(*qkv)


def test_lists_become_a_block_mask_of_the_same_tiles() -> None:
    blocks = lists("cpu")
    made = peers._block_mask(blocks, 12, GRID.video, backward=False)
    assert made.BLOCK_SIZE == (12, 12)
    assert torch.equal(made.to_dense()[0, 0], (blocks.kinds()[0, 0] != 0).int())
    assert not made.kv_num_blocks.any()


def test_a_case_records_what_is_right_names_what_is_not_and_says_what_is_missing() -> None:
    def absent(grid: Grid, mask: Any) -> peers.Peer:
        raise ImportError("No module named 'absent'")

    def wrong(grid: Grid, mask: Any) -> peers.Peer:
        return peers.Peer(lambda q, k, v: v)

    def refusing(grid: Grid, mask: Any) -> peers.Peer:
        return peers.Peer(lambda q, k, v: torch.empty(2) + torch.empty(3))

    def right(grid: Grid, mask: Any) -> peers.Peer:
        return peers.Peer(peers.sdpa(grid, mask).forward, {"plan": lambda q, k, v: None})

    found = report()
    others = {"right": right, "absent": absent, "wrong": wrong, "refusing": refusing}
    case = Case("dense", "tiny", GRID, 2, 16, masks.full(), others, {"": "right"}, rounds=2, backward=True)
    for backward in (False, True):
        field = Field(case, found, "cpu", backward)
        field.enter_ours(("sdpa",))
        field.enter_peers()
        field.measure()
        assert len(field.wrong) == 1
        assert field.wrong[0].startswith("wrong is wrong: ")
    names = [each.name for each in found.results]
    forward = ["attention/sdpa/dense_fwd/tiny", "attention/right/dense_fwd/tiny", "attention/right/dense_fwd_plan/tiny"]
    assert names == [*forward, "attention/sdpa/dense_bwd/tiny", "attention/right/dense_bwd/tiny"]
    assert found.results[0].baseline is not None
    assert found.results[0].baseline.name == "attention/right/dense_fwd/tiny"
    assert [each.baseline for each in found.results[1:3]] == [None, None]
    said = {name: said for name, said in found.versions.items() if name.endswith("dense_fwd/tiny")}
    assert [name.split()[0] for name in said] == ["absent", "wrong", "refusing"]
    assert "not measured" in said["absent at dense_fwd/tiny"]
    results.validate(asdict(found))
    printed = "\n".join(lines(found))
    assert "x its forward" in printed
    assert "absent at dense_fwd/tiny: not measured" in printed


def test_text_in_the_same_launch_is_compared_with_the_launch_without() -> None:
    found = report()
    case = Case("joint", "tiny", Grid(3, 4, 5, after=7), 2, 16, masks.window(3, 3, 3), backward=True, without_text=True)
    for backward in (False, True):
        field = Field(case, found, "cpu", backward)
        field.enter_ours(("reference",))
        field.measure()
    with_baseline = {each.name: each.baseline.name for each in found.results if each.baseline}
    assert with_baseline == {
        "attention/reference/joint/tiny": "attention/reference/joint_without_text/tiny",
        "attention/reference/joint_bwd/tiny": "attention/reference/joint_without_text_bwd/tiny",
    }


def test_no_two_rows_have_the_same_name() -> None:
    names = [f"{case.label(backward)}/{case.shape}" for case in CASES for backward in (False, True)]
    assert len(set(names)) == len(names)
    assert all(set(case.baselines.values()) <= set(case.peers) for case in CASES)


def test_the_report_knows_the_shapes_of_the_cases_by_their_names() -> None:
    cases = {(case.shape, case.grid.shape, case.heads, case.dim) for case in CASES if case.shape in SHAPES}
    assert cases == {(name, grid.shape, heads, dim) for name, (grid, heads, dim) in SHAPES.items()}
