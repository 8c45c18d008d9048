"""Studies: their checks know right from wrong, and their machinery runs on a CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from stattn import cli, dit
from stattn.dit import DiT
from stattn.grid import Grid
from stattn.masks import parse
from stattn.recipes import PRESETS
from stattn.studies import consistency, edits, length, story
from stattn.trainer import Trainer, allowed_pairs
from stattn.video.paint import Sampling


def test_the_checks_of_edits_know_real_edits_from_none() -> None:
    model = DiT(PRESETS["smoke"].model).eval()  # predicts 0: what it paints is grey
    found, shown = edits.study(model, 3, Sampling(steps=1, size=(4, 64, 64), overlap=1), refreshes=(1,))
    assert found["recolour_hue_real"] > 0.99
    assert found["recolour_hue_unedited"] < 0.01
    assert found["brush_end_within_3px_real"] == 1
    assert found["brush_end_within_3px_unedited"] == 0
    assert found["brush_others_within_2px_real"] == 1
    assert found["brush_others_within_2px_shifted"] == 0
    assert found["removed_object_gone_real"] == 1
    assert found["removed_object_gone_unedited"] == 0
    assert found["background_psnr_another"] < 20
    assert found["exact_outside_another"] == 0
    for name in ("recolour_exact_outside", "brush_exact_outside", "inpaint_exact_outside", "outpaint_exact_inside"):
        assert found[name] == 1
    assert found["recolour_hue"] < 0.5
    assert shown.shape == (18, 3, 4, 64, 64)


def test_a_stale_cache_costs_less_and_errs_more() -> None:
    rows = edits.refresh_curve(dit.load("tiny"), Sampling(steps=4, guidance=1.0), (2, 4))
    assert [row["refresh"] for row in rows] == [1, 2, 4]
    assert rows[0]["rms_error"] == 0
    assert rows[0]["tokens"] == 1
    assert rows[0]["tokens"] > rows[1]["tokens"] > rows[2]["tokens"]
    assert 0 < rows[1]["rms_error"] < rows[2]["rms_error"] < 0.2


def test_the_checks_of_stories_know_real_ones_from_others() -> None:
    model = dit.load("tiny")
    found, videos = story.study(model, 4, 2, Sampling(steps=1), minutes=0.2)
    assert found["interpolation"]["real"] == 1
    assert found["interpolation"]["shuffled"] < 0.5
    real, others = found["stories_real"], found["stories_of_other_requests"]
    assert real["identity_kept"] == 1
    assert real["path_error_max"] < 0.5 < 5 < others["path_error_mean"]
    assert others["identity_kept"] == 0
    assert real[story.JOINTS] < 1.2 < 5 < found["stories_cut_together"][story.JOINTS]
    assert [tuple(video.shape) for video in videos] == [(3, 31, 64, 64)] * 2
    with pytest.raises(ValueError, match="stories=1"):
        story.study(model, 4, 1, Sampling())


def test_one_piece_costs_more_than_windows(tmp_path: Path) -> None:
    found = length.study(DiT(PRESETS["smoke"].model).eval(), (1, 2, 4), (4, 32, 32), rounds=1)
    rows = found["rows"]
    assert [row["frames"] for row in rows] == [4, 8, 16]
    assert rows[2]["flops_windows"] == 4 * rows[0]["flops_windows"]
    assert rows[2]["flops_one_piece"] > rows[2]["flops_windows"]
    made = {
        "rows": [
            {"frames": n, "seconds_windows": 0.1 * n, "seconds_one_piece": 0.01 * n * n} for n in (16, 32, 64, 128)
        ]
    }
    assert length.exponents(made) == {"windows": 1.0, "one_piece": 2.0}
    length.plot(made, tmp_path / "length.png")
    assert (tmp_path / "length.png").stat().st_size > 1000
    assert length.minute(16) == 10


@pytest.mark.smoke
@pytest.mark.parametrize("kind, reaches", [("full", 16), ("windowed", 5), ("previous frame", 2), ("per frame", 1)])
def test_kinds_of_attention_see_the_frames_that_they_say(kind: str, reaches: int) -> None:
    recipe = consistency.recipe_of(kind, 0)
    assert recipe.grid == (16, 4, 4)
    grid = Grid(*recipe.grid, after=3)
    allowed = allowed_pairs(parse(recipe.masks[0][0]), grid, torch.device("cpu"), "globals")
    frames = allowed[8 * 16, : grid.video].view(16, 16).any(1)
    assert frames.sum() == reaches
    assert frames[8]
    assert allowed[:, grid.video :].all()
    assert not allowed[grid.video :, : grid.video].any()


def test_nothing_crosses_frames_without_attention_between_them() -> None:
    """Per frame, with text that sees only text, a frame's prediction does not depend on another frame."""
    small = dataclasses.replace(PRESETS["smoke"].model, patch=(1, 8, 8))
    recipe = dataclasses.replace(consistency.RECIPE, model=small, frames=4, batch=2)
    for kind, crosses in (("per frame", False), ("full", True)):
        trainer = Trainer(consistency.recipe_of(kind, 0, recipe), torch.device("cpu"))
        torch.nn.init.normal_(trainer.model.proj_out.weight)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
            clean, _, _, _, ids, valid, bias = trainer.batch()
            level = torch.full((2,), 500.0)
            other = torch.cat((clean[:, :, :1], -clean[:, :, 1:]), 2)
            one, two = (trainer.model(x, level, ids, valid, mask=bias)[:, :, 0] for x in (clean, other))
        assert ((one - two).abs().max() > 1e-4) == crosses, kind


def test_consistency_is_studied_by_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "consistency", "--smoke", "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "consistency.json").read_text(encoding="utf-8"))
    assert set(found["kinds"]) == set(consistency.KINDS)
    for of in found["kinds"].values():
        assert len(of["flicker_ratio"]["all"]) == 2
        assert of["flicker_ratio"]["spread"] > 0
        assert "FVD(synth-r3d)" in of
    assert (tmp_path / "consistency.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="kind='sideways'"):
        consistency.recipe_of("sideways", 0)


def test_consistency_is_studied_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def trained(kind: str, seed: int, ruler: consistency.Ruler, *rest: object) -> object:
        calls.append((kind, seed))
        return {"flicker_ratio": 1.0 + seed}, torch.zeros(4, 3, 16, 32, 32)

    monkeypatch.setattr(consistency, "_train", trained)
    command = ["study", "consistency", "--smoke", "--device", "cpu", "--out", str(tmp_path)]
    for part in ("1/2", "2/2"):
        assert cli.main([*command, "--part", part]) == 0
        assert (tmp_path / "consistency.json").is_file() == (part == "2/2")
    assert sorted(calls) == sorted((kind, seed) for kind in consistency.KINDS for seed in range(2))
    assert cli.main(command) == 0
    assert len(calls) == 8
    found = json.loads((tmp_path / "consistency.json").read_text(encoding="utf-8"))
    assert found["kinds"]["full"]["flicker_ratio"] == {"mean": 1.5, "spread": 0.5**0.5, "all": [1.0, 2.0]}
    kept = tmp_path / "trainings" / "per-frame-1.json"
    kept.write_text(kept.read_text(encoding="utf-8").replace('"steps": 2', '"steps": 3'), encoding="utf-8")
    assert cli.main(command) == 0
    assert calls[8:] == [("per frame", 1)]
    with pytest.raises(SystemExit):
        cli.main([*command, "--part", "3/2"])
