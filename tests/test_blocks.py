"""Block lists: what they refuse, what they allow, and masks that are lowered to them or join them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mask_definitions import COMBINED, RAGGED, Triple, every_example

import stattn
from stattn import BlockList, masks
from stattn import blocks as blocks_module
from stattn.blocks import KeyLists, block_list, join, lower, tile_count, tile_of, transpose
from stattn.grid import Grid
from stattn.masks import EMPTY, FULL, PARTIAL

TILES = [((1, 1, 1), (1, 1, 1)), ((2, 2, 2), (2, 3, 4)), ((1, 5, 3), (3, 1, 7)), ((4, 8, 8), (2, 2, 2))]

ON = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("triton", "cpu", id="interpreter", marks=pytest.mark.interpreter),
    pytest.param("triton", "cuda", id="cuda", marks=pytest.mark.gpu),
]


def good(**changes: object) -> dict[str, object]:
    """Arguments of a BlockList on (3, 5, 7) with 12 query tiles and 8 key tiles."""
    arguments: dict[str, object] = {
        "shape": RAGGED,
        "q_tile": (2, 2, 4),
        "k_tile": (2, 3, 4),
        "count": torch.full((2, 3, 12), 4, dtype=torch.int32),
        "index": torch.arange(4, dtype=torch.int32).expand(2, 3, 12, 4).contiguous(),
    }
    return {**arguments, **changes}


def owner(shape: Triple, tile: Triple, token: int) -> int:
    """The tile of a token, counted by hand."""
    place = np.unravel_index(token, shape)
    number = 0
    for x, n, e in zip(place, shape, tile, strict=True):
        number = number * math.ceil(n / e) + int(x) // e
    return number


def allowed_by_hand(blocks: BlockList, batch: int, head: int) -> torch.Tensor:
    """What the lists allow, entry by entry."""
    b = batch if blocks.count.shape[0] > 1 else 0
    h = head if blocks.count.shape[1] > 1 else 0
    tokens = math.prod(blocks.shape)
    q_owner = [owner(blocks.shape, blocks.q_tile, x) for x in range(tokens)]
    k_owner = [owner(blocks.shape, blocks.k_tile, x) for x in range(tokens)]
    element = None if blocks.mask is None else blocks.mask.allowed(blocks.shape)
    table = torch.zeros(tokens, tokens, dtype=torch.bool)
    for q in range(tokens):
        count = int(blocks.count[b, h, q_owner[q]])
        for entry in range(count):
            tile = int(blocks.index[b, h, q_owner[q], entry])
            partial = blocks.partial is not None and bool(blocks.partial[b, h, q_owner[q], entry])
            for k in range(tokens):
                if k_owner[k] == tile:
                    table[q, k] = not partial or bool(element[q, k])  # type: ignore[index]
    return table


# Construction.


def test_a_block_list_counts_its_tiles_and_keeps_triples() -> None:
    blocks = BlockList(**good(q_tile=[2, 2, 4]))  # type: ignore[arg-type]
    assert blocks.tiles == (12, 8)
    assert blocks.q_tile == (2, 2, 4)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"shape": (3, 5)}, TypeError, "shape="),
        ({"q_tile": (2, 0, 4)}, ValueError, "q_tile=0"),
        ({"k_tile": (2, 3, 4.0)}, TypeError, "k_tile=4.0"),
        ({"q_tile": (1, 2, 4)}, ValueError, r"count has shape \(2, 3, 12\), expected \[B, heads, 18"),
        ({"count": torch.zeros(3, 12, dtype=torch.int32)}, ValueError, r"count has shape \(3, 12\)"),
        ({"index": torch.zeros(2, 3, 12, dtype=torch.int32)}, ValueError, r"index has shape \(2, 3, 12\)"),
        ({"index": torch.zeros(2, 1, 12, 4, dtype=torch.int32)}, ValueError, r"index has shape \(2, 1, 12, 4\)"),
        ({"count": torch.zeros(2, 3, 12, dtype=torch.int64)}, TypeError, "count has dtype torch.int64"),
        ({"index": torch.zeros(2, 3, 12, 4)}, TypeError, "index has dtype torch.float32"),
        ({"count": [[4]]}, TypeError, r"count=\[\[4\]\] must be a tensor"),
        (
            {"count": torch.zeros(2, 3, 12, dtype=torch.int32, device="meta")},
            ValueError,
            "count is on meta, index on cpu",
        ),
        ({"partial": torch.zeros(2, 3, 12, 4, dtype=torch.bool)}, ValueError, "partial and mask go together"),
        ({"mask": masks.full()}, ValueError, "partial and mask go together"),
        ({"mask": "full()", "partial": torch.zeros(2, 3, 12, 4, dtype=torch.bool)}, TypeError, r"mask='full\(\)'"),
        (
            {"mask": masks.full(), "partial": torch.zeros(2, 3, 12, 3, dtype=torch.bool)},
            ValueError,
            r"partial has shape \(2, 3, 12, 3\)",
        ),
        (
            {"mask": masks.full(), "partial": torch.zeros(2, 3, 12, 4, dtype=torch.int8)},
            TypeError,
            "partial has dtype torch.int8",
        ),
    ],
)
def test_a_block_list_that_does_not_fit_is_refused(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    BlockList(**good())  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        BlockList(**good(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "shape, tile", [(RAGGED, (2, 2, 4)), ((1, 1, 1), (5, 5, 5)), ((4, 6, 8), (2, 3, 4)), ((2, 3, 5), (1, 1, 1))]
)
def test_tokens_lie_in_tiles_in_row_major_order(shape: Triple, tile: Triple) -> None:
    owners = tile_of(Grid(*shape), tile)
    assert owners.tolist() == [owner(shape, tile, token) for token in range(math.prod(shape))]
    assert tile_count(shape, tile) == owners.max() + 1


# Kinds and allowed.


def some_lists(seed: int, mask: masks.Mask | None, shape: Triple = RAGGED) -> tuple[BlockList, torch.Tensor]:
    """Random lists for 2 samples and 3 heads, and the table of kinds that they were made of."""
    generator = torch.Generator().manual_seed(seed)
    q_tile, k_tile = (2, 2, 4), (2, 3, 4)
    size = (2, 3, tile_count(shape, q_tile), tile_count(shape, k_tile))
    kinds = torch.randint(0, 3, size, generator=generator, dtype=torch.int8)
    if mask is None:
        kinds = torch.where(kinds == PARTIAL, EMPTY, kinds).to(torch.int8)
    kinds[0, 1, 3] = EMPTY  # a query tile that sees nothing
    kinds[1, 0, 2] = FULL  # and one that sees everything
    return block_list(shape, q_tile, k_tile, kinds, mask), kinds


@pytest.mark.parametrize("mask", [None, masks.window(3, 3, 3), COMBINED[0]], ids=str)
def test_lists_say_the_kinds_that_they_were_made_of(mask: masks.Mask | None) -> None:
    blocks, kinds = some_lists(1, mask)
    assert torch.equal(blocks.kinds(), kinds)
    assert torch.equal(blocks.count, (kinds != EMPTY).sum(-1, dtype=torch.int32))
    for row in range(blocks.index.shape[2]):
        used = blocks.index[1, 2, row, : int(blocks.count[1, 2, row])].tolist()
        assert used == sorted(set(used))


@pytest.mark.parametrize("mask", [None, masks.window(3, 3, 3), COMBINED[0]], ids=str)
def test_lists_allow_what_their_entries_say(mask: masks.Mask | None) -> None:
    shape = (2, 3, 5)
    blocks, _ = some_lists(2, None if mask is None else masks.window(1, 3, 3), shape)
    for batch, head in ((0, 0), (0, 1), (1, 2)):
        assert torch.equal(blocks.allowed(batch, head), allowed_by_hand(blocks, batch, head))
    assert not torch.equal(blocks.allowed(0, 0), blocks.allowed(1, 2))


def test_unused_entries_may_hold_anything() -> None:
    blocks, kinds = some_lists(3, masks.window(3, 3, 3))
    used = torch.arange(blocks.index.shape[-1]) < blocks.count[..., None]
    assert not used.all()
    q, k, v = torch.randn(3, 2, 105, 3, 4, dtype=torch.float64)
    expected = stattn.attention(q, k, v, RAGGED, blocks)
    for junk in (-1, 8, 2**31 - 1):
        index = torch.where(used, blocks.index, junk).to(torch.int32)
        other = BlockList(blocks.shape, blocks.q_tile, blocks.k_tile, blocks.count, index, blocks.partial, blocks.mask)
        assert torch.equal(other.kinds(), kinds)
        assert torch.equal(stattn.attention(q, k, v, RAGGED, other), expected)


@pytest.mark.parametrize(
    "count, entries, message",
    [
        (3, [0, 1, 2, 3], None),
        (5, [0, 1, 2, 3], "counts from 5 to 5, their rows have 4 entries"),
        (-1, [0, 1, 2, 3], "counts from -1 to -1"),
        (4, [0, 1, 2, 8], "key tiles 0 to 8 of 8"),
        (1, [-1, 1, 2, 3], "key tiles -1 to -1 of 8"),
        (3, [5, 1, 5, 3], "a key tile twice"),
    ],
)
def test_the_reference_refuses_entries_that_are_no_tiles_or_appear_twice(
    count: int, entries: list[int], message: str | None
) -> None:
    blocks = BlockList(
        RAGGED,
        (2, 2, 4),
        (2, 3, 4),
        torch.full((1, 1, 12), count, dtype=torch.int32),
        torch.tensor(entries, dtype=torch.int32).expand(1, 1, 12, 4),
    )
    q, k, v = torch.randn(3, 1, 105, 2, 4)
    if message is None:
        assert stattn.attention(q, k, v, RAGGED, blocks).shape == q.shape
        return
    with pytest.raises(ValueError, match=message):
        stattn.attention(q, k, v, RAGGED, blocks)


def test_lists_of_one_sample_and_head_stand_for_all() -> None:
    blocks = lower(masks.window(3, 3, 3), RAGGED, (2, 2, 4), (2, 3, 4))
    assert blocks.count.shape[:2] == (1, 1)
    assert torch.equal(blocks.allowed(5, 7), blocks.allowed())


def test_lists_in_another_order_allow_the_same() -> None:
    blocks, kinds = some_lists(4, masks.window(3, 3, 3))
    assert blocks.partial is not None
    turned = (blocks.count[..., None] - 1 - torch.arange(8)).clamp(min=0)
    index, partial = (x.gather(-1, turned) for x in (blocks.index, blocks.partial))
    other = BlockList(blocks.shape, blocks.q_tile, blocks.k_tile, blocks.count, index, partial, blocks.mask)
    assert not torch.equal(other.index, blocks.index)
    assert torch.equal(other.kinds(), kinds)
    q, k, v = torch.randn(3, 2, 105, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(
        stattn.attention(q, k, v, RAGGED, other), stattn.attention(q, k, v, RAGGED, blocks), atol=1e-12, rtol=1e-12
    )


# Masks and lists.


@pytest.mark.parametrize("q_tile, k_tile", TILES)
def test_a_lowered_mask_allows_what_the_mask_allows(q_tile: Triple, k_tile: Triple) -> None:
    for shape in (RAGGED, (4, 6, 8)):
        for mask in [*COMBINED, *every_example(shape)]:
            blocks = lower(mask, Grid(*shape, 2, 3), q_tile, k_tile)
            assert torch.equal(blocks.allowed(), mask.allowed(shape)), mask
            kinds = mask.tiles(shape, q_tile, k_tile)
            assert (blocks.kinds()[0, 0].numpy() == kinds).all()
            assert (blocks.partial is None) == (not (kinds == PARTIAL).any())


@pytest.mark.parametrize("mask", [masks.window(3, 3, 3), masks.spatial(), COMBINED[1], masks.full()], ids=str)
def test_a_mask_or_lists_allows_what_either_allows(mask: masks.Mask) -> None:
    blocks, _ = some_lists(5, None)
    both = mask | blocks
    assert torch.equal((blocks | mask).kinds(), both.kinds())
    assert isinstance(both, BlockList)
    for batch in range(2):
        for head in range(3):
            expected = mask.allowed(RAGGED) | blocks.allowed(batch, head)
            assert torch.equal(both.allowed(batch, head), expected)


def test_a_mask_joins_lists_that_already_have_its_partial_tiles_and_no_others() -> None:
    mask = masks.window(3, 3, 3)
    blocks, _ = some_lists(6, mask)
    both = mask | blocks
    assert isinstance(both, BlockList)
    assert torch.equal(both.allowed(1, 1), mask.allowed(RAGGED) | blocks.allowed(1, 1))
    with pytest.raises(ValueError, match=r"already have partial tiles of mask window\(3, 3, 3\)"):
        masks.spatial() | blocks


def test_only_masks_are_lowered() -> None:
    with pytest.raises(TypeError, match=r"mask='full\(\)' must be a Mask"):
        lower("full()", RAGGED, (1, 2, 2), (1, 2, 2))  # type: ignore[arg-type]


def test_lists_join_masks_only() -> None:
    blocks, _ = some_lists(7, None)
    with pytest.raises(TypeError):
        "window(3, 3, 3)" | blocks  # type: ignore[operator]
    with pytest.raises(TypeError):
        blocks | "window(3, 3, 3)"  # type: ignore[operator]


def test_joined_lists_are_no_longer_than_they_need_to_be() -> None:
    kinds = torch.zeros(1, 1, 12, 8, dtype=torch.int8)
    kinds[..., 0] = FULL
    blocks = block_list(RAGGED, (2, 2, 4), (2, 3, 4), kinds, most=1)
    assert blocks.index.shape[-1] == 1
    both = masks.window(1, 1, 1) | blocks
    assert isinstance(both, BlockList)
    assert both.index.shape[-1] < 8
    assert torch.equal(both.allowed(), masks.window(1, 1, 1).allowed(RAGGED) | blocks.allowed())


def test_lists_are_the_same_however_many_rows_are_written_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = masks.window(3, 3, 3)
    blocks, kinds = some_lists(8, mask)
    both = mask | blocks
    monkeypatch.setattr(blocks_module, "AT_ONCE", 5 * kinds.shape[-1])
    again, _ = some_lists(8, mask)
    for one, other in ((blocks, again), (both, mask | again)):
        for name in ("count", "index", "partial"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("impl, device", [each for each in ON if each.id != "reference"])
@pytest.mark.parametrize("flagged", [False, True])
def test_a_mask_joins_lists_alike_in_plain_pytorch_and_by_triton(impl: str, device: str, flagged: bool) -> None:
    mask = masks.window(3, 3, 3)
    q_tile, k_tile = (3, 2, 4), (2, 3, 4)
    q_tiles, k_tiles = (tile_count(RAGGED, tile) for tile in (q_tile, k_tile))
    count, index, partial = random_entries(2, 2, q_tiles, k_tiles, 5)
    blocks = BlockList(RAGGED, q_tile, k_tile, count, index, partial if flagged else None, mask if flagged else None)
    moved = BlockList(
        RAGGED,
        q_tile,
        k_tile,
        count.to(device),
        index.to(device).transpose(2, 3).contiguous().transpose(2, 3),
        partial.to(device) if flagged else None,
        mask if flagged else None,
    )
    expected, got = join(blocks, mask, impl="reference"), join(moved, mask, impl=impl)
    for name in ("count", "index", "partial"):
        assert torch.equal(getattr(got, name).cpu(), getattr(expected, name)), name
    with pytest.raises(ValueError, match="impl='cuda'"):
        join(blocks, mask, impl="cuda")


# Lists seen from the key tiles.


def random_entries(
    batch: int, heads: int, q_tiles: int, k_tiles: int, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lists of random length in random order, with junk behind their ends: count, index, partial."""
    generator = torch.Generator().manual_seed(q_tiles * k_tiles + most)
    size = (batch, heads, q_tiles)
    order = torch.rand((*size, k_tiles), generator=generator).argsort(-1)[..., :most]
    count = torch.randint(0, most + 1, size, generator=generator, dtype=torch.int32)
    count[0, 0, 0] = most
    used = torch.arange(most) < count[..., None]
    partial = torch.rand((*size, most), generator=generator) < 0.5
    return count, torch.where(used, order, 2**31 - 1).to(torch.int32), partial


def key_lists_by_hand(
    count: torch.Tensor, index: torch.Tensor, partial: torch.Tensor, k_tiles: int, b: int, h: int
) -> list[list[tuple[int, bool]]]:
    """The query tiles of each key tile with their flags, row by row."""
    found: list[list[tuple[int, bool]]] = [[] for _ in range(k_tiles)]
    for q_tile in range(count.shape[2]):
        for entry in range(int(count[b, h, q_tile])):
            found[int(index[b, h, q_tile, entry])].append((q_tile, bool(partial[b, h, q_tile, entry])))
    return found


def assert_key_lists(lists: KeyLists, expected: list[list[tuple[int, bool]]], b: int, h: int) -> None:
    offset, item = lists.offset[b, h].tolist(), lists.item[b, h].tolist()
    flags = [False] * len(item) if lists.partial is None else lists.partial[b, h].tolist()
    assert offset[0] == 0
    for k_tile, entries in enumerate(expected):
        start, end = offset[k_tile : k_tile + 2]
        assert list(zip(item[start:end], flags[start:end], strict=True)) == entries


@pytest.mark.parametrize("impl, device", ON)
@pytest.mark.parametrize(
    "batch, heads, q_tiles, k_tiles, most",
    [(2, 1, 70, 37, 11), (1, 1, 1, 1, 1), (1, 2, 32, 17, 17), (1, 1, 33, 300, 280), (1, 1, 64, 16, 3)],
)
def test_key_tiles_list_the_query_tiles_that_list_them(
    impl: str, device: str, batch: int, heads: int, q_tiles: int, k_tiles: int, most: int
) -> None:
    count, index, partial = random_entries(batch, heads, q_tiles, k_tiles, most)
    on_device = [x.to(device) for x in (count, index, partial)]
    lists = transpose(*on_device, k_tiles, impl=impl)
    whole = transpose(*on_device[:2], None, k_tiles, impl=impl)
    assert whole.partial is None
    for b, h in np.ndindex(batch, heads):
        expected = key_lists_by_hand(count, index, partial, k_tiles, b, h)
        assert_key_lists(lists, expected, b, h)
        assert_key_lists(whole, [[(q_tile, False) for q_tile, _ in entries] for entries in expected], b, h)


@pytest.mark.parametrize("impl, device", ON)
def test_lists_are_transposed_as_they_lie(impl: str, device: str) -> None:
    count, index, partial = (x.to(device) for x in random_entries(2, 3, 20, 9, 5))
    expected = transpose(count, index, partial, 9, impl=impl)
    turned = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (count, index, partial)]
    lists = transpose(*turned, 9, impl=impl)
    end = int(expected.offset[1, 2, -1])
    assert torch.equal(lists.offset, expected.offset)
    assert torch.equal(lists.item[1, 2, :end], expected.item[1, 2, :end])
    assert lists.partial is not None
    assert expected.partial is not None
    assert torch.equal(lists.partial[1, 2, :end], expected.partial[1, 2, :end])
    alike = transpose(count[:1, :1].expand(1, 2, -1), index[:1, :1].expand(1, 2, -1, -1), None, 9, impl=impl)
    assert torch.equal(alike.offset[0, 0], alike.offset[0, 1])


@pytest.mark.parametrize("impl, device", ON)
def test_entries_that_are_no_key_tiles_are_left_out_of_key_lists(impl: str, device: str) -> None:
    index = torch.tensor([[3, -1, 0], [7, 8, 2**31 - 1], [0, 3, 5]], dtype=torch.int32, device=device)
    lists = transpose(torch.full((1, 1, 3), 3, dtype=torch.int32, device=device), index[None, None], None, 8, impl=impl)
    assert lists.offset.flatten().tolist() == [0, 2, 2, 2, 4, 4, 5, 5, 6]
    assert lists.item.flatten()[:6].tolist() == [0, 2, 0, 2, 2, 1]


@pytest.mark.parametrize("impl, device", ON)
def test_lists_without_entries_give_key_tiles_without_query_tiles(impl: str, device: str) -> None:
    for size in ((0, 2, 5, 3), (2, 2, 5, 0), (1, 1, 5, 3)):
        count = torch.zeros(size[:3], dtype=torch.int32, device=device)
        lists = transpose(count, torch.zeros(size, dtype=torch.int32, device=device), None, 7, impl=impl)
        assert lists.offset.shape == (*size[:2], 8)
        assert lists.item.shape == (*size[:2], size[2] * size[3])
        assert not lists.offset.any()


def test_a_transposition_that_is_not_possible_is_refused() -> None:
    count = torch.zeros(1, 1, 1, dtype=torch.int32)
    index = torch.zeros(1, 1, 1, 4, dtype=torch.int32)
    transpose(count, index, None, 4)
    with pytest.raises(ValueError, match="impl='cuda'"):
        transpose(count, index, None, 4, impl="cuda")
    huge = torch.empty(1, 1, 2**16, 2**15, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"index of shape \(1, 1, 65536, 32768\)"):
        transpose(count, huge, None, 2**15)


@pytest.mark.gpu
def test_long_lists_are_transposed_and_joined_alike_in_a_graph() -> None:
    shape, tile = (30, 48, 80), (2, 4, 8)
    q_tiles, most, mask = tile_count(shape, tile), 162, masks.sliding_tile((6, 8, 8), (3, 3, 3))
    index = torch.rand(2, 4, q_tiles, q_tiles, device="cuda").argsort(-1)[..., :most].to(torch.int32)
    count = torch.randint(0, most + 1, (2, 4, q_tiles), device="cuda", dtype=torch.int32)

    def run() -> tuple[torch.Tensor, ...]:
        both = join(BlockList(shape, tile, tile, count, index), mask)
        assert both.partial is not None
        lists = transpose(both.count, both.index, both.partial, q_tiles)
        assert lists.partial is not None
        used = torch.arange(lists.item.shape[-1], device="cuda") < lists.offset[..., -1:]
        # What lies behind the last list is not written.
        item, partial = (torch.where(used, x, 0) for x in (lists.item, lists.partial))
        return both.count, both.index, both.partial, lists.offset, item, partial

    first = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        index.copy_(torch.rand(2, 4, q_tiles, q_tiles, device="cuda").argsort(-1)[..., :most])
        graph.replay()
        for eager, replayed in zip(run(), captured, strict=True):
            assert torch.equal(eager, replayed)
    assert not torch.equal(first[1], captured[1])
    count, index = count[:1, :2], index[:1, :2]
    both, plain = (join(BlockList(shape, tile, tile, count, index), mask, impl=x) for x in ("triton", "reference"))
    for name in ("count", "index", "partial"):
        assert torch.equal(getattr(both, name), getattr(plain, name)), name
    lists, expected = (
        transpose(both.count, both.index, both.partial, q_tiles, impl=x) for x in ("triton", "reference")
    )
    assert torch.equal(lists.offset, expected.offset)
    for head in range(2):
        end = int(expected.offset[0, head, -1])
        assert torch.equal(lists.item[0, head, :end], expected.item[0, head, :end])
        assert lists.partial is not None
        assert expected.partial is not None
        assert torch.equal(lists.partial[0, head, :end], expected.partial[0, head, :end])


@pytest.mark.gpu
def test_every_config_transposes_and_joins_alike() -> None:
    from stattn.kernels import blocks as kernels

    count, index, partial = (x.cuda() for x in random_entries(2, 2, 300, 700, 90))
    kinds = torch.randint(0, 3, (300, 700), device="cuda", dtype=torch.int8)
    expected = transpose(count, index, partial, 700, impl="reference")
    joined = []
    for config in kernels.CONFIGS:
        offset, item, flags = kernels.transpose(count, index, partial, 700, config)
        assert torch.equal(offset, expected.offset)
        assert flags is not None
        assert expected.partial is not None
        for b, h in np.ndindex(2, 2):
            end = int(offset[b, h, -1])
            assert torch.equal(item[b, h, :end], expected.item[b, h, :end])
            assert torch.equal(flags[b, h, :end], expected.partial[b, h, :end])
        new = [torch.empty(2, 2, 300, 700, device="cuda", dtype=dtype) for dtype in (torch.int32, torch.bool)]
        kernels.join(count, index, partial, kinds, count_ := torch.empty_like(count), *new, config)
        joined.append((count_, *new))
    for one, other in zip(*joined[:2], strict=True):
        assert torch.equal(one, other)
