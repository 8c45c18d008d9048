"""The forward pass of ``attention_runs`` with warps of a kind, in Gluon: one copies, two groups of four compute.

Programs stay on their multiprocessor and walk over tiles, so that the copying warp asks for the boxes of the next tile
while the last one is written. Each group of warps owns half of a tile's rows. It asks for the scores of a box before
it multiplies the last one's P with its values, and takes the exponentials while that product runs. Numbers are those
of ``attention_runs``, in boxes of their own.

For sm_90 alone: products are wgmma. Triton's interpreter has no Gluon, so that all of it is tested on a GPU. Bound by
the tensor cores.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from stattn.kernels._compile import Specialization
from stattn.kernels._device import capability, on_device
from stattn.kernels.attention import LOG2E, Config

# Rows of a tile, columns of a box; warps of each of the two groups, boxes of keys (and of values) in flight.
CONFIGS = (
    Config(128, 128, 4, 2, (128,), 2, 1.6),
    Config(128, 128, 4, 4, (64,), 2, 1.3),
)
GROUPS = gl.constexpr(2)
SLOTS = gl.constexpr(2)  # tiles whose queries are in shared memory
REGISTERS = (240, 24)  # of a thread that computes, and of one that copies
COUNTS = ("total", "tiles", "heads", "group", "entries", "q_tokens")
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)  # of boxes of 64 or more features
NEGATIVE_INFINITY = gl.constexpr(-float("inf"))


@gluon.jit
def _tile(walk, number):
    """Find the record, head and sample of a tile, by its number among all."""
    table, _, tiles, heads, entries = walk
    return table + number % tiles * entries, number // tiles % heads, number // tiles // heads


@gluon.jit
def _copy(
    walk, group, boxes, buffers, barriers,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Bring the queries of each tile, and the boxes of keys and values that it sees, as buffers become free."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    _, total, _, _, entries = walk
    size: gl.constexpr = DIM * boxes[0].dtype.primitive_bitwidth // 8
    turn, count = 0, 0
    for number in range(gl.program_id(0), total, gl.num_programs(0)):
        record, head, batch = _tile(walk, number)
        k_head = head // group
        slot = turn % SLOTS
        mbarrier.wait(q_empty.index(slot), (turn // SLOTS & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), ROWS * size)
        at = [batch, gl.load(record), head, 0]
        tma.async_copy_global_to_shared(boxes[0], at, q_full.index(slot), buffers[0].index(slot))
        turn += 1
        for run in range((entries - 2) // 2):
            first, length = gl.load(record + 2 + 2 * run), gl.load(record + 3 + 2 * run)
            for start in range(0, length, COLUMNS):
                token = first + gl.minimum(start, length - COLUMNS)
                stage, phase = count % STAGES, (count // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                mbarrier.expect(k_full.index(stage), COLUMNS * size)
                at = [batch, token, k_head, 0]
                tma.async_copy_global_to_shared(boxes[1], at, k_full.index(stage), buffers[1].index(stage))
                mbarrier.wait(v_empty.index(stage), phase)
                mbarrier.expect(v_full.index(stage), COLUMNS * size)
                tma.async_copy_global_to_shared(boxes[2], at, v_full.index(stage), buffers[2].index(stage))
                count += 1


@gluon.jit
def _weigh(scores, most, total, hidden, exponent, COLUMNS: gl.constexpr, SIGN: gl.constexpr):
    """Give P of a box in fp32, and what the sums so far are to be multiplied with. hidden: columns that a run lacks."""
    if SIGN != 1:
        scores = scores * SIGN
    if hidden > 0:
        column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, scores.type.layout))
        scores = gl.where((column >= hidden)[None, :], scores, NEGATIVE_INFINITY)
    now = gl.maximum(most, gl.max(scores, 1))
    shift = now * exponent
    p = gl.exp2(scores * exponent - shift[:, None])
    alpha = gl.exp2(most * exponent - shift)
    return p, alpha, now, total * alpha + gl.sum(p, 1)


@gluon.jit
def _compute(
    GROUP: gl.constexpr, walk, given, buffers, barriers,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, SIGN: gl.constexpr,
):  # fmt: skip
    """Compute a group's rows of each tile."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    _, total, _, heads, entries = walk
    out, lse, q_tokens, scale = given
    OWN: gl.constexpr = ROWS // GROUPS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = buffers[0].dtype
    exponent = scale * LOG2E
    nothing = gl.zeros([OWN, COLUMNS], gl.float32, layout=s_layout)
    place = GROUP * OWN + gl.arange(0, OWN, layout=s_rows)
    turn, count = 0, 0
    for number in range(gl.program_id(0), total, gl.num_programs(0)):
        record, head, batch = _tile(walk, number)
        most = gl.full([OWN], NEGATIVE_INFINITY, gl.float32, layout=s_rows)
        summed = gl.zeros([OWN], gl.float32, layout=s_rows)
        output = gl.zeros([OWN, DIM], gl.float32, layout=o_layout)
        slot = turn % SLOTS
        mbarrier.wait(q_full.index(slot), turn // SLOTS & 1)
        queries = buffers[0].index(slot).reshape([ROWS, DIM]).slice(GROUP * OWN, OWN)
        turn += 1
        for run in range((entries - 2) // 2):
            length = gl.load(record + 3 + 2 * run)
            boxes = gl.cdiv(length, COLUMNS)
            if boxes > 0:
                stage = count % STAGES
                mbarrier.wait(k_full.index(stage), count // STAGES & 1)
                keys = buffers[1].index(stage).reshape([COLUMNS, DIM]).permute([1, 0])
                asked = warpgroup_mma(queries, keys, nothing, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(0, deps=[asked])
                mbarrier.arrive(k_empty.index(stage))
                hidden = gl.maximum(COLUMNS - length, 0)
                p, alpha, most, summed = _weigh(scores, most, summed, hidden, exponent, COLUMNS, SIGN)
                output = output * gl.convert_layout(alpha, o_rows)[:, None]
                weights = gl.convert_layout(p.to(dtype), p_layout)
                following = count + 1
                mbarrier.wait(k_full.index(following % STAGES), following // STAGES & 1, pred=boxes > 1)
                for box in range(1, boxes):
                    last, last_phase = count % STAGES, count // STAGES & 1
                    count += 1
                    stage = count % STAGES
                    keys = buffers[1].index(stage).reshape([COLUMNS, DIM]).permute([1, 0])
                    asked = warpgroup_mma(queries, keys, nothing, use_acc=False, is_async=True)
                    mbarrier.wait(v_full.index(last), last_phase)
                    values = buffers[2].index(last).reshape([COLUMNS, DIM])
                    added = warpgroup_mma(weights, values, output, is_async=True)
                    scores = warpgroup_mma_wait(1, deps=[asked])
                    mbarrier.arrive(k_empty.index(stage))
                    hidden = gl.maximum((box + 1) * COLUMNS - length, 0)
                    p, alpha, most, summed = _weigh(scores, most, summed, hidden, exponent, COLUMNS, SIGN)
                    # Waiting for the next keys here, as a loop, keeps ptxas from moving exponentials behind the
                    # product. P is not rounded before that is over: it would be written while it is read.
                    following = count + 1
                    more = box + 1 < boxes
                    mbarrier.wait(k_full.index(following % STAGES), following // STAGES & 1, pred=more)
                    output, p = warpgroup_mma_wait(0, deps=[added, p])
                    mbarrier.arrive(v_empty.index(last))
                    output = output * gl.convert_layout(alpha, o_rows)[:, None]
                    weights = gl.convert_layout(p.to(dtype), p_layout)
                last = count % STAGES
                mbarrier.wait(v_full.index(last), count // STAGES & 1)
                values = buffers[2].index(last).reshape([COLUMNS, DIM])
                added = warpgroup_mma(weights, values, output, is_async=True)
                output = warpgroup_mma_wait(0, deps=[added])
                mbarrier.arrive(v_empty.index(last))
                count += 1
        mbarrier.arrive(q_empty.index(slot))
        # A query that sees nothing is 0.
        some = summed > 0
        summed = gl.where(some, summed, 1.0)
        output = output * gl.convert_layout(1.0 / summed, o_rows)[:, None]
        first, rows = gl.load(record), gl.load(record + 1)
        batch = batch.to(gl.int64)
        row = gl.convert_layout(place, o_rows)
        feature = gl.arange(0, DIM, layout=gl.SliceLayout(0, o_layout))
        at = (first + row).to(gl.int64)[:, None] * (heads * DIM) + feature[None, :]
        gl.store(out + (batch * q_tokens * heads + head) * DIM + at, output.to(dtype), mask=(row < rows)[:, None])
        value = gl.where(some, most * scale + gl.log(summed), NEGATIVE_INFINITY)
        gl.store(lse + (batch * heads + head) * q_tokens + first + place, value, mask=place < rows)


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), ARRIVALS)
    return barriers


@gluon.jit(do_not_specialize=COUNTS)
def attention_runs_forward_hopper(
    q_box, k_box, v_box, out, lse, table, total, tiles, heads, group, entries, q_tokens, scale,
    DIM: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, SIGN: gl.constexpr,
    COMPUTING: gl.constexpr, COPYING: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_box.dtype
    buffers = (
        gl.allocate_shared_memory(dtype, [SLOTS, 1, ROWS, 1, DIM], q_box.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, COLUMNS, 1, DIM], k_box.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, COLUMNS, 1, DIM], v_box.layout),
    )
    barriers = (
        _barriers(SLOTS, 1), _barriers(SLOTS, GROUPS),
        _barriers(STAGES, 1), _barriers(STAGES, GROUPS),
        _barriers(STAGES, 1), _barriers(STAGES, GROUPS),
    )  # fmt: skip
    fence_async_shared()
    walk = table, total, tiles, heads, entries
    given = out, lse, q_tokens, scale
    gl.warp_specialize(
        [
            (_compute, (0, walk, given, buffers, barriers, ROWS, COLUMNS, DIM, STAGES, SIGN)),
            (_compute, (1, walk, given, buffers, barriers, ROWS, COLUMNS, DIM, STAGES, SIGN)),
            (_copy, (walk, group, (q_box, k_box, v_box), buffers, barriers, ROWS, COLUMNS, DIM, STAGES)),
        ],
        [4, 1],
        [COMPUTING, COPYING],
    )


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _boxes(x: torch.Tensor, tokens: int) -> TensorDescriptor:
    """Describe a tensor [B, N, heads, D] for copies of boxes of tokens of a head."""
    dim = x.shape[3]
    step = [given if n > 1 else dim for n, given in zip(x.shape[:3], x.stride(), strict=False)]
    return TensorDescriptor(x, list(x.shape), [*step, 1], [1, tokens, 1, dim], LAYOUT)


def serves(x: torch.Tensor) -> bool:
    """Say whether a tensor lies on a GPU that these kernels are made for."""
    return x.is_cuda and capability(x.device) == (9, 0)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, config: Config, scale: float, sign: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the output [B, Nq, heads, D] and the LSE [B, heads, Nq] by a table of runs."""
    batch, tokens, heads, dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    total = batch * heads * table.shape[0]
    with on_device(q):
        attention_runs_forward_hopper[(min(total, _processors(q.device)),)](
            _boxes(q, config.rows), _boxes(k, config.columns), _boxes(v, config.columns), out, lse, table,
            total=total, tiles=table.shape[0], heads=heads, group=heads // k.shape[2], entries=table.shape[1],
            q_tokens=tokens, scale=scale, DIM=dim, SIGN=sign, **_launch(config),
        )  # fmt: skip
    return out, lse


def _launch(config: Config) -> dict[str, int]:
    return {
        "ROWS": config.rows, "COLUMNS": config.columns, "STAGES": config.stages, "COMPUTING": REGISTERS[0],
        "COPYING": REGISTERS[1], "num_warps": config.warps,
    }  # fmt: skip


def specializations() -> Iterator[Specialization]:
    """List what ``attention`` compiles."""
    fn = attention_runs_forward_hopper
    for config in CONFIGS:
        constants = {"DIM": config.widths[-1], "SIGN": 1, **_launch(config)}
        options = {"num_warps": constants.pop("num_warps")}
        types = {
            name: f"tensordesc<bf16[1,{tokens},1,{config.widths[-1]}],{LAYOUT!r}>"
            for name, tokens in (("q_box", config.rows), ("k_box", config.columns), ("v_box", config.columns))
        }
        types |= {"out": "*bf16", "lse": "*fp32", "table": "*i32", "scale": "fp32"} | dict.fromkeys(COUNTS, "i32")
        label = f"{fn.__name__}-{config.widths[-1]}-{config.rows}x{config.columns}"
        yield Specialization(label, fn, types, constants, options, COUNTS, only=90)
