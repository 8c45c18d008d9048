"""Extractors and `stattn evaluate`: the protocol, files of the user's own, folders of real video files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stattn import cli, metrics, world
from stattn.metrics import evaluate, extractors, synth
from stattn.metrics.networks import Network, Spec, file_sha256
from stattn.video import media


class _Pool(nn.Module):
    """Stand in for I3D: average clips over a 4 x 5 x 5 grid."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool3d(x, [4, 5, 5]).flatten(1)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    path = tmp_path / "pool.pt"
    torch.jit.script(_Pool()).save(str(path))
    spec = {"version": "1", "dim": 300, "resolution": 32, "frames": 8, "mean": [0, 0, 0], "std": [1, 1, 1]}
    path.with_suffix(".json").write_text(json.dumps(spec), encoding="utf-8")
    return path


def _clips(folder: Path, seeds: range, *, captions: bool = True, damage: float = 0.0) -> Path:
    folder.mkdir(parents=True)
    for seed in seeds:
        clips = world.render(1, 8, 32, 48, seed=seed)
        media.write_mp4(folder / f"{seed:03d}.mp4", clips.video[0] + damage * torch.randn(3, 8, 32, 48), scale=1)
        if captions:
            (folder / f"{seed:03d}.txt").write_text(clips.captions[0], encoding="utf-8")
    return folder


def test_a_torchscript_file_becomes_an_extractor_that_says_what_it_is(pool: Path) -> None:
    extractor = metrics.load(f"pool={pool}")
    assert isinstance(extractor, metrics.FeatureExtractor)
    assert not isinstance(extractor, metrics.TextExtractor)
    assert (extractor.name, extractor.dim, extractor.resolution, extractor.frames) == ("pool", 300, 32, 8)
    assert extractor.sha256 == file_sha256(pool)
    video = world.render(2, 8, 32, 32, seed=0).video
    torch.testing.assert_close(extractor(video), _Pool()((video + 1) / 2))
    wide = extractors.fit(world.render(1, 11, 32, 48, seed=1).video[0], extractor)
    assert wide.shape == (1, 3, 8, 32, 32)


def test_extractors_that_do_not_fit_are_refused(pool: Path, tmp_path: Path) -> None:
    extractor = metrics.load(f"pool={pool}")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"no archive")
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pool.read_bytes())
    for call, kind, text in (
        (lambda: metrics.load("vgg"), ValueError, "'vgg' is none of .*synth-r3d"),
        (lambda: metrics.load(f"i3d={tmp_path / 'none.pt'}"), FileNotFoundError, "no such file"),
        (lambda: metrics.load(f"i3d={broken}"), ValueError, "TorchScript"),
        (lambda: metrics.load(f"other={plain}"), ValueError, "describe it in"),
        (lambda: extractor(torch.zeros(1, 3, 7, 32, 32)), ValueError, "7 frames"),
        (lambda: extractor(torch.zeros(1, 3, 8, 32, 31)), ValueError, "video of shape"),
        (lambda: extractors.fit(torch.zeros(3, 7, 32, 32), extractor), ValueError, "7 frames"),
        (lambda: Spec("x", "1", 0, 1, 1), ValueError, "dim=0"),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            call()


def test_a_registered_extractor_is_known_by_name_and_once() -> None:
    def make(*, device: object) -> Network:
        return Network(_Pool(), Spec("mine", "1", 300, 16, 8), "0" * 64)

    metrics.register("mine", make)
    try:
        assert metrics.load("mine").name == "mine"
        assert "mine" in metrics.registered()
        with pytest.raises(ValueError, match="registered already"):
            metrics.register("mine", make)
    finally:
        extractors._REGISTRY.pop("mine")


@pytest.mark.parametrize("name", synth.SHIPPED)
def test_a_small_extractor_trains_and_loads(name: str, tmp_path: Path) -> None:
    recipe = dataclasses.replace(synth.PRESETS[name], width=8, dim=16, batch=4, frames=4, resolution=32)
    record = synth.train(recipe, tmp_path, steps=2, device="cpu", log_every=1, quiet=True)
    assert [line[0] for line in record["log"]] == [1, 2]
    extractor = metrics.load(f"{name}={tmp_path / name}.safetensors")
    clips = world.render(2, 4, 32, 32, seed=0)
    features = extractor(clips.video)
    assert features.shape == ((2, 16) if name == "synth-r3d" else (2, 4, 16))
    assert (features - features.flip(0)).abs().max() > 1e-4
    if name == "synth-clip":
        assert isinstance(extractor, metrics.TextExtractor)
        text = extractor.text(["a red disc moves left with a blue disc, camera static", "a red disc with a blue disc"])
        torch.testing.assert_close(text[0], text[1])  # one frame shows neither motion nor camera
        assert (extractor.text(["a red disc"]) - extractor.text(["a green disc"])).abs().max() > 1e-4
    with pytest.raises(ValueError, match="at least one"):
        synth.train(recipe, tmp_path)


def test_the_command_measures_folders_of_files(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = _clips(tmp_path / "a", range(5)), _clips(tmp_path / "b", range(3, 8), captions=False, damage=0.2)
    features = ["--clip-features", f"pool={pool}", "--frame-features", "none", "--text-features", "none"]
    assert cli.main(["evaluate", str(a), str(b), *features, "--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    assert "FVD(pool)" in printed
    assert "FVD:" not in printed
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["a"]["clips"] == found["b"]["clips"] == 5
    assert found["a"]["jumps"] < found["b"]["jumps"]
    assert found["between"]["FVD(pool)"] > 0
    assert found["extractors"]["pool"]["sha256"] == file_sha256(pool)
    assert cli.main(["evaluate", str(a), str(b), *features, "--max-clips", "2"]) == 0
    told: list[tuple[int, int]] = []
    networks = evaluate.Networks(f"pool={pool}", None, None)
    evaluate.evaluate(a, b, networks, max_clips=2, on_clip=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_bad_folders_and_files_are_named(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = _clips(tmp_path / "a", range(2))
    networks = evaluate.Networks(f"pool={pool}", None, None)
    with pytest.raises(NotADirectoryError, match="none"):
        evaluate.evaluate(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no video files"):
        evaluate.evaluate(tmp_path / "empty", networks=networks)
    (a / "002.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"002\.mp4"):
        evaluate.evaluate(a, networks=networks)
    media.write_mp4(a / "002.mp4", torch.zeros(3, 5, 32, 32), scale=1)
    with pytest.raises(ValueError, match=r"002\.mp4: video has 5 frames"):
        evaluate.evaluate(a, networks=networks)
    assert cli.main(["evaluate", str(tmp_path / "x")]) == 1
    assert "is no folder" in capsys.readouterr().err


@pytest.mark.smoke
def test_the_shipped_extractors_know_the_world() -> None:
    clips = world.render(24, 16, 64, 64, seed=77)
    r3d, frame, clip = (metrics.load(f"synth-{name}") for name in ("r3d", "frame", "clip"))
    assert isinstance(clip, metrics.TextExtractor)
    text = torch.nn.functional.normalize(clip.text(clips.captions), dim=1)
    pictures = torch.nn.functional.normalize(clip(clips.video[:, :, ::5]), dim=2).mean(1)
    scores = pictures @ text.T
    own, others = scores.diagonal(), (scores.sum(1) - scores.diagonal()) / 23
    assert (own > others + 0.3).float().mean() > 0.9
    consistent = [metrics.cos_consistency(rows) for rows in frame(clips.video)]
    mixed = [metrics.cos_consistency(rows) for rows in frame(clips.video.transpose(0, 2)[:, :, :16])]
    assert min(consistent) > max(mixed)
    assert r3d(clips.video[:2]).shape == (2, 64)


# At 32 clips the bias of the Frechet distance is larger than what it finds; the MMD has none.
GAP = {"frechet_distance": 4.0, "mmd_poly": 0.1}


def test_distances_by_the_shipped_extractor_grow_with_corruption() -> None:
    r3d = metrics.load("synth-r3d")
    features = r3d(world.render(32, seed=101).video)
    clips = world.render(32, seed=102).video
    noise = torch.randn_like(clips)
    for distance in (metrics.frechet_distance, metrics.mmd_poly):
        floor = distance(features, r3d(clips))
        # These features know how things move: pictures that stand still are other clips to them.
        for damaged in ((clips + 1.2 * noise).clamp(-1, 1), clips[:, :, :1].expand_as(clips)):
            assert distance(features, r3d(damaged)) > floor + GAP[distance.__name__]
