"""Attention over a video grid in plain PyTorch: the meaning of the operation, and its default on a CPU.

For each query i and the keys j that it sees::

    S_ij = scale * q_i . k_j,   LSE_i = log sum_j exp(S_ij),   out_i = sum_j exp(S_ij - LSE_i) v_j

    P = exp(S - LSE),   dS = P * (dout V^T - rowsum(dout * out) + dLSE)

    dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dout

The walk goes group of equal query tiles by group (``walk.py``); what a group sees is gathered, and the backward
recomputes the scores, so memory is that of inputs and outputs. On a CPU a group is one call of PyTorch's fused kernel;
elsewhere it is written out. 16-bit inputs are multiplied with fp32 accumulation and rounded once more for P on a CPU,
and computed in fp32 on other devices; fp32 and fp64 are computed as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from stattn.blocks import tile_count
from stattn.problem import Extras, Problem
from stattn.reference.gather import Job, Scratch, add, put, put_lse, share, take, take_keys
from stattn.reference.walk import block_rows, walk

# What is gathered at once. On a CPU it should stay in the cache and in memory that the allocator hands out again.
CHUNK_BYTES = {"cpu": 12 << 20, "cuda": 1 << 30}
BIAS_BYTES = 32 << 20  # of masks as additive scores that are kept for further tiles
_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the output [B, Nq, heads, D] and the LSE [B, heads, Nq] (natural log; fp32, fp64 for fp64)."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=_lse_dtype(q.dtype))
    scratch = Scratch(), Scratch()
    for job, bias in _chunks(_jobs(q, k, problem, extras), q):
        part, part_lse = _forward(*_operands(q, k, v, job, scratch), bias, problem.scale)
        put(out, job, part)
        put_lse(lse, job, part_lse)
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
    """Compute dq, dk and dv from the gradients of the output and of the LSE, either of which may be None."""
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    # Keys that many tiles see gather many addends: their sums are kept wide.
    dk, dv = (torch.zeros(x.shape, dtype=_lse_dtype(q.dtype), device=q.device) for x in (k, v))
    dout = torch.zeros_like(out) if dout is None else dout
    rep = q.shape[2] // k.shape[2]
    scratch = Scratch(), Scratch()
    for job, bias in _chunks(_jobs(q, k, problem, extras), q):
        qg, kg, vg = _operands(q, k, v, job, scratch)
        grads = _backward(
            take(dout, job.batch, job.q, job.heads),
            None if dlse is None else take(dlse.transpose(1, 2)[..., None], job.batch, job.q, job.heads)[..., 0],
            qg, kg, vg,
            take(out, job.batch, job.q, job.heads),
            take(lse.transpose(1, 2)[..., None], job.batch, job.q, job.heads)[..., 0],
            bias,
            problem.scale,
        )  # fmt: skip
        put(dq, job, grads[0])
        for total, grad in ((dk, grads[1]), (dv, grads[2])):
            add(total, job, grad.to(total.dtype), rep)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def merge(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine partial results over disjoint sets of keys: out [B, N, heads, D] and lse [B, heads, N] each."""
    stacked = torch.stack(lses)
    # A row that no part sees takes part as a row of zeros, and so has gradients of 0 instead of NaN.
    unseen = torch.isneginf(stacked).all(dim=0)
    stacked = torch.where(unseen, 0.0, stacked)
    lse = torch.where(unseen, -torch.inf, torch.logsumexp(stacked, dim=0))
    # Not exp(stacked - lse): the rounding of a large LSE would be lost from the sum of the weights.
    weights = torch.where(unseen, 0.0, torch.softmax(stacked, dim=0)).transpose(2, 3)[..., None]
    wide = torch.promote_types(outs[0].dtype, lse.dtype)
    return (torch.stack(outs).to(wide) * weights).sum(0).to(outs[0].dtype), lse


# Which rows see which keys.


def _jobs(q: torch.Tensor, k: torch.Tensor, problem: Problem, extras: Extras) -> Iterator[Job]:
    """List the work: samples with the same real global tokens and heads with the same mask go together."""
    grid, device = problem.grid, q.device
    if min(q.shape[0], q.shape[1], q.shape[2], k.shape[1]) == 0:
        return
    frames = None if extras.k_frames is None else tuple(extras.k_frames.tolist())
    if frames is not None:
        held = [f for f in frames if f >= 0]
        if len(set(held)) != len(held) or not -1 <= min(frames) <= max(frames) < grid.t:
            raise ValueError(f"k_frames={list(frames)} must hold distinct frames below {grid.t}, or -1")
    if extras.block_index is not None:
        _check_entries(problem, extras)
    all_heads = torch.arange(q.shape[2], device=device)
    for batch, real in _samples(q.shape[0], grid.globals, extras.valid):
        batch, real = batch.to(device), real.to(device)
        rows = torch.where(real < grid.before, real, real + problem.k_box.video)  # of k; those of q below
        for heads, index in _heads_by_mask(problem, q.shape[2]):
            if extras.block_index is not None:
                yield from _block_jobs(batch, all_heads, rows, problem, extras, device)
                break
            jobs = _tile_jobs(batch, heads.to(device), rows, problem, index, frames, device)
            # Tiles that see global tokens too have nothing to share: those would have to lie beside every tile's keys.
            yield from jobs if len(rows) else share(jobs, len(batch) * 2 * k.shape[3] * k.element_size())
            if len(rows):
                # Video queries whose mask allows nothing still see the global tokens.
                lone = _unseeing(problem, index, frames)
                if len(lone):
                    yield Job(batch, heads.to(device), (lone.to(device) + _q_offset(problem))[None], rows[None], None)
        if problem.q_globals and len(rows):
            keys = rows
            if problem.globals_see == "all":
                keys = torch.cat([rows, _held(problem, frames, device) + grid.before])
            q_rows = torch.where(real < grid.before, real, real + problem.q_box.video)
            yield Job(batch, all_heads, q_rows[None], keys[None], None)


def _tile_jobs(
    batch: torch.Tensor,
    heads: torch.Tensor,
    rows: torch.Tensor,
    problem: Problem,
    index: int,
    frames: tuple[int, ...] | None,
    device: torch.device,
) -> Iterator[Job]:
    """List the work of one mask's tiles, which see the global tokens ``rows`` too."""
    before = problem.grid.before
    for group in walk(problem.masks[index], problem.grid, problem.q_box, problem.k_box, frames):
        q_rows = torch.from_numpy(group.rows()).to(device) + _q_offset(problem)
        k_rows = torch.from_numpy(group.keys()).to(device) + before
        mask = None if group.mask is None else torch.from_numpy(group.mask).to(device)
        boxes = group.boxes or () if device.type == "cpu" else ()
        yield _with_globals(Job(batch, heads, q_rows, k_rows, mask, boxes, group.corners() + before), rows)


def _check_entries(problem: Problem, extras: Extras) -> None:
    """Raise ValueError when block lists name a key tile that is not there, or one twice."""
    assert extras.block_count is not None
    assert extras.block_index is not None
    assert problem.k_tile is not None
    most, tiles = extras.block_index.shape[-1], tile_count(problem.grid.shape, problem.k_tile)
    low, high = int(extras.block_count.min()), int(extras.block_count.max())
    if low < 0 or high > most:
        raise ValueError(f"mask: block lists have counts from {low} to {high}, their rows have {most} entries")
    slots = torch.arange(most, device=extras.block_index.device)
    used = slots < extras.block_count[..., None]
    entries = extras.block_index[used]
    if len(entries) and not 0 <= int(entries.min()) <= int(entries.max()) < tiles:
        raise ValueError(f"mask: block lists hold key tiles {int(entries.min())} to {int(entries.max())} of {tiles}")
    if most and bool((torch.where(used, extras.block_index, tiles + slots).sort(dim=-1).values.diff() == 0).any()):
        raise ValueError("mask: block lists hold a key tile twice in a row")


def _q_offset(problem: Problem) -> int:
    return problem.grid.before if problem.q_globals else 0


def _samples(batch: int, count: int, valid: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Group the samples whose global tokens are real alike: (samples, indices of the real global tokens)."""
    if valid is None or count == 0:
        yield torch.arange(batch), torch.arange(count)
        return
    patterns, member = torch.unique(valid.cpu(), dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        yield torch.nonzero(member == number).flatten(), torch.nonzero(pattern).flatten()


def _heads_by_mask(problem: Problem, heads: int) -> list[tuple[torch.Tensor, int]]:
    """Group the heads that share a mask: (heads, index of the mask)."""
    if len(problem.masks) <= 1:
        return [(torch.arange(heads), 0)]
    first = {mask: problem.masks.index(mask) for mask in problem.masks}
    return [
        (torch.tensor([h for h, each in enumerate(problem.masks) if each == mask]), index)
        for mask, index in first.items()
    ]


def _with_globals(job: Job, rows: torch.Tensor) -> Job:
    """Let every row of a job see the global tokens too."""
    if not len(rows):
        return job
    k = torch.cat([job.k, rows.expand(job.k.shape[0], -1)], dim=1)
    mask = None if job.mask is None else torch.nn.functional.pad(job.mask, (0, len(rows)), value=True)
    return job._replace(k=k, mask=mask)


def _unseeing(problem: Problem, index: int, frames: tuple[int, ...] | None) -> torch.Tensor:
    """List the video rows of q that no group of the walk holds: they see no video token."""
    lone = np.ones(problem.q_box.video, bool)
    for group in walk(problem.masks[index], problem.grid, problem.q_box, problem.k_box, frames):
        lone[group.rows().reshape(-1)] = False
    return torch.from_numpy(np.flatnonzero(lone))


def _held(problem: Problem, frames: tuple[int, ...] | None, device: torch.device) -> torch.Tensor:
    """List the video keys that are there: all, or those of the slots in use."""
    keys = torch.arange(problem.k_box.video, device=device)
    if frames is None:
        return keys
    used = torch.tensor([f >= 0 for f in frames], device=device)
    return keys[used.repeat_interleave(problem.k_box.video // len(frames))]


def _block_jobs(
    batch: torch.Tensor, heads: torch.Tensor, rows: torch.Tensor, problem: Problem, extras: Extras, device: torch.device
) -> Iterator[Job]:
    """List the work of block lists, per sample and head; short rows are padded with keys that the mask hides."""
    assert extras.block_count is not None
    assert extras.block_index is not None
    assert problem.q_tile is not None
    assert problem.k_tile is not None
    grid = problem.grid
    q_table = torch.from_numpy(block_rows(grid.shape, problem.q_tile)).to(device)
    k_table = torch.from_numpy(block_rows(grid.shape, problem.k_tile)).to(device)
    element = problem.masks[0].allowed(grid.shape).to(device) if problem.masks else None
    slots = torch.arange(extras.block_index.shape[-1], device=device)
    for b in batch.tolist():
        for h in heads.tolist():
            at = (b if extras.block_count.shape[0] > 1 else 0, h if extras.block_count.shape[1] > 1 else 0)
            used = slots < extras.block_count[at][:, None]  # [q tiles, most]
            k = torch.where(used[..., None], k_table[torch.where(used, extras.block_index[at], 0).long()], -1)
            whole = used if extras.block_partial is None else used & ~extras.block_partial[at]
            for tile in range(len(q_table)):
                q_rows, k_rows = q_table[tile][q_table[tile] >= 0], k[tile].reshape(-1)
                seen = whole[tile].repeat_interleave(k_table.shape[1])
                here = k_rows >= 0
                k_rows, seen = k_rows[here], seen[here]
                mask = None if element is None else seen | element[q_rows][:, k_rows]
                if mask is not None and not len(rows):
                    q_rows, mask = q_rows[mask.any(1)], mask[mask.any(1)]
                if len(q_rows) and len(k_rows) + len(rows):
                    offset = _q_offset(problem)
                    job = Job(
                        batch.new_tensor([b]),
                        heads.new_tensor([h]),
                        q_rows[None] + offset,
                        k_rows[None] + grid.before,
                        mask,
                    )
                    yield _with_globals(job, rows)


def _chunks(jobs: Iterator[Job], q: torch.Tensor) -> Iterator[tuple[Job, torch.Tensor | None]]:
    """Cut jobs so that what is gathered at once stays small; give each part with its mask as additive scores."""
    cpu = q.device.type == "cpu"
    budget = CHUNK_BYTES.get(q.device.type, 256 << 20)
    biases: dict[torch.Tensor, torch.Tensor] = {}  # by identity
    for job in jobs:
        if job.mask is not None and job.mask not in biases:
            if sum(each.nbytes for each in biases.values()) > BIAS_BYTES:
                biases.clear()
            biases[job.mask] = _bias(job.mask, q.dtype)
        bias = None if job.mask is None else biases[job.mask]
        if job.slab is not None:
            yield job, bias
            continue
        tiles, rows, keys = len(job.q), job.q.shape[1], job.k.shape[1]
        per_head = len(job.batch) * q.shape[3] * max(q.element_size(), 4) * 2 * (rows + keys)
        if not cpu:  # the scores are written out there
            per_row = len(job.batch) * keys * 8
            per_head += rows * per_row
            if tiles == 1:
                most = max(1, budget // (len(job.heads) * per_row))
                for start in range(0, rows, most):
                    part = slice(start, start + most)
                    yield job._replace(q=job.q[:, part]), None if bias is None else bias[part]
                continue
        for heads in job.heads.split(max(1, budget // per_head)):
            most = max(1, budget // (per_head * len(heads)))
            for start in range(0, tiles, most):
                yield job._replace(heads=heads).tiles(slice(start, start + most)), bias


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Give 0 where a mask is true and -inf elsewhere."""
    # By the bits of -inf (fp32): several times as fast as torch.where.
    return mask.logical_not().to(torch.int32).mul_(-0x800000).view(torch.float32).to(dtype)


def _operands(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, job: Job, scratch: tuple[Scratch, Scratch]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kv_heads = job.heads // (q.shape[2] // k.shape[2])
    kg, vg = (take_keys(x, job, kv_heads, own) for x, own in zip((k, v), scratch, strict=True))
    return take(q, job.batch, job.q, job.heads), kg, vg


# The arithmetic.


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if q.device.type == "cpu":
        return _cpu_forward(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    scores = _scores(q, k, bias, scale)
    lse = torch.logsumexp(scores, dim=-1)
    return torch.exp(scores - lse[..., None]) @ v.to(scores.dtype), lse


def _backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if q.device.type == "cpu":
        if dlse is None:
            return _cpu_backward(dout, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale)
        # The kernel computes rowsum(dout * out) itself. One more column, -1 in out and dLSE in dout but 0 in v, makes
        # that rowsum(dout * out) - dLSE and changes nothing else.
        wide = _lse_dtype(q.dtype)
        columns = [torch.cat([x.to(wide), x.new_zeros(*x.shape[:-1], 1, dtype=wide)], dim=-1) for x in (q, k, v)]
        more_out = torch.cat([out.to(wide), -torch.ones_like(lse)[..., None]], dim=-1)
        more_dout = torch.cat([dout.to(wide), dlse.to(wide)[..., None]], dim=-1)
        bias = None if bias is None else bias.to(wide)
        grads = _cpu_backward(more_dout, *columns, more_out, lse.to(wide), 0.0, False, attn_mask=bias, scale=scale)
        dq, dk, dv = (grad[..., :-1] for grad in grads)
        return dq, dk, dv
    scores = _scores(q, k, bias, scale)
    wide = scores.dtype
    dout, out = dout.to(wide), out.to(wide)
    p = torch.exp(scores - lse[..., None])
    rest = (dout * out).sum(-1) - (0 if dlse is None else dlse)
    ds = p * (dout @ v.to(wide).transpose(-1, -2) - rest[..., None]) * scale
    return ds @ k.to(wide), ds.transpose(-1, -2) @ q.to(wide), p.transpose(-1, -2) @ dout


def _scores(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    wide = _lse_dtype(q.dtype)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
    return scores if bias is None else scores + bias.to(wide)
