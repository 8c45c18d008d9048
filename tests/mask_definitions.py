"""What the named masks mean, written out query by query and apart from ``stattn.masks``: no tables, no vectors.

``definition(mask)`` reads a mask's key and returns a function of (grid shape, query) that marks the keys that are seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import numpy as np

from stattn import masks
from stattn.masks import CONSTRUCTORS, Mask

Triple = tuple[int, int, int]


class Definition:
    """A function from (shape, query) to booleans of that shape, with the operators of masks."""

    def __init__(self, sees: Callable[[Triple, Triple], np.ndarray]):
        self.sees = sees

    def __call__(self, shape: Triple, query: Triple) -> np.ndarray:
        return self.sees(shape, query)

    def __and__(self, other: Definition) -> Definition:
        return Definition(lambda shape, query: self(shape, query) & other(shape, query))

    def __or__(self, other: Definition) -> Definition:
        return Definition(lambda shape, query: self(shape, query) | other(shape, query))


def definition(mask: Mask) -> Definition:
    """Evaluate a mask's key with the definitions in place of the constructors."""
    return eval(mask.key, {"__builtins__": {}}, dict(DEFINITIONS))


def marked(shape: Triple, boxes: Iterable[tuple[list[int], list[int], list[int]]]) -> np.ndarray:
    row = np.zeros(shape, bool)
    for t, h, w in boxes:
        row[np.ix_(t, h, w)] = True
    return row


def full() -> Definition:
    return Definition(lambda shape, query: np.ones(shape, bool))


def spatial() -> Definition:
    def sees(shape: Triple, query: Triple) -> np.ndarray:
        row = np.zeros(shape, bool)
        row[query[0]] = True
        return row

    return Definition(sees)


def temporal() -> Definition:
    def sees(shape: Triple, query: Triple) -> np.ndarray:
        row = np.zeros(shape, bool)
        row[:, query[1], query[2]] = True
        return row

    return Definition(sees)


def centred(length: int, centre: int, size: int) -> list[int]:
    """A window with size // 2 places before the centre, slid until it lies on the axis."""
    start = centre - size // 2
    while start < 0:
        start += 1
    while start + size > length:
        start -= 1
    return list(range(start, start + size))


def neighbours(length: int, x: int, size: int | None, stride: int, dilation: int, causal: bool) -> list[int]:
    """NATTEN's generalised neighbourhood of x on one axis."""
    if size is None:
        return [y for y in range(length) if not causal or y <= x]
    members = [y for y in range(length) if y % dilation == x % dilation]
    place = members.index(x)
    group = range(place - place % stride, place - place % stride + stride)
    if causal:
        leader = min(group[-1], len(members) - 1)
        return [members[p] for p in range(len(members)) if leader - size < p <= place]
    leader = min(group[len(group) // 2], len(members) - 1)
    return [members[p] for p in centred(len(members), leader, size)]


def window(
    t: int | None, h: int | None, w: int | None, stride: object = 1, dilation: object = 1, causal: object = False
) -> Definition:
    strides, dilations, causals = (x if isinstance(x, tuple) else (x, x, x) for x in (stride, dilation, causal))

    def sees(shape: Triple, query: Triple) -> np.ndarray:
        axes = zip(shape, query, (t, h, w), strides, dilations, causals, strict=True)
        return marked(shape, [tuple(neighbours(*axis) for axis in axes)])

    return Definition(sees)


def sliding_tile(tile: Triple, size: Triple) -> Definition:
    def sees(shape: Triple, query: Triple) -> np.ndarray:
        axes = []
        for length, x, extent, many in zip(shape, query, tile, size, strict=True):
            owners = [y // extent for y in range(length)]
            wanted = centred(owners[-1] + 1, owners[x], many)
            axes.append([y for y in range(length) if owners[y] in wanted])
        return marked(shape, [tuple(axes)])

    return Definition(sees)


def frame_causal(chunk: int, window: int | None = None, sink_frames: int = 0) -> Definition:
    def sees(shape: Triple, query: Triple) -> np.ndarray:
        row = np.zeros(shape, bool)
        last = max(f for f in range(shape[0]) if f // chunk == query[0] // chunk)  # of the query's chunk
        for frame in range(last + 1):
            if window is None or last - frame < window or frame < sink_frames:
                row[frame] = True
        return row

    return Definition(sees)


def radial(bands: tuple[tuple[int | None, int | None, int | None], ...]) -> Definition:
    def sees(shape: Triple, query: Triple) -> np.ndarray:
        row = np.zeros(shape, bool)
        for frame in range(shape[0]):
            away = abs(frame - query[0])
            for distance, *sizes in bands:
                if distance is None or away <= distance:
                    h, w = (
                        list(range(length)) if size is None else centred(length, x, size)
                        for length, x, size in zip(shape[1:], query[1:], sizes, strict=True)
                    )
                    row[np.ix_([frame], h, w)] = True
                    break  # the nearest band has the widest window
        return row

    return Definition(sees)


def tables(t: object = None, h: object = None, w: object = None) -> Definition:
    def sees(shape: Triple, query: Triple) -> np.ndarray:
        axes = []
        for length, x, table in zip(shape, query, (t, h, w), strict=True):
            low, high = (0, length - 1) if table is None else (table[0][x], table[1][x])  # type: ignore[index]
            axes.append([y for y in range(length) if low <= y <= high])
        return marked(shape, [tuple(axes)])

    return Definition(sees)


DEFINITIONS: dict[str, Callable[..., Definition]] = {
    each.__name__: each for each in (full, spatial, temporal, window, sliding_tile, frame_causal, radial, tables)
}


# What the tests look at.

RAGGED = (3, 5, 7)

# Unions and intersections that fit every grid of at least (3, 5, 7).
COMBINED = [
    masks.spatial() | masks.temporal(),
    masks.window(1, 3, 3) | masks.window(3, 1, 3),
    masks.window(3, 4, 3) | masks.window(2, 5, 2),
    masks.window(1, 2, 3, dilation=(1, 2, 2)) | masks.window(3, 3, 3),
    masks.window(1, 2, 3, dilation=(1, 2, 2)) | masks.window(1, 1, 2, dilation=(1, 1, 3)),
    masks.frame_causal(2, window=2, sink_frames=1) | masks.window(3, 3, 3),
    masks.spatial() | masks.temporal() | masks.window(3, 3, 3, causal=True),
    masks.frame_causal(1) & masks.window(3, 3, 3),
    masks.window(1, 2, 3, dilation=(1, 2, 2)) & masks.window(1, 1, 2, dilation=(1, 1, 3)),
    (masks.spatial() | masks.temporal()) & masks.window(3, 4, 5),
    (masks.spatial() | masks.window(3, 3, 3)) & (masks.frame_causal(1) | masks.temporal()),
    masks.spatial() & masks.temporal(),
]


def places(shape: Triple, tokens: list[int]) -> list[Triple]:
    return [tuple(int(each) for each in np.unravel_index(token, shape)) for token in tokens]  # type: ignore[misc]


def some_tokens(shape: Triple, most: int) -> list[int]:
    """All tokens of a small grid; of a larger one the corners and others at random."""
    count = int(np.prod(shape))
    if count <= most:
        return list(range(count))
    corners = {int(np.ravel_multi_index(at, shape)) for at in itertools.product(*((0, n - 1) for n in shape))}
    return sorted(corners | set(np.random.permutation(count)[:most].tolist()))


def every_example(shape: Triple) -> list[Mask]:
    return [mask for constructor in CONSTRUCTORS.values() for mask in constructor.examples(shape)]
