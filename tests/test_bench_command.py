"""`stattn bench`: contenders on the same parameters, rows that add up, and refusals by name."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from stattn import cli, masks, results
from stattn.bench import models, runs
from stattn.bench.models import SHAPES, contender, random_inputs, random_model, relative_error, truth
from stattn.dit import DiTConfig
from stattn.reports.report import load, series

TINY = models.ModelShape(
    "test",
    DiTConfig(
        kind="cross", layers=2, heads=2, head_dim=16, ffn_dim=32, in_channels=4, out_channels=4, patch=(1, 2, 2),
        text_dim=8, text_len=4, freq_dim=16,
    ),
    (4, 8, 8),
    masks.sliding_tile((2, 2, 2), (1, 1, 2)),
    masks.window(3, 3, 3),
)  # fmt: skip


@pytest.fixture(autouse=True)
def shapes(monkeypatch):
    monkeypatch.setitem(SHAPES, "test", TINY)


def bench(tmp_path, *arguments: str) -> dict[str, results.Result]:
    out = tmp_path / "found.json"
    assert cli.main(["bench", *arguments, "--shape", "test", "--device", "cpu", "--out", str(out)]) == 0
    return {each.name: each for each in results.read(out).results}


def test_contenders_share_their_parameters_and_compute_the_same():
    pytest.importorskip("diffusers")
    model = random_model(TINY, "cpu", torch.float32)
    given = random_inputs(TINY, "cpu", torch.float32)
    dense = truth(model, given, masks.full())
    for name in ("eager", "stattn-dense", "stattn-window", "stattn-sliding_tile"):
        made = contender(name, model, TINY)
        assert made.call.patchify.weight is not None
        assert made.call.proj_out.weight.data_ptr() == model.proj_out.weight.data_ptr()
        error = relative_error(made.call(*given), dense)
        assert (error < 1e-5) == (made.mask == masks.full())
    wan = models.diffusers_wan(model)
    assert relative_error(wan(*given, return_dict=False)[0], dense) < 1e-5
    assert wan.proj_out.weight.data_ptr() == model.proj_out.weight.data_ptr()


def test_every_part_of_a_random_model_counts():
    model = random_model(TINY, "cpu", torch.float64)
    given = random_inputs(TINY, "cpu", torch.float64)
    before = model(*given)
    for name, parameter in model.named_parameters():
        if name.endswith(("to_k.bias", "norm_k.weight")):
            continue  # the first shifts all scores of a row alike, the other is followed by none of its own
        kept = parameter.data.clone()
        parameter.data += 0.1
        assert not torch.equal(model(*given), before), name
        parameter.data = kept


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_sparse_masks_of_named_shapes_are_about_a_tenth(name):
    shape = SHAPES[name]
    for mask in (shape.sliding_tile, shape.window):
        assert 0.06 < mask.density(shape.grid) < 0.15
    if name.startswith("wan2.1"):
        assert 0.09 <= shape.sliding_tile.density(shape.grid) <= 0.1
        assert shape.window.density(shape.grid) == pytest.approx(0.1, abs=1e-3)


def test_a_step_is_split_and_compared(tmp_path):
    rows = bench(tmp_path, "step", "--rounds", "3")
    base = rows["step/test/eager"]
    assert base.baseline is None
    for name in ("stattn-dense", "stattn-sliding_tile", "stattn-window"):
        row = f"step/test/{name}"
        assert rows[row].baseline.name == "step/test/eager"
        assert rows[row].ratio == pytest.approx(base.value / rows[row].value)
        assert 0 < rows[f"{row}/attention"].value < 2 * rows[row].value
        work = random_model(TINY, "cpu", torch.float32).flops(TINY.grid, contender(
            name, random_model(TINY, "cpu", torch.float32), TINY).mask)  # fmt: skip
        assert rows[f"{row}/rate"].value == pytest.approx(work / rows[row].value * 1e-6)
        rate = rows[f"{row}/rate"]
        assert (rate.p20, rate.p80) == pytest.approx((work / rows[row].p80 * 1e-6, work / rows[row].p20 * 1e-6))
    assert rows["step/test/stattn-dense/density"].value == 1
    assert rows["step/test/stattn-window/density"].value == TINY.window.density(TINY.grid)
    assert rows["step/test/stattn-dense/snr"].value > 100 > rows["step/test/stattn-window/snr"].value > 0


def test_a_contender_that_is_wrong_is_not_written(tmp_path, monkeypatch, capsys):
    made = models.contender

    def broken(name, model, shape):
        found = made(name, model, shape)
        if name == "stattn-window":
            found.call = made("stattn-sliding_tile", model, shape).call
        return found

    monkeypatch.setattr(runs, "contender", broken)
    out = tmp_path / "found.json"
    assert cli.main(["bench", "step", "--shape", "test", "--device", "cpu", "--out", str(out), "--rounds", "1"]) == 1
    assert "stattn-window: relative error" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "name, other, field, message",
    [
        ("stattn-window", "stattn-sliding_tile", "attend", "of sampled rows of attention"),
        ("stattn-window", "eager", "call", "stattn-window: relative error inf"),
        ("stattn-dense", "stattn-window", "call", "stattn-dense: relative error"),
        ("stattn-dense", "stattn-dense", "call", None),
    ],
)
def test_long_contenders_are_wrong_when_their_attention_is(tmp_path, monkeypatch, capsys, name, other, field, message):
    made = models.contender
    monkeypatch.setattr(runs, "LONG", 8)

    def broken(each, model, shape):
        found = made(each, model, shape)
        if each == name:
            setattr(found, field, getattr(made(other, model, shape), field))
        return found

    monkeypatch.setattr(runs, "contender", broken)
    out = str(tmp_path / "found.json")
    status = cli.main(["bench", "step", "--shape", "test", "--device", "cpu", "--rounds", "1", "--out", out])
    assert status == (0 if message is None else 1)
    assert (message or "") in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    made = models.contender

    def missing(name, model, shape):
        if name == "stattn-window":
            raise ImportError(name)
        return made(name, model, shape)

    monkeypatch.setattr(runs, "contender", missing)
    out = tmp_path / "found.json"
    assert cli.main(["bench", "step", "--shape", "test", "--device", "cpu", "--out", str(out), "--rounds", "1"]) == 0
    report = results.read(out)
    assert report.versions["stattn-window"] == "not installed"
    assert not any("stattn-window" in each.name for each in report.results)


def test_attention_is_timed_alone_and_at_several_lengths(tmp_path):
    rows = bench(tmp_path, "attention", "--rounds", "1", "--contenders", "eager,stattn-window")
    assert rows["attention/stattn-window/test"].baseline.name == "attention/eager/test"
    rows = bench(tmp_path, "attention", "--rounds", "1", "--contenders", "eager,stattn-window", "--frames", "3,6,9")
    times = [name for name in rows if name.count("/") == 2]
    assert "attention/eager/3x4x4" in times
    assert len(times) == 6
    found = series([row for sources in [load([tmp_path / "found.json"])[0]] for source in sources for row in [
        _row(source, each) for each in source.report.results]])  # fmt: skip
    assert {name: [n for n, _ in each] for name, each in found.items()} == {
        "attention/eager/N": [48, 96, 144], "attention/stattn-window/N": [48, 96, 144],
    }  # fmt: skip


def _row(source, result):
    from stattn.reports.report import Row

    return Row(source, result)


def test_operations_are_timed_beside_a_copy(tmp_path):
    rows = bench(tmp_path, "ops", "--rounds", "1")
    for name in ("modulate", "gate_residual", "gate_residual_modulate", "qk_norm_rope", "patchify", "denoise_step"):
        row = rows[f"ops/{name}/fwd/test"]
        assert row.baseline.name == f"ops/{name}-copy/fwd/test"
        assert rows[f"ops/{name}/fwd/test/bandwidth"].unit == "GB/s"
    size = 2 * TINY.grid.tokens * TINY.config.dim * 4
    row = rows["ops/modulate/fwd/test"]
    assert rows["ops/modulate/fwd/test/bandwidth"].value == pytest.approx(size / row.value * 1e-6)


def test_a_sample_is_timed_beside_its_steps_and_compared_with_dense(tmp_path):
    rows = bench(tmp_path, "sampler", "--steps", "3")
    assert rows["sampler/test/stattn-dense"].baseline.name == "3 x the step launched alone"
    assert "sampler/test/stattn-dense/snr" not in rows
    assert 0 < rows["sampler/test/stattn-window/snr"].value < 200
    assert 0 < rows["sampler/test/stattn-window/psnr"].value < 200
    # PyTorch's operations, launched by the host, arrive at the same video.
    assert rows["sampler/test/eager/snr"].value > 80
    assert rows["sampler/test/eager"].value > 0


def test_the_longest_gap_is_named_by_what_runs_around_it(monkeypatch):
    """Kernels that overlap, and one that begins while a longer one runs, leave no gap."""

    def event(name, start, end):
        return SimpleNamespace(
            name=name, time_range=SimpleNamespace(start=start, end=end), device_type=torch.autograd.DeviceType.CUDA
        )

    spans = [event("a", 0, 10), event("b", 12, 40), event("c", 13, 20), event("d", 45, 50), event("e", 50, 52)]
    profiler = SimpleNamespace(events=lambda: spans)
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: nullcontext(profiler))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = runs.replay_times(lambda: None)
    assert found == (52e-6, 5, "at 3 of 5, between b and d")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["step", "--shape", "huge"], "--shape 'huge' must be one of"),
        (["step", "--contenders", "flash"], "--contenders flash: here there are"),
        (["sampler", "--contenders", "fast"], "--contenders fast: here there are eager"),
        (["step", "--contenders", "stattn-windows(3, 3, 3)"], "mask 'windows(3, 3, 3)': expected"),
        (["step", "--frames", "3"], "--frames"),
        (["sampler", "--rounds", "3"], "--rounds 3"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    assert cli.main(["bench", *arguments, "--device", "cpu"]) == 1
    assert message in capsys.readouterr().err


def test_any_mask_may_take_part(tmp_path):
    name = "stattn-window(1, 3, 3) | temporal()"
    rows = bench(tmp_path, "step", "--rounds", "1", "--contenders", f"eager, {name},stattn-dense")
    assert {"step/test/eager", f"step/test/{name}", "step/test/stattn-dense"} <= set(rows)
    wanted = (masks.window(1, 3, 3) | masks.temporal()).density(TINY.grid)
    assert rows[f"step/test/{name}/density"].value == wanted
    assert rows[f"step/test/{name}/snr"].value < 100


def test_contenders_can_be_listed(capsys):
    assert cli.main(["bench", "step", "--device", "cpu", "--contenders", "list"]) == 0
    assert capsys.readouterr().out.split() == ["eager", "stattn-dense", "stattn-sliding_tile", "stattn-window"]


@pytest.mark.parametrize(("before", "what", "device", "then"), [
    (None, "sampler", "cuda", "0"), ("8192", "sampler", "cuda", "8192"), (None, "sampler", "cpu", None),
    (None, "ops", "cuda", None),
])  # fmt: skip
def test_a_sample_on_a_gpu_is_measured_without_workspaces_unless_they_are_asked_for(
    monkeypatch, tmp_path, before, what, device, then
):
    monkeypatch.delenv("CUBLASLT_WORKSPACE_SIZE", raising=False)
    if before is not None:
        monkeypatch.setenv("CUBLASLT_WORKSPACE_SIZE", before)
    monkeypatch.setattr(runs, f"measure_{what}", lambda report, *_, **__: runs.add(report, "a", "ms", 1.0))
    monkeypatch.setattr(results, "new_report", lambda command, _: results.Report(
        command, "a GPU", results.versions(), "2026-01-31T12:00:00+00:00", None, None, []
    ))  # fmt: skip
    assert cli.main(["bench", what, "--shape", "test", "--device", device, "--out", str(tmp_path / "found.json")]) == 0
    assert results.read(tmp_path / "found.json").versions.get("CUBLASLT_WORKSPACE_SIZE") == then
