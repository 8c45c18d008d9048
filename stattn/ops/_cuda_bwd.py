"""The backward of attention by the CUDA library's Hopper kernels: what it serves, and how it is called.

First the statistics of the queries are prepared. Then one kernel walks the queries of each tile of keys and sums dK and
dV; dQ it adds up in fp32 in memory, in no fixed order, or, where results are to be reproducible, another kernel walks
the keys of each tile of queries for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from stattn.ops import _cuda, _cuda_bwd_plan, _cuda_plan
from stattn.ops._cuda_tiles import KERNELS, ROWS
from stattn.problem import Extras, Problem

KEY_TILE = ROWS * KERNELS["kv"].warpgroups
_PIECES = 22  # where a layout of dK and dV says how many there are


class Plan(NamedTuple):
    """A plan on a device: the kernel's configuration, the integers of its layout, the array."""

    config: int
    layout: list[int]
    array: torch.Tensor | None


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
    batch, queries, heads, dim = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    dout = torch.zeros_like(out) if dout is None else dout
    if not _is_readable(dout):
        dout = dout.contiguous()  # an expanded gradient, such as that of a sum, has strides that no copy takes
    dlse = dlse if dlse is None else dlse.float().contiguous()
    valid = extras.valid if problem.grid.globals else None
    valid = valid if valid is None else valid.contiguous()
    scale = max(problem.scale, _cuda.LEAST_SCALE)
    stats_layout, by_key, by_query = _plans(problem, queries, heads, dim, valid is not None, q.device)
    prepare, of_keys, of_queries, finish = _operations()

    stats = lse.new_empty(2 * batch * heads * stats_rows(stats_layout))
    prepare(dout, dlse, out, lse, stats, stats_layout)
    pieces = by_key.layout[_PIECES] if by_key.layout else 0
    partial = lse.new_empty(batch * k.shape[2] * pieces * 2 * KEY_TILE * dim) if pieces else None
    dq_sum = None if deterministic else lse.new_empty(q.numel())
    of_keys(
        q, k, v, dout, stats, dk, dv, dq_sum, partial, stats_layout, scale, by_key.config, by_key.array, by_key.layout,
        valid,
    )  # fmt: skip
    if dq_sum is None:
        of_queries(
            q, k, v, dout, stats, dq, stats_layout, scale, by_query.config, by_query.array, by_query.layout, valid
        )
    else:
        finish(dq_sum, dq, scale)
    return dq, dk, dv


def _is_readable(x: torch.Tensor) -> bool:
    """Say whether the kernels can copy from a tensor as it lies."""
    aligned = all(stride * x.element_size() % _cuda.ALIGNMENT == 0 for stride in x.stride()[:3])
    return x.stride(3) == 1 and aligned and x.stride(1) > 0 and x.data_ptr() % _cuda.ALIGNMENT == 0


def stats_rows(layout: list[int]) -> int:
    """Count the rows of a head's statistics (AttentionStats in csrc/stattn.h)."""
    t, h, w, step, before, after = layout
    return _padded(before) + t * h * step * _padded(-(-w // step)) + _padded(after)


def _padded(count: int) -> int:
    return (count + 3) // 4 * 4


@lru_cache(maxsize=1024)
def _plans(
    problem: Problem, queries: int, heads: int, dim: int, valid: bool, device: torch.device
) -> tuple[list[int], Plan, Plan]:
    """Give the layout of the statistics, the plan of dK and dV and that of dQ."""
    if _cuda.is_dense(problem, valid):
        nothing = Plan(0, [], None)
        return [1, 1, queries, 1, 0, 0], nothing, nothing
    by_key = Plan(*_cuda_bwd_plan.on_device(problem, heads, dim, device))
    by_query = Plan(*_cuda_plan.on_device(problem, heads, dim, valid, device, "dq"))
    before, after = (problem.grid.before, problem.grid.after) if problem.q_globals else (0, 0)
    return [*by_key.layout[:3], by_key.layout[14], before, after], by_key, by_query


@cache
def _operations() -> tuple[Callable[..., None], ...]:
    """Give the library's operations themselves: by its name, each call would choose among overloads."""
    stages = ("prepare", "kv", "dq", "finish")
    return tuple(getattr(torch.ops.stattn, f"attention_backward_{stage}").default for stage in stages)
