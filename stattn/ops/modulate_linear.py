"""The last layer of a model, adaptive layer norm and a projection to the values of a patch: ``modulate_linear``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stattn.ops import _triton, _validate
from stattn.ops._dispatch import Implementation, Operation, device_of, serves_all
from stattn.ops.modulate import check_norm, dtypes_of, is_per_token, modulate
from stattn.reference.modulate_linear import modulate_linear as reference

# As kernels/modulate_linear.py says, which is not imported before it is needed: features that one tile holds.
MAX_FEATURES = 256


class ModulateLinearCall(NamedTuple):
    """What the choice of an implementation depends on. dtypes: of x and the matrix, then of the other tensors."""

    device: str
    capability: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]
    features: int
    per_token: bool
    tracked: bool

    @property
    def fused(self) -> bool:
        """Whether one pass serves the call: 16 bits, narrow, vectors of a sample or a frame, and no gradient."""
        narrow = self.dtypes[0] in (torch.bfloat16, torch.float16) and self.features <= MAX_FEATURES
        return narrow and not self.per_token and not self.tracked


def _triton_run(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    matrix: Tensor,
    matrix_bias: Tensor | None,
) -> Tensor:
    return torch.ops.stattn.modulate_linear(x, scale, shift, norm, weight, bias, eps, matrix, matrix_bias)


MODULATE_LINEAR = Operation(
    "modulate_linear",
    (
        Implementation("triton", lambda call: _triton.why_not(call.device, call.capability, *call.dtypes), _triton_run),
        Implementation("reference", serves_all, reference),
    ),
)


def modulate_linear(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    matrix: Tensor,
    matrix_bias: Tensor | None = None,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    frames: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Modulate tokens and project them: (norm(x) * (1 + scale) + shift) matrix^T + matrix_bias.

    matrix: [E, C], matrix_bias: [E] or None, both in x's dtype. The other arguments are those of ``modulate``.

    Returns [B, N, E] in x's dtype. In 16 bits, for at most 256 features, vectors per sample or per frame and no
    gradient, Triton reads x once: (x - p) * (1 + scale) * weight, p near the token's mean, is rounded to x's dtype for
    the tensor cores, all else is float32, and the result is rounded once. Other calls are ``modulate``, which rounds
    its result, and a linear layer, and so are gradients. Raises as ``modulate`` does, and for a matrix that does not
    fit.
    """
    x = _validate.tensor("x", x, "[B, N, C]")
    _validate.per_token(x, frames, scale=scale, shift=shift)
    eps = check_norm(x, norm, weight, bias, eps)
    matrix = _validate.tensor("matrix", matrix, "[E, C]")
    features = matrix.shape[0]
    _validate.shaped("matrix", matrix, "[E, C]", (features, x.shape[-1]))
    if matrix_bias is not None:
        _validate.shaped("matrix_bias", matrix_bias, "[E]", (features,))
    _validate.one_device("x", x, matrix=matrix, matrix_bias=matrix_bias)
    for name, each in (("matrix", matrix), ("matrix_bias", matrix_bias)):
        if each is not None and each.dtype != x.dtype:
            raise TypeError(f"{name} of {each.dtype} must have the dtype of x, {x.dtype}")
    given = (x, matrix, matrix_bias, scale, shift, weight, bias)
    tracked = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in given)
    per_token = is_per_token(scale, x) or is_per_token(shift, x)
    call = ModulateLinearCall(*device_of(x), dtypes_of(*given), features, per_token, tracked)
    chosen = MODULATE_LINEAR.choose(impl, call)
    if chosen.name == "triton" and not call.fused:
        rest: dict[str, Any] = {"norm": norm, "weight": weight, "bias": bias, "eps": eps, "frames": frames}
        y = modulate(x, scale, shift, **rest, impl=chosen.name)
        return torch.nn.functional.linear(y, matrix, matrix_bias)
    return chosen.run(x, scale, shift, norm, weight, bias, eps, matrix, matrix_bias)


# torch.library.

_LIBRARY = torch.library.Library("stattn", "FRAGMENT")
_LIBRARY.define(
    "modulate_linear(Tensor x, Tensor? scale, Tensor? shift, str norm, Tensor? weight, Tensor? bias, float eps, "
    "Tensor matrix, Tensor? matrix_bias) -> Tensor"
)


def _forward(*arguments: Any) -> Tensor:
    from stattn.kernels.modulate_linear import forward

    return forward(*arguments)


def _fake(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    matrix: Tensor,
    matrix_bias: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:2], matrix.shape[0]))


_LIBRARY.impl("modulate_linear", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("modulate_linear", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("stattn::modulate_linear", _fake, lib=_LIBRARY)
