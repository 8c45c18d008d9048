"""Every kernel and CONFIG compiles ahead of time, for GPUs that this machine need not have, and spills nothing."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stattn.kernels._compile import specializations

KERNELS = Path(__file__).parents[1] / "kernels"
STEMS = sorted(path.stem for path in KERNELS.glob("*.py") if not path.stem.startswith("_"))


CAPABILITIES = (80, 90, 100)
UNSERVED = {
    ("attention_runs", 80),  # which has no tensor copies
    ("attention_runs_hopper", 80),
    ("attention_runs_hopper", 100),
}


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> dict[str, list[dict[str, Any]]]:
    """What the kernels of the stems that are asked for need on each capability."""
    chosen = (item for item in request.session.items if isinstance(item, pytest.Function))
    calls = [item.callspec.params for item in chosen if item.originalname == TEST.__name__]
    stems = list(dict.fromkeys(call["stem"] for call in calls))
    # In a process of its own: in this one kernels may be made for the interpreter. One for all, as starting it costs
    # more than most files take to compile, and the last kernel of a file would leave the other cores idle.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "stattn.kernels._compile", *stems, "--capability", *map(str, CAPABILITIES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=KERNELS.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = [(row["stem"], row["kernel"], row["capability"]) for row in rows]
    assert len(set(kernels)) == len(kernels), "two kernels of one name, of which only one was compiled"
    return {stem: [row for row in rows if row["stem"] == stem] for stem in stems}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("stem", STEMS)
def test_every_config_compiles_without_local_memory(
    compiled: dict[str, list[dict[str, Any]]], stem: str, capability: int
) -> None:
    rows = [row for row in compiled[stem] if row["capability"] == capability]
    assert rows or (stem, capability) in UNSERVED, f"{stem} lists no kernels"
    assert not [row for row in rows if "error" in row], "kernels that do not compile"
    assert not [row for row in rows if row["local"] > row["allowed"]], "kernels that use local memory"
    assert not [row for row in rows if row["shared"] > row["room"]], "kernels with more shared memory than there is"


TEST = test_every_config_compiles_without_local_memory


def listed(stem: str) -> set[tuple[str, ...]]:
    return {
        tuple(str(field) for field in (each.name, each.fn, each.types, each.constants, each.options))
        for each in specializations(stem)
    }


@pytest.mark.parametrize("stem", STEMS)
def test_every_config_is_among_the_kernels_that_are_compiled(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any one of them, fewer kernels are listed, or others."""
    module = importlib.import_module(f"stattn.kernels.{stem}")
    everything, found = listed(stem), 0
    for name in [name for name in vars(module) if name.endswith("CONFIGS")]:
        configs = getattr(module, name)
        groups = configs if isinstance(configs, dict) else {None: configs}
        for kernel, some in groups.items():
            for number in range(len(some)):
                left = some[:number] + some[number + 1 :]
                with monkeypatch.context() as patch:
                    patch.setattr(module, name, left if kernel is None else {**configs, kernel: left})
                    assert everything - listed(stem), f"{name} {kernel or ''} {number}"
                found += 1
    assert found
