"""The pages' measured numbers are those of the committed results files."""

import re
from pathlib import Path

import pytest

from benchmarks import pages, result_tables

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("page", pages.PAGES)
def test_the_numbers_of_a_page_are_those_of_the_results_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert pages.written(text) == text, "run python -m benchmarks.pages"


def test_every_table_stands_in_a_page():
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in pages.PAGES)
    assert sorted(found[1] for found in pages.BLOCK.findall(text)) == sorted(pages.TABLES)


def test_a_number_that_was_changed_by_hand_is_set_right():
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    number = re.search(r"\| (\d+\.\d+ ms) \|", text)
    assert number is not None
    changed = text[: number.start(1)] + "0.01 ms" + text[number.end(1) :]
    assert pages.written(changed) == text


def test_a_row_that_no_file_has_is_named():
    with pytest.raises(KeyError, match=r"h200/step\.json has no result 'step/nothing'"):
        result_tables.Run("h200/step")("step/nothing")


@pytest.mark.parametrize(
    "value, unit, text",
    [(0.0216, "ms", "21.6 us"), (9.1099, "ms", "9.11 ms"), (44.96, "ms", "45.0 ms"), (1526.6, "ms", "1527 ms")],
)
def test_values_are_shown_with_three_digits(value, unit, text):
    assert result_tables.shown(value, unit) == text
