"""The script of planted bugs: every bug still finds its place, and some are planted to see a test turn red.

``python tests/planted_bugs.py`` plants all of them.
"""

from __future__ import annotations

import re
from pathlib import Path

import planted_bugs
import pytest
from bugs import BUGS, Bug
from planted_bugs import ROOT


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_every_bug_finds_its_place_once_and_names_tests_that_exist(bug: Bug) -> None:
    text = planted_bugs.planted(bug)
    assert text != (ROOT / bug.path).read_text(encoding="utf-8")
    compile(text, bug.path, "exec")
    for test in bug.tests:
        path, name = test.split("[")[0].split("::")
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), test


def test_bugs_have_names_of_their_own() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS)


@pytest.mark.parametrize("old, found", [("no such text", "found 0 times"), ("import ", "found [2-9] times")])
def test_a_bug_whose_place_is_lost_or_not_the_only_one_is_refused(old: str, found: str) -> None:
    with pytest.raises(ValueError, match=f"{found} in stattn/problem.py"):
        planted_bugs.planted(Bug("lost", "stattn/problem.py", old, "", ()))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    planted_bugs.copy_tree(folder)
    return folder


@pytest.mark.parametrize(
    "name", ["causal-window-sees-the-next-key", "lse-with-the-wrong-sign", "known-region-blended-the-wrong-way"]
)
def test_a_planted_bug_turns_its_test_red_and_the_tree_is_healed(name: str, tree: Path) -> None:
    (bug,) = [bug for bug in BUGS if bug.name == name]
    assert planted_bugs.check(bug, tree) is None
    assert (tree / bug.path).read_bytes() == (ROOT / bug.path).read_bytes()


def test_a_harmless_change_is_told_from_a_bug(tree: Path) -> None:
    (bug,) = [bug for bug in BUGS if bug.name == "causal-window-sees-the-next-key"]
    assert (
        planted_bugs.check(bug._replace(new=bug.old.replace("first, last", "first, last ")), tree)
        == "its tests stay green"
    )
    message = planted_bugs.check(bug._replace(tests=("tests/test_masks.py::test_of_nothing",)), tree)
    assert message is not None
    assert message.startswith("its tests did not run")
