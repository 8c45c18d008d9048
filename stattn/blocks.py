"""Block lists: which key tiles each query tile visits, chosen per sample and head on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from stattn.grid import Grid, Triple, as_grid, check_triple
from stattn.masks import EMPTY, FULL, PARTIAL, Mask

AT_ONCE = 2**22  # pairs of tiles that are listed at a time in plain PyTorch, each some 20 bytes


@dataclass(frozen=True, eq=False)
class BlockList:
    """For each query tile, per sample and head, the list of key tiles that it sees.

    shape: the grid's (t, h, w). q_tile, k_tile: tile extents (t, h, w) in tokens; tiles are numbered in row-major order
    from the origin, and the last one on an axis may be short. count: int32 [B, heads, q tiles], how many entries of
    each row of ``index`` are in use. index: int32 [B, heads, q tiles, most], the numbers of the key tiles, none twice
    in a row. B and heads may be 1, which then stands for all. partial: booleans like index, True where a tile is seen
    only as far as ``mask`` allows; None when all listed tiles are seen whole.

    Raises TypeError or ValueError when shapes, dtypes or devices do not fit. The entries themselves are not checked,
    since reading them would wait for the device.
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
        return _kinds(self.count, self.index, self.partial, self.tiles[1])

    def __or__(self, mask: object) -> BlockList:
        """Allow what the mask or the lists allow: the mask joins the lists tile by tile, on their device."""
        if not isinstance(mask, Mask):
            return NotImplemented
        return join(self, mask)

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
    lists = _Rows.empty(kinds.shape[:-1], k_tiles if most is None else most, mask is not None, kinds.device)
    rows = kinds.reshape(-1, k_tiles)
    for start in range(0, len(rows), lists.at_once(k_tiles)):
        lists.write(start, rows[start : start + lists.at_once(k_tiles)])
    return lists.blocks(shape, q_tile, k_tile, mask)


def join(blocks: BlockList, mask: Mask, *, impl: str = "auto") -> BlockList:
    """Allow what the mask or the lists allow: ``mask | blocks``.

    The mask is lowered once for its device and kept there, after which no call waits for the device. impl: "triton",
    "reference" (plain PyTorch), or "auto": Triton on CUDA tensors; their results are identical. Raises ValueError when
    the lists have partial tiles of another mask, or impl is unknown.
    """
    if blocks.mask is not None and blocks.mask != mask:
        raise ValueError(
            f"the lists already have partial tiles of mask {blocks.mask}; they cannot take those of {mask} too"
        )
    triton = _by_triton(impl, blocks.index)
    kinds, longest = _lowered(mask, blocks.shape, blocks.q_tile, blocks.k_tile, blocks.index.device)
    (q_tiles, k_tiles), entries = blocks.tiles, blocks.index.shape[-1]
    lists = _Rows.empty(blocks.count.shape, min(k_tiles, entries + longest), True, blocks.index.device)
    if triton:
        from stattn.kernels import blocks as kernels

        assert lists.partial is not None
        kernels.join(blocks.count, blocks.index, blocks.partial, kinds, lists.count, lists.index, lists.partial)
        return lists.blocks(blocks.shape, blocks.q_tile, blocks.k_tile, mask)
    count, index = blocks.count.reshape(-1), blocks.index.reshape(-1, entries)
    partial = None if blocks.partial is None else blocks.partial.reshape(-1, entries)
    for start in range(0, len(count), lists.at_once(k_tiles)):
        rows = slice(start, start + lists.at_once(k_tiles))
        listed = _kinds(count[rows], index[rows], None if partial is None else partial[rows], k_tiles)
        q_tile = torch.arange(start, start + len(listed), device=index.device) % q_tiles
        lists.write(start, torch.maximum(listed, kinds[q_tile]))
    return lists.blocks(blocks.shape, blocks.q_tile, blocks.k_tile, mask)


@dataclass(frozen=True, eq=False)
class _Rows:
    """The tensors of lists that are being written, some rows at a time."""

    count: torch.Tensor
    index: torch.Tensor
    partial: torch.Tensor | None

    @classmethod
    def empty(cls, size: torch.Size, most: int, partial: bool, device: torch.device) -> _Rows:
        """Make lists that nothing has been written to."""
        flags = torch.empty((*size, most), dtype=torch.bool, device=device) if partial else None
        index = torch.empty((*size, most), dtype=torch.int32, device=device)
        return cls(torch.empty(size, dtype=torch.int32, device=device), index, flags)

    @staticmethod
    def at_once(k_tiles: int) -> int:
        """Count the rows that are written at a time."""
        return max(1, AT_ONCE // k_tiles)

    def write(self, start: int, kinds: torch.Tensor) -> None:
        """List the tiles of some rows, int8 [rows, k tiles], in ascending order; the last tile fills what is left."""
        (rows, k_tiles), most = kinds.shape, self.index.shape[-1]
        rank = (kinds != EMPTY).cumsum(-1, dtype=torch.int32)
        at = torch.where((kinds != EMPTY) & (rank <= most), rank - 1, most).long()  # the rest goes to a column too many
        index = rank.new_full((rows, most + 1), k_tiles - 1)
        index.scatter_(-1, at, torch.arange(k_tiles, dtype=torch.int32, device=kinds.device).expand(rows, -1))
        self.count.view(-1)[start : start + rows] = rank[:, -1]
        self.index.view(-1, most)[start : start + rows] = index[:, :most]
        if self.partial is not None:
            partial = torch.zeros((rows, most + 1), dtype=torch.bool, device=kinds.device)
            partial.scatter_(-1, at, kinds == PARTIAL)
            self.partial.view(-1, most)[start : start + rows] = partial[:, :most]

    def blocks(self, shape: Triple, q_tile: Triple, k_tile: Triple, mask: Mask | None) -> BlockList:
        """Make block lists of them."""
        return BlockList(shape, q_tile, k_tile, self.count, self.index, self.partial, mask)


def _kinds(count: torch.Tensor, index: torch.Tensor, partial: torch.Tensor | None, k_tiles: int) -> torch.Tensor:
    """Turn lists into a table of EMPTY, PARTIAL and FULL tiles. int8 [..., k tiles]"""
    used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    value = torch.full_like(index, FULL, dtype=torch.int8)
    if partial is not None:
        value = torch.where(partial, PARTIAL, value).to(torch.int8)
    table = torch.full((*count.shape, k_tiles + 1), EMPTY, dtype=torch.int8, device=index.device)
    # Unused entries are written behind the last tile.
    table.scatter_(-1, torch.where(used, index, k_tiles).long(), value)
    return table[..., :k_tiles]


@lru_cache(maxsize=4)  # each holds a byte per pair of tiles
def _lowered(
    mask: Mask, shape: Triple, q_tile: Triple, k_tile: Triple, device: torch.device
) -> tuple[torch.Tensor, int]:
    """Classify the pairs of tiles of a mask: int8 [q tiles, k tiles] on the device, and the most tiles of a row."""
    kinds = torch.from_numpy(mask.tiles(shape, q_tile, k_tile))
    return kinds.to(device), int((kinds != EMPTY).sum(-1).max())


def _by_triton(impl: str, x: torch.Tensor) -> bool:
    """Say whether Triton makes lists. Raises ValueError for an unknown implementation."""
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl={impl!r} must be 'auto', 'triton' or 'reference'")
    return impl == "triton" or (impl == "auto" and x.is_cuda)


def lower(
    mask: Mask, grid: Grid | Triple, q_tile: Triple, k_tile: Triple, device: torch.device | str = "cpu"
) -> BlockList:
    """Lower a mask to lists that all samples and heads share. Raises TypeError for what is no Mask."""
    if not isinstance(mask, Mask):
        raise TypeError(f"mask={mask!r} must be a Mask")
    grid = as_grid(grid)
    kinds = torch.from_numpy(mask.tiles(grid, q_tile, k_tile))
    partial = bool((kinds == PARTIAL).any())
    return block_list(grid.shape, q_tile, k_tile, kinds.to(device)[None, None], mask if partial else None)


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
    triton = _by_triton(impl, index)
    if index.shape[2] * index.shape[3] >= 2**31:
        raise ValueError(f"index of shape {tuple(index.shape)} has 2**31 entries or more in each sample and head")
    if triton:
        from stattn.kernels import blocks as kernels

        return KeyLists(*kernels.transpose(count, index, partial, k_tiles))
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
