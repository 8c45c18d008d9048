"""Other implementations of attention, as their users call them.

A peer takes q, k and v [1, N, heads, D] in natural order and gives the output so: whatever it must permute or copy is
part of its call. What does not depend on q, k and v (a block mask for a grid) is its plan, made once and timed as a row
of its own. Packages that are not installed raise ImportError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from stattn.blocks import BlockList, block_list
from stattn.grid import Grid, Triple
from stattn.masks import FULL, Mask

Call = Callable[[Tensor, Tensor, Tensor], Any]


class Peer(NamedTuple):
    """How a package computes a case.

    forward: (q, k, v) -> output. parts: rows of their own, by name: a plan, or what of the forward is permuting.
    backward: whether it has one.
    """

    forward: Call
    parts: Mapping[str, Call] = {}
    backward: bool = True


Make = Callable[[Grid, Any], Peer]  # of a grid and its Mask or BlockList; the builders below, given their options


def version(*distributions: str) -> str:
    """Give the version of a package under the first of these names that is installed, or "not installed"."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def versions() -> dict[str, str]:
    """Say which packages are compared."""
    return {
        "flash-attn-3": version("flash-attn-3", "flash_attn_3", "flash-attn-interface"),
        "flash-attn-4": version("flash-attn-4", "fa4"),
        "natten": version("natten"),
        "fastvideo-kernel": version("fastvideo-kernel"),
    }


# PyTorch's fused kernels.

BACKENDS = {
    "torch-sdpa": None,  # the default choice among them
    "torch-cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch-flash": SDPBackend.FLASH_ATTENTION,
}


def natural(x: Tensor, grid: Grid) -> Tensor:
    """See [1, N, heads, D] as [1, heads, N, D]."""
    return x.transpose(1, 2)


def frames(x: Tensor, grid: Grid) -> Tensor:
    """See [1, N, heads, D] as [T, heads, H W, D]."""
    return x.unflatten(1, (grid.t, -1)).flatten(0, 1).transpose(1, 2)


def places(x: Tensor, grid: Grid) -> Tensor:
    """See [1, N, heads, D] as [H W, heads, T, D]."""
    return x.unflatten(1, (grid.t, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)


def from_natural(x: Tensor, grid: Grid) -> Tensor:
    """See [1, heads, N, D] as [1, N, heads, D]."""
    return x.transpose(1, 2)


def from_frames(x: Tensor, grid: Grid) -> Tensor:
    """Bring frames back: a view where the kernel wrote heads behind tokens."""
    return x.transpose(1, 2).reshape(1, grid.video, x.shape[1], x.shape[3])


def from_places(x: Tensor, grid: Grid) -> Tensor:
    """Bring places back: a copy."""
    return x.permute(2, 0, 1, 3).reshape(1, grid.video, x.shape[1], x.shape[3])


def sdpa(
    grid: Grid,
    mask: Mask,
    *,
    backend: SDPBackend | None = None,
    there: Callable[[Tensor, Grid], Tensor] = natural,
    back: Callable[[Tensor, Grid], Tensor] = from_natural,
    copies: bool = False,
) -> Peer:
    """Dense attention within the batches that ``there`` makes. copies: q, k and v become contiguous."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (there(x, grid).contiguous() if copies else there(x, grid) for x in (q, k, v))
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return back(F.scaled_dot_product_attention(q, k, v), grid)

    return Peer(forward)


def torch_peers(**options: Any) -> dict[str, Make]:
    """PyTorch's default, cuDNN's and FlashAttention-2's kernel."""
    return {name: partial(sdpa, backend=backend, **options) for name, backend in BACKENDS.items()}


# Tokens in tile order, which most packages need.


def to_tiles(x: Tensor, grid: Grid, tile: Triple, heads_first: bool = True) -> Tensor:
    """Copy [1, N, heads, D] tile by tile, to [1, heads, N, D] or to [1, N, heads, D]; the tile divides the grid."""
    sizes = [each for n, e in zip(grid.shape, tile, strict=True) for each in (n // e, e)]
    x = x.unflatten(1, sizes)
    if heads_first:
        return x.permute(0, 7, 1, 3, 5, 2, 4, 6, 8).flatten(2, 7)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7, 8).flatten(1, 6)


def from_tiles(x: Tensor, grid: Grid, tile: Triple, heads_first: bool = True) -> Tensor:
    """Copy tokens back into natural order, to [1, N, heads, D]."""
    sizes = [*(n // e for n, e in zip(grid.shape, tile, strict=True)), *tile]
    if heads_first:
        return x.unflatten(2, sizes).permute(0, 2, 5, 3, 6, 4, 7, 1, 8).flatten(1, 6)
    return x.unflatten(1, sizes).permute(0, 1, 4, 2, 5, 3, 6, 7, 8).flatten(1, 6)


def in_tiles(call: Call, grid: Grid, tile: Triple, heads_first: bool = True) -> Call:
    """Permute q, k and v into tile order for a call, and its output back."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return from_tiles(call(*(to_tiles(x, grid, tile, heads_first) for x in (q, k, v))), grid, tile, heads_first)

    return forward


def permutes(grid: Grid, tile: Triple, heads_first: bool = True) -> dict[str, Call]:
    """What of a call in tile order is permuting alone."""
    return {"permutes": in_tiles(lambda q, k, v: q, grid, tile, heads_first)}


# FlexAttention.


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for the shapes at hand; a backward may run again on what its forward kept."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False)


def flex(grid: Grid, mask: Mask) -> Peer:
    """FlexAttention without a mask."""
    run = compiled(flex_attention)
    return Peer(lambda q, k, v: run(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2))


def flex_window(grid: Grid, mask: Mask, *, size: Triple, device: str = "cuda") -> Peer:
    """FlexAttention over tokens in natural order, with a window as its mask function and a block mask made of it."""
    length = grid.shape

    def axes(token: Tensor) -> Iterable[Tensor]:
        return token // (length[1] * length[2]), token // length[2] % length[1], token % length[2]

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        found = q >= 0
        for at, key, n, window in zip(axes(q), axes(k), length, size, strict=True):
            start = torch.clamp(at - window // 2, 0, n - window)
            found = found & (start <= key) & (key < start + window)
        return found

    run, make = compiled(flex_attention), compiled(create_block_mask)
    plan = partial(make, seen, None, None, grid.video, grid.video, device=device)
    blocks = plan()
    return Peer(
        lambda q, k, v: run(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=blocks).transpose(1, 2),
        {"plan": lambda q, k, v: plan()},
    )


def flex_tiles(grid: Grid, mask: Mask, *, tile: Triple, device: str = "cuda") -> Peer:
    """FlexAttention over tokens in tile order, of which it sees whole tiles."""
    run, size = compiled(flex_attention), tile[0] * tile[1] * tile[2]
    lists = _tile_lists(mask, grid, tile, device)
    table = lists.kinds()[0, 0] == FULL
    blocks = _block_mask(lists, size, grid.video, lambda b, h, q, k: table[q // size, k // size])
    call = in_tiles(lambda q, k, v: run(q, k, v, block_mask=blocks), grid, tile)
    return Peer(call, permutes(grid, tile))


def flex_lists(grid: Grid, lists: BlockList) -> Peer:
    """FlexAttention over tokens in tile order, with lists that belong to the call; its backward has no 64-key tiles.

    The block mask is made in the call, since lists are chosen anew for each.
    """
    run = compiled(flex_attention)
    size = lists.k_tile[0] * lists.k_tile[1] * lists.k_tile[2]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = _block_mask(lists, size, grid.video, backward=False)
        return run(q, k, v, block_mask=blocks, kernel_options={"BLOCK_M": size, "BLOCK_N": size})

    return Peer(in_tiles(call, grid, lists.k_tile), permutes(grid, lists.k_tile), backward=False)


def _tile_lists(mask: Mask, grid: Grid, tile: Triple, device: str) -> BlockList:
    kinds = torch.from_numpy(mask.tiles(grid, tile, tile)).to(device)
    assert not ((kinds != FULL) & (kinds != 0)).any(), f"{mask} cuts tiles of {tile}"
    return block_list(grid.shape, tile, tile, kinds[None, None])


def _block_mask(
    lists: BlockList, size: int, tokens: int, seen: Callable[..., Tensor] | None = None, backward: bool = True
) -> BlockMask:
    """Make a block mask of lists of whole tiles, in which kernels call no mask function; there are no partial tiles.

    seen: the same as a mask function, by which it goes without being compiled. backward: whether it needs one.
    """
    index = F.pad(lists.index, (0, lists.tiles[1] - lists.index.shape[-1]))  # it takes rows of the full length only
    return BlockMask.from_kv_blocks(
        torch.zeros_like(lists.count), torch.zeros_like(index), lists.count, index, BLOCK_SIZE=size, mask_mod=seen,
        seq_lengths=(tokens, tokens), compute_q_blocks=backward,
    )  # fmt: skip


# Packages.


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def flash_3(grid: Grid, mask: Mask) -> Peer:
    """FlashAttention-3."""
    from flash_attn_interface import flash_attn_func

    return Peer(lambda q, k, v: _first(flash_attn_func(q, k, v)))


def flash_4(grid: Grid, mask: Mask) -> Peer:
    """FlashAttention-4."""
    from flash_attn.cute import flash_attn_func

    return Peer(lambda q, k, v: _first(flash_attn_func(q, k, v)))


def flash_4_tiles(grid: Grid, mask: Mask, *, tile: Triple, device: str = "cuda") -> Peer:
    """FlashAttention-4's block sparsity over tokens in tile order."""
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    size = tile[0] * tile[1] * tile[2]
    kinds = torch.from_numpy(mask.tiles(grid, tile, tile)).to(device)[None, None]

    def tensors(kinds: Tensor) -> Any:
        lists = block_list(grid.shape, tile, tile, kinds)
        none = torch.zeros_like(lists.count), torch.zeros_like(lists.index)
        return BlockSparseTensorsTorch(*none, lists.count, lists.index, block_size=(size, size))

    options = {
        "block_sparse_tensors": tensors(kinds),
        "block_sparse_tensors_bwd": tensors(kinds.transpose(2, 3).contiguous()),
    }
    call = in_tiles(lambda q, k, v: _first(flash_attn_func(q, k, v, **options)), grid, tile, heads_first=False)
    return Peer(call, permutes(grid, tile, heads_first=False))


def natten(grid: Grid, mask: Mask, *, size: Triple, stride: int | Triple = 1, dilation: int | Triple = 1) -> Peer:
    """NATTEN's neighbourhood attention, which permutes inside."""
    from natten import na3d

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shaped = [x.unflatten(1, grid.shape) for x in (q, k, v)]
        return na3d(*shaped, kernel_size=size, stride=stride, dilation=dilation).flatten(1, 3)

    return Peer(forward)


def fastvideo_tiles(grid: Grid, mask: Mask, *, tile: Triple, window: Triple) -> Peer:
    """fastvideo-kernel's sliding tile attention, over tokens in tile order."""
    from fastvideo_kernel import sliding_tile_attention

    shape = "x".join(map(str, grid.shape))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sliding_tile_attention(q, k, v, [window] * q.shape[1], 0, False, shape)

    return Peer(in_tiles(call, grid, tile), permutes(grid, tile), backward=False)


def fastvideo_lists(grid: Grid, lists: BlockList, *, heads: int) -> Peer:
    """fastvideo-kernel's block-sparse attention (VSA), over tokens in tile order."""
    from fastvideo_kernel.block_sparse_attn import block_sparse_attn_from_indices

    tile = lists.k_tile
    index, count = (x.expand(1, heads, *x.shape[2:]).contiguous() for x in (lists.index, lists.count))
    sizes = torch.full((lists.tiles[1],), tile[0] * tile[1] * tile[2], dtype=torch.int32, device=index.device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attn_from_indices(q, k, v, index, count, sizes)[0]

    return Peer(in_tiles(call, grid, tile), permutes(grid, tile))
