"""Attention in which queries see runs of tokens: all of them, those of their frame, all frames up to theirs.

What no mask cuts within a run needs none of what ``_walk`` keeps in registers: boxes of columns are brought by tensor
copies (TMA), whole ones without a mask, and the last of a run with one. Boxes of keys end where their run does: what
lies behind it is not read, and what lies before it only if the run is shorter than a box. ``stattn.plan_runs`` lists,
for each tile of rows, the runs that it visits. Otherwise the kernels are those of ``attention`` and ``attention_bwd``:
the same numbers in another order, sums in fp32 and in an order of their own, P and dS rounded to the inputs' dtype,
results once. On sm_90 ``attention_runs_hopper`` has another forward pass.

The forward pass asks for the scores of a box before it multiplies the last one's P with its values, so that the
exponentials of a box run beside that product. P is carried from box to box in fp32: rounded any earlier, it would be
written while the product still reads it.

Serves 16-bit inputs of 64 or 128 features whose strides and addresses are multiples of 16 bytes, on sm_90 and later.
Bound by the tensor cores.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from stattn import plan_runs
from stattn.kernels import _walk as walking
from stattn.kernels import attention as general
from stattn.kernels import attention_bwd as general_bwd
from stattn.kernels._compile import Specialization
from stattn.kernels._device import capability, on_device, roomy
from stattn.kernels.attention import LOG2E, Config, shared_arguments, strides
from stattn.problem import Extras, Problem

try:
    from stattn.kernels import attention_runs_hopper as hopper
except ImportError:  # Gluon is experimental: a later Triton may have moved it. Slower, not otherwise.
    hopper = None  # type: ignore[assignment]

# Rates are those of general kernels: runs are taken where they cost less.
CONFIGS = (
    Config(64, 64, 4, 2, (128,), 2, 1.3),
    Config(64, 64, 4, 3, (64,), 2, 1.25),
)
DQ_CONFIGS = (
    Config(128, 64, 8, 3, (128,), 2, 1.1),
    Config(64, 64, 4, 3, (64,), 2, 1.1),
)
DKDV_CONFIGS = (
    Config(128, 64, 8, 3, (128,), 2, 1.8),
    Config(64, 64, 4, 3, (64,), 2, 1.8),
)
SPILLS = 32  # bytes of local memory that a kernel may take: what is kept for behind the loops
STATS_ROWS = 64
ALIGNMENT = 16  # bytes: what tensor copies ask of addresses and strides
COUNTS = ("q_tokens", "heads", "group", "tiles", "entries", "members", "k_tokens", "padded", "sets")


@triton.jit
def _box(descriptor, batch, token, head, COLUMNS: tl.constexpr, DIM: tl.constexpr):
    """Bring a box of tokens of a head. [COLUMNS, DIM]"""
    return descriptor.load([batch, token, head, 0]).reshape([COLUMNS, DIM])


@triton.jit
def _own(table, tile, entries, ROWS: tl.constexpr):
    """Give the rows of a tile in memory, and which of them exist; and where its runs are listed."""
    record = table + tile * entries
    place = tl.arange(0, ROWS)
    return tl.load(record) + place, place < tl.load(record + 1), record + 2


@triton.jit(do_not_specialize=COUNTS)
def attention_runs_forward(
    q, k_box, v_box, out, lse, table, q_batch, q_token, q_head, q_tokens, heads, group, tiles, entries, scale,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    batch = tl.program_id(0) // tiles // heads
    k_head = head // group
    row, exists, runs = _own(table, tile, entries, ROWS)
    q += batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    queries = walking.load_rows(q, row.to(tl.int64), q_token, exists, DIM, DIM)
    if SIGN != 1:
        queries = queries * SIGN
    exponent = scale * LOG2E
    most = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, DIM], tl.float32)
    for number in range((entries - 2) // 2):
        first, length = tl.load(runs + 2 * number), tl.load(runs + 2 * number + 1)
        boxes = tl.cdiv(length, COLUMNS)
        p = tl.zeros([ROWS, COLUMNS], tl.float32)
        alpha = tl.full([ROWS], 1.0, tl.float32)
        for turn in tl.range(0, tl.where(boxes > 0, boxes + 1, 0)):  # the scores of box ``turn``, P of the one before
            start = tl.minimum(turn * COLUMNS, length - COLUMNS)
            scores = tl.dot(queries, tl.trans(_box(k_box, batch, first + start, k_head, COLUMNS, DIM)))
            if start < turn * COLUMNS:
                scores = tl.where((start + tl.arange(0, COLUMNS) >= turn * COLUMNS)[None, :], scores, -float("inf"))
            output = output * alpha[:, None]
            last = tl.minimum(tl.maximum(turn - 1, 0) * COLUMNS, length - COLUMNS)
            values = _box(v_box, batch, first + last, k_head, COLUMNS, DIM)
            output = tl.dot(p.to(values.dtype), values, output)
            now = tl.maximum(most, tl.max(scores, 1))
            shift = now * exponent
            p = tl.exp2(scores * exponent - shift[:, None])
            alpha = tl.exp2(most * exponent - shift)
            total = total * alpha + tl.sum(p, 1)
            most = now
    # A query that sees nothing is 0.
    some = total > 0
    total = tl.where(some, total, 1.0)
    output = output * (1.0 / total)[:, None]
    batch = batch.to(tl.int64)
    out += (batch * q_tokens * heads + head) * DIM
    walking.store_rows(out, row.to(tl.int64), heads * DIM, output, exists, DIM, DIM)
    value = tl.where(some, most * scale + tl.log(total), -float("inf"))
    tl.store(lse + (batch * heads + head) * q_tokens + row, value, mask=exists)


@triton.jit(do_not_specialize=("tokens", "heads", "padded", "sets"))
def attention_runs_stats(
    out, dout, dlse, lse, stats, dout_batch, dout_token, dout_head, tokens, heads, padded, sets,
    DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write what the backward asks of queries: LSE to base 2, and delta = rowsum(dout * out) - dLSE."""
    blocks = tl.cdiv(tokens, ROWS)
    head = tl.program_id(0) // blocks % heads
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    row = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    exists = row < tokens
    out += (batch * tokens * heads + head) * DIM
    dout += batch * dout_batch + head.to(tl.int64) * dout_head
    left = walking.load_rows(out, row, heads * DIM, exists, DIM, DIM).to(tl.float32)
    right = walking.load_rows(dout, row, dout_token, exists, DIM, DIM).to(tl.float32)
    delta = tl.sum(left * right, 1)
    place = batch * heads + head
    if dlse is not None:
        delta -= tl.load(dlse + place * tokens + row, mask=exists, other=0.0)
    value = tl.load(lse + place * tokens + row, mask=exists, other=0.0)
    value = tl.where(value == -float("inf"), float("inf"), value * LOG2E)  # P = 0 where nothing is seen
    tl.store(stats + place * padded + row, value, mask=exists)
    tl.store(stats + (sets + place) * padded + row, delta, mask=exists)


@triton.jit(do_not_specialize=COUNTS)
def attention_runs_dq(
    q, k_box, v_box, dout, stats, dq, table, q_batch, q_token, q_head, dout_batch, dout_token, dout_head,
    q_tokens, heads, group, tiles, entries, padded, sets, scale,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    batch = tl.program_id(0) // tiles // heads
    k_head = head // group
    row, exists, runs = _own(table, tile, entries, ROWS)
    q += batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    dout += batch.to(tl.int64) * dout_batch + head.to(tl.int64) * dout_head
    queries = walking.load_rows(q, row.to(tl.int64), q_token, exists, DIM, DIM)
    douts = walking.load_rows(dout, row.to(tl.int64), dout_token, exists, DIM, DIM)
    if SIGN != 1:
        queries = queries * SIGN
    place = (batch * heads + head).to(tl.int64)
    value = tl.load(stats + place * padded + row, mask=exists, other=float("inf"))
    delta = tl.load(stats + (sets + place) * padded + row, mask=exists, other=0.0)
    exponent = scale * LOG2E
    gradient = tl.zeros([ROWS, DIM], tl.float32)
    for number in range((entries - 2) // 2):
        first, length = tl.load(runs + 2 * number), tl.load(runs + 2 * number + 1)
        for turn in tl.range(0, length, COLUMNS):
            start = tl.minimum(turn, length - COLUMNS)
            keys = _box(k_box, batch, first + start, k_head, COLUMNS, DIM)
            scores = tl.dot(queries, tl.trans(keys))
            if start < turn:
                scores = tl.where((start + tl.arange(0, COLUMNS) >= turn)[None, :], scores, -float("inf"))
            p = tl.exp2(scores * exponent - value[:, None])
            dp = tl.dot(douts, tl.trans(_box(v_box, batch, first + start, k_head, COLUMNS, DIM)))
            ds = p * (dp - delta[:, None])
            gradient = tl.dot(ds.to(keys.dtype), keys, gradient)
    dq += (batch.to(tl.int64) * q_tokens * heads + head) * DIM
    walking.store_rows(dq, row.to(tl.int64), heads * DIM, gradient * (scale * SIGN), exists, DIM, DIM)


@triton.jit(do_not_specialize=COUNTS)
def attention_runs_dkdv(
    q_box, k, v, dout_box, stats_box, dk, dv, table, k_batch, k_token, k_head, v_batch, v_token, v_head,
    k_tokens, heads, members, tiles, entries, sets, scale,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    key_heads = heads // members
    own_head = tl.program_id(0) // tiles % key_heads
    batch = tl.program_id(0) // tiles // key_heads
    row, exists, runs = _own(table, tile, entries, ROWS)
    k += batch.to(tl.int64) * k_batch + own_head.to(tl.int64) * k_head
    v += batch.to(tl.int64) * v_batch + own_head.to(tl.int64) * v_head
    keys = walking.load_rows(k, row.to(tl.int64), k_token, exists, DIM, DIM)
    values = walking.load_rows(v, row.to(tl.int64), v_token, exists, DIM, DIM)
    if SIGN != 1:
        keys = keys * SIGN
    exponent = scale * LOG2E
    gradient_k = tl.zeros([ROWS, DIM], tl.float32)
    gradient_v = tl.zeros([ROWS, DIM], tl.float32)
    for turn in range(members * ((entries - 2) // 2)):
        head = own_head * members + turn % members
        place = batch * heads + head
        first, length = tl.load(runs + turn // members * 2), tl.load(runs + turn // members * 2 + 1)
        skipped = first % 4  # copies of numbers start where 16 bytes do
        first, length = first - skipped, tl.where(length > 0, length + skipped, 0)
        for start in tl.range(0, length, COLUMNS):
            token = first + start
            queries = _box(q_box, batch, token, head, COLUMNS, DIM)
            scores = tl.dot(keys, tl.trans(queries))
            if (start < skipped) | (start + COLUMNS > length):
                column = start + tl.arange(0, COLUMNS)
                scores = tl.where(((column >= skipped) & (column < length))[None, :], scores, -float("inf"))
            value = stats_box.load([place, token]).reshape([COLUMNS])
            p = tl.exp2(scores * exponent - value[None, :])
            douts = _box(dout_box, batch, token, head, COLUMNS, DIM)
            gradient_v = tl.dot(p.to(douts.dtype), douts, gradient_v)
            dp = tl.dot(values, tl.trans(douts))
            ds = p * (dp - stats_box.load([sets + place, token]).reshape([COLUMNS])[None, :])
            gradient_k = tl.dot(ds.to(queries.dtype), queries, gradient_k)
    at = (batch.to(tl.int64) * k_tokens * key_heads + own_head) * DIM
    walking.store_rows(dk + at, row.to(tl.int64), key_heads * DIM, gradient_k * (scale * SIGN), exists, DIM, DIM)
    walking.store_rows(dv + at, row.to(tl.int64), key_heads * DIM, gradient_v, exists, DIM, DIM)


class Plan(NamedTuple):
    """A launch: its config, the tiles and runs on the device, and what they cost beside general kernels' plans."""

    config: Config
    table: torch.Tensor
    cost: float


@functools.lru_cache(maxsize=512)
def make_plan(
    problem: Problem, head_dim: int, size: int, by_key: bool, configs: tuple[Config, ...], device: torch.device
) -> Plan | None:
    """Lay out the runs of a problem; None where its mask is not made of runs, or no config serves its heads."""
    able = [config for config in configs if head_dim in config.widths and size == config.bytes]
    if not able or len(set(problem.masks)) != 1 or problem.q_tile is not None:
        return None
    config = able[0]
    boxes = (problem.q_box, problem.k_box, problem.q_globals, problem.globals_see)
    table = plan_runs.runs(problem.masks[0], problem.grid, *boxes, config.rows, by_key)
    if table is None:
        return None
    visited = int((-(-table[:, 3::2] // config.columns)).sum()) + 2 * len(table)
    on = torch.from_numpy(table).to(device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams read the table later
    return Plan(config, on, visited * config.rows * config.columns / config.rate)


def _aligned(*tensors: torch.Tensor) -> bool:
    """Say whether tensor copies can read tensors [B, N, heads, D]."""
    for x in tensors:
        unit = ALIGNMENT // x.element_size()
        if x.data_ptr() % ALIGNMENT or x.stride(3) != 1:
            return False
        if any(step % unit or (n > 1 and not step) for n, step in zip(x.shape[:3], x.stride(), strict=False)):
            return False
    return True


def choose(
    tensors: tuple[torch.Tensor, ...], problem: Problem, extras: Extras, by_key: bool, configs: tuple[Config, ...],
    general_configs: tuple[Config, ...],
) -> Plan | None:  # fmt: skip
    """Give the plan of a call that these kernels serve, and at less cost than general ones; else None."""
    q = tensors[0]
    if any(x is not None for x in extras) or q.numel() == 0 or not _aligned(*tensors):
        return None
    if q.is_cuda and (capability(q.device) < (9, 0) or not roomy(q.device)):
        return None
    return _cheaper(problem, q.shape[2], q.shape[3], q.element_size(), by_key, configs, general_configs, q.device)


@functools.lru_cache(maxsize=512)
def _cheaper(
    problem: Problem, heads: int, head_dim: int, size: int, by_key: bool, configs: tuple[Config, ...],
    general_configs: tuple[Config, ...], device: torch.device,
) -> Plan | None:  # fmt: skip
    made = make_plan(problem, head_dim, size, by_key, configs, device)
    if made is None:
        return None
    beside = general.make_plan(problem, heads, head_dim, size, False, by_key, general_configs, device)
    return made if made.cost <= beside.cost else None


def _boxes(x: torch.Tensor, columns: int) -> TensorDescriptor:
    """Describe a tensor [B, N, heads, D] for copies of boxes of tokens of a head."""
    dim = x.shape[3]
    step = [given if n > 1 else dim for n, given in zip(x.shape[:3], x.stride(), strict=False)]
    return TensorDescriptor(x, list(x.shape), [*step, 1], [1, columns, 1, dim])


def _arguments(made: Plan, shared: dict[str, Any]) -> dict[str, Any]:
    """Give the arguments that a plan and a problem decide."""
    config = made.config
    return {
        "table": made.table, "tiles": made.table.shape[0], "entries": made.table.shape[1],
        "scale": shared["scale"], "SIGN": shared["SIGN"], "DIM": shared["DIM"],
        "ROWS": config.rows, "COLUMNS": config.columns, "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what ``attention.attention`` does, by runs where they serve."""
    made = choose((q, k, v), problem, extras, False, CONFIGS, general.CONFIGS)
    shared = shared_arguments(q, k, problem, extras)
    if hopper is not None and hopper.serves(q):
        other = choose((q, k, v), problem, extras, False, hopper.CONFIGS, general.CONFIGS)
        if other is not None and (made is None or other.cost <= made.cost):
            return hopper.attention(q, k, v, other.table, other.config, shared["scale"], shared["SIGN"])
    if made is None:
        return general.attention(q, k, v, problem, extras)
    batch, tokens, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    with on_device(q):
        attention_runs_forward[(batch * heads * made.table.shape[0],)](
            q, _boxes(k, made.config.columns), _boxes(v, made.config.columns), out, lse, q_tokens=tokens, heads=heads,
            group=shared["group"], **strides(q=q), **_arguments(made, shared),
        )  # fmt: skip
    return out, lse


def attention_backward(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    problem: Problem,
    extras: Extras,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute what ``attention_bwd.attention_backward`` does, by runs where they serve."""
    by_query = by_key = None
    if dout is not None and k.numel():
        by_query = choose((q, k, v), problem, extras, False, DQ_CONFIGS, general_bwd.DQ_CONFIGS)
        by_key = choose((q, k, v), problem, extras, True, DKDV_CONFIGS, general_bwd.DKDV_CONFIGS)
    if by_query is None or by_key is None or dout is None:
        return general_bwd.attention_backward(dout, dlse, q, k, v, out, lse, problem, extras)
    if not _aligned(dout):
        # Such as the expanded number that is the gradient of a sum. The copy is one more of the tensors of this size
        # that a backward reads or writes, nine at least, and general kernels would take longer than that.
        dout = dout.clone(memory_format=torch.contiguous_format)
    batch, tokens, heads, dim = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    shared = shared_arguments(q, k, problem, extras)
    sets, padded = batch * heads, triton.cdiv(tokens, 4) * 4
    stats = torch.empty((2 * sets, padded), dtype=torch.float32, device=q.device)
    stats_box = TensorDescriptor(stats, [2 * sets, tokens], [padded, 1], [1, by_key.config.columns])
    with on_device(q):
        attention_runs_stats[(sets * triton.cdiv(tokens, STATS_ROWS),)](
            out, dout, None if dlse is None else dlse.float().contiguous(), lse, stats, **strides(dout=dout),
            tokens=tokens, heads=heads, padded=padded, sets=sets, DIM=dim, ROWS=STATS_ROWS,
        )  # fmt: skip
        attention_runs_dq[(sets * by_query.table.shape[0],)](
            q, _boxes(k, by_query.config.columns), _boxes(v, by_query.config.columns), dout, stats, dq,
            q_tokens=tokens, heads=heads, group=shared["group"], padded=padded, sets=sets,
            **strides(q=q, dout=dout), **_arguments(by_query, shared),
        )  # fmt: skip
        attention_runs_dkdv[(batch * k.shape[2] * by_key.table.shape[0],)](
            _boxes(q, by_key.config.columns), k, v, _boxes(dout, by_key.config.columns), stats_box, dk, dv,
            k_tokens=k.shape[1], heads=heads, members=shared["group"], sets=sets,
            **strides(k=k, v=v), **_arguments(by_key, shared),
        )  # fmt: skip
    return dq, dk, dv


def specializations() -> Iterator[Specialization]:
    """List what ``attention`` and ``attention_backward`` compile."""
    kernels = (
        (attention_runs_forward, CONFIGS), (attention_runs_dq, DQ_CONFIGS), (attention_runs_dkdv, DKDV_CONFIGS)
    )  # fmt: skip
    for (fn, configs), target in itertools.product(kernels, (90, 100)):
        for config in configs:
            dim = config.widths[-1]
            constants = {"DIM": dim, "ROWS": config.rows, "COLUMNS": config.columns, "SIGN": 1}
            box = f"tensordesc<bf16[1,{config.columns},1,{dim}]>"
            types = dict.fromkeys(("q_box", "k_box", "v_box", "dout_box"), box) | {"table": "*i32", "scale": "fp32"}
            types |= {"stats_box": f"tensordesc<fp32[1,{config.columns}]>"} | dict.fromkeys(("lse", "stats"), "*fp32")
            types |= dict.fromkeys(("q", "k", "v", "dout", "out", "dq", "dk", "dv"), "*bf16")
            types |= {each: "i32" for each in fn.arg_names if each not in types and each not in constants}
            options = {"num_warps": config.warps, "num_stages": config.stages}
            counts = tuple(set(COUNTS) & set(fn.arg_names))
            label = f"{fn.__name__}-{dim}-{config.rows}x{config.columns}-{target}"
            yield Specialization(label, fn, types, constants, options, counts, SPILLS, target)
    types = dict.fromkeys(("out", "dout"), "*bf16") | dict.fromkeys(("dlse", "lse", "stats"), "*fp32")
    types |= dict.fromkeys(("dout_batch", "dout_token", "dout_head", "tokens", "heads", "padded", "sets"), "i32")
    yield Specialization(
        "attention_runs_stats-128", attention_runs_stats, types, {"DIM": 128, "ROWS": STATS_ROWS},
        {"num_warps": 4, "num_stages": 3}, ("tokens", "heads", "padded", "sets"), only=90,
    )  # fmt: skip
