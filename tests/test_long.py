"""Long video: windows that share their ends, scripts that are followed, memory of what was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stattn import cli, dit, world
from stattn.dit import DiT
from stattn.recipes import PRESETS
from stattn.studies.story import judge
from stattn.video import files, long, media, objects
from stattn.video.adapted import Adapted, AdapterConfig
from stattn.video.paint import Sampling, Work

QUICK = Sampling(steps=2, size=(4, 32, 32), overlap=2, guidance=1.0)


@pytest.fixture(scope="module")
def model() -> DiT:
    """A small model none of whose parts is idle."""
    torch.manual_seed(0)
    made = DiT(PRESETS["smoke"].model).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return made


def _frames(count: int, seed: int = 0) -> Tensor:
    return world.render(1, count, 32, 32, seed=seed).video[0]


@pytest.mark.smoke
@pytest.mark.parametrize("known, gap", [(4, 3), (5, 1), (6, 2), (3, 2)])
def test_windows_share_their_ends_and_keep_what_is_given(model: DiT, known: int, gap: int) -> None:
    frames, work = _frames(known), Work()
    video, joints = long.interpolate(model, frames, gap, "a red disc", QUICK, work=work)
    assert video.shape[1] == (known - 1) * gap + 1
    assert torch.equal(video[:, ::gap], frames)
    span = 3 // gap * gap
    assert joints == list(range(span, video.shape[1] - 1, span))
    made = [t for t in range(video.shape[1]) if t % gap]
    assert all(video[:, t].abs().max() > 0 for t in made)
    assert work.whole == 2 * 32 * (len(joints) + 1) if made else work.whole == 0
    alone, _ = long.interpolate(model, frames, gap, "a red disc", QUICK, batch=1)
    # Windows do not wait for each other: only the noise that a window of a batch takes differs.
    torch.testing.assert_close(alone[:, : span + 1], video[:, : span + 1])


@pytest.mark.smoke
def test_the_cost_of_windows_is_linear_in_the_length(model: DiT) -> None:
    tokens = []
    for known in (3, 5, 9):
        work = Work()
        long.interpolate(model, _frames(known), 3, "", QUICK, work=work)
        tokens.append(work.tokens)
    assert tokens[1] == 2 * tokens[0]
    assert tokens[2] == 4 * tokens[0]
    assert [long.windows(frames, 16) for frames in (2, 16, 17, 151)] == [1, 1, 2, 10]


@pytest.mark.smoke
def test_a_plot_becomes_a_path() -> None:
    assert long.parse_plot("left, then right then left") == ["left", "right", "left"]
    path = long.script(["left", "right", "down"], 7, 10.0, (30.0, 20.0))
    expected = [[30, 20], [25, 20], [20, 20], [25, 20], [30, 20], [30, 25], [30, 30]]
    torch.testing.assert_close(path, torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(long.at_frame(path, 4, 6), torch.tensor([22.5, 20]))
    assert long._heading("a red disc moves left, camera static", torch.tensor([3.0, 1.0])).split()[4] == "right,"
    for text in ("", "left, north"):
        with pytest.raises(ValueError, match="plot="):
            long.parse_plot(text)


@pytest.mark.smoke
def test_smoothing_changes_only_the_frames_around_joints(model: DiT) -> None:
    video = _frames(12)
    made = long.smooth(model, video, [6], "", QUICK, reach=1)
    changed = (made != video).flatten(2).any(2).any(0)
    assert changed.nonzero()[:, 0].tolist() == [5, 6, 7]
    assert torch.equal(long.smooth(model, video, [], "", QUICK), video)


def test_a_video_is_continued_and_memory_reaches_the_windows(model: DiT) -> None:
    video = _frames(6)
    longer = long.extend(model, video, 5, "a red disc", QUICK)
    assert longer.shape[1] == 11
    assert torch.equal(longer[:, :6], video)
    whole = Adapted(model, AdapterConfig(memory_tokens=4, memory_width=32)).eval()
    assert torch.equal(long.extend(whole, video, 5, "a red disc", QUICK, remember=False), longer)
    remembered = long.extend(whole, video, 5, "a red disc", QUICK)
    assert not torch.equal(remembered, longer)
    other = torch.cat((-video[:, :2], video[:, 2:]), 1)  # long before the window, nothing but memory sees it
    assert not torch.equal(
        long.extend(whole, other, 2, "", QUICK)[:, 6:], long.extend(whole, video, 2, "", QUICK)[:, 6:]
    )
    assert torch.equal(long.extend(model, other, 2, "", QUICK)[:, 6:], long.extend(model, video, 2, "", QUICK)[:, 6:])


def test_what_cannot_be_told_is_refused(model: DiT) -> None:
    frames = _frames(3)
    for call, match in (
        (lambda: long.interpolate(model, frames, 4, "", QUICK), "gap=4"),
        (lambda: long.interpolate(model, frames[:, :1], 2, "", QUICK), "at least two"),
        (lambda: long.interpolate(model, frames, 2, "", QUICK, rough=frames), "rough of shape"),
        (lambda: long.extend(model, frames[:, :1], 2, "", QUICK), "video of 1 frames"),
        (lambda: long.tell(model, "a purple disc", ["left"], QUICK), "colour='purple'"),
        (lambda: long.tell(model, "a red disc", ["left"], QUICK, picture=_picture(), reach=40), "out of the picture"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def _picture() -> Tensor:
    scene = world.sample(1, 1, 32, 32, seed=3, objects=(1, 1), cameras=("static",))
    return world.with_colours(scene, torch.tensor([[0, 1, 2]])).draw()[0, :, 0]


def test_the_shipped_model_follows_a_short_script() -> None:
    sampling = Sampling(steps=5, guidance=1.0)
    scene = world.sample(1, 1, seed=3, objects=(1, 1), cameras=("static",))
    picture = world.with_colours(scene, torch.tensor([[0, 1, 2]])).draw()[0, :, 0]
    shape = world.SHAPES[int(scene.shapes[0, 0])]
    caption = f"a red {shape} moves left, camera static"
    story = long.tell(dit.load("tiny"), caption, ["left", "right"], sampling, minutes=0.2, picture=picture)
    assert story.video.shape == (3, 31, 64, 64)
    assert story.joints == [15]
    found = judge(story, caption)
    assert found["identity_kept"] >= 0.95
    assert found["path_error_max"] < 3
    assert found["path_error_mean"] < 1.5
    corner = objects.centroid(objects.object_mask(story.video, "red"))[:, 0]
    assert corner[15] < corner[0] - 8
    assert corner[15] < corner[30] - 8


def test_the_command_writes_a_story_and_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = _frames(7)
    story = long.Story(video, [0, 3, 6], torch.tensor([[10.0, 10], [12, 10], [10, 10]]), [3], Work(5, 6))
    monkeypatch.setattr(long, "tell", lambda *args, **options: story)
    out = tmp_path / "story.mp4"
    assert cli.main(["storyboard", str(out), "--minutes", "0.1", "--plot", "left, right"]) == 0
    back, fps = files.read_clip(tmp_path / "story.mkv")
    assert back.shape == (3, 7, 32, 32)
    assert fps == pytest.approx(1, abs=0.01)
    found = json.loads((tmp_path / "story.json").read_text(encoding="utf-8"))
    assert found["frames"] == 7
    assert found["tokens"] == 5
    assert cli.main(["storyboard", str(out), "--plot", "north"]) == 1


def test_a_file_is_continued_by_a_command(model: DiT, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dit.save(model, tmp_path / "model.safetensors")
    video = (_frames(5) * 127 + 128).to(torch.uint8)
    files.write_ffv1(tmp_path / "in.mkv", video, fps=8)
    words = ["extend", str(tmp_path / "in.mkv"), str(tmp_path / "out.mp4"), "--frames", "3", "--steps", "2"]
    words += ["--overlap", "2", "--model", str(tmp_path / "model.safetensors"), "--device", "cpu"]
    assert cli.main([*words, "--size", "4,32,32"]) == 0
    made, _ = files.read_clip(tmp_path / "out.mkv")
    assert made.shape[1] == 8
    assert torch.equal(made[:, :5], video)
    assert cli.main([*words, "--size", "4,64,64"]) == 1
    assert "32 x 32 pixels" in capsys.readouterr().err
    files.write_ffv1(tmp_path / "in.mkv", media.enlarge(video, 4), fps=8)  # as small clips are written to be looked at
    assert cli.main([*words, "--size", "4,32,32"]) == 0
    assert "is taken at 32 x 32 pixels" in capsys.readouterr().out
    assert torch.equal(files.read_clip(tmp_path / "out.mkv")[0], made)
