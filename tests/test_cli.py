"""The `stattn` command: what it prints, what it refuses, and with which exit status."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest
import torch

import stattn
from stattn import cli
from stattn.commands import doctor
from stattn.ops._dispatch import Operation


def _run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        status = cli.main(arguments)
    except SystemExit as stop:  # argparse's way to end
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "stattn.cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"stattn {stattn.__version__}"


@pytest.mark.smoke
def test_help_names_every_command(capsys):
    status, out, _ = _run(capsys, "--help")
    assert status == 0
    assert all(name in out for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(capsys, command):
    status, out, _ = _run(capsys, command, "--help")
    assert status == 0
    assert out.startswith(f"usage: stattn {command}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: command"),
        (("dance",), "invalid choice: 'dance'"),
        (("explain",), "required: --grid"),
        (("explain", "--grid", "2,3"), "'2,3' must be three integers"),
        (("explain", "--grid", "2,3,0"), "'2,3,0' must be three positive integers"),
        (("explain", "--grid", "2,3,4", "--dtype", "fp8"), "invalid choice: 'fp8'"),
        (("explain", "--grid", "2,3,4", "--heads", "0"), "'0' must be a positive integer"),
        (("explain", "--grid", "2,3,4", "--after", "-1"), "must be a positive integer|expected one argument"),
        (("explain", "--grid", "2,3,4", "--capability", "hopper"), "'hopper' must be a compute capability like 9.0"),
        (("explain", "--grid", "2,3,4", "--color", "red"), "unrecognized arguments: --color red"),
        (("demo", "--steps", "many"), "'many' must be a positive integer"),
        (("sample", "--caption", "a red disc"), "required: --out"),
        (("doctor", "--device", "tpu"), "invalid choice: 'tpu'"),
        (("explain", "--grid", "4,4,4", "--masks", "full()"), "stattn explain: error: unrecognized arguments: --masks"),
        (("study", "edits", "--sedes", "3"), "stattn study: error: unrecognized arguments: --sedes 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_invalid_command_line_ends_with_status_two_and_a_reason(capsys, arguments, message):
    status, _, err = _run(capsys, *arguments)
    assert status == 2
    assert any(part in err for part in message.split("|"))


@pytest.mark.smoke
def test_explain_prints_the_table_and_the_density(capsys):
    key = "window(3, 5, 7)"
    status, out, _ = _run(
        capsys, "explain", "--grid", "6x10x14", "--after", "20", "--mask", "window(3,5,7)", "--device", "cpu"
    )
    assert status == 0
    density = stattn.masks.parse(key).density(stattn.Grid(6, 10, 14, after=20))
    assert f"grid 6x10x14, 860 tokens (20 global), mask {key}" in out
    assert f"density {100 * density:.3g} %" in out
    assert "stattn.attention on cpu: auto takes reference" in out
    assert "sdpa" in out
    assert f"the call has mask {key}" in out


def test_explain_asks_about_a_device_that_is_not_here(capsys):
    status, out, _ = _run(capsys, "explain", "--grid", "21,45,80", "--mask", "window(7,17,17)", "--device", "cuda")
    assert status == 0
    assert "stattn.attention on cuda: auto takes " in out
    assert "ask for it with impl='reference'" in out


def test_explain_asks_about_a_gpu_that_is_not_here(capsys):
    status, out, _ = _run(capsys, "explain", "--grid", "4,8,8", "--capability", "8.9")
    assert status == 0
    assert "stattn.attention on a GPU of capability 8.9: auto takes " in out
    assert "needs compute capability 9.0, this device has 8.9" in out


def test_explain_draws_the_mask(capsys, tmp_path):
    path = tmp_path / "new" / "mask.svg"
    status, out, _ = _run(capsys, "explain", "--grid", "3,6,6", "--mask", "spatial()", "--svg", str(path))
    assert status == 0
    assert path.read_text() == stattn.masks.spatial().draw((3, 6, 6))
    assert str(path) in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "--grid", "2,3,4", "--mask", "window(3,3,3)"), "window t=3"),
        (("explain", "--grid", "2,3,4", "--mask", "windows(3,3,3)"), "mask 'windows(3,3,3)'"),
        (("explain", "--grid", "2,3,4", "--heads", "4", "--key-heads", "3"), "3"),
        (("sample", "--caption", "a red disc moves left", "--out", "clip.avi"), "'clip.avi' must end in .mp4"),
        (("sample", "--caption", "a red disc", "--out", "clip.gif", "--model", "none"), "no weights at"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_with_status_one(capsys, arguments, message):
    status, out, err = _run(capsys, *arguments)
    assert status == 1
    assert err.startswith(f"stattn {arguments[0]}: ")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" in _run(capsys, "--traceback", *arguments)[2]


def test_a_bug_is_not_dressed_as_a_refusal(monkeypatch):
    def broken(args: argparse.Namespace) -> int:
        raise RuntimeError("bug")

    monkeypatch.setattr(doctor, "main", broken)
    with pytest.raises(RuntimeError, match="bug"):
        cli.main(["doctor"])


def test_ctrl_c_ends_with_status_130(monkeypatch, capsys):
    def stopped(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "main", stopped)
    assert _run(capsys, "doctor")[0] == 130


@pytest.mark.smoke
def test_the_doctor_describes_the_machine_and_every_operation(capsys):
    status, out, _ = _run(capsys, "doctor", "--device", "cpu")
    assert status == 0
    for name in ("os", "cpu", "python", "torch", "cuda", "gpu", "extension", "triton", "flash-attn", "weights"):
        assert f"\n  {name}" in out
    assert torch.__version__ in out
    modules = [module for name, module in sys.modules.items() if name.startswith("stattn.ops.")]
    operations = {each.name for module in modules for each in vars(module).values() if isinstance(each, Operation)}
    assert len(operations) >= 13
    for operation in operations - {"attention"}:
        assert f"stattn.{operation} on cpu: auto takes reference" in out
    assert "stattn.attention on cpu: auto takes sdpa, mask full()" in out


def test_the_doctor_says_what_a_gpu_call_would_take(capsys):
    status, out, _ = _run(capsys, "doctor", "--device", "cuda")
    assert status == 0
    assert "stattn.modulate on cuda: auto takes " in out
    assert "auto takes the reference on CPU tensors only" in out
