"""Where benchmarks leave their results: one file per stem, in the schema of ``stattn.results``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stattn import results

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", default="build/results", help="folder of the results files, one per stem")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cuda":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def device() -> str:
    """The device that is measured: the GPU where there is one."""
    return DEVICE


@pytest.fixture(scope="module")
def report() -> results.Report:
    """Collect the module's results; they are written after each benchmark that added some."""
    return results.new_report(shlex.join(["python", "-m", "pytest", *sys.argv[1:]]), DEVICE)


@pytest.fixture(autouse=True)
def kept(request: pytest.FixtureRequest) -> Iterator[None]:
    """Write what has been measured so far, so that a run that is cut short loses one benchmark."""
    found = request.getfixturevalue("report") if "report" in request.fixturenames else None
    yield
    if found and found.results:
        stem = Path(request.module.__file__).stem.removeprefix("bench_")
        results.write(Path(request.config.getoption("--results")) / f"{stem}.json", found)
