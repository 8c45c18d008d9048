"""Tests in processes of their own, side by side: kernels compile on all cores while the tests before them run.

A test marked ``apart`` is submitted when the tests are collected, and awaited when its turn comes. It takes the values
of its parametrisation, no fixtures, and may return numbers of what it covered (see ``--record`` in ``conftest.py``).
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

PROCESSES = 8
WAITING: pytest.StashKey[Future[dict[str, Any]]] = pytest.StashKey()


def run(path: str, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Run one test function, seeded as all tests are. In a worker."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(path).parent))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    test = getattr(importlib.import_module(Path(path).stem), name)
    start = time.perf_counter()
    covered = test(**values) or {}
    return covered | {"seconds": round(time.perf_counter() - start, 2)}  # the test's own, not how long it was awaited


class Apart:
    """The plugin: a pool from the end of collection to the end of the session."""

    pool: ProcessPoolExecutor | None = None

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        items = [each for each in session.items if isinstance(each, pytest.Function)]
        items = [each for each in items if each.get_closest_marker("apart") and not each.get_closest_marker("skip")]
        if session.config.option.collectonly or not items:
            return
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        most = max(1, min(PROCESSES, (os.cpu_count() or 1) // 2, len(items)))
        self.pool = ProcessPoolExecutor(most, multiprocessing.get_context("spawn"))
        for item in items:
            values = item.callspec.params if hasattr(item, "callspec") else {}
            item.stash[WAITING] = self.pool.submit(run, str(item.path), item.originalname, values)

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        if WAITING not in pyfuncitem.stash:
            return None
        pyfuncitem.user_properties.extend(pyfuncitem.stash[WAITING].result().items())
        return True

    def pytest_sessionfinish(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
