"""Run suites whose parts compile side by side and are then timed one at a time, each alone on the device.

    python -m benchmarks.together ops qk_norm_rope denoise patchify --results benchmarks/results/h200

On a GPU compilation takes most of a suite's time, and only the timing needs the card for itself. The benchmarks are
dealt out to processes. Each of them runs its own once untimed, on one set of tensors, waits for the others, and runs
them again as pytest would when its turn comes. The results files are those of ``pytest benchmarks/bench_<stem>.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from _pytest.runner import runtestprotocol

HERE = Path(__file__).parent
POLL = 0.05


def rehearsed(contenders: dict[str, Callable[[int], Any]], **options: Any) -> dict[str, Any]:
    """Call each contender once: what ``time_in_graph`` is in a rehearsal."""
    from stattn import results

    for call in contenders.values():
        call(0)
    return {name: results.Timing((1.0,)) for name in contenders}


class Part:
    """A plugin of pytest that runs this process's share of the items, once to compile and once to time.

    number, parts: every parts-th item from number on. folder: where processes meet. patience: seconds after which a
    process that is ready no longer waits for the others.
    """

    def __init__(self, number: int, parts: int, folder: Path, patience: float, rounds: int) -> None:
        self.number, self.parts, self.folder, self.patience, self.rounds = number, parts, folder, patience, rounds

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        import torch

        measured = torch.cuda.is_available()  # a machine measures its GPU, or its CPU
        here = [item for item in items if (item.get_closest_marker("gpu") is not None) == measured]
        items[:] = here[self.number :: self.parts]

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        from stattn import results

        started = time.monotonic()
        with (
            mock.patch.object(results, "time_in_graph", rehearsed),
            mock.patch.object(results, "copies_for", return_value=1),
            mock.patch.object(results, "write"),
        ):
            run(session.items)
        (self.folder / f"ready-{self.number}").touch()
        while len(list(self.folder.glob("ready-*"))) < self.parts and time.monotonic() - started < self.patience:
            time.sleep(POLL)
        timed = partial(results.time_in_graph, rounds=self.rounds)
        # What was compiled stays: a benchmark would forget it.
        forget = mock.patch("torch.compiler.reset")
        with self.turn(), mock.patch.object(results, "time_in_graph", timed), forget:
            run(session.items)
        return True

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the others to be done."""
        with (self.folder / "turn").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def run(items: list[pytest.Item]) -> None:
    """Run items as pytest does, which may be for the second time."""
    import torch

    for item, following in zip(items, [*items[1:], None], strict=True):
        item._initrequest()  # type: ignore[attr-defined]
        runtestprotocol(item, log=True, nextitem=following)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait(process: subprocess.Popen[bytes], until: float | None) -> int:
    """Return how a process ended; when it has not by then, end it."""
    try:
        return process.wait(None if until is None else max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def merge(parts: list[Path], stem: str, target: Path, command: str) -> None:
    """Join the results files that the parts left of a stem, if there are any."""
    found = [json.loads(path.read_text()) for part in parts if (path := part / f"{stem}.json").exists()]
    if not found:
        return
    whole = found[0] | {"command": command, "results": [each for one in found for each in one["results"]]}
    target.mkdir(parents=True, exist_ok=True)
    (target / f"{stem}.json").write_text(json.dumps(whole, indent=2) + "\n")


def main() -> int:
    """Run the suites and return how many processes saw a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stems", nargs="+", help="of the files benchmarks/bench_<stem>.py")
    parser.add_argument("--results", type=Path, default=Path("build/results"), help="folder of the results files")
    parser.add_argument("-k", default="", help="as pytest's: which benchmarks")
    parser.add_argument("--parts", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each contender")
    parser.add_argument("--patience", type=float, default=600, help="seconds to wait for processes that compile")
    parser.add_argument("--limit", type=float, help="seconds after which only what is timed by then is kept")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    files = [str(HERE / f"bench_{stem}.py") for stem in args.stems]
    options = ["-q", "-p", "no:cacheprovider", *(["-k", args.k] if args.k else [])]
    if args.part is not None:
        plugin = Part(args.part, args.parts, args.folder, args.patience, args.rounds)
        return int(pytest.main([*files, *options, "--results", str(args.folder / f"part-{args.part}")], [plugin]))
    command = shlex.join(["python", "-m", "benchmarks.together", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as folder:
        ask = [sys.executable, "-m", "benchmarks.together", *sys.argv[1:], "--parts", str(args.parts)]
        processes = []
        for number in range(args.parts):
            log = (Path(folder) / f"log-{number}").open("w")
            each = [*ask, "--part", str(number), "--folder", folder]
            processes.append(subprocess.Popen(each, stdout=log, stderr=subprocess.STDOUT, cwd=HERE.parent))
        until = None if args.limit is None else time.monotonic() + args.limit
        codes = [wait(each, until) for each in processes]
        parts = [Path(folder) / f"part-{number}" for number in range(args.parts)]
        for stem in args.stems:
            merge(parts, stem, args.results, command)
        for number, code in enumerate(codes):
            if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                print((Path(folder) / f"log-{number}").read_text()[-4000:])
    return sum(code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) for code in codes)


if __name__ == "__main__":
    sys.exit(main())
