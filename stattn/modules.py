"""Drop-in modules around ``stattn``'s operations: plain ``nn.Module``s with the ``state_dict`` of what they replace.

==================  ==========================================================  =================================
module              replaces                                                    parameters
==================  ==========================================================  =================================
Patchify3D          nn.Conv3d(C, E, patch, stride=patch), flatten, transpose    weight, bias
SpaceTimeAttention  the self-attention of Wan, HunyuanVideo and their kin       to_q to_k to_v to_out.0 norm_q norm_k
CrossAttention      the text cross-attention of Wan                             the same
ModulatedNorm       nn.LayerNorm or nn.RMSNorm, then x * (1 + scale) + shift    weight, bias when affine
GatedResidual       x + gate * y, and the modulated norm that follows           none
QKNormRope          RMSNorm of q and k, then the 3-D rotary embedding           norm_q.weight norm_k.weight
FeedForward         nn.Sequential of nn.Linear, nn.GELU("tanh"), nn.Linear      0.weight 0.bias 2.weight 2.bias
DenoiseStep         guidance, prediction, solver update and known region        none
==================  ==========================================================  =================================

Each but CrossAttention and FeedForward, whose operations are PyTorch's, carries ``impl``: one implementation name for
all its operations, or a mapping from stem (``STEMS``) to name in which ``"*"`` stands for the rest. `stattn.accelerate`
sets it, and the mask of every SpaceTimeAttention, on a whole model.
"""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stattn.blocks import BlockList
from stattn.cache import LayerCache
from stattn.grid import Grid, Triple, as_grid, check_positive
from stattn.masks import Mask, full
from stattn.ops import _validate
from stattn.ops._dispatch import NAMES, impl_for
from stattn.ops.attention import attention
from stattn.ops.denoise import denoise_step
from stattn.ops.gate import gate_residual, gate_residual_modulate
from stattn.ops.linear_gelu import linear_gelu
from stattn.ops.modulate import modulate
from stattn.ops.modulate_linear import modulate_linear
from stattn.ops.patchify import patchify3d
from stattn.ops.qk_norm_rope import qk_norm_rope
from stattn.rope import RopeTables

STEMS = ("attention", "patchify", "modulate", "gate", "qk_norm_rope", "denoise")

Impl: TypeAlias = str | Mapping[str, str]
Masks: TypeAlias = Mask | Sequence[Mask]


def check_impl(impl: Impl) -> Impl:
    """Return ``impl`` unchanged. Raises TypeError or ValueError when it names no implementation or an unknown stem."""
    if not isinstance(impl, (str, Mapping)):
        raise TypeError(f"impl={impl!r} must be a name or a mapping from stem to name")
    for stem, name in {"*": impl}.items() if isinstance(impl, str) else impl.items():
        if stem != "*" and stem not in STEMS:
            raise ValueError(f"impl has the stem {stem!r}; the stems are {', '.join(STEMS)}, and '*' for the rest")
        if name != "auto" and name not in NAMES:
            raise ValueError(f"impl={name!r} for {stem!r} must be 'auto' or one of {', '.join(NAMES)}")
    return impl


def check_mask(mask: Masks, heads: int) -> Masks:
    """Return ``mask``. Raises TypeError when it is none, ValueError for a sequence of other than ``heads`` masks."""
    if isinstance(mask, Mask):
        return mask
    if not isinstance(mask, Sequence) or not all(isinstance(each, Mask) for each in mask):
        given: object = mask
        hint = "; masks.parse makes one of text" if isinstance(given, str) else ""
        raise TypeError(f"mask={reprlib.repr(mask)} must be a Mask or a sequence of Masks, one per head{hint}")
    if len(mask) != heads:
        raise ValueError(f"mask is a sequence of {len(mask)} masks for {heads} heads; give one per head")
    return mask


def describe_mask(mask: Masks) -> str:
    """Write a mask as text: its key, or the keys of a sequence (once when all are equal)."""
    if isinstance(mask, Mask):
        return mask.key
    keys = [each.key for each in mask]
    return f"{len(keys)} x {keys[0]}" if len(set(keys)) == 1 else f"[{', '.join(keys)}]"


def density(mask: Masks, grid: Grid | Triple) -> float:
    """Give the share of (query, key) pairs that a mask allows, the mean over heads for a sequence."""
    masks = (mask,) if isinstance(mask, Mask) else mask
    return sum(each.density(grid) for each in masks) / len(masks)


def _describe(impl: Impl) -> str:
    return impl if isinstance(impl, str) else str(dict(impl))


class Patchify3D(nn.Module):
    """Embed the (pt, ph, pw) patches of a video as tokens in (t, h, w) order.

    Loads the weights of ``nn.Conv3d(in_channels, dim, patch, stride=patch)`` unchanged, and starts from the same
    distribution. pad: zero-pad sizes that are no multiple of the patch, at the end, instead of refusing them.
    """

    def __init__(
        self, in_channels: int, dim: int, patch: Triple, *, bias: bool = True, pad: bool = False, impl: Impl = "auto"
    ):
        super().__init__()
        self.in_channels, self.dim = check_positive("in_channels", in_channels), check_positive("dim", dim)
        self.patch, self.pad = _validate.triple("patch", patch), _validate.flag("pad", pad)
        self.impl = check_impl(impl)
        self.weight = nn.Parameter(torch.empty(dim, in_channels, *self.patch))
        self.bias = nn.Parameter(torch.empty(dim)) if _validate.flag("bias", bias) else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly within 1/sqrt(fan in), as nn.Conv3d does."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def grid(self, x: Tensor, *, before: int = 0, after: int = 0) -> Grid:
        """Return the token grid of a video [B, C, T, H, W], with global tokens around it."""
        t, h, w = (-(-size // patch) for size, patch in zip(x.shape[2:], self.patch, strict=True))
        return Grid(t, h, w, before, after)

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """Return tokens [B, N, dim] from a video [B, C, T, H, W]; pos [N, dim] is added."""
        return patchify3d(x, self.weight, self.bias, pos, pad=self.pad, impl=impl_for(self.impl, "patchify"))

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.dim}, patch={self.patch}, bias={self.bias is not None}, pad={self.pad}, "
            f"impl={_describe(self.impl)}"
        )


class ModulatedNorm(nn.Module):
    """Normalise the channels, then scale and shift: norm(x) * (1 + scale) + shift, in fp32, rounded once.

    Replaces nn.LayerNorm (norm="layer") or nn.RMSNorm (norm="rms"), whose ``elementwise_affine`` is ``affine`` here,
    and the adaLN modulation after it.
    """

    def __init__(self, dim: int, *, norm: str = "layer", affine: bool = False, eps: float = 1e-6, impl: Impl = "auto"):
        super().__init__()
        if norm not in ("layer", "rms"):
            raise ValueError(f"norm={norm!r} must be 'layer' or 'rms'")
        self.dim, self.norm, self.eps = check_positive("dim", dim), norm, _validate.epsilon(eps)
        self.impl = check_impl(impl)
        self.weight = nn.Parameter(torch.ones(dim)) if _validate.flag("affine", affine) else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine and norm == "layer" else None

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, frames: int | None = None
    ) -> Tensor:
        """Modulate x [B, N, C] by scale and shift: [B, C], per frame [B, frames, C], per token [B, N, C], or None."""
        return modulate(
            x,
            scale,
            shift,
            norm=self.norm,
            weight=self.weight,
            bias=self.bias,
            eps=self.eps,
            frames=frames,
            impl=impl_for(self.impl, "modulate"),
        )

    def project(
        self,
        linear: nn.Linear,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        frames: int | None = None,
    ) -> Tensor:
        """Return linear(self(x, scale, shift, frames)), in one pass where ``stattn.modulate_linear`` has one."""
        # Autocast casts a linear layer's inputs, and a layer in its place (an adapter, say) is called as it is.
        if torch.is_autocast_enabled(x.device.type) or type(linear) is not nn.Linear:
            return linear(self(x, scale, shift, frames))
        return modulate_linear(
            x,
            scale,
            shift,
            linear.weight,
            linear.bias,
            norm=self.norm,
            weight=self.weight,
            bias=self.bias,
            eps=self.eps,
            frames=frames,
            impl=impl_for(self.impl, "modulate"),
        )

    def extra_repr(self) -> str:
        affine = self.weight is not None
        return f"{self.dim}, norm={self.norm}, affine={affine}, eps={self.eps}, impl={_describe(self.impl)}"


class GatedResidual(nn.Module):
    """Add a gated branch to the residual stream: x + gate * y, alone or with the modulated norm that follows."""

    def __init__(self, *, impl: Impl = "auto"):
        super().__init__()
        self.impl = check_impl(impl)

    def forward(self, x: Tensor, y: Tensor, gate: Tensor | None, frames: int | None = None) -> Tensor:
        """Return x + gate * y; x, y [B, N, C], gate [B, C], [B, frames, C] per frame, [B, N, C] per token, or None."""
        return gate_residual(x, y, gate, frames=frames, impl=impl_for(self.impl, "gate"))

    def then(
        self,
        norm: ModulatedNorm,
        x: Tensor,
        y: Tensor,
        gate: Tensor | None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        frames: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return x' = x + gate * y and norm(x', scale, shift), in one pass."""
        return gate_residual_modulate(
            x,
            y,
            gate,
            scale,
            shift,
            norm=norm.norm,
            weight=norm.weight,
            bias=norm.bias,
            eps=norm.eps,
            frames=frames,
            impl=impl_for(self.impl, "gate"),
        )

    def extra_repr(self) -> str:
        return f"impl={_describe(self.impl)}"


def _qk_norm_width(qk_norm: str | None, heads: int, head_dim: int) -> int | None:
    widths = {"across_heads": heads * head_dim, "per_head": head_dim, None: None}
    if qk_norm not in widths:
        raise ValueError(f"qk_norm={qk_norm!r} must be 'across_heads', 'per_head' or None")
    return widths[qk_norm]


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
    """Normalise queries and keys by RMSNorm and rotate them by their place in the video.

    Replaces two nn.RMSNorm (``norm_q``, ``norm_k``) and the rotary embedding after them. qk_norm: "across_heads" (one
    norm over heads * head_dim, as Wan), "per_head", or None. interleaved: rotate pairs (2i, 2i+1), else (i, i + D/2).
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
        return _norm_and_rotate(self, q, k, rope)

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, qk_norm={self.qk_norm}, "
            f"eps={self.eps}, interleaved={self.interleaved}, impl={_describe(self.impl)}"
        )


def _norm_and_rotate(
    module: QKNormRope | SpaceTimeAttention,
    q: Tensor,
    k: Tensor,
    rope: RopeTables | None,
    k_rope: RopeTables | None = None,
) -> tuple[Tensor, Tensor]:
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
    """Self-attention of video tokens, and of the global tokens around them, under a mask.

    Parameters are named as in diffusers' video transformers: to_q, to_k, to_v, to_out.0, norm_q, norm_k. dim: the width
    of the residual stream. mask: which keys a video query sees, a mask or one per head; assign it freely between calls.
    Global tokens are seen by every query and see everything (globals_see="all") or only one another ("globals").
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
        """Attend. x [B, grid.tokens, dim]: video tokens with grid.before and grid.after global tokens around them.

        rope: tables of ``stattn.rope_tables`` for this grid, or None for no rotation. valid: which global tokens are
        real, [B] counts or [B, before + after] booleans. mask: used in place of ``self.mask`` for this call. cache: x
        holds a few frames of the grid, whose keys and values are written there, and attends to all that it holds; its
        mask is ANDed to the other, and global tokens see each other only. Returns [B, grid.tokens, dim], or as many
        tokens as x has.
        """
        grid = as_grid(grid)
        q = self.to_q(x).unflatten(-1, (self.heads, self.head_dim))
        k = self.to_k(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.to_v(x).unflatten(-1, (self.kv_heads, self.head_dim))
        if cache is not None:
            return self._attend_to(cache, q, k, v, rope, valid, mask)
        q, k = _norm_and_rotate(self, q, k, rope)
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
        q, k = _norm_and_rotate(self, q, k, rope, cache.rope)
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
            f"impl={_describe(self.impl)}"
        )


class CrossAttention(nn.Module):
    """Attention of video tokens to text: dense, without rotation. Parameters as SpaceTimeAttention.

    The keys are few and on no grid, so this is PyTorch's own scaled_dot_product_attention.
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
        """Return keys and values [B, L, heads, D] of text [B, L, dim]: they depend on nothing else."""
        return self._normalised(self.to_k(text), self.norm_k), self.to_v(text).unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, text: Tensor | tuple[Tensor, Tensor], valid: Tensor | None = None) -> Tensor:
        """Attend from x [B, N, dim] to text [B, L, dim], or to what ``keys_and_values`` made of it.

        valid: [B] counts or [B, L] booleans of real text tokens. A sample without text attends to nothing: its
        attention is 0, and the output the bias of the last projection.
        """
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
            f"impl={_describe(self.impl)}"
        )


class FeedForward(nn.Sequential):
    """Linear, GELU (tanh), Linear: an nn.Sequential with its parameters, 0 and 2.

    GELU rides on the first product where ``stattn.linear_gelu`` lets it.
    """

    def __init__(self, dim: int, ffn_dim: int):
        check_positive("dim", dim)
        check_positive("ffn_dim", ffn_dim)
        super().__init__(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., dim] from x [..., dim]."""
        first: nn.Module = self[0]
        # A layer that was put in the first one's place (an adapter, say) is called as it is.
        if type(first) is not nn.Linear or first.bias is None:
            out: Tensor = super().forward(x)
        else:
            out = self[2](linear_gelu(x, first.weight, first.bias))
        return out


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


class DenoiseStep(nn.Module):
    """One step of a sampler from the model's prediction to the next latent; see ``stattn.denoise_step``.

    Keywords given here are the defaults of every call.
    """

    def __init__(self, *, impl: Impl = "auto", **defaults: Any):
        super().__init__()
        unknown = set(defaults) - set(inspect.signature(denoise_step).parameters)
        if unknown:
            raise TypeError(f"DenoiseStep has no keyword {', '.join(sorted(unknown))}")
        self.impl = check_impl(impl)
        self.defaults = defaults

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``stattn.denoise_step`` with this module's defaults and implementation."""
        return denoise_step(*args, impl=impl_for(self.impl, "denoise"), **{**self.defaults, **kwargs})

    def extra_repr(self) -> str:
        return ", ".join(
            [*(f"{name}={value}" for name, value in self.defaults.items()), f"impl={_describe(self.impl)}"]
        )
