"""Floating-point operations of attention, for PyTorch's ``FlopCounterMode``.

A masked call costs the pairs that its mask allows: 4 * D per pair and head forward, 10 * D backward (five products of
matrices, as PyTorch counts its own attention).

>>> with FlopCounterMode(custom_mapping=stattn.flops.formulas()) as counter:
...     model(x)

``register()`` makes every counter know them from then on. The operations around attention are counted by themselves
where they are PyTorch's; their kernels, bound by memory, count as none, except for the products of patchify.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from stattn import masks
from stattn.grid import Grid


def formulas() -> dict[Any, Callable[..., int]]:
    """Map operations to what a call costs, as ``FlopCounterMode(custom_mapping=...)`` takes it."""
    raw: dict[Any, Any] = {
        torch.ops.stattn.attention: attention_flops,
        torch.ops.stattn.attention_backward: attention_backward_flops,
    }
    for formula in raw.values():
        formula._get_raw = True  # the counter's sign for tensors in place of shapes
    return raw


def register() -> None:
    """Add the formulas to PyTorch's registry, for every counter that is created from then on."""
    from torch.utils.flop_counter import flop_registry

    flop_registry.update(formulas())


def attention_flops(q: Any, k: Any, v: Any, *rest: Any, out_val: Any = None, **keywords: Any) -> int:
    """Count the operations of ``torch.ops.stattn.attention``."""
    return 4 * q.shape[3] * q.shape[0] * _pairs(q, k, *rest)


def attention_backward_flops(
    dout: Any, dlse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any, out_val: Any = None, **keywords: Any
) -> int:
    """Count the operations of ``torch.ops.stattn.attention_backward``."""
    return 10 * q.shape[3] * q.shape[0] * _pairs(q, k, *rest)


def _pairs(
    q: Any,
    k: Any,
    grid: Sequence[int],
    mask: str,
    boxes: Sequence[int],
    q_globals: bool,
    globals_see: str,
    scale: float,
    tiles: Sequence[int],
    k_frames: Any = None,
    valid: Any = None,
    count: Any = None,
    *rest: Any,
) -> int:
    """Count the pairs of a query and a key, summed over heads.

    Of block lists, the pairs of the tiles that they name; of a part of the grid, the density of the whole.
    """
    heads, dense = q.shape[2], q.shape[1] * k.shape[1]
    place = Grid(*grid)
    if tiles:
        if count is None or count.device.type == "meta":
            return heads * dense
        named = int(count.sum()) * torch.Size(tiles).numel()
        return named * heads // (count.shape[0] * count.shape[1]) + heads * (dense - place.video**2)
    keys = mask.split("; ")
    return round(sum(masks.parse(key).density(place) for key in keys) / len(keys) * heads * dense)
