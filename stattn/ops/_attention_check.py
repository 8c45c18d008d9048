"""What a call of attention must satisfy: every argument checked, and the problem that implementations receive."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from stattn.blocks import BlockList
from stattn.grid import Grid, Region, Triple, as_grid
from stattn.masks import Mask
from stattn.ops import _validate
from stattn.problem import Extras, Problem

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check(
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
    else:
        scale = _validate.number("scale", scale)
    q_box = _box("q_region", q_region, grid)
    k_box = _box("k_region", k_region, grid)
    if k_frames is not None:
        k_box = _slots(k_frames, k_box, grid, q.device)
    q_globals = True
    if q.shape[1] != q_box.video + grid.globals:
        q_globals = False
        if q.shape[1] != q_box.video:
            raise ValueError(_count_error("q", q, q_box, grid, optional=True))
    if k.shape[1] != k_box.video + grid.globals:
        raise ValueError(_count_error("k", k, k_box, grid, optional=False))
    real = None
    if valid is not None:
        _check_valid(valid, q.shape[0], grid, q.device)
        real = real_globals(valid, grid)

    if isinstance(mask, BlockList):
        if q_region is not None or k_region is not None or k_frames is not None:
            raise ValueError("mask: block lists take the whole grid, without q_region, k_region or k_frames")
        _check_lists(mask, q, grid)
        partial = () if mask.mask is None else (mask.mask,)
        _check_fit(partial, grid)
        problem = Problem(grid, partial, q_box, k_box, q_globals, globals_see, scale, mask.q_tile, mask.k_tile)
        return problem, Extras(None, real, mask.count, mask.index, mask.partial)
    found = _masks_of(mask, q.shape[2])
    _check_fit(found, grid)
    problem = Problem(grid, found, q_box, k_box, q_globals, globals_see, scale)
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
        return Region((0, 0, 0), grid.shape)
    if not isinstance(region, Region):
        raise TypeError(f"{name}={region!r} must be a Region")
    region.check(grid, name)
    return region


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


def _count_error(name: str, x: torch.Tensor, box: Region, grid: Grid, optional: bool) -> str:
    t, h, w = box.extent
    expected = f"{t}*{h}*{w} = {box.video}"
    if grid.globals:
        expected += f" video and {grid.before} + {grid.after} global tokens"
        expected += ", or the video tokens alone" if optional else ""
    error = f"{name} has {x.shape[1]} tokens, but its part of grid {grid.shape} has {expected}"
    if x.shape[2] == box.video + grid.globals:
        error += f"; {name} is [B, N, heads, D]: transpose(1, 2) makes that of [B, heads, N, D], at no cost"
    return error


def _check_valid(valid: torch.Tensor, batch: int, grid: Grid, device: torch.device) -> None:
    """Check all of ``valid`` but its values."""
    if not isinstance(valid, torch.Tensor):
        raise TypeError(f"valid={valid!r} must be a tensor")
    if valid.device != device:
        raise ValueError(f"valid is on {valid.device}, q on {device}: they must be on one device")
    if valid.dtype == torch.bool:
        if tuple(valid.shape) != (batch, grid.globals):
            raise ValueError(
                f"valid has shape {tuple(valid.shape)}, expected [B, before + after] = {(batch, grid.globals)}"
            )
        return
    if valid.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"valid has dtype {valid.dtype}, expected bool, or int32 or int64 counts")
    if tuple(valid.shape) != (batch,):
        raise ValueError(f"valid has shape {tuple(valid.shape)}, expected counts [B] = {(batch,)}")
    if grid.before and grid.after:
        raise ValueError(
            f"valid: counts are ambiguous with {grid.before} global tokens before and {grid.after} after; give booleans"
        )


def real_globals(valid: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Give ``valid`` as booleans [B, before + after]. Raises ValueError for counts out of range, if on a CPU."""
    if valid.dtype == torch.bool:
        return valid
    if valid.device.type == "cpu" and valid.shape[0] and not torch.compiler.is_compiling():
        low, high = int(valid.min()), int(valid.max())
        if low < 0 or high > grid.globals:
            raise ValueError(f"valid has counts from {low} to {high}, expected 0 to {grid.globals} global tokens")
    return torch.arange(grid.globals, device=valid.device) < valid[:, None]


def _masks_of(mask: Mask | Sequence[Mask], heads: int) -> tuple[Mask, ...]:
    if isinstance(mask, Mask):
        return (mask,)
    if not isinstance(mask, (tuple, list)) or not all(isinstance(each, Mask) for each in mask):
        raise TypeError(f"mask={mask!r} must be a Mask, a BlockList or a sequence of Masks")
    if len(mask) != heads:
        raise ValueError(f"mask is a sequence of {len(mask)} masks, q has {heads} heads: one mask per head")
    return tuple(mask)


def _check_fit(found: tuple[Mask, ...], grid: Grid) -> None:
    """Raise ValueError when a mask does not fit the grid; in a compiled call the operation itself raises it."""
    if not torch.compiler.is_compiling():
        for mask in found:
            mask.pack(grid)


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
