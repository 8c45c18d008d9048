"""Folders of video files as training data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from stattn import train, world
from stattn.recipes import PRESETS
from stattn.trainer import Trainer
from stattn.training import folder
from stattn.video import files

SMOKE = PRESETS["smoke"]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for seed, frames in ((0, 4), (1, 9)):
        made = world.render(1, frames, 48, 64, seed=seed)
        files.write_ffv1(tmp_path / "data" / f"{seed}.mkv", made.video[0], fps=8)
        if seed:
            (tmp_path / "data" / f"{seed}.txt").write_text(made.captions[0] + "\n", encoding="utf-8")
    return tmp_path / "data"


@pytest.mark.smoke
def test_clips_are_drawn_from_all_files_and_places(clips: Path) -> None:
    drawn = folder.FolderClips(clips, SMOKE, torch.device("cpu"))
    video, ids, counts = drawn.draw(64, torch.Generator().manual_seed(0))
    assert video.shape == (64, 3, 4, 32, 32)
    first, second = ((each.float() / 127.5 - 1) for each in drawn.videos)
    expected, _ = world.tokenize([(clips / "1.txt").read_text(encoding="utf-8")])
    starts = []
    for clip, words, count in zip(video, ids, counts, strict=True):
        if count == 0:
            assert torch.equal(clip, first)
        else:
            assert torch.equal(words, expected[0])
            starts += [start for start in range(6) if torch.equal(clip, second[:, start : start + 4])]
    assert set(starts) == set(range(6))
    assert 15 < len(starts) < 50


@pytest.mark.smoke
def test_the_middle_of_a_picture_is_scaled() -> None:
    video = torch.zeros(3, 2, 40, 80, dtype=torch.uint8)
    video[..., 20:60] = 200
    assert (folder.cover(video, 20, 20) == 200).all()
    assert torch.equal(folder.cover(video, 40, 80), video)
    assert folder.cover(video, 30, 20).shape == (3, 2, 30, 20)


def test_a_model_trains_on_a_folder(clips: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(SMOKE, data=str(clips))
    record = train.train(recipe, tmp_path / "run", steps=2, name="x", device="cpu", clips=0, quiet=True, log_every=1)
    assert record["recipe"]["data"] == str(clips)
    clean, *_ = Trainer(recipe, torch.device("cpu")).batch()
    other, *_ = Trainer(SMOKE, torch.device("cpu")).batch()
    assert clean.shape == other.shape
    assert not torch.equal(clean, other)


def test_files_that_cannot_serve_are_named(clips: Path, tmp_path: Path) -> None:
    def read() -> object:
        return folder.FolderClips(clips, SMOKE, torch.device("cpu"))

    (clips / "1.txt").write_text("a purple disc", encoding="utf-8")
    with pytest.raises(ValueError, match=r"1\.txt: unknown word 'purple'"):
        read()
    (clips / "1.txt").unlink()
    files.write_ffv1(clips / "2.mkv", torch.zeros(3, 3, 32, 32), fps=8)
    with pytest.raises(ValueError, match=r"2\.mkv has 3 frames; clips of 4"):
        read()
    (clips / "2.mkv").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"2\.mkv"):
        read()
    with pytest.raises(NotADirectoryError):
        folder.FolderClips(tmp_path / "none", SMOKE, torch.device("cpu"))
