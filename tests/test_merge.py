"""Merging attention over parts of the keys: values, gradients, rows that a part or nobody sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stattn
from stattn import Region, masks

OUT, LSE = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 3)


def parts_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: tuple[int, int, int], mask: masks.Mask, cut: int
):
    """Attention to the frames before a cut, and to the others."""
    frame = shape[1] * shape[2]
    results = []
    for first, last in ((0, cut), (cut, shape[0])):
        region = Region((first, 0, 0), (last - first, *shape[1:]))
        keys = slice(first * frame, last * frame)
        results.append(stattn.attention(q, k[:, keys], v[:, keys], shape, mask, k_region=region, return_lse=True))
    return zip(*results, strict=True)


@pytest.mark.parametrize("mask", [masks.full(), masks.frame_causal(1), masks.window(3, 3, 3), masks.spatial()], ids=str)
@pytest.mark.parametrize("cut", [1, 3])
def test_parts_merge_to_the_whole_with_its_gradients(mask: masks.Mask, cut: int) -> None:
    shape = (4, 4, 5)
    leaves = [torch.randn(2, 80, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    whole = stattn.attention(*leaves, shape, mask, return_lse=True)
    merged = stattn.merge(*parts_of(*leaves, shape, mask, cut))
    weights = [torch.randn_like(x) for x in whole]
    expected, found = (torch.autograd.grad(pair, leaves, weights) for pair in (whole, merged))
    for a, b in zip((*merged, *found), (*whole, *expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_a_row_that_no_part_sees_merges_to_nothing_with_zero_gradients() -> None:
    outs = [torch.zeros(1, 3, 2, 4, requires_grad=True) for _ in range(2)]
    lses = [torch.full((1, 2, 3), -torch.inf) for _ in range(2)]
    lses[0][0, 0, 1] = 0.5  # head 0 of row 1 is seen by the first part
    for lse in lses:
        lse.requires_grad_()
    out, lse = stattn.merge(outs, lses)
    assert lse[0, 0, 1] == 0.5
    assert lse.isneginf().sum() == 5
    assert not out.any()
    grads = torch.autograd.grad(out.sum() + lse[0, 0, 1], (*outs, *lses))
    assert all(each.isfinite().all() for each in grads)
    assert grads[2][0, 0, 1] == 1
    assert sum(each.count_nonzero() for each in grads[2:]) == 1
    assert grads[0][0, 1, 0].eq(1).all()
    assert grads[0].count_nonzero() == 4
    assert not grads[1].any()


def test_merging_keeps_the_type_of_the_outputs_and_adds_in_float32() -> None:
    outs = [torch.randn(1, 5, 2, 4).bfloat16() for _ in range(3)]
    lses = [torch.randn(1, 2, 5) for _ in range(3)]
    out, lse = stattn.merge(outs, lses)
    weights = torch.stack(lses).double().softmax(0).transpose(2, 3)[..., None]
    expected = (torch.stack(outs).double() * weights).sum(0)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert (out.double() - expected).abs().max() <= torch.finfo(torch.bfloat16).eps * expected.abs().max()
    torch.testing.assert_close(lse.double(), torch.stack(lses).double().logsumexp(0))


def test_huge_scores_merge_without_overflow() -> None:
    outs = [torch.full((1, 1, 1, 2), x) for x in (1.0, 3.0)]
    out, lse = stattn.merge(outs, [torch.full((1, 1, 1), 1e5), torch.full((1, 1, 1), 1e5)])
    assert out.flatten().tolist() == [2.0, 2.0]
    assert lse.item() == pytest.approx(1e5 + 0.693147, rel=1e-7)
    out, lse = stattn.merge(outs, [torch.full((1, 1, 1), -1e5), torch.full((1, 1, 1), 1e5)])
    assert out.flatten().tolist() == [3.0, 3.0]
    assert lse.item() == 1e5


@pytest.mark.parametrize(
    "outs, lses, message",
    [
        (OUT, LSE, "outs of type Tensor must be a sequence of tensors"),
        ([OUT], None, "lses of type NoneType must be a sequence of tensors"),
        ([OUT.long()], [LSE], r"outs\[0\] of torch.int64"),
        ([OUT], [LSE.long()], r"lses\[0\] of torch.int64"),
        ([OUT, OUT.double()], [LSE, LSE], r"outs\[1\] has dtype torch.float64, outs\[0\] torch.float32"),
        ([OUT, OUT.to("meta")], [LSE, LSE], r"outs\[1\] is on meta, outs\[0\] on cpu"),
        ([OUT], [LSE.to("meta")], r"lses\[0\] is on meta, outs\[0\] on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parts_of_other_kinds_are_refused(outs: Any, lses: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        stattn.merge(outs, lses)


@pytest.mark.parametrize(
    "outs, lses, message",
    [
        ([], [], "got 0 and 0"),
        ([(1, 3, 2, 4)], [(1, 2, 3), (1, 2, 3)], "got 1 and 2"),
        ([(1, 3, 2, 4), (1, 3, 2, 5)], [(1, 2, 3), (1, 2, 3)], r"outs\[1\] has shape \(1, 3, 2, 5\)"),
        ([(1, 3, 2, 4)], [(1, 3, 2)], r"lses\[0\] has shape \(1, 3, 2\), expected \[B, heads, N\] = \(1, 2, 3\)"),
    ],
)
def test_parts_that_do_not_match_are_refused(
    outs: list[tuple[int, ...]], lses: list[tuple[int, ...]], message: str
) -> None:
    stattn.merge([torch.zeros(1, 3, 2, 4)], [torch.zeros(1, 2, 3)])
    with pytest.raises(ValueError, match=message):
        stattn.merge([torch.zeros(x) for x in outs], [torch.zeros(x) for x in lses])
