"""Attention: the public functions, and the torch.library operations with autograd."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, overload

import torch

from stattn import masks as _masks
from stattn.blocks import BlockList
from stattn.grid import Grid, Region, Triple, is_int
from stattn.masks import Mask
from stattn.ops import _attention_memo as _memo
from stattn.ops import _cuda, _cuda_bwd, _dense, _validate
from stattn.ops._attention_check import check as _check
from stattn.ops._attention_check import real_globals as _real_globals
from stattn.ops._attention_choice import OPERATION, call_of, needs_grad
from stattn.ops._dispatch import capability_of
from stattn.problem import Extras, Problem
from stattn.reference.attention import attention_backward as _reference_backward
from stattn.reference.attention import merge as _reference_merge

_FULL = _masks.full()
_is_compiling = torch.compiler.is_compiling


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
    stride are used as they are. Numbers must be finite: a NaN or an infinity in a token of k or v may reach queries
    that do not see it, as 0 times itself. Invalid global tokens and empty slots may hold anything, but for gradients
    by ``cuda``, which ask for finite numbers there as well.

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
        fastest, None follows ``torch.are_deterministic_algorithms_enabled()``. On Hopper True costs 10 to 30 % of a
        backward's time, and under masks saves its memory for sums of dQ in fp32. The forward is always reproducible.
    impl: "auto", or an implementation by name; see ``stattn.explain``.

    Returns the output like q, contiguous, and with return_lse the natural-log LSE [B, heads, Nq] in fp32 (fp64 for
    fp64). Differentiable once in q, k and v, through both results.

    Raises TypeError or ValueError naming the argument and its value.
    """
    if _is_compiling():
        problem, extras = _check(q, k, v, grid, mask, q_region, k_region, k_frames, valid, globals_see, scale)
        deterministic = _flags(deterministic, return_lse)
        out, lse = torch.ops.stattn.attention(q, k, v, *_flatten(problem), *extras, deterministic, impl)
        return (out, lse) if return_lse else out

    deterministic = _flags(deterministic, return_lse)
    frame = _memo.frame(grid, mask, q_region, k_region, valid is not None, globals_see, scale, impl, deterministic)
    known, places = (None, None) if frame is None or k_frames is not None else _memo.recall(frame, q, k, v, valid)
    if known is not None:
        extras = _memo.NO_EXTRAS if valid is None else _extras(known.problem, mask, None, valid)
        direct = True
    else:
        signature = None if frame is None else _memo.signature(frame, q, k, v, k_frames, valid)
        known = None if signature is None else _memo.find(signature)
        if known is not None:
            extras = _extras(known.problem, mask, k_frames, valid)
        else:
            problem, extras = _check(q, k, v, grid, mask, q_region, k_region, k_frames, valid, globals_see, scale)
            known = _found(q, k, v, problem, extras, impl, deterministic, signature is not None)
        direct = known.direct and _memo.nobody_looks(q.device, known.grad)
        # Whether Triton's interpreter is on is for the environment to say, each time.
        if signature is not None and not (known.name == "triton" and q.device.type == "cpu"):
            _memo.keep(signature, known)
            if direct and frame is not None and k_frames is None and not isinstance(mask, BlockList):
                _memo.remember(frame, known, q, k, v, valid)
    if known.name == "flash":  # has an autograd of its own
        return _dense.flash(q, k, v, known.problem.scale, return_lse)
    if not direct:
        out, lse = torch.ops.stattn.attention(q, k, v, *known.static, *extras, deterministic, known.name)
    elif known.grad:
        out, lse = _apply_direct(q, k, v, known, extras, deterministic, places)
    elif known.launch is not None:
        out, lse = known.launch(places or _memo.places_of(q, k, v), extras.valid, return_lse, deterministic)
    elif known.run is _cuda.run:  # whose operations have nothing to do with autograd
        if not return_lse:
            return _cuda.output(q, k, v, known.problem, extras)
        out, lse = known.run(q, k, v, known.problem, extras)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = known.run(q, k, v, known.problem, extras)
    return (out, lse) if return_lse else out


def _found(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    problem: Problem,
    extras: Extras,
    impl: str,
    deterministic: bool,
    plain: bool,
) -> _memo.Known:
    """Choose what serves a checked call. plain: whether its tensors may be seen by the memo."""
    grad = needs_grad(q, k, v)
    chosen = OPERATION.choose(impl, call_of(q, k, v, problem, extras, grad, deterministic))
    direct = plain and _memo.direct(q, k, v, *extras)
    launch = _cuda.launch_for(q, k, v, problem, extras) if direct and chosen.run is _cuda.run else None
    return _memo.Known(problem, _flatten(problem), chosen.name, chosen.run, direct, grad, launch)


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
    capability: tuple[int, int] | None = None,
    q_region: Region | None = None,
    k_region: Region | None = None,
    k_frames: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    globals_see: str = "all",
    deterministic: bool | None = None,
) -> str:
    """Say which implementation serves a call of ``attention``, and why the others do not.

    Arguments as for ``attention``; tensors may be on the meta device. device: "cpu" or "cuda" to ask for another device
    than q's. capability: the compute capability of a GPU to ask for, as (9, 0), which this machine need not have.
    Returns a table, one line an implementation. Raises what ``attention`` raises for its arguments, and ValueError for
    a capability beside another device.
    """
    problem, extras = _check(q, k, v, grid, mask, q_region, k_region, k_frames, valid, globals_see, None)
    call = call_of(q, k, v, problem, extras, needs_grad(q, k, v), _flags(deterministic, False))
    if device is not None:
        other = _validate.device("device", device, present=False)
        call = call._replace(device=other.type, capability=capability_of(other))
    if capability is not None:
        pair = isinstance(capability, tuple) and len(capability) == 2
        if not pair or not all(is_int(number) and number >= 0 for number in capability):
            raise ValueError(f"capability={capability!r} must be a pair of integers, as (9, 0)")
        if device is not None and call.device != "cuda":
            raise ValueError(f"capability={capability} is that of a GPU, device={device!r} is none")
        call = call._replace(device="cuda", capability=capability)
    rows = OPERATION.table(call)
    served = next((name for name, reason in rows if reason is None), None)
    width = max(len(name) for name, _ in rows)
    where = call.device if capability is None else f"a GPU of capability {capability[0]}.{capability[1]}"
    lines = [f"stattn.attention on {where}: auto takes {served or 'nothing'}"]
    for name, reason in rows:
        mark = "*" if name == served else " "
        lines.append(f" {mark} {name:<{width}}  {'serves it' if reason is None else reason}")
    return "\n".join(lines)


# torch.library.

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
    q_origin, q_extent, k_origin, k_extent = (_validate.unpack(boxes[start : start + 3]) for start in (0, 3, 6, 9))
    q_tile, k_tile = (_validate.unpack(tiles[:3]), _validate.unpack(tiles[3:])) if tiles else (None, None)
    q_box, k_box = Region(q_origin, q_extent), Region(k_origin, k_extent)
    return Problem(Grid(*grid), found, q_box, k_box, q_globals, globals_see, scale, q_tile, k_tile)


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *arguments, deterministic, impl = rest
    problem, extras = _problem(*arguments[:7]), Extras(*arguments[7:])
    chosen = OPERATION.choose(impl, call_of(q, k, v, problem, extras, False, deterministic))
    if chosen.name == "flash":
        raise ValueError("impl='flash' is not available under torch.compile; call it eagerly or choose another impl")
    return chosen.run(q, k, v, problem, extras)


def _triton_backward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from stattn.kernels import attention_runs as kernels

    return kernels.attention_backward(*arguments)


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
    chosen = OPERATION.choose(impl, call_of(q, k, v, problem, extras, True, deterministic))
    if chosen.name == "cuda":
        return _cuda_bwd.run(dout, dlse, q, k, v, out, lse, problem, extras, deterministic)
    backward = {"sdpa": _dense.sdpa_backward, "triton": _triton_backward, "reference": _reference_backward}
    run = backward[chosen.name]
    return run(dout, dlse, q, k, v, out, lse, problem, extras)


def _gradients(
    saved: Sequence[torch.Tensor], rest: Sequence[Any], dout: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Call the backward's operation. rest: its arguments behind the LSE, ``...`` for a tensor that was saved."""
    q, k, v, out, lse, *tensors = saved
    given = iter(tensors)
    rest = [next(given) if each is ... else each for each in rest]
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.stattn.attention_backward(
        dout, dlse, q, k, v, out, lse, *rest
    )
    return grads


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
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return (*_gradients(ctx.saved_tensors, ctx.rest, dout, dlse), *(None for _ in ctx.rest))


class _Direct(torch.autograd.Function):
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
        places: _memo.Places | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if known.launch is not None:
            out, lse = known.launch(places or _memo.places_of(q, k, v), extras.valid, True, deterministic)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                out, lse = known.run(q, k, v, known.problem, extras)
        if extras is _memo.NO_EXTRAS:
            ctx.save_for_backward(q, k, v, out, lse)
            kept: Sequence[Any] = extras
        else:
            ctx.save_for_backward(q, k, v, out, lse, *(x for x in extras if x is not None))
            kept = [None if x is None else ... for x in extras]
        ctx.call = known, kept, deterministic
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        known, kept, deterministic = ctx.call
        grads = _gradients(ctx.saved_tensors, [*known.static, *kept, deterministic, known.name], dout, dlse)
        return *grads, None, None, None, None


# Past what torch.autograd.Function looks after in Python, which is for transforms: there are none where nobody looks.
_apply_direct = super(torch.autograd.Function, _Direct).apply


def _autograd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if needs_grad(q, k, v):
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
