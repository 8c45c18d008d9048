"""Named ranges around operations, layers and sampling steps, by which a profiler finds its way. Off by default.

Names are stattn.<operation>, stattn.layer.<i> and stattn.step.<i>, counted from 0. Ranges change no result. Under
torch.compile they are left out, and a CUDA graph has those of its capture only. A program runs with them by

    python -m stattn.ranges -m stattn.cli sample --caption "a red disc moves left" --out clip.mp4
    python -m stattn.ranges script.py --its --options

or by calling `enable` before its first operation: what was chosen for a call may be remembered without its range.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from pathlib import Path
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


def run_program(program: Sequence[str]) -> int:
    """Run ["-m", module, arguments...] or [script, arguments...] as Python would, here; return its exit status.

    sys.argv and sys.path[0] are put back afterwards. What the program raises is passed on.
    """
    module = program[0] == "-m"
    if module and len(program) < 2:
        raise ValueError(f"{list(program)} must name a module behind -m")
    argv, first = sys.argv, sys.path[0]
    sys.argv = list(program[1:] if module else program)
    sys.path[0] = str(Path.cwd()) if module else str(Path(program[0]).resolve().parent)
    try:
        if module:
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    finally:
        sys.argv, sys.path[0] = argv, first
    return 0


if __name__ == "__main__":
    from stattn import ranges  # not this copy of the module, which is __main__

    if len(sys.argv) < 2:
        sys.exit("usage: python -m stattn.ranges (-m MODULE | SCRIPT) [ARGUMENTS...]")
    try:
        ranges.enable()
    except ValueError as error:
        sys.exit(f"stattn.ranges: {error}")
    sys.exit(ranges.run_program(sys.argv[1:]))
