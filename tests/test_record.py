"""What ``--record`` leaves of a run, and tests that run apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest

@pytest.mark.apart
@pytest.mark.parametrize("number", [1, 2])
def test_apart(number):
    assert number == 1, "two is wrong"
    return {"masks": number}

def test_here(record_property):
    record_property("rows", 7)

@pytest.mark.skip(reason="no such machine")
def test_elsewhere():
    raise AssertionError
"""


def test_a_record_holds_how_each_test_ended_and_what_it_covered(tmp_path: Path) -> None:
    folder = Path(__file__).parent
    (tmp_path / "test_some.py").write_text(TESTS, encoding="utf-8")
    (tmp_path / "conftest.py").write_text((folder / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "apart.py").write_text((folder / "apart.py").read_text(encoding="utf-8"), encoding="utf-8")
    record = tmp_path / "made" / "record.json"
    options = ["-q", "-p", "no:cacheprovider", "-c", str(folder.parent / "pyproject.toml"), "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path / "test_some.py"), "--record", str(record)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder.parent)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "two is wrong" in done.stdout
    found = json.loads(record.read_text(encoding="utf-8"))
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 1, 1)
    assert str(record) in found["command"]
    assert {"python", "torch"} <= set(found["versions"])
    tests = {test["test"].split("::")[1]: test for test in found["tests"]}
    assert tests["test_apart[1]"]["masks"] == 1
    assert tests["test_apart[2]"]["outcome"] == "failed"
    assert tests["test_here"]["rows"] == 7
    assert "no such machine" in tests["test_elsewhere"]["reason"]
