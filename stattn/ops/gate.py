"""Gated residual connections: ``gate_residual``, and ``gate_residual_modulate`` with the norm that follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stattn.ops import _validate
from stattn.ops._dispatch import Implementation, Operation, device_of, serves_all
from stattn.ops.modulate import check_norm, dtypes_of, fake_gradient, fake_moments, is_per_token, triton_why_not
from stattn.reference.gate import gate_residual as reference_residual
from stattn.reference.gate import gate_residual_modulate as reference_residual_modulate


class GateCall(NamedTuple):
    """What the choice of an implementation depends on.

    dtypes: of x, then of the other tensors. norm: None without the modulate that follows.
    """

    device: str
    capability: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]
    channels: int
    norm: str | None


def _why_not(call: GateCall) -> str | None:
    return triton_why_not(call.device, call.capability, call.dtypes, call.channels)


def _triton_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return torch.ops.stattn.gate_residual(x, y, gate)


def _triton_residual_modulate(*arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.stattn.gate_residual_modulate(*arguments)


GATE_RESIDUAL = Operation(
    "gate_residual",
    (
        Implementation("triton", _why_not, _triton_residual),
        Implementation("reference", serves_all, reference_residual),
    ),
)
GATE_RESIDUAL_MODULATE = Operation(
    "gate_residual_modulate",
    (
        Implementation("triton", _why_not, _triton_residual_modulate),
        Implementation("reference", serves_all, reference_residual_modulate),
    ),
)


def gate_residual(
    x: Tensor, y: Tensor, gate: Tensor | None, *, frames: int | None = None, impl: str = "auto"
) -> Tensor:
    """Add a gated branch to the residual stream: x + gate * y.

    x, y: [B, N, C]. gate: [B, C] per sample; [B, F, C] per frame, with frames=F and N % F == 0; [B, N, C] per token;
    or None for 1. Each tensor may have its own floating-point dtype. impl: see ``stattn.explain``.

    Returns [B, N, C] in x's dtype. Computed in float32 (float64 when an input is), rounded once; Triton's result is the
    reference's bit by bit. Its kernels read any strides with a unit last stride in place, and copy other tensors first.
    Differentiable in every tensor, with Triton once.
    Raises ValueError or TypeError for wrong shapes, dtypes, devices or frames. Follows adaLN-zero of DiT
    (arXiv:2212.09748).
    """
    x, y = _check_residual(x, y)
    _validate.per_token(x, frames, gate=gate)
    call = GateCall(*device_of(x), dtypes_of(x, y, gate), x.shape[-1], None)
    return GATE_RESIDUAL.choose(impl, call).run(x, y, gate)


def gate_residual_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    frames: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream and modulate the sum: x' = x + gate * y, then ``modulate`` of x'.

    Arguments as in ``gate_residual`` and ``modulate``; frames describes every [B, F, C] among gate, scale and shift.

    Returns (x', modulated x'), both [B, N, C] in x's dtype. Computed in float32 (float64 when an input is). x' is
    rounded to x's dtype and the norm reads the rounded x'; the modulated x' is rounded once: the pair equals
    gate_residual followed by modulate. Triton's x' is the reference's bit by bit; strides and gradients are as there.
    Differentiable in every tensor, with Triton once. Raises ValueError or TypeError for wrong shapes, dtypes, devices,
    norm, eps or frames.
    """
    x, y = _check_residual(x, y)
    _validate.per_token(x, frames, gate=gate, scale=scale, shift=shift)
    eps = check_norm(x, norm, weight, bias, eps)
    call = GateCall(*device_of(x), dtypes_of(x, y, gate, scale, shift, weight, bias), x.shape[-1], norm)
    return GATE_RESIDUAL_MODULATE.choose(impl, call).run(x, y, gate, scale, shift, norm, weight, bias, eps)


def _check_residual(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = _validate.tensor("x", x, "[B, N, C]")
    y = _validate.shaped("y", y, "[B, N, C]", tuple(x.shape))
    _validate.one_device("x", x, y=y)
    return x, y


# torch.library.

_VECTORS = "Tensor? gate, Tensor? scale, Tensor? shift, str norm, Tensor? weight, Tensor? bias"
_LIBRARY = torch.library.Library("stattn", "FRAGMENT")
_LIBRARY.define("gate_residual(Tensor x, Tensor y, Tensor? gate) -> Tensor")
_LIBRARY.define("gate_residual_backward(Tensor dout, Tensor y, Tensor gate, bool wanted) -> (Tensor, Tensor)")
_LIBRARY.define(f"gate_residual_modulate(Tensor x, Tensor y, {_VECTORS}, float eps) -> (Tensor, Tensor)")
# The same with what a backward needs: mean and rstd of every token.
_LIBRARY.define(
    f"gate_residual_modulate_forward(Tensor x, Tensor y, {_VECTORS}, float eps) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    f"gate_residual_modulate_backward(Tensor? dresidual, Tensor dout, Tensor residual, Tensor y, {_VECTORS}, "
    "Tensor mean, Tensor rstd, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    from stattn.kernels.gate import forward

    return forward(x, y, gate)


def _residual_backward(dout: Tensor, y: Tensor, gate: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    from stattn.kernels.gate import backward

    return backward(dout, y, gate, wanted)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from stattn.kernels.gate_modulate import forward

    residual, out, _, _ = forward(False, *arguments)
    return residual, out


def _forward_keeping(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from stattn.kernels.gate_modulate import forward

    return forward(True, *arguments)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    from stattn.kernels.gate_modulate import backward

    return backward(*arguments)


def _residual_gradients(
    dout: Tensor, y: Tensor, gate: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Give the gradients of x, y and gate from that of x + gate * y; needs: which are asked for."""
    dx = dout if needs[0] else None
    if gate is None:
        return dx, dout.to(y.dtype) if needs[1] else None, None
    if not (needs[1] or needs[2]):
        return dx, None, None
    dy, dgate = torch.ops.stattn.gate_residual_backward(dout, y, gate, needs[2])
    return dx, dy if needs[1] else None, dgate if needs[2] else None


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out = torch.ops.stattn.gate_residual(x, y, gate)
        ctx.save_for_backward(y, gate)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, gate = ctx.saved_tensors
        return _residual_gradients(dout, y, gate, ctx.needs_input_grad)


class _GateResidualModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        gate: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        norm: str,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            residual, out, mean, rstd = torch.ops.stattn.gate_residual_modulate_forward(
                x, y, gate, scale, shift, norm, weight, bias, eps
            )
        ctx.save_for_backward(residual, y, gate, scale, shift, weight, bias, mean, rstd)
        ctx.norm = norm
        ctx.set_materialize_grads(False)
        return residual, out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dresidual: Tensor | None, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        residual, y, gate, scale, shift, weight, bias, mean, rstd = ctx.saved_tensors
        needs = [need for index, need in enumerate(ctx.needs_input_grad) if index not in (5, 8)]
        if dout is None:
            if dresidual is None:
                return (None,) * 9
            return (*_residual_gradients(dresidual, y, gate, needs), *(None,) * 6)
        dx, *grads = torch.ops.stattn.gate_residual_modulate_backward(
            dresidual, dout, residual, y, gate, scale, shift, ctx.norm, weight, bias, mean, rstd, needs[2:]
        )
        if needs[1] and gate is None:
            grads[0] = dx.to(y.dtype)
        if needs[4] and is_per_token(shift, residual):
            grads[3] = dout.to(shift.dtype)
        dx, dy, dgate, dscale, dshift, dweight, dbias = (
            grad if need else None for grad, need in zip((dx, *grads), needs, strict=True)
        )
        return dx, dy, dgate, dscale, dshift, None, dweight, dbias, None


def _needs_grad(arguments: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arguments)


def _autograd_residual(*arguments: Any) -> Tensor:
    if _needs_grad(arguments):
        return _GateResidual.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.stattn.gate_residual(*arguments)


def _autograd(*arguments: Any) -> tuple[Tensor, Tensor]:
    if _needs_grad(arguments):
        return _GateResidualModulate.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.stattn.gate_residual_modulate(*arguments)


def _fake_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _fake_residual_backward(dout: Tensor, y: Tensor, gate: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), fake_gradient(gate, y, wanted)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_keeping(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, norm: str, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (x.new_empty(x.shape), x.new_empty(x.shape), *fake_moments(x, norm))


def _fake_backward(
    dresidual: Tensor | None,
    dout: Tensor,
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    return (
        residual.new_empty(residual.shape),
        fake_gradient(None if gate is None else y, residual, True),
        fake_gradient(gate, residual, wanted[0]),
        fake_gradient(scale, residual, wanted[1]),
        fake_gradient(shift, residual, wanted[2] and not is_per_token(shift, residual)),
        fake_gradient(weight, residual, wanted[3]),
        fake_gradient(bias, residual, wanted[4]),
    )


_LIBRARY.impl("gate_residual", _residual, "CompositeExplicitAutograd")
_LIBRARY.impl("gate_residual", _autograd_residual, "Autograd")
_LIBRARY.impl("gate_residual_backward", _residual_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("gate_residual_modulate", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("gate_residual_modulate", _autograd, "Autograd")
_LIBRARY.impl("gate_residual_modulate_forward", _forward_keeping, "CompositeExplicitAutograd")
_LIBRARY.impl("gate_residual_modulate_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("stattn::gate_residual", _fake_residual, lib=_LIBRARY)
torch.library.register_fake("stattn::gate_residual_backward", _fake_residual_backward, lib=_LIBRARY)
torch.library.register_fake("stattn::gate_residual_modulate", _fake, lib=_LIBRARY)
torch.library.register_fake("stattn::gate_residual_modulate_forward", _fake_keeping, lib=_LIBRARY)
torch.library.register_fake("stattn::gate_residual_modulate_backward", _fake_backward, lib=_LIBRARY)
