"""The guides and the README say what is true: their Python runs, and prints what they say it prints.

Models that would be downloaded are tiny ones with random weights here.
"""

import json
import re
import types
from pathlib import Path

import guides
import pytest
import torch

from stattn import cli

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])


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


NUMBER = r"\d+\.\d+|\d+(?= (?:ms|s|GiB)\b)"


def unmeasured(text, known):
    """The numbers of a page's tables of measurements that are none of the known ones, rounded as they are."""
    tables = re.findall(r"^\| measured.*\n\|[-| :]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [row.strip("|").split("|") for table in tables for row in table.splitlines()]
    numbers = [number for row in rows for cell in row[1:] for number in re.findall(NUMBER, cell)]
    assert numbers
    steps = {number: 10.0 ** -len(number.partition(".")[2]) for number in numbers}
    return [n for n in numbers if not any(abs(float(n) - each) <= 0.501 * steps[n] for each in known)]


def test_what_the_readme_says_was_measured_is_in_a_results_file():
    files = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*/*.json")]
    results = [each for file in files for each in file.get("results", ()) if "unit" in each]
    known = {each[name] for each in results for name in ("value", "ratio") if each[name] is not None}
    known |= {each["baseline"]["value"] for each in results if each["baseline"]}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert unmeasured(text, known) == []
    assert unmeasured(text + "\n| measured | result |\n|---|---|\n| wishes | 0.12345 ms |\n", known) == ["0.12345"]
