"""Block lists: which key tiles each query tile visits, chosen per sample and head on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from stattn.grid import Grid, Triple, as_grid, check_triple
from stattn.masks import EMPTY, FULL, PARTIAL, Mask


@dataclass(frozen=True, eq=False)
class BlockList:
    """The key tiles that each query tile of a video visits.

    shape: the grid's (t, h, w). q_tile, k_tile: tile extents (t, h, w); tiles lie in row-major order from the origin,
    and the last on an axis may be short. count: int32 [B, heads, q tiles], the entries in use. index: int32 [B, heads,
    q tiles, most], the key tiles; an entry appears once in its row. B and heads may be 1 and then stand for all.
    partial: booleans like index, the entries of which only what ``mask`` allows is seen; None when all are whole.

    Raises TypeError or ValueError when shapes, dtypes or devices do not fit. Entries are not read: that would wait for
    the device.
    """

    shape: Triple
    q_tile: Triple
    k_tile: Triple
    count: torch.Tensor
    index: torch.Tensor
    partial: torch.Tensor | None = None
    mask: Mask | None = None

    def __post_init__(self) -> None:
        for name in ("shape", "q_tile", "k_tile"):
            object.__setattr__(self, name, check_triple(name, getattr(self, name)))
        for name in ("count", "index", "partial"):
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor) and not (name == "partial" and value is None):
                raise TypeError(f"{name}={value!r} must be a tensor")
        if self.mask is not None and not isinstance(self.mask, Mask):
            raise TypeError(f"mask={self.mask!r} must be a Mask")
        if (self.partial is None) != (self.mask is None):
            raise ValueError(
                f"partial and mask go together, got partial={self.partial is not None} and mask={self.mask}"
            )
        q_tiles = self.tiles[0]
        if self.count.ndim != 3 or self.count.shape[2] != q_tiles:
            raise ValueError(f"count has shape {tuple(self.count.shape)}, expected [B, heads, {q_tiles} query tiles]")
        if self.index.ndim != 4 or self.index.shape[:3] != self.count.shape:
            raise ValueError(
                f"index has shape {tuple(self.index.shape)}, expected [*count.shape, most] = "
                f"{tuple(self.count.shape)} + (most,)"
            )
        for name, tensor, dtype in (
            ("count", self.count, torch.int32),
            ("index", self.index, torch.int32),
            ("partial", self.partial, torch.bool),
        ):
            if tensor is None:
                continue
            if tensor.dtype != dtype:
                raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
            if tensor.device != self.index.device:
                raise ValueError(f"{name} is on {tensor.device}, index on {self.index.device}")
        if self.partial is not None and self.partial.shape != self.index.shape:
            raise ValueError(
                f"partial has shape {tuple(self.partial.shape)}, expected index's {tuple(self.index.shape)}"
            )

    @property
    def tiles(self) -> tuple[int, int]:
        """The numbers of query tiles and key tiles."""
        return tile_count(self.shape, self.q_tile), tile_count(self.shape, self.k_tile)

    def kinds(self) -> torch.Tensor:
        """Say for each pair of tiles whether it is EMPTY, PARTIAL or FULL. int8 [B, heads, q tiles, k tiles]"""
        k_tiles = self.tiles[1]
        used = torch.arange(self.index.shape[-1], device=self.index.device) < self.count[..., None]
        value = torch.full_like(self.index, FULL, dtype=torch.int8)
        if self.partial is not None:
            value = torch.where(self.partial, PARTIAL, value).to(torch.int8)
        table = torch.full((*self.count.shape, k_tiles + 1), EMPTY, dtype=torch.int8, device=self.index.device)
        # Unused entries are written behind the last tile.
        table.scatter_(-1, torch.where(used, self.index, k_tiles).long(), value)
        return table[..., :k_tiles]

    def __or__(self, mask: object) -> BlockList:
        """Allow what the mask or the lists allow: the mask joins the lists tile by tile, on their device."""
        if not isinstance(mask, Mask):
            return NotImplemented
        if self.mask is not None and self.mask != mask:
            raise ValueError(
                f"the lists already have partial tiles of mask {self.mask}; they cannot take those of {mask} too"
            )
        kinds = torch.from_numpy(mask.tiles(self.shape, self.q_tile, self.k_tile))
        most = min(self.tiles[1], self.index.shape[-1] + int((kinds != EMPTY).sum(-1).max()))
        return block_list(
            self.shape, self.q_tile, self.k_tile, torch.maximum(kinds.to(self.index.device), self.kinds()), mask, most
        )

    __ror__ = __or__

    def allowed(self, batch: int = 0, head: int = 0) -> torch.Tensor:
        """Say for each video query and key of one sample and head whether it is seen: the truth. Booleans [N, N]"""
        grid = Grid(*self.shape)
        kinds = self.kinds()[batch if self.count.shape[0] > 1 else 0, head if self.count.shape[1] > 1 else 0].cpu()
        tiles = kinds[tile_of(grid, self.q_tile)][:, tile_of(grid, self.k_tile)]
        seen = tiles == FULL
        if self.mask is not None:
            seen |= (tiles == PARTIAL) & self.mask.allowed(grid)
        return seen


def block_list(
    shape: Triple,
    q_tile: Triple,
    k_tile: Triple,
    kinds: torch.Tensor,
    mask: Mask | None = None,
    most: int | None = None,
) -> BlockList:
    """Make lists from a table of EMPTY, PARTIAL and FULL pairs of tiles.

    kinds: int8 [B, heads, q tiles, k tiles] on any device. mask: what PARTIAL pairs allow; without one every listed
    pair is taken as FULL. most: the longest row, if known; the number of key tiles otherwise.
    """
    k_tiles = kinds.shape[-1]
    most = k_tiles if most is None else most
    listed = kinds != EMPTY
    place = torch.where(listed, torch.arange(k_tiles, device=kinds.device), k_tiles)
    index = place.sort(dim=-1).values[..., :most]
    kind = kinds.gather(-1, index.clamp(max=k_tiles - 1))
    return BlockList(
        shape,
        q_tile,
        k_tile,
        listed.sum(-1, dtype=torch.int32),
        index.clamp(max=k_tiles - 1).to(torch.int32).contiguous(),
        None if mask is None else (kind == PARTIAL).contiguous(),
        mask,
    )


def lower(
    mask: Mask, grid: Grid | Triple, q_tile: Triple, k_tile: Triple, device: torch.device | str = "cpu"
) -> BlockList:
    """Lower a mask to lists that all samples and heads share."""
    grid = as_grid(grid)
    kinds = torch.from_numpy(mask.tiles(grid, q_tile, k_tile)).to(device)
    partial = bool((kinds == PARTIAL).any())
    return block_list(grid.shape, q_tile, k_tile, kinds[None, None], mask if partial else None)


class KeyLists(NamedTuple):
    """Block lists seen from the key tiles: the query tiles that list each of them.

    offset: int32 [B, heads, k tiles + 1]; the list of key tile j is item[offset[j] : offset[j + 1]] of its sample and
    head. item: int32 [B, heads, q tiles * most], query tiles in ascending order within a list. partial: booleans like
    item, or None when all are whole. What lies behind the last offset is not written: it may hold anything.
    """

    offset: torch.Tensor
    item: torch.Tensor
    partial: torch.Tensor | None


def transpose(
    count: torch.Tensor, index: torch.Tensor, partial: torch.Tensor | None, k_tiles: int, *, impl: str = "auto"
) -> KeyLists:
    """Turn lists of key tiles into lists of query tiles, on their device and without a word to the host.

    count, index, partial: as in ``BlockList``, in any order within a row and of any strides; they are not checked, and
    entries that are no key tiles are left out. k_tiles: the number of key tiles. impl: "triton", "reference" (plain
    PyTorch), or "auto": Triton on CUDA tensors. Beside its result Triton's needs 1/8 byte per pair of tiles, and as
    much again for partial. Exact, and bitwise reproducible. Raises ValueError when a sample and head have 2**31 entries
    or impl is unknown.
    """
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl={impl!r} must be 'auto', 'triton' or 'reference'")
    if index.shape[2] * index.shape[3] >= 2**31:
        raise ValueError(f"index of shape {tuple(index.shape)} has 2**31 entries or more in each sample and head")
    if impl == "triton" or (impl == "auto" and index.is_cuda):
        from stattn.kernels import select

        return KeyLists(*select.transpose(count, index, partial, k_tiles))
    most = index.shape[3]
    used = torch.arange(most, device=index.device) < count[..., None]
    # Entries that are none are sorted behind the last tile.
    key = torch.where(used & (index >= 0) & (index < k_tiles), index, k_tiles).flatten(2)
    sizes = key.new_zeros((*key.shape[:2], k_tiles + 1)).scatter_add_(-1, key.long(), torch.ones_like(key))
    offset = torch.zeros_like(sizes)
    torch.cumsum(sizes[..., :-1], -1, dtype=torch.int32, out=offset[..., 1:])
    order = key.sort(dim=-1, stable=True).indices
    item = torch.div(order, max(most, 1), rounding_mode="floor").to(torch.int32)
    return KeyLists(offset, item, None if partial is None else partial.flatten(2).gather(-1, order))


def tile_count(shape: Triple, tile: Triple) -> int:
    """Count the tiles of a grid."""
    t, h, w = (-(-n // e) for n, e in zip(shape, tile, strict=True))
    return t * h * w


def tile_of(grid: Grid, tile: Triple, device: torch.device | str = "cpu") -> torch.Tensor:
    """Give the tile that each video token lies in. int64 [video tokens]"""
    t, h, w = (torch.arange(n, device=device) // e for n, e in zip(grid.shape, tile, strict=True))
    nh, nw = -(-grid.h // tile[1]), -(-grid.w // tile[2])
    return ((t[:, None, None] * nh + h[:, None]) * nw + w).reshape(-1)
