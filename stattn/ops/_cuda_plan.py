"""Plans for the CUDA kernels: which boxes of keys each tile of queries visits, and what rows see of a box seen in part.

A plan is made once per problem, on the host, from the tables of its masks. Its layout is that of csrc/attention_fwd.h.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from stattn import plan
from stattn.grid import Region, Triple
from stattn.masks import Mask, full
from stattn.ops._cuda_mask_table import MaskTable
from stattn.ops._cuda_tiles import (
    AXES,
    ROWS,
    Boxes,
    Rows,
    Tiling,
    Visits,
    choose,
    common_steps,
    cut_list,
    from_multiples,
    in_boxes,
    product_of,
    rows_of,
    tile_counts,
    triple,
    visit,
)
from stattn.problem import Problem
from stattn.tables import Product, intersect, whole

BEFORE, AFTER, NONE = 1, 2, 3  # kinds of tiles
DENSE_BOX = 80  # keys
MOST_FRAMES = 8192  # of a ring cache's grid
_FULL = full()
UNSEEN = -1  # marks a box of which a warpgroup sees nothing


class Line(NamedTuple):
    """The line of all tokens, where global ones lie before and after the video.

    video: keys of the video. queries: whether q holds global tokens. see: what these see, "all" or "globals". valid:
    whether a call says which of them are real. frames: whether it says which frames the keys hold.
    """

    before: int
    after: int
    video: int
    queries: bool
    see: str
    valid: bool
    frames: bool = False


@lru_cache(maxsize=512)
def why_not(problem: Problem, frames: bool = False) -> str | None:
    """Say what in the masks of a problem cannot be planned, or None.

    frames: whether the call says which frames the keys hold.
    """
    masks = tuple(dict.fromkeys(problem.masks))
    if frames and problem.grid.t > MOST_FRAMES:
        return f"does not serve k_frames of grids of more than {MOST_FRAMES} frames"
    *_, products = _geometry(problem, masks, frames)
    if common_steps(products) is None:
        return f"mask {masks[0]}{' and others are' if len(masks) > 1 else ' is'} dilated in several ways on one axis"
    return None


@lru_cache(maxsize=128)
def layout(
    problem: Problem,
    heads: int,
    head_dim: int,
    valid: bool = False,
    kernel: str = "forward",
    frames: bool = False,
) -> tuple[int, list[int], np.ndarray]:
    """Plan a problem: the kernel's configuration, its integers (AttentionPlan in csrc/stattn.h), the plan's array.

    valid: whether the call says which global tokens are real. kernel: "forward" or "dq". frames: whether the call says
    which frames the keys hold; the first place of a box is then a frame, which the device exchanges for its slot.
    """
    masks = tuple(dict.fromkeys(problem.masks))
    of_head = [masks.index(mask) for mask in problem.masks] if len(problem.masks) > 1 else [0] * heads
    q_box, k_box, products = _geometry(problem, masks, frames)
    tiling = choose(q_box, k_box, products, head_dim, kernel, frames)
    held = Region(k_box.origin, (problem.k_box.extent[0], *k_box.extent[1:])) if frames else k_box
    line = Line(
        problem.grid.before, problem.grid.after, held.video, problem.q_globals, problem.globals_see, valid, frames
    )
    encoded = encode(tiling, products, of_head, line, problem.q_tokens if kernel == "forward" else None)
    integers = [*q_box.extent, *held.extent, *tiling.slab, *tiling.box, *tiling.steps, tiling.stacked]
    integers += [encoded.tiles, line.before, line.after, int(line.queries), encoded.line_tiles, encoded.line_record]
    return tiling.config.number, [*integers, encoded.pieces, encoded.split_tiles], encoded.array


@lru_cache(maxsize=1024)
def is_split(problem: Problem) -> bool:
    """Say whether tiles of dense attention are cut into pieces, which takes a plan."""
    return len(cut_list(problem.k_tokens // DENSE_BOX, problem.q_tokens)) > 1


@lru_cache(maxsize=1024)  # captured graphs go on reading plans: few are ever given up
def on_device(
    problem: Problem,
    heads: int,
    head_dim: int,
    valid: bool,
    device: torch.device,
    kernel: str = "forward",
    frames: bool = False,
) -> tuple[int, list[int], torch.Tensor]:
    """Give the plan of a problem with its array on a device, copied there once."""
    number, integers, array = layout(problem, heads, head_dim, valid, kernel, frames)
    return number, integers, torch.from_numpy(array).to(device)


@lru_cache(maxsize=1024)
def sees_all(mask: Mask, problem: Problem, frames: bool = False) -> bool:
    """Say whether a product of a mask lets every query of q's box see every key of k's, or of all frames."""
    ends = _stops(problem.k_box)
    last = triple((problem.grid.t if frames and axis == 0 else end) - 1 for axis, end in enumerate(ends))
    rows = [slice(first, end) for first, end in zip(problem.q_box.origin, _stops(problem.q_box), strict=True)]
    return any(
        all(
            rule.step == 1 and (rule.lo[row] <= first).all() and (rule.hi[row] >= end).all()
            for rule, row, first, end in zip(product, rows, problem.k_box.origin, last, strict=True)
        )
        for product in mask.products(problem.grid)
    )


def _geometry(
    problem: Problem, masks: Sequence[Mask], frames: bool = False
) -> tuple[Region, Region, list[tuple[Product, ...]]]:
    """Lay the masks out on common axes: those of all, if they merge the same ones. frames: keys are of all frames."""
    masks = [_FULL if sees_all(mask, problem, frames) else mask for mask in masks]
    laid = [plan.geometry(mask, problem.grid, problem.q_box, problem.k_box, frames) for mask in masks]
    q_box, k_box, products = laid[0].q_box, laid[0].k_box, [each.products for each in laid]
    if len({(each.shape, each.q_box, each.k_box) for each in laid}) > 1:
        q_box, k_box = problem.q_box, problem.k_box
        products = [plan.disjoint(mask.products(problem.grid))[0] for mask in masks]
    if frames:
        k_box = Region((0, *k_box.origin[1:]), (problem.grid.t, *k_box.extent[1:]))
    return q_box, k_box, products


# The plan's array.


class Encoded(NamedTuple):
    """A plan's array and its numbers, of each head but for the lines: tiles, those of global queries and the record at
    which they begin, pieces of tiles and the tiles that they are of.
    """

    array: np.ndarray
    tiles: int
    line_tiles: int
    line_record: int
    pieces: int
    split_tiles: int


def encode(
    tiling: Tiling,
    products: Sequence[Sequence[Product]],
    of_head: Sequence[int],
    line: Line,
    queries: int | None = None,
) -> Encoded:
    """Lay a plan out as int32. products: of each mask. of_head: the mask of each head. queries: of a head, where tiles
    may be cut into pieces.
    """
    table = MaskTable(tiling)
    video = [_video_list(tiling, each, table, line, queries) for each in products]
    lines = _line_list(tiling, table, line, queries)
    masks, numbers = table.combine(_as_wide([each.masks for each in (*video, lines)]))
    records = np.concatenate([masks.reshape(-1), np.zeros(-masks.size % 4, np.int32)]).reshape(-1, 4)
    head_records = -(-len(of_head) // (4 * ROWS)) * ROWS  # groups of masks begin at multiples of their size
    parts = [np.zeros((head_records, 4), np.int32), records]
    start = head_records + len(records)
    offsets = []
    first_group = head_records * 4 // (masks.shape[2] * ROWS)
    tiles, pieces = max(len(each.corners) for each in video), max(each.pieces for each in video)
    splits = [np.concatenate([each.splits(0), lines.splits(pieces)]) for each in video]
    split_tiles = max(map(len, splits))
    for each, mine in zip((*video, lines), numbers, strict=True):
        offsets.append(start)
        if each is lines:
            body = each.records(start, mine + first_group, len(lines.corners), pieces, splits[0][:0], 0)
        else:
            body = each.records(start, mine + first_group, tiles, 0, splits[len(offsets) - 1], split_tiles)
        parts.append(body)
        start += len(body)
    if start * 4 >= 1 << 31:
        raise ValueError(f"a plan of {start} records of 16 bytes is too large")
    array = np.concatenate(parts).astype(np.int32).reshape(-1)
    array[: len(of_head)] = np.array(offsets, np.int32)[list(of_head)]
    return Encoded(array, tiles, len(lines.corners), offsets[-1], pieces + lines.pieces, split_tiles)


def _stops(box: Region) -> Triple:
    """Give the ends of a box, where tables end that are just long enough for it."""
    return triple(o + n for o, n in zip(box.origin, box.extent, strict=True))


class _Entries(NamedTuple):
    """Boxes of tiles.

    tile: [boxes]. masked: whether rows have masks, [boxes]. box: its record, [boxes, 4]. masks: the records of its
    masks, [boxes, warpgroups, 4 or more], in which masks are counted from the table's first: those of the three axes,
    the last word of the record, and threes of axes whose pairs are not seen here, -1 for none.
    """

    tile: np.ndarray
    masked: np.ndarray
    box: np.ndarray
    masks: np.ndarray


def _video_list(
    tiling: Tiling, products: Sequence[Product], table: MaskTable, line: Line, queries: int | None
) -> _List:
    """List the tiles of the video under one mask: the boxes of its products, and those of the global keys."""
    places = np.indices(tile_counts(tiling.q_box, tiling.steps, tiling.tile)).reshape(3, -1)  # of tiles, in tiles
    corners = [
        rows_of(tiling.q_box, tiling.k_box, tiling.steps, whole(stop), axis, tiling.tile[axis]).corner[places[axis]]
        for axis, stop in enumerate(_stops(tiling.q_box))
    ]
    entries = [_product_boxes(tiling, each, table, places, products[:n]) for n, each in enumerate(products)]
    entries.append(_line_boxes(tiling, table, line, places.shape[1], with_video=False))
    return _List(np.stack([*corners, 0 * corners[0]], 1), entries, queries)


def _line_list(tiling: Tiling, table: MaskTable, line: Line, queries: int | None) -> _List:
    """List the tiles of the global queries."""
    step = ROWS * tiling.warpgroups
    sides = ((BEFORE, line.before), (AFTER, line.after)) if line.queries else ()
    corners = [(0, 0, first, kind) for kind, tokens in sides for first in range(0, tokens, step)]
    entries = [_line_boxes(tiling, table, line, len(corners), with_video=line.see == "all")]
    return _List(np.array(corners, np.int64).reshape(-1, 4), entries, queries)


def _line_boxes(tiling: Tiling, table: MaskTable, line: Line, tiles: int, with_video: bool) -> _Entries:
    """Cut the line's keys into boxes, the same for each of ``tiles`` tiles."""
    rows, full = product_of(tiling.box), tiling.config.box
    boxes: list[tuple[int, ...]] = []
    masked, masks = [], []
    before, after = -(-line.before // rows), -(-line.after // rows)  # boxes

    def add_line(start: int, length: int, number: int, is_global: bool = True) -> None:
        for first in range(0, length, rows):
            count = min(rows, length - first)
            boxes.append((0, 0, start + first, 1))
            masked.append(count < full or (is_global and line.valid))
            sees = [table.line(axis, tiling.slab[axis], count) for axis in AXES]
            # What a box of the video brings of the tokens behind it may not be real either.
            noted = line.valid and (is_global or count < rows)
            masks.append((*sees, number + (first // rows if is_global else 0) if noted else 0))

    add_line(0, line.before, 1)
    if with_video and not line.frames:
        add_line(line.before, line.video, 1 + before + after, is_global=False)
    elif with_video:  # not in a line: some slots may hold no frame
        cuts = [range(0, n, extent) for n, extent in zip(tiling.k_box.extent, tiling.box, strict=True)]
        for first in itertools.product(*cuts):
            counts = [min(e, n - o) for o, e, n in zip(first, tiling.box, tiling.k_box.extent, strict=True)]
            boxes.append((*first, 0))
            masked.append(product_of(counts) < full)
            spans = [np.broadcast_to([0, n], (1, tiling.slab[axis], 2)) for axis, n in enumerate(counts)]
            masks.append((*(int(table.find(axis, each)[0]) for axis, each in enumerate(spans)), 0))
    add_line(line.before + line.video, line.after, 1 + before)
    found = np.array(masks, np.int64).reshape(-1, 1, 4)
    return _Entries(
        np.repeat(np.arange(tiles), len(boxes)),
        np.tile(np.array(masked, bool), tiles),
        np.tile(np.array(boxes, np.int64).reshape(-1, 4), (tiles, 1)),
        np.tile(found, (tiles, tiling.warpgroups, 1)),
    )


def _product_boxes(
    tiling: Tiling, product: Product, table: MaskTable, places: np.ndarray, earlier: Sequence[Product] = ()
) -> _Entries:
    """Cut what tiles at ``places`` visit of a product into boxes. earlier: products whose pairs are left to them."""
    rows = [rows_of(tiling.q_box, tiling.k_box, tiling.steps, product[a], a, tiling.tile[a]) for a in AXES]
    visits = [from_multiples(visit(each), unit) for each, unit in zip(rows, tiling.multiples, strict=True)]
    boxes = [in_boxes(each, extent) for each, extent in zip(visits, tiling.box, strict=True)]
    counts = [each.number[place] for each, place in zip(boxes, places, strict=True)]
    total = counts[0] * counts[1] * counts[2]
    tile = np.repeat(np.arange(len(total)), total)
    rest = np.arange(len(tile)) - np.repeat(np.cumsum(total) - total, total)
    # The stacked axis is the outermost: boxes that a warpgroup leaves out then lie in a row.
    order = [tiling.stacked, *(axis for axis in AXES if axis != tiling.stacked)]
    middle, inmost = (counts[axis][tile] for axis in order[1:])
    number = [rest] * 3
    number[order[0]], number[order[1]] = rest // (middle * inmost), rest // inmost % middle
    number[order[2]] = rest % inmost
    inner = np.ones(len(tile), bool)
    first, masks, keys = [], [], []
    for axis in AXES:
        place, at = places[axis][tile], number[axis]
        inner &= (boxes[axis].whole_from[place] <= at) & (at < boxes[axis].whole_to[place])
        key = visits[axis].first[place] + at * tiling.box[axis]  # in its class
        keys.append(key)
        first.append(rows[axis].key[place] + tiling.steps[axis] * key)
        masks.append(_axis_masks(tiling, axis, rows[axis], visits[axis], boxes[axis], table, place, at))
    # A box with columns that no key fills has masks always.
    masked = ~inner if product_of(tiling.box) == tiling.config.box else np.ones(len(tile), bool)
    found = np.stack(masks, 2)
    unseen = (found == UNSEEN).any(2)
    found = np.concatenate([np.maximum(found, 0), np.where(unseen, UNSEEN, 0)[..., None]], 2)
    for other in earlier:
        if all(rule.counts().any() for rule in intersect(product, other)):
            others = _masks_at(tiling, other, table, [places[axis][tile] for axis in AXES], keys)
            masked = np.logical_or(masked, (others >= 0).any((1, 2)))
            found = np.concatenate([found, others], 2)
    return _Entries(tile, masked, np.stack([*first, 0 * tile], 1), found)


def _masks_at(
    tiling: Tiling, product: Product, table: MaskTable, places: Sequence[np.ndarray], keys: Sequence[np.ndarray]
) -> np.ndarray:
    """Number the masks of a product for boxes that begin at ``keys`` (in their class) of tiles at ``places``.

    Returns [boxes, warpgroups, 3], -1 where a warpgroup sees nothing.
    """
    found, meets = [], np.ones((len(keys[0]), tiling.warpgroups), bool)
    for axis in AXES:
        slab, extent = tiling.slab[axis], tiling.box[axis]
        groups = tiling.warpgroups if axis == tiling.stacked else 1
        rows = rows_of(tiling.q_box, tiling.k_box, tiling.steps, product[axis], axis, tiling.tile[axis])
        different, inverse = np.unique(np.stack([places[axis], keys[axis]], 1), axis=0, return_inverse=True)
        start = different[:, 1, None, None]
        lo, hi = (x.reshape(len(x), groups, slab)[different[:, 0]] for x in (rows.lo, rows.hi))
        spans = np.stack([np.clip(lo - start, 0, extent), np.clip(hi + 1 - start, 0, extent)], 3)
        spans[spans[..., 0] >= spans[..., 1]] = 0
        numbers = table.find(axis, spans.reshape(-1, slab, 2)).reshape(-1, groups)
        found.append(np.broadcast_to(numbers[inverse.reshape(-1)], meets.shape))
        some: np.ndarray = (spans != 0).any((2, 3))
        meets &= some[inverse.reshape(-1)]
    return np.where(meets[..., None], np.stack(found, 2), -1)


def _axis_masks(
    tiling: Tiling,
    axis: int,
    rows: Rows,
    visits: Visits,
    boxes: Boxes,
    table: MaskTable,
    place: np.ndarray,
    at: np.ndarray,
) -> np.ndarray:
    """Number the masks of an axis for boxes ``at`` of tiles ``place``, or UNSEEN: [boxes, warpgroups]."""
    slab, extent = tiling.slab[axis], tiling.box[axis]
    groups = tiling.warpgroups if axis == tiling.stacked else 1
    count = len(boxes.number)
    lo, hi = (x.reshape(count, groups, slab) for x in (rows.lo, rows.hi))
    # Every box of every tile of the axis, those seen whole as one.
    everything = np.broadcast_to(np.array([0, extent]), (1, slab, 2))
    numbers = np.full((count, int(boxes.number.max(initial=0)), groups), int(table.find(axis, everything)[0]))
    i, b = np.nonzero(np.arange(numbers.shape[1]) < boxes.number[:, None])
    part = (b < boxes.whole_from[i]) | (boxes.whole_to[i] <= b)
    i, b = i[part], b[part]
    start = (visits.first[i] + b * extent)[:, None, None]
    spans = np.stack([np.clip(lo[i] - start, 0, extent), np.clip(hi[i] + 1 - start, 0, extent)], 3)
    spans[spans[..., 0] >= spans[..., 1]] = 0
    seen = spans.any((2, 3))
    numbers[i, b] = np.where(seen, table.find(axis, spans.reshape(-1, slab, 2)).reshape(-1, groups), UNSEEN)
    return np.broadcast_to(numbers[place, at], (len(at), tiling.warpgroups)) if groups == 1 else numbers[place, at]


def _as_wide(masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Fill records of masks up to the width of the widest: nothing is left out of what is added."""
    width = max(each.shape[2] for each in masks)
    return [np.pad(each, ((0, 0), (0, 0), (0, width - each.shape[2])), constant_values=-1) for each in masks]


class _List:
    """Tiles or pieces of them, their boxes and the masks of these.

    corners: the first record of each, [tiles, 4], those of pieces without their numbers. queries: of a head, where
    tiles may be cut into pieces.
    """

    def __init__(self, corners: np.ndarray, entries: Sequence[_Entries], queries: int | None) -> None:
        tile, masked, box = (np.concatenate(each) for each in zip(*(each[:3] for each in entries), strict=True))
        masks = np.concatenate(_as_wide([each.masks for each in entries]))
        order = np.lexsort((~masked, tile))  # stable: in a tile by products and row-major, those with masks first
        tile, masked = tile[order], masked[order]
        self._boxes = box[order]
        self.masks = masks[order][masked]
        count = np.bincount(tile, minlength=len(corners))
        cut = {int(n): cut_list(int(n), queries) for n in np.unique(count)}
        parts = np.array([len(cut[int(n)]) for n in count], np.int64)  # of each tile
        self._whole = parts == 1
        self._first = np.cumsum(parts) - parts
        self._parts = parts
        self._tiles = corners
        self.corners = np.repeat(corners, parts, axis=0)
        self._count = np.array([part for n in count for part in cut[int(n)]], np.int64)
        of_box = np.repeat(np.arange(len(self._count)), self._count)
        self._masked = np.bincount(of_box[masked], minlength=len(self.corners))
        self._tile_of_mask = of_box[masked]
        self._is_piece = np.repeat(~self._whole, parts)
        self.pieces = int(self._is_piece.sum())

    def splits(self, first: int) -> np.ndarray:
        """Say what is in pieces, which are numbered from ``first`` on: two records of each such tile, [tiles, 2, 4]."""
        number = first + (np.cumsum(self._is_piece) - self._is_piece)[self._first[~self._whole]]
        parts = self._parts[~self._whole]
        return np.stack([self._tiles[~self._whole], np.stack([number, parts, 0 * parts, 0 * parts], 1)], 1)

    def records(
        self, start: int, groups: np.ndarray, tiles: int, first: int, splits: np.ndarray, split_tiles: int
    ) -> np.ndarray:
        """Lay the list out in records of four, from record ``start`` on.

        groups: the numbers of the masks. tiles, split_tiles: how many there shall be. first: the number of the first
        piece. splits: of all that is in pieces.
        """
        head = start + 2 * (tiles + split_tiles)
        first_box = head + np.cumsum(self._count) - self._count
        warpgroups = self.masks.shape[1]
        masks = warpgroups * self._masked
        first_mask_record = head + len(self._boxes) + np.cumsum(masks) - masks
        lists = np.stack([first_box, self._count, first_mask_record, self._masked], 1)
        corners = self.corners.copy()
        corners[:, 3] += np.where(self._is_piece, 4 * (first + np.cumsum(self._is_piece)), 0)
        header = np.concatenate([corners, lists], 1)
        if self._count.max(initial=0) * len(self._count) > 1.25 * self._count.sum():  # the longest first
            header = header[np.argsort(-self._count, kind="stable")]
        nothing = np.array([0, 0, 0, NONE, 0, 0, 0, 0])
        header = np.concatenate([header, np.tile(nothing, (tiles - len(header), 1))])
        splits = np.concatenate([splits.reshape(-1, 8), np.tile(nothing, (split_tiles - len(splits), 1))])
        # All boxes of a tile's first warpgroup, then those of its next.
        of_tile = self._masked[self._tile_of_mask]
        inside = np.arange(len(self.masks)) - (np.cumsum(self._masked) - self._masked)[self._tile_of_mask]
        at = (np.cumsum(masks) - masks)[self._tile_of_mask] + inside
        found = np.zeros((int(masks.sum()), 4), np.int64)
        for group in range(warpgroups):
            found[at + group * of_tile, 0] = groups[:, group]
            found[at + group * of_tile, 3] = self.masks[:, group, 3]
        return np.concatenate([header.reshape(-1, 4), splits.reshape(-1, 4), self._boxes, found])
