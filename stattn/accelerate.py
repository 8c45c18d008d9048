"""Change the mask and the implementations of a whole model, for a while or for good: ``stattn.accelerate``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from stattn import masks
from stattn.grid import Grid, Triple
from stattn.model.layers import Report, check_layers
from stattn.model.settings import Impl, Masks, check_impl, check_mask, density, describe_mask
from stattn.modules import (
    CrossAttention,
    DenoiseStep,
    GatedResidual,
    ModulatedNorm,
    Patchify3D,
    QKNormRope,
    SpaceTimeAttention,
)

if TYPE_CHECKING:
    from stattn.integrations._layers import HostAcceleration

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
    model: nn.Module,
    mask: Masks | None = None,
    impl: Impl | None = None,
    layers: Iterable[int] | None = None,
    *,
    dense_layers: Iterable[int] = (),
    dense_steps: int = 0,
    verify: bool = False,
) -> Acceleration | HostAcceleration:
    """Set the mask and the implementations of a model's space-time attention. No parameter is touched or copied.

    model: one built from stattn's modules, or a video transformer of diffusers (0.42 and later; the supported ones are
    ``stattn.integrations.diffusers.FAMILIES``), whose self-attention is replaced by stattn's. The grid, and where text
    tokens stand and how many there are, follow from its calls; norm and rotation are fused where the result is the
    same.
    mask: a Mask, or one per head. None keeps each layer's own; for a model of diffusers it means dense attention. Text
    and other tokens beside the video are seen by every query and see everything.
    impl: one implementation for all operations, or a mapping from stem to implementation, which changes the stems that
    it lists ("*": all others). None changes nothing.
    layers: numbers of the attention layers to change, in the order of ``model.modules()``; all by default. impl then
    applies to their attention and qk_norm_rope. dense_layers: those of them whose attention stays dense.

    For models of diffusers only: dense_steps: the number of first steps of each video that are dense (a step is a
    change of the timestep, which is read on the host: not inside a compiled transformer). verify: compare dense
    attention with PyTorch's in the first call on each grid, raise RuntimeError where they differ, and report how far
    the mask moves the output.

    Returns a handle: ``undo()`` restores the model, ``report()`` lists the layers (for stattn's own models
    ``report(grid)``, with densities), and ``with accelerate(...):`` undoes at the end. Raises TypeError for a model
    that is not supported and for arguments of the wrong type; ValueError for unknown layers, stems and implementations,
    for a sequence of masks that does not match a layer's heads, and for layers that are accelerated already.
    """
    given: object = model
    if not isinstance(given, nn.Module):
        hint = "; of a pipeline, give its transformer" if hasattr(given, "transformer") else ""
        raise TypeError(f"model of type {type(model).__name__} must be a torch.nn.Module{hint}")
    found = _attention_layers(model)
    if not found:
        if type(getattr(model, "_orig_mod", model)).__module__.startswith("diffusers."):
            from stattn.integrations import diffusers

            return diffusers.accelerate(model, mask, impl, layers, dense_layers, dense_steps, verify)
        raise TypeError(
            f"model is a {type(model).__name__} without a SpaceTimeAttention; build it from stattn's modules, or take "
            "a video transformer of diffusers"
        )
    if dense_steps:
        raise ValueError(f"dense_steps={dense_steps!r}: stattn's own models take it from stattn.sampler")
    if verify:
        raise ValueError("verify=True is for models of diffusers; stattn's own modules have no other attention")
    numbers = list(range(len(found))) if layers is None else check_layers(layers, len(found))
    dense = set(check_layers(dense_layers, len(found), "dense_layers"))
    if not dense <= set(numbers):
        raise ValueError(f"dense_layers has {min(dense - set(numbers))}, which is not among layers={numbers}")
    chosen = [found[each] for each in numbers]
    changes = []
    for number, (name, attention) in zip(numbers, chosen, strict=True):
        wanted = masks.full() if number in dense else mask
        if wanted is not None:
            changes.append(_Change(attention, name, "mask", attention.mask, check_mask(wanted, attention.heads)))
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


def _merge(old: Impl, new: Impl) -> Impl:
    """Return the setting after ``new`` on top of ``old``."""
    if isinstance(new, str) or "*" in new:
        return new if isinstance(new, str) else dict(new)
    named = {"*": old} if isinstance(old, str) else dict(old)
    return {**named, **new}
