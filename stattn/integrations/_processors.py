"""Attention processors for diffusers' video transformers: what a model's own processor does, with stattn's attention.

A processor stands in place of another, its ``base``, on one module. Where norm and rotation are those of
``stattn.qk_norm_rope``, or the model calls PyTorch's attention by itself, the processor is written out here; where the
model asks diffusers' dispatcher, the model's own code runs, and the dispatcher that it sees is ours (``redirected``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from stattn.grid import Triple
from stattn.integrations._layers import Layer
from stattn.ops._dispatch import impl_for
from stattn.ops.qk_norm_rope import qk_norm_rope

RMS_NORMS = ("torch.nn.modules.normalization.RMSNorm", "diffusers.models.normalization.RMSNorm")


class Processor:
    """Serve one self-attention module in place of ``base``, whose backend and parallel settings it passes on.

    split: features of a head that turn with each axis; None where the angles are not those of axes.
    """

    def __init__(self, base: Any, layer: Layer, split: Triple | None):
        self.base, self.layer, self.split = base, layer, split

    # diffusers looks for these two by hasattr: they are there where the base has them.
    @property
    def _attention_backend(self) -> Any:
        return self.base._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.base._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return self.base._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.base._parallel_config = value

    def refuse_mask(self, attention_mask: Any) -> None:
        """Raise ValueError when the model passes a mask of its own to this self-attention."""
        if attention_mask is not None:
            raise ValueError(
                f"{self.layer.name} is given an attention mask of shape {tuple(attention_mask.shape)}, which cannot be "
                "combined with stattn's; leave it out of the call"
            )

    def norm_rope(
        self,
        attn: Any,
        q: Tensor,
        k: Tensor,
        angles: tuple[Tensor, Tensor, Tensor] | None,
        before: int = 0,
        after: int = 0,
        across_heads: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Normalise q and k [B, N, heads, D] and rotate the video tokens among them, fused where that is the same.

        angles: the host's tensor, and the views of it that are cos and sin [video tokens, D/2]; None for no rotation.
        """
        weights = (getattr(attn.norm_q, "weight", None), getattr(attn.norm_k, "weight", None))
        reason = _why_not_fused(attn.norm_q, attn.norm_k, q)
        if reason is not None:
            q, k = (_norm(norm, x, across_heads) for norm, x in ((attn.norm_q, q), (attn.norm_k, k)))
            weights = (None, None)
        eps = 1e-6 if weights[0] is None else attn.norm_q.eps
        tables, note = None, "fused" if reason is None else f"norm by the model ({reason})"
        if angles is None:
            note += ", no RoPE"
        else:
            source, cos, sin = angles
            grid = self.layer.host.grid
            assert grid is not None
            # Of a part of the tokens, which context parallelism makes, each has angles of its own.
            whole = cos.shape[0] == grid[0] * grid[1] * grid[2] == q.shape[1] - before - after
            if self.split is not None and sum(self.split) == q.shape[-1]:
                split = self.split if whole else None
                tables = self.layer.host.tables(source, cos.to(q.device), sin.to(q.device), split, before, after)
                note += "" if reason is None else ", RoPE fused"
            else:
                note += ", RoPE by itself"
        if weights[0] is not None or tables is not None:
            q, k = qk_norm_rope(
                q,
                k,
                *weights,
                tables,
                across_heads=across_heads,
                eps=eps,
                impl=impl_for(self.layer.host.impl, "qk_norm_rope"),
            )
        if angles is not None and tables is None:
            q, k = (_rotate(x, cos, sin, before, after) for x in (q, k))
        if not torch.compiler.is_compiling():
            self.layer.norm_rope = note
        return q, k


def _why_not_fused(norm_q: Any, norm_k: Any, x: Tensor) -> str | None:
    """Say why ``qk_norm_rope`` cannot stand for the two norms of x, or None."""
    for norm in (norm_q, norm_k):
        if norm is None:
            return "none"
        name = f"{type(norm).__module__}.{type(norm).__name__}"
        if name not in RMS_NORMS:
            return type(norm).__name__
        # Offloading and parallelism hook into the module's call, which a fused kernel would go round.
        if "forward" in norm.__dict__ or norm._forward_pre_hooks or norm._forward_hooks:
            return "hooks"
        weight = norm.weight
        if weight is None or getattr(norm, "bias", None) is not None or norm.eps is None:
            return "no weight, a bias or no eps"
        if type(weight) not in (nn.Parameter, Tensor) or weight.device != x.device:
            return f"weight of type {type(weight).__name__} on {weight.device}"
    return None if norm_q.eps == norm_k.eps else "two values of eps"


def _norm(norm: Any, x: Tensor, across_heads: bool) -> Tensor:
    if norm is None:
        return x
    return norm(x.flatten(2)).unflatten(2, (x.shape[2], -1)) if across_heads else norm(x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, before: int, after: int) -> Tensor:
    """Rotate the pairs of features (2i, 2i+1) of the tokens [B, N, heads, D] between before and after ones."""
    cos, sin = (each.to(x.device)[:, None] if each.ndim == 2 else each.to(x.device) for each in (cos, sin))
    first, video, last = x.split([before, x.shape[1] - before - after, after], dim=1)
    a, b = video[..., 0::2].float(), video[..., 1::2].float()
    video = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
    return torch.cat((first, video, last), dim=1) if before or after else video


def _heads(x: Tensor, attn: Any) -> Tensor:
    return x.unflatten(2, (attn.heads, -1))


def _project(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if attn.fused_projections:
        q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    return _heads(q, attn), _heads(k, attn), _heads(v, attn)


def _out(attn: Any, x: Tensor) -> Tensor:
    return attn.to_out[1](attn.to_out[0](x))


class WanProcessor(Processor):
    """Wan, VACE, SkyReels-V2: norm across heads, video tokens alone."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if self.layer.dense.key == "full()":  # else the mask of the model is part of the layer's
            self.refuse_mask(attention_mask)
        q, k, v = _project(attn, hidden_states)
        angles = None
        if rotary_emb is not None:
            cos, sin = rotary_emb
            angles = (cos, cos[0, :, 0, 0::2], sin[0, :, 0, 1::2])
        q, k = self.norm_rope(attn, q, k, angles, across_heads=True)
        out = self.layer.attend(q, k, v, parallel=self._parallel_config)
        return _out(attn, out.flatten(2))


class HunyuanProcessor(Processor):
    """HunyuanVideo 1.0 and 1.5: text behind the video, in projections of its own or (single-stream) in the same.

    The model's masks say which text tokens are real. Of padded ones nothing is computed: their rows are 0.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        single, text = attn.add_q_proj is None, encoder_hidden_states.shape[1]
        x = torch.cat([hidden_states, encoder_hidden_states], dim=1) if single else hidden_states
        q, k, v = (_heads(project(x), attn) for project in (attn.to_q, attn.to_k, attn.to_v))
        angles = None
        if image_rotary_emb is not None:
            cos, sin = image_rotary_emb
            angles = (cos, cos[:, 0::2], sin[:, 0::2])
        q, k = self.norm_rope(attn, q, k, angles, after=text if single else 0)
        if not single:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_q, text_k, text_v = (_heads(project(encoder_hidden_states), attn) for project in projections)
            text_q, text_k = _norm(attn.norm_added_q, text_q, False), _norm(attn.norm_added_k, text_k, False)
            # Norms may have widened q and k (autocast): concatenation wants one dtype.
            q, k, v = (torch.cat([x, y.to(x.dtype)], dim=1) for x, y in ((q, text_q), (k, text_k), (v, text_v)))
        valid = attention_mask
        if valid is not None:
            valid = (valid[:, 0, 0] if valid.ndim == 4 else valid)[:, -text:].bool()
        out = self.layer.attend(q, k, v, after=text, valid=valid, parallel=self._parallel_config).flatten(2)
        video, out = out[:, :-text], out[:, -text:]
        if getattr(attn, "to_out", None) is not None:
            video = _out(attn, video)
        if getattr(attn, "to_add_out", None) is not None:
            out = attn.to_add_out(out)
        return video, out


class CogVideoXProcessor(Processor):
    """CogVideoX 1.0 and 1.5: text before the video, LayerNorm, fused projections or not."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        self.refuse_mask(attention_mask)
        text = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if type(self.base).__name__.startswith("Fused"):
            q, k, v = (_heads(each, attn) for each in attn.to_qkv(x).chunk(3, dim=-1))
        else:
            q, k, v = (_heads(project(x), attn) for project in (attn.to_q, attn.to_k, attn.to_v))
        angles = None
        if image_rotary_emb is not None:
            cos, sin = image_rotary_emb
            angles = (cos, cos[:, 0::2], sin[:, 0::2])
        q, k = self.norm_rope(attn, q, k, angles, before=text)
        out = _out(attn, self.layer.attend(q, k, v, before=text).flatten(2))
        return out[:, text:], out[:, :text]


class MochiProcessor(Processor):
    """Mochi: text behind the video in projections of its own; the angles are learned for each head."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_heads(project(hidden_states), attn) for project in (attn.to_q, attn.to_k, attn.to_v))
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = (_heads(project(encoder_hidden_states), attn) for project in projections)
        angles = None if image_rotary_emb is None else (image_rotary_emb[0], *image_rotary_emb)
        q, k = self.norm_rope(attn, q, k, angles)
        text_q, text_k = _norm(attn.norm_added_q, text_q, False), _norm(attn.norm_added_k, text_k, False)
        q, k, v = (torch.cat([x, y.to(x.dtype)], dim=1) for x, y in ((q, text_q), (k, text_k), (v, text_v)))
        video, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        out = self.layer.attend(q, k, v, after=text, valid=attention_mask.bool()).flatten(2)
        out, encoder_hidden_states = out[:, :video], out[:, video:]
        if hasattr(attn, "to_add_out"):
            encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
        return _out(attn, out), encoder_hidden_states


class CosmosProcessor(Processor):
    """Cosmos: video tokens alone. The model rotates halves and asks the dispatcher without saying for which module."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        from diffusers.models.embeddings import apply_rotary_emb

        self.refuse_mask(attention_mask)
        q, k, v = (_heads(project(hidden_states), attn) for project in (attn.to_q, attn.to_k, attn.to_v))
        q, k = _norm(attn.norm_q, q, False), _norm(attn.norm_k, k, False)
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, use_real_unbind_dim=-2, sequence_dim=1) for x in (q, k))
        return _out(attn, self.layer.attend(q, k, v).flatten(2).type_as(q))


# The model's own code, with another dispatcher.


class _View:
    """What the model's own code sees as its processor: the layer stands where the backend's name does."""

    def __init__(self, base: Any, layer: Layer):
        self.base, self._attention_backend = base, layer

    @property
    def _parallel_config(self) -> Any:
        return self.base._parallel_config


class Redirected(Processor):
    """Run the code of ``base`` with stattn's attention in place of diffusers' dispatcher."""

    def __init__(self, base: Any, layer: Layer, split: Triple | None):
        super().__init__(base, layer, split)
        self.view = _View(base, layer)
        layer.norm_rope = "by the model"

    def __reduce__(self) -> Any:
        return _blank, (type(self.base),), self.__dict__


def _dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    *,
    backend: Layer,
    parallel_config: Any = None,
    **options: Any,
) -> Tensor:
    """Stand for diffusers' ``dispatch_attention_fn`` in the code of a processor."""
    backend.processor.refuse_mask(attn_mask)
    return backend.attend(query, key, value, parallel=parallel_config)


@lru_cache(maxsize=64)
def redirected(base: type) -> Callable[[Any, Layer, Triple | None], Redirected]:
    """Make the class that serves in place of processors of one class."""
    theirs: Any = base.__call__
    names = {**theirs.__globals__, "dispatch_attention_fn": _dispatch}
    # By its name torch.compile would find the module that the code comes from, and there the other dispatcher.
    del names["__name__"]
    own = FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    own.__kwdefaults__ = theirs.__kwdefaults__

    class Own(Redirected):
        def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
            return own(self.view, attn, *args, **kwargs)

    # Attention modules pass on the keywords that the signature names.
    Own.__call__.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]
    Own.__name__ = Own.__qualname__ = f"Redirected{base.__name__}"
    return Own


def _blank(base: type) -> Any:
    """Make a processor to be filled, for copy and pickle."""
    cls: Any = redirected(base)
    return cls.__new__(cls)
