"""The groups of images, from folders, names or a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmaf.images.decode import DataError
from fastmaf.inspection.workflow.groups import group_labels

NAMES = ["monday/part1-003.png", "monday/part2-003.png", "friday/part1-9.png"]


def test_groups_by_folder_and_by_expression() -> None:
    assert group_labels("folder", NAMES) == ["monday", "monday", "friday"]
    assert group_labels(r"part(\d+)", NAMES) == ["1", "2", "1"]
    assert group_labels(r"part\d", NAMES) == ["part1", "part2", "part1"]


def test_groups_by_table(tmp_path: Path) -> None:
    table = tmp_path / "groups.csv"
    rows = [f"{name},day {i % 2}" for i, name in enumerate(NAMES)]
    table.write_text("\ufefffile,group\n" + "\n".join(rows), "utf-8")
    assert group_labels(str(table), NAMES) == ["day 0", "day 1", "day 0"]
    with pytest.raises(DataError, match="1 image without a group: new.png"):
        group_labels(str(table), [*NAMES, "new.png"])
    table.write_text("name,group\na,b\n")
    with pytest.raises(DataError, match="expected the columns file and group; found name, group"):
        group_labels(str(table), NAMES)
    with pytest.raises(DataError, match="missing.csv"):
        group_labels(str(tmp_path / "missing.csv"), NAMES)


@pytest.mark.parametrize(
    ("by", "words"),
    [
        ("part(", "not folder, a .csv file or a regular expression"),
        ("friday", "it matches 1 of 3 names, not monday/part1-003.png, monday/part2-003.png"),
        (r"part", "at least two groups; found 'part' for all 3 images"),
    ],
)
def test_groups_that_cannot_be_are_refused(by: str, words: str) -> None:
    with pytest.raises(DataError, match="--group-by") as caught:
        group_labels(by, NAMES)
    assert words in str(caught.value)
