"""Block lists by the CUDA kernels: how tiles are cut, what partial tiles allow, and on a Hopper GPU their results."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from probes import Case
from test_attention_cuda import gpu

import stattn
from stattn import masks
from stattn.blocks import BlockList, block_list, lower, tile_count
from stattn.grid import Grid, Region, Triple
from stattn.masks import EMPTY, FULL, PARTIAL, Mask
from stattn.ops import _cuda_lists
from stattn.problem import Problem

TILES: list[tuple[Triple, Triple, Triple]] = [
    ((8, 12, 16), (2, 4, 8), (2, 4, 8)),
    ((5, 6, 7), (2, 3, 4), (3, 2, 4)),
    ((8, 12, 16), (4, 8, 8), (2, 4, 8)),
    ((8, 12, 16), (4, 8, 12), (6, 8, 8)),
    ((7, 9, 20), (3, 5, 8), (3, 5, 8)),
    ((5, 13, 11), (6, 8, 8), (2, 4, 8)),
    ((1, 1, 700), (1, 1, 64), (1, 1, 128)),
]


def problem(lists: BlockList, grid: Grid | None = None) -> Problem:
    box = Region((0, 0, 0), lists.shape)
    found = () if lists.mask is None else (lists.mask,)
    grid = grid or Grid(*lists.shape)
    return Problem(grid, found, box, box, True, "all", 0.1, lists.q_tile, lists.k_tile)


def union(shape: Triple) -> Mask:
    return masks.window(*(min(3, n) for n in shape)) | masks.temporal() | masks.spatial()


def drawn(
    shape: Triple, q_tile: Triple, k_tile: Triple, mask: Mask | None, sets: tuple[int, int] = (1, 1)
) -> BlockList:
    """Lists with entries of all kinds, in no order, and rubbish behind their ends."""
    generator = torch.Generator().manual_seed(len(q_tile) + shape[2])
    sizes = (*sets, tile_count(shape, q_tile), tile_count(shape, k_tile))
    kinds = torch.tensor([EMPTY, PARTIAL, FULL], dtype=torch.int8)[torch.randint(3, sizes, generator=generator)]
    lists = block_list(shape, q_tile, k_tile, kinds if mask else torch.where(kinds == FULL, kinds, EMPTY), mask)
    back = (lists.count[..., None] - 1 - torch.arange(lists.index.shape[-1])).clamp(min=-1)
    index = torch.where(back >= 0, lists.index.gather(-1, back.clamp(min=0)), 7)
    partial = None if lists.partial is None else (back < 0) | lists.partial.gather(-1, back.clamp(min=0))
    return BlockList(shape, q_tile, k_tile, lists.count, index.to(torch.int32), partial, mask)


def on(lists: BlockList, device: str) -> BlockList:
    partial = None if lists.partial is None else lists.partial.to(device)
    shapes = lists.shape, lists.q_tile, lists.k_tile
    return BlockList(*shapes, lists.count.to(device), lists.index.to(device), partial, lists.mask)


# What is planned.


def walk(lists: BlockList) -> np.ndarray:
    """Count, as the kernel walks lists, how often each query takes part with each key."""
    given = problem(lists)
    cut = _cuda_lists.layout(given)
    integers, triples, k_tiles = cut.integers.tolist(), cut.triples, cut.k_tiles
    shape, q_tile, k_tile, slab, box = (np.array(integers[i : i + 3]) for i in (0, 3, 6, 9, 12))
    stacked = integers[15]
    table = _cuda_lists.tables(given)
    words = table[: table.size // 2 * 2].view(np.uint64)
    counts = -(-shape // q_tile), -(-shape // k_tile)
    assert k_tiles == counts[1].prod()
    kinds = lists.kinds()[0, 0].numpy()
    rows, columns = (np.stack(np.unravel_index(np.arange(e.prod()), tuple(e)), 1) for e in (slab, box))
    parts = k_tile // box
    slabs, together = (shape + slab - 1) // slab, np.where(np.arange(3) == stacked, 3, 1)
    blocks = (slabs + together - 1) // together
    assert triples == blocks.prod()
    seen = np.zeros((shape.prod(), shape.prod()), np.int64)
    for triple in range(triples):
        for group in range(3):
            corner = np.array(np.unravel_index(triple, tuple(blocks))) * slab
            corner[stacked] = corner[stacked] * 3 + group * slab[stacked]
            if (corner >= shape).any():
                continue
            place = corner + rows
            real = (place < shape).all(1)
            query = np.ravel_multi_index(tuple(np.minimum(place, shape - 1).T), tuple(shape))
            q = np.ravel_multi_index(tuple(corner // q_tile), tuple(counts[0]))
            for k in np.flatnonzero(kinds[q]):
                tile = np.array(np.unravel_index(k, tuple(counts[1])))
                short = box.prod() < 64 or ((tile + 1) * k_tile > shape).any()
                for part in np.ndindex(tuple(parts)):
                    first = tile * k_tile + np.array(part) * box
                    allowed = np.zeros((len(rows), 64), bool)
                    partial = kinds[q, k] == PARTIAL
                    if not partial and not short:
                        allowed[:] = True
                    else:
                        for product in range(1, integers[16] + 1) if partial else (0,):
                            start, step = table[8 * product : 8 * product + 8].reshape(2, 4)
                            bits = np.full(len(rows), ~np.uint64(0))
                            for axis in range(3):
                                at = np.minimum(place[:, axis], shape[axis] - 1) * step[axis] + start[axis]
                                bits &= words[at + tile[axis] * parts[axis] + part[axis]]
                            allowed |= (bits[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).astype(bool)
                    key = first + columns
                    inside = (key < shape).all(1)
                    assert not allowed[:, len(key) :].any()
                    assert not allowed[:, : len(key)][:, ~inside].any()
                    key = np.ravel_multi_index(tuple(key[inside].T), tuple(shape))
                    seen[query[real][:, None], key] += allowed[real][:, : len(inside)][:, inside]
    return seen


@pytest.mark.parametrize("shape, q_tile, k_tile", TILES)
def test_slabs_boxes_and_masks_make_up_what_lists_allow(shape: Triple, q_tile: Triple, k_tile: Triple) -> None:
    for lists in (
        drawn(shape, q_tile, k_tile, None),
        drawn(shape, q_tile, k_tile, union(shape)),
        lower(masks.window(*(min(3, n) for n in shape)), shape, q_tile, k_tile),
    ):
        assert _cuda_lists.why_not(problem(lists)) is None
        assert (walk(lists) == lists.allowed().numpy()).all()


def test_slabs_that_share_a_tile_are_computed_together() -> None:
    shape = (30, 48, 80)
    assert _cuda_lists.part_of((6, 8, 8)) == (1, 8, 8)
    assert _cuda_lists.part_of((3, 5, 8)) == (3, 5, 4)
    whole = lower(masks.full(), shape, (6, 8, 8), (6, 8, 8))
    assert _cuda_lists.layout(problem(whole)).integers[15] == 0  # six slabs of a tile lie behind one another in time
    small = lower(masks.full(), shape, (2, 4, 8), (6, 8, 8))
    assert _cuda_lists.layout(problem(small)).integers[15] == 0


@pytest.mark.parametrize(
    "lists, grid, words",
    [
        (lower(masks.full(), (1, 1, 134), (1, 1, 67), (1, 1, 64)), None, "query tiles of .* do not divide into equal"),
        (lower(masks.full(), (1, 1, 134), (1, 1, 64), (1, 1, 67)), None, "key tiles of .* do not divide into equal"),
        (
            lower(masks.full(), (1, 1, 134), (1, 1, 64), (1, 1, 64)),
            Grid(1, 1, 134, 0, 2),
            "does not serve global tokens",
        ),
    ],
)
def test_lists_that_the_kernels_do_not_walk_are_refused_by_name(
    lists: BlockList, grid: Grid | None, words: str
) -> None:
    assert (_cuda_lists.why_not(problem(lists, grid)) or "").startswith(words.split(".*")[0])


def test_too_many_tiles_and_too_large_tables_are_refused_by_name() -> None:
    shape, box = (1, 1, 40_000), Region((0, 0, 0), (1, 1, 40_000))
    tiny = Problem(Grid(*shape), (), box, box, True, "all", 0.1, (1, 1, 64), (1, 1, 1))
    assert _cuda_lists.why_not(tiny) == "block lists of 40000 key tiles, more than 32768"
    window = Problem(Grid(*shape), (masks.window(1, 1, 99),), box, box, True, "all", 0.1, (1, 1, 64), (1, 1, 64))
    assert (_cuda_lists.why_not(window) or "").startswith("partial tiles of mask window(")


# Results.


class TestOnHopper:
    pytestmark = gpu

    def check(self, lists: BlockList, heads: int, batch: int, dim: int, dtype: torch.dtype) -> None:
        """Compare with float64 attention over the table of allowed pairs, within twice eager's error."""
        q, k, v = torch.randn(3, batch, math.prod(lists.shape), heads, dim, device="cuda", dtype=dtype).unbind()
        out, lse = stattn.attention(q, k, v, lists.shape, on(lists, "cuda"), return_lse=True, impl="cuda")
        for sample in range(batch):
            for head in range(heads):
                seen = lists.allowed(sample, head).cuda()
                qh, kh, vh = (x[sample, :, head].double() for x in (q, k, v))
                scores = (qh @ kh.T / math.sqrt(dim)).masked_fill(~seen, -torch.inf)
                want_lse = scores.logsumexp(-1)
                empty = want_lse == -torch.inf
                weights = torch.exp(scores - want_lse.masked_fill(empty, 0)[:, None])
                want = weights @ vh
                eager = (weights.to(dtype) @ vh.to(dtype)).double()
                allowed = 2 * ((eager - want).abs().max() + torch.finfo(dtype).eps * want.abs().max())
                assert (out[sample, :, head] - want).abs().max() <= allowed
                assert torch.equal(lse[sample, head] == -torch.inf, empty)
                assert (out[sample, :, head][empty] == 0).all()
                close = 1e-5 * (1 + want_lse[~empty].abs())
                assert ((lse[sample, head] - want_lse)[~empty].abs() <= close).all()

    @pytest.mark.parametrize("dim", [64, 128])
    @pytest.mark.parametrize("shape, q_tile, k_tile", TILES)
    def test_lists_of_any_tiles_are_right(self, shape: Triple, q_tile: Triple, k_tile: Triple, dim: int) -> None:
        self.check(drawn(shape, q_tile, k_tile, None, (2, 3)), 3, 2, dim, torch.bfloat16)
        self.check(drawn(shape, q_tile, k_tile, union(shape), (1, 2)), 2, 2, dim, torch.float16)
        self.check(drawn(shape, q_tile, k_tile, None, (2, 1)), 2, 2, dim, torch.bfloat16)
        few = masks.window(*(min(3, n) for n in shape))
        self.check(
            lower(few, shape, q_tile, k_tile), 2, 1, dim, torch.bfloat16
        )  # most tiles of neighbours are the same

    @pytest.mark.parametrize("shape, q_tile, k_tile", TILES)
    def test_lists_are_seen_pair_by_pair(self, shape: Triple, q_tile: Triple, k_tile: Triple) -> None:
        """Without scores all that is seen weighs the same: exp(LSE) counts it, and an identity of values shows it."""
        for lists in (drawn(shape, q_tile, k_tile, union(shape)), drawn(shape, q_tile, k_tile, None)):
            n, case = math.prod(shape), Case(Grid(*shape), lists, heads=1)
            zero = torch.zeros(-(-n // 128), n, 1, 128, device="cuda", dtype=torch.bfloat16)
            chunk = torch.eye(128 * len(zero), device="cuda", dtype=torch.bfloat16)[:n].view(n, len(zero), 1, 128)
            out, lse = case.call(zero, zero, chunk.transpose(0, 1).contiguous(), "cuda")
            seen = (out != 0)[:, :, 0].transpose(0, 1).reshape(n, -1)[:, :n]
            want = lists.allowed().cuda()
            assert torch.equal(seen, want)
            assert torch.equal(lse[0, 0].double().exp().round().long(), want.sum(1))

    def test_strides_of_lists_and_entries_that_are_no_tiles_do_no_harm(self) -> None:
        shape, tile = (8, 12, 16), (2, 4, 8)
        lists = on(drawn(shape, tile, tile, union(shape), (2, 2)), "cuda")
        assert lists.partial is not None
        q, k, v = torch.randn(3, 2, math.prod(shape), 2, 64, device="cuda", dtype=torch.bfloat16).unbind()
        want = stattn.attention(q, k, v, shape, lists, impl="cuda")
        turned = BlockList(
            shape, tile, tile, lists.count.transpose(0, 1).contiguous().transpose(0, 1),
            lists.index.transpose(2, 3).contiguous().transpose(2, 3),
            lists.partial.transpose(1, 3).contiguous().transpose(1, 3), lists.mask,
        )  # fmt: skip
        assert torch.equal(stattn.attention(q, k, v, shape, turned, impl="cuda"), want)
        at = torch.arange(lists.index.shape[-1], device="cuda")
        spoiled = torch.where(at < lists.count[..., None], lists.index, 1 << 20)
        spoiled = torch.cat([spoiled, torch.full_like(spoiled, -3)], -1)
        more = torch.cat([lists.partial, lists.partial], -1)
        beyond = BlockList(shape, tile, tile, lists.count + 2, spoiled, more, lists.mask)
        assert torch.equal(stattn.attention(q, k, v, shape, beyond, impl="cuda"), want)

    def test_a_captured_call_follows_its_lists(self) -> None:
        shape, tile = (8, 12, 16), (2, 4, 8)
        first, second = (on(drawn(shape, tile, tile, mask), "cuda") for mask in (union(shape), union(shape)))
        q, k, v = torch.randn(3, 1, math.prod(shape), 2, 128, device="cuda", dtype=torch.bfloat16).unbind()
        stattn.attention(q, k, v, shape, first, impl="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = stattn.attention(q, k, v, shape, first, impl="cuda")
        second.index.copy_(second.index.flip(2))
        second.count.copy_(second.count.flip(2))
        for mine, other in ((first.count, second.count), (first.index, second.index)):
            mine.copy_(other)
        graph.replay()
        assert torch.equal(captured, stattn.attention(q, k, v, shape, first, impl="cuda"))

    def test_results_repeat_and_do_not_depend_on_other_heads(self) -> None:
        shape, tile = (8, 12, 16), (2, 4, 8)
        lists = on(drawn(shape, tile, tile, union(shape), (1, 4)), "cuda")
        q, k, v = torch.randn(3, 2, math.prod(shape), 4, 128, device="cuda", dtype=torch.bfloat16).unbind()
        first = stattn.attention(q, k, v, shape, lists, return_lse=True, impl="cuda")
        for _ in range(50):
            again = stattn.attention(q, k, v, shape, lists, return_lse=True, impl="cuda")
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        partial = None if lists.partial is None else lists.partial[:, 2:3]
        one = BlockList(shape, tile, tile, lists.count[:, 2:3], lists.index[:, 2:3], partial, lists.mask)
        alone = stattn.attention(*(x[1:, :, 2:3] for x in (q, k, v)), shape, one, return_lse=True, impl="cuda")
        assert torch.equal(alone[0], first[0][1:, :, 2:3])
        assert torch.equal(alone[1], first[1][1:, 2:3])
