"""Diffusers' video transformers with stattn's attention, and stattn as one of diffusers' attention backends.

``stattn.accelerate(transformer, mask)`` comes here for a diffusers model. `FAMILIES` says how each is served: a row
per family, and a function for each way in which the grid of the tokens follows from the arguments of the transformer.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stattn import masks
from stattn.grid import Grid, Region, Triple, is_int
from stattn.integrations import _processors as processors
from stattn.integrations._layers import Host, HostAcceleration, Layer
from stattn.masks import Mask
from stattn.model.layers import check_layers
from stattn.model.settings import Impl, Masks, check_impl, check_mask
from stattn.ops._attention_choice import OPERATION as ATTENTION
from stattn.ops._dispatch import impl_for
from stattn.ops.qk_norm_rope import QK_NORM_ROPE

Call = Mapping[str, Any]


def _latent(model: Any, call: Call) -> Triple:
    """[B, C, T, H, W] in patches of config.patch_size (t, h, w)."""
    (t, h, w), (pt, ph, pw) = call["hidden_states"].shape[2:], model.config.patch_size
    return t // pt, h // ph, w // pw


def _latent_two_sizes(model: Any, call: Call) -> Triple:
    """[B, C, T, H, W] in patches of config.patch_size_t and config.patch_size, the latter for h and w."""
    t, h, w = call["hidden_states"].shape[2:]
    pt, p = model.config.patch_size_t, model.config.patch_size
    return t // pt, h // p, w // p


def _frames_first(model: Any, call: Call) -> Triple:
    """[B, T, C, H, W]; config.patch_size_t may be None or missing."""
    t, _, h, w = call["hidden_states"].shape[1:]
    pt, p = model.config.get("patch_size_t") or 1, model.config.patch_size
    return (t + pt - 1) // pt, h // p, w // p


def _frames_whole(model: Any, call: Call) -> Triple:
    """[B, C, T, H, W] in patches of one frame."""
    t, h, w = call["hidden_states"].shape[2:]
    return t, h // model.config.patch_size, w // model.config.patch_size


def _said(model: Any, call: Call) -> Triple:
    """Tokens, with the grid beside them."""
    grid = call.get("num_frames"), call.get("height"), call.get("width")
    if not all(is_int(each) for each in grid):
        raise ValueError(f"{type(model).__name__} must be called with num_frames, height and width, got {grid}")
    return grid  # type: ignore[return-value]


def _channels_last(model: Any, call: Call) -> Triple:
    """[B, T, H, W, C] in patches of config.patch_size; not in the model's own sparse attention, which moves tokens."""
    if call.get("sparse_params") is not None:
        raise ValueError("sparse_params is the model's own sparse attention, which reorders tokens; leave it None")
    (t, h, w), (pt, ph, pw) = call["hidden_states"].shape[1:4], model.config.patch_size
    return t // pt, h // ph, w // pw


def _wan_split(model: Any, head_dim: int) -> Triple:
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def _cogvideox_split(model: Any, head_dim: int) -> Triple:
    return head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3


def _configured_split(model: Any, head_dim: int) -> Triple:
    t, h, w = model.config.rope_axes_dim
    return t, h, w


@dataclass(frozen=True)
class Family:
    """How the transformers of a family are served.

    layers: pattern of the self-attention modules' names. grid: gives (t, h, w) from the arguments of a forward pass.
    make: from the class name of a processor to what serves in its place; None for the model's own code redirected.
    split: features of a head that turn with each axis. extra: where tokens of conditions lie beside the grid's.
    """

    layers: str
    grid: Callable[[Any, Call], Triple]
    make: Mapping[str, Any]
    split: Callable[[Any, int], Triple] | None = None
    extra: str | None = None


_WAN = Family(r"blocks\.\d+\.attn1", _latent, {"WanAttnProcessor": processors.WanProcessor}, _wan_split)
_HUNYUAN = r"(single_)?transformer_blocks\.\d+\.attn"
_BLOCKS = r"transformer_blocks\.\d+\.attn1"
_COGVIDEOX = Family(
    _BLOCKS,
    _frames_first,
    dict.fromkeys(("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"), processors.CogVideoXProcessor),
    _cogvideox_split,
)

FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": Family(r"(vace_)?blocks\.\d+\.attn1", _WAN.grid, _WAN.make, _WAN.split),
    "WanAnimateTransformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": Family(
        _WAN.layers, _latent, {"SkyReelsV2AttnProcessor": processors.WanProcessor}, _wan_split
    ),
    "HunyuanVideoTransformer3DModel": Family(
        _HUNYUAN, _latent_two_sizes, {"HunyuanVideoAttnProcessor2_0": processors.HunyuanProcessor}, _configured_split
    ),
    "HunyuanVideo15Transformer3DModel": Family(
        _HUNYUAN, _latent_two_sizes, {"HunyuanVideo15AttnProcessor2_0": processors.HunyuanProcessor}, _configured_split
    ),
    "CogVideoXTransformer3DModel": _COGVIDEOX,
    "ConsisIDTransformer3DModel": _COGVIDEOX,
    "LTXVideoTransformer3DModel": Family(_BLOCKS, _said, {"LTXVideoAttnProcessor": None}, extra="before"),
    "LTX2VideoTransformer3DModel": Family(
        _BLOCKS, _said, {"LTX2AudioVideoAttnProcessor": None, "LTX2PerturbedAttnProcessor": None}, extra="after"
    ),
    "MochiTransformer3DModel": Family(_BLOCKS, _frames_whole, {"MochiAttnProcessor2_0": processors.MochiProcessor}),
    "Kandinsky5Transformer3DModel": Family(
        r"visual_transformer_blocks\.\d+\.self_attention", _channels_last, {"Kandinsky5AttnProcessor": None}
    ),
    "CosmosTransformer3DModel": Family(_BLOCKS, _latent, {"CosmosAttnProcessor2_0": processors.CosmosProcessor}),
}

REFUSED = {
    "HunyuanVideoFramepackTransformer3DModel": "its tokens are those of several grids (histories at other resolutions)",
    "HeliosTransformer3DModel": "its tokens are those of several grids (histories at other resolutions)",
}

# Wrappers whose names stand between those of modules.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")


def accelerate(
    model: Any,
    mask: Masks | None = None,
    impl: Impl | None = None,
    layers: Iterable[int] | None = None,
    dense_layers: Iterable[int] = (),
    dense_steps: int = 0,
    verify: bool = False,
) -> HostAcceleration:
    """Give the self-attention of a diffusers video transformer stattn's attention; see ``stattn.accelerate``."""
    model = getattr(model, "_orig_mod", model)
    kind = type(model).__name__
    if kind not in FAMILIES:
        why = REFUSED.get(kind, "no adapter knows where its tokens lie")
        raise TypeError(f"model is a {kind}, which is not served: {why}; served are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    impl = "auto" if impl is None else _check_impl(impl)
    if not is_int(dense_steps) or dense_steps < 0:
        raise ValueError(f"dense_steps={dense_steps!r} must be a non-negative integer")
    if not isinstance(verify, bool):
        raise TypeError(f"verify={verify!r} must be a boolean")
    found = [
        (plain, module)
        for name, module in model.named_modules()
        if re.fullmatch(family.layers, plain := _WRAPPERS.sub("", name))
    ]
    chosen = list(range(len(found))) if layers is None else check_layers(layers, len(found))
    dense = set(check_layers(dense_layers, len(found), "dense_layers"))
    if not dense <= set(chosen):
        raise ValueError(f"dense_layers has {min(dense - set(chosen))}, which is not among layers={sorted(chosen)}")
    _check_version()

    names = tuple(inspect.signature(type(model).forward).parameters)[1:]
    host = Host(model, names, family.grid, family.extra, impl, dense_steps, verify, adopt, exchange)
    own = masks.full() if host.chunk == 1 else masks.frame_causal(host.chunk)  # the model's own mask
    for index in chosen:
        name, module = found[index]
        _check_processor(module.processor, name, family)
        heads = module.heads if hasattr(module, "heads") else module.num_heads
        given = check_mask(masks.full() if mask is None or index in dense else mask, heads)
        width = module.inner_dim if hasattr(module, "inner_dim") else module.to_query.out_features
        host.layers.append(Layer(host, index, name, module, heads, width, _both(given, own), own))
    return HostAcceleration(host)


def _check_impl(impl: Impl) -> Impl:
    """Return ``impl``. Raises ValueError where an operation of the layers has no implementation of the name."""
    check_impl(impl)
    for operation in (ATTENTION, QK_NORM_ROPE):
        name, have = impl_for(impl, operation.name), [each.name for each in operation.implementations]
        if name not in ("auto", *have):
            raise ValueError(
                f"impl={impl!r}: {operation.name} is one of {', '.join(have)}; "
                f"impl={{'attention': {name!r}}} asks it of attention alone"
            )
    return impl


def adopt(processor: Any, layer: Layer) -> Any:
    """Make what serves a layer in place of a processor, also of one that was set after the layer was accelerated."""
    if isinstance(processor, processors.Processor):
        if processor.layer is not layer:
            raise RuntimeError(f"{layer.name} was accelerated again since; undo the later handle first")
        return processor
    model: Any = layer.host.model
    family = FAMILIES[type(model).__name__]
    _check_processor(processor, layer.name, family)
    kind: Any = type(processor)
    make = family.make[kind.__name__] or processors.redirected(kind)
    split = None if family.split is None else family.split(model, model.config.attention_head_dim)
    made = make(processor, layer, split)
    _let_guiders_know(type(made), kind)
    return made


def _check_processor(processor: Any, name: str, family: Family) -> None:
    kind = type(processor).__name__
    if isinstance(processor, processors.Processor):
        raise ValueError(f"{name} is accelerated already (mask {processor.layer.mask}); undo that handle first")
    if kind not in family.make:
        raise TypeError(f"{name} has a {kind}; served are {', '.join(family.make)}")


def _both(mask: Masks, own: Mask) -> Masks:
    if own == masks.full():
        return mask
    return mask & own if isinstance(mask, Mask) else [each & own for each in mask]


def _let_guiders_know(ours: type, theirs: type) -> None:
    """Tell the guiders that skip layers what they know of the processor that ours stands for."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    AttentionProcessorRegistry._register()
    for known, metadata in list(AttentionProcessorRegistry._registry.items()):
        if known.__name__ in (theirs.__name__, f"{theirs.__name__}2_0"):
            AttentionProcessorRegistry.register(ours, metadata)


def _check_version() -> None:
    """Refuse a diffusers older than the one that the adapters were written for."""
    import diffusers

    if tuple(map(int, re.findall(r"\d+", diffusers.__version__)[:2])) < (0, 42):
        raise RuntimeError(f"diffusers {diffusers.__version__} is older than 0.42, for which the adapters are written")


# Context parallelism.


class _Gathered(torch.autograd.Function):
    """The parts of all processes of a group, one behind the other along the first axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, size: int) -> Tensor:
        ctx.group, ctx.shape = group, x.shape
        whole = x.new_empty(size * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        part = grad.new_empty(ctx.shape)
        dist.reduce_scatter_tensor(part, grad.contiguous(), group=ctx.group)
        return part, None, None


class Exchange:
    """What the processes exchange: heads for tokens (Ulysses), then keys and values of a ring.

    Each process attends with a part of the heads, from the queries of its Ulysses group, to all keys.
    """

    def __init__(self, config: Any):
        self.size, self.rank = config.ulysses_degree, config._ulysses_local_rank
        self.group = config._ulysses_mesh.get_group()
        self.ring_size, self.ring_rank = config.ring_degree, config._ring_local_rank
        self.ring_group = config._ring_mesh.get_group()

    def share(self, mask: Masks, heads: int) -> Masks:
        """Give the masks of this process's heads. Raises ValueError when the heads cannot be shared out evenly."""
        if heads % self.size:
            raise ValueError(f"{heads} heads cannot be shared by ulysses_degree={self.size}; it must divide them")
        part = heads // self.size
        return mask if isinstance(mask, Mask) else mask[self.rank * part : (self.rank + 1) * part]

    def queries(self, x: Tensor) -> Tensor:
        """[B, tokens here, heads, D] to [B, tokens of the Ulysses group, heads here, D]."""
        from diffusers.models.attention_dispatch import SeqAllToAllDim

        return x if self.size == 1 else SeqAllToAllDim.apply(self.group, x, 2, 1)

    def keys(self, x: Tensor) -> Tensor:
        """[B, tokens here, heads, D] to [B, tokens, heads here, D]."""
        x = self.queries(x)
        if self.ring_size == 1:
            return x
        # Along the first axis the parts come to lie where they belong, without another copy for a batch of one.
        return _Gathered.apply(x.transpose(0, 1), self.ring_group, self.ring_size).transpose(0, 1)

    def gather(self, x: Tensor) -> Tensor:
        """[B, tokens of the Ulysses group, heads here, D] to [B, tokens here, heads, D]."""
        from diffusers.models.attention_dispatch import SeqAllToAllDim

        return x if self.size == 1 else SeqAllToAllDim.apply(self.group, x, 1, 2)

    def regions(self, grid: Grid) -> Sequence[Region]:
        """Give the boxes that this process's queries are; none for the whole grid.

        Raises ValueError for a ring whose parts would not be of video alone.
        """
        if self.ring_size == 1:
            return ()
        if grid.globals:
            raise ValueError(
                f"ring_degree={self.ring_size} cuts {grid.globals} tokens beside the grid out of their place; "
                "use ulysses_degree"
            )
        part = grid.video // self.ring_size
        return boxes(grid, self.ring_rank * part, (self.ring_rank + 1) * part)


def boxes(grid: Grid, first: int, stop: int) -> list[Region]:
    """Cut the video tokens from ``first`` to ``stop`` into boxes: at most a row's end, rows, frames, and again."""
    found = []
    frame = grid.h * grid.w
    while first < stop:
        row, column, left = first % frame // grid.w, first % grid.w, stop - first
        if not row and not column and left >= frame:
            extent = (left // frame, grid.h, grid.w)
        elif not column and left >= grid.w:
            extent = (1, min(grid.h - row, left // grid.w), grid.w)
        else:
            extent = (1, 1, min(grid.w - column, left))
        found.append(Region((first // frame, row, column), extent))
        first += found[-1].video
    return found


def exchange(parallel: Any) -> Exchange | None:
    """Give the exchange that a parallel configuration asks for. Raises ValueError for those that are not served."""
    config = parallel.context_parallel_config
    if config is None:
        return None
    for uneven in ("ulysses_anything", "ring_anything"):
        if getattr(config, uneven):
            raise ValueError(f"{uneven}=True is not served; use tokens and heads that the processes divide evenly")
    return Exchange(config)
