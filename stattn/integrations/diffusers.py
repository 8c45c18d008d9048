"""Diffusers' video transformers with stattn's attention, and stattn as one of diffusers' attention backends.

``stattn.accelerate(transformer, mask)`` comes here for a diffusers model. `FAMILIES` says how each is served: a row
per family, and a function for each way in which the grid of the tokens follows from the arguments of the transformer.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stattn import masks
from stattn.grid import Triple, is_int
from stattn.integrations import _processors as processors
from stattn.integrations._layers import Host, HostAcceleration, Layer
from stattn.masks import Mask
from stattn.ops._dispatch import impl_for
from stattn.ops.attention import OPERATION as ATTENTION
from stattn.ops.qk_norm_rope import QK_NORM_ROPE
from stattn.settings import Impl, Masks, check_impl, check_mask

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
    from stattn.accelerate import check_layers

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


class Ulysses:
    """Exchange of heads for tokens: each process attends with a part of the heads over all tokens."""

    def __init__(self, config: Any):
        self.group = config._ulysses_mesh.get_group()
        self.size, self.rank = config.ulysses_degree, config._ulysses_local_rank

    def share(self, mask: Masks, heads: int) -> Masks:
        """Give the masks of this process's heads. Raises ValueError when the heads cannot be shared out evenly."""
        if heads % self.size:
            raise ValueError(f"{heads} heads cannot be shared by ulysses_degree={self.size}; it must divide them")
        part = heads // self.size
        return mask if isinstance(mask, Mask) else mask[self.rank * part : (self.rank + 1) * part]

    def scatter(self, x: Tensor) -> Tensor:
        """[B, tokens here, heads, D] to [B, tokens, heads here, D]."""
        from diffusers.models.attention_dispatch import SeqAllToAllDim

        return SeqAllToAllDim.apply(self.group, x, 2, 1)

    def gather(self, x: Tensor) -> Tensor:
        """[B, tokens, heads here, D] to [B, tokens here, heads, D]."""
        from diffusers.models.attention_dispatch import SeqAllToAllDim

        return SeqAllToAllDim.apply(self.group, x, 1, 2)


def exchange(parallel: Any) -> Ulysses | None:
    """Give the exchange that a parallel configuration asks for. Raises ValueError for those that are not served."""
    config = parallel.context_parallel_config
    if config is None:
        return None
    if config.ring_degree > 1:
        raise ValueError(f"ring_degree={config.ring_degree}: ring attention knows no masks; use ulysses_degree")
    if config.ulysses_anything:
        raise ValueError("ulysses_anything=True is not served; use tokens and heads that ulysses_degree divides")
    return Ulysses(config)
