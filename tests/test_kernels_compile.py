"""Every kernel and CONFIG compiles ahead of time, for GPUs that this machine need not have, and spills nothing."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KERNELS = Path(__file__).parents[1] / "kernels"
STEMS = sorted(path.stem for path in KERNELS.glob("*.py") if not path.stem.startswith("_"))


CAPABILITIES = (80, 90, 100)


@functools.cache
def compiled(stem: str) -> list[dict[str, Any]]:
    """What the kernels of a stem need on each capability."""
    # In a process of its own: in this one kernels may be made for the interpreter. One for all capabilities, as
    # starting it costs more than most files take to compile.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "stattn.kernels._compile", stem, "--capability", *map(str, CAPABILITIES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=KERNELS.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = [(row["kernel"], row["capability"]) for row in rows]
    assert len(set(kernels)) == len(kernels), "two kernels of one name, of which only one was compiled"
    return rows


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("stem", STEMS)
def test_every_config_compiles_without_local_memory(stem: str, capability: int) -> None:
    rows = [row for row in compiled(stem) if row["capability"] == capability]
    assert rows, f"{stem} lists no kernels"
    assert not [row for row in rows if row["local"] > row["allowed"]], "kernels that use local memory"
