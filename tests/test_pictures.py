"""Pictures of masks: what is drawn is what the query sees."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from mask_definitions import COMBINED, RAGGED, every_example

from stattn import masks
from stattn.grid import Grid
from stattn.masks import CONSTRUCTORS, Mask, pictures

SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg: str, grid: Grid, cell: int = 8) -> dict[int, np.ndarray]:
    """Read the cells marked as seen back from a picture, by frame. Booleans [h, w]"""
    frames = {}
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        label = group.find(f"{SVG}text")
        if label is None or not (label.text or "").startswith("t = "):
            continue
        table = np.zeros((grid.h, grid.w), bool)
        path = group.find(f"{SVG}path[@class='seen']")
        for x, y, run in re.findall(r"M(\d+) (\d+)h(\d+)", "" if path is None else path.attrib["d"]):
            table[int(y) // cell, int(x) // cell : (int(x) + int(run)) // cell] = True
        frames[int((label.text or "")[4:])] = table
    return frames


def test_every_mask_is_drawn_as_it_is() -> None:
    grid = Grid(*RAGGED)
    for mask in [*COMBINED, *every_example(RAGGED)]:
        for query in ((1, 2, 3), (0, 0, 6), (2, 4, 0)):
            frames = drawn(mask.draw(grid, query), grid)
            token = np.ravel_multi_index(query, RAGGED)
            expected = mask.allowed(grid, [int(token)])[0].numpy().reshape(RAGGED)
            assert sorted(frames) == [0, 1, 2]
            assert (np.stack([frames[t] for t in range(3)]) == expected).all(), (mask, query)


def test_the_query_is_marked_in_its_frame_and_is_the_middle_by_default() -> None:
    root = ElementTree.fromstring(masks.spatial().draw((3, 5, 7)))
    (mark,) = root.findall(f".//{SVG}rect[@class='query']")
    x, y = (float(mark.attrib[axis]) + float(mark.attrib["width"]) / 2 for axis in "xy")
    assert (x // 8, y // 8) == (3, 2)
    assert "query (1, 2, 3) sees 35 of 105" in masks.spatial().draw((3, 5, 7))


def test_a_picture_names_its_mask_and_density() -> None:
    svg = masks.window(3, 3, 3).draw((3, 5, 7))
    assert "window(3, 3, 3)" in svg
    assert f"density {100 * 27 / 105:.3g} %" in svg


def test_a_long_name_is_shortened_but_kept_as_a_tip() -> None:
    mask = masks.tables(w=(tuple(range(60)), (59,) * 60))
    root = ElementTree.fromstring(mask.draw((1, 1, 60)))
    assert root.find(f"{SVG}title").text == mask.key  # type: ignore[union-attr]
    (title,) = [each for each in root.iter(f"{SVG}text") if each.find(f"{SVG}title") is not None]
    assert "".join(title.itertext()).endswith("…")


def test_of_many_frames_nine_are_drawn_and_the_query_s_is_among_them() -> None:
    for query in (0, 1, 17, 31, 32):
        svg = masks.temporal().draw((33, 2, 3), (query, 0, 0))
        frames = sorted(drawn(svg, Grid(33, 2, 3)))
        assert len(frames) == 9
        assert query in frames
        assert "9 of 33 frames" in svg
        assert np.diff(frames).max() <= 6
    assert "frames" not in masks.temporal().draw((9, 2, 3))


@pytest.mark.parametrize("before, after", [(0, 0), (1, 0), (0, 300), (7, 9)])
def test_global_tokens_are_strips(before: int, after: int) -> None:
    svg = masks.window(1, 3, 3).draw(Grid(2, 4, 5, before, after))
    ElementTree.fromstring(svg)
    for name, count in (("before", before), ("after", after)):
        assert (f"{count} global token{'s' if count > 1 else ''} {name}" in svg) == (count > 0)


@pytest.mark.parametrize(
    "query, error", [((3, 0, 0), ValueError), ((0, -1, 0), ValueError), ((0, 0), TypeError), (5, TypeError)]
)
def test_a_query_outside_the_grid_is_refused(query: object, error: type[Exception]) -> None:
    masks.full().draw((3, 5, 7), (2, 4, 6))
    with pytest.raises(error, match="query="):
        masks.full().draw((3, 5, 7), query)  # type: ignore[arg-type]


def test_the_page_shows_every_constructor_and_both_operators(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "masks.svg"
    pictures.main(["--out", str(out)])
    assert str(out) in capsys.readouterr().out
    svg = out.read_text(encoding="utf-8")
    ElementTree.fromstring(svg)
    for name in CONSTRUCTORS:
        assert f"{name}(" in svg
    for sign in (" | ", " &amp; "):
        assert sign in svg


def test_a_new_constructor_joins_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Mask:
        return Mask("nowhere()", lambda shape: [])

    monkeypatch.setitem(CONSTRUCTORS, "nowhere", masks.Constructor(nowhere, lambda shape: [nowhere()]))
    assert "nowhere()" in pictures.draw_page()


def test_the_page_in_the_documentation_is_the_one_that_is_drawn() -> None:
    page = Path(__file__).parents[1] / "docs" / "masks.svg"
    assert page.read_text(encoding="utf-8") == pictures.draw_page(), "run: python -m stattn.masks"


def test_the_page_is_drawn_by_the_module_of_the_masks(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-W", "error", "-m", "stattn.masks", "--out", str(tmp_path / "masks.svg")]
    subprocess.run(command, check=True, cwd=root)
    assert (tmp_path / "masks.svg").read_text(encoding="utf-8") == pictures.draw_page()
