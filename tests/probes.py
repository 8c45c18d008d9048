"""Mask probes: make an implementation print its own mask, one sub-kernel at a time.

With q . k = 0 all keys that a query sees weigh the same, so what is not zero tells what was seen: exp(LSE) counts the
keys; the output shows them when V is an identity; dV shows them when dout is; dQ when K is, and dK when Q is. Chunks of
D keys or queries ride in the batch dimension, one launch a probe.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import stattn
from stattn.blocks import BlockList
from stattn.grid import Grid, Region
from stattn.masks import Mask
from stattn.tables import intersect

GRIDS = [
    (1, 1, 1), (1, 1, 7), (1, 7, 1), (7, 1, 1), (1, 2, 2), (2, 2, 2), (2, 3, 5), (3, 5, 7), (4, 4, 4), (4, 4, 8),
    (5, 4, 3), (1, 9, 13), (9, 1, 13), (13, 9, 1), (2, 8, 8), (3, 8, 8), (6, 8, 8), (7, 9, 10), (5, 7, 10), (6, 6, 9),
    (3, 11, 17), (13, 11, 9), (17, 3, 5), (1, 16, 16), (1, 1, 129), (2, 1, 64), (8, 8, 8), (4, 13, 12), (21, 3, 4),
    (1, 31, 33), (10, 10, 10),
]  # fmt: skip
BIG_GRIDS = [(18, 37, 12), (5, 45, 73)]


@dataclass
class Case:
    """One call of ``attention`` beside the truth of what it may see.

    masks: one mask, one per head, or block lists. valid: booleans [before + after] for every sample, or None.
    """

    grid: Grid
    masks: Mask | Sequence[Mask] | BlockList
    heads: int = 2
    valid: torch.Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    q_globals: bool = True

    def rows(self) -> torch.Tensor:
        """The grid's token that each row of q holds."""
        return _tokens(self.grid, self.options.get("q_region"), None, self.q_globals)

    def columns(self) -> torch.Tensor:
        """The grid's token that each row of k holds, -1 for none."""
        return _tokens(self.grid, self.options.get("k_region"), self.options.get("k_frames"), True)

    def truth(self, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> torch.Tensor:
        """What each head's rows of q see of the rows of k, all when None. Booleans [heads, rows, columns]"""
        row_tokens, column_tokens = self.rows(), self.columns()
        row_tokens = row_tokens if rows is None else row_tokens[rows]
        column_tokens = column_tokens if columns is None else column_tokens[columns]
        tables = []
        for head in range(self.heads):
            if isinstance(self.masks, BlockList):
                assert not self.grid.globals
                tables.append(self.masks.allowed(0, head)[row_tokens][:, column_tokens])
                continue
            mask = self.masks if isinstance(self.masks, Mask) else self.masks[head]
            see = self.options.get("globals_see", "all")
            table = mask.allowed(self.grid, row_tokens, column_tokens.clamp(min=0), globals_see=see, valid=self.valid)
            tables.append(table & (column_tokens >= 0))
        return torch.stack(tables)

    def counts(self) -> torch.Tensor:
        """How many keys each row sees. int64 [heads, rows]"""
        told = self.options.keys() - {"deterministic"}
        plain = not self.grid.globals and not told and not isinstance(self.masks, BlockList)
        if plain and self.grid.video > 2048:
            each = [self.masks] * self.heads if isinstance(self.masks, Mask) else self.masks
            return torch.stack([counts_by_axis(mask, self.grid) for mask in each])
        parts = torch.arange(len(self.rows())).split(2048)
        # NumPy adds up booleans ten times faster than PyTorch does on a CPU.
        return torch.cat([torch.from_numpy(self.truth(part).numpy().sum(-1)) for part in parts], dim=1)

    def call(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
        options = dict(self.options)
        if options.get("k_frames") is not None:
            options["k_frames"] = options["k_frames"].to(q.device)
        if self.valid is not None:
            options["valid"] = self.valid.to(q.device).expand(q.shape[0], -1)
        masks = _on(self.masks, q.device) if isinstance(self.masks, BlockList) else self.masks
        return stattn.attention(q, k, v, self.grid, masks, return_lse=True, impl=impl, **options)


def _on(lists: BlockList, device: torch.device) -> BlockList:
    partial = None if lists.partial is None else lists.partial.to(device)
    tables = lists.count.to(device), lists.index.to(device), partial
    return BlockList(lists.shape, lists.q_tile, lists.k_tile, *tables, lists.mask)


def counts_by_axis(mask: Mask, grid: Grid) -> torch.Tensor:
    """How many keys each query of a grid sees: products of what axes count, with overlaps taken off. int64 [N]

    Overlaps go by inclusion and exclusion, so that no table of N x N is made: grids may be of any length.
    """
    products = mask.products(grid)
    total = np.zeros(grid.shape, np.int64)
    for size in range(1, len(products) + 1):
        for some in itertools.combinations(products, size):
            t, h, w = (rule.counts().astype(np.int64) for rule in functools.reduce(intersect, some))
            total += (-1) ** (size + 1) * t[:, None, None] * h[:, None] * w
    return torch.from_numpy(total.reshape(-1))


def _tokens(grid: Grid, region: Region | None, frames: torch.Tensor | None, with_globals: bool) -> torch.Tensor:
    video = torch.arange(grid.video).reshape(grid.shape) + grid.before
    if region is not None:
        cut = tuple(slice(o, o + e) for o, e in zip(region.origin, region.extent, strict=True))
        video = video[cut] if frames is None else video[(slice(None), *cut[1:])]
    if frames is not None:
        held = frames.cpu().long()
        video = torch.where((held >= 0)[:, None, None], video[held.clamp(min=0)], -1)
    parts = [torch.arange(grid.before), video.reshape(-1), torch.arange(grid.tokens - grid.after, grid.tokens)]
    return torch.cat(parts) if with_globals else parts[1]


def check(
    case: Case,
    *,
    impl: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    dim: int = 16,
    only: Sequence[int] | None = None,
    backward: bool = True,
) -> None:
    """Run all five probes of a case and compare each with the truth, bit by bit.

    only: the chunks of ``dim`` keys or queries to look at; all of them when None. backward: False for the probes of the
    count and the forward pass alone.
    """
    rows, columns, heads = len(case.rows()), len(case.columns()), case.heads
    seed = torch.Generator(device).manual_seed(rows * 31 + columns)

    def zeros(batch: int, tokens: int) -> torch.Tensor:
        return torch.zeros(batch, tokens, heads, dim, dtype=dtype, device=device)

    def random(batch: int, tokens: int) -> torch.Tensor:
        return torch.randn(batch, tokens, heads, dim, generator=seed, device=device).to(dtype)

    def places(chunks: Sequence[int], tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For each token of the chunks: which chunk's sample, which token, and which feature stands for it."""
        token = tokens_of(chunks, tokens)
        sample = torch.bucketize(token // dim, torch.tensor(chunks))
        return sample.to(device), token.to(device), (token % dim).to(device)

    def identity(chunks: Sequence[int], tokens: int) -> torch.Tensor:
        x = zeros(len(chunks), tokens)
        sample, token, feature = places(chunks, tokens)
        x[sample, token, :, feature] = 1
        return x

    def seen(x: torch.Tensor, chunks: Sequence[int], tokens: int) -> torch.Tensor:
        """[chunks, N, heads, dim] -> booleans [heads, N, tokens of the chunks]"""
        sample, _, feature = places(chunks, tokens)
        return (x != 0).permute(2, 1, 0, 3)[:, :, sample, feature]

    def tokens_of(chunks: Sequence[int], tokens: int) -> torch.Tensor:
        return torch.cat([torch.arange(chunk * dim, min((chunk + 1) * dim, tokens)) for chunk in chunks])

    def same(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
        wrong = torch.nonzero(got != want)
        assert not len(wrong), (
            f"{name} of {case.masks} on {case.grid}: {len(wrong)} pairs differ, first {wrong[0].tolist()}"
        )

    k_chunks = list(only) if only is not None else list(range(-(-columns // dim)))
    q_chunks = list(only) if only is not None else list(range(-(-rows // dim)))
    if rows * columns <= 1 << 22:
        table = case.truth().to(device)
        counts = table.sum(-1)
        by_key, by_query = table[:, :, tokens_of(k_chunks, columns)], table[:, tokens_of(q_chunks, rows)]
    else:
        counts = case.counts().to(device)
        by_key, by_query = (
            case.truth(**part).to(device)
            for part in ({"columns": tokens_of(k_chunks, columns)}, {"rows": tokens_of(q_chunks, rows)})
        )
    by_query = by_query.transpose(1, 2)  # by_key is [heads, rows, keys of the chunks], this [heads, columns, queries]

    _, lse = case.call(zeros(1, rows), random(1, columns), random(1, columns), impl)
    same("count", torch.exp(lse[0].double()).round().long(), counts)
    assert torch.equal(torch.isneginf(lse[0]), counts == 0)

    out, _ = case.call(zeros(len(k_chunks), rows), zeros(len(k_chunks), columns), identity(k_chunks, columns), impl)
    same("forward", seen(out, k_chunks, columns), by_key)
    if not backward:
        return

    # V enters only through dP, so its gradient needs no value of it.
    v = zeros(len(q_chunks), columns).requires_grad_()
    out, _ = case.call(zeros(len(q_chunks), rows), zeros(len(q_chunks), columns), v, impl)
    out.backward(identity(q_chunks, rows))
    same("dV", seen(v.grad, q_chunks, rows), by_query)

    # A row with one key has dS = 0; 16-bit dS of about 1/N would underflow without the factor N.
    several = (counts > 1)[:, :, None]
    big = min(float(columns), 4096.0) if dtype == torch.float16 else 1.0

    def found_in_dq() -> torch.Tensor:
        q = zeros(len(k_chunks), rows).requires_grad_()
        out, _ = case.call(q, identity(k_chunks, columns), random(len(k_chunks), columns), impl)
        out.backward(random(len(k_chunks), rows) * big)
        return seen(q.grad, k_chunks, columns) & several

    def found_in_dk() -> torch.Tensor:
        k = zeros(len(q_chunks), columns).requires_grad_()
        out, _ = case.call(identity(q_chunks, rows), k, random(len(q_chunks), columns), impl)
        out.backward(random(len(q_chunks), rows) * big)
        return seen(k.grad, q_chunks, rows) & ~lonely[:, None, :]

    lonely = counts[:, tokens_of(q_chunks, rows).to(device)] == 1
    for name, find, want in (
        ("dQ", found_in_dq, by_key & several),
        ("dK", found_in_dk, by_query & ~lonely[:, None, :]),
    ):
        found = find()
        if not torch.equal(found, want):
            # Of 1e7 random dS one is 0 by chance; a pair that the mask hides is 0 with other numbers as well.
            found |= find()
        same(name, found, want)
