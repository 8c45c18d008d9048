"""Modules of attention: ``QKNormRope``, ``SpaceTimeAttention``, ``CrossAttention``. `stattn.modules` says what for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stattn.blocks import BlockList
from stattn.cache import LayerCache
from stattn.grid import Grid, Triple, as_grid, check_positive
from stattn.masks import full
from stattn.model.settings import Impl, Masks, check_impl, check_mask, describe_impl, describe_mask
from stattn.ops import _validate
from stattn.ops._dispatch import impl_for
from stattn.ops.attention import attention
from stattn.ops.modulate import modulate
from stattn.ops.qk_norm_rope import qk_norm_rope
from stattn.rope import RopeTables


def _qk_norm_width(qk_norm: str | None, heads: int, head_dim: int) -> int | None:
    widths = {"across_heads": heads * head_dim, "per_head": head_dim, None: None}
    if qk_norm not in widths:
        raise ValueError(f"qk_norm={qk_norm!r} must be 'across_heads', 'per_head' or None")
    return widths[qk_norm]


def _check_width(name: str, x: Tensor, dim: int) -> None:
    if x.ndim != 3 or x.shape[2] != dim:
        raise ValueError(f"{name} of shape {tuple(x.shape)} must be [B, N, dim] with dim = {dim}")


def _head_dim(dim: int, heads: int, head_dim: int | None) -> int:
    check_positive("dim", dim)
    check_positive("heads", heads)
    if head_dim is not None:
        return check_positive("head_dim", head_dim)
    if dim % heads:
        raise ValueError(f"dim={dim} is not a multiple of heads={heads}; give head_dim")
    return dim // heads


def _kv_heads(heads: int, kv_heads: int | None) -> int:
    if kv_heads is None:
        return heads
    if heads % check_positive("kv_heads", kv_heads):
        raise ValueError(f"heads={heads} is not a multiple of kv_heads={kv_heads}")
    return kv_heads


def _rms_norm(x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    """Normalise in the wider of x's and the weight's dtype (they differ under autocast); returns x's dtype."""
    return x if norm is None else norm(x.to(torch.promote_types(x.dtype, norm.weight.dtype))).to(x.dtype)


def _qk_norm(qk_norm: str | None, heads: int, head_dim: int, eps: float) -> nn.RMSNorm | None:
    width = _qk_norm_width(qk_norm, heads, head_dim)
    return None if width is None else nn.RMSNorm(width, eps=eps)


class QKNormRope(nn.Module):
    """Normalise queries and keys by RMSNorm and rotate them by their position in the video.

    Replaces two nn.RMSNorm (``norm_q``, ``norm_k``) and the rotary embedding after them. heads, head_dim: of q.
    kv_heads: of k, by default as many. qk_norm: "across_heads" (one norm over heads * head_dim, as Wan), "per_head", or
    None. interleaved: rotate the pairs (2i, 2i+1), else (i, i + D/2). Raises TypeError or ValueError naming an argument
    that does not fit.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        kv_heads: int | None = None,
        qk_norm: str | None = "per_head",
        eps: float = 1e-6,
        interleaved: bool = True,
        impl: Impl = "auto",
    ):
        super().__init__()
        self.heads, self.head_dim = check_positive("heads", heads), check_positive("head_dim", head_dim)
        self.kv_heads = _kv_heads(heads, kv_heads)
        self.qk_norm, self.eps, self.interleaved = qk_norm, _validate.epsilon(eps), interleaved
        self.impl = check_impl(impl)
        self.norm_q = _qk_norm(qk_norm, heads, head_dim, eps)
        self.norm_k = _qk_norm(qk_norm, self.kv_heads, head_dim, eps)

    def forward(self, q: Tensor, k: Tensor, rope: RopeTables | None = None) -> tuple[Tensor, Tensor]:
        """Return q and k [B, N, heads, D] normalised and rotated; rope comes from ``stattn.rope_tables``."""
        return norm_and_rotate(self, q, k, rope)

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, qk_norm={self.qk_norm}, "
            f"eps={self.eps}, interleaved={self.interleaved}, impl={describe_impl(self.impl)}"
        )


def norm_and_rotate(
    module: QKNormRope | SpaceTimeAttention,
    q: Tensor,
    k: Tensor,
    rope: RopeTables | None,
    k_rope: RopeTables | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise q and k [B, N, heads, D] by a module's weights, and rotate them by rope and by k_rope or rope."""
    return qk_norm_rope(
        q,
        k,
        None if module.norm_q is None else module.norm_q.weight,
        None if module.norm_k is None else module.norm_k.weight,
        rope,
        k_rope=k_rope,
        across_heads=module.qk_norm == "across_heads",
        eps=module.eps,
        interleaved=module.interleaved,
        impl=impl_for(module.impl, "qk_norm_rope"),
    )


class SpaceTimeAttention(nn.Module):
    """Self-attention under a mask, over video tokens and the global tokens before and after them.

    Parameters are named as in diffusers' video transformers: to_q, to_k, to_v, to_out.0, norm_q, norm_k. dim: the width
    of the residual stream. heads, head_dim: head_dim is dim / heads by default. kv_heads: heads of k and v, when fewer.
    bias, qk_norm, eps, interleaved: as in the model that is replaced; see QKNormRope. mask: which keys a video query
    sees, one mask or one per head, full() when None; it may be assigned freely between calls. Global tokens are seen by
    every query and see everything (globals_see="all") or only one another ("globals"). impl: see ``stattn.explain``.
    Raises TypeError or ValueError naming an argument that does not fit.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        *,
        kv_heads: int | None = None,
        bias: bool = True,
        qk_norm: str | None = "across_heads",
        eps: float = 1e-6,
        interleaved: bool = True,
        mask: Masks | None = None,
        globals_see: str = "all",
        impl: Impl = "auto",
    ):
        super().__init__()
        self.heads, self.head_dim = heads, _head_dim(dim, heads, head_dim)
        self.kv_heads = _kv_heads(heads, kv_heads)
        if globals_see not in ("all", "globals"):
            raise ValueError(f"globals_see={globals_see!r} must be 'all' or 'globals'")
        self.dim, self.qk_norm, self.eps, self.interleaved = dim, qk_norm, _validate.epsilon(eps), interleaved
        self.globals_see = globals_see
        self.mask: Masks = check_mask(full() if mask is None else mask, heads)
        self.impl = check_impl(impl)
        self.to_q = nn.Linear(dim, heads * self.head_dim, bias=bias)
        self.to_k = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.to_v = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        # A list of one, because the modules replaced keep a dropout without parameters behind the projection.
        self.to_out = nn.ModuleList([nn.Linear(heads * self.head_dim, dim, bias=bias)])
        self.norm_q = _qk_norm(qk_norm, heads, self.head_dim, eps)
        self.norm_k = _qk_norm(qk_norm, self.kv_heads, self.head_dim, eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [B, N, dim] to q, k and v [B, N, heads, D], neither normalised nor rotated."""
        _check_width("x", x, self.dim)
        q = self.to_q(x).unflatten(-1, (self.heads, self.head_dim))
        k = self.to_k(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.to_v(x).unflatten(-1, (self.kv_heads, self.head_dim))
        return q, k, v

    def forward(
        self,
        x: Tensor,
        grid: Grid | Triple,
        *,
        rope: RopeTables | None = None,
        valid: Tensor | None = None,
        mask: Masks | BlockList | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend from and to x, [B, grid.tokens, dim]: global tokens, video tokens in (t, h, w) order, global tokens.

        rope: tables of ``stattn.rope_tables`` for this grid, or None for no rotation. valid: which global tokens are
        real, [B] counts or [B, before + after] booleans. mask: used in place of ``self.mask`` for this call. cache: x
        holds a few frames of the grid, whose keys and values are written there, and attends to all that it holds; its
        mask is ANDed to the other, and global tokens see each other only. Returns [B, grid.tokens, dim], or as many
        tokens as x has.
        """
        grid = as_grid(grid)
        q, k, v = self.project(x)
        if cache is not None:
            return self._attend_to(cache, q, k, v, rope, valid, mask)
        q, k = norm_and_rotate(self, q, k, rope)
        out = attention(
            q,
            k,
            v,
            grid,
            mask=self.mask if mask is None else mask,
            valid=valid,
            globals_see=self.globals_see,
            impl=impl_for(self.impl, "attention"),
        )
        return self.to_out[0](out.flatten(2))

    def _attend_to(
        self,
        cache: LayerCache,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: RopeTables | None,
        valid: Tensor | None,
        mask: Masks | BlockList | None,
    ) -> Tensor:
        k, v = cache.write(k, v)
        q, k = norm_and_rotate(self, q, k, rope, cache.rope)
        out = attention(
            q,
            k,
            v,
            cache.grid,
            mask=cache.mask(self.mask if mask is None else mask),
            q_region=cache.region,
            k_frames=cache.frames,
            valid=valid,
            globals_see="globals",
            impl=impl_for(self.impl, "attention"),
        )
        return self.to_out[0](out.flatten(2))

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
            f"qk_norm={self.qk_norm}, mask={describe_mask(self.mask)}, globals_see={self.globals_see}, "
            f"impl={describe_impl(self.impl)}"
        )


class CrossAttention(nn.Module):
    """Attention from video tokens to text: dense, without rotary embedding.

    Parameters are named as in SpaceTimeAttention. Computed by PyTorch's scaled_dot_product_attention, since the keys
    are few and lie on no grid.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        *,
        bias: bool = True,
        qk_norm: str | None = "across_heads",
        eps: float = 1e-6,
        impl: Impl = "auto",
    ):
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, _head_dim(dim, heads, head_dim)
        self.qk_norm, self.eps = qk_norm, _validate.epsilon(eps)
        self.impl = check_impl(impl)
        inner = heads * self.head_dim
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k = nn.Linear(dim, inner, bias=bias)
        self.to_v = nn.Linear(dim, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim, bias=bias)])
        self.norm_q = _qk_norm(qk_norm, heads, self.head_dim, eps)
        self.norm_k = _qk_norm(qk_norm, heads, self.head_dim, eps)

    def keys_and_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, L, heads, D] of text [B, L, dim]; they can be kept for every step."""
        _check_width("text", text, self.dim)
        return self._normalised(self.to_k(text), self.norm_k), self.to_v(text).unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, text: Tensor | tuple[Tensor, Tensor], valid: Tensor | None = None) -> Tensor:
        """Attend from x [B, N, dim] to text: [B, L, dim], or what ``keys_and_values`` returned for it.

        valid: [B] counts or [B, L] booleans of real text tokens. Returns [B, N, dim]. A sample without text attends to
        nothing: its attention is 0, and its output the bias of the last projection.
        """
        _check_width("x", x, self.dim)
        k, v = self.keys_and_values(text) if isinstance(text, Tensor) else text
        q = self._normalised(self.to_q(x), self.norm_q)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        if k.shape[2] == 0:
            out = q * 0
        elif valid is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            seen = valid_tokens(valid, len(k), k.shape[2])
            some = seen.any(dim=1, keepdim=True)
            # A softmax over no keys is undefined and differs between backends: such samples see all, and count for 0.
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=(seen | ~some)[:, None, None])
            out = torch.where(some[:, :, None, None], out, 0)
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    def _normalised(self, x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        """Normalise [B, N, heads * D] across heads or per head, in fp32 or wider; returns [B, N, heads, D]."""
        if norm is not None and self.qk_norm == "across_heads":
            x = modulate(
                x, None, None, norm="rms", weight=norm.weight, eps=self.eps, impl=impl_for(self.impl, "modulate")
            )
        x = x.unflatten(-1, (self.heads, self.head_dim))
        return _rms_norm(x, norm) if self.qk_norm == "per_head" else x

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, heads={self.heads}, head_dim={self.head_dim}, qk_norm={self.qk_norm}, "
            f"impl={describe_impl(self.impl)}"
        )


def valid_tokens(valid: Tensor, batch: int, length: int) -> Tensor:
    """Return [batch, length] booleans from [batch] counts or from such booleans. Raises ValueError on anything else."""
    if valid.dtype == torch.bool and valid.shape == (batch, length):
        return valid
    if valid.dtype in (torch.int32, torch.int64) and valid.shape == (batch,):
        return torch.arange(length, device=valid.device) < valid[:, None]
    raise ValueError(
        f"valid of shape {tuple(valid.shape)} and {valid.dtype} must be integer counts [{batch}] "
        f"or booleans [{batch}, {length}]"
    )
