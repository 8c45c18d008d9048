"""Edits of video: exact outside what they change, whole tokens of work inside, and what they ask for in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stattn import cli, dit, masks, metrics, world
from stattn.dit import DiT
from stattn.metrics import checks
from stattn.recipes import PRESETS
from stattn.video import edit, files, media, objects, paint
from stattn.video.cache import TokenCache
from stattn.video.paint import Sampling, Work

QUICK = Sampling(steps=3, size=(4, 32, 32), overlap=1)


@pytest.fixture(scope="module")
def model() -> DiT:
    """A small model none of whose parts is idle."""
    torch.manual_seed(0)
    made = DiT(PRESETS["smoke"].model).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return made


@pytest.fixture(scope="module")
def tiny() -> DiT:
    return dit.load("tiny")


def _clip(
    seed: int = 1, frames: int = 4, height: int = 32, width: int = 32, **options: object
) -> tuple[Tensor, world.Clips]:
    clips = world.render(1, frames, height, width, seed=seed, objects=(1, 1), cameras=("static",), **options)  # type: ignore[arg-type]
    return media.to_uint8(clips.video[0]), clips


def _exact(result: edit.Edit, video: Tensor) -> None:
    kept = ~result.changed.expand_as(video)
    assert torch.equal(result.video[kept], video[kept])
    assert result.video.dtype == video.dtype
    assert (result.video != video)[~kept].float().mean() > 0.2


@pytest.mark.smoke
@pytest.mark.parametrize("size", [(4, 32, 32), (3, 30, 37), (9, 32, 32), (5, 70, 48)])
def test_nothing_changes_outside_the_mask_whatever_the_size(model: DiT, size: tuple[int, int, int]) -> None:
    video, _ = _clip(1, *size)
    mask = edit.moving_box(size, (2, 3, 10, 12), (15, 9))
    result = edit.inpaint(model, video, mask, "a red disc", QUICK)
    assert torch.equal(result.changed, mask)
    _exact(result, video)
    _exact(edit.inpaint(model, video.float() / 127.5 - 1, mask, "", QUICK), video.float() / 127.5 - 1)
    again = edit.inpaint(model, video, mask, "a red disc", QUICK)
    assert torch.equal(again.video, result.video)


@pytest.mark.smoke
def test_what_lies_under_the_mask_does_not_matter(model: DiT) -> None:
    video, _ = _clip()
    mask = edit.moving_box((4, 32, 32), (8, 8, 12, 12))
    other = torch.where(mask, 255 - video, video)
    results = [edit.inpaint(model, each, mask, "", QUICK).video for each in (video, other)]
    assert torch.equal(*results)


@pytest.mark.smoke
def test_a_cache_refreshed_at_every_step_is_the_plain_model_and_a_stale_one_is_near_it(model: DiT) -> None:
    video = world.render(2, 4, 32, 32, seed=3).video
    free = torch.zeros(1, 1, 4, 32, 32)
    free[..., 8:20, 3:14] = 1
    plain = paint.paint(model, video, free, sampling=QUICK)

    def through(refresh: int, mask: masks.Mask | None = None, steps: int = 3) -> tuple[Tensor, TokenCache]:
        cache = TokenCache(model, free > 0, refresh)
        sampling = Sampling(steps=steps, size=(4, 32, 32), overlap=1, mask=mask)
        return paint.paint(model, video, free, sampling=sampling, call=cache), cache

    fresh, cache = through(1)
    assert torch.equal(fresh, plain)
    assert cache.tokens == cache.whole == 3 * 32
    stale, cache = through(3)
    assert cache.tokens == 32 + 2 * 2 * 2 * 2  # whole once, then the 2 x 2 x 2 patches that the box touches
    assert torch.equal(stale[..., :8, :], plain[..., :8, :])
    error = (stale - plain).abs().max()
    assert 0 < error < plain.std()
    window = masks.window(1, 3, 3)
    near, cache = through(2, window)
    assert cache.tokens == 2 * 32 + 8
    assert (near - through(1, window)[0]).abs().max() < plain.std()
    assert (near - stale).abs().max() > 1e-4


@pytest.mark.smoke
@pytest.mark.parametrize("key", ["full()", "window(1, 3, 3)"])
def test_active_tokens_are_computed_as_the_whole_model_computes_them(model: DiT, key: str) -> None:
    x, free = torch.randn(2, 3, 4, 32, 32), torch.zeros(1, 1, 4, 32, 32, dtype=torch.bool)
    free[:, :, :2, :8, :8] = free[:, :, 2:, 17:, 25:] = True  # three patches, far from each other
    ids, valid = world.tokenize(["a red disc moves left", ""])
    cache = TokenCache(model, free, 2)
    with torch.no_grad():
        cache(x, torch.full((2,), 900.0), ids, valid, mask=masks.parse(key))
        # The same input at another noise level: only the kept tokens' keys are of the level before.
        level = torch.full((2,), 900.0 - 1e-4)
        part = cache(x, level, ids, valid, mask=masks.parse(key))
        whole = model(x, level, ids, valid, mask=masks.parse(key))
    where = free.expand_as(whole)
    torch.testing.assert_close(part[where], whole[where], atol=1e-4, rtol=1e-4)
    if key == "full()":
        assert cache.tokens == 32 + 3
        assert (part[:, :, :2, 16:] == 0).all()
    else:
        assert cache.tokens == 32 + 32  # the box around them is the whole grid


def test_a_cache_that_does_not_fit_is_refused(model: DiT) -> None:
    free = torch.ones(1, 1, 4, 32, 32, dtype=torch.bool)
    for call, text in (
        (lambda: TokenCache(model, free, 0), "refresh=0"),
        (lambda: TokenCache(model, free[..., :31]), "generated of shape"),
        (lambda: TokenCache(model, ~free), "nothing to generate"),
        (lambda: TokenCache(model, free)(torch.zeros(1, 3, 4, 32, 16), torch.zeros(1)), "token grid"),
        (lambda: TokenCache(model, free)(torch.zeros(2, 3, 4, 32, 32), torch.tensor([1.0, 2.0])), "one noise level"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


@pytest.mark.smoke
def test_strength_says_how_much_of_the_rough_video_stays(model: DiT) -> None:
    video, _ = _clip()
    signed = video[None].float() / 127.5 - 1
    mixed = torch.zeros(1, 1, 4, 32, 32)
    mixed[..., :16], mixed[..., 16:24] = 1.0, 0.3
    out = paint.paint(model, signed, mixed, sampling=QUICK)
    assert torch.equal(out[..., 24:], signed[..., 24:])
    hidden = signed.clone()
    hidden[..., :16] = 0.5
    assert torch.equal(paint.paint(model, hidden, mixed, sampling=QUICK)[..., :24], out[..., :24])
    hidden[..., 16:24] = 0.5
    assert not torch.equal(paint.paint(model, hidden, mixed, sampling=QUICK)[..., 16:24], out[..., 16:24])


@pytest.mark.smoke
def test_outpainting_keeps_the_picture_in_a_larger_one(model: DiT) -> None:
    video, _ = _clip(height=24, width=20)
    result = edit.outpaint(model, video, (3, 9, 0, 8), "", QUICK)
    assert result.video.shape == (3, 4, 32, 32)
    assert torch.equal(result.video[:, :, :24, 3:23], video)
    assert result.changed.sum() == 4 * (32 * 32 - 24 * 20)


def test_a_large_video_is_scaled_alike_on_both_axes(model: DiT) -> None:
    """What the model is given of a wide picture has the picture's shape, and the known part has its colours."""
    video = torch.zeros(3, 4, 32, 96)
    video[..., :48] = 0.5
    given: list[Tensor] = []

    def record(*args: object, **keywords: Tensor) -> None:
        given.append(keywords["known"])

    handle = model.register_forward_pre_hook(lambda module, args, keywords: record(**keywords), with_kwargs=True)
    mask = torch.ones(1, 4, 32, 96, dtype=torch.bool)
    mask[..., :12] = False
    try:
        edit.inpaint(model, video, mask, "", QUICK)
    finally:
        handle.remove()
    known = given[0][0]
    assert known.shape == (3, 4, 16, 32)  # 32 x 96 scaled by 3 is 11 x 32, and whole patches of it 16 x 32
    torch.testing.assert_close(known[..., :4], torch.full((3, 4, 16, 4), 0.5))
    assert (known[..., 4:] == 0).all()


def test_parts_of_a_long_video_continue_each_other(model: DiT) -> None:
    video = _clip(frames=10)[1].video[0]
    mask = torch.ones(1, 10, 32, 32, dtype=torch.bool)
    mask[:, :1] = False
    work = Work()
    long = paint.fill(model, video, mask.float(), "", QUICK, work=work)
    assert torch.equal(long[:, :1], video[:, :1])
    first = paint.fill(model, video[:, :4], mask[:, :4].float(), "", QUICK)
    assert torch.equal(long[:, :4], first)
    assert work.whole == 3 * 3 * 32  # three parts of three steps: frames 0-3, 3-6, 6-9
    second = paint.fill(model, torch.cat((first[:, 3:], video[:, 4:7]), 1), mask[:, :4].float(), "", QUICK)
    torch.testing.assert_close(long[:, 3:7], second)


def test_a_path_of_two_offsets_is_a_line_and_any_other_is_one_offset_a_frame() -> None:
    line = edit.as_path([(0, 0), (12, -6)], 4)
    torch.testing.assert_close(line, torch.tensor([[0.0, 0.0], [4.0, -2.0], [8.0, -4.0], [12.0, -6.0]]))
    each = torch.tensor([[0.0, 0.0], [1.0, 5.0], [-2.0, 3.0]])
    assert torch.equal(edit.as_path(each, 3), each)
    for wrong in ([(0, 0)], [(0, 0), (1, 1), (2, 2)], [(0, 0, 0), (1, 1, 1)]):
        with pytest.raises(ValueError, match=r"must be \[4, 2\] or \[2, 2\]"):
            edit.as_path(wrong, 4)


def test_a_box_moves_in_a_line_from_corner_to_corner() -> None:
    box = edit.moving_box((3, 30, 40), (2, 3, 10, 12), (14, 9))
    assert box.shape == (1, 3, 30, 40)
    for frame, (left, top) in enumerate(((2, 3), (8, 6), (14, 9))):
        expected = torch.zeros(30, 40, dtype=torch.bool)
        expected[top : top + 12, left : left + 10] = True
        assert torch.equal(box[0, frame], expected)
    assert torch.equal(edit.moving_box((2, 30, 40), (2, 3, 10, 12)), box[:, :1].expand(1, 2, 30, 40))
    with pytest.raises(ValueError, match=r"start=\(2, 3, 0, 12\)"):
        edit.moving_box((3, 30, 40), (2, 3, 0, 12))


def test_guidance_compares_with_a_pass_that_sees_no_text(model: DiT) -> None:
    seen: list[list[int]] = []

    def call(*args: object, **keywords: object) -> Tensor:
        seen.append(keywords["text_valid"].tolist())  # type: ignore[attr-defined]
        return model(*args, **keywords)

    rough, strength = torch.zeros(1, 3, 4, 32, 32), torch.ones(1)
    paint.paint(model, rough, strength, ["a red disc"], Sampling(steps=1, guidance=2.0), call=call)
    paint.paint(model, rough, strength, ["a red disc"], Sampling(steps=1, guidance=1.0), call=call)
    assert seen == [[3, 0], [3]]


def test_edits_with_the_shipped_model_do_what_they_say(tiny: DiT) -> None:
    clips = world.render(1, seed=8, objects=(1, 1), cameras=("static",))  # a green disc moves down
    video, scene = media.to_uint8(clips.video[0]), clips.scene
    sampling = Sampling(steps=6, refresh=2)
    result = edit.recolour(tiny, video, "green", "blue", "a blue disc moves down, camera static", sampling)
    _exact(result, video)
    hue, chroma = objects.hue_and_chroma(result.video)
    inside = scene.masks()[0, :, 0] > 0.5
    assert (objects.apart(hue, objects.hue_of("blue")) < 1 / 12)[inside].float().mean() > 0.95
    assert metrics.psnr(result.video, video, ~(scene.masks()[0, :, 0] > 0)[None]) > 30
    assert result.work.share < 0.8

    brush = objects.object_mask(video, "green")
    result = edit.motion_brush(tiny, video, brush, [(0, 0), (14, -6)], clips.captions[0], sampling)
    _exact(result, video)
    before, after = (checks.classify(x[None].float() / 127.5 - 1) for x in (video, result.video))
    asked = before.centres[0] + edit.as_path([(0, 0), (14, -6)], 16)
    assert (after.centres[0] - asked).norm(dim=1).max() < 3
    assert torch.equal(after.colours, before.colours)


def test_an_object_is_found_by_its_colour() -> None:
    clips = world.render(6, 4, seed=2)
    for video, scene_masks, colours in zip(clips.video, clips.scene.masks(), clips.scene.colours, strict=True):
        truth = scene_masks[:, 0] > 0.5
        found = objects.object_mask(video, world.COLOURS[int(colours[0])])[0]
        assert (found & truth).sum() > 0.93 * (found | truth).sum()
        centre = objects.centroid(found[None])
        assert (centre - objects.centroid(truth[None])).norm(dim=1).max() < 0.7
    one = world.render(1, 3, seed=2, objects=(1, 1))
    other = world.COLOURS[(int(one.colours[0]) + 3) % 6]
    with pytest.raises(ValueError, match="no frame shows"):
        objects.object_mask(one.video[0], other)


def test_what_an_object_hides_of_others_is_completed_from_all_frames() -> None:
    near = 0
    for seed in (4_500_005, 4_500_006, 4_500_009, 4_500_013, 4_500_018):  # objects that pass behind one another
        clips = world.render(1, 16, seed=seed, objects=(2, 2), cameras=("static",))
        scene, video = clips.scene, clips.video[0]
        first, second = (world.COLOURS[int(number)] for number in scene.colours[0, :2])
        brush = objects.object_mask(video, first)
        hole = objects.grown(brush, 2)
        guess, shown = objects.uncovered(video, brush, hole)
        away = torch.cat((scene.centres[:, :, :1] * 0 - 1e4, scene.centres[:, :, 1:]), 2)
        truth = objects.object_mask(dataclasses.replace(scene, centres=away).draw()[0], second)
        made = objects.object_mask(torch.where(hole, guess, video), second)
        near += int(((objects.centroid(truth) - objects.centroid(made)).norm(dim=1) < 2).sum())
        assert (objects.grown(truth, 3) | ~shown).all()
    assert near >= 0.95 * 5 * 16


def test_a_hue_turns_all_the_way_round() -> None:
    video = torch.rand(3, 2, 5, 6) * 2 - 1
    everywhere = torch.ones(1, 2, 5, 6, dtype=torch.bool)
    turned = objects.turn_hue(video, everywhere, 1 / 3)
    torch.testing.assert_close(turned, video.roll(1, 0))  # a third of a turn: red becomes green
    torch.testing.assert_close(objects.turn_hue(video, everywhere, 1.0), video)
    torch.testing.assert_close(objects.turn_hue(video, ~everywhere, 0.4), video)


@pytest.mark.parametrize("lossless", files.LOSSLESS)
@pytest.mark.parametrize("height, width", [(32, 48), (33, 47)])
def test_the_lossless_file_reads_back_equal(tmp_path: Path, lossless: str, height: int, width: int) -> None:
    video = torch.randint(0, 256, (3, 4, height, width), dtype=torch.uint8)
    written = files.write_result(tmp_path / "x" / "out.mp4", video, 12.5, lossless=lossless)
    assert written[0].is_file()
    if lossless == "ffv1":
        back, fps = files.read_clip(written[1])
        assert fps == 12.5
        assert torch.equal(back, video)
    else:
        images = media.extra("PIL.Image", "pillow")
        for number in range(4):
            with images.open(written[1] / f"frame_{number:05d}.png") as picture:
                assert torch.equal(torch.tensor(list(picture.tobytes())), video[:, number].permute(1, 2, 0).flatten())


@pytest.fixture
def clip_file(tmp_path: Path) -> Path:
    files.write_ffv1(tmp_path / "clip.mkv", _clip(8, 6, 48, 64)[0], fps=8)
    return tmp_path / "clip.mkv"


def test_the_command_edits_files(clip_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video, _ = files.read_clip(clip_file)
    quick = ["--steps", "2", "--size", "4,32,32", "--overlap", "1"]
    mask = torch.zeros(3, 6, 48, 64, dtype=torch.uint8)
    mask[:, :, 20:30, 30:] = 255
    files.write_ffv1(tmp_path / "mask.mkv", mask, fps=8)
    for name, options in (
        ("inpaint", ["--mask", str(tmp_path / "mask.mkv"), "--refresh", "2"]),
        ("inpaint", ["--box", "4,5,20,20", "--box-to", "30,20"]),
        ("outpaint", ["--margins", "4,4,0,8"]),
        ("recolour", ["--source", "green", "--target", "red"]),
        ("restyle", ["--strength", "0.5"]),
        ("motion-brush", ["--colour", "green", "--path", "6,4"]),
    ):
        assert cli.main(["edit", name, str(clip_file), str(tmp_path / "out.mp4"), *options, *quick]) == 0
        made, fps = files.read_clip(tmp_path / "out.mkv")
        assert fps == 8
        if name == "inpaint" and "--mask" in options:
            assert torch.equal(made[mask == 0], video[mask == 0])
            assert not torch.equal(made, video)
        assert made.shape == ((3, 6, 56, 72) if name == "outpaint" else video.shape)
    assert "of the tokens were computed" in capsys.readouterr().out


def test_bad_files_and_regions_get_a_clear_error(
    clip_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.mp4").write_text("no video", encoding="utf-8")
    files.write_ffv1(tmp_path / "short.mkv", torch.zeros(3, 5, 48, 64, dtype=torch.uint8), fps=8)
    files.write_ffv1(tmp_path / "small.mkv", torch.zeros(3, 6, 48, 62, dtype=torch.uint8), fps=8)
    files.write_ffv1(tmp_path / "black.mkv", torch.zeros(3, 6, 48, 64, dtype=torch.uint8), fps=8)
    clip, out = str(clip_file), str(tmp_path / "out.mp4")
    for words, text in (
        (["inpaint", str(tmp_path / "none.mp4"), out, "--box", "0,0,4,4"], "no such file"),
        (["inpaint", str(tmp_path / "text.mp4"), out, "--box", "0,0,4,4"], "text.mp4' cannot be read as video"),
        (["inpaint", clip, out, "--mask", str(tmp_path / "short.mkv")], "has 5 frames, the video 6"),
        (["inpaint", clip, out, "--mask", str(tmp_path / "small.mkv")], "is 48 x 62 pixels, the video 48 x 64"),
        (["inpaint", clip, out, "--mask", str(tmp_path / "black.mkv")], "mask covers no pixel"),
        (["inpaint", clip, out, "--box", "90,90,4,4"], "mask covers no pixel"),
        (["inpaint", clip, str(tmp_path / "out.avi"), "--box", "0,0,4,4"], "must end in .mp4"),
        (["outpaint", clip, out, "--margins", "0,0,0,0"], "margins="),
        (["recolour", clip, out, "--source", "red", "--target", "blue"], "no frame shows"),
        (["restyle", clip, out, "--strength", "0"], "strength=0"),
        (["motion-brush", clip, out, "--path", "3,3"], "--colour or a region"),
        (["motion-brush", clip, out, "--colour", "green", "--path", "3,3;4,4;5,5"], "path of shape"),
    ):
        assert cli.main(["edit", *words]) == 1, words
        assert text in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["edit", "motion-brush", clip, out, "--colour", "green", "--path", "1,2,3"])
    assert "must be 2 numbers" in capsys.readouterr().err
    with pytest.raises(ValueError, match="overlap=16"):
        Sampling(overlap=16)
    model = DiT(PRESETS["smoke"].model)
    with pytest.raises(ValueError, match="refresh=2 is for the model alone"):
        paint.paint(model, torch.zeros(1, 3, 4, 32, 32), torch.ones(1), sampling=Sampling(refresh=2), call=model)
    with pytest.raises(ValueError, match="strength must lie"):
        paint.paint(model, torch.zeros(1, 3, 4, 32, 32), torch.tensor(1.5))
    with pytest.raises(ValueError, match="mask of shape"):
        edit.inpaint(DiT(PRESETS["smoke"].model), torch.zeros(3, 4, 8, 8), torch.ones(1, 3, 8, 8, dtype=torch.bool))
