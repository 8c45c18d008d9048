"""What every test gets: the same seeds, and a reason in place of a test that this machine cannot run.

``--record FILE`` leaves a JSON record of a run: where and when, and for each test how it ended and what it covered.
"""

import datetime
import json
import os
import random
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from apart import Apart

from stattn import results

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel file is imported: Triton reads it once for each kernel


WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # test processes side by side share the cores, as does what they start
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


class Record:
    """Gather how each test ended, how long it took, and its ``record_property`` numbers.

    The file is written anew after every test, so that a run that is cut off leaves what it proved until then.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.tests = path, []
        self.head: dict[str, Any] = {
            "command": shlex.join(["python", "-m", "pytest", *sys.argv[1:]]),
            "gpu": results.machine(),
            "versions": results.versions(),
        }

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        test = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.skipped:
            test["reason"] = report.longrepr[2]
        self.tests.append(test | dict(report.user_properties))
        self.write()

    def pytest_sessionfinish(self) -> None:
        self.write()

    def write(self) -> None:
        outcomes = [test["outcome"] for test in self.tests]
        record = self.head | {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **{outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")},
        }
        rows = ",\n".join("    " + json.dumps(test) for test in self.tests)
        head = json.dumps(record, indent=2).removesuffix("\n}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(f'{head},\n  "tests": [\n{rows}\n  ]\n}}\n', encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FILE", type=Path, help="write what the tests proved, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Apart())
    if config.getoption("--record") and not hasattr(config, "workerinput"):  # under pytest-xdist, one process records
        config.pluginmanager.register(Record(config.getoption("--record")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marker, reason = "gpu", "no CUDA device"
    if torch.cuda.is_available():
        marker, reason = "interpreter", "kernels are made for the GPU here; they are interpreted where there is none"
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python, NumPy and torch before each test, so that a test's numbers do not depend on which ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Let torch.empty give NaN, so that whatever is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
