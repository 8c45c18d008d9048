"""Bugs planted in the CUDA kernels, one at a time, in copies of the tree: the tests named beside them turn red.

    python -m pytest -m gpu tests/test_planted_bugs_cuda.py --record FILE

It takes a Hopper GPU, and nvcc and ninja: each copy is built anew. What the kernels' host side does in Python is the
matter of ``planted_bugs.py``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import planted_bugs
import pytest
from bugs import Bug
from planted_bugs import ROOT
from test_attention_cuda import HOPPER

COPIED = (*planted_bugs.COPIED, "csrc", "setup.py")
AT_ONCE = 6  # copies that are built and tested
LONGEST = 120  # seconds of a run: a kernel that stands still is no failing test
RESULTS = "tests/test_attention_cuda.py::TestOnHopper::"
EDGES = RESULTS + "test_dense_attention_is_right_around_every_tile_edge[64-dtype0]"
VIEWS = RESULTS + "test_views_batches_and_grouped_heads_are_read_where_they_lie[64]"
MASKS = RESULTS + "test_every_planned_mask_is_right[64-shape1]"
TEXT = RESULTS + "test_global_tokens_are_right_beside_every_kind_of_mask[64]"
PROOF = "tests/test_attention_cuda_proof.py::"
BUGS = (
    Bug(
        "launched-on-the-legacy-stream",
        "csrc/attention_fwd.cu",
        "S::THREADS, launch.shared, stream>>>(p);",
        "S::THREADS, launch.shared>>>(p);",
        (RESULTS + "test_a_captured_call_follows_its_inputs_on_any_stream",),
    ),
    Bug(
        "queries-not-waited-for",
        "csrc/attention_fwd.cuh",
        "        barrier_wait(S::full_q(barriers, at.group), q_parity);\n",
        "",
        (VIEWS,),
    ),
    Bug(
        "keys-behind-the-last-one-seen",
        "csrc/attention_fwd.cuh",
        "if (ragged) mask_end(scores, ragged);\n",
        "if (ragged) mask_end(scores, ragged + 1);\n",
        (EDGES,),
    ),
    Bug(
        "output-of-before-not-rescaled",
        "csrc/attention_fwd.cuh",
        "    if (__any_sync(0xFFFFFFFF, moved)) rescale(out, factor);\n",
        "    if (__all_sync(0xFFFFFFFF, moved)) rescale(out, factor);\n",
        (EDGES,),
    ),
    Bug(
        "first-masked-box-seen-whole",
        "csrc/attention_fwd.cuh",
        "    if constexpr (MASKED) mask.apply(scores);\n    if constexpr (!S::PLANNED) {",
        "    if constexpr (!S::PLANNED) {",
        (MASKS,),
    ),
    Bug(
        "grouped-heads-taken-in-turn",
        "csrc/attention_fwd.cuh",
        "const int head = tile.head / p.queries_per_key;",
        "const int head = tile.head % (p.heads / p.queries_per_key);",
        (VIEWS,),
    ),
    Bug(
        "unreal-tokens-keep-their-values",
        "csrc/attention_fwd.cuh",
        "if (record.w > 0) clear_unreal<S>(at, shared + S::V_AT, turn.before(), record.w - 1);\n",
        "",
        (PROOF + "test_nothing_outside_the_tensors_is_read_or_written",),
    ),
    Bug(
        "lse-with-the-wrong-sign",
        "csrc/attention_store.cuh",
        "token[half]] = lse[half] * LN_2;",
        "token[half]] = -lse[half] * LN_2;",
        (EDGES,),
    ),
    Bug(
        "first-piece-merges-what-is-not-there",
        "csrc/attention_store.cuh",
        "atomicAdd(arrived, 1) == pieces.y - 1)",
        "atomicAdd(arrived, 1) == 0)",
        (RESULTS + "test_few_rows_of_many_keys_are_right[64]",),
    ),
    Bug(
        "scale-skipped",
        "csrc/attention_launch.h",
        "p.scale_log2 = call.scale * 1.4426950408889634f;",
        "p.scale_log2 = 1.4426950408889634f;",
        (EDGES,),
    ),
    Bug(
        "h-and-w-swapped-in-rows",
        "csrc/attention_tile.cuh",
        "h = corner.h + row / p.slab[2] % p.slab[1] * p.steps[1];",
        "h = corner.h + row / p.slab[1] % p.slab[2] * p.steps[1];",
        (MASKS,),
    ),
    Bug(
        "global-keys-of-another-sample",
        "csrc/attention_tile.cuh",
        "p.valid + int64_t{tile_at<S>(p, blockIdx.x).batch} * p.globals;",
        "p.valid;",
        (TEXT,),
    ),
    Bug(
        "frames-taken-for-slots",
        "csrc/attention_frames.cuh",
        "if (keep && box.w == 0) box.x = slot_of[box.x];\n",
        "",
        (PROOF + "test_calls_with_more_than_a_mask_see_what_they_should[rings-64]",),
    ),
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_every_bug_of_the_kernels_finds_its_place_once_and_names_tests_that_exist(bug: Bug) -> None:
    planted_bugs.planted(bug)
    for test in bug.tests:
        path, *_, name = test.split("[")[0].split("::")
        assert re.search(rf"^ *def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), test


def build(tree: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=os.environ | {"STATTN_CUDA": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def run(tests: Sequence[str], tree: Path) -> int:
    """Run tests in a copy of the tree, in a process of their own. Returns how pytest ended: 1 says that some failed."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, check=False, timeout=LONGEST)
    return done.returncode


def plant(bug: Bug, healthy: Path, tree: Path) -> int:
    shutil.copytree(healthy, tree, symlinks=True)  # with its times: little is compiled again
    (tree / bug.path).write_text(planted_bugs.planted(bug), encoding="utf-8")
    build(tree)
    return run(bug.tests, tree)


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[int]]]:
    """How the tests of each bug end, as that comes to be known; "" stands for all of them where there is no bug."""
    folder = tmp_path_factory.mktemp("planted")
    healthy = folder / "healthy"
    healthy.mkdir()
    planted_bugs.copy_tree(healthy, COPIED)
    build(healthy)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tests = sorted({test for bug in BUGS for test in bug.tests})
        found = {"": pool.submit(run, tests, healthy)}
        found |= {bug.name: pool.submit(plant, bug, healthy, folder / bug.name) for bug in BUGS}
        yield found
        pool.shutdown(cancel_futures=True)


class TestOnHopper:
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.slow,
        pytest.mark.skipif(not HOPPER or shutil.which("nvcc") is None, reason="no Hopper GPU, or no nvcc"),
    ]

    def test_without_a_bug_the_tests_pass(self, verdicts: dict[str, Future[int]]) -> None:
        assert verdicts[""].result() == 0

    @pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
    def test_a_bug_in_the_kernels_turns_its_tests_red(self, bug: Bug, verdicts: dict[str, Future[int]]) -> None:
        assert verdicts[bug.name].result() == 1
