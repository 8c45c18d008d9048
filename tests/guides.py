"""Run the Python of a guide, as a reader would type it: ``python tests/guides.py FILE...`` needs nothing but stattn.

Blocks of one file share their names. A block marked text behind one of Python is what that one prints.
"""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str) -> Iterator[tuple[int, str, str | None]]:
    """List the Python of a guide: the line on which each block begins, its code, and what it prints if that is said."""
    found = list(BLOCK.finditer(text))
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block[1] == "python":
            says = after is not None and after[1] == "text" and not text[block.end() : after.start()].strip()
            yield text[: block.start()].count("\n") + 1, block[2], after[2] if after is not None and says else None


def run(path: Path) -> int:
    """Run a guide and return how many blocks it has. Raises AssertionError where one prints something else."""
    names: dict[str, object] = {"__name__": "__main__"}
    number = 0
    for number, (line, code, says) in enumerate(blocks(path.read_text(encoding="utf-8")), 1):  # noqa: B007
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * line + code, str(path), "exec"), names)
        assert says is None or out.getvalue() == says, f"{path}:{line} prints\n{out.getvalue()}in place of\n{says}"
    return number


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: {run(Path(name))} blocks ran")
