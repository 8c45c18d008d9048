"""The synthetic world: what the truth says is what the picture shows."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from stattn import world
from stattn.world import scene as scene_module


def _warp(frames: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Look up frames [B, 3, T, H, W] where the flow [B, T, 2, H, W] leads to; NaN outside the picture."""
    batch, _, count, height, width = frames.shape
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    x, y = x + flow[:, :, 0], y + flow[:, :, 1]
    where = torch.stack((x / width, y / height), -1) * 2 - 1
    flat = frames.transpose(1, 2).flatten(0, 1)
    found = F.grid_sample(flat, where.flatten(0, 1), align_corners=False).unflatten(0, (batch, count)).transpose(1, 2)
    outside = (where.abs() > 1 - 2 / width).any(-1)
    return torch.where(outside[:, None], torch.nan, found)


def _flat(scene: world.Scene) -> torch.Tensor:
    """Find the pixels far from every edge of an object or of the near layer, where the flow is smooth: [B, T, H, W]."""
    edges = torch.cat((scene.masks(), scene._near_cover()[:, :, None]), 2).flatten(0, 1)
    low, high = -F.max_pool2d(-edges, 5, 1, 2), F.max_pool2d(edges, 5, 1, 2)
    return ((high - low) < 1e-6).all(1).unflatten(0, (scene.batch, scene.frames))


@pytest.mark.smoke
@pytest.mark.parametrize("camera", world.CAMERAS)
def test_the_flow_leads_each_pixel_to_where_it_is_in_the_next_frame(camera: str) -> None:
    clips = world.render(3, 6, seed=11, cameras=(camera,))
    scene, video = clips.scene, clips.video
    flow = scene.flow()
    assert flow.shape == (3, 5, 2, 64, 64)
    error = (_warp(video[:, :, 1:], flow) - video[:, :, :-1]).abs().amax(1)
    smooth = _flat(scene)
    arrives = _warp(smooth[:, None, 1:].float().expand(-1, 3, -1, -1, -1), flow)[:, 0]
    where = smooth[:, :-1] & (arrives > 0.999)  # and not towards an edge, where it may be covered
    assert where.float().mean() > 0.4
    assert error[where].mean() < 0.01
    assert error[where].quantile(0.99) < 0.06
    # The control: no motion, and the motion reversed, do not lead there (a static camera moves the objects alone).
    for wrong in (torch.zeros_like(flow), -flow):
        missed = (_warp(video[:, :, 1:], wrong) - video[:, :, :-1]).abs().amax(1)
        if camera == "static":
            missed, inside = missed[:, :, 4:-4, 4:-4], scene.masks()[:, :-1].sum(2)[:, :, 4:-4, 4:-4] > 0.5
            assert missed[inside].nanmean() > 2 * error[:, :, 4:-4, 4:-4][inside].nanmean()
        else:
            assert missed[where].nanmean() > 3 * error[where].mean()


@pytest.mark.parametrize("camera", ["zooms in", "zooms out"])
def test_the_flow_of_an_object_follows_its_edge_as_it_grows(camera: str) -> None:
    scene = world.sample(16, 3, seed=13, objects=(1, 1), cameras=(camera,))  # 3 frames: it grows by a tenth in each
    mask = scene.masks()[:, None, :, 0].expand(-1, 3, -1, -1, -1)
    flow = scene.flow()
    edge = (mask[:, 0, :-1] >= 0.5) & (mask[:, 0, :-1] < 0.999)
    follows = (_warp(mask[:, :, 1:], flow)[:, 0] - mask[:, 0, :-1]).abs()[edge]
    # The control: all of the object moving as its centre does.
    centre = scene.centres[:, :, 0].diff(dim=1)[..., None, None]
    misses = (_warp(mask[:, :, 1:], centre.expand_as(flow))[:, 0] - mask[:, 0, :-1]).abs()[edge]
    assert follows.mean() < 0.15  # a pixel's edge, seen through bilinear sampling
    assert misses.mean() > 0.2


def test_a_zoom_magnifies_both_layers_alike_and_a_dolly_the_near_one_more() -> None:
    magnified = {}
    for camera in ("zooms in", "dollies in", "pans right", "tracks right"):
        scene = world.sample(4, seed=3, cameras=(camera,))
        layers = [scene.layer(index) for index in range(2)]
        scale = [torch.linalg.det(matrix).sqrt() for matrix, _ in layers]
        magnified[camera] = (
            [(each[:, 0] / each[:, -1]).tolist() for each in scale],
            [shift[:, -1, 0] for _, shift in layers],
        )
    far, near = magnified["zooms in"][0]
    assert far == pytest.approx(near)
    assert min(far) > 1.2
    far, near = magnified["dollies in"][0]
    assert all(f > 1.1 and n > f * 1.1 for f, n in zip(far, near, strict=True))
    far_shift, near_shift = magnified["pans right"][1]
    torch.testing.assert_close(far_shift, near_shift)
    far_shift, near_shift = magnified["tracks right"][1]
    torch.testing.assert_close(2 * far_shift, near_shift)
    assert far_shift.min() > 0


def test_a_zoom_magnifies_the_objects_and_no_other_move_does() -> None:
    zoom = world.sample(8, seed=5, cameras=("zooms in",))
    assert ((zoom.radii[:, -1] / zoom.radii[:, 0]) > 1.2).all()
    other = world.sample(64, seed=5, cameras=[c for c in world.CAMERAS if "zoom" not in c])
    torch.testing.assert_close(other.radii, other.radii[:, :1].expand_as(other.radii))


@pytest.mark.parametrize("size", [(16, 64, 64), (48, 32, 56), (200, 64, 64)])
def test_bouncing_objects_stay_in_the_picture_and_keep_their_speed(size: tuple[int, int, int]) -> None:
    frames, height, width = size
    scene = world.sample(64, *size, seed=7, objects=(3, 3))
    extent = torch.tensor(scene_module.EXTENT)[scene.shapes][:, None] * scene.radii[..., None]  # left, right, up, down
    x, y = scene.centres.unbind(-1)
    assert (x - extent[..., 0]).min() > -1e-3
    assert (x + extent[..., 1]).max() < width + 1e-3
    assert (y - extent[..., 2]).min() > -1e-3
    assert (y + extent[..., 3]).max() < height + 1e-3
    # On the box's own scale the speed of every axis is one number, but for the frame in which a wall is hit.
    middle = torch.tensor((width / 2, height / 2))
    steps = ((scene.centres - middle) / scene.camera[:, :, 2, None, None]).diff(dim=1).abs()
    usual = steps.amax(1, keepdim=True)
    assert (steps <= usual + 1e-3).all()
    assert ((steps - usual).abs() < 1e-3).float().mean() > 0.85
    turned = scene.centres.diff(dim=1)[..., 0].sign().diff(dim=1).abs().amax((1, 2)) > 1
    assert turned.any()


def test_the_first_object_sets_out_in_the_direction_of_its_caption() -> None:
    scene = world.sample(128, seed=9, cameras=("static",))
    step = scene.centres[:, 8, 0] - scene.centres[:, 0, 0]
    expected = torch.tensor([[-1.0, 0], [1, 0], [0, -1], [0, 1]])[scene.directions[:, 0]]
    along = (step * expected).sum(-1)
    assert (along > 6).all()
    assert (along > (step - along[:, None] * expected).abs().amax(-1)).all()


def test_the_first_object_is_the_largest_and_no_two_share_a_colour() -> None:
    scene = world.sample(256, seed=2)
    assert (scene.radii[:, :, 0] ** 2 > 1.5 * scene.radii[:, :, 1:].amax(-1) ** 2).all()
    assert all(len(set(row)) == 3 for row in scene.colours.tolist())
    assert set(scene.count.tolist()) == {1, 2, 3}


@pytest.mark.smoke
def test_masks_hold_the_area_centre_and_colour_of_each_object() -> None:
    clips = world.render(24, 4, seed=4, objects=(3, 3))
    scene, masks = clips.scene, clips.scene.masks()
    assert masks.shape == (24, 4, 3, 64, 64)
    assert masks.sum(2).max() <= 1 + 1e-6
    first = masks[:, :, 0]
    area = first.sum((-2, -1))
    torch.testing.assert_close(area, math.pi * scene.radii[:, :, 0] ** 2, rtol=0.03, atol=0)
    place = torch.arange(64) + 0.5
    centre = torch.stack(((first * place).sum((-2, -1)) / area, (first * place[:, None]).sum((-2, -1)) / area), -1)
    torch.testing.assert_close(centre, scene.centres[:, :, 0], atol=0.15, rtol=0)
    for index in range(3):
        shown = (masks[:, :, index] > 1 - 1e-6)[:, None].expand_as(clips.video)
        colour = (scene.rgb()[:, index] * 2 - 1)[:, :, None, None, None].expand_as(clips.video)
        torch.testing.assert_close(clips.video[shown], colour[shown])
        # The control: what is behind hides nothing.
        assert index == 0 or masks[:, :, index].sum() < scene.coverage(index).sum()


def test_an_absent_object_leaves_no_trace() -> None:
    one = world.sample(8, 4, seed=6, objects=(1, 1))
    assert one.masks()[:, :, 1:].sum() == 0
    moved = dataclasses.replace(one, colours=torch.cat((one.colours[:, :1], (one.colours[:, 1:] + 1) % 6), 1))
    torch.testing.assert_close(moved.draw(), one.draw(), rtol=0, atol=0)


def test_the_scenery_is_too_grey_to_be_taken_for_an_object() -> None:
    scene = world.sample(64, 2, seed=8)
    video = (scene.draw() + 1) / 2
    chroma = video.amax(1) - video.amin(1)
    scenery = scene.masks().sum(2) < 1e-6
    assert chroma[scenery].max() < 0.22
    assert chroma[(scene.masks() > 1 - 1e-6).any(2)].min() > 0.6


@pytest.mark.smoke
def test_one_seed_is_one_scene_whatever_the_batch_is_asked_for_next() -> None:
    a, b, c = (world.render(4, 4, 32, 32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.video, b.video)
    assert a.captions == b.captions
    assert not torch.equal(a.video, c.video)
    generator = torch.Generator().manual_seed(1)
    first, second = (world.render(4, 4, 32, 32, generator=generator) for _ in range(2))
    assert torch.equal(first.video, a.video)
    assert not torch.equal(second.video, a.video)


def test_one_seed_is_one_scene_at_every_resolution() -> None:
    small, large = (world.render(4, 4, side, side, seed=3) for side in (64, 128))
    assert small.captions == large.captions
    halved = F.avg_pool2d(large.video.flatten(1, 2), 2).unflatten(1, (3, 4))
    assert (halved - small.video).abs().mean() < 0.02
    assert (halved.flip(0) - small.video).abs().mean() > 0.2


def test_a_clip_is_periodic_scenery_without_a_seam() -> None:
    scene = world.sample(6, 2, seed=12)
    textures = scene._surface(*scene._fields()[:, :2].unbind(1), 0)
    inner = textures.diff(dim=-1).abs().mean()
    seam = (textures[..., 0] - textures[..., -1]).abs().mean()
    assert seam < 1.3 * inner
    assert textures.std() > 3 * inner


@pytest.mark.smoke
def test_captions_tell_the_truth_and_tokens_repeat_them() -> None:
    scene = world.sample(200, 2, 32, 32, seed=14)
    captions = scene.captions()
    ids, valid = scene.tokens()
    again, counts = world.tokenize(captions)
    assert torch.equal(ids, again)
    assert torch.equal(valid, counts)
    assert valid.max() == world.CAPTION_LENGTH
    for b, caption in enumerate(captions):
        words = caption.replace(",", "").split()
        assert words[:4] == ["a", world.COLOURS[scene.colours[b, 0]], world.SHAPES[scene.shapes[b, 0]], "moves"]
        assert words[4] == world.DIRECTIONS[scene.directions[b, 0]]
        assert caption.endswith("camera " + world.CAMERAS[scene.moves[b]])
        others = [
            (world.COLOURS[scene.colours[b, k]], world.SHAPES[scene.shapes[b, k]]) for k in range(1, scene.count[b])
        ]
        assert [(c, s) for c, s in zip(words[5:], words[6:], strict=False) if c in world.COLOURS] == others


def test_clauses_can_be_left_out_of_the_tokens() -> None:
    scene = world.sample(60, 2, 32, 32, seed=15)
    no = torch.zeros(60, dtype=torch.bool)
    ids, valid = scene.tokens(20, motion=no, others=no, camera=no)
    expected = [
        f"a {world.COLOURS[c]} {world.SHAPES[s]}" for c, s in zip(scene.colours[:, 0], scene.shapes[:, 0], strict=True)
    ]
    again, counts = world.tokenize(expected, 20)
    assert torch.equal(ids, again)
    assert torch.equal(valid, counts)


def test_unknown_words_and_long_captions_are_refused_by_name() -> None:
    assert world.tokenize(["A red disc, camera static", ""])[1].tolist() == [5, 0]
    with pytest.raises(ValueError, match="unknown word 'mauve'"):
        world.tokenize(["a mauve disc"])
    with pytest.raises(ValueError, match="17 words, more than length=16"):
        world.tokenize([" ".join(["a"] * 17)])
    with pytest.raises(TypeError, match="must be a sequence"):
        world.tokenize("a red disc")
    with pytest.raises(ValueError, match="length=15 must be at least 16"):
        world.sample(1, seed=0).tokens(15)


def test_a_recoloured_scene_differs_on_its_object_alone() -> None:
    scene = world.sample(6, 3, seed=16, objects=(1, 1))
    other = world.with_colours(scene, (scene.colours + 2) % 6)
    difference = (other.draw() - scene.draw()).abs().amax(1)
    covered = scene.masks()[:, :, 0] > 0
    assert difference[~covered].max() == 0
    assert difference[scene.masks()[:, :, 0] > 0.99].min() > 0.3
    with pytest.raises(ValueError, match=r"colours of shape \(6,\)"):
        world.with_colours(scene, scene.colours[:, 0])


def test_photographs_serve_as_scenery() -> None:
    pytest.importorskip("skimage")
    photos = world.photographs(64)
    assert photos.shape[1:] == (3, 64, 64)
    torch.testing.assert_close(photos[..., 0], photos[..., -1])  # mirrored: no seam
    with_photos = world.render(4, 2, seed=1, textures=photos)
    assert with_photos.captions == world.render(4, 2, seed=1).captions
    assert (with_photos.video - world.render(4, 2, seed=1).video).abs().mean() > 0.05
    assert (photos.amax(1) - photos.amin(1)).max() < 0.26
    with pytest.raises(ValueError, match="period=7"):
        world.photographs(7)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"seed": None}, "seed=None and generator=None"),
        ({"generator": torch.Generator()}, "give exactly one"),
        ({"batch": -1}, "batch=-1"),
        ({"frames": 0}, "frames=0"),
        ({"height": 8}, "height=8"),
        ({"objects": (0, 1)}, r"objects=\(0, 1\)"),
        ({"objects": (2, 4)}, r"objects=\(2, 4\)"),
        ({"cameras": ("spins",)}, r"cameras=\('spins',\)"),
        ({"cameras": ()}, r"cameras=\(\)"),
        ({"textures": torch.zeros(3, 8, 8)}, r"textures of shape \(3, 8, 8\)"),
    ],
)
def test_bad_arguments_are_refused_by_name(wrong: dict[str, object], message: str) -> None:
    good = {"batch": 2, "frames": 2, "height": 16, "width": 16, "seed": 0}
    assert world.render(**good).video.shape == (2, 3, 2, 16, 16)
    with pytest.raises(ValueError, match=message):
        world.render(**{**good, **wrong})


@pytest.mark.gpu
def test_a_seed_draws_the_same_clips_on_the_gpu() -> None:
    here, there = (world.render(4, seed=1, device=device) for device in ("cpu", "cuda"))
    torch.testing.assert_close(there.video.cpu(), here.video, atol=2e-3, rtol=0)
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert world.render(4, generator=generator, device="cuda").video.is_cuda


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 24, 96, 256])
def test_random_fields_are_the_same_on_the_gpu_at_any_batch(batch: int) -> None:
    scene = world.sample(batch, seed=1)
    moved = dataclasses.replace(
        scene,
        **{
            f.name: getattr(scene, f.name).cuda()
            for f in dataclasses.fields(scene)
            if torch.is_tensor(getattr(scene, f.name))
        },
    )
    torch.testing.assert_close(moved.draw().cpu(), scene.draw(), atol=2e-3, rtol=0)
