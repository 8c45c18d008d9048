"""The guides and the README say what is true: their Python runs, and prints what they say it prints.

Models that would be downloaded are tiny ones with random weights here.
"""

import importlib.util
import re
import types
from pathlib import Path

import guides
import pytest
import torch

from stattn import cli

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


class TinyWan:
    """What a guide calls WanPipeline: it denoises three steps with a tiny transformer."""

    def __init__(self):
        from hosts import WAN, model

        self.transformer = model("WanTransformer3DModel", **WAN)

    @classmethod
    def from_pretrained(cls, name, torch_dtype):
        assert "/" in name
        return cls()

    def to(self, device):
        assert device == "cuda"
        return self

    def __call__(self, prompt, height, width, num_frames):
        from hosts import run, wan

        grid = ((num_frames - 1) // 4 + 1, height // 16, width // 16)
        assert grid == (21, 30, 52)
        for timestep in (900.0, 500.0, 100.0):
            out = run(self.transformer, wan((9, 16, 24), 1) | {"timestep": torch.tensor([timestep])})
        return types.SimpleNamespace(frames=[out])


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_the_code_of_a_guide_runs_and_prints_what_it_says(path, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(diffusers, "WanPipeline", TinyWan, raising=False)
    monkeypatch.chdir(tmp_path)
    guides.run(path)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_links_and_commands_of_a_guide_exist(path):
    text = re.sub(r"^```python( gpu)?\n.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (path.parent / link).exists(), link
    for command in re.findall(r"(?:^|`|-- )stattn ([a-z]+)\b", text, re.MULTILINE):
        assert command in cli.COMMANDS, command
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in re.findall(r"`((?:stattn|kernels|csrc|benchmarks|tests)/[\w/.-]+\.(?:py|cuh|cu|md|json))`", text):
        assert (ROOT / name).exists(), name


def test_the_list_of_public_names_is_that_of_the_docstrings():
    pytest.importorskip("diffusers")
    spec = importlib.util.spec_from_file_location("api", ROOT / "docs" / "api.py")
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    assert api.text() == (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), "run python docs/api.py"
