"""What modules and models are told: which implementations compute them, and the mask of their attention."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from stattn.grid import Grid, Triple
from stattn.masks import Mask
from stattn.ops._dispatch import NAMES

STEMS = ("attention", "patchify", "modulate", "gate", "qk_norm_rope", "denoise")

Impl: TypeAlias = str | Mapping[str, str]
Masks: TypeAlias = Mask | Sequence[Mask]


def check_impl(impl: Impl) -> Impl:
    """Return ``impl`` unchanged. Raises TypeError or ValueError when it names no implementation or an unknown stem."""
    if not isinstance(impl, (str, Mapping)):
        raise TypeError(f"impl={impl!r} must be a name or a mapping from stem to name")
    for stem, name in {"*": impl}.items() if isinstance(impl, str) else impl.items():
        if stem != "*" and stem not in STEMS:
            raise ValueError(f"impl has the stem {stem!r}; the stems are {', '.join(STEMS)}, and '*' for the rest")
        if name != "auto" and name not in NAMES:
            raise ValueError(f"impl={name!r} for {stem!r} must be 'auto' or one of {', '.join(NAMES)}")
    return impl


def check_mask(mask: Masks, heads: int) -> Masks:
    """Return ``mask``. Raises TypeError when it is none, ValueError for a sequence of other than ``heads`` masks."""
    if isinstance(mask, Mask):
        return mask
    if not isinstance(mask, Sequence) or not all(isinstance(each, Mask) for each in mask):
        given: object = mask
        hint = "; masks.parse makes one of text" if isinstance(given, str) else ""
        raise TypeError(f"mask={reprlib.repr(mask)} must be a Mask or a sequence of Masks, one per head{hint}")
    if len(mask) != heads:
        raise ValueError(f"mask is a sequence of {len(mask)} masks for {heads} heads; give one per head")
    return mask


def describe_mask(mask: Masks) -> str:
    """Write a mask as text: its key, or the keys of a sequence (once when all are equal)."""
    if isinstance(mask, Mask):
        return mask.key
    keys = [each.key for each in mask]
    return f"{len(keys)} x {keys[0]}" if len(set(keys)) == 1 else f"[{', '.join(keys)}]"


def density(mask: Masks, grid: Grid | Triple) -> float:
    """Give the share of (query, key) pairs that a mask allows, the mean over heads for a sequence."""
    masks = (mask,) if isinstance(mask, Mask) else mask
    return sum(each.density(grid) for each in masks) / len(masks)


def describe_impl(impl: Impl) -> str:
    """Write an implementation, or a mapping from stem to implementation, as text."""
    return impl if isinstance(impl, str) else str(dict(impl))
