"""The package keeps its layout: imports point one way, and every stem has its files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).resolve().parent.parent
# What a part must not import, at the top of a file or within a function.
MODELS = ("dit", "sampler", "rollout", "accelerate", "integrations", "video")
ABOVE = ("modules", "model", *MODELS)
FORBIDDEN = {
    "grid": ("masks", "reference", "kernels", "ops", *ABOVE),
    "tables": ("masks", "reference", "kernels", "ops", *ABOVE),
    "masks": ("reference", "kernels", "ops", *ABOVE),
    "reference": ("kernels", "ops", *ABOVE),
    "kernels": ("reference", "ops", *ABOVE),
    "ops": ABOVE,
    "modules": ("kernels", "reference", "dit", "sampler", "integrations", "video"),
    "model": ("kernels", "reference", "dit", "sampler", "integrations", "video"),
    "dit": ("kernels", "reference", "sampler", "integrations", "video"),
    "sampler": ("kernels", "reference", "integrations", "video"),
}
STEMS = ("attention", "select", "patchify", "modulate", "modulate_linear", "gate", "qk_norm_rope", "denoise")


def files(part: str) -> list[Path]:
    path = ROOT / "stattn" / part
    return sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imported(path: Path) -> set[str]:
    """The parts of the package that a file imports: "masks" of `from stattn.masks import full`."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{each.name}" for each in node.names]
    return {name.split(".")[1] for name in names if name.startswith("stattn.")}


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_point_one_way(part):
    assert files(part)
    found = {path.name: imported(path) & set(FORBIDDEN[part]) for path in files(part)}
    assert {name: parts for name, parts in found.items() if parts} == {}


def test_an_import_of_any_form_is_seen(tmp_path):
    path = tmp_path / "some.py"
    late = "def late():\n    from stattn import masks\n    from stattn.video.edit import recolour\n"
    path.write_text(f"import stattn.ops\n{late}")
    assert imported(path) == {"ops", "masks", "video"}


def test_nothing_imports_a_command_but_commands():
    others = [path for path in (ROOT / "stattn").rglob("*.py") if path.parent.name != "commands"]
    assert others
    assert [path.name for path in others if "commands" in imported(path)] == []


@pytest.mark.parametrize("stem", STEMS)
def test_a_stem_has_its_files(stem):
    for place in ("stattn/ops/{}.py", "stattn/reference/{}.py", "kernels/{}.py", "tests/test_{}.py"):
        assert (ROOT / place.format(stem)).exists(), place
