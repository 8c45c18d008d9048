"""Run the Python of a guide, as a reader would type it: ``python tests/guides.py FILE...`` needs nothing but stattn.

Blocks of one file share their names. A block marked text behind one of Python is what that one prints; one marked
``python gpu`` is for a machine with a CUDA device, and only compiled elsewhere.
"""

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

BLOCK = re.compile(r"^```([\w ]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str) -> Iterator[tuple[int, bool, str, str | None]]:
    """List the Python of a guide: the line of each block, whether it is for a GPU, its code, and what it prints."""
    found = list(BLOCK.finditer(text))
    for block, after in itertools.zip_longest(found, found[1:]):
        if block[1] in ("python", "python gpu"):
            says = after is not None and after[1] == "text" and not text[block.end() : after.start()].strip()
            line = text[: block.start()].count("\n") + 1
            yield line, block[1] == "python gpu", block[2], after[2] if after is not None and says else None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run(path: Path) -> int:
    """Run a guide and return how many blocks it has. Raises AssertionError where one prints something else."""
    names: dict[str, object] = {"__name__": "__main__"}
    found = list(blocks(path.read_text(encoding="utf-8")))
    for line, for_gpu, code, says in found:
        out = io.StringIO()
        compiled = compile("\n" * line + code, str(path), "exec")
        if for_gpu and not _has_gpu():
            continue
        with contextlib.redirect_stdout(out):
            exec(compiled, names)
        assert says is None or out.getvalue() == says, f"{path}:{line} prints\n{out.getvalue()}in place of\n{says}"
    return len(found)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: {run(Path(name))} blocks")
