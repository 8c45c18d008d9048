"""Training in several processes: the same steps as one process that takes all shares."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stattn.recipes import PRESETS
from stattn.trainer import Trainer

two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=(pytest.mark.gpu, two_cards))])
def test_two_processes_train_as_one(tmp_path: Path, device: str) -> None:
    script = Path(__file__).with_name("parallel_training.py")
    command = ["torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(script), str(tmp_path), device]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *command], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "process 0 is done" in done.stdout
    assert "process 1 is done" in done.stdout


def test_ways_of_sharing_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="parallel='tensor'"):
        Trainer(PRESETS["smoke"], torch.device("cpu"), parallel="tensor")
