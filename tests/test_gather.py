"""Gathering in the reference: keys in boxes and in slabs are those gathered one by one, from any strides."""

from __future__ import annotations

import pytest
import torch

import stattn
from stattn import masks
from stattn.grid import Grid
from stattn.masks import Mask
from stattn.reference import gather
from stattn.reference import walk as walking
from stattn.reference.gather import Slab

ONE_BY_ONE = 10**9
MASKS = [
    masks.window(3, 5, 5),
    masks.window(2, 3, 2, dilation=(2, 1, 3)),
    masks.sliding_tile((2, 3, 4), (2, 1, 2)),
    masks.temporal() | masks.window(1, 3, 5),
]


def results(
    tensors: tuple[torch.Tensor, ...], grid: Grid, mask: Mask | list[Mask], valid: torch.Tensor | None
) -> list[torch.Tensor]:
    """Output, LSE and gradients."""
    tensors = tuple(x.detach().requires_grad_() for x in tensors)
    out, lse = stattn.attention(*tensors, grid, mask, valid=valid, return_lse=True, impl="reference")
    total = out.square().sum() + lse.nan_to_num(neginf=0.0).sin().sum()
    return [out, lse, *torch.autograd.grad(total, tensors)]


@pytest.fixture
def slabs(monkeypatch: pytest.MonkeyPatch) -> list[Slab]:
    """Collect the slabs that are made."""
    made: list[Slab] = []

    def make(*parts: object) -> Slab:
        made.append(Slab(*parts))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(gather, "Slab", make)
    return made


def gathering(monkeypatch: pytest.MonkeyPatch, box: int, shared: int = ONE_BY_ONE, slab_bytes: int = 1 << 20) -> None:
    """Set from how many keys on boxes and slabs are used."""
    monkeypatch.setattr(walking, "LEAST_BOX", box)
    monkeypatch.setattr(walking, "_PLANS", walking._Plans(1 << 20))
    monkeypatch.setattr(gather, "LEAST_SHARED", shared)
    monkeypatch.setattr(gather, "SLAB_BYTES", slab_bytes)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("tokens", [(0, 0), (2, 3)], ids=["alone", "with global tokens"])
def test_keys_in_boxes_and_slabs_are_those_gathered_one_by_one(
    mask: Mask, key_heads: int, tokens: tuple[int, int], slabs: list[Slab], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(5, 6, 8, *tokens)
    fused = torch.randn(2, grid.tokens, 4 + 2 * key_heads, 8, dtype=torch.float64)
    tensors = fused.split([4, key_heads, key_heads], dim=2)
    valid = torch.tensor([[True] * 5, [False, True, False, False, True]]) if grid.globals else None
    for which in (mask, [masks.spatial(), mask, masks.full(), mask]):
        gathering(monkeypatch, ONE_BY_ONE)
        want = results(tensors, grid, which, valid)
        for choice in ({"box": 1}, {"box": 1, "shared": 1}, {"box": 1, "shared": 1, "slab_bytes": 1}):
            slabs.clear()
            gathering(monkeypatch, **choice)
            for a, b in zip(results(tensors, grid, which, valid), want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            if which is not mask or mask is not MASKS[-1]:  # a union alone has tiles of several boxes
                assert bool(slabs) == ("shared" in choice and not grid.globals)


def test_tiles_share_slabs_and_small_slabs_hold_fewer(slabs: list[Slab], monkeypatch: pytest.MonkeyPatch) -> None:
    grid, mask = Grid(9, 6, 8), masks.window(3, 3, 3)
    tensors = tuple(torch.randn(1, grid.tokens, 2, 8) for _ in range(3))
    counts = []
    for slab_bytes in (1 << 20, 1 << 13, 1):
        slabs.clear()
        gathering(monkeypatch, 1, 1, slab_bytes)
        stattn.attention(*tensors, grid, mask)
        counts.append(len(slabs))
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [1, 3], [2]])
def test_rows_of_strided_tensors_are_taken_as_those_of_whole_ones(heads: list[int]) -> None:
    fused = torch.randn(3, 20, 3, 4, 5)
    batch, rows, chosen = torch.tensor([0, 2]), torch.tensor([[3, 9, 1], [7, 7, 0]]), torch.tensor(heads)
    want = fused[:, :, 1].contiguous()[batch][:, rows][..., chosen, :].flatten(0, 1).transpose(1, 2)
    assert torch.equal(gather.take(fused[:, :, 1], batch, rows, chosen), want)
    assert torch.equal(gather.take(fused[:, :, 1].contiguous(), batch, rows, chosen), want)
