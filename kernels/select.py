# mypy: allow-untyped-defs, allow-incomplete-defs
"""Selection of key tiles on the device: no sort, no word to the host.

m(i) = mean of the tokens of tile i, s(i, j) = m_q(i) . m_k(j). A row i keeps the tiles j above a threshold
on s; of tiles that equal it the first ones. Three kernels: means, read once from where the tokens lie; scores, by
matrix products of 3xTF32; and rows. Floats are compared as integers of the same order, so that the threshold is found
by bisection over at most 32 bits, with the row in registers: for top-k the greatest integer that ``keep`` tiles reach,
for top-p the greatest whose tiles weigh ``mass`` of the row's sum of exp(scale * (s - max)). A prefix sum of the chosen
tiles writes the list in ascending order. Scores are made for as many query tiles at a time as SCORES holds, so that
memory does not grow with the square of the tokens.

Sums, means, scores and weights are fp32, in an order that depends on the sizes alone. Bound by reading q and k once.
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
from stattn.kernels._device import on_device

SCORES = 2**24  # scores that are held at a time
MOST_TILES = 2**14  # the longest row of scores that registers hold


@dataclass(frozen=True)
class Config:
    """How a launch is cut.

    mean_elements: elements of tokens that a program of the means reads at once. score_q, score_k, score_d, score_warps:
    the block of a program of the scores. row_elements, row_piece: scores of a row in each thread, and those that a warp
    lists at once.
    """

    mean_elements: int = 8192
    score_q: int = 64
    score_k: int = 64
    score_d: int = 32
    score_warps: int = 4
    row_elements: int = 32
    row_piece: int = 256

    def row_warps(self, k_tiles: int) -> int:
        """Count the warps that hold a row of scores."""
        return min(16, max(1, triton.next_power_of_2(k_tiles) // (32 * self.row_elements)))

    def row_block(self, k_tiles: int) -> tuple[int, int]:
        """Give the elements of a row in registers, and those that are listed at once."""
        block = max(32, triton.next_power_of_2(k_tiles))
        return block, min(block, self.row_piece * self.row_warps(k_tiles))

    def mean_block(self, dim: int, stride: int) -> tuple[int, int]:
        """Give the tokens and columns that are read at once."""
        columns = min(triton.next_power_of_2(dim), 256)
        elements = self.mean_elements if stride == 1 else 1024  # each with an address of its own
        return elements // columns, columns


CONFIGS = (
    Config(),
    Config(score_k=128, score_d=16, score_warps=8, row_elements=64),
    Config(mean_elements=4096, row_elements=16),
)


# Selection.


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


@triton.jit(do_not_specialize=["first"])
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


@triton.jit(do_not_specialize=["first"])
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
    k_means: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose key tiles, ``keep`` of them or those that weigh ``mass``: count [B, heads, q tiles], index [..., most].

    q, k: [B, video tokens, heads, D] of any strides, as ``stattn.top_k`` has checked them. Entries of index behind
    count hold the last tile. k_means: fp32 [B, key heads, k tiles, D] where they are made already.
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
    with on_device(q):
        q_means = means(q, shape, q_tile, config)
        k_means = means(k, shape, k_tile, config) if k_means is None else k_means.contiguous()
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


def means(x: torch.Tensor, shape: Triple, tile: Triple, config: Config) -> torch.Tensor:
    """Average the tokens of each tile. x: [B, video tokens, heads, D] of any strides -> fp32 [B, heads, tiles, D]"""
    batch, _, heads, dim = x.shape
    tiles = math.prod(-(-n // e) for n, e in zip(shape, tile, strict=True))
    found = x.new_empty((batch, heads, tiles, dim), dtype=torch.float32)
    rows, columns = config.mean_block(dim, x.stride(3))
    tile_means[(batch * heads * tiles, triton.cdiv(dim, columns))](
        x, found, heads, dim, *shape, *tile, *x.stride(),
        min(rows, triton.next_power_of_2(math.prod(tile))), columns, num_warps=4,
    )  # fmt: skip
    return found


# What launchers compile.


def specializations() -> Iterator[Specialization]:
    """List what the launchers compile, with each of CONFIGS; what two of them share once."""
    seen = set()
    for number, config in enumerate(CONFIGS):
        for each in _compiled(config):
            key = (each.fn, *each.types.items(), *each.constants.items(), *each.options.items())
            if key not in seen:
                seen.add(key)
                yield each._replace(name=f"{each.name}, config {number}")


def _compiled(config: Config) -> Iterator[Specialization]:
    sizes = "heads dim frames height width tile_t tile_h tile_w x_b x_n x_h x_d".split()
    ints = dict.fromkeys(sizes, "i32")
    for dtype in ("bf16", "fp32"):  # fp16 is read as bf16 is
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
