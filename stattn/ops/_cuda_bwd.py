"""The backward of attention by the CUDA library's Hopper kernels: what it serves, and how it is called.

First the statistics of the queries are prepared. Then one kernel walks the queries of each tile of keys and sums dK and
dV; dQ it adds up in fp32 in memory, in no fixed order. Where results are to be reproducible, tiles add to dQ in their
order if there is no mask; under masks another kernel walks the keys of each tile of queries for it, as it always does
for block lists: where lists are strangers, the sums of dQ would not stay in the L2
(benchmarks/notes/attention-cuda.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from stattn.ops import _cuda, _cuda_bwd_lists, _cuda_bwd_plan, _cuda_plan
from stattn.ops._cuda_tiles import KERNELS, ROWS
from stattn.problem import Extras, Problem

KEY_TILE = ROWS * KERNELS["kv"].warpgroups
SUMS = 8192  # of a box of queries
TAIL = 264  # pieces that the last key tiles of a dense call may be cut into, where the order of sums is free
# How dQ is added up otherwise than by default, and 1 where it is not, for lists (dq_sum_size in csrc/stattn.h).
IN_BOXES, IN_ORDER = 1, 2
_PIECES = 22  # where a layout of dK and dV says how many there are


class Plan(NamedTuple):
    """A plan on a device: the kernel's configuration, the integers of its layout, the array.

    apart: whether boxes of queries begin at multiples of their extents. listed: whether tiles see what lists say.
    """

    config: int
    layout: list[int]
    array: torch.Tensor | None
    apart: bool = False
    listed: bool = False


Plans = Callable[[str], Plan]


def run(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    problem: Problem,
    extras: Extras,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute dq, dk and dv from the gradients of the output and of the LSE, either of which may be None."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    dout = torch.zeros_like(out) if dout is None else dout
    dout = readable(dout)
    dlse = dlse if dlse is None else dlse.float().contiguous()
    valid = extras.valid if problem.grid.globals else None
    call = Call(q, k, v, dout, dlse, out, lse, dq, dk, dv, valid if valid is None else valid.contiguous())
    if extras.block_index is None:
        layout, plans = _planned(problem, q.shape[1], q.shape[2], q.shape[3], valid is not None, q.device)
        _launch(call, layout, plans, problem.scale, deterministic)
    else:
        layout = [*problem.grid.shape, 1, 0, 0]
        samples = extras.block_index.shape[0]
        for sample in range(samples):  # that have lists of their own
            part = call if samples == 1 else call.sample(sample)
            _launch(part, layout, _listed(problem, extras, sample, *q.shape[2:]), problem.scale, deterministic)
    if problem.scale == 0:  # the kernels were given LEAST_SCALE
        dq.zero_()
        dk.zero_()
    return dq, dk, dv


class Call(NamedTuple):
    """The tensors of a call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor | None
    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    valid: torch.Tensor | None

    def sample(self, number: int) -> Call:
        """Give the call of one sample."""
        one = slice(number, number + 1)
        parts: list[Any] = [None if x is None else x[one] for x in self]
        return Call(*parts)


def _launch(call: Call, stats_layout: list[int], plans: Plans, scale: float, deterministic: bool) -> None:
    batch, _, heads, dim = call.q.shape
    scale = max(scale, _cuda.LEAST_SCALE)
    prepare, of_keys, of_queries, finish = _operations()
    stats = call.lse.new_empty(2 * batch * heads * stats_rows(stats_layout))
    prepare(call.dout, call.dlse, call.out, call.lse, stats, stats_layout)
    given = (call.q, call.k, call.v, call.dout, stats)
    by_key = plans("kv")
    if by_key.layout:
        pieces = batch * call.k.shape[2] * by_key.layout[_PIECES]
    else:
        pieces = 0 if deterministic else TAIL
    partial = call.lse.new_empty(pieces * 2 * KEY_TILE * dim) if pieces else None
    rest = (partial, stats_layout, scale)
    plan = (by_key.array, by_key.layout, call.valid)
    if by_key.layout and (deterministic or by_key.listed):
        of_keys(*given, call.dk, call.dv, None, *rest, int(by_key.listed), *plan)
        del by_key, plan  # those of lists make room for the other
        by_query = plans("dq")
        of_queries(*given, call.dq, stats_layout, scale, by_query.config, by_query.array, by_query.layout, call.valid)
        return
    boxes = _boxes(by_key, call.q)
    count = _sums(call.q, boxes)
    way, turns = (IN_BOXES if by_key.layout and boxes else 0), 0
    if deterministic:
        way, turns = IN_ORDER, 4 + 2 * count // SUMS
    sums = call.lse.new_empty(count + turns)
    of_keys(*given, call.dk, call.dv, sums, *rest, way, *plan)
    finish(sums[:count], call.dq, scale, boxes)


def _boxes(by_key: Plan, q: torch.Tensor) -> list[int]:
    """Say how queries lie in boxes (QueryBoxes in csrc/stattn.h), or nothing where boxes overlap."""
    if not by_key.layout:
        return [1, 1, q.shape[1], 1, 1, 64 if q.shape[3] > 64 else 128, 0, 0]
    if not by_key.apart:
        return []
    before, after, q_globals = by_key.layout[17:20]
    return [*by_key.layout[:3], *by_key.layout[9:12], before * q_globals, after * q_globals]


def _sums(q: torch.Tensor, boxes: list[int]) -> int:
    """Count the sums of dQ (dq_sum_size in csrc/stattn.h)."""
    if not boxes:
        return q.numel()
    t, h, w, of_t, of_h, of_w, before, after = boxes
    rows = of_t * of_h * of_w
    count = -(-t // of_t) * -(-h // of_h) * -(-w // of_w) + -(-before // rows) + -(-after // rows)
    return q.shape[0] * q.shape[2] * count * SUMS


def readable(x: torch.Tensor) -> torch.Tensor:
    """Give a tensor as the kernels can copy from it: itself, or a copy.

    An expanded gradient, such as that of a sum, has strides that no tensor copy takes; one that is contiguous may begin
    at an odd address.
    """
    aligned = all(stride * x.element_size() % _cuda.ALIGNMENT == 0 for stride in x.stride()[:3])
    if x.stride(3) == 1 and aligned and x.stride(1) > 0 and x.data_ptr() % _cuda.ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def stats_rows(layout: list[int]) -> int:
    """Count the rows of a head's statistics (AttentionStats in csrc/stattn.h)."""
    t, h, w, step, before, after = layout
    return _padded(before) + t * h * step * _padded(-(-w // step)) + _padded(after)


def _padded(count: int) -> int:
    return (count + 3) // 4 * 4


@lru_cache(maxsize=1024)
def _planned(
    problem: Problem, queries: int, heads: int, dim: int, valid: bool, device: torch.device
) -> tuple[list[int], Plans]:
    """Give the layout of the statistics, and the plans."""
    if _cuda.is_dense(problem, valid):
        return [1, 1, queries, 1, 0, 0], lambda kernel: Plan(0, [], None)
    apart = _cuda_bwd_plan.boxes_lie_apart(problem, heads, dim)
    by_key = Plan(*_cuda_bwd_plan.on_device(problem, heads, dim, device), apart)
    before, after = (problem.grid.before, problem.grid.after) if problem.q_globals else (0, 0)

    def plans(kernel: str) -> Plan:
        if kernel == "kv":
            return by_key
        return Plan(*_cuda_plan.on_device(problem, heads, dim, valid, device, "dq"))

    return [*by_key.layout[:3], by_key.layout[14], before, after], plans


def _listed(problem: Problem, extras: Extras, sample: int, heads: int, dim: int) -> Plans:
    """Give the plans of a sample's block lists, which are written on the device when they are asked for."""
    assert extras.block_count is not None
    assert extras.block_index is not None
    count, index = extras.block_count[sample], extras.block_index[sample]
    partial = None if extras.block_partial is None else extras.block_partial[sample]
    written = (problem, heads, dim)
    return lambda kernel: Plan(*_cuda_bwd_lists.write(*written, kernel, count, index, partial), listed=True)


@cache
def _operations() -> tuple[Callable[..., None], ...]:
    """Give the library's operations themselves: by its name, each call would choose among overloads."""
    stages = ("prepare", "kv", "dq", "finish")
    return tuple(getattr(torch.ops.stattn, f"attention_backward_{stage}").default for stage in stages)
