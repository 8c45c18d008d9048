"""Layers of a model by their numbers, and reports about them: what handles of accelerated models share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any


class Report(tuple[Any, ...]):
    """The attention layers of a model, a record each; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no layers"
        names = [field.name for field in fields(self[0])]
        rows = [names, *([_cell(getattr(each, name)) for name in names] for each in self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if isinstance(value, float) else str(value)


def check_layers(layers: Iterable[int], count: int, argument: str = "layers") -> list[int]:
    """Return layer numbers as a list. Raises TypeError or ValueError naming the one that is none, or is there twice."""
    given: object = layers
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{argument}={layers!r} must list numbers of layers")
    numbers = list(layers)
    for each in numbers:
        if isinstance(each, bool) or not isinstance(each, int):
            raise TypeError(f"{argument} has {each!r}; layers are integers")
        if not 0 <= each < count:
            raise ValueError(f"{argument} has {each}; the model has attention layers 0 to {count - 1}")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{argument}={numbers} names a layer twice")
    return numbers
