"""The named masks: each is a way to fill the tables of three axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from stattn.grid import Triple, as_triple, check_positive, is_int
from stattn.masks.mask import Mask, named
from stattn.tables import Product, Rule, same, whole

AXES = "thw"


@named(lambda shape: [full()])
def full() -> Mask:
    """See every token."""
    return Mask("full()", lambda s: [(whole(s[0]), whole(s[1]), whole(s[2]))])


@named(lambda shape: [spatial()])
def spatial() -> Mask:
    """See the tokens of the same frame."""
    return Mask("spatial()", lambda s: [(same(s[0]), whole(s[1]), whole(s[2]))])


@named(lambda shape: [temporal()])
def temporal() -> Mask:
    """See the tokens at the same place in every frame."""
    return Mask("temporal()", lambda s: [(whole(s[0]), same(s[1]), same(s[2]))])


def _window_examples(shape: Triple) -> list[Mask]:
    odd = tuple(min(n, 3) for n in shape)
    even = tuple(max(1, min(n, 4) // 2 * 2) if n > 1 else 1 for n in shape)
    strided = tuple(max(1, n // 2) for n in shape)
    dilation = tuple(max(1, min(3, n // size)) for n, size in zip(shape, odd, strict=True))
    found = [window(*odd), window(*even), window(*shape), window(None, odd[1], even[2])]
    found.append(window(*strided, stride=tuple(max(1, (size + 1) // 2) for size in strided)))
    found.append(window(*odd, dilation=dilation))
    found.append(
        window(*odd, stride=tuple(min(2, size) for size in odd), dilation=dilation, causal=(True, False, True))
    )
    found.extend(window(*odd, causal=causal) for causal in itertools.product((False, True), repeat=3))
    return found


@named(_window_examples)
def window(
    t: int | None,
    h: int | None,
    w: int | None,
    *,
    stride: int | Triple = 1,
    dilation: int | Triple = 1,
    causal: bool | tuple[bool, bool, bool] = False,
) -> Mask:
    """See a window of t x h x w tokens around the query: NATTEN's generalised neighbourhood attention.

    t, h, w: the window's size on each axis, None for the whole axis. Near a border the window is shifted so that it
    stays inside the grid at full size; an even window reaches one further back than ahead. stride, dilation and causal
    hold for all axes, or are given as three. stride: this many neighbouring queries share one window, that of the
    middle one (of the last, when causal); at most the window's size. dilation: only every dilation-th key is seen,
    counted from the query. causal: no later key on that axis is seen.

    Raises ValueError when an axis is shorter than size * dilation. Follows Hassani et al., arXiv:2504.16922.
    """
    sizes = (t, h, w)
    strides, dilations = as_triple("stride", stride), as_triple("dilation", dilation)
    causals = causal if isinstance(causal, tuple) else (causal,) * 3
    if len(causals) != 3 or not all(isinstance(c, bool) for c in causals):
        raise TypeError(f"causal={causal!r} must be a boolean or three booleans")
    for axis, size, s, d in zip(AXES, sizes, strides, dilations, strict=True):
        if size is None:
            if (s, d) != (1, 1):
                raise ValueError(f"window {axis}=None is the whole axis and takes no stride={s} or dilation={d}")
            continue
        check_positive(f"window {axis}", size)
        if s > size:
            raise ValueError(
                f"stride={s} on axis {axis} exceeds the window's {size}: some keys would be seen by no query"
            )

    def build(shape: Triple) -> list[Product]:
        each_axis = zip(AXES, shape, sizes, strides, dilations, causals, strict=True)
        t_rule, h_rule, w_rule = (_neighbourhood(*axis) for axis in each_axis)
        return [(t_rule, h_rule, w_rule)]

    options = [f"{n}={v}" for n, v, d in (("stride", strides, (1, 1, 1)), ("dilation", dilations, (1, 1, 1))) if v != d]
    options += [f"causal={causals}"] if any(causals) else []
    return Mask(f"window({', '.join([f'{t}, {h}, {w}', *options])})", build)


@named(
    lambda shape: [
        sliding_tile(tile, tuple(min(most, -(-n // e)) for n, e in zip(shape, tile, strict=True)))
        for tile, most in ((tuple(max(1, (n + 2) // 3) for n in shape), 3), ((2, 3, 4), 2), ((1, 2, 2), 3))
    ]
)
def sliding_tile(tile: Triple, window: Triple) -> Mask:
    """See a window of whole tiles around the query's tile.

    tile: extents (t, h, w) in tokens; the last tile of an axis may be short. window: the window's size in tiles per
    axis, centred on the query's tile and clamped so that it stays inside the grid.

    Raises ValueError when an axis has fewer tiles than the window. Follows Zhang et al., arXiv:2502.04507, without its
    need for grids that the tile divides.
    """
    tile, sizes = as_triple("tile", tile), as_triple("window", window)

    def rule(axis: str, length: int, extent: int, size: int) -> Rule:
        count = -(-length // extent)
        if size > count:
            raise ValueError(
                f"sliding_tile window={size} on axis {axis} exceeds its {count} tiles of {extent} (length {length})"
            )
        lo, hi, _ = _neighbourhood(axis, count, size, 1, 1, False)
        extent = min(extent, length)
        own = np.arange(length) // extent
        return Rule(lo[own] * extent, np.minimum((hi[own] + 1) * extent, length) - 1, 1)

    def build(shape: Triple) -> list[Product]:
        t, h, w = (rule(*each) for each in zip(AXES, shape, tile, sizes, strict=True))
        return [(t, h, w)]

    return Mask(f"sliding_tile({tile}, {sizes})", build)


@named(
    lambda shape: [
        frame_causal(1),
        frame_causal(2),
        frame_causal(3, window=3),
        frame_causal(2, window=4, sink_frames=1),
        frame_causal(1, window=2, sink_frames=3),
    ]
)
def frame_causal(chunk: int, window: int | None = None, sink_frames: int = 0) -> Mask:
    """See the frames of the query's chunk and earlier ones: causal by blocks of frames, for autoregressive video.

    chunk: the number of frames that are generated together and see each other. window: how many of the latest frames
    are seen, the query's chunk included; all when None. sink_frames: the number of first frames that stay visible
    however far back they are.
    """
    check_positive("chunk", chunk)
    if window is not None:
        check_positive("window", window)
        if window < chunk:
            raise ValueError(f"window={window} frames must hold the own chunk={chunk}")
    if not is_int(sink_frames) or sink_frames < 0:
        raise ValueError(f"sink_frames={sink_frames!r} must be a non-negative integer")

    def build(shape: Triple) -> list[Product]:
        frames, h, w = shape
        own = min(chunk, frames)
        last = np.minimum((np.arange(frames) // own + 1) * own, frames) - 1
        first = np.zeros_like(last) if window is None else np.maximum(last + 1 - min(window, frames), 0)
        found = [(Rule(first, last, 1), whole(h), whole(w))]
        if sink_frames and window is not None:
            sinks = Rule(np.zeros_like(last), np.minimum(last, min(sink_frames, frames) - 1), 1)
            found.append((sinks, whole(h), whole(w)))
        return found

    options = [f"window={window}"] if window is not None else []
    options += [f"sink_frames={sink_frames}"] if sink_frames else []
    return Mask(f"frame_causal({', '.join([str(chunk), *options])})", build)


@named(
    lambda shape: [
        radial(((0, None, None), (None, min(2, shape[1]), min(2, shape[2])))),
        radial(((0, None, None), (1, min(3, shape[1]), min(3, shape[2])), (3, 1, min(2, shape[2])))),
    ]
)
def radial(bands: Sequence[tuple[int | None, int | None, int | None]]) -> Mask:
    """See a smaller window the further away a frame is.

    bands: (frames, h, w) each: up to that many frames away, the query sees a window of h x w. Distances grow and
    windows shrink from band to band; None as a distance is any, None as a window the whole axis.

    The idea is that of Radial Attention (Li et al., arXiv:2506.19852); the 2-D windows are ours, in place of its 1-D
    bands.
    """
    triples = isinstance(bands, Sequence) and all(isinstance(band, Sequence) and len(band) == 3 for band in bands)
    if not triples or not bands:
        raise ValueError(f"bands={bands!r} must be (frames, h, w) triples, at least one")
    for distance, h, w in bands:
        if distance is not None and (not is_int(distance) or distance < 0):
            raise ValueError(f"bands={bands!r}: distance {distance!r} must be a non-negative integer or None")
        for name, size in (("h", h), ("w", w)):
            if size is not None:
                check_positive(f"bands={bands!r}: window {name}", size)
    plain = tuple(tuple(None if each is None else int(each) for each in band) for band in bands)
    infinite = [tuple(math.inf if each is None else each for each in band) for band in plain]
    for near, far in itertools.pairwise(infinite):
        if far[0] <= near[0] or far[1] > near[1] or far[2] > near[2]:
            raise ValueError(f"bands={bands!r}: distances must grow and windows must not, from each band to the next")

    def build(shape: Triple) -> list[Product]:
        frames = np.arange(shape[0])
        found = []
        for distance, h, w in plain:
            reach = shape[0] if distance is None else min(distance, shape[0])
            near = Rule(np.maximum(frames - reach, 0), np.minimum(frames + reach, shape[0] - 1), 1)
            h_rule = _neighbourhood("h", shape[1], h, 1, 1, False)
            found.append((near, h_rule, _neighbourhood("w", shape[2], w, 1, 1, False)))
        return found

    return Mask(f"radial({plain})", build)


AxisTable = Sequence[Sequence[int]]


@named(
    lambda shape: [
        tables(t=([max(0, x - 1) for x in range(shape[0])], list(range(shape[0])))),
        tables(h=([shape[1]] * (shape[1] // 2) + [0] * (shape[1] - shape[1] // 2), [shape[1] - 1] * shape[1])),
    ]
)
def tables(t: AxisTable | None = None, h: AxisTable | None = None, w: AxisTable | None = None) -> Mask:
    """See what tables of your own allow.

    t, h, w: (lo, hi), one entry per coordinate and both inclusive; None is the whole axis.
    A row with lo > hi sees nothing. Fits only grids whose axes have the tables' lengths.
    """
    pairs: list[tuple[tuple[int, ...], ...] | None] = []
    for axis, table in zip(AXES, (t, h, w), strict=True):
        if table is None:
            pairs.append(None)
            continue
        try:
            pair = tuple(tuple(bounds) for bounds in table)
        except TypeError:
            raise TypeError(f"tables {axis}={table!r} must be (lo, hi), a sequence of integers each") from None
        if len(pair) != 2 or len(pair[0]) != len(pair[1]) or not pair[0]:
            raise ValueError(f"tables {axis}={table!r} must be (lo, hi) of equal length, one entry per coordinate")
        if not all(is_int(x) for bounds in pair for x in bounds):
            raise TypeError(f"tables {axis}={table!r} must hold integers")
        pairs.append(tuple(tuple(int(x) for x in bounds) for bounds in pair))

    def rule(axis: str, length: int, pair: tuple[tuple[int, ...], ...] | None) -> Rule:
        if pair is None:
            return whole(length)
        if len(pair[0]) != length:
            raise ValueError(f"tables {axis} has {len(pair[0])} entries, the grid's axis {length}")
        lo, hi = (np.asarray(bounds) for bounds in pair)
        return Rule(np.maximum(lo, 0), np.minimum(hi, length - 1), 1)

    options = [f"{axis}={pair}" for axis, pair in zip(AXES, pairs, strict=True) if pair is not None]

    def build(shape: Triple) -> list[Product]:
        t_rule, h_rule, w_rule = (rule(*each) for each in zip(AXES, shape, pairs, strict=True))
        return [(t_rule, h_rule, w_rule)]

    return Mask(f"tables({', '.join(options)})", build)


def _neighbourhood(axis: str, length: int, size: int | None, stride: int, dilation: int, causal: bool) -> Rule:
    """Fill the tables of one axis of ``window``."""
    x = np.arange(length)
    if size is None:
        lo, hi = np.zeros(length, int), np.full(length, length - 1)
        return Rule(lo, np.minimum(hi, x) if causal else hi, 1)
    if size * dilation > length:
        raise ValueError(f"window {axis}={size} with dilation={dilation} exceeds its axis of length {length}")
    residue, place = x % dilation, x // dilation
    members = (length - residue + dilation - 1) // dilation  # of the residue class
    group = place // stride * stride
    leader = np.minimum(group + (stride - 1 if causal else stride // 2), members - 1)
    if causal:
        first, last = np.maximum(leader - size + 1, 0), place
    else:
        first = np.clip(leader - size // 2, 0, members - size)
        last = first + size - 1
    return Rule(first * dilation + residue, last * dilation + residue, dilation)
