"""Plant small bugs, one at a time, in a copy of the tree and see that the tests named beside them turn red.

    python tests/planted_bugs.py [--only NAME] [--list]

A bug replaces text that must be found exactly once. First all named tests must pass in an unchanged copy. Exits with 1
when a bug is not seen, or when its tests end in anything but failures.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bugs import BUGS, Bug

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("stattn", "kernels", "tests", "pyproject.toml")


def planted(bug: Bug, root: Path = ROOT) -> str:
    """Return the text of the file with the bug in it. Raises ValueError unless its place is found exactly once."""
    text = (root / bug.path).read_text(encoding="utf-8")
    found = text.count(bug.old)
    if found != 1:
        raise ValueError(f"{bug.name}: the text to replace is found {found} times in {bug.path}:\n{bug.old}")
    return text.replace(bug.old, bug.new)


def copy_tree(to: Path, names: Sequence[str] = COPIED) -> None:
    for name in names:
        if (ROOT / name).is_dir():
            junk = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=junk)
        else:
            shutil.copy(ROOT / name, to / name)


def run(tests: Sequence[str], tree: Path) -> subprocess.CompletedProcess[str]:
    """Run tests in a copy of the tree, in a process of their own."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    # Without a GPU, as tests of kernels by the interpreter are skipped where there is one.
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def check(bug: Bug, tree: Path) -> str | None:
    """Plant a bug in the copy, run its tests and heal it. Returns what went wrong, or None when the tests saw it."""
    path = tree / bug.path
    healthy = path.read_text(encoding="utf-8")
    path.write_text(planted(bug), encoding="utf-8")
    try:
        result = run(bug.tests, tree)
    finally:
        path.write_text(healthy, encoding="utf-8")
    if result.returncode == 0:
        return "its tests stay green"
    if result.returncode != 1:  # 1 says that tests ran and some failed
        return f"its tests did not run:\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plant bugs and see that the tests turn red.")
    parser.add_argument("--only", choices=[bug.name for bug in BUGS], metavar="NAME", help="plant one bug")
    parser.add_argument("--list", action="store_true", help="print the bugs and their tests")
    options = parser.parse_args(argv)
    bugs = [bug for bug in BUGS if options.only in (None, bug.name)]
    if options.list:
        for bug in bugs:
            print(f"{bug.name} ({bug.path})", *bug.tests, sep="\n    ")
        return 0
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        healthy = run(sorted({test for bug in bugs for test in bug.tests}), tree)
        if healthy.returncode != 0:
            print(f"without a bug the tests do not pass:\n{healthy.stdout[-4000:]}{healthy.stderr[-2000:]}")
            return 1
        missed = 0
        for bug in bugs:
            start = time.perf_counter()
            wrong = check(bug, tree)
            missed += wrong is not None
            verdict = "red" if wrong is None else f"NOT SEEN: {wrong}"
            print(f"{bug.name:40} {time.perf_counter() - start:5.1f} s  {verdict}", flush=True)
    print(f"{len(bugs) - missed} of {len(bugs)} bugs turn their tests red")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
