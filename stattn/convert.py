"""Wan weights between diffusers' WanTransformer3DModel and a DiT of kind "cross", in both directions.

Nothing here imports diffusers: configs are mappings, weights are state dicts, and `from_diffusers` reads both from a
model.

>>> model = stattn.convert.from_diffusers(WanTransformer3DModel.from_pretrained(..., subfolder="transformer"))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stattn.dit import DiT, DiTConfig
from stattn.model.settings import Impl, Masks

# Beginnings of keys outside the blocks, ours and theirs; what is not listed has one name.
_MODEL_KEYS = (
    ("patchify.", "patch_embedding."),
    ("time_embed.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embed.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_proj.", "condition_embedder.time_proj."),
    ("text_embed.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embed.2.", "condition_embedder.text_embedder.linear_2."),
)
# The same within a block.
_BLOCK_KEYS = (("ffn.0.", "ffn.net.0.proj."), ("ffn.2.", "ffn.net.2."))

# Fields of their config and of ours that hold the same thing.
_FIELDS = {
    "num_layers": "layers",
    "num_attention_heads": "heads",
    "attention_head_dim": "head_dim",
    "ffn_dim": "ffn_dim",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "patch_size": "patch",
    "text_dim": "text_dim",
    "freq_dim": "freq_dim",
    "eps": "eps",
}
# Fields of their config that change the model, with the only value that a DiT has.
_FIXED = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
# A limit on the length of their rotary tables; ours are made for the grid at hand.
_WITHOUT_EFFECT = {"rope_max_seq_len": 1024}


def from_diffusers_config(config: Mapping[str, Any], *, text_len: int = 512) -> DiTConfig:
    """Return the DiTConfig of a WanTransformer3DModel config, a mapping such as ``transformer.config``.

    text_len: tokens of a caption, which diffusers leaves to its pipeline. Raises ValueError naming the field when one
    is missing, unknown, or has a value without a counterpart here (image cross-attention of Wan 2.1 I2V: image_dim,
    added_kv_proj_dim).
    """
    kind = config.get("_class_name", "WanTransformer3DModel")
    if kind != "WanTransformer3DModel":
        raise ValueError(f"config is of a {kind}; only WanTransformer3DModel has a counterpart")
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    unknown = [name for name in given if name not in _FIELDS and name not in _FIXED and name not in _WITHOUT_EFFECT]
    missing = [name for name in _FIELDS if name not in given]
    if unknown or missing:
        raise ValueError(f"config has unknown fields {unknown} and lacks {missing}")
    for name, value in _FIXED.items():
        if given.get(name, value) != value:
            raise ValueError(f"config has {name}={given[name]!r}; a DiT has {name}={value!r} only")
    fields = {ours: given[theirs] for theirs, ours in _FIELDS.items()}
    fields["out_channels"] = fields["out_channels"] or fields["in_channels"]
    return DiTConfig(kind="cross", text_len=text_len, qk_norm="across_heads", **fields)


def to_diffusers_config(config: DiTConfig) -> dict[str, Any]:
    """Return the keywords of WanTransformer3DModel for a DiTConfig.

    Raises ValueError naming the field when the DiT is not of Wan's form.
    """
    fields = {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
    wan = from_diffusers_config(fields, text_len=config.text_len)
    for name in ("kind", "vocab", "masked_input", "qk_norm", "rope_split", "rope_theta"):
        if getattr(config, name) != getattr(wan, name):
            raise ValueError(f"config has {name}={getattr(config, name)!r}; Wan has {name}={getattr(wan, name)!r} only")
    return {**fields, **_FIXED}


def key_map(config: DiTConfig) -> dict[str, str]:
    """Return diffusers' name for each name in the state dict of a DiT."""
    with torch.device("meta"):
        names = DiT(config).state_dict().keys()
    return {name: _their_name(name) for name in names}


def from_diffusers_state_dict(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Rename the tensors of a WanTransformer3DModel for a DiT. Raises ValueError naming missing and unknown keys."""
    return _rename(state, {theirs: ours for ours, theirs in key_map(config).items()})


def to_diffusers_state_dict(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Rename the tensors of a DiT for a WanTransformer3DModel. Raises ValueError naming missing and unknown keys."""
    to_diffusers_config(config)
    return _rename(state, key_map(config))


def from_diffusers(transformer: Any, *, mask: Masks | None = None, impl: Impl = "auto") -> DiT:
    """Return a DiT with the weights of a diffusers WanTransformer3DModel.

    The parameters share memory with the transformer's, so that a 14B model fits once. mask, impl: as for DiT. Raises
    TypeError for another model, ValueError for a config without a counterpart.
    """
    if type(transformer).__name__ != "WanTransformer3DModel":
        raise TypeError(f"transformer is a {type(transformer).__name__}; it must be a diffusers WanTransformer3DModel")
    config = from_diffusers_config(transformer.config)
    with torch.device("meta"):
        model = DiT(config, mask=mask, impl=impl)
    model.load_state_dict(from_diffusers_state_dict(transformer.state_dict(), config), strict=True, assign=True)
    return model.train(transformer.training)


def _their_name(name: str) -> str:
    head, inner = "", name
    pairs: tuple[tuple[str, str], ...] = _MODEL_KEYS
    if name.startswith("blocks."):
        _, number, inner = name.split(".", 2)
        head, pairs = f"blocks.{number}.", _BLOCK_KEYS
    for ours, theirs in pairs:
        if inner.startswith(ours):
            return head + theirs + inner.removeprefix(ours)
    return name


def _rename(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    missing, unknown = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or unknown:
        raise ValueError(f"state dict lacks {missing} and has unknown {unknown}")
    return {names[name]: tensor for name, tensor in state.items()}
