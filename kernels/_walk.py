"""What the attention kernels share: which rows a program owns, which boxes of columns it visits, and what is seen.

*Rows* are tiled, one tile a program; *columns* are walked: queries and keys in the forward and for dQ, keys and queries
for dK and dV. ``stattn/plan.py`` describes the tables. A program visits *segments* one after the other: the global
tokens before and after the video, then the intervals of each product of its mask; of a ring cache, slot by slot. A
segment is cut into boxes of at most COLUMNS tokens. ``visit`` does it, with two functions of the kernel for each box:
``score`` loads the box and gives its scores, from which ``visit`` hides what is not seen, and ``take`` adds them in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stattn import plan

HEADER = tl.constexpr(plan.HEADER)
EXISTS = tl.constexpr(plan.EXISTS)
NEAR_GUARD = tl.constexpr((1 << 29) + (1 << 19) + (1 << 9))  # above three fields of nine bits, for places in a box
SPARE = tl.constexpr(1 << 28)  # a place that no end reaches: what is left of an end has not its first guard
FLAT_GUARD = tl.constexpr(plan.EXISTS >> 1)  # of the field that a run of tokens without a mask counts in


@triton.jit
def triple(pointer):
    return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2)


@triton.jit
def unravel(index, height, width):
    """Split a row-major index into (t, h, w)."""
    row = index // width
    return row // height, row % height, index % width


@triton.jit
def tile_rows(walk, tile, length_t, ROWS: tl.constexpr):
    """Give the (t, h, w) of a tile's rows in their box, and which of them exist; and the tile's place on each axis.

    length_t: the extent of the box on the first axis, which for the slots of a ring cache is not that of the walk.
    """
    length_h, length_w = tl.load(walk + 1), tl.load(walk + 2)
    extent_t, extent_h, extent_w = triple(walk + 3)
    step_t, step_h, step_w = triple(walk + 6)
    place_t, place_h, place_w = unravel(tile, tl.load(walk + 10), tl.load(walk + 11))
    t, h, w = unravel(tl.arange(0, ROWS), extent_h, extent_w)
    exists = t < extent_t
    t = place_t % step_t + step_t * (extent_t * (place_t // step_t) + t)
    h = place_h % step_h + step_h * (extent_h * (place_h // step_h) + h)
    w = place_w % step_w + step_w * (extent_w * (place_w // step_w) + w)
    exists = exists & (t < length_t) & (h < length_h) & (w < length_w)
    return (t, h, w), exists, (place_t, place_h, place_w)


@triton.jit
def list_rows(walk, tile, programs, ROWS: tl.constexpr):
    """The same for block lists, whose tiles several programs of ROWS rows share; the place is the list's row."""
    length_t, length_h, length_w = triple(walk)
    extent_t, extent_h, extent_w = triple(walk + 3)
    place = tile // programs
    place_t, place_h, place_w = unravel(place, tl.load(walk + 10), tl.load(walk + 11))
    t, h, w = unravel((tile % programs) * ROWS + tl.arange(0, ROWS), extent_h, extent_w)
    exists = t < extent_t
    t, h, w = place_t * extent_t + t, place_h * extent_h + h, place_w * extent_w + w
    exists = exists & (t < length_t) & (h < length_h) & (w < length_w)
    return (t, h, w), exists, (place, 0, 0)


@triton.jit
def global_rows(row, exists, tile, is_global, before, after, video, valid, ROWS: tl.constexpr):
    """Give a tile of global tokens its rows in memory; say which exist, and which are real tokens as well.

    row, exists: those of a video tile, which stay. valid: flags of this sample's global tokens, or None.
    """
    token = tile * ROWS + tl.arange(0, ROWS)
    row = tl.where(is_global, tl.where(token < before, token, token + video), row)
    exists = tl.where(is_global, token < before + after, exists)
    real = exists
    if valid is not None:
        wanted = tl.load(valid + token, mask=exists & is_global, other=1)
        real = exists & (wanted != 0)
    return row, exists, real


@triton.jit
def segment(walk, part, flat, place, run, COLUMNS: tl.constexpr):
    """Describe a segment: the intervals of a product at a tile's place, or, if ``flat``, a run of tokens.

    Returns in threes by axis the first column, the number of columns, those from which and up to which all rows see
    them, their steps, the extents of a box and the factors of coordinates in their fields; then the guard bits.
    """
    record = walk + HEADER + part * tl.load(walk + 26)
    product = ~flat
    tiles_t, tiles_h = tl.load(walk + 9), tl.load(walk + 10)
    first_t, length_t, from_t, to_t = _interval(record + 4 + 4 * place[0], product, 1)
    first_h, length_h, from_h, to_h = _interval(record + 4 + 4 * (tiles_t + place[1]), product, 1)
    first_w, length_w, from_w, to_w = _interval(record + 4 + 4 * (tiles_t + tiles_h + place[2]), product, run)
    step_t = tl.load(record, mask=product, other=1)
    step_h = tl.load(record + 1, mask=product, other=1)
    step_w = tl.load(record + 2, mask=product, other=1)
    box_t, box_h = tl.where(flat, 1, tl.load(walk + 15)), tl.where(flat, 1, tl.load(walk + 16))
    box_w = tl.where(flat, COLUMNS, tl.load(walk + 17))
    factor_t, factor_h = tl.where(flat, 0, tl.load(walk + 21)), tl.where(flat, 0, tl.load(walk + 22))
    factor_w = tl.where(flat, 1, tl.load(walk + 23))
    guard = tl.where(flat, FLAT_GUARD + EXISTS, tl.load(walk + 24))
    return (
        (first_t, first_h, first_w),
        (length_t, length_h, length_w),
        (from_t, from_h, from_w),
        (to_t, to_h, to_w),
        (step_t, step_h, step_w),
        (box_t, box_h, box_w),
        (factor_t, factor_h, factor_w),
        guard,
    )


@triton.jit
def _interval(entry, product, run):
    return (
        tl.load(entry, mask=product, other=0),
        tl.load(entry + 1, mask=product, other=run),
        tl.load(entry + 2, mask=product, other=0),
        tl.load(entry + 3, mask=product, other=run),
    )


@triton.jit
def slot_of(frame, flat, first, length, inside_from, inside_to, step):
    """Narrow a segment to a slot of a ring cache, which holds ``frame``: its first axis becomes that frame, or none."""
    member = (frame - first[0]) // step[0]
    hit = (frame >= first[0]) & (member < length[0]) & (first[0] + member * step[0] == frame)
    hit = tl.where(flat, frame >= 0, hit)
    inside = flat | ((member >= inside_from[0]) & (member < inside_to[0]))
    return (
        (tl.where(flat, 0, frame), first[1], first[2]),
        (tl.where(hit, 1, 0), length[1], length[2]),
        (0, inside_from[1], inside_from[2]),
        (tl.where(inside, 1, 0), inside_to[1], inside_to[2]),
    )


@triton.jit
def columns_of(box, step, factor, height, width, COLUMNS: tl.constexpr):
    """Give for the columns of a box their packed places in it, their packed coordinates and their rows in memory.

    All count from the first column of the box. Behind a box that is smaller than COLUMNS, none is near, or seen.
    """
    column = tl.arange(0, COLUMNS)
    t, h, w = unravel(column, box[1], box[2])
    spare = column >= box[0] * box[1] * box[2]
    place = tl.where(spare, SPARE, (t << 20) + (h << 10) + w)
    field = h * (step[1] * factor[1]) + w * (step[2] * factor[2])
    field += tl.where(spare, EXISTS, t * (step[0] * factor[0]))
    row = (t * step[0] * height + h * step[1]) * width + w * step[2]
    return place, field, row


@triton.jit
def is_near(place, at, length):
    """Say which columns of the box at ``at`` lie within the interval: their packed places do not pass its end.

    A box of a listed tile may begin behind the end of the grid.
    """
    end = NEAR_GUARD
    for axis in tl.static_range(3):
        end += (tl.maximum(tl.minimum(length[axis] - at[axis], 256), 0) - 1) << (20 - 10 * axis)
    return ((end - place) & NEAR_GUARD) == NEAR_GUARD


@triton.jit
def is_whole(at, box, inside_from, inside_to, COLUMNS: tl.constexpr):
    """Say whether all rows see all columns of the box at ``at``."""
    whole = box[0] * box[1] * box[2] == COLUMNS
    for axis in tl.static_range(3):
        whole = whole & (at[axis] >= inside_from[axis]) & (at[axis] + box[axis] <= inside_to[axis])
    return whole


@triton.jit
def place_of(at, first, step):
    """Give the (t, h, w) of the first column of the box at ``at``."""
    return first[0] + at[0] * step[0], first[1] + at[1] * step[1], first[2] + at[2] * step[2]


@triton.jit
def dot3(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@triton.jit
def boxes(length, box):
    """Count the boxes of an interval."""
    return tl.cdiv(length[0], box[0]) * tl.cdiv(length[1], box[1]) * tl.cdiv(length[2], box[2])


@triton.jit
def advance(at, box, length):
    """Go to the next box of an interval, w first."""
    w = at[2] + box[2]
    turn = w >= length[2]
    h = tl.where(turn, at[1] + box[1], at[1])
    w = tl.where(turn, 0, w)
    turn = h >= length[1]
    t = tl.where(turn, at[0] + box[0], at[0])
    return t, tl.where(turn, 0, h), w


@triton.jit
def bounds(walk, record, rows, real):
    """Load the packed bounds of rows (t, h, w) under one product."""
    size_t, size_h, size_w = triple(walk + 18)
    table = record + 4 + 4 * (tl.load(walk + 9) + tl.load(walk + 10) + tl.load(walk + 11))
    at_t = tl.where(size_t > 1, rows[0], 0)
    at_h = tl.where(size_h > 1, rows[1], 0) + size_t
    at_w = tl.where(size_w > 1, rows[2], 0) + size_t + size_h
    lo = tl.load(table + at_t, mask=real, other=0) + tl.load(table + at_h, mask=real, other=0)
    lo += tl.load(table + at_w, mask=real, other=0)
    table += size_t + size_h + size_w
    hi = tl.load(table + at_t, mask=real, other=0) + tl.load(table + at_h, mask=real, other=0)
    hi += tl.load(table + at_w, mask=real, other=0)
    return lo, hi


@triton.jit
def within(column, low, high, guard):
    """Say which columns [1, COLUMNS] lie within the bounds of rows: ``low`` is guard - lo, ``high`` is hi."""
    return ((column + low) & (high - column) & guard) == guard


@triton.jit
def _residues(walk, record, field):
    """Number the residue class of columns under one product, from their packed coordinates."""
    step = triple(record)
    factor, bits = triple(walk + 21), triple(walk + 30)
    residue = field * 0
    for axis in tl.static_range(3):
        if step[axis] > 1:
            residue = residue * step[axis] + ((field & bits[axis]) // factor[axis]) % step[axis]
    return residue


@triton.jit
def _residues_of_rows(walk, record, rows):
    step = triple(record)
    origin = triple(walk + 27)  # rows count from another place than columns
    residue = rows[0] * 0
    for axis in tl.static_range(3):
        if step[axis] > 1:
            shifted = (rows[axis] + origin[axis]) % step[axis]
            residue = residue * step[axis] + tl.where(shifted < 0, shifted + step[axis], shifted)
    return residue


@triton.jit
def allowed(walk, product, rows, exists, field):
    """Say what rows (t, h, w) see of columns by one product, whatever residue classes they are in. [ROWS, COLUMNS]"""
    guard = tl.load(walk + 24)
    record = walk + HEADER + product * tl.load(walk + 26)
    lo, hi = bounds(walk, record, rows, exists)
    seen = within(field[None, :], (guard - lo)[:, None], hi[:, None], guard)
    return seen & (_residues_of_rows(walk, record, rows)[:, None] == _residues(walk, record, field)[None, :])


@triton.jit
def without_earlier(walk, scores, part, rows, exists, field):
    """Hide the scores of pairs that products before ``part`` allow."""
    for earlier in range(part):
        scores = tl.where(allowed(walk, earlier, rows, exists, field), -float("inf"), scores)
    return scores


@triton.jit
def listed(walk, scores, rows, exists, field):
    """Hide the scores of pairs that no product allows, in an entry of block lists that is partly seen."""
    kept = tl.full(scores.shape, -float("inf"), tl.float32)
    for product in range(tl.load(walk + 25)):
        kept = tl.where(allowed(walk, product, rows, exists, field), scores, kept)
    return kept


@triton.jit
def entry_box(walk, tile, number, extent):
    """Find box ``number`` of a listed column tile: the box's first (t, h, w), and how far columns go from there."""
    length = triple(walk + 12)
    box = triple(walk + 15)
    t, h, w = unravel(tile, tl.cdiv(length[1], extent[1]), tl.cdiv(length[2], extent[2]))
    at_t, at_h, at_w = unravel(number, tl.cdiv(extent[1], box[1]), tl.cdiv(extent[2], box[2]))
    at_t, at_h, at_w = at_t * box[0], at_h * box[1], at_w * box[2]
    first = (t * extent[0] + at_t, h * extent[1] + at_h, w * extent[2] + at_w)
    left_t = tl.minimum(extent[0] - at_t, length[0] - first[0])
    left_h = tl.minimum(extent[1] - at_h, length[1] - first[1])
    left_w = tl.minimum(extent[2] - at_w, length[2] - first[2])
    return first, (left_t, left_h, left_w)


@triton.jit
def load_rows(pointer, row, token, exists, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Load rows of a [tokens, heads, DIM] tensor at a head, with zeros for those that do not exist. [rows, WIDTH]"""
    feature = tl.arange(0, WIDTH)
    at = row[:, None] * token + feature[None, :]
    if DIM == WIDTH:
        return tl.load(pointer + at, mask=exists[:, None], other=0.0)
    return tl.load(pointer + at, mask=exists[:, None] & (feature < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(pointer, row, token, value, exists, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Store rows where ``load_rows`` finds them."""
    feature = tl.arange(0, WIDTH)
    at = row[:, None] * token + feature[None, :]
    value = value.to(pointer.dtype.element_ty)
    if DIM == WIDTH:
        tl.store(pointer + at, value, mask=exists[:, None])
    else:
        tl.store(pointer + at, value, mask=exists[:, None] & (feature < DIM)[None, :])


@triton.jit
def visit(
    score, take, context, state, walk, rows, exists, is_global, place,
    origin, before, after, video, segment_from, parts_of_globals,
    frames, slots, valid, index, partial, entry_from, entries, extent,
    COLUMNS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Visit the boxes of columns that a tile of rows sees, and return the state after them.

    score(context, row, near) -> (scores [ROWS, COLUMNS], whatever take needs). take(context, state, scores, row, near,
    that) -> state. row: of the columns in memory. near: which of them exist.

    rows, exists, place: of the tile. is_global: whether its rows are global tokens. origin: the first video column in
    memory. before, after, video: numbers of columns. segment_from: 0 when global columns are seen, else 2.
    parts_of_globals: 1 when global rows see video columns, else 0. frames, slots: of a ring cache of columns. valid:
    flags of this sample's global columns. index, partial, entry_from, entries, extent: the tile's row of block lists.
    """
    height, width = tl.load(walk + 13), tl.load(walk + 14)
    parts = 0
    if index is None:  # heads may have different numbers of tiles
        parts = tl.where(place[0] < tl.load(walk + 9), tl.load(walk + 25), 0)
    parts = tl.where(is_global, parts_of_globals, parts)
    for number in range(segment_from, 2 + parts * slots):
        part, slot = (number - 2) // slots, (number - 2) % slots
        ours = number >= 2
        flat = is_global | ~ours
        run = tl.where(ours, video // slots, tl.where(number == 0, before, after))
        start = tl.where(ours, origin + slot * run, tl.where(number == 0, 0, origin + video))
        first, length, inside_from, inside_to, step, box, factor, guard = segment(walk, part, flat, place, run, COLUMNS)
        stored = first
        if frames is not None:
            frame = tl.load(frames + slot, mask=ours, other=0)
            stored = (0, first[1], first[2])
            first, length, inside_from, inside_to = slot_of(frame, flat, first, length, inside_from, inside_to, step)
        if OVERLAP:
            inside_to = (tl.where(part > 0, 0, inside_to[0]), inside_to[1], inside_to[2])
        lo, hi = bounds(walk, walk + HEADER + part * tl.load(walk + 26), rows, exists & ~flat)
        hi = tl.where(flat, guard + run - 1, hi)
        inner, field, inner_row = columns_of(box, step, factor, height, width, COLUMNS)
        if INT64:
            inner_row = inner_row.to(tl.int64)
        at = (0, 0, 0)
        for _ in range(boxes(length, box)):
            near = is_near(inner, at, length)
            masked = ~is_whole(at, box, inside_from, inside_to, COLUMNS)
            if valid is not None:  # what is not real is not even read: it may be anything
                token = tl.where(number == 0, 0, before) + at[2] + tl.arange(0, COLUMNS)
                near = near & (tl.load(valid + token, mask=near & ~ours, other=1) != 0)
                masked = masked | ~ours
            row = dot3(place_of(at, stored, step), (height * width, width, 1)) + start + inner_row
            scores, loaded = score(context, row, near, DIM, WIDTH)
            if masked:
                here = dot3(place_of(at, first, step), factor)
                seen = within(field[None, :], (guard + here - lo)[:, None], (hi - here)[:, None], guard)
                if valid is not None:
                    seen = seen & near[None, :]
                scores = tl.where(seen, scores, -float("inf"))
                if OVERLAP:
                    scores = without_earlier(walk, scores, tl.where(flat, 0, part), rows, exists, field + here)
            state = take(context, state, scores, row, near, loaded, DIM, WIDTH)
            at = advance(at, box, length)

    if index is not None:
        box = triple(walk + 15)
        factor = triple(walk + 21)
        inner, field, inner_row = columns_of(box, (1, 1, 1), factor, height, width, COLUMNS)
        if INT64:
            inner_row = inner_row.to(tl.int64)
        turns = boxes(extent, box)
        for turn in range(tl.where(is_global, 0, entries * turns)):
            entry = entry_from + turn // turns
            corner, left = entry_box(walk, tl.load(index + entry), turn % turns, extent)
            near = is_near(inner, (0, 0, 0), left)
            row = dot3(corner, (height * width, width, 1)) + origin + inner_row
            scores, loaded = score(context, row, near, DIM, WIDTH)
            scores = tl.where(near[None, :], scores, -float("inf"))
            if partial is not None:
                if tl.load(partial + entry) != 0:
                    scores = listed(walk, scores, rows, exists, field + dot3(corner, factor))
            state = take(context, state, scores, row, near, loaded, DIM, WIDTH)
    return state
