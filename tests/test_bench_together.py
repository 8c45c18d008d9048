"""Suites that are timed one at a time in several processes leave the files of pytest."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the benchmarks of a CPU")
def test_parts_are_joined_and_rehearsals_leave_no_results(tmp_path):
    options = ["-k", "euler-cfg", "--parts", "2", "--rounds", "3", "--results", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.together", "denoise", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "denoise.json").read_text())
    assert found["command"].startswith("python -m benchmarks.together denoise -k euler-cfg --parts 2")
    steps = {"euler-cfg", "euler-cfg-latents", "euler-cfg-rescale", "euler-cfg-zero_star"}
    rows = [f"ops/denoise_step{end}/fwd/{step}" for step in steps for end in ("", "-copy")]
    wanted = {f"{row}{end}" for row in rows for end in ("", "/bandwidth")}
    assert {each["name"] for each in found["results"]} == wanted
    assert all(each["checked"] and each["value"] > 0 for each in found["results"])
    assert all(each["value"] != 1 for each in found["results"])  # what a rehearsal gives


def test_a_process_that_takes_too_long_loses_its_own_results_only(tmp_path):
    options = ["--parts", "1", "--limit", "0", "--results", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.together", "denoise", *options]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 1
    assert not list(tmp_path.iterdir())
