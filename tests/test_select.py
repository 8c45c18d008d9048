"""Selection of key tiles against loops over tiles and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from mask_definitions import Triple

import stattn
from stattn import BlockList, Grid
from stattn.blocks import tile_count, tile_of
from stattn.masks import FULL

CASES = [  # grid, query tile, key tile, heads, key heads
    (Grid(3, 5, 7), (2, 2, 4), (2, 3, 4), 2, 2),
    (Grid(3, 5, 7, 2, 3), (1, 5, 3), (2, 2, 2), 4, 2),
    (Grid(4, 6, 8), (2, 3, 4), (2, 3, 4), 3, 1),
    (Grid(1, 1, 9, 0, 4), (1, 1, 4), (1, 1, 2), 1, 1),
    (Grid(1, 1, 1), (4, 4, 4), (2, 2, 2), 2, 2),
]


def tokens(
    grid: Grid, heads: int, key_heads: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.randn(2, grid.tokens, heads, 6, dtype=torch.float64).to(dtype)
    k = torch.randn(2, grid.tokens, key_heads, 6, dtype=torch.float64).to(dtype)
    return q, k


def scores_by_hand(q: torch.Tensor, k: torch.Tensor, grid: Grid, q_tile: Triple, k_tile: Triple) -> torch.Tensor:
    """Mean vectors tile by tile, their products pair by pair, in float64. [B, heads, q tiles, k tiles]"""
    means = []
    for x, tile in ((q, q_tile), (k, k_tile)):
        video = x.double()[:, grid.before : grid.before + grid.video].unflatten(1, grid.shape)
        boxes = []
        for t in range(0, grid.t, tile[0]):
            for h in range(0, grid.h, tile[1]):
                for w in range(0, grid.w, tile[2]):
                    boxes.append(video[:, t : t + tile[0], h : h + tile[1], w : w + tile[2]].mean(dim=(1, 2, 3)))
        means.append(boxes)
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    table = torch.empty(q.shape[0], heads, len(means[0]), len(means[1]), dtype=torch.float64)
    for h in range(heads):
        for i, a in enumerate(means[0]):
            for j, b in enumerate(means[1]):
                table[:, h, i, j] = (a[:, h] * b[:, h // group]).sum(-1) / math.sqrt(q.shape[3])
    return table


def top_k_by_hand(row: list[float], keep: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda tile: (-row[tile], tile))[:keep])


def top_p_by_hand(row: list[float], mass: float) -> set[int]:
    weights = [math.exp(x - max(row)) for x in row]
    total, held, chosen = sum(weights), 0.0, set()
    for tile in sorted(range(len(row)), key=lambda tile: (-row[tile], tile)):
        chosen.add(tile)
        held += weights[tile] / total
        if held >= mass:
            break
    return chosen


def chosen_tiles(blocks: BlockList, b: int, h: int, tile: int) -> set[int]:
    used = blocks.index[b, h, tile, : int(blocks.count[b, h, tile])].tolist()
    assert used == sorted(set(used)), "lists are in ascending order, each tile once"
    return set(used)


@pytest.mark.parametrize("grid, q_tile, k_tile, heads, key_heads", CASES, ids=str)
def test_top_k_keeps_the_best_tiles_of_each_row(
    grid: Grid, q_tile: Triple, k_tile: Triple, heads: int, key_heads: int
) -> None:
    q, k = tokens(grid, heads, key_heads)
    table = scores_by_hand(q, k, grid, q_tile, k_tile)
    tiles = tile_count(grid.shape, k_tile)
    for keep in sorted({1, min(3, tiles), tiles}):
        blocks = stattn.top_k(q, k, grid, q_tile, k_tile, keep)
        assert blocks.index.shape == (*table.shape[:3], keep)
        assert (blocks.count == keep).all()
        for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in table.shape[:3])).tolist():
            assert chosen_tiles(blocks, b, h, i) == top_k_by_hand(table[b, h, i].tolist(), keep)


@pytest.mark.parametrize("grid, q_tile, k_tile, heads, key_heads", CASES, ids=str)
@pytest.mark.parametrize("mass", [0.05, 0.3, 0.7, 0.95, 1.0])
def test_top_p_keeps_the_fewest_tiles_that_hold_the_mass(
    grid: Grid, q_tile: Triple, k_tile: Triple, heads: int, key_heads: int, mass: float
) -> None:
    q, k = tokens(grid, heads, key_heads)
    q = 5 * q
    table = scores_by_hand(q, k, grid, q_tile, k_tile)
    blocks = stattn.top_p(q, k, grid, q_tile, k_tile, mass)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in table.shape[:3])).tolist():
        row = table[b, h, i].tolist()
        expected = set(range(len(row))) if mass == 1.0 else top_p_by_hand(row, mass)
        assert chosen_tiles(blocks, b, h, i) == expected


def test_the_whole_mass_keeps_tiles_whose_weight_vanishes_in_rounding() -> None:
    q = torch.zeros(1, 8, 1, 4)
    k = torch.zeros(1, 8, 1, 4)
    q[..., 0], k[0, 0, 0, 0] = 100.0, 100.0
    assert stattn.top_p(q, k, (1, 1, 8), (1, 1, 4), (1, 1, 2), 1.0).count.tolist() == [[[4, 4]]]
    assert stattn.top_p(q, k, (1, 1, 8), (1, 1, 4), (1, 1, 2), 0.999).count.tolist() == [[[1, 1]]]


def test_the_lower_tile_wins_a_tie() -> None:
    q, k = torch.ones(1, 64, 2, 4), torch.ones(1, 64, 2, 4)
    blocks = stattn.top_k(q, k, (1, 8, 8), (1, 4, 4), (1, 2, 2), 5)
    assert (blocks.index == torch.arange(5)).all()
    blocks = stattn.top_p(q, k, (1, 8, 8), (1, 4, 4), (1, 2, 2), 0.25)  # four of sixteen equal weights, exact in binary
    assert (blocks.count == 4).all()
    assert (blocks.index[..., :4] == torch.arange(4)).all()


def test_a_short_tile_is_averaged_over_its_own_tokens() -> None:
    q = torch.ones(1, 5, 1, 2)
    k = torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0]).reshape(1, 5, 1, 1).expand(1, 5, 1, 2)
    blocks = stattn.top_k(q, k, (1, 1, 5), (1, 1, 5), (1, 1, 4), 1)
    assert blocks.index.flatten().tolist() == [1]


@pytest.mark.parametrize(
    "select", [lambda *a: stattn.top_k(*a, 3), lambda *a: stattn.top_p(*a, 0.6)], ids=["top_k", "top_p"]
)
def test_global_tokens_take_no_part_in_selection(select) -> None:  # type: ignore[no-untyped-def]
    grid = Grid(3, 5, 7, 2, 3)
    q, k = tokens(grid, 2, 2)
    expected = select(q, k, grid, (2, 2, 4), (2, 3, 4))
    louder = [x.clone() for x in (q, k)]
    for x in louder:
        x[:, :2], x[:, -3:] = 1e6, torch.nan
    video = [x[:, 2:-3] for x in (q, k)]
    for other in (louder, video, (q, video[1]), (video[0], louder[1])):
        blocks = select(*other, grid, (2, 2, 4), (2, 3, 4))
        assert torch.equal(blocks.index, expected.index)
        assert torch.equal(blocks.count, expected.count)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_means_and_scores_of_narrow_tokens_are_wide(dtype: torch.dtype) -> None:
    grid = Grid(4, 6, 8)
    q, k = tokens(grid, 2, 1, dtype)
    blocks = stattn.top_k(q, k, grid, (2, 3, 4), (2, 2, 2), 7)
    table = scores_by_hand(q, k, grid, (2, 3, 4), (2, 2, 2))
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in table.shape[:3])).tolist():
        assert chosen_tiles(blocks, b, h, i) == top_k_by_hand(table[b, h, i].tolist(), 7)


def test_views_are_selected_from_like_copies() -> None:
    grid = Grid(3, 5, 7)
    packed = torch.randn(2, grid.tokens, 3, 2, 6)
    q, k, _ = packed.unbind(2)
    expected = stattn.top_k(q.contiguous(), k.contiguous(), grid, (2, 2, 4), (2, 3, 4), 3)
    assert torch.equal(stattn.top_k(q, k, grid, (2, 2, 4), (2, 3, 4), 3).index, expected.index)


def test_selection_has_no_gradient_and_changes_nothing() -> None:
    q, k = (x.requires_grad_() for x in tokens(Grid(3, 5, 7), 2, 2))
    before = q.detach().clone()
    blocks = stattn.top_k(q, k, (3, 5, 7), (2, 2, 4), (2, 3, 4), 3)
    assert not blocks.index.requires_grad
    assert torch.equal(q, before)


def test_an_empty_batch_selects_nothing() -> None:
    x = torch.randn(0, 105, 2, 6)
    assert stattn.top_k(x, x, (3, 5, 7), (2, 2, 4), (2, 3, 4), 3).index.shape == (0, 2, 12, 3)
    assert stattn.top_p(x, x, (3, 5, 7), (2, 2, 4), (2, 3, 4), 0.5).count.shape == (0, 2, 12)


def test_selected_tiles_are_what_attention_sees() -> None:
    grid = Grid(3, 5, 7)
    q, k = tokens(grid, 2, 1)
    v = torch.randn_like(k)
    blocks = stattn.top_k(q, k, grid, (2, 2, 4), (2, 3, 4), 2)
    out, lse = stattn.attention(q, k, v, grid, blocks, return_lse=True)
    tile = tile_of(grid, (2, 3, 4))
    for b, h, token in ((0, 0, 0), (0, 1, 52), (1, 1, 104)):
        row = int(tile_of(grid, (2, 2, 4))[token])
        keys = [x for x in range(105) if int(tile[x]) in chosen_tiles(blocks, b, h, row)]
        scores = k[b, keys, 0] @ q[b, token, h] / math.sqrt(6)
        torch.testing.assert_close(lse[b, h, token], torch.logsumexp(scores, 0))
        torch.testing.assert_close(out[b, token, h], scores.softmax(0) @ v[b, keys, 0])
    assert (blocks.kinds() == FULL).sum(-1).eq(2).all()


REFUSED = [
    ({"q": torch.zeros(2, 105, 12)}, ValueError, "q of shape"),
    ({"k": torch.zeros(2, 105, 2, 6, dtype=torch.int32)}, TypeError, "k of torch.int32"),
    ({"k": "k"}, TypeError, "k of type str"),
    ({"q": torch.zeros(2, 104, 2, 6)}, ValueError, "q has 104 tokens"),
    ({"k": torch.zeros(2, 106, 2, 6)}, ValueError, "k has 106 tokens"),
    ({"k": torch.zeros(1, 105, 2, 6)}, ValueError, r"k has shape \(1, 105, 2, 6\)"),
    ({"k": torch.zeros(2, 105, 3, 6)}, ValueError, r"k has shape \(2, 105, 3, 6\)"),
    ({"k": torch.zeros(2, 105, 2, 8)}, ValueError, r"k has shape \(2, 105, 2, 8\)"),
    ({name: torch.zeros(2, 105, 2, 0) for name in "qk"}, ValueError, "q has head dimension 0"),
    ({"k": torch.zeros(2, 105, 2, 6, dtype=torch.float64)}, TypeError, "k has dtype torch.float64"),
    ({"k": torch.zeros(2, 105, 2, 6, device="meta")}, ValueError, "k is on meta"),
    ({"grid": (3, 5)}, TypeError, r"grid=\(3, 5\)"),
    ({"q_tile": (2, 2)}, TypeError, r"q_tile=\(2, 2\)"),
    ({"k_tile": (2, 0, 4)}, ValueError, "k_tile=0"),
]


@pytest.mark.parametrize("changes, error, message", REFUSED)
@pytest.mark.parametrize("name, last", [("top_k", {"keep": 3}), ("top_p", {"mass": 0.5})])
def test_a_wrong_argument_of_selection_is_named(
    name: str, last: dict[str, object], changes: dict[str, object], error: type[Exception], message: str
) -> None:
    good = {"q": torch.zeros(2, 105, 2, 6), "k": torch.zeros(2, 105, 2, 6), "grid": (3, 5, 7)}
    good |= {"q_tile": (2, 2, 4), "k_tile": (2, 3, 4), **last}
    select = getattr(stattn, name)
    select(**good)
    with pytest.raises(error, match=message):
        select(**{**good, **changes})


@pytest.mark.parametrize(
    "name, changes, error",
    [
        ("top_k", {"keep": 0}, ValueError),
        ("top_k", {"keep": 9}, ValueError),
        ("top_k", {"keep": 2.0}, TypeError),
        ("top_k", {"keep": True}, TypeError),
        ("top_p", {"mass": 0}, ValueError),
        ("top_p", {"mass": 1.01}, ValueError),
        ("top_p", {"mass": math.nan}, ValueError),
        ("top_p", {"mass": "half"}, TypeError),
        ("top_p", {"mass": torch.tensor(0.5)}, TypeError),
        ("top_k", {"keep": 3, "impl": "fastest"}, ValueError),
        ("top_k", {"keep": 3, "impl": "sdpa"}, ValueError),
    ],
)
def test_a_share_that_is_none_is_refused(name: str, changes: dict[str, object], error: type[Exception]) -> None:
    x = torch.zeros(2, 105, 2, 6)
    select = getattr(stattn, name)
    select(x, x, (3, 5, 7), (2, 2, 4), (2, 3, 4), **{"top_k": {"keep": 8}, "top_p": {"mass": 1}}[name])
    changed = "impl" if "impl" in changes else next(iter(changes))
    with pytest.raises(error, match=f"{changed}="):
        select(x, x, (3, 5, 7), (2, 2, 4), (2, 3, 4), **changes)
