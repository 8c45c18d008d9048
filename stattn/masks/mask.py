"""A mask: described once by its key, packed as tables for any grid; and the keys of named masks read back."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from stattn.grid import Grid, Triple, as_grid, check_triple
from stattn.tables import Packed, Product, count_by_tile, count_pairs, intersect, simplify, tile_sizes

if TYPE_CHECKING:
    from stattn.blocks import BlockList

MAX_PRODUCTS = 8
EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Mask:
    """What each video query may see, on any grid.

    Masks combine with ``&`` and ``|``, and are equal when their ``key`` is. key: the canonical expression that builds
    the mask, e.g. ``window(7, 17, 17)``; ``parse(key)`` gives the mask back.
    """

    key: str
    build: Callable[[Triple], list[Product]] = field(repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return self.key

    def __reduce__(self) -> tuple[Callable[[str], Mask], tuple[str]]:
        return parse, (self.key,)

    def __and__(self, other: Mask) -> Mask:
        """Allow what both masks allow."""
        if not isinstance(other, Mask):
            return NotImplemented

        def build(shape: Triple) -> list[Product]:
            return [intersect(a, b) for a, b in itertools.product(self.build(shape), other.build(shape))]

        return Mask(f"({self.key} & {other.key})", build)

    def __or__(self, other: Mask | BlockList) -> Mask | BlockList:
        """Allow what either allows. With a BlockList the mask is lowered to lists of tiles on the lists' device."""
        if isinstance(other, Mask):
            return Mask(f"({self.key} | {other.key})", lambda shape: [*self.build(shape), *other.build(shape)])
        return NotImplemented

    def pack(self, grid: Grid | Triple) -> Packed:
        """Give the mask's tables on a grid: a few kilobytes, cached.

        Raises ValueError when the mask does not fit the grid (a window wider than its axis), or has more than eight
        products.
        """
        return _pack(self, as_grid(grid).shape)

    def products(self, grid: Grid | Triple) -> tuple[Product, ...]:
        """Give the axis rules of each product on a grid; products that add nothing are left out."""
        return _products(self, as_grid(grid).shape)

    def allowed(
        self,
        grid: Grid | Triple,
        q: torch.Tensor | Sequence[int] | None = None,
        k: torch.Tensor | Sequence[int] | None = None,
        *,
        globals_see: str = "all",
        valid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Say for each query and key token whether it is seen: what every implementation is tested against.

        q, k: token indices within grid.tokens, all of them when None. valid: booleans [before + after], the global
        tokens that are real. Returns booleans [len(q), len(k)]. Raises TypeError for what are no indices or booleans,
        ValueError for tokens outside the grid or other shapes.
        """
        grid = as_grid(grid)
        if globals_see not in ("all", "globals"):
            raise ValueError(f"globals_see={globals_see!r} must be 'all' or 'globals'")
        qi, ki = (_tokens(name, given, grid) for name, given in (("q", q), ("k", k)))
        video = torch.zeros(len(qi), len(ki), dtype=torch.bool)
        qc, kc = (_coordinates(grid, i) for i in (qi, ki))
        for product in self.products(grid):
            # Keys first: rows of them are then copied whole.
            inside = [torch.from_numpy(rule.matrix())[:, y][x] for rule, x, y in zip(product, qc, kc, strict=True)]
            video |= inside[0] & inside[1] & inside[2]
        q_global, k_global = (is_global(grid, i) for i in (qi, ki))
        sees_rest = globals_see == "all"
        table = torch.where(q_global[:, None], k_global | sees_rest, video | k_global)
        if valid is not None:
            if not isinstance(valid, torch.Tensor) or valid.dtype != torch.bool:
                kind = valid.dtype if isinstance(valid, torch.Tensor) else type(valid).__name__
                raise TypeError(f"valid of {kind} must be a tensor of booleans [before + after]")
            if tuple(valid.shape) != (grid.globals,):
                raise ValueError(f"valid of shape {tuple(valid.shape)} must be [before + after] = ({grid.globals},)")
            real = torch.ones(grid.tokens, dtype=torch.bool)
            real[is_global(grid, torch.arange(grid.tokens))] = valid.cpu()
            table &= real[qi][:, None] & real[ki]
        return table

    def tiles(self, grid: Grid | Triple, q_tile: Triple, k_tile: Triple) -> np.ndarray:
        """Classify every pair of a query tile and a key tile of the video as EMPTY (0), PARTIAL (1) or FULL (2).

        Tiles lie in row-major order from the origin; the last on an axis may be short. Returns int8 [q tiles, k tiles].
        """
        grid = as_grid(grid)
        q_tile, k_tile = check_triple("q_tile", q_tile), check_triple("k_tile", k_tile)
        counts = count_by_tile(self.products(grid), grid.shape, q_tile, k_tile)
        sizes = [tile_sizes(grid.shape, tile) for tile in (q_tile, k_tile)]
        kinds = np.full(counts.shape, PARTIAL, np.int8)
        kinds[counts == 0] = EMPTY
        kinds[counts == sizes[0][:, None] * sizes[1]] = FULL
        return kinds

    def density(self, grid: Grid | Triple) -> float:
        """Give the share of (query, key) pairs that are allowed, global tokens included."""
        grid = as_grid(grid)
        pairs = count_pairs(self.products(grid))
        dense = grid.tokens**2 - grid.video**2
        return (pairs + dense) / grid.tokens**2

    def draw(self, grid: Grid | Triple, query: Triple | None = None) -> str:
        """Draw what one query sees, a panel per frame, and return the SVG text.

        query: (t, h, w), the middle of the grid when None.
        """
        from stattn.masks.pictures import draw_mask

        return draw_mask(self, as_grid(grid), query)


@lru_cache(maxsize=512)
def _products(mask: Mask, shape: Triple) -> tuple[Product, ...]:
    products = simplify(mask.build(shape))
    if len(products) > MAX_PRODUCTS:
        raise ValueError(f"mask {mask.key} is a union of {len(products)} products, more than {MAX_PRODUCTS}")
    return products


@lru_cache(maxsize=512)
def _pack(mask: Mask, shape: Triple) -> Packed:
    return Packed.of(shape, _products(mask, shape))


def is_global(grid: Grid, tokens: torch.Tensor) -> torch.Tensor:
    """Say which token indices are global tokens."""
    return (tokens < grid.before) | (tokens >= grid.before + grid.video)


def _tokens(name: str, given: torch.Tensor | Sequence[int] | None, grid: Grid) -> torch.Tensor:
    """Give token indices as a tensor, all of the grid's when None."""
    if given is None:
        return torch.arange(grid.tokens)
    tokens = torch.as_tensor(given).cpu()
    if tokens.dim() != 1:
        raise ValueError(f"{name} of shape {tuple(tokens.shape)} must be a list of token indices")
    if tokens.numel() and (tokens.is_floating_point() or tokens.dtype == torch.bool):
        raise TypeError(f"{name} of {tokens.dtype} must hold token indices, integers")
    tokens = tokens.long()
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < grid.tokens:
        raise ValueError(
            f"{name} has tokens from {int(tokens.min())} to {int(tokens.max())}, the grid 0 to {grid.tokens - 1}"
        )
    return tokens


def _coordinates(grid: Grid, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give the (t, h, w) of token indices; global tokens get some coordinate inside the grid."""
    place = (tokens - grid.before).clamp(0, grid.video - 1)
    return place // (grid.h * grid.w), place // grid.w % grid.h, place % grid.w


# Named masks, which ``named.py`` registers.


class Constructor(NamedTuple):
    """A named mask: the function that makes it, and examples that fit any grid of at least the given shape."""

    make: Callable[..., Mask]
    examples: Callable[[Triple], list[Mask]]


CONSTRUCTORS: dict[str, Constructor] = {}


def named(examples: Callable[[Triple], list[Mask]]) -> Callable[[Callable[..., Mask]], Callable[..., Mask]]:
    """Register a constructor with examples for a grid shape, from which pictures and tests are made."""

    def register(make: Callable[..., Mask]) -> Callable[..., Mask]:
        CONSTRUCTORS[make.__name__] = Constructor(make, examples)
        return make

    return register


@lru_cache(maxsize=1024)
def parse(key: str) -> Mask:
    """Build a mask from its key: an expression of named masks with & and |, as a string.

    Raises ValueError for anything else.
    """

    def evaluate(node: ast.expr) -> Mask:
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            left, right = evaluate(node.left), evaluate(node.right)
            combined = left & right if isinstance(node.op, ast.BitAnd) else left | right
            assert isinstance(combined, Mask)
            return combined
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CONSTRUCTORS:
            try:
                options = {str(each.arg): _literal(each.value) for each in node.keywords}
                return CONSTRUCTORS[node.func.id].make(*map(_literal, node.args), **options)
            except (TypeError, ValueError) as error:
                raise ValueError(f"mask {key!r}: {error}") from error
        raise ValueError(
            f"mask {key!r}: expected {', '.join(CONSTRUCTORS)} joined by & and |, got {ast.unparse(node)!r}"
        )

    if not isinstance(key, str):
        raise TypeError(f"key={key!r} must be a string")
    try:
        tree = ast.parse(key, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"mask {key!r} is not an expression: {error.msg}") from error
    return evaluate(tree.body)


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:  # whose words hold the node's address
        raise ValueError(f"{ast.unparse(node)!r} is not a literal") from None
