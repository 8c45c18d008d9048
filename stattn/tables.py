"""The algebra of axis tables: rules of one axis, products of three, unions of products, and what they count.

A rule is a pair of tables and a residue: a query at x sees the keys k with ``lo[x] <= k <= hi[x]`` and
``(k - x) % step == 0``. A product is one rule per axis; a mask (``masks``) is a union of products on each grid.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from stattn.grid import Grid, Triple


class Rule(NamedTuple):
    """What one axis allows: lo[x] <= k <= hi[x] and (k - x) % step == 0. An empty row has lo = length, hi = -1."""

    lo: np.ndarray  # int32 [length]
    hi: np.ndarray  # int32 [length]
    step: int

    def counts(self) -> np.ndarray:
        """Count the keys that each query sees on this axis. [length]"""
        return np.maximum((self.hi - self.lo) // self.step + 1, 0)  # the bounds are members of the residue class

    def matrix(self) -> np.ndarray:
        """Say which keys each query sees on this axis, as booleans. [length, length]"""
        x = np.arange(len(self.lo))
        return (self.lo[:, None] <= x) & (x <= self.hi[:, None]) & ((x - x[:, None]) % self.step == 0)


Product = tuple[Rule, Rule, Rule]


@dataclass(frozen=True)
class Packed:
    """The tables of a mask on one grid, as every implementation reads them. Equal by value.

    shape: (t, h, w). data: the bytes of int32 [products, 2, t + h + w], lo and hi side by side for the three axes.
    steps: the residue of each product and axis.
    """

    shape: Triple
    data: bytes
    steps: tuple[Triple, ...]

    @classmethod
    def of(cls, shape: Triple, products: Sequence[Product]) -> Packed:
        """Pack the rules of products."""
        rows = [[np.concatenate([r.lo for r in p]), np.concatenate([r.hi for r in p])] for p in products]
        return cls(shape, np.array(rows, np.int32).tobytes(), tuple((t.step, h.step, w.step) for t, h, w in products))

    @property
    def tables(self) -> np.ndarray:
        """The tables, int32 [products, 2, t + h + w], read-only."""
        return np.frombuffer(self.data, np.int32).reshape(len(self.steps), 2, sum(self.shape))

    def tensor(self, device: torch.device | str) -> torch.Tensor:
        """Copy the tables to a device once; later calls return the same tensor. int32 [products, 2, t + h + w]"""
        return _tensor(self, str(device))

    def products(self, grid: Grid | None = None) -> tuple[Product, ...]:
        """Unpack the rules of each product. grid: as packed; taken so that a Packed can stand for a mask."""
        if grid is not None and grid.shape != self.shape:
            raise ValueError(f"grid={grid.shape} differs from the {self.shape} that the mask was packed for")
        bounds = np.cumsum((0, *self.shape))
        found = []
        for (lo, hi), steps in zip(self.tables, self.steps, strict=True):
            t, h, w = (Rule(lo[a:b], hi[a:b], s) for a, b, s in zip(bounds[:-1], bounds[1:], steps, strict=True))
            found.append((t, h, w))
        return tuple(found)


@functools.lru_cache(maxsize=512)
def _tensor(packed: Packed, device: str) -> torch.Tensor:
    return torch.from_numpy(packed.tables.copy()).to(device)


def whole(length: int) -> Rule:
    """Allow every key to every query."""
    return Rule(np.zeros(length, np.int32), np.full(length, length - 1, np.int32), 1)


def same(length: int) -> Rule:
    """Allow the key at the query's own place."""
    x = np.arange(length, dtype=np.int32)
    return Rule(x, x, 1)


def is_whole(rule: Rule) -> bool:
    """Say whether a rule allows every key to every query."""
    return rule.step == 1 and not rule.lo.any() and bool((rule.hi == len(rule.hi) - 1).all())


def is_same(rule: Rule) -> bool:
    """Say whether a rule allows the key at the query's own place and no other."""
    x = np.arange(len(rule.lo))
    return bool((rule.lo == x).all() and (rule.hi == x).all())


def intersect(a: Product, b: Product) -> Product:
    """Allow what both products allow."""
    t, h, w = (
        tighten(Rule(np.maximum(x.lo, y.lo), np.minimum(x.hi, y.hi), math.lcm(x.step, y.step)))
        for x, y in zip(a, b, strict=True)
    )
    return t, h, w


def tighten(rule: Rule) -> Rule:
    """Move the bounds inwards to members of each query's residue class; give empty rows lo = length, hi = -1."""
    lo, hi = np.asarray(rule.lo, np.int64), np.asarray(rule.hi, np.int64)
    x = np.arange(len(lo))
    lo = lo + (x - lo) % rule.step
    hi = hi - (hi - x) % rule.step
    empty = lo > hi
    lo, hi = np.where(empty, len(lo), lo).astype(np.int32), np.where(empty, -1, hi).astype(np.int32)
    # A step that no row can take is no step: it would split the walk into classes for nothing.
    return Rule(lo, hi, rule.step if (hi - lo).max(initial=0) > 0 else 1)


def covers(outer: Product, inner: Product) -> bool:
    """Say whether the outer product allows all that the inner one allows (sufficient, axis by axis)."""
    return all(covers_axis(o, i) for o, i in zip(outer, inner, strict=True))


def covers_axis(outer: Rule, inner: Rule) -> bool:
    """Say whether the outer rule of an axis allows all that the inner one allows."""
    return inner.step % outer.step == 0 and bool(
        np.all((outer.lo <= inner.lo) & (inner.hi <= outer.hi) | (inner.lo > inner.hi))
    )


def simplify(products: Iterable[Product]) -> tuple[Product, ...]:
    """Tighten the rules of a union of products, make them read-only, and leave out products that add nothing."""
    kept: list[Product] = []
    for loose in products:
        t, h, w = (tighten(rule) for rule in loose)
        product = (t, h, w)
        if any(not rule.counts().any() for rule in product) or any(covers(each, product) for each in kept):
            continue
        kept = [each for each in kept if not covers(product, each)]
        kept.append(product)
    for product in kept:
        for rule in product:
            rule.lo.flags.writeable = rule.hi.flags.writeable = False
    return tuple(kept)


def count_pairs(products: Sequence[Product]) -> int:
    """Count the pairs of a query and a key that a union allows."""
    return sum(
        sign * math.prod(int(rule.counts().sum(dtype=np.int64)) for rule in product)
        for sign, product in _inclusion_exclusion(products)
    )


def count_by_tile(products: Sequence[Product], shape: Triple, q_tile: Triple, k_tile: Triple) -> np.ndarray:
    """Count the pairs that a union allows in every pair of tiles. int64 [q tiles, k tiles]"""
    q_tiles, k_tiles = (len(tile_sizes(shape, tile)) for tile in (q_tile, k_tile))
    total = np.zeros((q_tiles, k_tiles), np.int64)
    for sign, product in _inclusion_exclusion(products):
        per_axis = []
        for rule, qe, ke, length in zip(product, q_tile, k_tile, shape, strict=True):
            sums = np.add.reduceat(rule.matrix().astype(np.int64), np.arange(0, length, qe), axis=0)
            per_axis.append(np.add.reduceat(sums, np.arange(0, length, ke), axis=1))
        total += sign * np.einsum("ad,be,cf->abcdef", *per_axis).reshape(q_tiles, k_tiles)
    return total


def tile_sizes(shape: Triple, tile: Triple) -> np.ndarray:
    """Count the tokens of each tile, the last ones on each axis short. [tiles]"""
    sizes = [np.minimum(np.arange(0, n, e) + e, n) - np.arange(0, n, e) for n, e in zip(shape, tile, strict=True)]
    return np.einsum("a,b,c->abc", *sizes).reshape(-1)


def _inclusion_exclusion(products: Sequence[Product]) -> list[tuple[int, Product]]:
    """List the signed intersections whose counts add up to the count of the union."""
    terms = []
    for size in range(1, len(products) + 1):
        for chosen in itertools.combinations(products, size):
            terms.append(((-1) ** (size + 1), functools.reduce(intersect, chosen)))
    return terms
