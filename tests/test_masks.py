"""Masks against what they mean: every constructor, on awkward grids, global tokens, unions and intersections."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from mask_definitions import COMBINED, DEFINITIONS, RAGGED, Triple, definition, every_example, places, some_tokens
from probes import BIG_GRIDS, GRIDS

from stattn import masks
from stattn.grid import Grid
from stattn.masks import CONSTRUCTORS, MAX_PRODUCTS, Mask

CAUSAL = list(itertools.product((False, True), repeat=3))


def check_rows(mask: Mask, shape: Triple, most: int = 60) -> None:
    """Compare rows of ``allowed`` with the definition."""
    tokens = some_tokens(shape, most)
    found = mask.allowed(shape, tokens).numpy()
    sees = definition(mask)
    for row, place in zip(found, places(shape, tokens), strict=True):
        expected = sees(shape, place).reshape(-1)
        assert (row == expected).all(), (
            f"{mask} on {shape}: query {place} sees {np.flatnonzero(row != expected)} wrongly"
        )


def expected_table(mask: Mask, shape: Triple) -> np.ndarray:
    """What every video query sees, from the definition. Booleans [video, video]"""
    sees = definition(mask)
    return np.stack([sees(shape, at).reshape(-1) for at in places(shape, list(range(int(np.prod(shape)))))])


# What masks allow.


def test_every_constructor_has_an_independent_definition() -> None:
    assert set(DEFINITIONS) == set(CONSTRUCTORS)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_constructor_allows_what_it_means_on_awkward_grids(name: str) -> None:
    assert len(GRIDS) >= 30
    for shape in GRIDS:
        for mask in CONSTRUCTORS[name].examples(shape):
            check_rows(mask, shape, most=48 if name == "window" else 120)


@pytest.mark.parametrize("name", CONSTRUCTORS)
@pytest.mark.parametrize("shape", BIG_GRIDS, ids=str)
def test_every_constructor_allows_what_it_means_on_large_grids(name: str, shape: Triple) -> None:
    for mask in CONSTRUCTORS[name].examples(shape):
        check_rows(mask, shape, most=12)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_columns_of_a_large_grid_agree_with_its_rows(name: str) -> None:
    shape = (18, 37, 12)
    keys = some_tokens(shape, 6)
    queries = some_tokens(shape, 40)
    for mask in CONSTRUCTORS[name].examples(shape)[:4]:
        sees = definition(mask)
        expected = np.stack([sees(shape, place).reshape(-1)[keys] for place in places(shape, queries)])
        assert (mask.allowed(shape, queries, keys).numpy() == expected).all(), mask


@pytest.mark.parametrize("causal", CAUSAL, ids=lambda c: "".join(str(int(each)) for each in c))
def test_windows_of_every_kind_allow_what_natten_means(causal: tuple[bool, bool, bool]) -> None:
    shape = (5, 7, 12)
    for size in ((1, 1, 1), (2, 2, 2), (3, 3, 3), (2, 3, 4), (5, 7, 12), (4, 6, 11)):
        check_rows(masks.window(*size, causal=causal), shape)
        for stride in {
            (1, 1, 1),
            size,
            tuple(max(1, each // 2) for each in size),
            tuple(min(each, 3) for each in size),
        }:
            check_rows(masks.window(*size, stride=stride, causal=causal), shape, most=30)  # type: ignore[arg-type]
    for size, dilation in (((2, 3, 4), (2, 2, 3)), ((1, 2, 3), (5, 3, 4)), ((2, 1, 6), (2, 7, 2))):
        for stride in ((1, 1, 1), tuple(min(each, 2) for each in size)):
            mask = masks.window(*size, stride=stride, dilation=dilation, causal=causal)  # type: ignore[arg-type]
            check_rows(mask, shape, most=30)
    check_rows(masks.window(None, 3, None, causal=causal), shape)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 8, 11, 16])
def test_windows_of_every_size_stride_and_dilation_fit_short_axes(length: int) -> None:
    for dilation in range(1, length + 1):
        for size in range(1, length // dilation + 1):
            for stride in {1, 2, 3, size - 1, size} & set(range(1, size + 1)):
                for causal in (False, True):
                    mask = masks.window(
                        1, size, 1, stride=(1, stride, 1), dilation=(1, dilation, 1), causal=(False, causal, False)
                    )
                    expected = expected_table(mask, (1, length, 1))
                    assert (mask.allowed((1, length, 1)).numpy() == expected).all(), f"{mask} on {length}"


def test_a_window_has_its_full_size_everywhere_and_an_even_one_reaches_further_back() -> None:
    allowed = masks.window(1, 1, 4).allowed((1, 1, 9)).numpy()
    assert (allowed.sum(1) == 4).all()
    assert np.flatnonzero(allowed[4]).tolist() == [2, 3, 4, 5]
    assert np.flatnonzero(allowed[0]).tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(allowed[8]).tolist() == [5, 6, 7, 8]


def test_a_stride_group_shares_the_window_of_its_leader() -> None:
    allowed = masks.window(1, 1, 5, stride=(1, 1, 3)).allowed((1, 1, 12)).numpy()
    for first in (3, 6):  # leaders 4 and 7
        for query in range(first, first + 3):
            assert np.flatnonzero(allowed[query]).tolist() == list(range(first - 1, first + 4))


def test_no_causal_window_sees_a_later_key() -> None:
    shape = (4, 5, 6)
    at = np.array(places(shape, list(range(120))))
    for causal in CAUSAL:
        allowed = masks.window(3, 4, 4, stride=(1, 2, 3), causal=causal).allowed(shape).numpy()
        for axis in range(3):
            later = at[:, axis] > at[:, axis, None]
            assert (allowed & later).any() != causal[axis]
        assert allowed.any(1).all()  # some key is always left


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("window", [None, 7, 9])
@pytest.mark.parametrize("sinks", [0, 1, 20])
def test_frame_causal_sees_its_chunk_the_latest_frames_and_the_sinks(
    chunk: int, window: int | None, sinks: int
) -> None:
    for frames in (1, 2, 5, 13):
        check_rows(masks.frame_causal(chunk, window, sinks), (frames, 2, 1))


@pytest.mark.parametrize("tile", [(1, 1, 1), (2, 3, 4), (1, 4, 5), (3, 7, 2), (9, 9, 9)])
def test_sliding_tiles_of_every_window_fit_ragged_grids(tile: Triple) -> None:
    shape = (4, 7, 9)
    counts = [-(-n // e) for n, e in zip(shape, tile, strict=True)]
    for size in itertools.product(*(sorted({1, min(2, count), count}) for count in counts)):
        check_rows(masks.sliding_tile(tile, size), shape, most=40)  # type: ignore[arg-type]


def test_bands_of_radial_that_are_nested_act_as_the_widest_one() -> None:
    for bands in (
        ((0, 9, 8), (1, 4, 5), (3, 3, 4), (None, 2, 1)),
        ((0, None, 8), (1, 8, 7), (2, 7, 6), (3, 1, 5), (4, 1, 1)),
        ((2, 3, None),),
    ):
        check_rows(masks.radial(bands), (9, 9, 11), most=120)


def test_numbers_beyond_all_grids_reach_to_the_end() -> None:
    """They stand for no limit; sums of 64-bit integers would wrap around."""
    shape = (5, 3, 4)
    for huge in (2**63 - 1, 2**70):
        for mask, want in (
            (masks.frame_causal(huge), masks.full()),
            (masks.frame_causal(2, huge), masks.frame_causal(2)),
            (masks.frame_causal(1, 2, huge), masks.frame_causal(1)),
            (masks.sliding_tile((huge, 1, 2), (1, 3, 2)), masks.sliding_tile((5, 1, 2), (1, 3, 2))),
            (masks.radial(((huge, 2, 2),)), masks.radial(((None, 2, 2),))),
        ):
            assert torch.equal(mask.allowed(shape), want.allowed(shape)), mask


def test_tables_with_empty_rows_and_bounds_beyond_the_axis_are_cut_to_it() -> None:
    mask = masks.tables(h=([-3, 2, 4, 9, 0], [1, 9, 2, 9, -1]))
    assert mask.allowed((1, 5, 1)).tolist() == [
        [True, True, False, False, False],
        [False, False, True, True, True],
        [False] * 5,
        [False] * 5,
        [False] * 5,
    ]
    check_rows(mask, (2, 5, 3))


@pytest.mark.parametrize("mask", COMBINED, ids=str)
def test_combined_masks_allow_what_their_parts_mean(mask: Mask) -> None:
    for shape in [RAGGED, (4, 6, 8), (5, 7, 10), (13, 11, 9)]:
        check_rows(mask, shape)


def test_operators_are_those_of_sets_for_all_pairs_of_masks() -> None:
    shape = (2, 3, 5)
    examples = [CONSTRUCTORS[name].examples(shape)[-1] for name in CONSTRUCTORS]
    for a, b in itertools.product(examples, repeat=2):
        left, right = a.allowed(shape), b.allowed(shape)
        assert torch.equal((a & b).allowed(shape), left & right), (a, b)
        assert torch.equal((a | b).allowed(shape), left | right), (a, b)  # type: ignore[union-attr]


# Global tokens.


@pytest.mark.parametrize("before, after", [(3, 0), (0, 4), (2, 3)])
@pytest.mark.parametrize("globals_see", ["all", "globals"])
def test_global_tokens_are_seen_by_all_and_see_what_was_asked(before: int, after: int, globals_see: str) -> None:
    grid = Grid(2, 3, 4, before, after)
    for mask in every_example(grid.shape):
        video = mask.allowed(grid.shape).numpy()
        found = mask.allowed(grid, globals_see=globals_see).numpy()
        for q in range(grid.tokens):
            for k in range(grid.tokens):
                qv, kv = (before <= each < before + 24 for each in (q, k))
                expected = video[q - before, k - before] if qv and kv else not kv or globals_see == "all"
                assert found[q, k] == expected, (mask, q, k)


def test_an_invalid_global_token_neither_sees_nor_is_seen() -> None:
    grid = Grid(2, 2, 3, 2, 3)
    valid = torch.tensor([True, False, False, True, True])
    everything = masks.window(1, 1, 1).allowed(grid)
    found = masks.window(1, 1, 1).allowed(grid, valid=valid)
    real = torch.tensor([True, False] + [True] * 12 + [False, True, True])
    assert torch.equal(found, everything & real[:, None] & real)
    assert not torch.equal(found, everything)


def test_some_queries_and_keys_are_a_part_of_all() -> None:
    grid = Grid(3, 4, 5, 2, 1)
    valid = torch.tensor([False, True, True])
    q, k = torch.tensor([62, 0, 7, 7, 33]), [1, 2, 60, 61]
    for mask in COMBINED[:3] + every_example(grid.shape)[:3]:
        if mask in COMBINED:
            grid, valid = Grid(*RAGGED, 2, 1), torch.tensor([False, True, True])
        whole = mask.allowed(grid, globals_see="globals", valid=valid)
        assert torch.equal(mask.allowed(grid, q, k, globals_see="globals", valid=valid), whole[q][:, k])


# Unions.


@pytest.mark.parametrize("mask", COMBINED, ids=str)
def test_no_key_counts_twice_in_a_union(mask: Mask) -> None:
    for shape in (RAGGED, (4, 6, 8)):
        allowed = mask.allowed(shape).numpy()
        assert round(mask.density(shape) * allowed.size) == allowed.sum()
        # Read in order, each product excluding what earlier ones allow, the products count every pair once.
        seen, counted = np.zeros_like(allowed), 0
        for t, h, w in mask.products(shape):
            found = np.einsum("ad,be,cf->abcdef", t.matrix(), h.matrix(), w.matrix()).reshape(allowed.shape)
            counted += (found & ~seen).sum()
            seen |= found
        assert (seen == allowed).all()
        assert counted == allowed.sum()


def test_products_that_add_nothing_are_left_out() -> None:
    shape = (4, 6, 8)
    assert len(masks.window(3, 3, 3).products(shape)) == 1
    assert len((masks.window(3, 3, 3) | masks.window(1, 3, 3) | masks.window(3, 3, 3)).products(shape)) == 1
    assert len((masks.window(1, 3, 3) | masks.window(3, 3, 3)).products(shape)) == 1
    assert len((masks.full() | masks.spatial()).products(shape)) == 1
    assert len((masks.spatial() | masks.temporal()).products(shape)) == 2
    assert (masks.frame_causal(1) & masks.tables(t=([4] * 4, [0] * 4))).products(shape) == ()


def test_products_count_their_keys_row_by_row() -> None:
    for shape in (RAGGED, (4, 6, 8)):
        for mask in [*COMBINED, *every_example(shape)]:
            for product in mask.products(shape):
                for rule in product:
                    assert (rule.counts() == rule.matrix().sum(1)).all(), mask


def test_more_than_eight_products_are_refused_by_name_and_eight_are_not() -> None:
    shape = (20, 3, 3)
    single = [masks.tables(t=([f] * 20, [f] * 20)) for f in range(0, 20, 2)]
    eight = single[0]
    for each in single[1:MAX_PRODUCTS]:
        eight = eight | each  # type: ignore[assignment]
    assert len(eight.pack(shape).steps) == MAX_PRODUCTS == 8
    check_rows(eight, shape)
    with pytest.raises(ValueError, match="a union of 9 products, more than 8"):
        (eight | single[MAX_PRODUCTS]).pack(shape)  # type: ignore[union-attr]
