"""Attention: the public function, its torch.library operations with autograd, and the choice of implementation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, overload

import torch

from stattn import masks as _masks
from stattn.blocks import BlockList
from stattn.grid import Grid, Region, Triple
from stattn.masks import Mask
from stattn.ops import _attention_memo as _memo
from stattn.ops import _cuda, _cuda_bwd, _dense, _triton, _validate
from stattn.ops._attention_check import check as _check
from stattn.ops._attention_check import real_globals as _real_globals
from stattn.ops._dispatch import Implementation, Operation, lacks
from stattn.problem import Extras, Problem
from stattn.reference.attention import attention as _reference_forward
from stattn.reference.attention import attention_backward as _reference_backward
from stattn.reference.attention import merge as _reference_merge

_FULL = _masks.full()


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Grid | Triple,
    mask: Mask | BlockList | Sequence[Mask] = ...,
    *,
    q_region: Region | None = ...,
    k_region: Region | None = ...,
    k_frames: torch.Tensor | None = ...,
    valid: torch.Tensor | None = ...,
    globals_see: str = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool | None = ...,
    impl: str = ...,
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Grid | Triple,
    mask: Mask | BlockList | Sequence[Mask] = ...,
    *,
    q_region: Region | None = ...,
    k_region: Region | None = ...,
    k_frames: torch.Tensor | None = ...,
    valid: torch.Tensor | None = ...,
    globals_see: str = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    deterministic: bool | None = ...,
    impl: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Grid | Triple,
    mask: Mask | BlockList | Sequence[Mask] = _FULL,
    *,
    q_region: Region | None = None,
    k_region: Region | None = None,
    k_frames: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    globals_see: str = "all",
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend each token to the tokens its mask allows.

    A query that may see nothing returns 0, LSE -inf and zero gradients. Tokens lie in row-major (t, h, w) order between
    ``grid.before`` and ``grid.after`` global tokens; nothing is permuted or padded, and any strides with a unit last
    stride are used as they are. Numbers must be finite, in invalid global tokens and empty slots as well: a NaN or an
    infinity in a token of k or v may reach queries that do not see it, as 0 times itself (by ``cuda``; the others
    do not read what is invalid or empty).

    q: [B, Nq, heads, D]. k, v: [B, Nk, key heads, D], where key heads divide heads (GQA). bf16, fp16, fp32 or fp64.
    grid: (T, H, W) or a Grid with global tokens. Nq is the tokens of q's region with all global tokens or without any
        (their keys still take part); Nk is the tokens of k's region with all global tokens.
    mask: what video queries see: a Mask, a BlockList, or one Mask per query head.
    q_region, k_region: the box of the grid that q, or k and v, hold; the whole grid when None.
    k_frames: int32 [slots] on q's device: k and v hold ``slots`` frames, slot s the frame k_frames[s], or nothing where
        -1. A frame may be held once. Goes with a k_region only if that spans all frames.
    valid: the global tokens that are real: booleans [B, before + after], or counts [B] of the first ones, for grids
        with global tokens on one side. An invalid one is neither key nor query: its row is 0, its LSE -inf, its
        gradients 0.
    globals_see: "all", or "globals": global queries see each other only, which keeps autoregressive causality.
    scale: of the scores, any finite real number (a NumPy scalar too); 1/sqrt(D) when None.
    deterministic: True asks for a bitwise reproducible backward that does not depend on the batch, False for the
        fastest, None follows ``torch.are_deterministic_algorithms_enabled()``. On Hopper True costs 10 to 20 % of a
        backward's time, and under masks saves its memory for sums of dQ in fp32. The forward is always reproducible.
    impl: "auto", or an implementation by name; see ``stattn.explain``.

    Returns the output like q, contiguous, and with return_lse the natural-log LSE [B, heads, Nq] in fp32 (fp64 for
    fp64). Differentiable once in q, k and v, through both results.

    Raises TypeError or ValueError naming the argument and its value.
    """
    if torch.compiler.is_compiling():
        problem, extras = _check(q, k, v, grid, mask, q_region, k_region, k_frames, valid, globals_see, scale)
        deterministic = _flags(deterministic, return_lse)
        out, lse = torch.ops.stattn.attention(q, k, v, *_flatten(problem), *extras, deterministic, impl)
        return (out, lse) if return_lse else out

    deterministic = _flags(deterministic, return_lse)
    signature = _memo.signature(
        q, k, v, grid, mask, q_region, k_region, k_frames, valid, globals_see, scale, impl, deterministic
    )
    known = None if signature is None else _memo.find(signature)
    if signature is None or known is None:
        problem, extras = _check(q, k, v, grid, mask, q_region, k_region, k_frames, valid, globals_see, scale)
        grad = _needs_grad(q, k, v)
        chosen = OPERATION.choose(impl, _call(q, k, v, problem, extras, grad, deterministic))
        direct = signature is not None and _memo.direct(q, k, v, *extras)
        known = _memo.Known(problem, _flatten(problem), chosen.name, chosen.run, direct)
        # Whether Triton's interpreter is on is for the environment to say, each time.
        if signature is not None and not (chosen.name == "triton" and q.device.type == "cpu"):
            _memo.keep(signature, known)
    else:
        extras = _extras(known.problem, mask, k_frames, valid)
        grad = signature[-1]
    if known.name == "flash":  # has an autograd of its own
        return _dense.flash(q, k, v, known.problem.scale, return_lse)
    if not known.direct or not _memo.nobody_looks(q.device, grad):
        out, lse = torch.ops.stattn.attention(q, k, v, *known.static, *extras, deterministic, known.name)
    elif grad:
        out, lse = _Direct.apply(q, k, v, known, extras, deterministic)
    elif known.run is _cuda.run:  # whose operations have nothing to do with autograd
        if not return_lse:
            return _cuda.output(q, k, v, known.problem, extras)
        out, lse = known.run(q, k, v, known.problem, extras)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = known.run(q, k, v, known.problem, extras)
    return (out, lse) if return_lse else out


def _flags(deterministic: bool | None, return_lse: bool) -> bool:
    """Check two arguments that are of no account for the problem, and give ``deterministic``."""
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    elif not isinstance(deterministic, bool):
        raise TypeError(f"deterministic={deterministic!r} must be True, False or None")
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse={return_lse!r} must be a boolean")
    return deterministic


def _extras(
    problem: Problem,
    mask: Mask | BlockList | Sequence[Mask],
    k_frames: torch.Tensor | None,
    valid: torch.Tensor | None,
) -> Extras:
    """Give the tensors of a call that is known to be right, but for the values of ``valid``."""
    real = None if valid is None else _real_globals(valid, problem.grid)
    if isinstance(mask, BlockList):
        return Extras(None, real, mask.count, mask.index, mask.partial)
    return _memo.NO_EXTRAS if k_frames is None and real is None else Extras(k_frames, real)


def merge(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine attention over disjoint sets of keys into attention over all of them.

    outs: [B, N, heads, D] each. lses: [B, heads, N] each, natural log. Returns both for the union; a part with LSE -inf
    changes nothing. Differentiable. Raises TypeError or ValueError when counts, shapes, dtypes or devices differ.
    """
    for name, given in (("outs", outs), ("lses", lses)):
        if not isinstance(given, (tuple, list)) or not all(isinstance(each, torch.Tensor) for each in given):
            raise TypeError(f"{name} of type {type(given).__name__} must be a sequence of tensors")
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge takes as many outs as lses and at least one, got {len(outs)} and {len(lses)}")
    for number, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _validate.tensor(f"outs[{number}]", out, "[B, N, heads, D]")
        _validate.tensor(f"lses[{number}]", lse, "[B, heads, N]")
        _validate.one_device("outs[0]", outs[0], **{f"outs[{number}]": out, f"lses[{number}]": lse})
        if out.dtype != outs[0].dtype:
            raise TypeError(f"outs[{number}] has dtype {out.dtype}, outs[0] {outs[0].dtype}: they must be equal")
        if out.shape != outs[0].shape:
            raise ValueError(f"outs[{number}] has shape {tuple(out.shape)}, outs[0] {tuple(outs[0].shape)}")
        expected = (out.shape[0], out.shape[2], out.shape[1])
        if tuple(lse.shape) != expected:
            raise ValueError(f"lses[{number}] has shape {tuple(lse.shape)}, expected [B, heads, N] = {expected}")
    return _reference_merge(list(outs), list(lses))


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Grid | Triple,
    mask: Mask | BlockList | Sequence[Mask] = _FULL,
    *,
    device: str | None = None,
    q_region: Region | None = None,
    k_region: Region | None = None,
    k_frames: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    globals_see: str = "all",
    deterministic: bool | None = None,
) -> str:
    """Say which implementation serves a call of ``attention``, and why the others do not.

    Arguments as for ``attention``; tensors may be on the meta device. device: "cpu" or "cuda" to ask for another device
    than q's. Returns a table, one line an implementation. Raises what ``attention`` raises for its arguments.
    """
    problem, extras = _check(q, k, v, grid, mask, q_region, k_region, k_frames, valid, globals_see, None)
    call = _call(q, k, v, problem, extras, _needs_grad(q, k, v), _flags(deterministic, False))
    if device is not None:
        other = _validate.device("device", device, present=False)
        call = call._replace(device=other.type, capability=_capability(other))
    rows = OPERATION.table(call)
    served = next((name for name, reason in rows if reason is None), None)
    width = max(len(name) for name, _ in rows)
    lines = [f"stattn.attention on {call.device}: auto takes {served or 'nothing'}"]
    for name, reason in rows:
        mark = "*" if name == served else " "
        lines.append(f" {mark} {name:<{width}}  {'serves it' if reason is None else reason}")
    return "\n".join(lines)


# --- choice of implementation ----------------------------------------------------------------------------------------


class AttentionCall(NamedTuple):
    """The metadata by which implementations say whether they serve a call."""

    device: str
    capability: tuple[int, int]
    dtype: torch.dtype
    head_dim: int
    heads: int
    key_heads: int
    dense: str | None  # None when every query sees every key, else what stands against it
    lists: bool
    obstacle: str | None  # what in tensors, masks or a needed gradient stands against the CUDA kernels
    ordered: bool  # whether gradients are needed that are bitwise reproducible
    grad: bool = False  # whether gradients are needed


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    problem: Problem,
    extras: Extras,
    grad: bool,
    deterministic: bool,
) -> AttentionCall:
    return AttentionCall(
        q.device.type,
        _capability(q.device),
        q.dtype,
        q.shape[3],
        q.shape[2],
        k.shape[2],
        _not_dense(problem, extras),
        extras.block_index is not None,
        _cuda.obstacle(q, k, v, problem, extras, grad),
        grad and deterministic,
        grad,
    )


def _needs_grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _not_dense(problem: Problem, extras: Extras) -> str | None:
    if extras.block_index is not None:
        return "block lists"
    if any(mask != _FULL for mask in problem.masks):
        return f"mask {next(mask for mask in problem.masks if mask != _FULL)}"
    if extras.k_frames is not None:
        return "k_frames"
    if extras.valid is not None:
        return "valid"
    if problem.globals_see != "all" and problem.grid.globals and problem.q_globals:
        return "globals_see='globals'"
    return None


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda" or not torch.cuda.is_available():
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def _reference_why_not(call: AttentionCall) -> str | None:
    return None


def _no_masks(call: AttentionCall) -> str | None:
    return None if call.dense is None else f"serves dense attention only, the call has {call.dense}"


def _triton_why_not(call: AttentionCall) -> str | None:
    if call.head_dim % 8 or not 16 <= call.head_dim <= 256:
        return f"head dimension {call.head_dim} must be a multiple of 8 from 16 to 256"
    if call.device == "cuda" and call.capability < (8, 0):
        return lacks(call.capability, (8, 0))
    return _triton.why_not(call.device, call.dtype)


def _triton_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    from stattn.kernels import attention_runs as kernels

    return kernels.attention(q, k, v, problem, extras)


def _triton_backward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from stattn.kernels import attention_runs as kernels

    return kernels.attention_backward(*arguments)


OPERATION = Operation(
    "attention",
    tuple(
        {
            "cuda": Implementation("cuda", _cuda.why_not, _cuda.run, _cuda.asked_for),
            "flash": Implementation("flash", lambda call: _no_masks(call) or _dense.flash_why_not(call), _dense.flash),
            "sdpa": Implementation("sdpa", lambda call: _no_masks(call) or _dense.sdpa_why_not(call), _dense.sdpa),
            "triton": Implementation("triton", _triton_why_not, _triton_forward),
            "reference": Implementation("reference", _reference_why_not, _reference_forward),
        }[name]
        for name in ("cuda", *_dense.order(), "triton", "reference")
    ),
)


# --- torch.library ---------------------------------------------------------------------------------------------------

_STATIC = "SymInt[] grid, str mask, SymInt[] boxes, bool q_globals, str globals_see, float scale, int[] tiles"
_EXTRAS = "Tensor? k_frames, Tensor? valid, Tensor? count, Tensor? index, Tensor? partial"
_LIBRARY = torch.library.Library("stattn", "FRAGMENT")
_LIBRARY.define(
    f"attention(Tensor q, Tensor k, Tensor v, {_STATIC}, {_EXTRAS}, bool deterministic, str impl) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    f"attention_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_STATIC}, "
    f"{_EXTRAS}, bool deterministic, str impl) -> (Tensor, Tensor, Tensor)"
)


def _flatten(problem: Problem) -> tuple[Any, ...]:
    """Turn a problem into arguments that a graph can hold; sizes stay symbolic, the mask is its key."""
    grid = problem.grid
    return (
        [grid.t, grid.h, grid.w, grid.before, grid.after],
        "; ".join(mask.key for mask in problem.masks),
        [*problem.q_box.origin, *problem.q_box.extent, *problem.k_box.origin, *problem.k_box.extent],
        problem.q_globals,
        problem.globals_see,
        problem.scale,
        [] if problem.q_tile is None or problem.k_tile is None else [*problem.q_tile, *problem.k_tile],
    )


def _problem(
    grid: Sequence[int],
    mask: str,
    boxes: Sequence[int],
    q_globals: bool,
    globals_see: str,
    scale: float,
    tiles: Sequence[int],
) -> Problem:
    return _rebuild(tuple(grid), mask, tuple(boxes), q_globals, globals_see, scale, tuple(tiles))


@lru_cache(maxsize=1024)
def _rebuild(
    grid: tuple[int, ...],
    mask: str,
    boxes: tuple[int, ...],
    q_globals: bool,
    globals_see: str,
    scale: float,
    tiles: tuple[int, ...],
) -> Problem:
    found = tuple(_masks.parse(key) for key in mask.split("; ") if key)
    q_origin, q_extent, k_origin, k_extent = (_triple(boxes[start : start + 3]) for start in (0, 3, 6, 9))
    q_tile, k_tile = (_triple(tiles[:3]), _triple(tiles[3:])) if tiles else (None, None)
    q_box, k_box = Region(q_origin, q_extent), Region(k_origin, k_extent)
    return Problem(Grid(*grid), found, q_box, k_box, q_globals, globals_see, scale, q_tile, k_tile)


def _triple(values: tuple[int, ...]) -> Triple:
    t, h, w = values
    return t, h, w


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *arguments, deterministic, impl = rest
    problem, extras = _problem(*arguments[:7]), Extras(*arguments[7:])
    chosen = OPERATION.choose(impl, _call(q, k, v, problem, extras, False, deterministic))
    if chosen.name == "flash":
        raise ValueError("impl='flash' is not available under torch.compile; call it eagerly or choose another impl")
    return chosen.run(q, k, v, problem, extras)


def _backward(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *arguments, deterministic, impl = rest
    problem, extras = _problem(*arguments[:7]), Extras(*arguments[7:])
    chosen = OPERATION.choose(impl, _call(q, k, v, problem, extras, True, deterministic))
    if chosen.name == "cuda":
        return _cuda_bwd.run(dout, dlse, q, k, v, out, lse, problem, extras, deterministic)
    backward = {"sdpa": _dense.sdpa_backward, "triton": _triton_backward, "reference": _reference_backward}
    run = backward[chosen.name]
    return run(dout, dlse, q, k, v, out, lse, problem, extras)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.stattn.attention(q, k, v, *rest)
        tensors = rest[7:12]
        ctx.save_for_backward(q, k, v, out, lse, *(x for x in tensors if x is not None))
        ctx.rest = [*rest[:7], *(None if x is None else ... for x in tensors), *rest[12:]]
        ctx.others = len(rest)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        given = iter(tensors)
        rest = [next(given) if each is ... else each for each in ctx.rest]
        grads = torch.ops.stattn.attention_backward(dout, dlse, q, k, v, out, lse, *rest)
        return (*grads, *(None for _ in range(ctx.others)))


class _Direct(_Attention):
    """Calls an implementation without the dispatcher; the backward is the operation."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        known: _memo.Known,
        extras: Extras,
        deterministic: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = known.run(q, k, v, known.problem, extras)
        ctx.save_for_backward(q, k, v, out, lse, *(x for x in extras if x is not None))
        kept = (None if x is None else ... for x in extras)
        ctx.rest = [*known.static, *kept, deterministic, known.name]
        ctx.others = 3
        ctx.set_materialize_grads(False)
        return out, lse


def _autograd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if _needs_grad(q, k, v):
        return _Attention.apply(q, k, v, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.stattn.attention(q, k, v, *rest)


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=lse_dtype)


def _fake_backward(
    dout: torch.Tensor | None, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_LIBRARY.impl("attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention", _autograd, "Autograd")
_LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("stattn::attention", _fake, lib=_LIBRARY)
torch.library.register_fake("stattn::attention_backward", _fake_backward, lib=_LIBRARY)
