"""The examples run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_fine_tuning_trains_under_each_mask_and_says_what_ran(tmp_path):
    pytest.importorskip("safetensors")
    small = "--steps 1 --batch 2 --seeds 1 --held-out 1 --device cpu".split()
    out = tmp_path / "finetune.json"
    command = [sys.executable, str(ROOT / "examples" / "finetune_sparse.py"), *small, "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert [run["mask"] for run in record["runs"]] == ["full()", "window(8, 5, 6)", "window(5, 4, 4)"]
    assert 0.14 < record["density"]["window(5, 4, 4)"] < 0.16 < 0.45 < record["density"]["window(8, 5, 6)"] < 0.5
    before, after = ([run[when] for run in record["runs"]] for when in ("before", "after"))
    assert max(before[:2]) < before[2]  # a window of half the pairs costs next to nothing
    assert before[0] != before[1]
    assert all(0 < abs(a - b) < 0.1 * b for a, b in zip(after, before, strict=True))
    assert "15.6%" in done.stdout
