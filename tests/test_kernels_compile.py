"""Every kernel and CONFIG compiles ahead of time, for GPUs that this machine need not have, and spills nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "kernels"
STEMS = sorted(path.stem for path in KERNELS.glob("*.py") if not path.stem.startswith("_"))


@pytest.mark.parametrize("capability", (80, 90, 100))
@pytest.mark.parametrize("stem", STEMS)
def test_every_config_compiles_without_local_memory(stem: str, capability: int) -> None:
    # In a process of its own: in this one kernels may be made for the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "stattn.kernels._compile", stem, "--capability", str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=KERNELS.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, f"{stem} lists no kernels"
    assert not [row for row in rows if row["local"] > row["allowed"]], "kernels that use local memory"
