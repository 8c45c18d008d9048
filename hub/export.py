"""Lay the package out as Hugging Face's kernel-builder wants it: ``python hub/export.py FOLDER``.

A kernel of the Hub is loaded under a name of its own, beside other versions of itself, so that its modules import one
another relatively and its operations live in a namespace that the builder gives (``_ops.py``, which it writes). Both
are rewritten here; the sources know nothing of it. ``layers.py`` beside this file joins the package.

    FOLDER/build.toml  flake.nix  CARD.md  torch-ext/stattn/...  tests/  benchmarks/
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What the operations, the modules and accelerate consist of; commands, models and training stay behind.
PARTS = (
    "__init__", "accelerate", "blocks", "cache", "extension", "flops", "grid", "integrations", "kernels", "masks",
    "model/__init__", "model/attention", "model/layers", "model/settings", "modules", "ops", "plan", "plan_runs",
    "problem", "ranges", "reference", "rope", "tables",
)  # fmt: skip

IMPORT = re.compile(r"^(\s*)from stattn(\.[\w.]+)? import ", re.MULTILINE)
OPERATION = re.compile(r"torch\.ops\.stattn\b")
LIBRARY = re.compile(r'torch\.library\.Library\("stattn"')
NAME = re.compile(r'f?"stattn::(?:\{(\w+)\}|(\w+))"')


def rewrite(text: str, depth: int) -> str:
    """Rewrite a module that lies ``depth`` folders below the package: its imports, and the names of operations."""
    here = "." * (depth + 1)
    text = IMPORT.sub(lambda found: f"{found[1]}from {here}{(found[2] or '.')[1:]} import ", text)
    wanted = []
    if OPERATION.search(text):
        text, wanted = OPERATION.sub("_operations", text), ["ops as _operations"]
    if LIBRARY.search(text) or NAME.search(text):
        text = LIBRARY.sub('torch.library.Library(_named("").removesuffix("::")', text)
        text = NAME.sub(lambda found: f"_named({found[1]})" if found[1] else f'_named("{found[2]}")', text)
        wanted.append("add_op_namespace_prefix as _named")
    if wanted:
        # Behind the docstring and what must come before all other imports.
        first = ast.parse(text).body
        last = max(node.end_lineno or 0 for node in first if node is first[0] or _is_future(node))
        lines = text.splitlines(keepends=True)
        text = "".join([*lines[:last], f"\nfrom {here}_ops import {', '.join(wanted)}\n", *lines[last:]])
    return text


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def export(folder: Path) -> Path:
    """Write the layout into a folder. Returns the folder of the package."""
    package = folder / "torch-ext" / "stattn"
    for part in PARTS:
        source = ROOT / "stattn" / part
        for path in sorted(source.rglob("*.py")) if source.is_dir() else [source.with_suffix(".py")]:
            place = path.relative_to(ROOT / "stattn")
            target = package / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(rewrite(path.read_text(encoding="utf-8"), len(place.parts) - 1), encoding="utf-8")
    layers = (ROOT / "hub" / "layers.py").read_text(encoding="utf-8")
    (package / "layers.py").write_text(rewrite(layers, 0), encoding="utf-8")
    with (package / "__init__.py").open("a", encoding="utf-8") as init:
        init.write('\nfrom . import layers\n\n__all__ += ["layers"]\n')
    places = {
        "build.toml": "build.toml",
        "CARD.md": "CARD.md",
        "flake.nix": "flake.nix",
        "benchmark.py": "benchmarks/benchmark.py",
        "test_kernel.py": "tests/test_kernel.py",
    }
    for name, place in places.items():
        (folder / place).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "hub" / name, folder / place)
    shutil.copy(ROOT / "LICENSE", folder)
    return package


if __name__ == "__main__":
    print(export(Path(sys.argv[1])))
