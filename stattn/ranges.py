"""Named ranges around operations, layers and sampling steps, by which a profiler finds its way. Off by default.

Names are stattn.<operation>, stattn.layer.<i> and stattn.step.<i>, counted from 0. Ranges change no result. Under
torch.compile they are left out, and a CUDA graph has those of its capture only. `python -m stattn.with_ranges` runs a
program with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch

T = TypeVar("T")
PREFIX = "stattn."
KINDS = ("nvtx", "record")

_open: Callable[[str], AbstractContextManager[Any]] | None = None


def enable(kind: str = "nvtx") -> None:
    """Switch ranges on. kind: "nvtx" for Nsight's tools, "record" for torch.profiler.

    Raises ValueError for another kind, and for "nvtx" where this build of torch has none.
    """
    global _open
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    if kind == "nvtx" and torch.version.cuda is None:
        raise ValueError(f"kind={kind!r}: this build of torch has no CUDA, and so no NVTX")
    _open = torch.cuda.nvtx.range if kind == "nvtx" else torch.profiler.record_function


def disable() -> None:
    """Switch ranges off."""
    global _open
    _open = None


def enabled() -> bool:
    """Say whether ranges are on and can be opened here, outside of what torch.compile traces."""
    return _open is not None and not torch.compiler.is_compiling()


def span(name: str) -> AbstractContextManager[Any]:
    """Return a context: the range stattn.<name> while ranges are on."""
    return nullcontext() if _open is None else _open(PREFIX + name)


def around(name: str, call: Callable[..., T]) -> Callable[..., T]:
    """Return the same callable within the range stattn.<name>."""

    @wraps(call)
    def ranged(*args: Any, **keywords: Any) -> T:
        with span(name):
            return call(*args, **keywords)

    return ranged


def each(name: str, items: Iterable[T]) -> Iterable[T]:
    """Iterate over items, the loop's body in the range stattn.<name>.<i>; off, this returns ``items`` itself."""
    return _each(name, items) if enabled() else items


def _each(name: str, items: Iterable[T]) -> Iterator[T]:
    for number, item in enumerate(items):
        with span(f"{name}.{number}"):
            yield item
