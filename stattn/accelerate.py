"""Change the mask and the implementations of a whole model, for a while or for good: ``stattn.accelerate``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

from stattn.grid import Grid, Triple
from stattn.modules import (
    CrossAttention,
    DenoiseStep,
    GatedResidual,
    Impl,
    Masks,
    ModulatedNorm,
    Patchify3D,
    QKNormRope,
    SpaceTimeAttention,
    check_impl,
    check_mask,
    density,
    describe_mask,
)

_MODULES = (Patchify3D, SpaceTimeAttention, CrossAttention, ModulatedNorm, GatedResidual, QKNormRope, DenoiseStep)
_ATTENTION_STEMS = ("attention", "qk_norm_rope")


@dataclass(frozen=True)
class LayerReport:
    """One SpaceTimeAttention of a model: its settings, and the share of pairs its mask allows, None without a grid."""

    layer: int
    name: str
    heads: int
    mask: str
    density: float | None
    impl: str


class Report(tuple[LayerReport, ...]):
    """The attention layers of a model; prints as a table."""

    def __str__(self) -> str:
        rows = [("layer", "name", "heads", "mask", "density", "impl")]
        for each in self:
            share = "-" if each.density is None else f"{each.density:.2%}"
            rows.append((str(each.layer), each.name, str(each.heads), each.mask, share, each.impl))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


@dataclass(frozen=True)
class _Change:
    module: nn.Module
    name: str
    attribute: str
    before: Any
    after: Any


class Acceleration:
    """What `accelerate` changed on a model: a handle that undoes it. As a context manager it undoes on leaving."""

    def __init__(self, model: nn.Module, changes: list[_Change]):
        self._model = model
        self._changes = changes
        for each in changes:
            setattr(each.module, each.attribute, each.after)

    def undo(self) -> None:
        """Put every setting back. A second call changes nothing.

        Raises RuntimeError, and changes nothing, when a setting was changed since: undo the later handle first.
        """
        for each in self._changes:
            if getattr(each.module, each.attribute) is not each.after:
                raise RuntimeError(f"{each.name}.{each.attribute} was changed since; undo the later change first")
        for each in self._changes:
            setattr(each.module, each.attribute, each.before)
        self._changes = []

    def report(self, grid: Grid | Triple | None = None) -> Report:
        """List the model's attention layers as they are now. grid: of tokens, for densities."""
        return Report(
            LayerReport(
                layer,
                name,
                module.heads,
                describe_mask(module.mask),
                None if grid is None else density(module.mask, grid),
                module.impl if isinstance(module.impl, str) else str(dict(module.impl)),
            )
            for layer, (name, module) in enumerate(_attention_layers(self._model))
        )

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def accelerate(
    model: nn.Module, mask: Masks | None = None, impl: Impl | None = None, layers: Iterable[int] | None = None
) -> Acceleration:
    """Set the mask and the implementations of a model built from stattn's modules. No parameter is touched or copied.

    mask: for every SpaceTimeAttention, a Mask or one per head; None keeps each layer's own. impl: an implementation for
    all operations, or a mapping from stem to name, which changes the stems that it lists ("*": all others); None keeps.
    layers: numbers of the attention layers to change, in the order of ``model.modules()``, all by default; impl then
    means their attention and qk_norm_rope.

    Returns a handle: ``undo()`` restores, ``report(grid)`` lists the layers, and ``with accelerate(...):`` undoes at
    the end. Raises TypeError for a model without SpaceTimeAttention and for arguments of the wrong type, ValueError for
    unknown layers, stems and implementations, and for a sequence of masks that does not match a layer's heads.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model of type {type(model).__name__} must be a torch.nn.Module")
    found = _attention_layers(model)
    if not found:
        raise TypeError(
            f"model is a {type(model).__name__} without a SpaceTimeAttention; build it from stattn's modules"
        )
    chosen = found if layers is None else [found[each] for each in _check_layers(layers, len(found))]
    changes = []
    if mask is not None:
        for name, attention in chosen:
            changes.append(_Change(attention, name, "mask", attention.mask, check_mask(mask, attention.heads)))
    if impl is not None:
        check_impl(impl)
        others = [stem for stem in impl if stem not in (*_ATTENTION_STEMS, "*")] if isinstance(impl, Mapping) else []
        if layers is not None and others:
            raise ValueError(f"impl names {', '.join(others)}, but layers={layers!r} selects attention layers only")
        targets = (
            chosen if layers is not None else [(n, m) for n, m in model.named_modules() if isinstance(m, _MODULES)]
        )
        changes += [_Change(m, name, "impl", m.impl, _merge(m.impl, impl)) for name, m in targets]
    return Acceleration(model, changes)


def _attention_layers(model: nn.Module) -> list[tuple[str, SpaceTimeAttention]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SpaceTimeAttention)]


def _check_layers(layers: Iterable[int], count: int) -> list[int]:
    numbers = list(layers)
    for each in numbers:
        if isinstance(each, bool) or not isinstance(each, int):
            raise TypeError(f"layers has {each!r}; layers are integers")
        if not 0 <= each < count:
            raise ValueError(f"layers has {each}; the model has attention layers 0 to {count - 1}")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"layers={numbers} names a layer twice")
    return numbers


def _merge(old: Impl, new: Impl) -> Impl:
    """Return the setting after ``new`` on top of ``old``."""
    if isinstance(new, str) or "*" in new:
        return new if isinstance(new, str) else dict(new)
    named = {"*": old} if isinstance(old, str) else dict(old)
    return {**named, **new}
