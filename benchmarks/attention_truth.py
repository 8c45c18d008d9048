"""What attention must give, in float64: sampled rows of the output and of dQ, and sampled keys of dK and dV."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stattn.blocks import BlockList, tile_of
from stattn.grid import Grid
from stattn.masks import FULL, Mask

ROWS, KEYS = 64, 4  # sampled, beside the first and the last
AT_ONCE = 2048  # rows of scores that are held at a time
# Errors, in roundings of the dtype: fp32 sums of thousands of terms round on the way, too.
SLACK = {torch.bfloat16: (2, 4), torch.float32: (8, 64)}


class WrongResult(AssertionError):
    """A result is further from float64 than rounding explains."""


class Exact(NamedTuple):
    """The part of a head's attention that some rows have, in float64: P [rows, N], out [rows, D], dS [rows, N]."""

    weights: Tensor
    out: Tensor
    score_gradients: Tensor | None


class Truth:
    """Sampled rows and keys of one problem in float64, against which outputs and gradients are held.

    qkv: [1, N, heads, D] each; q may hold the grid's last tokens only. mask: a Mask, or lists of whole tiles. dout:
    like the output, for gradients.
    """

    def __init__(self, qkv: tuple[Tensor, ...], grid: Grid, mask: Mask | BlockList, dout: Tensor | None = None) -> None:
        self.qkv = tuple(x.detach() for x in qkv)
        self.grid, self.mask, self.dout = grid, mask, dout
        q, k, _ = self.qkv
        self.device, self.scale = q.device, 1 / math.sqrt(q.shape[3])
        self.first = k.shape[1] - q.shape[1]  # the token of q's first row
        self.slack = [each * torch.finfo(q.dtype).eps for each in SLACK[q.dtype]]
        self.rows = self._sample(q.shape[1], ROWS)
        self.keys = self._sample(k.shape[1], KEYS)
        if isinstance(mask, Mask):
            self.axes = [[torch.from_numpy(r.matrix()).to(self.device) for r in p] for p in mask.products(grid)]
            few = torch.cat([self.rows[:3], self.rows[-1:]])
            everything = torch.arange(k.shape[1], device=self.device)
            assert torch.equal(self.sees(0, few, everything).cpu(), mask.allowed(grid, few.cpu() + self.first))
        else:
            self.kinds = mask.kinds()
            self.tiles = [tile_of(grid, tile, self.device) for tile in (mask.q_tile, mask.k_tile)]
        self.outputs = {head: self._exact(head, self.rows, *self._head(head)).out for head in range(0, q.shape[2], 5)}
        self.gradients = {} if dout is None else {head: self._gradients(head) for head in {0, q.shape[2] - 1}}

    def _sample(self, count: int, most: int) -> Tensor:
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(1))[:most]
        return torch.cat([chosen, torch.tensor([0, count - 1])]).unique().to(self.device)

    def sees(self, head: int, rows: Tensor, keys: Tensor) -> Tensor:
        """Say which keys some rows of q see, on the device. Booleans [rows, keys]"""
        if isinstance(self.mask, BlockList):
            kinds = self.kinds[0, head if self.kinds.shape[1] > 1 else 0]
            return (kinds[self.tiles[0][rows + self.first]][:, self.tiles[1][keys]]) == FULL
        grid = self.grid
        (video, q), (k_video, k) = (self._coordinates(tokens) for tokens in (rows + self.first, keys))
        seen = torch.zeros(len(rows), len(keys), dtype=torch.bool, device=self.device)
        for t, h, w in self.axes:
            seen |= t[q[0]][:, k[0]] & h[q[1]][:, k[1]] & w[q[2]][:, k[2]]
        return seen | ~(video[:, None] & k_video) if grid.globals else seen

    def _coordinates(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        place = tokens - self.grid.before
        video = (place >= 0) & (place < self.grid.video)
        place = torch.where(video, place, 0)
        row = place // self.grid.w
        return video, (row // self.grid.h, row % self.grid.h, place % self.grid.w)

    def _head(self, head: int) -> tuple[Tensor, ...]:
        tensors = self.qkv if self.dout is None else (*self.qkv, self.dout)
        return tuple(x[0, :, head].double() for x in tensors)

    def _exact(self, head: int, rows: Tensor, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None = None) -> Exact:
        seen = self.sees(head, rows, torch.arange(len(k), device=self.device))
        weights = (q[rows] @ k.T).mul_(self.scale).masked_fill_(~seen, -torch.inf).softmax(-1)
        out = weights @ v
        if dout is None:
            return Exact(weights, out, None)
        delta = (dout[rows] * out).sum(-1, keepdim=True)
        return Exact(weights, out, (dout[rows] @ v.T).sub_(delta).mul_(weights))

    def _gradients(self, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """Give dQ of the sampled rows, dK and dV of the sampled keys."""
        q, k, v, dout = tensors = self._head(head)
        scores = self._exact(head, self.rows, *tensors).score_gradients
        assert scores is not None
        dq = scores @ k * self.scale
        dk, dv = (torch.zeros(len(self.keys), k.shape[1], dtype=k.dtype, device=self.device) for _ in range(2))
        everything = torch.arange(len(q), device=self.device)
        concerned = [part[self.sees(head, part, self.keys).any(1)] for part in everything.split(1 << 17)]
        for rows in torch.cat(concerned).split(AT_ONCE):
            exact = self._exact(head, rows, *tensors)
            assert exact.score_gradients is not None
            dk += exact.score_gradients[:, self.keys].T @ q[rows] * self.scale
            dv += exact.weights[:, self.keys].T @ dout[rows]
        return dq, dk, dv

    def check_output(self, out: Tensor) -> None:
        """Raise WrongResult when sampled rows are further from float64 than rounding explains."""
        for head, want in self.outputs.items():
            self._compare(f"head {head}", out[0, self.rows, head], want, self.slack[0])

    def check_gradients(self, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Raise WrongResult when sampled gradients are further from float64 than rounding explains."""
        for head, wanted in self.gradients.items():
            got = dq[0, self.rows, head], dk[0, self.keys, head], dv[0, self.keys, head]
            for name, one, want in zip(("dQ", "dK", "dV"), got, wanted, strict=True):
                self._compare(f"{name} of head {head}", one, want, self.slack[1])

    @staticmethod
    def _compare(what: str, got: Tensor, want: Tensor, most: float) -> None:
        error = float((got.detach().double() - want).square().mean().sqrt() / want.square().mean().sqrt())
        if not error < most:  # NaN is wrong, too
            raise WrongResult(f"{what}: relative error {error:.2e}, at most {most:.2e}")
