# mypy: allow-untyped-defs, allow-incomplete-defs
"""Selection of key tiles, and block lists seen from the key tiles, on the device: no sort, no word to the host.

Selection. m(i) = mean of the tokens of tile i, s(i, j) = m_q(i) . m_k(j). A row i keeps the tiles j above a threshold
on s; of tiles that equal it the first ones. Three kernels: means, read once from where the tokens lie; scores, by
matrix products of 3xTF32; and rows. Floats are compared as integers of the same order, so that the threshold is found
by bisection over at most 32 bits, with the row in registers: for top-k the greatest integer that ``keep`` tiles reach,
for top-p the greatest whose tiles weigh ``mass`` of the row's sum of exp(scale * (s - max)). A prefix sum of the chosen
tiles writes the list in ascending order. Scores are made for as many query tiles at a time as SCORES holds, so that
memory does not grow with the square of the tokens.

Sums, means, scores and weights are fp32, in an order that depends on the sizes alone. Bound by reading q and k once.

Joining merges a mask's kinds of tiles into lists: a row of bytes, marked by the list, compacted by a prefix sum.

Transposition turns lists of key tiles per query tile into lists of query tiles per key tile. Each query tile marks its
key tiles in a table of bits, 32 query tiles to a word (an atomic OR, whose result no order changes); sums of the bits
of a key tile give where its list starts, and prefix sums over the words place its query tiles in ascending order.
Integers only: nothing is rounded. Bound by the latency of reading lists and bits, some bytes per entry.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stattn.grid import Triple
from stattn.kernels._compile import Specialization

WORD = 32  # query tiles in a word of the table of bits
SCORES = 2**24  # scores that are held at a time
KINDS = 2**26  # kinds of tiles that are held at a time
MOST_TILES = 2**14  # the longest row of scores that registers hold


@dataclass(frozen=True)
class Config:
    """How a launch is cut.

    mean_elements: elements of tokens that a program of the means reads at once. score_q, score_k, score_d, score_warps:
    the block of a program of the scores. row_elements: elements of a row in each thread. row_tiles, list_entries:
    kinds of tiles, and entries of a list, that are read at once. key_tiles: key tiles whose lists one program of the
    transposition gathers.
    """

    mean_elements: int = 8192
    score_q: int = 64
    score_k: int = 64
    score_d: int = 32
    score_warps: int = 4
    row_elements: int = 32
    row_tiles: int = 512
    list_entries: int = 256
    key_tiles: int = 16

    def row_warps(self, k_tiles: int) -> int:
        """Count the warps that hold a row of scores."""
        return min(16, max(1, triton.next_power_of_2(k_tiles) // (32 * self.row_elements)))

    def row_block(self, k_tiles: int) -> tuple[int, int]:
        """Give the elements of a row in registers, and those that are listed at once."""
        block = max(32, triton.next_power_of_2(k_tiles))
        return block, min(block, 256 * self.row_warps(k_tiles))

    def mean_block(self, dim: int, stride: int) -> tuple[int, int]:
        """Give the tokens and columns that are read at once."""
        columns = min(triton.next_power_of_2(dim), 256)
        elements = self.mean_elements if stride == 1 else 1024  # each with an address of its own
        return elements // columns, columns


CONFIGS = (
    Config(),
    Config(score_k=128, score_d=16, score_warps=8, row_elements=64, key_tiles=32),
    Config(mean_elements=4096, row_elements=16, list_entries=512),
)


# --- selection -------------------------------------------------------------------------------------------------------


@triton.jit
def tile_means(
    g_x, g_means,
    heads, dim, frames, height, width, tile_t, tile_h, tile_w, x_b, x_n, x_h, x_d,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Average the tokens of one tile of one head. g_means: fp32 [B, heads, tiles, dim]"""
    along_h, along_w = tl.cdiv(height, tile_h), tl.cdiv(width, tile_w)
    tiles = tl.cdiv(frames, tile_t) * along_h * along_w
    # Heads of a token lie side by side, so they come first.
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    tile, b = rest % tiles, (rest // tiles).to(tl.int64)
    first_t = tile // (along_h * along_w) * tile_t
    first_h = tile // along_w % along_h * tile_h
    first_w = tile % along_w * tile_w
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tokens = g_x + b * x_b + head.to(tl.int64) * x_h + column[None, :].to(tl.int64) * x_d
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, tile_t * tile_h * tile_w, ROWS):
        row = start + tl.arange(0, ROWS)
        t, h, w = row // (tile_h * tile_w), row // tile_w % tile_h, row % tile_w
        inside = (t < tile_t) & (first_t + t < frames) & (first_h + h < height) & (first_w + w < width)
        token = ((first_t + t) * height + first_h + h) * width + first_w + w
        at = tokens + token[:, None].to(tl.int64) * x_n
        sums += tl.load(at, mask=inside[:, None] & (column[None, :] < dim), other=0).to(tl.float32)
    size = tl.minimum(tile_t, frames - first_t) * tl.minimum(tile_h, height - first_h)
    size = (size * tl.minimum(tile_w, width - first_w)).to(tl.float32)
    mean = tl.div_rn(tl.sum(sums, 0), tl.zeros([COLUMNS], tl.float32) + size)
    tl.store(g_means + ((b * heads + head) * tiles + tile) * dim + column, mean, mask=column < dim)


@triton.jit
def tile_scores(
    g_q, g_k, g_scores,
    first, heads, group, q_tiles, k_tiles, dim, row_stride,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Multiply a block of means of q with one of k. g_scores: fp32 rows of row_stride, BLOCK_Q to a block of q."""
    k_blocks, q_blocks = tl.cdiv(k_tiles, BLOCK_K), tl.cdiv(q_tiles, BLOCK_Q)
    here = tl.program_id(0) // k_blocks
    block = (first + here).to(tl.int64)
    set_ = block // q_blocks
    k_set = set_ // heads * (heads // group) + set_ % heads // group
    q_tile = (block % q_blocks).to(tl.int32) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    k_tile = tl.program_id(0) % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    q_rows = g_q + set_ * q_tiles * dim + q_tile[:, None] * dim
    k_rows = g_k + k_set * k_tiles * dim + k_tile[None, :] * dim
    scores = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q = tl.load(q_rows + d[None, :], mask=(q_tile[:, None] < q_tiles) & (d[None, :] < dim), other=0)
        k = tl.load(k_rows + d[:, None], mask=(k_tile[None, :] < k_tiles) & (d[:, None] < dim), other=0)
        scores = tl.dot(q, k, scores, input_precision="tf32x3")
    row = here.to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    tl.store(g_scores + row[:, None] * row_stride + k_tile[None, :], scores, mask=k_tile[None, :] < k_tiles)


@triton.jit
def _ordered(score):
    """Turn floats into integers of the same order: NaN above all, and 0 equal to -0."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(score != score, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _weights(score, greatest, scale, uniform):
    """Weigh scores, the greatest with 1; all alike in a row that is ``uniform``."""
    return tl.where(uniform, 1.0, tl.exp2((score - greatest) * scale))


@triton.jit
def select_rows(
    g_scores, g_count, g_index,
    first, q_tiles, k_tiles, most, row_stride, mass, scale,
    BY_MASS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Choose the key tiles of one query tile: ``most`` of them, or BY_MASS those that weigh ``mass``.

    scale: 1/sqrt(D) * log2(e), of the weights. PIECE: tiles that are listed at once.
    """
    q_blocks = tl.cdiv(q_tiles, BLOCK_Q)
    block = (first + tl.program_id(0) // BLOCK_Q).to(tl.int64)
    q_tile = (block % q_blocks).to(tl.int32) * BLOCK_Q + tl.program_id(0) % BLOCK_Q
    if q_tile >= q_tiles:
        return
    scores = g_scores + tl.program_id(0).to(tl.int64) * row_stride
    tile = tl.arange(0, BLOCK)
    inside = tile < k_tiles
    score = tl.load(scores + tile, mask=inside, other=-float("inf"))
    # The threshold is the greatest integer that enough tiles reach; it lies between low and high.
    if BY_MASS:
        greatest = tl.max(score)
        # The softmax of a row with NaN or an infinite maximum is NaN throughout: its tiles tie, and one is kept.
        uniform = (tl.max((score != score).to(tl.int32)) != 0) | (tl.abs(greatest) == float("inf"))
        weight = tl.where(inside, _weights(score, greatest, scale, uniform), 0.0)
        wanted = tl.where(uniform, 0.5, mass * tl.sum(weight))
        # From the bits of 0 to those of 1: as integers, floats that are not negative keep their order.
        low, high = tl.full([], 0, tl.int32), tl.full([], 0x3F800000, tl.int32)
        while low < high:
            middle = low + (high - low + 1) // 2
            enough = tl.sum(tl.where(weight >= middle.to(tl.float32, bitcast=True), weight, 0.0)) >= wanted
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        above = tl.sum(tl.where(weight > low.to(tl.float32, bitcast=True), weight, 0.0))
    else:
        key = tl.where(inside, _ordered(score), -0x7FFFFFFF - 1)  # behind the row: the key of no float
        low, high = tl.min(tl.where(inside, key, 0x7FFFFFFF)), tl.max(key)
        while low < high:
            middle = (low | high) - ((low ^ high) >> 1)  # half of the sum, rounded up, and no sum overflows
            reached = tl.sum((key >= middle).to(tl.int32))
            low = tl.where(reached >= most, middle, low)
            high = tl.where(reached == most, middle, tl.where(reached > most, high, middle - 1))
        above = tl.sum((key > low).to(tl.int32))
    # The row is read again, piece by piece: keeping it would cost more registers than the search needs.
    row = block // q_blocks * q_tiles + q_tile
    count, ties = 0, 0
    for start in range(0, k_tiles, PIECE):
        listed = start + tl.arange(0, PIECE)
        real = listed < k_tiles
        again = tl.load(scores + listed, mask=real, other=0)
        order = _weights(again, greatest, scale, uniform).to(tl.int32, bitcast=True) if BY_MASS else _ordered(again)
        equal = (real & (order == low)).to(tl.int32)
        rank = ties + tl.cumsum(equal, 0) - equal
        if BY_MASS:
            among = above + rank.to(tl.float32) * low.to(tl.float32, bitcast=True) < wanted
        else:
            among = above + rank < most
        chosen = real & ((order > low) | ((equal != 0) & among))
        taken = chosen.to(tl.int32)
        tl.store(g_index + row * most + (count + tl.cumsum(taken, 0) - taken), listed, mask=chosen)
        count += tl.sum(taken)
        ties += tl.sum(equal)
    tl.store(g_count + row, count)
    if BY_MASS:
        for start in range(count, most, PIECE):
            slot = start + tl.arange(0, PIECE)
            tl.store(g_index + row * most + slot, tl.zeros([PIECE], tl.int32) + (k_tiles - 1), mask=slot < most)


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    shape: Triple,
    q_tile: Triple,
    k_tile: Triple,
    keep: int | None,
    mass: float | None,
    config: Config = CONFIGS[0],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose key tiles, ``keep`` of them or those that weigh ``mass``: count [B, heads, q tiles], index [..., most].

    q, k: [B, video tokens, heads, D] of any strides, as ``stattn.top_k`` has checked them. Entries of index behind
    count hold the last tile.
    """
    (batch, _, heads, dim), k_heads = q.shape, k.shape[2]
    q_tiles, k_tiles = (math.prod(-(-n // e) for n, e in zip(shape, tile, strict=True)) for tile in (q_tile, k_tile))
    most = k_tiles if keep is None else keep
    count = q.new_empty((batch, heads, q_tiles), dtype=torch.int32)
    index = q.new_empty((batch, heads, q_tiles, most), dtype=torch.int32)
    if not count.numel():
        return count, index
    if most == k_tiles and mass in (None, 1):
        return count.fill_(k_tiles), index.copy_(torch.arange(k_tiles, dtype=torch.int32, device=q.device))
    block_q = config.score_q
    row_stride = triton.cdiv(k_tiles, 16) * 16
    blocks = batch * heads * triton.cdiv(q_tiles, block_q)
    at_once = min(blocks, max(1, SCORES // (block_q * row_stride)))
    with torch.cuda.device_of(q):
        q_means, k_means = (_means(x, shape, tile, config) for x, tile in ((q, q_tile), (k, k_tile)))
        scores = q_means.new_empty((at_once * block_q, row_stride))
        for first in range(0, blocks, at_once):
            here = min(at_once, blocks - first)
            tile_scores[(here * triton.cdiv(k_tiles, config.score_k),)](
                q_means, k_means, scores, first, heads, heads // k_heads, q_tiles, k_tiles, dim, row_stride,
                block_q, config.score_k, config.score_d, num_warps=config.score_warps,
            )  # fmt: skip
            select_rows[(here * block_q,)](
                scores, count, index, first, q_tiles, k_tiles, most, row_stride,
                0.0 if mass is None else mass, math.log2(math.e) / math.sqrt(dim),
                mass is not None, block_q, *config.row_block(k_tiles), num_warps=config.row_warps(k_tiles),
            )  # fmt: skip
    return count, index


def _means(x: torch.Tensor, shape: Triple, tile: Triple, config: Config) -> torch.Tensor:
    batch, _, heads, dim = x.shape
    tiles = math.prod(-(-n // e) for n, e in zip(shape, tile, strict=True))
    means = x.new_empty((batch, heads, tiles, dim), dtype=torch.float32)
    rows, columns = config.mean_block(dim, x.stride(3))
    tile_means[(batch * heads * tiles, triton.cdiv(dim, columns))](
        x, means, heads, dim, *shape, *tile, *x.stride(),
        min(rows, triton.next_power_of_2(math.prod(tile))), columns, num_warps=4,
    )  # fmt: skip
    return means


# --- masks and lists -------------------------------------------------------------------------------------------------


@triton.jit
def join_rows(
    g_count, g_index, g_partial, g_kinds, g_table, g_new_count, g_new_index, g_new_partial,
    first, heads, q_tiles, k_tiles, most,
    count_b, count_h, count_q, index_b, index_h, index_q, index_e, partial_b, partial_h, partial_q, partial_e,
    TILES: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Join the list of one query tile and the mask's kinds of its tiles: 0 empty, 1 partial, 2 full."""
    row = first + tl.program_id(0).to(tl.int64)
    q_tile, set_ = row % q_tiles, row // q_tiles
    b, h = set_ // heads, set_ % heads
    kinds = g_kinds + q_tile * k_tiles
    table = g_table + tl.program_id(0).to(tl.int64) * k_tiles
    for start in range(0, k_tiles, TILES):
        tile = start + tl.arange(0, TILES)
        tl.store(table + tile, tl.load(kinds + tile, mask=tile < k_tiles, other=0), mask=tile < k_tiles)
    tl.debug_barrier()  # other threads mark what these have copied
    listed = tl.load(g_count + b * count_b + h * count_h + q_tile * count_q)
    for start in range(0, listed, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        marked = tl.load(
            g_index + b * index_b + h * index_h + q_tile * index_q + entry * index_e, mask=entry < listed, other=-1
        )
        real = (marked >= 0) & (marked < k_tiles)  # nobody checked the entries: stay inside the table
        kind = tl.full([ENTRIES], 2, tl.int8)
        if g_partial is not None:
            flags = g_partial + b * partial_b + h * partial_h + q_tile * partial_q
            partial = tl.load(flags + entry * partial_e, mask=real, other=0) != 0
            kind = tl.where(partial, tl.load(kinds + marked, mask=real, other=0), kind)
            kind = tl.where(partial & (kind == 0), 1, kind).to(tl.int8)
        tl.store(table + marked, kind, mask=real)
    tl.debug_barrier()  # and these read what others have marked
    count = 0
    for start in range(0, k_tiles, TILES):
        tile = start + tl.arange(0, TILES)
        kind = tl.load(table + tile, mask=tile < k_tiles, other=0)
        taken = (kind != 0).to(tl.int32)
        at = row * most + (count + tl.cumsum(taken, 0) - taken)
        tl.store(g_new_index + at, tile, mask=kind != 0)
        tl.store(g_new_partial + at, (kind == 1).to(tl.uint8), mask=kind != 0)
        count += tl.sum(taken)
    tl.store(g_new_count + row, count)
    for start in range(count, most, TILES):
        slot = start + tl.arange(0, TILES)
        tl.store(g_new_index + row * most + slot, tl.zeros([TILES], tl.int32) + (k_tiles - 1), mask=slot < most)
        tl.store(g_new_partial + row * most + slot, tl.zeros([TILES], tl.uint8), mask=slot < most)


def join(
    count: torch.Tensor,
    index: torch.Tensor,
    partial: torch.Tensor | None,
    kinds: torch.Tensor,
    new_count: torch.Tensor,
    new_index: torch.Tensor,
    new_partial: torch.Tensor,
    config: Config = CONFIGS[0],
) -> None:
    """Join lists and a mask's kinds of tiles, int8 [q tiles, k tiles], as ``stattn.blocks.join`` describes.

    count, index, partial: of any strides. The new lists are contiguous, their rows long enough.
    """
    batch, heads, q_tiles, _ = index.shape
    k_tiles, rows = kinds.shape[1], batch * heads * q_tiles
    at_once = min(rows, max(1, KINDS // k_tiles))
    with torch.cuda.device_of(index):
        table = kinds.new_empty((at_once, k_tiles))
        for first in range(0, rows, max(1, at_once)):
            join_rows[(min(at_once, rows - first),)](
                count, index, None if partial is None else partial.view(torch.uint8), kinds, table,
                new_count, new_index, new_partial.view(torch.uint8),
                first, heads, q_tiles, k_tiles, new_index.shape[3],
                *count.stride(), *index.stride(), *(index if partial is None else partial).stride(),
                config.row_tiles, config.list_entries, num_warps=4,
            )  # fmt: skip


# --- transposition ---------------------------------------------------------------------------------------------------


@triton.jit
def transpose_mark(
    g_count, g_index, g_partial, g_listed, g_marked,
    heads, q_tiles, k_tiles, most, words,
    count_b, count_h, count_q, index_b, index_h, index_q, index_e, partial_b, partial_h, partial_q, partial_e,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """Mark the key tiles of one query tile's list in g_listed, the partial ones in g_marked. [sets, words, k tiles]"""
    row = tl.program_id(0).to(tl.int64)
    q_tile = (row % q_tiles).to(tl.int32)
    set_ = row // q_tiles
    b, h = set_ // heads, set_ % heads
    count = tl.load(g_count + b * count_b + h * count_h + q_tile.to(tl.int64) * count_q)
    count = tl.minimum(count, most)
    list_ = g_index + b * index_b + h * index_h + q_tile.to(tl.int64) * index_q
    at = (set_ * words + q_tile // 32) * k_tiles
    bit = tl.full([ENTRIES], 1, tl.int32) << (q_tile % 32)
    for start in range(0, count, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        k_tile = tl.load(list_ + entry * index_e, mask=entry < count, other=-1)
        real = (k_tile >= 0) & (k_tile < k_tiles)  # nobody checked the entries: stay inside the table
        tl.atomic_or(g_listed + at + k_tile, bit, mask=real, sem="relaxed")
        if g_partial is not None:
            flags = g_partial + b * partial_b + h * partial_h + q_tile.to(tl.int64) * partial_q
            partial = tl.load(flags + entry * partial_e, mask=real, other=0) != 0
            tl.atomic_or(g_marked + at + k_tile, bit, mask=real & partial, sem="relaxed")


@triton.jit
def transpose_count(g_listed, g_sizes, k_tiles, words, KEYS: tl.constexpr):
    """Count the query tiles that list each key tile. g_sizes: [sets, k tiles]"""
    blocks = tl.cdiv(k_tiles, KEYS)
    set_ = (tl.program_id(0) // blocks).to(tl.int64)
    k_tile = (tl.program_id(0) % blocks) * KEYS + tl.arange(0, KEYS)
    place = tl.arange(0, 32)
    sums = tl.zeros([KEYS, 32], tl.int32)
    listed = g_listed + set_ * words * k_tiles
    for _ in range(words):
        word = tl.load(listed + k_tile, mask=k_tile < k_tiles, other=0)
        sums += (word[:, None] >> place[None, :]) & 1
        listed += k_tiles
    tl.store(g_sizes + set_ * k_tiles + k_tile, tl.sum(sums, 1), mask=k_tile < k_tiles)


@triton.jit
def transpose_fill(
    g_listed, g_marked, g_offset, g_item, g_partial, k_tiles, words, items, KEYS: tl.constexpr
):  # fmt: skip
    """Write the query tiles that list each key tile, in ascending order, from where its list starts."""
    blocks = tl.cdiv(k_tiles, KEYS)
    set_ = (tl.program_id(0) // blocks).to(tl.int64)
    k_tile = (tl.program_id(0) % blocks) * KEYS + tl.arange(0, KEYS)
    inside = k_tile < k_tiles
    place = tl.arange(0, 32)
    next_ = tl.load(g_offset + set_ * (k_tiles + 1) + k_tile, mask=inside, other=0)
    table = set_ * words * k_tiles
    for word_number in range(words):
        word = tl.load(g_listed + table + k_tile, mask=inside, other=0)
        bits = (word[:, None] >> place[None, :]) & 1  # [KEYS, 32]
        to = set_ * items + (next_[:, None] + tl.cumsum(bits, 1) - bits)
        q_tile = tl.broadcast_to(word_number * 32 + place[None, :], [KEYS, 32])
        tl.store(g_item + to, q_tile, mask=bits != 0)
        if g_partial is not None:
            marked = tl.load(g_marked + table + k_tile, mask=inside, other=0)
            tl.store(g_partial + to, ((marked[:, None] >> place[None, :]) & 1).to(tl.uint8), mask=bits != 0)
        next_ += tl.sum(bits, 1)
        table += k_tiles


def transpose(
    count: torch.Tensor,
    index: torch.Tensor,
    partial: torch.Tensor | None,
    k_tiles: int,
    config: Config = CONFIGS[0],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Transpose lists as ``stattn.blocks.transpose`` describes. Any strides; nothing is copied."""
    batch, heads, q_tiles, most = index.shape
    sets, words, items = batch * heads, triton.cdiv(q_tiles, WORD), q_tiles * most
    offset = index.new_zeros((batch, heads, k_tiles + 1))
    item = index.new_empty((batch, heads, items))
    flags = None if partial is None else partial.new_empty((batch, heads, items))
    if not sets * items:
        return offset, item, flags
    tables = index.new_zeros((1 if partial is None else 2, sets, words, k_tiles))
    listed, marked = tables[0], None if partial is None else tables[1]
    sizes = index.new_empty((batch, heads, k_tiles))
    key_programs = sets * triton.cdiv(k_tiles, config.key_tiles)
    with torch.cuda.device_of(index):
        transpose_mark[(sets * q_tiles,)](
            count, index, None if partial is None else partial.view(torch.uint8), listed, marked,
            heads, q_tiles, k_tiles, most, words,
            *count.stride(), *index.stride(), *(index if partial is None else partial).stride(),
            config.list_entries, num_warps=4,
        )  # fmt: skip
        transpose_count[(key_programs,)](listed, sizes, k_tiles, words, config.key_tiles, num_warps=4)
        torch.cumsum(sizes, -1, dtype=torch.int32, out=offset[..., 1:])
        transpose_fill[(key_programs,)](
            listed, marked, offset, item, None if flags is None else flags.view(torch.uint8),
            k_tiles, words, items, config.key_tiles, num_warps=4,
        )  # fmt: skip
    return offset, item, flags


# --- what launchers compile ------------------------------------------------------------------------------------------


def specializations() -> Iterator[Specialization]:
    """List what the launchers compile, with each of CONFIGS; what two of them share once."""
    seen = set()
    for number, config in enumerate(CONFIGS):
        for each in (*_selection(config), *_lists(config)):
            key = (each.fn, *each.types.items(), *each.constants.items(), *each.options.items())
            if key not in seen:
                seen.add(key)
                yield each._replace(name=f"{each.name}, config {number}")


def _selection(config: Config) -> Iterator[Specialization]:
    sizes = "heads dim frames height width tile_t tile_h tile_w x_b x_n x_h x_d".split()
    ints = dict.fromkeys(sizes, "i32")
    for dtype in ("bf16", "fp16", "fp32"):
        for dim, x_d in ((32, 1), (128, 1), (256, 1), (128, None)):
            rows, columns = config.mean_block(dim, x_d or 2)
            yield Specialization(
                f"tile_means {dtype} D {dim}{'' if x_d else ' of any stride'}",
                tile_means,
                {"g_x": f"*{dtype}", "g_means": "*fp32", **ints},
                {"ROWS": rows, "COLUMNS": columns, **({"x_d": x_d} if x_d else {})},
                {"num_warps": 4},
                tuple(name for name in sizes if name not in ("x_b", "x_n", "x_h", "dim")),
            )
    sizes = "first heads group q_tiles k_tiles dim row_stride".split()
    yield Specialization(
        "tile_scores",
        tile_scores,
        {"g_q": "*fp32", "g_k": "*fp32", "g_scores": "*fp32", **dict.fromkeys(sizes, "i32")},
        {"BLOCK_Q": config.score_q, "BLOCK_K": config.score_k, "BLOCK_D": config.score_d},
        {"num_warps": config.score_warps},
        tuple(name for name in sizes if name not in ("dim", "row_stride")),
    )
    sizes = "first q_tiles k_tiles most row_stride".split()
    tensors = {"g_scores": "*fp32", "g_count": "*i32", "g_index": "*i32", "mass": "fp32", "scale": "fp32"}
    for by_mass in (False, True):
        for k_tiles in (20, 1800, MOST_TILES):
            block, piece = config.row_block(k_tiles)
            yield Specialization(
                f"select_rows by {'mass' if by_mass else 'number'} of {k_tiles}",
                select_rows,
                {**tensors, **dict.fromkeys(sizes, "i32")},
                {"BY_MASS": by_mass, "BLOCK_Q": config.score_q, "BLOCK": block, "PIECE": piece},
                {"num_warps": config.row_warps(k_tiles)},
                tuple(name for name in sizes if name != "row_stride"),
            )


def _lists(config: Config) -> Iterator[Specialization]:
    strides = ("count_b count_h count_q", *(f"{x}_b {x}_h {x}_q {x}_e" for x in ("index", "partial")))
    ints = dict.fromkeys(" ".join(("first heads q_tiles k_tiles most words items", *strides)).split(), "i32")
    tensors = dict.fromkeys(("g_count", "g_index", "g_listed", "g_offset", "g_item", "g_sizes", "g_marked"), "*i32")
    joined = {"g_kinds": "*i8", "g_table": "*i8", "g_new_count": "*i32", "g_new_index": "*i32", "g_new_partial": "*u8"}
    types = {**tensors, **joined, "g_partial": "*u8", **ints}
    for flagged in (False, True):
        absent = {} if flagged else {"g_partial": None}
        unmarked = {} if flagged else {"g_marked": None}
        label = "with flags" if flagged else "without flags"
        constants = {"ENTRIES": config.list_entries, "index_e": 1, "partial_e": 1, **absent}
        tiles = {"TILES": config.row_tiles}
        yield Specialization(
            f"join_rows {label}", join_rows, types, constants | tiles, {"num_warps": 4}, tuple(ints)
        )
        yield Specialization(
            f"transpose_mark {label}", transpose_mark, types, constants | unmarked, {"num_warps": 4}, tuple(ints)
        )
        constants = {"KEYS": config.key_tiles, **absent, **unmarked}
        yield Specialization(
            f"transpose_fill {label}", transpose_fill, types, constants, {"num_warps": 4}, tuple(ints)
        )
    yield Specialization(
        "transpose_count", transpose_count, types, {"KEYS": config.key_tiles}, {"num_warps": 4}, tuple(ints)
    )
