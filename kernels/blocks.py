# mypy: allow-untyped-defs, allow-incomplete-defs
"""Block lists on the device: joined by a mask, and seen from the key tiles. No sort, no word to the host.

Joining merges a mask's kinds of tiles into lists: a row of bytes, marked by the list, compacted by a prefix sum.

Transposition turns lists of key tiles per query tile into lists of query tiles per key tile. Each query tile marks its
key tiles in a table of bits, 32 query tiles to a word (an atomic OR, whose result no order changes); sums of the bits
of a key tile give where its list starts, and prefix sums over the words place its query tiles in ascending order.

Integers only: nothing is rounded. Bound by the latency of reading lists, bytes and bits, some bytes per entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stattn.kernels._compile import Specialization
from stattn.kernels._device import on_device

WORD = 32  # query tiles in a word of the table of bits
KINDS = 2**26  # kinds of tiles that are held at a time


@dataclass(frozen=True)
class Config:
    """How a launch is cut.

    row_tiles, list_entries: kinds of tiles, and entries of a list, that are read at once. key_tiles: key tiles whose
    lists one program of the transposition gathers.
    """

    row_tiles: int = 512
    list_entries: int = 256
    key_tiles: int = 16


CONFIGS = (Config(), Config(list_entries=512, key_tiles=32))


# Joining a mask.


@triton.jit(do_not_specialize=["first"])
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
    with on_device(index):
        table = kinds.new_empty((at_once, k_tiles))
        for first in range(0, rows, max(1, at_once)):
            join_rows[(min(at_once, rows - first),)](
                count, index, None if partial is None else partial.view(torch.uint8), kinds, table,
                new_count, new_index, new_partial.view(torch.uint8),
                first, heads, q_tiles, k_tiles, new_index.shape[3],
                *count.stride(), *index.stride(), *(index if partial is None else partial).stride(),
                config.row_tiles, config.list_entries, num_warps=4,
            )  # fmt: skip


# Transposition.


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
    with on_device(index):
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


# What launchers compile.


def specializations() -> Iterator[Specialization]:
    """List what the launchers compile, with each of CONFIGS."""
    for number, config in enumerate(CONFIGS):
        for each in _compiled(config):
            yield each._replace(name=f"{each.name}, config {number}")


def _compiled(config: Config) -> Iterator[Specialization]:
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
        yield Specialization(f"join_rows {label}", join_rows, types, constants | tiles, {"num_warps": 4}, tuple(ints))
        yield Specialization(
            f"transpose_mark {label}", transpose_mark, types, constants | unmarked, {"num_warps": 4}, tuple(ints)
        )
        constants = {"KEYS": config.key_tiles, **absent, **unmarked}
        yield Specialization(f"transpose_fill {label}", transpose_fill, types, constants, {"num_warps": 4}, tuple(ints))
    yield Specialization(
        "transpose_count", transpose_count, types, {"KEYS": config.key_tiles}, {"num_warps": 4}, tuple(ints)
    )
