"""The automatic checks: they know real clips, and do not know shuffled captions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from stattn import world
from stattn.metrics import checks
from stattn.world import scene as scene_module


@pytest.mark.parametrize("objects", [(1, 1), (1, 3)])
def test_real_clips_show_what_their_captions_ask_and_not_what_others_ask(objects: tuple[int, int]) -> None:
    right, wrong, direction = [], [], []
    for seed in range(8):
        clips = world.render(32, seed=seed, objects=objects)
        seen = checks.classify(clips.video)
        right.append((seen.colours == clips.colours) & (seen.shapes == clips.shapes))
        order = torch.randperm(32)
        wrong.append((seen.colours == clips.colours[order]) & (seen.shapes == clips.shapes[order]))
        direction.append(seen.directions == clips.directions)
    assert torch.cat(right).float().mean() >= 0.99
    assert torch.cat(wrong).float().mean() < 0.25
    assert torch.cat(direction).float().mean() >= 0.95


@pytest.mark.smoke
@pytest.mark.parametrize("size", [(16, 64, 64), (8, 32, 32), (4, 128, 96)])
def test_every_colour_and_shape_is_known_at_every_size(size: tuple[int, int, int]) -> None:
    scene = world.sample(18, *size, seed=1, objects=(1, 1))
    colours, shapes = torch.arange(18) % 6, torch.arange(18) // 6
    every = torch.stack((colours, shapes), 1)
    scene = dataclasses.replace(
        scene,
        colours=torch.cat((colours[:, None], scene.colours[:, 1:]), 1),
        shapes=torch.cat((shapes[:, None], scene.shapes[:, 1:]), 1),
    )
    seen = checks.classify(scene.draw())
    assert torch.equal(torch.stack((seen.colours, seen.shapes), 1), every)
    assert checks.agreement(scene.draw(), colours, shapes) == {"colour": 1.0, "shape": 1.0, "both": 1.0}
    assert checks.agreement(scene.draw(), colours, (shapes + 1) % 3) == {"colour": 1.0, "shape": 0.0, "both": 0.0}


@pytest.mark.parametrize("damage", ["blur", "noise", "fade"])
def test_soft_and_noisy_clips_are_known_too(damage: str) -> None:
    clips = world.render(64, 8, seed=21)
    if damage == "blur":
        video = F.avg_pool3d(clips.video, (1, 5, 5), 1, (0, 2, 2), count_include_pad=False)
    elif damage == "noise":
        video = clips.video + 0.1 * torch.randn_like(clips.video)
    else:
        video = clips.video * 0.75
    assert checks.agreement(video, clips.colours, clips.shapes)["both"] >= 0.97


def test_a_few_wrong_frames_are_outvoted_and_many_are_not() -> None:
    red, blue = (world.with_colours(world.sample(12, seed=5), torch.tensor([[c, 1, 2]] * 12)) for c in (0, 4))
    video, other = red.draw(), blue.draw()
    ids = torch.zeros(12, dtype=torch.int64)
    assert checks.agreement(torch.cat((other[:, :, :5], video[:, :, 5:]), 2), ids, red.shapes[:, 0])["colour"] == 1.0
    assert checks.agreement(torch.cat((other[:, :, :11], video[:, :, 11:]), 2), ids, red.shapes[:, 0])["colour"] == 0.0


def test_the_centre_of_the_object_is_followed() -> None:
    clips = world.render(24, seed=6)
    seen = checks.classify(clips.video)
    assert (seen.centres - clips.scene.centres[:, :, 0]).abs().max() < 0.5
    area = torch.pi * clips.scene.radii[:, :, 0] ** 2
    assert ((seen.areas - area).abs() / area).max() < 0.1


@pytest.mark.smoke
def test_scenery_alone_shows_no_object() -> None:
    scene = dataclasses.replace(world.sample(6, 4, seed=7), count=torch.zeros(6, dtype=torch.int64))
    for video in (scene.draw(), torch.zeros(6, 3, 4, 64, 64)):
        seen = checks.classify(video)
        for ids in (seen.colours, seen.shapes, seen.directions):
            assert (ids == -1).all()
        assert seen.centres.isnan().all()


def test_the_moments_of_drawn_shapes_are_those_of_the_table() -> None:
    # The table of the docstring, computed on a fine raster.
    y, x = torch.meshgrid(*[torch.arange(-1.75, 1.75, 0.005, dtype=torch.float64)] * 2, indexing="ij")
    z = torch.complex(x, y)
    corner = scene_module._TRIANGLE
    triangle = (y < corner / 2) & (0.75**0.5 * x.abs() - y / 2 < corner / 2)
    expected = {
        "square": (x.abs().maximum(y.abs()) < 0.8, 0.0, checks.SQUARE_M4),
        "disc": (x * x + y * y < 1, 0.0, 0.0),
    }
    expected["triangle"] = (triangle, checks.TRIANGLE_M3, 0.0)
    for inside, third, fourth in expected.values():
        area = inside.sum()
        cell = 0.005**2
        m3, m4 = ((z[inside] ** k).sum().abs() * cell / (area * cell) ** (1 + k / 2) for k in (3, 4))
        assert m3.item() == pytest.approx(third, abs=2e-4)
        assert m4.item() == pytest.approx(fourth, abs=2e-4)


@pytest.mark.smoke
def test_flicker_ignores_steady_motion_and_counts_jumps() -> None:
    ramp = torch.arange(8.0)[:, None, None].expand(1, 3, 8, 16, 16) / 8
    assert checks.jumps(ramp).item() == pytest.approx(0, abs=1e-6)
    jumps = torch.zeros(1, 3, 8, 16, 16)
    jumps[:, :, ::2] = 0.1
    assert checks.jumps(jumps).item() == pytest.approx(0.2)
    clips = world.render(16, seed=3)
    assert checks.flicker_ratio(clips.video, clips.video) == pytest.approx(1)
    assert checks.flicker_ratio(clips.video + 0.05 * torch.randn_like(clips.video), clips.video) > 1.5
    order = torch.randperm(16)
    assert checks.flicker_ratio(clips.video[:, :, order], clips.video) > 2
    frozen = clips.video[:, :, :1].expand_as(clips.video)
    assert checks.flicker_ratio(frozen, clips.video) < 0.01


def test_bad_shapes_are_refused_by_name() -> None:
    good = torch.zeros(2, 3, 4, 16, 16)
    assert checks.jumps(good).shape == (2,)
    with pytest.raises(ValueError, match=r"video of shape \(2, 1, 4, 16, 16\)"):
        checks.classify(good[:, :1])
    with pytest.raises(ValueError, match="T >= 3"):
        checks.jumps(good[:, :, :2])
    with pytest.raises(ValueError, match=r"colours of shape \(3,\)"):
        checks.agreement(good, torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"shapes of shape \(3,\)"):
        checks.agreement(good, torch.zeros(2), torch.zeros(3))
