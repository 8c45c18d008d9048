"""stattn as one of diffusers' attention backends: dense attention, self and cross, in any model that lets one choose.

>>> from stattn.integrations import diffusers_backend
>>> diffusers_backend.use(pipe.transformer)     # this model alone

Masks are what a backend cannot know: ``stattn.accelerate`` gives a transformer those.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from stattn.grid import Grid, Region
from stattn.ops.attention import attention

NAME = "stattn"


def register() -> Any:
    """Add ``stattn`` to the backends of diffusers and return it; a second call changes nothing.

    ``model.set_attention_backend("stattn")`` then works, but also makes it the default of every other model, as it does
    for any backend: `use` does not.
    """
    from diffusers.models import attention_dispatch as dispatch

    backends: Any = dispatch.AttentionBackendName
    if NAME in backends._value2member_map_:
        return backends(NAME)
    # An enumeration cannot be extended by a subclass, and diffusers reads no other list of names.
    member = str.__new__(backends, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    setattr(backends, member._name_, member)
    backends._member_names_.append(member._name_)
    backends._member_map_[member._name_] = member
    backends._value2member_map_[NAME] = member
    registry: Any = dispatch._AttentionBackendRegistry
    registry.register(member, supports_context_parallel=True)(_attend)
    return member


def use(model: nn.Module) -> None:
    """Make stattn the attention of one model; ``model.reset_attention_backend()`` ends it.

    Raises TypeError for a model without attention that lets one choose.
    """
    backend = register()
    chosen = 0
    for module in model.modules():
        processor = inspect.getattr_static(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = backend
            chosen += 1
    if not chosen:
        raise TypeError(f"{type(model).__name__} has no attention whose backend can be chosen")


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """Attend from query [B, Nq, heads, D] to all of key and value. What diffusers calls."""
    if attn_mask is not None:
        raise ValueError(f"attn_mask of shape {tuple(attn_mask.shape)}: the backend {NAME!r} is dense and takes none")
    if dropout_p or is_causal:
        raise ValueError(f"dropout_p={dropout_p}, is_causal={is_causal}: the backend {NAME!r} takes neither")
    if query.shape[2] != key.shape[2] and not enable_gqa:
        raise ValueError(f"key has {key.shape[2]} heads, query {query.shape[2]}; that takes enable_gqa=True")
    exchange = None
    if _parallel_config is not None:
        from stattn.integrations import diffusers

        exchange = diffusers.exchange(_parallel_config)
    if exchange is not None:
        query, key, value = exchange.queries(query), exchange.keys(key), exchange.keys(value)
    # Queries and keys are the first of one row of tokens, each as many as they are.
    row = max(query.shape[1], key.shape[1])
    q_region, k_region = (None if x.shape[1] == row else Region((0, 0, 0), (1, 1, x.shape[1])) for x in (query, key))
    out = attention(query, key, value, Grid(1, 1, row), q_region=q_region, k_region=k_region, scale=scale)
    return out if exchange is None else exchange.gather(out)
