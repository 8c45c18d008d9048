"""Adapters of a frozen model: camera control that starts as nothing, memory that stands beside the text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from stattn import cli, dit, train, world
from stattn.dit import DiT
from stattn.metrics import warp
from stattn.recipes import PRESETS, AdapterRecipe
from stattn.training import adapters
from stattn.video import adapted, camera, files, media, paint
from stattn.video.adapted import Adapted, AdapterConfig
from stattn.video.camera import Move, ray_maps
from stattn.video.paint import Sampling

SMOKE = PRESETS["smoke"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small model none of whose parts is idle."""
    torch.manual_seed(0)
    model = DiT(SMOKE.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    dit.save(model, path)
    return path


def _recipe(base: Path, adapts: str) -> AdapterRecipe:
    given = {"camera": (("camera_layers", 2),), "memory": (("memory_tokens", 3), ("memory_width", 32))}[adapts]
    small = {name: getattr(SMOKE, name) for name in ("model", "frames", "height", "width", "batch", "warmup")}
    if adapts == "memory":
        small["frames"] = 8  # four of them without the object
    return dataclasses.replace(PRESETS[adapts], **small, base=str(base), adapter=given)  # type: ignore[arg-type]


def _inputs() -> tuple[torch.Tensor, ...]:
    clips = world.render(2, 4, 32, 32, seed=3)
    ids, valid = clips.scene.tokens()
    return torch.randn(2, 3, 4, 32, 32), torch.tensor([500.0, 900.0]), ids, valid, ray_maps(clips.scene.camera, 32, 32)


@pytest.mark.smoke
@pytest.mark.parametrize("cross", [False, True])
def test_before_training_a_camera_adapter_changes_no_bit(base: Path, cross: bool) -> None:
    model = dit.load(base)
    if cross:
        config = dataclasses.replace(SMOKE.model, kind="cross", qk_norm="across_heads")
        model = DiT(config).eval()
        torch.nn.init.normal_(model.proj_out.weight)
    whole = Adapted(model, AdapterConfig(camera_layers=2)).eval()
    x, level, ids, valid, ray_map = _inputs()
    with torch.no_grad():
        plain, steered = model(x, level, ids, valid), whole(x, level, ids, valid, ray_map=ray_map)
        assert torch.equal(plain, steered)
        assert whole.camera is not None
        whole.camera.out[1].bias.fill_(0.1)
        assert not torch.equal(plain, whole(x, level, ids, valid, ray_map=ray_map))
        assert torch.equal(plain, whole(x, level, ids, valid))
        torch.nn.init.normal_(whole.camera.out[0].weight)
        maps = (ray_map, 2 * ray_map)
        found = [whole(x, level, ids, valid, ray_map=each) for each in maps]
        assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["pans right", "tilts up", "zooms in", "rolls left"])
def test_a_ray_map_says_where_the_scenery_was(name: str) -> None:
    clips = world.render(2, 5, seed=5, objects=(1, 1), cameras=(name,))
    maps = ray_maps(clips.scene.camera, 64, 64)
    assert maps.shape == (2, camera.MAP_CHANNELS, 5, 64, 64)
    assert maps[:, :, 0].abs().max() < 1e-6
    torch.testing.assert_close(maps[:, :2], maps[:, 2:])  # without dolly and track both depths move alike
    moved = warp(clips.video[:, :, 0], maps[:, :2, -1] * 32)
    still = (clips.video[:, :, -1] - clips.video[:, :, 0]).abs()
    # The objects, and what frame 0 did not show, are the few pixels that differ.
    assert ((moved - clips.video[:, :, -1]).abs() < 0.02).float().mean() > 0.75
    assert (still < 0.02).float().mean() < 0.6
    found = camera.maps_of_clip(clips.video)
    assert (found - maps).abs().flatten(1).amax(1).min() * 32 < 0.5


@pytest.mark.smoke
def test_dolly_and_track_move_near_scenery_more() -> None:
    corner = torch.tensor(31.5 / 32)  # how far the outermost pixel's middle lies from the picture's, in half sides
    maps = ray_maps(Move(dolly=0.9).path(5), 64, 64)  # from 0.45 behind the middle of its way to 0.45 before it
    for depth, channels in zip(camera.DEPTHS, (maps[:, :2], maps[:, 2:]), strict=True):
        shrunk = (1 - 0.45 / depth) / (1 + 0.45 / depth)
        torch.testing.assert_close(channels[:, :, -1].abs().amax(), (1 - shrunk) * corner)
    maps = ray_maps(Move(track=4).path(5), 64, 64)
    far, near = maps[:, :2, -1].abs().amax(), maps[:, 2:, -1].abs().amax()
    torch.testing.assert_close(near, 2 * far)
    torch.testing.assert_close(far, torch.tensor(4 * 4 / camera.DEPTHS[0] / 32))
    with pytest.raises(ValueError, match="dolly=5"):
        Move(dolly=5.0)
    with pytest.raises(ValueError, match="pan_x=nan"):
        Move(pan_x=float("nan"))
    words = {"pan_x": "pans right", "pan_y": "tilts down", "roll": "rolls right", "track": "tracks right"}
    for field, caption in words.items():
        scene = world.sample(8, 5, seed=1, cameras=(caption,))
        index = world.CAMERA_FIELDS.index(field)
        for clip in scene.camera:
            torch.testing.assert_close(Move(**{field: float(clip[1, index])}).path(5)[0], clip)


@pytest.mark.smoke
def test_another_camera_films_the_same_scene() -> None:
    scene = world.sample(6, 5, seed=4)
    for other in (world.sample(6, 5, seed=9).camera, scene.camera):
        filmed = world.with_camera(scene, other)
        back = world.with_camera(filmed, scene.camera)
        torch.testing.assert_close(back.centres, scene.centres)
        torch.testing.assert_close(back.radii, scene.radii)
    torch.testing.assert_close(world.with_camera(scene, scene.camera).draw(), scene.draw())
    with pytest.raises(ValueError, match="camera of shape"):
        world.with_camera(scene, scene.camera[:3])


@pytest.mark.smoke
def test_guidance_goes_from_what_is_predicted_without_the_past_through_what_is_with_it(base: Path) -> None:
    whole = Adapted(dit.load(base), AdapterConfig(memory_tokens=5, memory_width=32)).eval()
    x, level, ids, valid, _ = _inputs()
    given = {"past": x[:, :, :2], "times": torch.tensor([-4, -2])}
    with torch.no_grad():
        without, once, twice = (
            whole.steered(**given, guidance=guidance)(x, level, ids, valid) for guidance in (0.0, 1.0, 2.0)
        )
        assert torch.equal(once, whole(x, level, ids, valid, **given))
        torch.testing.assert_close(without, whole(x, level, ids, valid))
    assert (once - without).abs().max() > 1e-3
    torch.testing.assert_close(twice - once, once - without, atol=1e-5, rtol=1e-4)


def test_memory_tokens_stand_beside_the_text(base: Path) -> None:
    whole = Adapted(dit.load(base), AdapterConfig(memory_tokens=5, memory_width=32)).eval()
    x, level, ids, valid, _ = _inputs()
    past = world.render(2, 6, 32, 32, seed=8).video
    times = torch.arange(-12, 0, 2)
    with torch.no_grad():
        plain = whole(x, level, ids, valid)
        found = whole(x, level, ids, valid, past=past, times=times)
        assert (found - plain).abs().max() > 1e-3
        swapped = whole(x, level, ids, valid, past=past.flip(0), times=times)
        assert (found - swapped).abs().amax((1, 2, 3, 4)).min() > 1e-4
        assert whole.memory is not None
        # The same global tokens given as text: what memory says is what a text would say.
        inputs = whole.base.embed(x, level, ids, valid)
        text = torch.cat((inputs.text, whole.memory(past, times)), 1)
        real = torch.arange(16) < valid[:, None]
        real = torch.cat((real, torch.ones(2, 5, dtype=torch.bool)), 1)
        at = inputs.at._replace(grid=dataclasses.replace(inputs.at.grid, after=21), text_valid=real)
        at = at._replace(rope=whole.base.rope(at.grid, x.device))
        tokens = whole.base.transform(inputs._replace(text=text, at=at), level)
        from stattn.ops.patchify import unpatchify3d

        torch.testing.assert_close(unpatchify3d(tokens, at.grid.shape, (2, 8, 8), 3), found)
    for call, match in (
        (lambda: whole(x, level, ids, valid, past=past), "past needs times"),
        (lambda: whole(x, level, ids, valid, past=past, times=times[:3]), "times of shape"),
        (lambda: whole(x, level, ids, valid, ray_map=torch.zeros(2, 4, 4, 32, 32)), "without camera control"),
        (lambda: Adapted(DiT(dataclasses.replace(SMOKE.model, kind="cross")), AdapterConfig(memory_tokens=2)), "cross"),
        (lambda: Adapted(dit.load(base), AdapterConfig(camera_layers=3)), "layers=3"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_an_object_that_returns_was_seen_and_is_away_in_between() -> None:
    recipe = PRESETS["memory"]
    scene = adapters.returns(12, recipe, torch.Generator().manual_seed(1), "cpu")
    cover = scene.coverage(0).sum((2, 3))
    past, window = cover[:, : adapters.PAST_FRAMES], cover[:, adapters.PAST_FRAMES :]
    whole = past.amin(1)
    assert (whole > 100).all()
    assert (window[:, : adapters.ABSENT] == 0).all()
    assert (window[:, -1] > 0.98 * whole).all()
    assert scene.frames == adapters.PAST_FRAMES + recipe.frames


@pytest.mark.parametrize("adapts", ["camera", "memory"])
def test_adapters_train_beside_a_base_that_stays(base: Path, tmp_path: Path, adapts: str) -> None:
    recipe = _recipe(base, adapts)
    options = {"name": adapts, "device": "cpu", "quiet": True, "log_every": 1, "compile": False}
    record = train.train(recipe, tmp_path, steps=3, clips=2, **options)  # type: ignore[arg-type]
    assert set(record["evaluation"]) == {
        "clips",
        "real",
        "shuffled",
        *{"camera": ["generated", "reference"], "memory": ["guidance", "with", "without"]}[adapts],
    }
    whole = adapted.load(tmp_path / f"{adapts}.safetensors")
    for name, value in dit.load(base).state_dict().items():
        assert torch.equal(whole.base.state_dict()[name], value), name
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    fresh = adapters.kind(recipe).trainer(recipe, torch.device("cpu"))
    moved = [name for name, value in fresh.state()["model"].items() if not torch.equal(value, state["model"][name])]
    assert moved
    assert not any(name.startswith("base.") for name in moved)
    if adapts == "camera":
        assert "camera.out.0.weight" in moved
    assert (tmp_path / f"{adapts}.safetensors").stat().st_size < 2.2 * record["parameters"] + 20_000
    assert json.loads((tmp_path / f"{adapts}.json").read_text())["adapter"]["base"] == str(base)
    again = train.train(
        recipe, tmp_path / "more", steps=1, clips=0, start=str(tmp_path / f"{adapts}.safetensors"), **options
    )  # type: ignore[arg-type]
    assert again["steps"] == 1
    words = ["train", "--preset", adapts, "--evaluate", str(tmp_path / f"{adapts}.safetensors"), "--clips", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, adapts, recipe)
        assert cli.main([*words, "--out", str(tmp_path / "found"), "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "found" / "evaluation.json").read_text(encoding="utf-8"))["evaluation"]
    assert set(found) == set(record["evaluation"])
    # An adapter paints through the same door as the base.
    video = world.render(1, recipe.frames, 32, 32, seed=0).video
    given = {"ray_map": torch.zeros(1, 4, recipe.frames, 32, 32)} if adapts == "camera" else {
        "past": video, "times": torch.arange(-recipe.frames, 0)
    }  # fmt: skip
    sampling = Sampling(steps=2, size=(recipe.frames, 32, 32), overlap=1)
    assert (
        paint.paint(whole.base, video, torch.ones(1), [""], sampling, call=whole.steered(**given)).shape == video.shape
    )


def test_adapters_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter weights"):
        adapted.load("tiny")
    with pytest.raises(ValueError, match="no adapter weights"):
        adapted.load(tmp_path / "none.safetensors")
    recipe = dataclasses.replace(_recipe(base, "camera"), adapts="sound")
    with pytest.raises(ValueError, match="compile=True"):
        train.train(_recipe(base, "camera"), tmp_path, steps=1, compile=True)
    with pytest.raises(ValueError, match="adapts='sound'"):
        train.train(recipe, tmp_path, steps=1)
    with pytest.raises(ValueError, match="another config"):
        adapters.CameraTrainer(dataclasses.replace(recipe, model=PRESETS["small"].model), torch.device("cpu"))


def test_recovered_moves_are_the_requested_ones_on_real_clips() -> None:
    recipe = dataclasses.replace(PRESETS["camera"], frames=4)
    scene = adapters.free_cameras(10, recipe, torch.Generator().manual_seed(2), "cpu")
    only = scene.camera.clone()
    only[..., 3], only[..., 5] = 0, 0
    scene = world.with_camera(scene, only)
    found, asked = camera.moves_seen(scene.draw()), adapters._asked(scene)
    scores = adapters.agreement(found, asked)
    assert min(scores["pan_r2"], scores["zoom_r2"], scores["roll_r2"]) > 0.99
    assert adapters.agreement(found.roll(1, 0), asked)["pan_r2"] < 0.6


def test_a_command_films_by_numbers_and_by_a_reference(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Adapted(dit.load(base), AdapterConfig(base=str(base), camera_layers=1))
    assert whole.camera is not None
    torch.nn.init.normal_(whole.camera.out[0].weight)
    adapted.write(whole.adapters(), whole.adapter_config, tmp_path / "camera.safetensors")
    clip = world.render(1, 4, 32, 32, seed=5, cameras=("pans right",)).video[0]
    files.write_ffv1(tmp_path / "clip.mkv", clip, fps=8)
    words = ["camera", str(tmp_path / "out.mp4"), "--weights", str(tmp_path / "camera.safetensors"), "--steps", "2"]
    words += ["--size", "4,32,32", "--device", "cpu"]
    made = []
    for move in (["--pan-x", "1.5"], ["--pan-x", "-1.5"], ["--reference", str(tmp_path / "clip.mkv")]):
        assert cli.main([*words, *move, "--first-frame", str(tmp_path / "clip.mkv")]) == 0
        made.append(files.read_clip(tmp_path / "out.mkv")[0])
        assert "seen: --pan-x " in capsys.readouterr().out
        assert torch.equal(made[-1][:, :1], media.to_uint8(clip)[:, :1])
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    for bad, text in (
        ([], "give a move"),
        (["--pan-x", "1", "--reference", str(tmp_path / "clip.mkv")], "not both"),
        (["--reference", str(tmp_path / "none.mkv")], "no such file"),
        (["--pan-x", "1", "--size", "4,64,64", "--first-frame", str(tmp_path / "clip.mkv")], "32 x 32, not 64"),
    ):
        assert cli.main([*words, *bad]) == 1
        assert text in capsys.readouterr().err
