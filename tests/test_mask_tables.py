"""Every way to read a mask against ``allowed``: keys, packed tables, tiles, densities; and what masks refuse."""

from __future__ import annotations

import copy
import pickle
import re
import time

import numpy as np
import pytest
import torch
from mask_definitions import COMBINED, RAGGED, Triple, every_example, places

from stattn import masks
from stattn.grid import Grid
from stattn.masks import CONSTRUCTORS, EMPTY, FULL, PARTIAL, Mask
from stattn.masks.mask import _pack, _products
from stattn.tables import Rule, is_same, is_whole, same, tighten, whole

# Keys.


def test_every_key_builds_its_mask_again() -> None:
    for shape in (RAGGED, (4, 6, 8)):
        for mask in [*COMBINED, *every_example(shape)]:
            again = masks.parse(mask.key)
            assert again.key == mask.key
            assert again == mask
            assert hash(again) == hash(mask)
            assert again.pack(shape) == mask.pack(shape)
            assert repr(mask) == mask.key


def test_masks_survive_pickling_and_copying() -> None:
    for mask in [*COMBINED, *every_example(RAGGED)]:
        for again in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)):
            assert again == mask
            assert torch.equal(again.allowed(RAGGED), mask.allowed(RAGGED))
        packed = mask.pack(RAGGED)
        assert pickle.loads(pickle.dumps(packed)) == packed


def test_masks_are_equal_by_value() -> None:
    assert masks.window(3, 5, 7) == masks.window(3, 5, 7, stride=1, dilation=(1, 1, 1), causal=False)
    assert masks.window(3, 3, 3, stride=2) == masks.window(3, 3, 3, stride=(2, 2, 2))
    assert masks.window(np.int64(3), 3, 3) == masks.window(3, np.int32(3), 3)  # type: ignore[arg-type]
    assert masks.radial([[np.int64(1), None, 3]]) == masks.radial(((1, None, 3),))  # type: ignore[list-item]
    assert masks.tables(h=[[0, np.int64(0)], np.array([1, 1])]) == masks.tables(h=((0, 0), (1, 1)))  # type: ignore[list-item]
    assert len({masks.full(), masks.full(), masks.spatial()}) == 2
    assert masks.window(3, 5, 7) != masks.window(3, 7, 5)
    assert masks.window(3, 5, 7) != "window(3, 5, 7)"


def test_packed_tables_are_equal_by_value_across_masks() -> None:
    assert masks.window(4, 6, 8).pack((4, 6, 8)) == masks.full().pack((4, 6, 8))
    assert hash(masks.window(4, 6, 8).pack((4, 6, 8))) == hash(masks.full().pack((4, 6, 8)))
    assert masks.window(3, 6, 8).pack((4, 6, 8)) != masks.full().pack((4, 6, 8))


@pytest.mark.parametrize(
    "key",
    [
        "window(3, 3",
        "windows(3, 3, 3)",
        "window(3, 3)",
        "window(3, 3, 3, size=4)",
        "window(3, 3, 3, **{'stride': 2})",
        "window(3, 3, x)",
        "window(3.5, 3, 3)",
        "masks.full()",
        "full",
        "full() + full()",
        "~full()",
        "__import__('os')",
        "",
    ],
)
def test_a_key_that_builds_no_mask_is_refused(key: str) -> None:
    assert masks.parse("(full() & window(3, 3, 3, stride=2))").allowed(RAGGED).any()
    with pytest.raises(ValueError, match=re.escape(f"mask {key!r}")):
        masks.parse(key)


def test_a_key_that_is_no_string_is_refused() -> None:
    with pytest.raises(TypeError, match="key=None must be a string"):
        masks.parse(None)  # type: ignore[arg-type]


# Tables, tiles, density.


def decoded(mask: Mask, shape: Triple) -> np.ndarray:
    """What the packed bytes allow, read with nothing but their documented layout. Booleans [video, video]"""
    packed = mask.pack(shape)
    numbers = np.frombuffer(packed.data, np.dtype("<i4")).reshape(len(packed.steps), 2, sum(shape))
    total = np.zeros((int(np.prod(shape)),) * 2, bool)
    for (lo, hi), steps in zip(numbers, packed.steps, strict=True):
        inside, start = np.ones((*shape, *shape), bool), 0
        for axis, (length, step) in enumerate(zip(shape, steps, strict=True)):
            see = np.zeros((length, length), bool)
            for x in range(length):
                for y in range(length):
                    see[x, y] = lo[start + x] <= y <= hi[start + x] and (y - x) % step == 0
            view = [1] * 6
            view[axis] = view[axis + 3] = length
            inside &= see.reshape(view)
            start += length
        total |= inside.reshape(total.shape)
    return total


def test_packed_tables_describe_exactly_what_is_allowed() -> None:
    for shape in ((1, 1, 1), (1, 1, 7), RAGGED, (4, 6, 8), (1, 9, 13)):
        for mask in [*(COMBINED if shape >= RAGGED else []), *every_example(shape)]:
            assert (decoded(mask, shape) == mask.allowed(shape).numpy()).all(), f"{mask} on {shape}"


def test_packed_bounds_are_members_of_their_class_inside_the_grid() -> None:
    for shape in (RAGGED, (4, 6, 8)):
        for mask in [*COMBINED, *every_example(shape)]:
            for product in mask.pack(shape).products():
                for rule, length in zip(product, shape, strict=True):
                    x = np.arange(length)
                    empty = rule.lo > rule.hi
                    assert (rule.lo[empty] == length).all()
                    assert (rule.hi[empty] == -1).all()
                    assert ((rule.lo >= 0) & (rule.hi < length))[~empty].all()
                    assert ((rule.lo - x) % rule.step == 0)[~empty].all()
                    assert ((rule.hi - x) % rule.step == 0)[~empty].all()


def test_the_packed_tensor_holds_the_tables_and_is_made_once() -> None:
    packed = COMBINED[0].pack(RAGGED)
    tensor = packed.tensor("cpu")
    assert tensor.dtype == torch.int32
    assert tuple(tensor.shape) == (2, 2, sum(RAGGED))
    assert (tensor.numpy() == packed.tables).all()
    assert packed.tensor("cpu") is tensor


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_packing_at_video_length_is_small_and_quick(name: str) -> None:
    shape = (33, 45, 80)
    for mask in CONSTRUCTORS[name].examples(shape):
        seconds = []
        for _ in range(9):
            _pack.cache_clear()
            _products.cache_clear()
            start = time.perf_counter()
            packed = mask.pack(shape)
            seconds.append(time.perf_counter() - start)
        assert len(packed.data) < 1 << 20
        assert min(seconds) < 1e-3, mask  # some 0.1 ms; the median would time other processes, too
        assert mask.pack(shape) is packed


def test_global_tokens_do_not_change_the_tables() -> None:
    assert masks.window(3, 3, 3).pack(Grid(4, 6, 8, 5, 7)) is masks.window(3, 3, 3).pack((4, 6, 8))


@pytest.mark.parametrize("globals_", [(0, 0), (2, 3)])
def test_density_is_the_share_of_allowed_pairs(globals_: tuple[int, int]) -> None:
    for shape in (RAGGED, (4, 6, 8), (2, 3, 5), (1, 1, 1)):
        grid = Grid(*shape, *globals_)
        for mask in [*(COMBINED if shape >= RAGGED else []), *every_example(shape)]:
            assert mask.density(grid) == pytest.approx(mask.allowed(grid).double().mean().item(), rel=1e-12), mask


def test_density_at_video_length_is_exact() -> None:
    assert masks.full().density((33, 45, 80)) == 1.0
    assert masks.spatial().density((33, 45, 80)) == pytest.approx(1 / 33, rel=1e-12)
    assert masks.window(7, 9, 16).density((33, 45, 80)) == pytest.approx(7 * 9 * 16 / (33 * 45 * 80), rel=1e-12)


TILES = [
    ((1, 1, 1), (1, 1, 1)),
    ((2, 2, 2), (2, 3, 4)),
    ((1, 4, 4), (2, 2, 2)),
    ((3, 5, 3), (1, 9, 9)),
    ((9, 9, 9), (2, 1, 3)),
]


@pytest.mark.parametrize("q_tile, k_tile", TILES)
def test_tiles_are_full_partial_or_empty_as_their_pairs_say(q_tile: Triple, k_tile: Triple) -> None:
    for shape in (RAGGED, (4, 6, 8)):
        members = []  # booleans [tiles, tokens]
        for tile in (q_tile, k_tile):
            counts = [-(-n // e) for n, e in zip(shape, tile, strict=True)]
            at = np.array(places(shape, list(range(int(np.prod(shape)))))) // tile
            members.append(np.ravel_multi_index(at.T, counts) == np.arange(np.prod(counts))[:, None])
        sizes = members[0].sum(1)[:, None] * members[1].sum(1)
        for mask in [*COMBINED, *every_example(shape)]:
            seen = members[0].astype(int) @ mask.allowed(shape).numpy().astype(int) @ members[1].T.astype(int)
            expected = np.where(seen == sizes, FULL, np.where(seen > 0, PARTIAL, EMPTY))
            kinds = mask.tiles(shape, q_tile, k_tile)
            assert kinds.dtype == np.int8
            assert kinds.shape == expected.shape
            assert (kinds == expected).all(), mask


def test_a_mask_that_allows_nothing_has_empty_tiles_and_no_density() -> None:
    nothing = masks.tables(w=([5] * 8, [2] * 8))
    assert not nothing.allowed((4, 6, 8)).any()
    assert nothing.density((4, 6, 8)) == 0
    assert nothing.tiles((4, 6, 8), (2, 2, 2), (2, 3, 4)).shape == (24, 8)
    assert (nothing.tiles((4, 6, 8), (2, 2, 2), (2, 3, 4)) == EMPTY).all()
    assert nothing.pack((4, 6, 8)).steps == ()


# Errors.

# Per constructor: arguments that work on (4, 6, 8), and changes that do not, with what the message must name.
Options = dict[str, object]
REFUSED: dict[str, tuple[Options, list[tuple[Options, type[Exception], str]]]] = {
    "full": ({}, [({"size": 3}, TypeError, "size")]),
    "spatial": ({}, [({"size": 3}, TypeError, "size")]),
    "temporal": ({}, [({"size": 3}, TypeError, "size")]),
    "window": (
        {"t": 2, "h": 3, "w": 4},
        [
            ({"t": 5}, ValueError, "window t=5 .*exceeds its axis of length 4"),
            ({"h": 7}, ValueError, "window h=7 .*exceeds its axis of length 6"),
            ({"w": 9}, ValueError, "window w=9 .*exceeds its axis of length 8"),
            ({"dilation": (1, 3, 1)}, ValueError, "window h=3 with dilation=3 exceeds"),
            ({"h": 0}, ValueError, "window h=0"),
            ({"w": -1}, ValueError, "window w=-1"),
            ({"w": 2.0}, TypeError, "window w=2.0"),
            ({"w": True}, TypeError, "window w=True"),
            ({"stride": 3}, ValueError, "stride=3 on axis t exceeds the window's 2"),
            ({"stride": 0}, ValueError, "stride=0"),
            ({"stride": (1, 2)}, TypeError, "stride="),
            ({"dilation": (1, 0, 1)}, ValueError, "dilation=0"),
            ({"dilation": 1.0}, TypeError, "dilation=1.0"),
            ({"t": None, "stride": (2, 1, 1)}, ValueError, "window t=None .*stride=2"),
            ({"t": None, "dilation": (2, 1, 1)}, ValueError, "window t=None .*dilation=2"),
            ({"causal": 1}, TypeError, "causal=1"),
            ({"causal": (True, False)}, TypeError, "causal="),
            ({"is_causal": True}, TypeError, "is_causal"),
        ],
    ),
    "sliding_tile": (
        {"tile": (2, 3, 4), "window": (2, 2, 1)},
        [
            ({"window": (3, 2, 1)}, ValueError, "window=3 on axis t exceeds its 2 tiles of 2"),
            ({"window": (2, 2, 3)}, ValueError, "window=3 on axis w exceeds its 2 tiles of 4"),
            ({"window": (2, 0, 1)}, ValueError, "window=0"),
            ({"tile": (2, 3)}, TypeError, "tile="),
            ({"tile": (2, 3, 0)}, ValueError, "tile=0"),
            ({"tile": (2, 3, 4.0)}, TypeError, "tile=4.0"),
        ],
    ),
    "frame_causal": (
        {"chunk": 2, "window": 3, "sink_frames": 1},
        [
            ({"chunk": 0}, ValueError, "chunk=0"),
            ({"chunk": 1.5}, TypeError, "chunk=1.5"),
            ({"window": 1}, ValueError, "window=1 frames must hold the own chunk=2"),
            ({"window": True}, TypeError, "window=True"),
            ({"sink_frames": -1}, ValueError, "sink_frames=-1"),
            ({"sink_frames": None}, ValueError, "sink_frames=None"),
        ],
    ),
    "radial": (
        {"bands": ((0, None, None), (1, 3, 3))},
        [
            ({"bands": ()}, ValueError, r"bands=\(\)"),
            ({"bands": ((0, 3),)}, ValueError, "bands="),
            ({"bands": (1, 2, 3)}, ValueError, r"bands=\(1, 2, 3\)"),
            ({"bands": ((-1, 3, 3),)}, ValueError, "distance -1"),
            ({"bands": ((0, 3, 0),)}, ValueError, "window w=0"),
            ({"bands": ((0, 2.0, 3),)}, TypeError, "window h=2.0"),
            ({"bands": ((1, 3, 3), (1, 2, 2))}, ValueError, "distances must grow"),
            ({"bands": ((0, 2, 2), (1, 3, 2))}, ValueError, "windows must not"),
            ({"bands": ((None, 2, 2), (1, 2, 2))}, ValueError, "distances must grow"),
            ({"bands": ((0, 7, 3),)}, ValueError, "window h=7"),
        ],
    ),
    "tables": (
        {"t": ((0, 0, 1, 2), (1, 2, 3, 3))},
        [
            ({"t": ((0, 0, 1), (1, 2, 3))}, ValueError, "tables t has 3 entries, the grid's axis 4"),
            ({"w": ((0,) * 4, (3,) * 4)}, ValueError, "tables w has 4 entries, the grid's axis 8"),
            ({"t": ((0, 0, 1, 2), (1, 2, 3))}, ValueError, "tables t="),
            ({"t": ((0, 0, 1, 2),)}, ValueError, "tables t="),
            ({"h": ((), ())}, ValueError, "tables h="),
            ({"t": 3}, TypeError, r"tables t=3 must be \(lo, hi\)"),
            ({"w": ([0, 1], 5)}, TypeError, r"tables w=\(\[0, 1\], 5\) must be \(lo, hi\)"),
            ({"t": ((0, 0, 1, 2), (1, 2, 3, 3.5))}, TypeError, "tables t=.*integers"),
        ],
    ),
}


def test_every_constructor_has_arguments_that_it_refuses() -> None:
    assert set(REFUSED) == set(CONSTRUCTORS)


@pytest.mark.parametrize(
    "name, change, error, message", [(name, *each) for name, (_, changes) in REFUSED.items() for each in changes]
)
def test_a_wrong_argument_of_a_constructor_is_named(
    name: str, change: Options, error: type[Exception], message: str
) -> None:
    good, _ = REFUSED[name]
    assert CONSTRUCTORS[name].make(**good).allowed((4, 6, 8)).any()
    with pytest.raises(error, match=message):
        CONSTRUCTORS[name].make(**{**good, **change}).pack((4, 6, 8))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"q": [-1]}, "q has tokens from -1"),
        ({"q": [0.5]}, "q of torch.float32 must hold token indices"),
        ({"k": [True]}, "k of torch.bool must hold token indices"),
        ({"k": [0, 29]}, "k has tokens from 0 to 29, the grid 0 to 28"),
        ({"q": [[0]]}, r"q of shape \(1, 1\) must be a list of token indices"),
        ({"k": 3}, r"k of shape \(\) must be a list of token indices"),
        ({"globals_see": "video"}, "globals_see='video'"),
        ({"valid": [True] * 5}, "valid of list must be a tensor of booleans"),
        ({"valid": torch.ones(5)}, "valid of torch.float32 must be a tensor of booleans"),
        ({"valid": torch.ones(1).bool()}, r"valid of shape \(1,\) must be \[before \+ after\] = \(5,\)"),
    ],
)
def test_allowed_refuses_what_the_grid_has_not(options: Options, message: str) -> None:
    grid = Grid(2, 3, 4, 2, 3)
    assert masks.full().allowed(grid, [0, 28], [28], globals_see="globals").shape == (2, 1)
    with pytest.raises((ValueError, TypeError), match=message):
        masks.full().allowed(grid, **options)  # type: ignore[arg-type]


def test_masks_combine_with_masks_only() -> None:
    for operate in (lambda a, b: a & b, lambda a, b: a | b):
        assert isinstance(operate(masks.full(), masks.spatial()), Mask)
        with pytest.raises(TypeError):
            operate(masks.full(), "spatial()")


@pytest.mark.parametrize("tile", [(2, 2), (0, 1, 1), (1.0, 1, 1), 8])
def test_tiles_of_no_extent_are_refused(tile: object) -> None:
    masks.full().tiles(RAGGED, (2, 2, 2), (1, 1, 1))
    for tiles in ({"q_tile": tile, "k_tile": (1, 1, 1)}, {"q_tile": (1, 1, 1), "k_tile": tile}):
        with pytest.raises((TypeError, ValueError), match="_tile="):
            masks.full().tiles(RAGGED, **tiles)  # type: ignore[arg-type]


# Rules of one axis.


def rule(lo: list[int], hi: list[int], step: int = 1) -> Rule:
    return Rule(np.array(lo, np.int32), np.array(hi, np.int32), step)


def test_a_rule_is_whole_only_if_every_query_sees_every_key() -> None:
    assert is_whole(whole(3))
    assert is_whole(rule([0, 0, 0], [2, 2, 2]))
    for narrower in (rule([0, 1, 0], [2, 2, 2]), rule([0, 0, 0], [2, 1, 2]), rule([0, 0, 0], [2, 2, 2], 2), same(3)):
        assert not is_whole(narrower)
    assert is_same(same(3))
    assert not is_same(rule([0, 0, 2], [0, 1, 2]))
    assert not is_same(rule([0, 1, 2], [0, 2, 2]))


def test_bounds_are_moved_to_keys_that_the_step_allows_and_a_step_that_none_takes_is_dropped() -> None:
    tight = tighten(rule([0, 0, 0, 2], [3, 3, 3, 2], 2))
    assert (tight.lo.tolist(), tight.hi.tolist(), tight.step) == ([0, 1, 0, 4], [2, 3, 2, -1], 2)
    alone = tighten(rule([0, 0, 1], [1, 1, 2], 3))
    assert (alone.lo.tolist(), alone.hi.tolist(), alone.step) == ([0, 1, 2], [0, 1, 2], 1)
