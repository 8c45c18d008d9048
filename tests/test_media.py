"""Video files: what is written reads back, and what cannot be written is refused by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from stattn.video import media

pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")


def _clip(frames: int = 6, height: int = 32, width: int = 48) -> torch.Tensor:
    """Return a bright square that moves right over a gradient, [3, T, H, W] in -1..1."""
    x = torch.linspace(-1, 0.5, width).expand(3, frames, height, width).clone()
    for t in range(frames):
        x[0, t, 8:24, 4 * t : 4 * t + 12] = 1
        x[1:, t, 8:24, 4 * t : 4 * t + 12] = -1
    return x


def test_levels_are_rounded_and_clamped():
    video = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(3, 1, 1, 5)
    assert media.to_uint8(video)[0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    assert media.to_uint8(video.bfloat16()).dtype == torch.uint8
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 1, 256)
    assert torch.equal(media.to_uint8(levels.float() / 127.5 - 1), levels)
    assert torch.equal(media.to_uint8(levels), levels)


def test_small_clips_are_enlarged_four_times_and_large_ones_are_left():
    assert media.enlarge(torch.zeros(3, 1, 64, 128)).shape == (3, 1, 256, 512)
    assert media.enlarge(torch.zeros(3, 1, 64, 130)).shape == (3, 1, 64, 130)
    assert media.enlarge(torch.tensor([[1, 2]]), 2).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


@pytest.mark.smoke
def test_an_mp4_reads_back_nearly_the_same_with_its_frame_rate(tmp_path):
    path = tmp_path / "new" / "clip.mp4"
    media.write_mp4(path, _clip(), fps=12)
    video, fps = media.read_video(path)
    assert video.shape == (3, 6, 128, 192)
    assert video.dtype == torch.uint8
    assert fps == 12
    wanted = media.enlarge(media.to_uint8(_clip()))
    difference = (video.float() - wanted.float()).abs()
    assert difference.mean() < 4
    assert difference[:, :, 8:24, 4:12].mean() < difference.new_tensor(6)


def test_an_mp4_is_yuv420p_h264(tmp_path):
    import av

    media.write_mp4(tmp_path / "clip.mp4", _clip())
    with av.open(str(tmp_path / "clip.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")


def test_reading_stops_at_max_frames(tmp_path):
    media.write_mp4(tmp_path / "clip.mp4", _clip())
    assert media.read_video(tmp_path / "clip.mp4", max_frames=2)[0].shape[1] == 2


def test_a_gif_keeps_its_length_loops_and_shows_each_frame(tmp_path):
    media.write_gif(tmp_path / "clip.gif", _clip(), fps=10, scale=1)
    wanted = media.to_uint8(_clip())
    with Image.open(tmp_path / "clip.gif") as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (6, (48, 32), 0)
        total = 0
        for t in range(image.n_frames):
            image.seek(t)
            total += image.info["duration"]
            frame = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(32, 48, 3)
            assert (frame.permute(2, 0, 1).float() - wanted[:, t].float()).abs().mean() < 3
        assert total == 600


def test_a_contact_sheet_has_a_row_per_clip_from_first_to_last_frame(tmp_path):
    clips = torch.stack([_clip(), -_clip(), _clip().flip(1)])
    media.contact_sheet(tmp_path / "sheet.png", clips, columns=4, scale=1)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (4 + 4 * (48 + 4), 4 + 3 * (32 + 4))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    wanted = media.to_uint8(clips)
    for row in range(3):
        for column, t in enumerate([0, 2, 3, 5]):
            top, left = 4 + row * 36, 4 + column * 52
            assert torch.equal(pixels[top : top + 32, left : left + 48], wanted[row, :, t].permute(1, 2, 0))


def test_captions_are_drawn_above_the_rows(tmp_path):
    clips = torch.stack([_clip(), _clip()])
    media.contact_sheet(tmp_path / "sheet.png", clips, captions=["a red square", "moves right"], columns=4, scale=1)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size[1] == 4 + 2 * (32 + 16 + 4)
        assert image.crop((4, 4, 100, 20)).convert("L").getextrema()[1] > 200


REFUSED = [
    (lambda p, v: media.write_mp4(p, v[None]), ValueError, r"\(1, 3, 6, 32, 48\)"),
    (lambda p, v: media.write_mp4(p, v[:2]), ValueError, r"shape=\(2, 6, 32, 48\)"),
    (lambda p, v: media.write_mp4(p, v[:, :0]), ValueError, "empty axis"),
    (lambda p, v: media.write_mp4(p, v.int()), TypeError, "int32"),
    (lambda p, v: media.write_mp4(p, v.numpy()), TypeError, "ndarray"),
    (lambda p, v: media.write_mp4(p, v * float("nan")), ValueError, "finite"),
    (lambda p, v: media.write_mp4(p, v[..., 1:], scale=1), ValueError, "32 x 47 pixels"),
    (lambda p, v: media.write_mp4(p, v, fps=0), ValueError, "fps=0"),
    (lambda p, v: media.write_gif(p, v, fps=-1), ValueError, "fps=-1"),
    (lambda p, v: media.write_gif(p, v, scale=0), ValueError, "scale=0"),
    (lambda p, v: media.write_gif(p, v, scale=1.5), ValueError, "scale=1.5"),
    (lambda p, v: media.contact_sheet(p, v), ValueError, r"videos=\(3, 6, 32, 48\)"),
    (lambda p, v: media.contact_sheet(p, v[None], captions=[]), ValueError, "0 strings for 1 clips"),
    (lambda p, v: media.contact_sheet(p, v[None], columns=0), ValueError, "columns=0"),
    (lambda p, v: media.read_video(p), FileNotFoundError, "no such file"),
    (lambda p, v: media.read_video(__file__), ValueError, "cannot be read as video"),
    (lambda p, v: media.read_video(__file__, max_frames=0), ValueError, "max_frames=0"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[r[2] for r in REFUSED])
def test_what_cannot_be_written_or_read_is_refused_by_name(tmp_path, call, error, message):
    with pytest.raises(error, match=message):
        call(tmp_path / "out", _clip())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("blocked", "call"), [("av", "write_mp4"), ("PIL", "write_gif")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(blocked, call, tmp_path):
    code = (
        f"import sys; sys.modules[{blocked!r}] = None\n"
        f"import torch; from stattn.video import media\n"
        f"try: media.{call}({str(tmp_path / 'x')!r}, torch.zeros(3, 1, 4, 4))\n"
        f"except ImportError as e: print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install stattn[demo]" in out
    assert {"av": "PyAV", "PIL": "pillow"}[blocked] in out
