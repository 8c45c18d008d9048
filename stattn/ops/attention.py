"""Attention: the public function, its torch.library operations with autograd, and the choice of implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, overload

import torch

from stattn import masks as _masks
from stattn.blocks import BlockList
from stattn.grid import Grid, Region, Triple, as_grid
from stattn.masks import Mask
from stattn.ops import _dense
from stattn.ops._dispatch import Implementation, Operation
from stattn.problem import Extras, Problem
from stattn.reference.attention import attention as _reference_forward
from stattn.reference.attention import attention_backward as _reference_backward
from stattn.reference.attention import merge as _reference_merge

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_FULL = _masks.full()


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Grid | Triple,
    mask: Mask | BlockList | Sequence[Mask] = ...,
    *,
    return_lse: Literal[False] = ...,
    **options: Any,
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Grid | Triple,
    mask: Mask | BlockList | Sequence[Mask] = ...,
    *,
    return_lse: Literal[True],
    **options: Any,
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
    stride are used as they are.

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
    scale: of the scores; 1/sqrt(D) when None.
    deterministic: True asks for a bitwise reproducible backward, False for the fastest, None follows
        ``torch.are_deterministic_algorithms_enabled()``. The forward is always reproducible.
    impl: "auto", or an implementation by name; see ``stattn.explain``.

    Returns the output like q, contiguous, and with return_lse the natural-log LSE [B, heads, Nq] in fp32 (fp64 for
    fp64). Differentiable once in q, k and v, through both results.

    Raises TypeError or ValueError naming the argument and its value.
    """
    problem, extras = _check(q, k, v, grid, mask, q_region, k_region, k_frames, valid, globals_see, scale)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    elif not isinstance(deterministic, bool):
        raise TypeError(f"deterministic={deterministic!r} must be True, False or None")
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse={return_lse!r} must be a boolean")
    if not torch.compiler.is_compiling():
        chosen = OPERATION.choose(impl, _call(q, k, problem, extras))
        if chosen.name == "flash":  # has an autograd of its own
            out, lse = _dense.flash(q, k, v, problem.scale, return_lse)
            return (out, lse) if return_lse else out
        impl = chosen.name
    static = _flatten(problem)
    out, lse = torch.ops.stattn.attention(q, k, v, *static, *extras, bool(deterministic), impl)
    return (out, lse) if return_lse else out


def merge(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine attention over disjoint sets of keys into attention over all of them.

    outs: [B, N, heads, D] each. lses: [B, heads, N] each, natural log. Returns both for the union; a part with LSE -inf
    changes nothing. Differentiable. Raises ValueError when counts or shapes differ.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge takes as many outs as lses and at least one, got {len(outs)} and {len(lses)}")
    for number, (out, lse) in enumerate(zip(outs, lses, strict=True)):
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
) -> str:
    """Say which implementation serves a call of ``attention``, and why the others do not.

    Arguments as for ``attention``; tensors may be on the meta device. device: "cpu" or "cuda" to ask for another device
    than q's. Returns a table, one line an implementation.
    """
    problem, extras = _check(q, k, v, grid, mask, q_region, k_region, k_frames, valid, globals_see, None)
    call = _call(q, k, problem, extras)
    if device is not None:
        call = call._replace(device=torch.device(device).type, capability=_capability(torch.device(device)))
    rows = OPERATION.table(call)
    served = next((name for name, reason in rows if reason is None), None)
    width = max(len(name) for name, _ in rows)
    lines = [f"stattn.attention on {call.device}: auto takes {served or 'nothing'}"]
    for name, reason in rows:
        mark = "*" if name == served else " "
        lines.append(f" {mark} {name:<{width}}  {'serves it' if reason is None else reason}")
    return "\n".join(lines)


# --- checking --------------------------------------------------------------------------------------------------------


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Grid | Triple,
    mask: Mask | BlockList | Sequence[Mask],
    q_region: Region | None,
    k_region: Region | None,
    k_frames: torch.Tensor | None,
    valid: torch.Tensor | None,
    globals_see: str,
    scale: float | None,
) -> tuple[Problem, Extras]:
    """Check every argument and give the problem. Raises TypeError or ValueError naming the argument and its value."""
    grid = as_grid(grid)
    _check_tensors(q, k, v)
    if globals_see not in ("all", "globals"):
        raise ValueError(f"globals_see={globals_see!r} must be 'all' or 'globals'")
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    elif not isinstance(scale, (int, float)) or isinstance(scale, bool) or not math.isfinite(scale):
        raise ValueError(f"scale={scale!r} must be a finite number")
    q_box = _box("q_region", q_region, grid)
    k_box = _box("k_region", k_region, grid)
    if k_frames is not None:
        k_box = _slots(k_frames, k_box, grid, q.device)
    q_globals = True
    if q.shape[1] != q_box.video + grid.globals:
        q_globals = False
        if q.shape[1] != q_box.video:
            raise ValueError(_count_error("q", q.shape[1], q_box, grid, optional=True))
    if k.shape[1] != k_box.video + grid.globals:
        raise ValueError(_count_error("k", k.shape[1], k_box, grid, optional=False))
    real = None if valid is None else _valid(valid, q.shape[0], grid, q.device)

    if isinstance(mask, BlockList):
        if q_region is not None or k_region is not None or k_frames is not None:
            raise ValueError("mask: block lists take the whole grid, without q_region, k_region or k_frames")
        _check_lists(mask, q, grid)
        found = (mask.mask,) if mask.mask is not None else ()
        problem = Problem(grid, found, q_box, k_box, q_globals, globals_see, float(scale), mask.q_tile, mask.k_tile)
        return problem, Extras(None, real, mask.count, mask.index, mask.partial)
    problem = Problem(grid, _masks_of(mask, q.shape[2]), q_box, k_box, q_globals, globals_see, float(scale))
    return problem, Extras(k_frames, real)


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}={type(x).__name__} must be a tensor")
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected four dimensions [B, N, heads, D]")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}, expected bfloat16, float16, float32 or float64")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}, q {q.dtype}: they must be equal")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}: they must be on one device")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has a batch of {x.shape[0]}, q of {q.shape[0]}: they must be equal")
        if x.shape[3] != q.shape[3]:
            raise ValueError(f"{name} has head dimension {x.shape[3]}, q {q.shape[3]}: they must be equal")
        if x.shape[3] > 1 and x.numel() and x.stride(3) != 1:
            raise ValueError(f"{name} has strides {tuple(x.stride())}: the last must be 1")
    if q.shape[3] < 1:
        raise ValueError(f"q has head dimension {q.shape[3]}, expected at least 1")
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}, k {tuple(k.shape)}: tokens and heads must be equal")
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads, which do not divide q's {q.shape[2]}")


def _box(name: str, region: Region | None, grid: Grid) -> Region:
    if region is None:
        return _whole_box(grid)
    if not isinstance(region, Region):
        raise TypeError(f"{name}={region!r} must be a Region")
    region.check(grid, name)
    return region


def _whole_box(grid: Grid) -> Region:
    return Region((0, 0, 0), grid.shape)


def _slots(k_frames: torch.Tensor, k_box: Region, grid: Grid, device: torch.device) -> Region:
    if not isinstance(k_frames, torch.Tensor) or k_frames.dtype != torch.int32 or k_frames.ndim != 1:
        raise TypeError(f"k_frames={k_frames!r} must be an int32 tensor [slots]")
    if k_frames.device != device:
        raise ValueError(f"k_frames is on {k_frames.device}, q on {device}: they must be on one device")
    if k_frames.shape[0] < 1:
        raise ValueError("k_frames has no slots, expected at least one")
    if k_box.origin[0] != 0 or k_box.extent[0] != grid.t:
        raise ValueError(f"k_region={k_box} must span all {grid.t} frames beside k_frames")
    return Region((0, *k_box.origin[1:]), (k_frames.shape[0], *k_box.extent[1:]))


def _count_error(name: str, tokens: int, box: Region, grid: Grid, optional: bool) -> str:
    t, h, w = box.extent
    expected = f"{t}*{h}*{w} = {box.video}"
    if grid.globals:
        expected += f" video and {grid.before} + {grid.after} global tokens"
        expected += ", or the video tokens alone" if optional else ""
    return f"{name} has {tokens} tokens, but its part of grid {grid.shape} has {expected}"


def _valid(valid: torch.Tensor, batch: int, grid: Grid, device: torch.device) -> torch.Tensor:
    if not isinstance(valid, torch.Tensor):
        raise TypeError(f"valid={valid!r} must be a tensor")
    if valid.device != device:
        raise ValueError(f"valid is on {valid.device}, q on {device}: they must be on one device")
    if valid.dtype == torch.bool:
        if tuple(valid.shape) != (batch, grid.globals):
            raise ValueError(
                f"valid has shape {tuple(valid.shape)}, expected [B, before + after] = {(batch, grid.globals)}"
            )
        return valid
    if valid.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"valid has dtype {valid.dtype}, expected bool, or int32 or int64 counts")
    if tuple(valid.shape) != (batch,):
        raise ValueError(f"valid has shape {tuple(valid.shape)}, expected counts [B] = {(batch,)}")
    if grid.before and grid.after:
        raise ValueError(
            f"valid: counts are ambiguous with {grid.before} global tokens before and {grid.after} after; give booleans"
        )
    if valid.device.type == "cpu" and batch and not torch.compiler.is_compiling():
        low, high = int(valid.min()), int(valid.max())
        if low < 0 or high > grid.globals:
            raise ValueError(f"valid has counts from {low} to {high}, expected 0 to {grid.globals} global tokens")
    return torch.arange(grid.globals, device=device) < valid[:, None]


def _masks_of(mask: Mask | Sequence[Mask], heads: int) -> tuple[Mask, ...]:
    if isinstance(mask, Mask):
        return (mask,)
    if not isinstance(mask, (tuple, list)) or not all(isinstance(each, Mask) for each in mask):
        raise TypeError(f"mask={mask!r} must be a Mask, a BlockList or a sequence of Masks")
    if len(mask) != heads:
        raise ValueError(f"mask is a sequence of {len(mask)} masks, q has {heads} heads: one mask per head")
    return tuple(mask)


def _check_lists(blocks: BlockList, q: torch.Tensor, grid: Grid) -> None:
    if blocks.shape != grid.shape:
        raise ValueError(f"mask: the block lists are for a grid of {blocks.shape}, the call's is {grid.shape}")
    if blocks.index.device != q.device:
        raise ValueError(
            f"mask: the block lists are on {blocks.index.device}, q on {q.device}: they must be on one device"
        )
    for axis, name, size in ((0, "batch", q.shape[0]), (1, "heads", q.shape[2])):
        if blocks.count.shape[axis] not in (1, size):
            raise ValueError(f"mask: the block lists are for {name} of {blocks.count.shape[axis]}, q has {size}")


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


def _call(q: torch.Tensor, k: torch.Tensor, problem: Problem, extras: Extras) -> AttentionCall:
    return AttentionCall(
        q.device.type,
        _capability(q.device),
        q.dtype,
        q.shape[3],
        q.shape[2],
        k.shape[2],
        _not_dense(problem, extras),
        extras.index is not None,
    )


def _not_dense(problem: Problem, extras: Extras) -> str | None:
    if extras.index is not None:
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


OPERATION = Operation(
    "attention",
    tuple(
        {
            "flash": Implementation("flash", lambda call: _no_masks(call) or _dense.flash_why_not(call), _dense.flash),
            "sdpa": Implementation("sdpa", lambda call: _no_masks(call) or _dense.sdpa_why_not(call), _dense.sdpa),
            "reference": Implementation("reference", _reference_why_not, _reference_forward),
        }[name]
        for name in (*_dense.order(), "reference")
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
    q_box, k_box = Region(boxes[:3], boxes[3:6]), Region(boxes[6:9], boxes[9:])  # type: ignore[arg-type]
    q_tile, k_tile = (tiles[:3], tiles[3:]) if tiles else (None, None)
    return Problem(Grid(*grid), found, q_box, k_box, q_globals, globals_see, scale, q_tile, k_tile)  # type: ignore[arg-type]


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *rest, _, impl = rest
    problem, extras = _problem(*rest[:7]), Extras(*rest[7:])
    chosen = OPERATION.choose(impl, _call(q, k, problem, extras))
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
    *rest, deterministic, impl = rest
    problem, extras = _problem(*rest[:7]), Extras(*rest[7:])
    chosen = OPERATION.choose(impl, _call(q, k, problem, extras))
    run = {"sdpa": _dense.sdpa_backward, "reference": _reference_backward}[chosen.name]
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
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        given = iter(tensors)
        rest = [next(given) if each is ... else each for each in ctx.rest]
        grads = torch.ops.stattn.attention_backward(dout, dlse, q, k, v, out, lse, *rest)
        return (*grads, *(None for _ in rest))


def _autograd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
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
