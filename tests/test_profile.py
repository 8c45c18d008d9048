"""Ranges, and the command lines under which a program is profiled."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

import stattn
from stattn import cli, dit, ranges, sampler
from stattn.commands import profile
from stattn.ops.modulate import MODULATE, ModulateCall
from stattn.with_ranges import run_program


@pytest.fixture
def names(monkeypatch) -> list[str]:
    """The names of ranges, as they are opened."""
    found: list[str] = []

    @contextmanager
    def opened(name: str):
        found.append(name)
        try:
            yield
        finally:
            found.append(f"end of {name}")

    monkeypatch.setattr(ranges, "_open", opened)
    return found


def _model() -> dit.DiT:
    torch.manual_seed(0)
    return dit.DiT(dit.CONFIGS["tiny"], layers=2).eval()


def _sample(model: dit.DiT) -> torch.Tensor:
    text = torch.zeros(1, 4, dtype=torch.int64)
    return sampler.sample(model, (1, 3, 2, 8, 8), text=text, steps=2, seed=0)


@pytest.mark.smoke
def test_ranges_are_off_and_cost_no_iterator_and_no_wrapper():
    assert not ranges.enabled()
    items = [1, 2]
    assert ranges.each("layer", items) is items
    call = ModulateCall("cpu", (0, 0), (torch.float32, torch.float32), 8, "layer")
    assert MODULATE.choose("reference", call) in MODULATE.implementations


def test_a_sample_opens_ranges_of_steps_layers_and_operations_and_is_the_same(names):
    model = _model()
    ranged = _sample(model)
    noted = list(names)
    ranges.disable()
    assert torch.equal(_sample(model), ranged)
    assert names == noted
    opened = [name for name in names if not name.startswith("end of ")]
    assert [name for name in opened if ".step." in name] == ["stattn.step.0", "stattn.step.1"]
    assert [name for name in opened if ".layer." in name] == ["stattn.layer.0", "stattn.layer.1"] * 2
    for operation in ("patchify3d", "modulate", "qk_norm_rope", "attention", "denoise_step"):
        assert f"stattn.{operation}" in opened
    first, last = names.index("stattn.layer.0"), names.index("end of stattn.layer.0")
    assert "stattn.modulate" in names[first:last]
    assert names[-1] == "end of stattn.step.1"


def test_a_range_is_closed_when_its_body_fails(names):
    with pytest.raises(ZeroDivisionError):
        ranges.around("boom", lambda: 1 / 0)()
    for _ in ranges.each("step", [1, 2]):
        break
    assert names == ["stattn.boom", "end of stattn.boom", "stattn.step.0", "end of stattn.step.0"]


def test_compiled_models_leave_ranges_out(names):
    def walk(x: torch.Tensor) -> torch.Tensor:
        for scale in ranges.each("layer", (1.0, 2.0)):
            x = stattn.modulate(x, x[:, 0] * scale, x[:, 0], impl="reference")
        return x

    x = torch.randn(1, 3, 4)
    got = torch.compile(walk, fullgraph=True, backend="eager")(x)
    assert names == []
    torch.testing.assert_close(got, walk(x))
    assert "stattn.modulate" in names


def test_enabling_refuses_what_is_not_there(monkeypatch):
    with pytest.raises(ValueError, match="kind='itt' must be one of nvtx, record"):
        ranges.enable("itt")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match="no NVTX"):
        ranges.enable()
    assert not ranges.enabled()


def test_a_program_is_run_as_python_runs_it(tmp_path, capsys, monkeypatch):
    (tmp_path / "beside.py").write_text("WORD = 'beside'\n")
    (tmp_path / "module.py").write_text("import sys, beside\nprint(__name__, sys.argv[1:])\nsys.exit('stopped')\n")
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "script.py"
    script.write_text("import sys, beside\nprint(__name__, beside.WORD, sys.argv[1:])\nsys.exit(3)\n")
    argv, path = list(sys.argv), list(sys.path)
    assert run_program([str(script), "a", "--b"]) == 3
    assert capsys.readouterr().out == "__main__ beside ['a', '--b']\n"
    assert run_program(["-m", "module", "-q"]) == 1
    assert capsys.readouterr() == ("__main__ ['-q']\n", "stopped\n")
    assert (sys.argv, sys.path) == (argv, path)
    with pytest.raises(ValueError, match="must name a module"):
        run_program(["-m"])


def test_the_module_runs_a_program_with_ranges_on(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from stattn import ranges\nprint(ranges.enabled())\n")
    command = [sys.executable, "-m", "stattn.with_ranges", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if torch.version.cuda is None:
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "stattn.with_ranges: kind='nvtx': this build of torch has no CUDA, and so no NVTX\n"
    else:
        assert (done.returncode, done.stdout) == (0, "True\n")


# The command.


def _run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["profile", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


PROGRAM = ("--", "stattn", "sample", "--caption", "a red disc", "--out", "clip.mp4")
RUN = [sys.executable, "-m", "stattn.with_ranges", "-m", "stattn.cli", *PROGRAM[2:]]


def test_ncu_gets_the_filters(capsys):
    filters = ("--kernel", "attention_.*", "--range", "stattn.step.1", "--skip", "2")
    status, out, _ = _run(capsys, "--tool", "ncu", *filters, "--dry-run", *PROGRAM)
    assert status == 0
    assert shlex.split(out) == [
        *"ncu --set full --clock-control none --target-processes all --nvtx".split(),
        *"--nvtx-include stattn.step.1/ --kernel-name".split(),
        "regex:attention_.*",
        *"--launch-skip 2 --launch-count 1 --force-overwrite --export out/profile/ncu".split(),
        *RUN,
    ]  # fmt: skip


def test_nsys_captures_the_range(capsys):
    status, out, _ = _run(capsys, "--tool", "nsys", "--range", "stattn.attention", "--out", "r", "--dry-run", *PROGRAM)
    assert status == 0
    assert shlex.split(out) == [
        *"nsys profile --trace=cuda,nvtx,cublas,cudnn --cuda-graph-trace=node --capture-range=nvtx".split(),
        *"--nvtx-capture=stattn.attention --capture-range-end=stop".split(),
        *"--env-var=NSYS_NVTX_PROFILER_REGISTER_ONLY=0 --force-overwrite=true --output=r".split(),
        *RUN,
    ]


@pytest.mark.parametrize("tool", ["ncu", "nsys"])
def test_a_missing_tool_prints_the_command_and_says_so(capsys, monkeypatch, tool):
    monkeypatch.setenv("PATH", "")
    status, out, err = _run(capsys, "--tool", tool, *PROGRAM)
    assert status == 1
    assert out.startswith(f"{tool} ")
    assert shlex.split(out)[-len(RUN) :] == RUN
    assert f"{tool} is not on the PATH: run the line above where" in err


def test_a_tool_that_is_there_runs_and_its_status_is_returned(capsys, monkeypatch, tmp_path):
    fake = tmp_path / "bin" / "ncu"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\nexit 7\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/bin:/usr/bin")
    status, out, _ = _run(capsys, "--tool", "ncu", "--out", str(tmp_path / "new" / "r"), "--", "./binary", "-x")
    assert status == 7
    assert "./binary is not run by Python" in out
    assert f"ncu --import {tmp_path}/new/r.ncu-rep" in out
    assert (tmp_path / "said").read_text().endswith(f"--export {tmp_path}/new/r ./binary -x\n")


def test_torch_writes_a_trace_with_ranges_and_prints_what_took_longest(capsys, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, stattn\nx = torch.randn(1, 3, 4)\n"
        "stattn.modulate(x, x[:, 0], x[:, 0])\nassert sys.argv[1] == '--steps'\n"
    )
    trace = tmp_path / "new" / "t"
    status, out, _ = _run(
        capsys, "--tool", "torch", "--kernel", "layer_norm|modulate", "--out", str(trace), "--", str(script), "--steps"
    )
    assert status == 0
    events = json.loads(trace.with_suffix(".json").read_text())["traceEvents"]
    assert any(event.get("name") == "stattn.modulate" for event in events)
    assert "stattn.modulate" in out
    assert "aten::empty" not in out
    assert not ranges.enabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tool", "nsys", "--kernel", "x", *PROGRAM), "--kernel x: --tool nsys records all there is"),
        (("--tool", "torch", "--range", "x", *PROGRAM), "--range x: --tool torch records all there is"),
        (("--tool", "nsys", "--launches", "3", *PROGRAM), "--launches 3: --tool nsys"),
        (("--tool", "ncu", "--kernel", "(", *PROGRAM), "--kernel '(' is not a regular expression"),
        (("--tool", "torch", "--", "./binary"), "'./binary' is not run by Python"),
        (("--tool", "ncu", "--", "python", "-c", "pass"), "must run a module (-m) or a script"),
    ],
)
def test_what_a_tool_cannot_do_is_refused(capsys, arguments, message):
    status, _, err = _run(capsys, *arguments)
    assert status == 1
    assert message in err


@pytest.mark.parametrize(
    ("command", "program"),
    [
        ("python3.12 -m pytest -k x", ["-m", "pytest", "-k", "x"]),
        ("/usr/bin/python a.py -q", ["a.py", "-q"]),
        ("-m stattn.cli doctor", ["-m", "stattn.cli", "doctor"]),
        ("bin/stattn doctor", ["-m", "stattn.cli", "doctor"]),
        ("pytest benchmarks", ["-m", "pytest", "benchmarks"]),
        ("a.py", ["a.py"]),
        ("./binary", None),
    ],
)
def test_programs_of_python_are_recognised(command, program):
    assert profile.python_program(command.split()) == program
