"""The demo and `stattn sample`, with a random model: every file that the page names is there, also after Ctrl-C."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from stattn import cli, dit, masks, results, world
from stattn.commands import demo, demo_timings
from stattn.reports import demo_page
from stattn.video import media

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("av")

CAPTIONS = ["a red disc moves left", "a blue square", "a green triangle moves up, camera pans left"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Save a random model of 4 x 4 x 4 tokens that does not predict zero."""
    config = dit.DiTConfig(
        kind="joint", layers=1, heads=2, head_dim=16, ffn_dim=32, in_channels=3, out_channels=3, patch=(2, 8, 8),
        text_dim=16, text_len=world.CAPTION_LENGTH, vocab=len(world.VOCABULARY), masked_input=True, freq_dim=32,
        qk_norm="per_head",
    )  # fmt: skip
    torch.manual_seed(0)
    model = dit.DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    dit.save(model, path)
    return path


def _demo(weights: Path, out: Path, *more: str) -> int:
    options = [
        "--steps",
        "2",
        "--size",
        "8,32,32",
        "--device",
        "cpu",
        "--masks",
        "full()",
        "window(2, 3, 3)",
        "--rounds",
        "3",
    ]
    return cli.main(["demo", "--model", str(weights), "--out", str(out), *options, "--captions", *CAPTIONS, *more])


class Links(HTMLParser):
    """Collect what a page refers to, and whether its tags close."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def _links(out: Path) -> list[str]:
    page = Links((out / "index.html").read_text(encoding="utf-8"))
    assert not page.open
    return page.found


@pytest.mark.smoke
def test_the_demo_writes_a_page_whose_files_all_exist(weights, tmp_path, capsys):
    assert _demo(weights, tmp_path) == 0
    links = _links(tmp_path)
    assert {Path(link).suffix for link in links} == {".mp4", ".gif", ".svg", ".png", ".json"}
    for link in links:
        assert not re.match(r"\w+:|/", link), "links are relative"
        assert (tmp_path / link).stat().st_size > 0
    assert len(list(tmp_path.glob("clips/*.mp4"))) == len(list(tmp_path.glob("clips/*.gif"))) == 6
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "Not done" not in html
    assert "window(2, 3, 3)" in html
    assert html.count(" of 8</td>") == 2
    assert f"<code>stattn demo --model {weights} " in html
    assert "checks of the clips hold" in capsys.readouterr().out


def test_the_demo_writes_valid_timings_with_ratios_to_dense_attention(weights, tmp_path):
    assert _demo(weights, tmp_path) == 0
    report = results.read(tmp_path / "timings.json")
    names = [result.name.split(": ")[1] for result in report.results]
    assert names == ["full(), reference", "window(2, 3, 3), reference"]
    assert [result.baseline and result.baseline.name for result in report.results] == [None, "full(), reference"]
    assert report.gpu.startswith("none (CPU")


def test_clips_are_sampled_from_the_same_noise_and_a_seed_reproduces_them(weights, tmp_path):
    runs = [tmp_path / name for name in "abc"]
    for out, seed in zip(runs, ("3", "3", "4"), strict=True):
        assert _demo(weights, out, "--seed", seed, "--rounds", "0", "--masks", "full()", "window(4, 4, 4)") == 0
    frames = [[media.read_video(path)[0] for path in sorted(out.glob("clips/*.mp4"))] for out in runs]
    assert all(torch.equal(a, b) for a, b in zip(frames[0], frames[1], strict=True))
    assert not torch.equal(frames[0][0], frames[2][0])
    # A window of the whole grid is full attention: the clips agree up to rounding.
    records = json.loads((runs[0] / "clips.json").read_text())
    full, window = records[:3], records[3:]
    assert [record["mask"] for record in full + window] == ["full()"] * 3 + ["window(4, 4, 4)"] * 3
    assert all(record["psnr_to_first_mask_db"] is None or record["psnr_to_first_mask_db"] > 80 for record in window)
    assert not (runs[0] / "timings.json").exists()


def test_ctrl_c_leaves_what_is_done_and_says_what_is_not(weights, tmp_path, monkeypatch, capsys):
    real = demo.sample

    def stops(*arguments, **keywords):
        def callback(step, *_):
            if step == 1 and keywords["mask"] == masks.window(2, 3, 3):
                raise KeyboardInterrupt

        return real(*arguments, **(keywords | {"callback": callback} if "callback" in keywords else keywords))

    monkeypatch.setattr(demo, "sample", stops)
    assert _demo(weights, tmp_path) == 130
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "Stopped before the end." in html
    assert "<li>clips under window(2, 3, 3)</li><li>timings of the sampler&#x27;s step</li>" in html
    assert html.count("not sampled") == 3
    assert all((tmp_path / link).is_file() for link in _links(tmp_path))
    assert len(list(tmp_path.glob("clips/*.mp4"))) == 3
    assert "stopped" in capsys.readouterr().err


def test_missing_weights_are_refused_before_anything_is_written(tmp_path, capsys):
    assert cli.main(["demo", "--model", str(tmp_path / "none.safetensors"), "--out", str(tmp_path / "out")]) == 1
    assert "no weights at" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--captions", "a purple disc"), "unknown word 'purple'"),
        (("--masks", "window(9, 3, 3)"), "window t=9"),
        (("--masks", "sparse()"), "mask 'sparse()'"),
        (("--size", "8,32,33"), "size=(8, 32, 33) must be a multiple"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(weights, tmp_path, capsys, more, message):
    assert _demo(weights, tmp_path / "out", *more) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_implementation_whose_output_is_wrong_is_not_timed_and_fails_the_demo(
    weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(demo_timings, "_error", lambda output, exact: 0.5)
    assert _demo(weights, tmp_path) == 1
    assert "WRONG: full(), reference: the output is wrong (error 5.00e-01" in capsys.readouterr().err
    assert "the output is wrong" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert results.read(tmp_path / "timings.json").results == []


def test_each_operation_without_a_kernel_runs_as_its_reference_and_says_so():
    def call(impl: dict[str, str]) -> None:
        served = {"attention": "reference", "gate": "auto"}  # as if only gate had a kernel
        for stem in ("patchify", "modulate", "gate", "qk_norm_rope", "denoise"):
            if impl.get(stem, impl["*"]) == "auto" and stem not in served:
                raise ValueError(f"nothing serves {stem}")

    rest, reasons = demo_timings.around_attention(call)
    assert rest == {"gate": "auto"} | dict.fromkeys(("patchify", "modulate", "qk_norm_rope", "denoise"), "reference")
    assert [reason.split(" ")[0] for reason in reasons] == ["patchify", "modulate", "qk_norm_rope", "denoise"]
    assert demo_timings.around_attention(lambda impl: None) == ({"*": "auto"}, [])


def test_the_rows_of_a_mask_are_checked_against_its_definition():
    grid, device = (4, 6, 6), torch.device("cpu")
    for mask in (masks.full(), masks.window(3, 3, 3), masks.sliding_tile((2, 2, 2), (1, 3, 2))):
        assert demo_timings.check_rows(mask, "reference", grid, device) < 4e-3
    with pytest.raises(ValueError, match="sdpa"):
        demo_timings.check_rows(masks.spatial(), "sdpa", grid, device)


def test_layers_of_a_published_shape_are_timed_per_mask_and_implementation(monkeypatch):
    small = dataclasses.replace(dit.CONFIGS["wan2.1-1.3b"], heads=1, ffn_dim=64, text_dim=32, text_len=4)
    monkeypatch.setitem(demo_timings.CONFIGS, demo_timings.WAN, small)
    monkeypatch.setattr(demo_timings, "WAN_GRID", (3, 4, 6))
    wanted = (masks.full(), masks.window(3, 3, 3))
    timings = demo_timings.Timings(rounds=2, budget=1.0, tick=lambda text: None)
    timings.layers(torch.device("cpu"), wanted, count=1)
    names = [result.name.split(": ")[1] for result in timings.results]
    assert sorted(names) == ["full(), reference", "full(), sdpa", "window(3, 3, 3), reference"]
    assert timings.wrong == []
    assert any("under window(3, 3, 3), not timed with sdpa: " in note for note in timings.notes)
    ratios = {name: result.ratio for name, result in zip(names, timings.results, strict=True)}
    assert [name for name in names if ratios[name] is None] == [
        min((r for r in timings.results if "full()" in r.name), key=lambda r: r.value).name.split(": ")[1]
    ]


def test_one_key_too_many_is_seen_by_the_check(monkeypatch):
    wider = masks.window(3, 3, 4)
    real = demo_timings.attention
    monkeypatch.setattr(
        demo_timings, "attention", lambda q, k, v, grid, mask, **more: real(q, k, v, grid, wider, **more)
    )
    assert demo_timings.check_rows(masks.window(3, 3, 3), "reference", (4, 6, 6), torch.device("cpu")) == float("inf")


def test_captions_are_judged_by_what_the_real_world_shows():
    clips = world.render(6, 16, 64, 64, seed=3)
    for checks in demo.judge(clips.video, clips.captions):
        assert [what for what, _, _ in checks] == ["colour", "shape", "sets out"]
        assert all(asked == seen for _, asked, seen in checks)
    assert demo.judge(clips.video[:1], ["camera pans left"]) == [[]]
    assert demo.judge(torch.zeros(1, 3, 4, 32, 32), ["a red disc"]) == [
        [("colour", "red", "nothing"), ("shape", "disc", "nothing")]
    ]


def test_what_is_written_into_the_page_is_escaped():
    page = demo_page.Page(
        "stattn demo <x>", "a & b", "<gpu>", {"torch": "2"}, "now", (4, 8, 8), ["<caption>"],
        [demo_page.MaskCard("full()", 1.0, "a.svg", "")], (1, 2, 3),
    )  # fmt: skip
    page.todo, page.notes = ["<todo>"], ["<note>"]
    html = demo_page.render(page)
    assert not re.search("<(x|gpu|caption|todo|note)>", html)
    assert html.count("&lt;") >= 5


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_sample_writes_one_clip(weights, tmp_path, capsys, suffix):
    out = tmp_path / f"clip{suffix}"
    arguments = ["--model", str(weights), "--steps", "2", "--size", "8,32,32", "--device", "cpu", "--out", str(out)]
    more = ["--mask", "window(2, 3, 3)", "--dense-steps", "1", "--negative", "a blue disc", "--seed", "5"]
    assert cli.main(["sample", "--caption", "a red disc moves left", *arguments, *more]) == 0
    assert out.stat().st_size > 0
    text = capsys.readouterr().out
    assert "colour: asked red, seen " in text
    assert f"wrote {out}" in text
    if suffix == ".mp4":
        assert media.read_video(out)[0].shape == (3, 8, 128, 128)
