"""The results file: what it holds, what it refuses, and how callables are timed."""

from __future__ import annotations

import copy
import dataclasses
import json
import time

import pytest
import torch

from stattn import results
from stattn.results import Baseline, Report, Result, Timing


def _report() -> Report:
    faster = Result("attention window", "ms", 2.0, 1.9, 2.2, Baseline("attention full", 5.0), 2.5, True)
    plain = Result("copy", "TB/s", 4.1, 4.0, 4.2, None, None, True)
    rate = Result("gemm", "TFLOP/s", 600.0, 590.0, 610.0, Baseline("cuBLAS", 750.0), 0.8, True)
    return Report(
        "stattn demo", "NVIDIA H200", {"torch": "2.11"}, "2026-01-31T12:00:00+00:00", 740.0, 4.1, [faster, plain, rate]
    )


def _data() -> dict:
    return dataclasses.asdict(_report())


@pytest.mark.smoke
def test_a_report_reads_back_as_it_was_written(tmp_path):
    results.write(tmp_path / "deep" / "r.json", _report())
    assert results.read(tmp_path / "deep" / "r.json") == _report()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.json"]


def test_the_file_holds_exactly_the_documented_fields(tmp_path):
    results.write(tmp_path / "r.json", _report())
    data = json.loads((tmp_path / "r.json").read_text())
    assert list(data) == ["command", "gpu", "versions", "date", "cublas_tflops", "copy_tbps", "results"]
    assert list(data["results"][0]) == ["name", "unit", "value", "p20", "p80", "baseline", "ratio", "checked"]


@pytest.mark.smoke
@pytest.mark.parametrize("checked", [False, None, 1, "true"])
def test_an_unchecked_result_is_not_written(tmp_path, checked):
    report = _report()
    report.results[0] = dataclasses.replace(report.results[0], checked=checked)
    with pytest.raises(ValueError, match="checked"):
        results.write(tmp_path / "r.json", report)
    assert not list(tmp_path.iterdir())


WRONG = [
    (("command",), "", r"command=''"),
    (("gpu",), None, r"gpu=None"),
    (("date",), "yesterday", r"date='yesterday'"),
    (("date",), "2026-01-31T12:00:00", "time zone"),
    (("versions",), {}, "versions"),
    (("versions",), {"torch": 2}, "versions"),
    (("cublas_tflops",), 0, "cublas_tflops=0"),
    (("copy_tbps",), "4", "copy_tbps='4'"),
    (("results",), {}, "results"),
    (("results", 0, "name"), " ", "name"),
    (("results", 0, "name"), "copy", "more than once"),
    (("results", 0, "unit"), "seconds", "unit='seconds'"),
    (("results", 0, "value"), float("nan"), "value=nan"),
    (("results", 0, "value"), float("inf"), "value=inf"),
    (("results", 0, "value"), True, "value=True"),
    (("results", 0, "value"), -1.0, "value=-1.0"),
    (("results", 0, "p20"), 2.1, "p20=2.1"),
    (("results", 0, "p80"), 1.0, "p80=1.0"),
    (("results", 0, "ratio"), 0.4, "ratio=0.4 must be 2.5"),
    (("results", 2, "ratio"), 1.25, "ratio=1.25 must be 0.8"),
    (("results", 0, "ratio"), None, "together"),
    (("results", 1, "ratio"), 1.0, "together"),
    (("results", 0, "baseline"), {"name": "x"}, "missing fields"),
    (("results", 0, "baseline", "value"), 0, "value=0"),
]


@pytest.mark.parametrize(
    ("path", "value", "message"), WRONG, ids=[f"{'.'.join(map(str, w[0]))}={w[1]!r}" for w in WRONG]
)
def test_an_invalid_field_is_refused_by_name(path, value, message):
    data = _data()
    assert results.validate(data) == _report()
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        results.validate(data)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_missing_and_unknown_fields_are_refused(change):
    for place in (lambda d: d, lambda d: d["results"][0], lambda d: d["results"][0]["baseline"]):
        data = _data()
        target = place(data)
        if change == "missing":
            target.pop("name" if "name" in target else "date")
        else:
            target["extra"] = 1
        with pytest.raises(ValueError, match=f"{change} fields .*'(name|date|extra)'"):
            results.validate(data)


def test_reading_what_is_not_a_report_names_the_file(tmp_path):
    path = tmp_path / "r.json"
    for text in ("[1, 2]", "{not json", json.dumps(_data() | {"gpu": ""})):
        path.write_text(text)
        with pytest.raises(ValueError, match="r.json"):
            results.read(path)


def test_a_result_of_timings_takes_medians_and_the_ratio_to_its_baseline():
    ours, base = Timing((3.0, 1.0, 2.0)), Timing((8.0, 4.0, 6.0))
    result = Result.of("ours", ours, baseline=("base", base), checked=True)
    assert (result.value, result.unit, result.baseline, result.ratio) == (2.0, "ms", Baseline("base", 6.0), 3.0)
    assert Result.of("ours", ours, checked=True).ratio is None


def test_percentiles_interpolate_between_sorted_samples():
    timing = Timing(tuple(float(x) for x in (10, 0, 20, 50, 40, 30)))
    assert (timing.p20, timing.median, timing.p80) == (10.0, 25.0, 40.0)
    assert Timing((7.0,)).p20 == Timing((7.0,)).p80 == 7.0


def test_the_table_holds_every_result_and_the_machine():
    text = results.markdown(_report())
    assert "NVIDIA H200; bf16 8192³ matmul 740 TFLOP/s; copy 4.10 TB/s; torch 2.11" in text
    assert "| attention window | 2 ms | 1.9–2.2 | 5 ms (attention full) | 2.50× |" in text
    assert "| copy | 4.1 TB/s | 4–4.2 | – | – |" in text
    assert text.count("\n|") == 2 + 3


def test_a_cpu_report_names_the_cpu_and_leaves_the_gpu_limits_empty():
    report = results.new_report("stattn demo", "cpu")
    assert report.gpu.startswith("none (CPU: ")
    assert (report.cublas_tflops, report.copy_tbps) == (None, None)
    assert report.versions["torch"] == torch.__version__
    assert results.validate(dataclasses.asdict(report)).command == "stattn demo"


def test_contenders_are_timed_in_interleaved_rounds_that_rotate():
    calls: list[str] = []
    timings = results.time_contenders(
        {name: (lambda name=name: calls.append(name)) for name in "abc"}, device="cpu", rounds=3, warmup=1
    )
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(t.samples) for name, t in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_sleep_is_timed_in_milliseconds():
    timing = results.time_callable(lambda: time.sleep(0.02), device="cpu", rounds=3, warmup=0)
    assert 19 < timing.p20 <= timing.median < 200


def test_no_round_starts_after_the_budget_but_three_are_made():
    timing = results.time_callable(lambda: time.sleep(0.01), device="cpu", rounds=50, warmup=0, budget=0.0)
    assert len(timing.samples) == 3


def test_an_error_of_a_contender_is_passed_on():
    def fails():
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        results.time_contenders({"good": lambda: None, "bad": fails}, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contenders": {}}, "contenders={}"),
        ({"rounds": 0}, "rounds=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"device": "meta"}, "device='meta'"),
    ],
)
def test_timing_refuses_bad_arguments_by_name(arguments, message):
    good = {"contenders": {"a": lambda: None}, "device": "cpu", "rounds": 1, "warmup": 0}
    assert results.time_contenders(**good)["a"].median >= 0
    with pytest.raises(ValueError, match=message):
        results.time_contenders(**(copy.copy(good) | arguments))


def test_calls_in_a_graph_are_timed_on_every_copy_and_per_call():
    calls: list[int] = []

    def sleep(copy: int) -> None:
        calls.append(copy)
        time.sleep(0.005)

    timing = results.time_in_graph({"sleep": sleep}, copies=3, device="cpu", rounds=2, warmup=1)["sleep"]
    assert calls == [0, 1, 2] * 3
    assert len(timing.samples) == 2
    assert 4.9 < timing.p20 <= timing.median < 15
    assert (results.copies_for(100 << 20), results.copies_for(1 << 30), results.copies_for(0)) == (3, 2, 256 << 20)


@pytest.mark.parametrize(("name", "value"), [("copies", 0), ("rounds", 0), ("warmup", 0), ("contenders", {})])
def test_timing_in_a_graph_refuses_bad_arguments_by_name(name, value):
    arguments = {"contenders": {"fn": lambda copy: None}, "copies": 1, "device": "cpu", name: value}
    with pytest.raises(ValueError, match=f"{name}={value}"):
        results.time_in_graph(**arguments)


@pytest.mark.gpu
def test_a_graph_times_a_copy_without_its_launch_and_a_backward_on_one_stream():
    x = torch.randn(2, 1 << 24, device="cuda")
    y = torch.empty_like(x)
    timing = results.time_in_graph({"copy": lambda i: y[i].copy_(x[i])}, copies=2)["copy"]
    assert torch.equal(x, y)
    assert 0.01 < timing.median < 1
    with torch.cuda.stream(torch.cuda.Stream()):
        weight = torch.randn(1 << 20, device="cuda", requires_grad=True)
        out = weight * 2
        grads = results.time_in_graph(
            {"grad": lambda i: torch.autograd.grad(out, weight, out, retain_graph=True)}, copies=2, rounds=3
        )
    assert grads["grad"].median > 0


def test_cpu_ceilings_say_what_they_measured():
    top = results.ceilings("cpu", rounds=1)
    assert top.matmul > 0
    assert (top.matmul_unit, top.matmul_what) == ("GFLOP/s", "float32 1024^3 matrix product")
    assert top.copy > 0
    assert (top.copy_unit, top.copy_what) == ("GB/s", "copy of 64 MiB, read and written")


@pytest.mark.gpu
def test_gpu_ceilings_are_in_tera_units_and_events_time_the_device():
    top = results.ceilings("cuda", rounds=5)
    assert (top.matmul_unit, top.copy_unit) == ("TFLOP/s", "TB/s")
    assert 1 < top.matmul < 1e4
    assert 0.1 < top.copy < 20
    a = torch.randn(4096, 4096, device="cuda")
    small, large = (results.time_callable(lambda n=n: a[:n] @ a, rounds=5).median for n in (256, 4096))
    assert large > 2 * small


def test_versions_tell_what_chooses_the_kernels_of_cublas(monkeypatch):
    monkeypatch.delenv("CUBLASLT_WORKSPACE_SIZE", raising=False)
    assert "CUBLASLT_WORKSPACE_SIZE" not in results.versions()
    monkeypatch.setenv("CUBLASLT_WORKSPACE_SIZE", "0")
    assert results.versions()["CUBLASLT_WORKSPACE_SIZE"] == "0"
