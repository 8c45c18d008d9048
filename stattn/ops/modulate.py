"""Adaptive layer norm: ``modulate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stattn.ops import _triton, _validate
from stattn.ops._dispatch import Implementation, Operation, device_of, serves_all
from stattn.reference.modulate import modulate as reference

NORMS = ("layer", "rms")
# A longer row does not fit the registers of a Triton program.
MAX_CHANNELS = 32768


class ModulateCall(NamedTuple):
    """What the choice of an implementation depends on. dtypes: of x, then of the other tensors."""

    device: str
    capability: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]
    channels: int
    norm: str


def triton_why_not(
    device: str, capability: tuple[int, int], dtypes: tuple[torch.dtype, ...], channels: int
) -> str | None:
    """Say why the Triton kernels of ``modulate`` and ``gate`` do not serve such tensors, or None."""
    if channels > MAX_CHANNELS:
        return f"serves at most {MAX_CHANNELS} channels, the call has {channels}"
    return _triton.why_not(device, capability, *dtypes)


def _why_not(call: ModulateCall) -> str | None:
    return triton_why_not(call.device, call.capability, call.dtypes, call.channels)


def _triton_run(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    return torch.ops.stattn.modulate(x, scale, shift, norm, weight, bias, eps)


MODULATE = Operation(
    "modulate",
    (
        Implementation("triton", _why_not, _triton_run),
        Implementation("reference", serves_all, reference),
    ),
)


def modulate(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    frames: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Normalise tokens over their channels, then scale and shift them: norm(x) * (1 + scale) + shift.

    x: [B, N, C]. scale, shift: [B, C] per sample; [B, F, C] per frame, with frames=F and the tokens of a frame
    contiguous (N % F == 0); [B, N, C] per token; or None to leave the factor or the term out. The two may differ in
    kind. norm: "layer" (mean and variance) or "rms" (root mean square). weight, bias: [C], applied to the norm's
    result. eps: added to the variance or mean square. Any of these tensors may have its own floating-point dtype.
    impl: see ``stattn.explain``.

    Returns [B, N, C] in x's dtype. Everything is computed in float32 (float64 when an input is), rounded once at the
    end. Triton's kernels read any strides in place when the channels lie side by side (last stride 1), and copy the
    tensor first when they do not; their gradients are reproducible bit by bit, and those of a sample do not depend on
    its batch.
    Differentiable in every tensor, with Triton once. Raises ValueError or TypeError for wrong shapes, dtypes, devices,
    norm, eps or frames.
    Follows adaLN of DiT (arXiv:2212.09748); RMSNorm is arXiv:1910.07467.
    """
    x = _validate.tensor("x", x, "[B, N, C]")
    _validate.per_token(x, frames, scale=scale, shift=shift)
    eps = check_norm(x, norm, weight, bias, eps)
    call = ModulateCall(*device_of(x), dtypes_of(x, scale, shift, weight, bias), x.shape[-1], norm)
    return MODULATE.choose(impl, call).run(x, scale, shift, norm, weight, bias, eps)


def check_norm(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> float:
    """Check the arguments of the norm of x [B, N, C] and return eps."""
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} must be 'layer' or 'rms'")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            _validate.shaped(name, vector, "[C]", (x.shape[-1],))
    _validate.one_device("x", x, weight=weight, bias=bias)
    return _validate.epsilon(eps)


def dtypes_of(*tensors: Tensor | None) -> tuple[torch.dtype, ...]:
    """List the dtypes of the tensors that are there."""
    return tuple(each.dtype for each in tensors if each is not None)


# torch.library.

_ARGUMENTS = "Tensor x, Tensor? scale, Tensor? shift, str norm, Tensor? weight, Tensor? bias"
_LIBRARY = torch.library.Library("stattn", "FRAGMENT")
_LIBRARY.define(f"modulate({_ARGUMENTS}, float eps) -> Tensor")
# The same with what a backward needs: mean and rstd of every token.
_LIBRARY.define(f"modulate_forward({_ARGUMENTS}, float eps) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    f"modulate_backward(Tensor dout, {_ARGUMENTS}, Tensor mean, Tensor rstd, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def is_per_token(vector: Tensor | None, x: Tensor) -> bool:
    """Whether a vector has a row for every token of x [B, N, C]."""
    return vector is not None and vector.dim() == 3 and vector.shape[1] == x.shape[1]


def _forward(*arguments: Any) -> Tensor:
    from stattn.kernels.modulate import forward

    return forward(False, *arguments)[0]


def _forward_keeping(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from stattn.kernels.modulate import forward

    return forward(True, *arguments)


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from stattn.kernels import modulate as kernels

    return kernels.backward(*arguments)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        norm: str,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out, mean, rstd = torch.ops.stattn.modulate_forward(x, scale, shift, norm, weight, bias, eps)
        ctx.save_for_backward(x, scale, shift, weight, bias, mean, rstd)
        ctx.norm = norm
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight, bias, mean, rstd = ctx.saved_tensors
        _, *vectors = needs = [need for index, need in enumerate(ctx.needs_input_grad) if index not in (3, 6)]
        dx, dscale, dshift, dweight, dbias = torch.ops.stattn.modulate_backward(
            dout, x, scale, shift, ctx.norm, weight, bias, mean, rstd, vectors
        )
        if needs[2] and is_per_token(shift, x):
            dshift = dout.to(shift.dtype)
        dx, dscale, dshift, dweight, dbias = (
            grad if need else None for grad, need in zip((dx, dscale, dshift, dweight, dbias), needs, strict=True)
        )
        return dx, dscale, dshift, None, dweight, dbias, None


def _autograd(*arguments: Any) -> Tensor:
    if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arguments):
        return _Modulate.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.stattn.modulate(*arguments)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def fake_moments(x: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Give what the kernels keep of each token of x: mean (without elements for "rms") and rstd."""
    mean = x.new_empty(x.shape[:2] if norm == "layer" else (0,), dtype=torch.float32)
    return mean, x.new_empty(x.shape[:2], dtype=torch.float32)


def _fake_keeping(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, norm: str, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (x.new_empty(x.shape), *fake_moments(x, norm))


def fake_gradient(vector: Tensor | None, x: Tensor, wanted: bool) -> Tensor:
    """Give a vector's gradient, or a tensor without elements."""
    return x.new_empty(0) if vector is None or not wanted else vector.new_empty(vector.shape)


def _fake_backward(
    dout: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        fake_gradient(scale, x, wanted[0]),
        fake_gradient(shift, x, wanted[1] and not is_per_token(shift, x)),
        fake_gradient(weight, x, wanted[2]),
        fake_gradient(bias, x, wanted[3]),
    )


_LIBRARY.impl("modulate", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("modulate", _autograd, "Autograd")
_LIBRARY.impl("modulate_forward", _forward_keeping, "CompositeExplicitAutograd")
_LIBRARY.impl("modulate_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("stattn::modulate", _fake, lib=_LIBRARY)
torch.library.register_fake("stattn::modulate_forward", _fake_keeping, lib=_LIBRARY)
torch.library.register_fake("stattn::modulate_backward", _fake_backward, lib=_LIBRARY)
