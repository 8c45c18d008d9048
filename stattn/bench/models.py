"""Whole models to measure: named shapes with random weights, and contenders that share them, parameter by parameter.

==========================  ===========================================================================================
eager                       the same DiT by PyTorch alone: its operations one by one, attention by SDPA
compiled                    the same under torch.compile, attention by cuDNN's kernel
flex, flex-window           compiled, self-attention by FlexAttention: dense, and under the shape's window
diffusers                   diffusers' own Wan transformer, attention by cuDNN, compiled by its compile_repeated_blocks
stattn-dense                this package
stattn-sliding_tile         the same under whole tiles, 9 to 10 % of the pairs
stattn-window               the same under the exact window, about 10 %
stattn-MASK                 the same under any mask, as "stattn-window(5, 9, 17)"
==========================  ===========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import stattn
from stattn import convert, masks
from stattn.dit import CONFIGS, DiT, DiTConfig
from stattn.grid import Grid
from stattn.masks import Mask
from stattn.modules import SpaceTimeAttention

BY_HAND = {"*": "reference", "attention": "sdpa"}  # operations of PyTorch, which torch.compile traces


@dataclass(frozen=True)
class ModelShape:
    """A model and a clip. size: (T, H, W) as the model reads it. sliding_tile, window: its sparse masks."""

    name: str
    config: DiTConfig
    size: tuple[int, int, int]
    sliding_tile: Mask
    window: Mask

    @property
    def grid(self) -> Grid:
        """The video's tokens, and the text's of a joint model."""
        t, h, w = (n // p for n, p in zip(self.size, self.config.patch, strict=True))
        return Grid(t, h, w, after=self.config.text_len if self.config.kind == "joint" else 0)

    def of_layers(self, layers: int | None) -> ModelShape:
        """Return the shape with another number of layers, which its name then tells."""
        if layers is None or layers == self.config.layers:
            return self
        name = f"{self.name}-{layers}-layers"
        return replace(self, name=name, config=replace(self.config, layers=layers))


def _shapes() -> dict[str, ModelShape]:
    rows = [
        ("wan2.1-1.3b-480p", "wan2.1-1.3b", (21, 60, 104), ((3, 8, 8), (3, 2, 3)), (7, 15, 31)),
        ("wan2.1-14b-480p", "wan2.1-14b", (21, 60, 104), ((3, 8, 8), (3, 2, 3)), (7, 15, 31)),
        ("wan2.1-14b-720p", "wan2.1-14b", (21, 90, 160), ((3, 8, 8), (4, 2, 5)), (11, 21, 33)),
        ("hunyuanvideo-720p", "hunyuanvideo", (33, 90, 160), ((3, 9, 16), (3, 3, 3)), (15, 21, 37)),
        ("cogvideox-5b-480p", "cogvideox-5b", (13, 60, 90), ((6, 4, 8), (3, 2, 2)), (7, 13, 19)),
        ("tiny", "tiny", (16, 64, 96), ((2, 2, 4), (2, 2, 1)), (3, 5, 5)),
    ]
    return {
        name: ModelShape(name, CONFIGS[config], size, masks.sliding_tile(*tiles), masks.window(*window))
        for name, config, size, tiles, window in rows
    }


SHAPES = _shapes()
# Small enough for a CPU, and of Wan's form, so that every contender takes part.
SHAPES["wan-small"] = ModelShape(
    "wan-small",
    DiTConfig(
        kind="cross", layers=2, heads=4, head_dim=64, ffn_dim=1024, in_channels=16, out_channels=16, patch=(1, 2, 2),
        text_dim=128, text_len=32,
    ),
    (6, 24, 24),
    masks.sliding_tile((2, 4, 4), (2, 2, 1)),
    masks.window(3, 5, 5),
)  # fmt: skip


class Inputs(NamedTuple):
    """What a model is called with."""

    x: Tensor
    timestep: Tensor
    text: Tensor


def random_model(shape: ModelShape, device: str, dtype: torch.dtype, seed: int = 0) -> DiT:
    """Make a model whose every parameter counts: gates, shifts and scales are drawn from N(0, 0.3)."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = DiT(shape.config)
    model = model.to_empty(device=device).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data.fill_(1)
        elif "scale_shift_table" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
        elif name.endswith("bias") or "time_proj" in name:
            parameter.data.normal_(0, 0.02, generator=generator)
        else:
            # Linear maps that keep the spread of what they read.
            parameter.data.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
    return model.requires_grad_(False)


def random_inputs(shape: ModelShape, device: str, dtype: torch.dtype, seed: int = 1) -> Inputs:
    """Draw a noisy video, a timestep and a caption."""
    generator = torch.Generator(device).manual_seed(seed)
    config = shape.config
    x = torch.randn(1, config.in_channels, *shape.size, device=device, dtype=dtype, generator=generator)
    if config.vocab:
        text = torch.randint(config.vocab, (1, config.text_len), device=device, generator=generator)
    else:
        text = torch.randn(1, config.text_len, config.text_dim, device=device, dtype=dtype, generator=generator)
    return Inputs(x, torch.full((1,), 500.0, device=device), text)


def sharing(model: DiT, **settings: Any) -> DiT:
    """Return another DiT on the same parameters. settings: its mask and impl."""
    with torch.device("meta"):
        twin = DiT(model.config, **settings)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval().requires_grad_(False)


# Contenders.


@dataclass
class Contender:
    """A model to time.

    call: (x, timestep, text) -> prediction. mask: of its self-attention. attend: (q, k, v) -> out, that attention
    alone, or None where it cannot be separated.
    """

    name: str
    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    mask: Mask
    attend: Callable[[Tensor, Tensor, Tensor], Any] | None = None


def names(shape: ModelShape, device: str) -> list[str]:
    """List the contenders of a shape on a device. Compilation is for GPUs."""
    found = ["eager", "stattn-dense", "stattn-sliding_tile", "stattn-window"]
    if device == "cuda":
        found += ["compiled", "flex", "flex-window", "diffusers"]
    return found


def own_mask(name: str, shape: ModelShape) -> Mask | None:
    """Return the mask of a contender of this package, None for others. Raises ValueError for stattn-NO_MASK."""
    own = {"stattn-dense": masks.full(), "stattn-sliding_tile": shape.sliding_tile, "stattn-window": shape.window}
    if name in own or not name.startswith("stattn-"):
        return own.get(name)
    return masks.parse(name.removeprefix("stattn-"))


def contender(name: str, model: DiT, shape: ModelShape) -> Contender:
    """Build one. Raises ValueError for an unknown name, ImportError where its package is not installed."""
    mask = own_mask(name, shape)
    if mask is not None:
        attend = partial(stattn.attention, grid=shape.grid, mask=mask)
        return Contender(name, sharing(model, mask=mask), mask, attend)
    if name in ("eager", "compiled"):
        twin = sharing(model, impl=BY_HAND)
        backend = None if name == "eager" else SDPBackend.CUDNN_ATTENTION
        call = twin if name == "eager" else _in_blocks(twin)
        return Contender(name, call, masks.full(), lambda q, k, v: _sdpa(q, k, v, backend))
    if name in ("flex", "flex-window"):
        mask = masks.full() if name == "flex" else shape.window
        if shape.grid.globals:
            raise ValueError(f"{name}: text within self-attention is not written for FlexAttention here")
        twin = sharing(model, impl=BY_HAND)
        for block in twin.blocks:
            block.attn1 = _FlexAttention(cast(SpaceTimeAttention, block.attn1), shape, mask)
        flex = _flex(shape, mask)
        return Contender(
            name, _in_blocks(twin), mask, lambda q, k, v: flex(*(each.transpose(1, 2) for each in (q, k, v)))
        )
    if name == "diffusers":
        wan = diffusers_wan(model)
        wan.compile_repeated_blocks(fullgraph=True, dynamic=False)
        return Contender(
            name,
            lambda x, t, text: wan(x, t, text, return_dict=False)[0],
            masks.full(),
            lambda q, k, v: _sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION),
        )
    raise ValueError(f"contender {name!r} must be one of {', '.join(names(shape, 'cuda'))}")


def diffusers_wan(model: DiT) -> Any:
    """Return diffusers' Wan transformer with a DiT's weights, its attention by cuDNN's kernel on a GPU."""
    import diffusers

    weight = model.proj_out.weight
    with torch.device(weight.device):
        wan = diffusers.WanTransformer3DModel(**convert.to_diffusers_config(model.config))
    wan.load_state_dict(convert.to_diffusers_state_dict(model.state_dict(), model.config), assign=True)
    if weight.is_cuda:
        wan.set_attention_backend("_native_cudnn")
    return wan.eval().requires_grad_(False)


def _in_blocks(model: DiT) -> DiT:
    """Compile a model's blocks: one compilation serves them all, and little is left outside of them."""
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False)
    return model


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None) -> Tensor:
    with nullcontext() if backend is None or not q.is_cuda else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


@lru_cache(maxsize=8)
def _flex(shape: ModelShape, mask: Mask) -> Callable[..., Any]:
    """Return FlexAttention under a mask of the grid, its block mask made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = None
    if mask != masks.full():
        tables = [
            [torch.from_numpy(side.astype("int32")).cuda() for side in (lo, hi)]
            for lo, hi, _ in mask.products(shape.grid)[0]
        ]
        _, h, w = shape.grid.shape

        def seen(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            allowed = q >= 0
            for (lo, hi), qx, kx in zip(
                tables, (q // (h * w), q // w % h, q % w), (k // (h * w), k // w % h, k % w), strict=True
            ):
                allowed = allowed & (lo[qx] <= kx) & (kx <= hi[qx])
            return allowed

        tokens = shape.grid.tokens
        blocks = torch.compile(create_block_mask)(seen, None, None, tokens, tokens, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks)


class _FlexAttention(nn.Module):
    """The self-attention of a block, by FlexAttention."""

    def __init__(self, attention: SpaceTimeAttention, shape: ModelShape, mask: Mask):
        super().__init__()
        self.attention, self._flex = attention, _flex(shape, mask)

    def forward(self, x: Tensor, grid: Grid, *, rope: Any = None, mask: Any = None, cache: Any = None) -> Tensor:
        own = self.attention
        q, k, v = (each(x).unflatten(-1, (own.heads, own.head_dim)) for each in (own.to_q, own.to_k, own.to_v))
        assert own.norm_q is not None
        assert own.norm_k is not None
        q, k = stattn.qk_norm_rope(
            q, k, own.norm_q.weight, own.norm_k.weight, rope, across_heads=own.qk_norm == "across_heads", eps=own.eps,
            impl="reference",
        )  # fmt: skip
        out = self._flex(*(each.transpose(1, 2) for each in (q, k, v)))
        return own.to_out[0](out.transpose(1, 2).flatten(2))


# What is right.


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the root mean square of the difference over that of ``want``."""
    difference = (got.double() - want.double()).square().mean().sqrt()
    return float(difference / want.double().square().mean().sqrt())


def psnr(got: Tensor, want: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB, the peak being the range of ``want``."""
    peak = float(want.double().max() - want.double().min())
    return 20 * math.log10(peak / max(float((got.double() - want.double()).square().mean().sqrt()), 1e-12 * peak))


def truth(model: DiT, given: Inputs, mask: Mask) -> Tensor:
    """Predict by an implementation of attention that no contender of this package uses under the mask."""
    other = "triton" if given.x.is_cuda else "reference"
    twin = sharing(model, mask=mask, impl={"*": "reference", "attention": other})
    with torch.no_grad():
        out: Tensor = twin(*given)
    return out


@contextmanager
def peak_memory(device: str) -> Iterator[Mapping[str, float]]:
    """Give the most memory that was held at once within the context, in GiB, under "GiB"; nothing on a CPU."""
    found: dict[str, float] = {}
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    yield found
    if device == "cuda":
        torch.cuda.synchronize()
        found["GiB"] = torch.cuda.max_memory_allocated() / 2**30
