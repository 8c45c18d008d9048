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
all its operations, or a mapping from stem (``stattn.model.settings.STEMS``) to name in which ``"*"`` stands for the
rest. `stattn.accelerate` sets it, and the mask of every SpaceTimeAttention, on a whole model.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from stattn.grid import Grid, Triple, check_positive
from stattn.model.attention import CrossAttention, QKNormRope, SpaceTimeAttention
from stattn.model.settings import Impl, check_impl, describe_impl
from stattn.ops import _validate
from stattn.ops._dispatch import impl_for
from stattn.ops.denoise import denoise_step
from stattn.ops.gate import gate_residual, gate_residual_modulate
from stattn.ops.linear_gelu import linear_gelu
from stattn.ops.modulate import modulate
from stattn.ops.modulate_linear import modulate_linear
from stattn.ops.patchify import patchify3d

__all__ = [
    "CrossAttention",
    "DenoiseStep",
    "FeedForward",
    "GatedResidual",
    "ModulatedNorm",
    "Patchify3D",
    "QKNormRope",
    "SpaceTimeAttention",
]


class Patchify3D(nn.Module):
    """Embed the (pt, ph, pw) patches of a video as tokens in (t, h, w) order.

    Loads the weights of ``nn.Conv3d(in_channels, dim, patch, stride=patch)`` unchanged, and starts from the same
    distribution. pad: zero-pad sizes that the patch does not divide, at the end, instead of refusing them. Raises
    TypeError or ValueError naming an argument that does not fit.
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
            f"impl={describe_impl(self.impl)}"
        )


class ModulatedNorm(nn.Module):
    """Normalise the channels, then scale and shift: norm(x) * (1 + scale) + shift, in fp32, rounded once.

    Replaces nn.LayerNorm (norm="layer") or nn.RMSNorm (norm="rms"), and the adaLN modulation after it. affine: what
    nn.LayerNorm calls ``elementwise_affine``. Raises TypeError or ValueError naming an argument that does not fit.
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
        return f"{self.dim}, norm={self.norm}, affine={affine}, eps={self.eps}, impl={describe_impl(self.impl)}"


class GatedResidual(nn.Module):
    """Add a gated branch to the residual stream: x + gate * y.

    ``then`` also computes the modulated norm that follows, in the same pass. Has no parameters.
    """

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
        return f"impl={describe_impl(self.impl)}"


class FeedForward(nn.Sequential):
    """The feed-forward of a block: Linear, GELU (tanh), Linear.

    An nn.Sequential, with the linear layers at 0 and 2. GELU is fused with the first product where
    ``stattn.linear_gelu`` can do that.
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


class DenoiseStep(nn.Module):
    """One step of a sampler, from the model's prediction to the next latent; see ``stattn.denoise_step``.

    Keywords given to the constructor are the defaults of every call. Raises TypeError for unknown ones.
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
            [*(f"{name}={value}" for name, value in self.defaults.items()), f"impl={describe_impl(self.impl)}"]
        )
