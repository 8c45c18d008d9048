"""The gallery: one command, one page, every file that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from stattn import cli, dit
from stattn.commands import gallery
from stattn.dit import DiT
from stattn.recipes import PRESETS
from stattn.studies.story import judge
from stattn.video import long
from stattn.video.paint import Work


def test_the_page_shows_files_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dit.save(DiT(PRESETS["smoke"].model), tmp_path / "model.safetensors")
    told = long.Story(torch.zeros(3, 7, 64, 64), [0, 3, 6], torch.full((3, 2), 32.0), [3], Work())
    monkeypatch.setattr(long, "tell", lambda *args, **options: told)
    options = ["--model", str(tmp_path / "model.safetensors"), "--steps", "1", "--size", "4,64,64", "--camera", "none"]
    assert cli.main(["gallery", "--out", str(tmp_path / "page"), "--memory", "none", "--device", "cpu", *options]) == 0
    html = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    named = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert len(named) > 25
    assert all((tmp_path / "page" / each).is_file() for each in named)
    assert "THE REST DIFFERS" not in html
    assert "Not made: no adapter weights" in html
    numbers = json.loads((tmp_path / "page" / "numbers.json").read_text(encoding="utf-8"))
    assert numbers["story"]["frames"] == 7
    assert numbers["command"].startswith("stattn gallery")
    assert set(judge(told, "a red disc")) <= set(numbers["story"])
    assert "Edits: 7 clips" in capsys.readouterr().out


def test_what_differs_outside_an_edit_is_said() -> None:
    video = torch.zeros(3, 1, 2, 2)
    changed = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    result = gallery.edit.Edit(video + 1, changed, Work())
    assert gallery._kept(result, video) == "THE REST DIFFERS"
    assert gallery._kept(result._replace(video=video), video) == "the rest equal"
