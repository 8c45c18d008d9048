"""`stattn report` and `stattn compare`: no row is lost, and a run is worse only where it is."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from stattn import cli, masks, results
from stattn.grid import Grid
from stattn.reports import plots, report
from stattn.results import Baseline, Report, Result

GPU = "NVIDIA H200"


def _row(name: str, value: float, unit: str = "ms", base: tuple[str, float] | None = None, spread: float = 0.01):
    baseline = Baseline(*base) if base else None
    ratio = None
    if base:
        ratio = base[1] / value if unit in results.LOWER_IS_BETTER else value / base[1]
    return Result(name, unit, value, value * (1 - spread), value * (1 + spread), baseline, ratio, True)


def _report(*rows: Result, gpu: str = GPU, product: float | None = 800.0, copy: float | None = 4.0) -> Report:
    command = "python -m pytest benchmarks/bench_x.py"
    return Report(command, gpu, {"torch": "2.11"}, "2026-01-31T12:00:00+00:00", product, copy, list(rows))


ATTENTION = _report(
    _row("attention/cuda/dense_fwd/wan-1.3b-480p", 9.0, base=("attention/torch-cudnn/dense_fwd/wan-1.3b-480p", 12.0)),
    _row("attention/torch-cudnn/dense_fwd/wan-1.3b-480p", 12.0),
    *(_row(f"attention/cuda/window/{t}x30x52", time) for t, time in ((5, 1.0), (21, 5.0), (81, 20.0))),
    _row("attention/cuda/a|b <i>/x", 1.0),
)
OPS = _report(
    _row("ops/modulate/fwd/wan", 0.2, base=("ops/modulate-copy/fwd/wan", 0.18)),
    _row("ops/modulate-copy/fwd/wan", 0.18),
    _row("ops/gate/fwd/wan", 500.0, "TFLOP/s"),
    _row("tokens", 90.0, "tokens/s", base=("other", 100.0)),
    gpu="none (CPU: some, 2 threads)",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    results.write(tmp_path / "runs" / "h200" / "attention.json", ATTENTION)
    results.write(tmp_path / "runs" / "cpu" / "ops.json", OPS)
    return tmp_path / "runs"


def _run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(each) for each in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def _names(reports=(ATTENTION, OPS)) -> list[str]:
    return [result.name for each in reports for result in each.results]


# Report.


@pytest.mark.smoke
def test_times_stand_before_memory_and_rates(tmp_path):
    rows = _row("attention/memory", 0.4, "GiB"), _row("attention/b", 2.0), _row("attention/rate", 9.0, "TB/s")
    results.write(tmp_path / "attention.json", _report(*rows, _row("attention/a", 3.0, "us")))
    found = report.rows_by_stem(report.load([tmp_path])[0])["attention"]
    assert [row.result.name.split("/")[1] for row in found] == ["b", "a", "memory", "rate"]


def test_every_row_is_in_the_table_once_with_its_run(folder):
    text = report.markdown(*report.load([folder]))
    rows = [line for line in text.splitlines() if line.count(" | ") == 5 and not line.startswith("| result")]
    assert [re.split(r"(?<!\\)\|", line)[1].strip().replace("\\|", "|") for line in rows] == [
        *(name for name in _names() if name.startswith("attention")),
        "tokens", "ops/gate/fwd/wan", "ops/modulate/fwd/wan", "ops/modulate-copy/fwd/wan",
    ]  # fmt: skip
    stems = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert stems == ["attention", "ops", "ops/gate", "ops/modulate", "Runs"]
    assert "- run 2: NVIDIA H200, bf16 8192³ product 800 TFLOP/s, copy 4.00 TB/s; `python -m pytest" in text
    assert (
        "| attention/cuda/dense_fwd/wan-1.3b-480p | 9 ms | 8.91–9.09 | "
        "12 ms (attention/torch-cudnn/dense_fwd/wan-1.3b-480p) | 1.33× | 2 |" in text
    )


def test_the_command_writes_a_page_that_needs_no_other_file(folder, tmp_path, capsys):
    out = tmp_path / "out"
    status, said, _ = _run(capsys, "report", folder, "--out", out)
    assert status == 0
    assert "10 results of 2 files" in said
    assert str(out / "index.html") in said
    page = (out / "index.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    for name in _names():
        assert page.count(f"<td><code>{name.replace('<', '&lt;').replace('>', '&gt;')}</code></td>") == 1
    alts = re.findall(r'<img alt="([^"]*)"', page)
    stems = [alt.split(":")[0] for alt in alts]
    assert stems[0] == "the roofline, and what results reach below it"
    assert stems[1:] == ["attention"] * 3 + ["ops", "ops/gate", "ops/modulate", "ops/modulate"]
    pictures = [base64.b64decode(each).decode() for each in re.findall(r"base64,([^\"]*)", page)]
    assert all(picture.lstrip().startswith("<?xml") for picture in pictures)
    assert "operations a byte" in pictures[0]
    assert "1.33× attention/torch-cudnn/dense_fwd" in pictures[1]
    assert "TFLOP/s" in pictures[2]
    assert "length squared" in pictures[3]
    assert "90 % of ops/modulate-copy" in pictures[-1]
    assert {path.name for path in out.iterdir()} == {
        "index.html", "report.md", "smaller-is-better.json", "bigger-is-better.json",
    }  # fmt: skip


def test_entries_for_the_action_are_sorted_by_direction_and_have_names_of_their_own(folder, tmp_path, capsys):
    results.write(folder / "old" / "attention.json", ATTENTION)
    _run(capsys, "report", folder, "--out", tmp_path / "out")
    smaller = json.loads((tmp_path / "out" / "smaller-is-better.json").read_text())
    bigger = json.loads((tmp_path / "out" / "bigger-is-better.json").read_text())
    units = {each["name"]: each["unit"] for each in bigger}
    assert units == {"ops/gate/fwd/wan": "TFLOP/s", "tokens": "tokens/s"}
    assert len(smaller) == 2 * len(ATTENTION.results) + 2
    names = [each["name"] for each in smaller]
    assert len(set(names)) == len(names)
    assert f"attention/torch-cudnn/dense_fwd/wan-1.3b-480p [{(folder / 'old/attention.json').as_posix()}]" in names
    first = next(each for each in smaller if each["name"] == "ops/modulate/fwd/wan")
    assert set(first) == {"name", "unit", "value", "range", "extra"}
    assert (first["unit"], first["value"], first["range"]) == ("ms", 0.2, "0.198 to 0.202")
    assert first["extra"].startswith("0.9x of ops/modulate-copy/fwd/wan; none (CPU: some, 2 threads); python -m pytest")


def test_a_direction_without_rows_leaves_no_file(tmp_path, capsys):
    results.write(tmp_path / "a.json", _report(_row("a", 1.0)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bigger-is-better.json").write_text("[]")
    assert _run(capsys, "report", tmp_path / "a.json", "--out", tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / "bigger-is-better.json").exists()


def test_what_is_no_results_file_is_refused_or_left_out_by_name(folder, tmp_path, capsys):
    other = folder / "evaluation.json"
    other.write_text('{"clips": 128}')
    status, _, err = _run(capsys, "report", folder, "--out", tmp_path / "out")
    assert status == 0
    assert f"left out: {other.as_posix()} is not a results file" in err
    assert f"Left out: {other.as_posix()}" in (tmp_path / "out" / "report.md").read_text()
    assert other.as_posix() in (tmp_path / "out" / "index.html").read_text()
    for text in ('{"clips": 128}', '{"results": []}', "{"):
        other.write_text(text)
        status, _, err = _run(capsys, "report", other, "--out", tmp_path / "none")
        assert status == 1
        assert "evaluation.json" in err
    assert _run(capsys, "report", folder, "--out", tmp_path / "none")[0] == 1  # broken, not of another kind
    assert _run(capsys, "report", tmp_path / "missing.json", "--out", tmp_path / "none")[0] == 1
    (tmp_path / "empty").mkdir()
    assert "no results files in" in _run(capsys, "report", tmp_path / "empty", "--out", tmp_path / "none")[2]
    assert not (tmp_path / "none").exists()


def test_records_of_tests_are_told_with_what_failed(folder, tmp_path, capsys):
    run = {"command": "python -m pytest", "gpu": GPU, "date": "2026-01-31", "passed": 2, "failed": 1, "skipped": 3}
    ends = ("passed", "passed", "failed", "skipped", "skipped", "skipped")
    run["tests"] = [{"test": f"tests/test_x.py::test_{n}", "outcome": end} for n, end in enumerate(ends)]
    (folder / "h200" / "x_proof.json").write_text(json.dumps(run))
    _, _, err = _run(capsys, "report", folder, "--out", tmp_path / "out")
    assert "left out" not in err
    text = (tmp_path / "out" / "report.md").read_text()
    place = (folder / "h200" / "x_proof.json").as_posix()
    assert f"| {place} | {GPU} | 2026-01-31 | 2 | 1 | 3 |" in text
    assert f"- failed: `tests/test_x.py::test_2` ({place})" in text
    page = (tmp_path / "out" / "index.html").read_text()
    assert "tests/test_x.py::test_2" in page
    assert "tests/test_x.py::test_1" not in page


def test_a_file_that_is_named_twice_is_read_once(folder):
    sources, _ = report.load([folder, folder / "cpu" / "ops.json"])
    assert [source.place for source in sources] == ["cpu/ops.json", "h200/attention.json"]


def test_the_arithmetic_of_attention_follows_from_its_name():
    dense = 4 * 32760**2 * 128 * 12
    assert report.flops("attention/cuda/dense_fwd/wan-1.3b-480p") == dense
    assert report.flops("attention/cuda/dense_bwd_deterministic/wan-1.3b-480p") == 2.5 * dense
    grid = Grid(21, 45, 80)
    window = 4 * masks.window(7, 17, 17).density(grid) * grid.tokens**2 * 128 * 40
    assert report.flops("attention/triton/window_7_17_17/wan-14b-720p") == pytest.approx(window)
    for name in ("attention/flex/window_7_17_17_plan/wan-14b-720p", "attention/cuda/dense_fwd/x", "ops/dense/fwd/x"):
        assert report.flops(name) is None


def test_rates_are_shares_of_what_the_run_reached():
    rows = [row for each in (ATTENTION, OPS) for row in _rows(each)]
    products, copies = report.rates(rows)
    shares = {row.result.name: share for row, share, _ in products}
    tflops = 4 * 32760**2 * 128 * 12 / 9e-3 * 1e-12
    assert shares["attention/cuda/dense_fwd/wan-1.3b-480p"] == pytest.approx(tflops / 800)
    assert shares["ops/gate/fwd/wan"] == pytest.approx(500 / 800)
    assert {row.result.name: share for row, share, _ in copies} == {"ops/modulate/fwd/wan": pytest.approx(0.9)}


def test_a_share_of_a_copy_is_told_once_with_its_rate():
    rates = [_row(f"ops/modulate{each}/fwd/wan/bandwidth", 3600.0, "GB/s") for each in ("", "-copy")]
    _, copies = report.rates(_rows(dataclasses.replace(OPS, results=[*OPS.results, *rates])))
    assert [(row.result.name, words) for row, _, words in copies] == [
        ("ops/modulate/fwd/wan", "90 % of ops/modulate-copy/fwd/wan, 3.6 TB/s"),
        ("ops/modulate-copy/fwd/wan/bandwidth", "3.6 TB/s"),
    ]


def _rows(each: Report) -> list[report.Row]:
    source = report.Source(Path("x.json"), "x.json", each)
    return [report.Row(source, result) for result in each.results]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("attention/cuda/dense/21x30x52", ("attention/cuda/dense/N", 32760)),
        ("Forward pass, 2x3x4 tokens: full()", ("Forward pass, N tokens: full()", 24)),
        ("select/top_k/115200_tiles64", ("select/top_k/N_tiles64", 115200)),
        ("attention/cuda/dense/n4096", ("attention/cuda/dense/N", 4096)),
        ("attention/cuda/dense_fwd/wan-14b-720p", None),
        ("ops/modulate/fwd/tiny", None),
    ],
)
def test_a_length_is_read_from_a_name(name, told):
    assert report.length(name) == told


def test_a_series_has_several_lengths_of_one_run():
    one = _rows(ATTENTION)
    found = report.series(one)
    assert list(found) == ["attention/cuda/window/N"]
    assert [tokens for tokens, _ in found["attention/cuda/window/N"]] == [7800, 32760, 126360]
    first, last = one[2], _rows(_report(_row("attention/cuda/window/81x30x52", 1.0)))[0]
    assert report.series([first, last]) == {}


def test_points_lie_where_arithmetic_and_bytes_put_them():
    rows = [
        _row("attention/cuda/dense_fwd/wan-1.3b-480p", 9.0),
        _row("attention/cuda/dense_bwd/wan-1.3b-480p", 9.0),
        _row("ops/modulate/fwd/wan/bandwidth", 4000.0, "GB/s"),
        _row("ops/modulate-copy/fwd/wan/bandwidth", 4000.0, "GB/s"),
        _row("ops/modulate/fwd/wan", 0.1),
    ]
    source = report.Source(Path("a.json"), "a.json", _report(*rows))
    first, second = report.points([report.Row(source, each) for each in rows])
    tokens, work = 32760, 4 * 32760**2 * 12 * 128
    assert first.row.result.name.endswith("dense_fwd/wan-1.3b-480p")
    assert first.intensity == pytest.approx(tokens / 2)
    assert first.tflops == pytest.approx(work / 9.0 * 1e-9)
    assert second.tflops / second.intensity == pytest.approx(4.0)  # TB/s: on the slope of a copy of 4
    assert (first.contender, first.problem) == ("cuda", "dense_fwd wan-1.3b-480p")
    assert (second.contender, second.problem) == ("stattn", "modulate fwd wan")
    drawn = plots.roofline([first, second]).axes[0]
    assert {text.get_text() for text in drawn.texts} == {"dense_fwd wan-1.3b-480p", "modulate fwd wan"}
    assert {text.get_text() for text in drawn.get_legend().get_texts()} == {"cuda", "stattn"}
    unknown = dataclasses.replace(source, report=_report(*rows, copy=None))
    assert report.points([report.Row(unknown, each) for each in rows]) == []


def test_steps_are_broken_down_and_errors_set_against_densities(tmp_path, capsys):
    rows = [
        _row("step/wan/a", 100.0), _row("step/wan/a/attention", 60.0), _row("step/wan/b", 50.0),
        _row("step/wan/a/density", 0.1, "fraction"), _row("step/wan/a/snr", 20.0, "dB"),
        _row("step/wan/b/density", 1.0, "fraction"), _row("step/wan/b/snr", 120.0, "dB"),
    ]  # fmt: skip
    source = report.Source(Path("a.json"), "a.json", _report(*rows))
    found = [report.Row(source, each) for each in rows]
    assert report.breakdowns(found) == [report.Breakdown("step/wan/a", 100.0, 60.0)]
    assert report.errors(found) == {"step/wan/a": (0.1, pytest.approx(0.1))}
    drawn = plots.errors({"step/wan/a": (0.1, 0.1), "step/wan/b": (0.4, 0.05), "step/hy/a": (0.1, 0.2)}).axes[0]
    assert [list(line.get_xdata()) for line in drawn.lines] == [[10.0, 40.0], [10.0]]
    assert sorted(text.get_text() for text in drawn.texts) == ["a", "a", "b"]
    near = {"step/wan/a": (0.1, 0.1), "step/wan/b": (0.105, 0.11), "step/hy/a": (0.1, 0.1), "step/hy/c": (0.1, 0.2)}
    assert sorted(text.get_text() for text in plots.errors(near).axes[0].texts) == ["a\nb", "c"]
    results.write(tmp_path / "a.json", source.report)
    status, _, _ = _run(capsys, "report", tmp_path / "a.json", "--out", tmp_path / "out")
    assert status == 0
    alts = re.findall(r'<img alt="([^"]*)"', (tmp_path / "out" / "index.html").read_text())
    assert alts == ["step: what a step&#x27;s time goes to", "step: error against density"]


def test_whole_samples_are_set_beside_what_else_one_would_run():
    rows = [
        *(_row(f"sampler/wan/{name}", time, "s") for name, time in (("own", 2.0), ("eager", 9.0), ("compiled", 5.0))),
        _row("sampler/wan/own/loop", 3.0, "s"), _row("sampler/small/own", 500.0, "ms"),
    ]  # fmt: skip
    source = report.Source(Path("a.json"), "a.json", _report(*rows))
    found = report.totals([report.Row(source, each) for each in rows])
    assert [(each.row.result.name, each.seconds, each.faster, each.than) for each in found] == [
        ("sampler/wan/own", 2.0, 2.5, "compiled"),
        ("sampler/wan/eager", 9.0, pytest.approx(5 / 9), "compiled"),
        ("sampler/wan/compiled", 5.0, None, ""),
        ("sampler/small/own", 0.5, None, ""),
    ]
    drawn = plots.totals(found, {id(source): 1}).axes[0]
    assert [text.get_text() for text in drawn.texts][:2] == ["2 s, 2.5× compiled", "9 s, 0.556× compiled"]


# Compare.


def _compare(tmp_path: Path, capsys, old: Report, new: Report, *options: object) -> tuple[int, dict[str, str], str]:
    results.write(tmp_path / "old.json", old)
    results.write(tmp_path / "new.json", new)
    status, out, err = _run(capsys, "compare", tmp_path / "old.json", tmp_path / "new.json", *options)
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    return status, {row[0]: row[-1] for row in rows[1:]}, out + err


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("unit", "old", "new", "spread", "verdict"),
    [
        ("ms", 100.0, 106.0, 0.01, "worse"),
        ("ms", 100.0, 104.0, 0.01, "within limit"),
        ("ms", 100.0, 106.0, 0.04, "within spread"),
        ("ms", 100.0, 90.0, 0.01, "better"),
        ("TFLOP/s", 100.0, 90.0, 0.01, "worse"),
        ("TFLOP/s", 100.0, 106.0, 0.01, "better"),
        ("GiB", 1.0, 2.0, 0.0, "worse"),
        ("ms", 0.0, 1.0, 0.0, "worse"),
        ("fraction", 0.0, 1.0, 0.0, "better"),
        ("ms", 0.0, 0.0, 0.0, "within spread"),
    ],
)
def test_a_row_is_judged_by_limit_spread_and_direction(tmp_path, capsys, unit, old, new, spread, verdict):
    before, after = (_report(_row("a", value, unit, spread=spread)) for value in (old, new))
    status, verdicts, _ = _compare(tmp_path, capsys, before, after, "--fail-over", "5%")
    assert verdicts == {"a": verdict}
    assert status == (verdict == "worse")


@pytest.mark.parametrize(("limit", "status"), [("5%", 1), ("5", 1), ("9.95%", 1), ("10.05%", 0), ("0.5%", 1)])
def test_the_limit_decides(tmp_path, capsys, limit, status):
    before, after = _report(_row("a", 100.0)), _report(_row("a", 110.0))
    assert _compare(tmp_path, capsys, before, after, "--fail-over", limit)[0] == status


@pytest.mark.parametrize("limit", ["-1%", "much", "nan", "inf"])
def test_a_limit_that_is_no_percentage_is_refused(capsys, limit):
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "a", "b", f"--fail-over={limit}"])
    assert stop.value.code == 2
    assert f"{limit!r} must be a percentage like 5%" in capsys.readouterr().err


def test_rows_of_one_run_alone_are_shown_and_fail_nothing(tmp_path, capsys):
    before, after = _report(_row("a", 1.0), _row("b", 1.0)), _report(_row("c", 1.0), _row("a", 1.0))
    status, verdicts, text = _compare(tmp_path, capsys, before, after, "--markdown", tmp_path / "deep" / "c.md")
    assert status == 0
    assert verdicts == {"a": "within spread", "b": "only in old", "c": "only in new"}
    assert text.startswith("# Comparison\n\n1 within spread, 1 only in old, 1 only in new. The limit is 5 %.")
    assert (tmp_path / "deep" / "c.md").read_text() == text


def test_runs_without_a_common_row_are_refused(tmp_path, capsys):
    status, _, text = _compare(tmp_path, capsys, _report(_row("a", 1.0)), _report(_row("b", 1.0)))
    assert status == 1
    assert "have no row in common" in text


def test_another_machine_is_refused_unless_it_is_asked_for(tmp_path, capsys):
    before, after = _report(_row("a", 1.0)), _report(_row("a", 1.0), gpu="NVIDIA H100")
    status, _, text = _compare(tmp_path, capsys, before, after)
    assert status == 1
    assert "'NVIDIA H200'" in text
    assert "--any-machine" in text
    status, verdicts, text = _compare(tmp_path, capsys, before, after, "--any-machine")
    assert (status, verdicts) == (0, {"a": "within spread"})
    assert ": NVIDIA H200 and NVIDIA H100" in text
    assert ": NVIDIA H200\n" in _compare(tmp_path, capsys, before, before)[2]


def test_times_are_scaled_by_the_matrix_product_and_rates_are_not(tmp_path, capsys):
    rows = (_row("a", 100.0), _row("b", 100.0, "TFLOP/s"))
    before, after = _report(*rows, product=800.0), _report(*rows, product=900.0)
    status, verdicts, text = _compare(tmp_path, capsys, before, after, "--scale")
    assert status == 1
    assert verdicts == {"a": "worse", "b": "within spread"}
    assert "112.5 ms (111.4–113.6) | +12.5 %" in text
    assert "scaled by 1.1250" in text
    status, _, text = _compare(tmp_path, capsys, before, dataclasses.replace(after, cublas_tflops=None), "--scale")
    assert status == 1
    assert "new.json has no cublas_tflops" in text


def test_times_beside_a_copy_and_its_own_are_scaled_by_the_copies(tmp_path, capsys):
    rows = (_row("ops/x/fwd", 0.2, base=("ops/x-copy/fwd", 0.1)), _row("ops/x-copy/fwd", 0.1), _row("a", 1.0))
    before, after = _report(*rows, product=800.0, copy=4.0), _report(*rows, product=880.0, copy=3.0)
    _, verdicts, text = _compare(tmp_path, capsys, before, after, "--scale")
    assert verdicts == {"ops/x/fwd": "better", "ops/x-copy/fwd": "better", "a": "worse"}
    assert "new times scaled by 1.1000, those beside a copy by 0.7500" in text
    status, _, text = _compare(tmp_path, capsys, before, dataclasses.replace(after, copy_tbps=None), "--scale")
    assert status == 1
    assert "new.json has no copy_tbps" in text


def test_a_unit_that_changed_is_refused_by_name(tmp_path, capsys):
    status, _, text = _compare(tmp_path, capsys, _report(_row("a", 1.0)), _report(_row("a", 1.0, "s")))
    assert status == 1
    assert "a is in ms and in s" in text


def test_folders_are_paired_by_rows_and_rows_of_one_name_by_their_files(folder, tmp_path, capsys):
    new = tmp_path / "new"
    worse = dataclasses.replace(ATTENTION, results=[_row("attention/torch-cudnn/dense_fwd/wan-1.3b-480p", 24.0)])
    results.write(new / "h200" / "attention.json", worse)
    results.write(new / "h200" / "other.json", ATTENTION)  # the same names, another file
    status, out, _ = _run(capsys, "compare", folder, new)
    assert status == 1
    assert "| attention/torch-cudnn/dense_fwd/wan-1.3b-480p [h200/attention.json] | 12 ms (11.88–12.12) | 24 ms" in out
    assert out.count("| within spread |") == len(ATTENTION.results) - 1
    assert out.count("| only in new |") == 1
    assert f"- `{(folder / 'cpu' / 'ops.json').as_posix()}` is only in old: {len(OPS.results)} rows" in out
    status, _, err = _run(capsys, "compare", folder, new / "h200" / "other.json")
    assert status == 1
    assert "must be two files or two folders" in err


def test_a_row_that_moved_to_another_file_of_its_folder_is_found(folder, tmp_path, capsys):
    new = tmp_path / "new"
    first, second, *rest = ATTENTION.results
    results.write(new / "h200" / "dense.json", dataclasses.replace(ATTENTION, results=[second]))
    results.write(new / "h200" / "attention.json", dataclasses.replace(ATTENTION, results=[first, *rest]))
    results.write(new / "ops.json", OPS)  # in another folder than the old one's
    status, out, _ = _run(capsys, "compare", folder, new)
    assert status == 0
    assert f"{len(ATTENTION.results)} within spread. The limit" in out
    assert f"`{(new / 'ops.json').as_posix()}` is only in new: {len(OPS.results)} rows" in out


def test_committed_results_are_reported_and_equal_to_themselves(capsys):
    committed = Path(__file__).parents[1] / "benchmarks" / "results"
    sources, _ = report.load([committed])
    text = report.markdown(sources)
    for source in sources:
        for result in source.report.results:
            assert f"| {result.name} | " in text
    assert _run(capsys, "compare", committed, committed)[0] == 0


# Where they are used.


def test_command_lines_in_workflows_and_the_readme_are_valid():
    root = Path(__file__).parents[1]
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    found = []
    for path in (root / "README.md", *sorted((root / ".github" / "workflows").glob("*.yml"))):
        text = re.sub(r"\n\s+--", " --", path.read_text())
        for line in text.splitlines():
            if make := re.search(r"run: make ([a-z-]+)$", line):
                assert make[1] in targets
            if command := re.search(r"(?:^|[ /])stattn ((?:compare|profile) [^`]*-.*)$", line):
                arguments = shlex.split(command[1])
                arguments = ["5%" if each == "$FAIL_OVER" else each for each in arguments]
                assert cli._parser(arguments).parse_args(arguments).command == arguments[0]
                found.append((path.name, arguments[0]))
    assert found == [("README.md", "compare"), ("README.md", "profile"), ("gpu-benchmarks.yml", "compare")]
    assert (root / ".ci" / "run").exists()
