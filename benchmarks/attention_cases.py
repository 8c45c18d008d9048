"""What attention is measured on: real grids, heads and masks, and the packages that are measured beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import attention_peers as peers
import torch
from attention_peers import Make

from stattn import masks
from stattn.blocks import BlockList, block_list
from stattn.grid import Grid, Region
from stattn.masks import Mask

WAN_480P, WAN_720P = Grid(21, 30, 52), Grid(21, 45, 80)
HUNYUAN, COGVIDEOX, COSMOS = Grid(33, 45, 80), Grid(13, 30, 45), Grid(24, 44, 80)
G115200 = Grid(30, 48, 80)
TILE, LIST_TILE = (6, 8, 8), (2, 4, 8)  # of 384 and of 64 tokens
STA = masks.sliding_tile(TILE, (3, 3, 3))
KEPT = 162  # of 1,800 key tiles: as many as STA sees


class Case(NamedTuple):
    """A row of the tables of results.

    name, shape: a forward is called attention/<implementation>/<name>/<shape>, a backward <name>_bwd (dense_fwd and
    dense_bwd for "dense"). mask: or what makes block lists on a device. baselines: of whom a ratio is taken, by
    implementation; "" for all others. q_frames: the last frames only, as queries. deterministic: a row of it too.
    without_text: the baseline is the same launch without the grid's global tokens.
    """

    name: str
    shape: str
    grid: Grid
    heads: int
    dim: int
    mask: Mask | Callable[[str], BlockList]
    peers: Mapping[str, Make] = {}
    baselines: Mapping[str, str] = {}
    rounds: int = 15
    q_frames: int | None = None
    backward: bool = False
    deterministic: bool = False
    without_text: bool = False

    def label(self, backward: bool = False) -> str:
        """Name the mask and the pass."""
        if self.name == "dense":
            return "dense_bwd" if backward else "dense_fwd"
        return self.name + "_bwd" * backward

    def flops(self, backward: bool = False, text: bool = True) -> float:
        """Count the arithmetic of the pairs that are allowed: two products forward, five backward."""
        grid = self.grid if text else Grid(*self.grid.shape)
        if self.q_frames is not None:  # the last frames see all that is before them
            pairs = grid.video * grid.video / grid.t * self.q_frames
        elif isinstance(self.mask, Mask):
            pairs = self.mask.density(grid) * grid.tokens**2
        else:
            pairs = grid.video * KEPT * math.prod(LIST_TILE)
        return 4 * pairs * self.dim * self.heads * (2.5 if backward else 1)

    @property
    def q_region(self) -> Region | None:
        """The box of the grid that the queries hold; None for all of it."""
        if self.q_frames is None:
            return None
        return Region((self.grid.t - self.q_frames, 0, 0), (self.q_frames, self.grid.h, self.grid.w))


def sta_lists(device: str) -> BlockList:
    """The pattern of sliding tiles as lists of 64 tokens, the same for all heads."""
    kinds = torch.from_numpy(STA.tiles(G115200, LIST_TILE, LIST_TILE)).to(device)
    return block_list(G115200.shape, LIST_TILE, LIST_TILE, kinds[None, None], most=KEPT)


def random_lists(device: str, heads: int = 24) -> BlockList:
    """Random key tiles for each query tile and head, in ascending order."""
    tiles = G115200.video // 64
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.rand(1, heads, tiles, tiles, device=device, generator=generator)
    index = drawn.topk(KEPT).indices.sort(-1).values.to(torch.int32)
    count = torch.full((1, heads, tiles), KEPT, dtype=torch.int32, device=device)
    return BlockList(G115200.shape, LIST_TILE, LIST_TILE, count, index)


# PyTorch's default is its cuDNN kernel on Hopper, which stands here once. Flex takes its time at 118,800 tokens.
LONG_PEERS = {
    **{name: make for name, make in peers.torch_peers().items() if name != "torch-sdpa"},
    "flash-attn-3": peers.flash_3,
    "flash-attn-4": peers.flash_4,
}
DENSE_PEERS = {**LONG_PEERS, "flex": peers.flex}
CUDNN = {"": "torch-cudnn"}
DENSE = {"triton": "flex", **CUDNN}
FLEX = {"": "flex"}


def reshaped(there: Callable[..., torch.Tensor], back: Callable[..., torch.Tensor]) -> dict[str, Make]:
    """PyTorch's kernels on batches of frames or places: on views, and on copies, which a larger batch needs."""
    found: dict[str, Make] = {}
    for copies, suffix in ((False, "-views"), (True, "")):
        made = peers.torch_peers(there=there, back=back, copies=copies)
        found |= {name + suffix: make for name, make in made.items()}
    return found


PLACES = reshaped(peers.places, peers.from_places)
FRAMES = peers.torch_peers(there=peers.frames, back=peers.from_frames)
TILE_PEERS = {
    "flex": partial(peers.flex_tiles, tile=TILE),
    "flash-attn-4": partial(peers.flash_4_tiles, tile=TILE),
    "natten": partial(peers.natten, size=(18, 24, 24), stride=TILE),
    "fastvideo-kernel": partial(peers.fastvideo_tiles, tile=TILE, window=(3, 3, 3)),
}
LIST_PEERS: dict[str, Make] = {
    "flex": peers.flex_lists,
    "fastvideo-kernel": partial(peers.fastvideo_lists, heads=24),
}
WINDOW_PEERS = {
    "flex": partial(peers.flex_window, size=(7, 17, 17)),
    "natten": partial(peers.natten, size=(7, 17, 17)),
}


def natten(**options: Any) -> dict[str, Make]:
    """NATTEN alone."""
    return {"natten": partial(peers.natten, **options)}


STRIDE, DILATION = (1, 4, 8), (1, 11, 5)

CASES = [
    Case(
        "dense", "wan-1.3b-480p", WAN_480P, 12, 128, masks.full(), DENSE_PEERS, DENSE,
        backward=True, deterministic=True,
    ),
    Case("dense", "hunyuan-720p", HUNYUAN, 24, 128, masks.full(), LONG_PEERS, CUDNN, rounds=7),
    Case("dense", "cogvideox-5b", COGVIDEOX, 48, 64, masks.full(), DENSE_PEERS, DENSE, backward=True),
    Case("sta333", "30x48x80", G115200, 24, 128, STA, TILE_PEERS, FLEX, backward=True, deterministic=True),
    Case(
        "window_7_17_17", "wan-14b-720p", WAN_720P, 40, 128, masks.window(7, 17, 17), WINDOW_PEERS, FLEX, backward=True
    ),
    Case("temporal", "wan-14b-720p", WAN_720P, 40, 128, masks.temporal(), PLACES, {"": "torch-sdpa"}),
    Case("spatial", "wan-14b-720p", WAN_720P, 40, 128, masks.spatial(), FRAMES, {"": "torch-sdpa"}),
    Case(
        "joint_256", "hunyuan-720p", Grid(33, 45, 80, after=256), 24, 128, masks.window(7, 15, 15),
        backward=True, without_text=True,
    ),
    Case("blocks64_sta", "30x48x80", G115200, 24, 128, sta_lists, LIST_PEERS, FLEX, backward=True),
    Case("blocks64_random162", "115200", G115200, 24, 128, random_lists, LIST_PEERS, FLEX, backward=True),
    Case(
        "window_18_24_24", "30x48x80", G115200, 24, 128, masks.window(18, 24, 24),
        natten(size=(18, 24, 24)), {"": "natten"}, rounds=7,
    ),
    Case(
        "cosmos90", "24x44x80", COSMOS, 40, 128, masks.window(24, 12, 24, stride=STRIDE),
        natten(size=(24, 12, 24), stride=STRIDE), {"": "natten"}, rounds=7,
    ),
    Case(
        "cosmos_dilated", "24x44x80", COSMOS, 40, 128, masks.window(24, 4, 16, dilation=DILATION),
        natten(size=(24, 4, 16), dilation=DILATION), {"": "natten"}, rounds=7,
    ),
    Case("cosmos_undilated", "24x44x80", COSMOS, 40, 128, masks.window(24, 4, 16), rounds=7),
    Case(
        "frame_causal_query", "self-forcing", WAN_480P, 12, 128, masks.frame_causal(3),
        LONG_PEERS, CUDNN, q_frames=3,
    ),
]  # fmt: skip
