"""What every test gets: the same seeds, and a reason in place of a GPU test where there is no GPU."""

import os
import random

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel file is imported: Triton reads it once for each kernel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python, NumPy and torch before each test, so that a test's numbers do not depend on which ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0
