"""Run a Python program with ranges for Nsight's tools around what stattn does.

    python -m stattn.with_ranges -m stattn.cli sample --caption "a red disc moves left" --out clip.mp4
    python -m stattn.with_ranges script.py --its --options

``stattn.ranges`` says what is marked.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from stattn import ranges


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


def main(program: Sequence[str]) -> int:
    """Switch ranges on, run the program, and return its exit status."""
    if not program:
        print("usage: python -m stattn.with_ranges (-m MODULE | SCRIPT) [ARGUMENTS...]", file=sys.stderr)
        return 2
    try:
        ranges.enable()
    except ValueError as error:
        print(f"stattn.with_ranges: {error}", file=sys.stderr)
        return 1
    return run_program(program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
