"""Video to tokens and back: the public functions, their torch.library operations with autograd, and the choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stattn.grid import Grid, as_grid, is_int
from stattn.ops import _triton, _validate
from stattn.ops._dispatch import Implementation, Operation, device_of, serves_all
from stattn.reference.patchify import patchify3d as reference_patchify
from stattn.reference.patchify import unpatchify3d as reference_unpatchify


class PatchifyCall(NamedTuple):
    """What the choice of an implementation depends on. others: the dtypes of bias and pos, where there are any."""

    device: str
    capability: tuple[int, int]
    dtype: torch.dtype
    channels: int
    patch: tuple[int, int, int]
    others: tuple[torch.dtype, ...] = ()


def _patchify_why_not(call: PatchifyCall) -> str | None:
    return _triton.why_not(call.device, call.capability, call.dtype, *call.others)


def _unpatchify_why_not(call: PatchifyCall) -> str | None:
    if call.dtype.itemsize > 8:
        return f"moves values of at most 8 bytes, the tokens are {call.dtype}"
    return _triton.why_not(call.device, call.capability)  # values are moved as integers


def _triton_patchify(x: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None) -> Tensor:
    return torch.ops.stattn.patchify3d(x, weight, bias, pos)


def _triton_unpatchify(
    tokens: Tensor,
    grid: tuple[int, int, int],
    before: int,
    patch: tuple[int, int, int],
    channels: int,
    size: tuple[int, int, int],
) -> Tensor:
    return torch.ops.stattn.unpatchify3d(tokens, before, patch, channels, size)


PATCHIFY = Operation(
    "patchify3d",
    (
        Implementation("triton", _patchify_why_not, _triton_patchify),
        Implementation("reference", serves_all, reference_patchify),
    ),
)
UNPATCHIFY = Operation(
    "unpatchify3d",
    (
        Implementation("triton", _unpatchify_why_not, _triton_unpatchify),
        Implementation("reference", serves_all, reference_unpatchify),
    ),
)


def patchify3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos: Tensor | None = None,
    *,
    pad: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Project each patch of a video to a token: a non-overlapping 3-D convolution, bias and position embedding.

    x: [B, C, T, H, W]. weight: [E, C, pt, ph, pw], the weight of an ``nn.Conv3d`` whose stride is its kernel,
    unchanged; bias: [E]; x and weight of one floating-point dtype. pos: [N, E], added to every sample. pad: let the
    last patches read zeros beyond the end of an axis that pt, ph or pw does not divide. x may have any strides and is
    never copied; a weight, bias or pos that is not contiguous is. impl: see ``stattn.explain``.

    Returns tokens [B, N, E] in x's dtype, contiguous, N = t*h*w in (t, h, w) order. Products and sums are float32
    (float64 for float64 inputs); the token is rounded once, after bias and pos. Differentiable in every tensor, by
    kernels once; gradients, too, are summed in float32 in a fixed order and rounded once.
    Raises ValueError for an axis that the patch does not divide without ``pad``, or wrong shapes; TypeError for wrong
    dtypes. Equals the non-overlapping convolution of ViT (arXiv:2010.11929) on three axes.
    """
    x = _validate.tensor("x", x, "[B, C, T, H, W]")
    weight = _validate.tensor("weight", weight, "[E, C, pt, ph, pw]")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight of {weight.dtype} must have the dtype of x, {x.dtype}")
    patch = _validate.triple("patch (the last three axes of weight)", tuple(weight.shape[2:]))
    features, channels = weight.shape[:2]
    if channels != x.shape[1]:
        raise ValueError(f"weight of shape {tuple(weight.shape)} reads {channels} channels, x has {x.shape[1]}")
    if not _validate.flag("pad", pad):
        for name, size, p in zip("THW", x.shape[2:], patch, strict=True):
            if size % p:
                raise ValueError(f"x: {name}={size} is not a multiple of the patch's {p}; pad=True pads it with zeros")
    if bias is not None:
        _validate.shaped("bias", bias, "[E]", (features,))
    if pos is not None:
        tokens = 1
        for size, p in zip(x.shape[2:], patch, strict=True):
            tokens *= -(-size // p)
        _validate.shaped("pos", pos, "[N, E]", (tokens, features))
    _validate.one_device("x", x, weight=weight, bias=bias, pos=pos)
    others = tuple(each.dtype for each in (bias, pos) if each is not None)
    call = PatchifyCall(*device_of(x), x.dtype, channels, patch, others)
    return PATCHIFY.choose(impl, call).run(x, weight, bias, pos)


def unpatchify3d(
    tokens: Tensor,
    grid: Grid | tuple[int, int, int],
    patch: tuple[int, int, int],
    channels: int,
    *,
    size: tuple[int, int, int] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Put the patches that tokens hold back together as a video: the inverse of patchify3d's gather.

    tokens: [B, N, pt*ph*pw*C] of any dtype, features ordered (pt, ph, pw, C) as the final layer of DiT, Wan and
    HunyuanVideo writes them; any strides, never copied. grid: (t, h, w), N = t*h*w, or a Grid, whose global tokens are
    skipped. patch: (pt, ph, pw). channels: C. size: (T, H, W) of the result, when padding is to be cut from the last
    patches.

    Returns [B, C, T, H, W], by default [B, C, t*pt, h*ph, w*pw], contiguous. Values are moved, none is rounded.
    Differentiable.
    Raises ValueError when the tokens do not fit the grid, patch and channels, or when size does not end in the last
    patch.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens of type {type(tokens).__name__} must be a tensor [B, N, pt*ph*pw*C]")
    grid, patch = as_grid(grid), _validate.triple("patch", patch)
    if not is_int(channels) or channels < 1:
        raise ValueError(f"channels={channels!r} must be a positive integer")
    features = patch[0] * patch[1] * patch[2] * channels
    if tokens.dim() != 3 or tuple(tokens.shape[1:]) != (grid.tokens, features):
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)} must be [B, N, pt*ph*pw*C] = (B, {grid.tokens}, {features}) "
            f"for {grid}, patch={patch} and channels={channels}"
        )
    full = (grid.t * patch[0], grid.h * patch[1], grid.w * patch[2])
    size = full if size is None else _validate.triple("size", size)
    if any(not most - p < each <= most for each, most, p in zip(size, full, patch, strict=True)):
        raise ValueError(f"size={size} must end in the last patch: the grid {grid.shape} of patches {patch} has {full}")
    call = PatchifyCall(*device_of(tokens), tokens.dtype, channels, patch)
    return UNPATCHIFY.choose(impl, call).run(tokens, grid.shape, grid.before, patch, channels, size)


# torch.library: the Triton kernels; the reference is differentiable PyTorch, called directly.

_LIBRARY = torch.library.Library("stattn", "FRAGMENT")
_LIBRARY.define("patchify3d(Tensor x, Tensor weight, Tensor? bias, Tensor? pos) -> Tensor")
_LIBRARY.define("patchify3d_dx(Tensor dout, Tensor weight, SymInt[] size) -> Tensor")
_LIBRARY.define(
    "patchify3d_dweight(Tensor dout, Tensor x, int[] patch, ScalarType? bias_dtype) -> (Tensor dweight, Tensor dbias)"
)
_LIBRARY.define("patchify3d_dpos(Tensor dout, ScalarType dtype) -> Tensor")
_LIBRARY.define("unpatchify3d(Tensor tokens, SymInt before, int[] patch, int channels, SymInt[] size) -> Tensor")
_LIBRARY.define("unpatchify3d_backward(Tensor video, SymInt rows, SymInt before, int[] patch) -> Tensor")


# Kernel files are imported when one runs: `import stattn` must work without Triton.


def _patchify(x: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None) -> Tensor:
    from stattn.kernels import patchify

    return patchify.forward(x, weight, bias, pos)


def _patchify_dx(dout: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    from stattn.kernels import patchify_bwd

    return patchify_bwd.dx(dout, weight, tuple(size))


def _patchify_dweight(
    dout: Tensor, x: Tensor, patch: Sequence[int], bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    from stattn.kernels import patchify_bwd

    return patchify_bwd.dweight(dout, x, _validate.unpack(patch), bias_dtype)


def _patchify_dpos(dout: Tensor, dtype: torch.dtype) -> Tensor:
    from stattn.kernels import patchify_bwd

    return patchify_bwd.dpos(dout, dtype)


def _unpatchify(tokens: Tensor, before: int, patch: Sequence[int], channels: int, size: Sequence[int]) -> Tensor:
    from stattn.kernels import unpatchify

    return unpatchify.forward(tokens, before, _validate.unpack(patch), channels, _validate.unpack(size))


def _unpatchify_backward(video: Tensor, rows: int, before: int, patch: Sequence[int]) -> Tensor:
    from stattn.kernels import unpatchify

    return unpatchify.backward(video, rows, before, _validate.unpack(patch))


class _Patchify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtypes = tuple(None if each is None else each.dtype for each in (bias, pos))
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.stattn.patchify3d(x, weight, bias, pos)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, need_pos = ctx.needs_input_grad
        bias_dtype, pos_dtype = ctx.dtypes
        dx = dweight = dbias = dpos = None
        if need_x:
            dx = torch.ops.stattn.patchify3d_dx(dout, weight, x.shape[2:])
        if need_weight or need_bias:
            patch = list(weight.shape[2:])
            dweight, dbias = torch.ops.stattn.patchify3d_dweight(dout, x, patch, bias_dtype if need_bias else None)
        if need_pos:
            dpos = torch.ops.stattn.patchify3d_dpos(dout, pos_dtype)
        return dx, dweight if need_weight else None, dbias if need_bias else None, dpos


def _patchify_autograd(x: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias, pos)):
        return _Patchify.apply(x, weight, bias, pos)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.stattn.patchify3d(x, weight, bias, pos)


class _Unpatchify(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, before: int, patch: Sequence[int], channels: int, size: Sequence[int]
    ) -> Tensor:
        ctx.rows, ctx.before, ctx.patch = tokens.shape[1], before, patch
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.stattn.unpatchify3d(tokens, before, patch, channels, size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, video: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.stattn.unpatchify3d_backward(video, ctx.rows, ctx.before, ctx.patch), None, None, None, None


def _unpatchify_autograd(tokens: Tensor, *rest: Any) -> Tensor:
    if torch.is_grad_enabled() and tokens.requires_grad:
        return _Unpatchify.apply(tokens, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.stattn.unpatchify3d(tokens, *rest)


def _patchify_fake(x: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None) -> Tensor:
    tokens = 1
    for size, p in zip(x.shape[2:], weight.shape[2:], strict=True):
        tokens *= (size + p - 1) // p
    return x.new_empty(x.shape[0], tokens, weight.shape[0])


def _patchify_dx_fake(dout: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    return dout.new_empty(dout.shape[0], weight.shape[1], *size)


def _patchify_dweight_fake(
    dout: Tensor, x: Tensor, patch: Sequence[int], bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    dbias = x.new_empty(0) if bias_dtype is None else x.new_empty(dout.shape[2], dtype=bias_dtype)
    return x.new_empty(dout.shape[2], x.shape[1], *patch), dbias


def _patchify_dpos_fake(dout: Tensor, dtype: torch.dtype) -> Tensor:
    return dout.new_empty(dout.shape[1:], dtype=dtype)


def _unpatchify_fake(tokens: Tensor, before: int, patch: Sequence[int], channels: int, size: Sequence[int]) -> Tensor:
    return tokens.new_empty(tokens.shape[0], channels, *size)


def _unpatchify_backward_fake(video: Tensor, rows: int, before: int, patch: Sequence[int]) -> Tensor:
    return video.new_empty(video.shape[0], rows, patch[0] * patch[1] * patch[2] * video.shape[1])


for _name, _run, _fake in (
    ("patchify3d", _patchify, _patchify_fake),
    ("patchify3d_dx", _patchify_dx, _patchify_dx_fake),
    ("patchify3d_dweight", _patchify_dweight, _patchify_dweight_fake),
    ("patchify3d_dpos", _patchify_dpos, _patchify_dpos_fake),
    ("unpatchify3d", _unpatchify, _unpatchify_fake),
    ("unpatchify3d_backward", _unpatchify_backward, _unpatchify_backward_fake),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stattn::{_name}", _fake, lib=_LIBRARY)
_LIBRARY.impl("patchify3d", _patchify_autograd, "Autograd")
_LIBRARY.impl("unpatchify3d", _unpatchify_autograd, "Autograd")
