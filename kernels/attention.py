"""Attention over a video grid, forward.

For a tile of queries, boxes of keys are visited one after the other; per row the running maximum m of the scores, the
sum l of exp(S - m) and the unnormalised output are kept in fp32 (online softmax, arXiv:1805.02867; arXiv:2205.14135)::

    S = q . k        P = exp2(scale log2(e) (S - m))        out = sum P v / l        LSE = scale m + ln l

bf16 and fp16 inputs are multiplied as they are and summed in fp32, P is rounded to their dtype; fp32 inputs are
multiplied in three TF32 products each. out is rounded once. Boxes that a tile sees wholly carry no element mask, boxes
that it does not see are not visited. A row's result depends on its own list of boxes alone. Bound by the tensor cores.

A key that is hidden from a row, in a box that another row of its tile sees, weighs 0: a NaN or an infinity there comes
through as 0 times itself. Keys that no query sees are loaded as 0, whatever they hold; but in listed tiles of which a
mask lets a part be seen, and in gaps between what tables allow the coordinates of a tile, they weigh 0 as well.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from stattn import plan
from stattn.grid import Grid, Triple
from stattn.kernels import _walk as walking
from stattn.kernels._compile import Specialization
from stattn.kernels._device import on_device, roomy
from stattn.problem import Extras, Problem

# Bytes of local memory that a thread may take. A program describes its segments in some fifty registers, beside its
# accumulators: what is needed between segments only, and for rare masks, is spilled; most for fp32, whose operands are
# split in three.
SPILLS = {"plain": 832, "everything": 1536, "lists": 1536}
MOST_VISITS = 8  # pairs visited for one that per-frame or per-place attention allows, where a config can keep to it
LOG2E = tl.constexpr(1.4426950408889634)
PRECISION = tl.constexpr("tf32x3")  # of fp32 products; 16-bit ones have but one
# Integers that kernels are not compiled for: what they count differs from call to call.
COUNTS = (
    "group", "before", "after", "q_first", "q_video", "k_video", "tiles", "global_tiles", "slots", "list_samples",
    "list_heads", "list_rows", "list_most", "list_programs", "list_t", "list_h", "list_w",
)  # fmt: skip


class Context(NamedTuple):
    """What a program's boxes have in common."""

    queries: Any  # [ROWS, WIDTH]
    k: Any
    v: Any
    k_token: Any
    v_token: Any
    exponent: Any


class Config(NamedTuple):
    """A launch: tiles of rows, boxes of columns, warps, stages; the head dimensions and bytes an element it serves.

    rate: pairs of a row and a column a second, relative to the best, by which a config is chosen for a mask. little:
    the widest head with which it takes no more than LITTLE_SHARED.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    widths: tuple[int, ...]
    bytes: int
    rate: float
    little: int = 256


CONFIGS = (
    Config(128, 64, 8, 3, (128,), 2, 1.0, 0),
    Config(64, 64, 4, 3, (128,), 2, 0.95),
    Config(128, 64, 4, 3, (16, 32, 64), 2, 1.0),
    Config(64, 64, 4, 3, (16, 32, 64), 2, 0.86),
    Config(128, 32, 8, 2, (256,), 2, 1.0, 0),
    Config(16, 16, 2, 2, (16, 32, 64, 128, 256), 2, 0.15),
    Config(64, 32, 8, 2, (16, 32, 64, 128), 4, 1.0, 64),
    Config(16, 16, 8, 1, (256,), 4, 1.0),
    Config(16, 16, 2, 2, (16, 32, 64, 128), 4, 0.4),
)


@triton.jit
def _score(context, row, near, DIM: tl.constexpr, WIDTH: tl.constexpr):
    keys = walking.load_rows(context.k, row, context.k_token, near, DIM, WIDTH)
    return tl.dot(context.queries, tl.trans(keys), input_precision=PRECISION), keys


@triton.jit
def _take(context, state, scores, row, near, keys, DIM: tl.constexpr, WIDTH: tl.constexpr):
    output, most, total = state
    now = tl.maximum(most, tl.max(scores, 1))
    shift = tl.where(now == -float("inf"), 0.0, now) * context.exponent
    p = tl.exp2(scores * context.exponent - shift[:, None])
    alpha = tl.exp2(most * context.exponent - shift)
    values = walking.load_rows(context.v, row, context.v_token, near, DIM, WIDTH)
    output = tl.dot(p.to(values.dtype), values, output * alpha[:, None], input_precision=PRECISION)
    return output, now, total * alpha + tl.sum(p, 1)


@triton.jit(do_not_specialize=COUNTS)
def attention_forward(
    q, k, v, out, lse, walks, frames, valid, count, index, partial,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    q_tokens, heads, group, before, after, q_first, q_video, k_video, tiles, global_tiles, slots,
    list_samples, list_heads, list_rows, list_most, list_programs, list_t, list_h, list_w,
    scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIGN: tl.constexpr,
    GLOBALS: tl.constexpr, SEE_ALL: tl.constexpr, OVERLAP: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    # Global queries first: their rows are the longest.
    tile = tl.program_id(0) % (tiles + global_tiles)
    head = tl.program_id(0) // (tiles + global_tiles) % heads
    batch = (tl.program_id(0) // (tiles + global_tiles) // heads).to(tl.int64)
    walk = walks + tl.load(walks + head)
    q += batch * q_batch + head.to(tl.int64) * q_head
    k += batch * k_batch + (head // group).to(tl.int64) * k_head
    v += batch * v_batch + (head // group).to(tl.int64) * v_head
    if valid is not None:
        valid += batch * (before + after)

    is_global = tile < global_tiles
    entry_from, entries = 0, 0
    if index is None:
        rows, exists, place = walking.tile_rows(walk, tl.maximum(tile - global_tiles, 0), tl.load(walk), ROWS)
    else:
        rows, exists, place = walking.list_rows(walk, tl.maximum(tile - global_tiles, 0), list_programs, ROWS)
        list_row = ((batch % list_samples) * list_heads + head % list_heads) * list_rows + place[0]
        entry_from, entries = list_row * list_most, tl.load(count + list_row)
    row = q_first + (rows[0] * tl.load(walk + 1) + rows[1]) * tl.load(walk + 2) + rows[2]
    real = exists
    if GLOBALS:
        row, exists, real = walking.global_rows(row, exists, tile, is_global, before, after, q_video, valid, ROWS)
    queries = walking.load_rows(q, row.to(tl.int64), q_token, real, DIM, WIDTH)
    if SIGN != 1:
        queries = queries * SIGN

    context = Context(queries, k, v, k_token, v_token, scale * LOG2E)
    nothing = tl.zeros([ROWS], tl.float32)
    state = tl.zeros([ROWS, WIDTH], tl.float32), nothing - float("inf"), nothing
    output, most, total = walking.visit(
        _score, _take, context, state, walk, rows, exists, is_global, place,
        before, before, after, k_video, 0 if GLOBALS else 2, SEE_ALL,
        frames, slots, valid, index, partial, entry_from, entries, (list_t, list_h, list_w),
        COLUMNS, DIM, WIDTH, OVERLAP, INT64,
    )  # fmt: skip
    # A query that sees nothing, and one that is not real, is 0.
    some = real & (total > 0)
    total = tl.where(some, total, 1.0)
    output = output * tl.where(some, 1.0 / total, 0.0)[:, None]
    out += (batch * q_tokens * heads + head) * DIM
    walking.store_rows(out, row.to(tl.int64), heads * DIM, output, exists, DIM, WIDTH)
    value = tl.where(some, most * scale + tl.log(total), -float("inf"))
    tl.store(lse + (batch * heads + head) * q_tokens + row, value, mask=exists)


class Plan(NamedTuple):
    """What a launch needs to know of a problem: a config, the walks of all heads on the device, and tiles a head.

    programs: those that share a tile of block lists. overlap: whether some product excludes what earlier ones allow.
    cost: of a mask's walks for one head, in pairs visited; 0 of block lists.
    """

    config: Config
    walks: torch.Tensor
    tiles: int
    programs: int
    overlap: bool
    cost: float


@functools.lru_cache(maxsize=512)
def make_plan(
    problem: Problem, heads: int, head_dim: int, size: int, frames: bool, by_key: bool, configs: tuple[Config, ...],
    device: torch.device,
) -> Plan:  # fmt: skip
    """Choose the config that costs least for a problem, and lay its walks out. size: bytes an element."""
    width = max(16, triton.next_power_of_2(head_dim))
    able = [config for config in configs if width in config.widths and size == config.bytes]
    if not roomy(device):
        able = [config for config in able if width <= config.little]
    walks: list[plan.Walk] = []
    member = [0] * heads
    programs, least = 1, 0.0
    if problem.q_tile is not None and problem.k_tile is not None:
        mask = problem.masks[0] if problem.masks else None
        tiles = (problem.k_tile, problem.q_tile) if by_key else (problem.q_tile, problem.k_tile)
        row_tile, column_tile = (math.prod(tile) for tile in tiles)

        def pairs(config: Config) -> float:  # tiles that do not divide are padded
            padded = (math.ceil(row_tile / config.rows), math.ceil(column_tile / config.columns))
            return padded[0] * config.rows * padded[1] * config.columns / config.rate

        config = min(able, key=pairs)
        walks.append(plan.lists(mask, problem.grid, tiles, config.columns, by_key))
        programs = math.ceil(row_tile / config.rows)
    else:
        make = plan.by_key if by_key else plan.by_query
        distinct = list(dict.fromkeys(problem.masks))
        member = [distinct.index(mask) for mask in problem.masks] if len(problem.masks) > 1 else member
        grid = Grid(*problem.grid.shape)

        def lay(config: Config) -> list[plan.Walk]:
            boxes = (problem.q_box, problem.k_box)
            return [make(mask, grid, *boxes, config.rows, config.columns, frames) for mask in distinct]

        def cost(config: Config) -> float:
            per_box = config.rows * config.columns / config.rate
            return sum((walk.visited + 2 * math.prod(walk.tiles)) * per_box for walk in lay(config))

        def waste(config: Config) -> float:
            most = [MOST_VISITS * walk.allowed if walk.windowless else math.inf for walk in lay(config)]
            visited = (walk.visited * config.rows * config.columns for walk in lay(config))
            return max(max(pairs - limit, 0.0) for pairs, limit in zip(visited, most, strict=True))

        config = min(able, key=lambda config: (waste(config), cost(config)))
        walks, least = lay(config), cost(config)
    table = torch.from_numpy(plan.encode(walks, member)).to(device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams read the table later
    tiles_per_head = max(math.prod(walk.tiles) for walk in walks) * programs
    return Plan(config, table, tiles_per_head, programs, any(walk.overlap for walk in walks), least)


def wide(*tensors: torch.Tensor) -> bool:
    """Say whether offsets within one head of x [B, N, heads, D] need 64 bits."""
    for x in tensors:
        _, tokens, _, dim = x.shape
        if tokens * x.stride(1) + dim >= 2**31:
            return True
    return False


def strides(**tensors: torch.Tensor) -> dict[str, int]:
    """Name the strides of [B, N, heads, D] tensors as kernels do."""
    found = {}
    for name, x in tensors.items():
        batch, token, head = _stride_names(name)
        found[batch], found[token], found[head], _ = x.stride()
    return found


@functools.cache
def _stride_names(name: str) -> tuple[str, str, str]:
    return f"{name}_batch", f"{name}_token", f"{name}_head"


def shared_arguments(q: torch.Tensor, k: torch.Tensor, problem: Problem, extras: Extras) -> dict[str, Any]:
    """Give the arguments of all attention kernels that a problem decides."""
    _, tokens, heads, dim = q.shape
    return _decided(problem, tokens, heads, heads // k.shape[2], dim) | {
        "frames": None if extras.k_frames is None else extras.k_frames.contiguous(),
        "valid": None if extras.valid is None else extras.valid.contiguous().view(torch.uint8),
        "slots": 1 if extras.k_frames is None else extras.k_frames.shape[0],
    }


@functools.lru_cache(maxsize=1024)
def _decided(problem: Problem, tokens: int, heads: int, group: int, dim: int) -> dict[str, Any]:
    """Give the arguments that are no tensors, and change with none."""
    grid = problem.grid
    return {
        "q_tokens": tokens, "heads": heads, "group": group,
        "before": grid.before, "after": grid.after, "q_first": grid.before if problem.q_globals else 0,
        "q_video": problem.q_box.video, "k_video": problem.k_box.video,
        "scale": abs(problem.scale) or 1.0,
        "SIGN": int(np.sign(problem.scale)),
        "DIM": dim,
        "WIDTH": max(16, triton.next_power_of_2(dim)),
        "GLOBALS": grid.globals > 0,
        "SEE_ALL": problem.globals_see == "all",
    }  # fmt: skip


def plan_arguments(made: Plan) -> dict[str, Any]:
    """Give the arguments that a plan decides."""
    config = made.config
    return {
        "walks": made.walks, "tiles": made.tiles, "ROWS": config.rows, "COLUMNS": config.columns,
        "OVERLAP": made.overlap, "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


def list_arguments(extras: Extras, column_tile: Triple | None, made: Plan) -> dict[str, Any]:
    """Give the arguments of block lists, as the forward pass reads them. column_tile: extents of the key tiles."""
    count, index, partial = extras.block_count, extras.block_index, extras.block_partial
    tile = column_tile or (1, 1, 1)
    return {
        "count": None if count is None else count.contiguous(),
        "index": None if index is None else index.contiguous(),
        "partial": None if partial is None else partial.contiguous().view(torch.uint8),
        "list_samples": 1 if count is None else count.shape[0], "list_heads": 1 if count is None else count.shape[1],
        "list_rows": 0 if count is None else count.shape[2], "list_most": 0 if index is None else index.shape[3],
        "list_programs": made.programs, "list_t": tile[0], "list_h": tile[1], "list_w": tile[2],
    }  # fmt: skip


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the output [B, Nq, heads, D] and the LSE [B, heads, Nq] (natural log, fp32)."""
    batch, tokens, heads, dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    made = make_plan(problem, heads, dim, q.element_size(), extras.k_frames is not None, False, CONFIGS, q.device)
    global_tiles = -(-problem.grid.globals // made.config.rows) if problem.q_globals else 0
    with on_device(q):
        attention_forward[(batch * heads * (made.tiles + global_tiles),)](
            q, k, v, out, lse, global_tiles=global_tiles, INT64=wide(k, v), **strides(q=q, k=k, v=v),
            **shared_arguments(q, k, problem, extras), **plan_arguments(made),
            **list_arguments(extras, problem.k_tile, made),
        )  # fmt: skip
    return out, lse


def specializations_of(name: str, fn: Any, configs: tuple[Config, ...]) -> Iterator[Specialization]:
    """List what a launcher compiles of an attention kernel: every config at its widest head, for plain masks; and the
    first one for all that a call may have at once, and for block lists.
    """
    optional = {"frames": "*i32", "valid": "*u8", "partial": "*u8", "count": "*i32", "offset": "*i32", "index": "*i32"}
    optional = {each: kind for each, kind in optional.items() if each in fn.arg_names}
    kinds = {"plain": set(), "everything": {"frames", "valid"}, "lists": set(optional) - {"frames"}}
    for config, (kind, present) in itertools.product(configs, kinds.items()):
        if kind != "plain" and config is not configs[0]:
            continue
        dtype, width = "bf16" if config.bytes == 2 else "fp32", config.widths[-1]
        constants: dict[str, Any] = {
            "DIM": width, "WIDTH": width, "ROWS": config.rows, "COLUMNS": config.columns, "SIGN": 1,
            "GLOBALS": kind != "plain", "Q_GLOBALS": kind != "plain", "SEE_ALL": True,
            "OVERLAP": kind == "everything", "INT64": kind == "everything",
        }  # fmt: skip
        constants = {each: value for each, value in constants.items() if each in fn.arg_names}
        constants |= {each: None for each in optional if each not in present}
        types = {each: optional[each] for each in present} | {"walks": "*i32", "scale": "fp32"}
        types |= dict.fromkeys(("lse", "delta"), "*fp32")
        types |= dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), f"*{dtype}")
        types |= {each: "i32" for each in fn.arg_names if each not in types and each not in constants}
        options = {"num_warps": config.warps, "num_stages": config.stages}
        label = f"{name}-{dtype}-{width}-{config.rows}x{config.columns}-{kind}"
        counts = tuple(set(COUNTS) & set(fn.arg_names))
        only, little = None if kind == "plain" else 90, width <= config.little
        made = Specialization(label, fn, types, constants, options, counts, SPILLS[kind], only, little)
        yield made
        if kind == "plain" and 0 < config.little < width:
            narrow = dict.fromkeys(("DIM", "WIDTH"), config.little)
            yield made._replace(name=f"{label}-little", constants=constants | narrow, only=80, little=True)


def specializations() -> Iterator[Specialization]:
    """List what ``attention`` compiles."""
    yield from specializations_of("forward", attention_forward, CONFIGS)
