"""Groups of images that were taken together, from folders, file names or a table."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from fastmaf.images.decode import DataError
from fastmaf.io.regular import open_regular
from fastmaf.io.wording import count, some

FOLDER = "folder"


def group_labels(by: str, names: Sequence[str]) -> list[str]:
    """Returns the group of each image.

    Args:
        by: ``"folder"``, for the folder of each image; the path of a ``.csv`` file, whose columns ``file`` and
            ``group`` give the group of every image; or a regular expression that is searched in every name: its first
            group, or all that it matches if it has none, is the label.
        names: of the images within the folder of good images, with "/": "003.png", "monday/003.png".

    Raises:
        DataError: an image has no group, there are fewer than two groups, or the table or expression is invalid.
    """
    if by == FOLDER:
        labels = [str(PurePosixPath(name).parent) for name in names]
    elif by.lower().endswith(".csv"):
        labels = _of_table(Path(by), names)
    else:
        labels = _of_pattern(by, names)
    if len(set(labels)) < 2:
        raise DataError(
            f"--group-by {by}: expected at least two groups; found {labels[0]!r} for all {len(names)} images"
        )
    return labels


def _of_table(path: Path, names: Sequence[str]) -> list[str]:
    try:
        with open_regular(path) as file:
            rows = list(csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--group-by {path}: {error}") from error
    if not rows or not {"file", "group"} <= set(rows[0]):
        found = ", ".join(name for name in rows[0] if name) if rows else "no row"  # cells beyond the header have None
        raise DataError(f"--group-by {path}: expected the columns file and group; found {found}")
    groups = {row["file"]: row["group"] for row in rows}
    missing = [name for name in names if not groups.get(name)]
    if missing:
        raise DataError(f"--group-by {path}: {count(len(missing), 'image')} without a group: {some(missing)}")
    return [groups[name] for name in names]


def _of_pattern(by: str, names: Sequence[str]) -> list[str]:
    try:
        pattern = re.compile(by)
    except re.error as error:
        raise DataError(f"--group-by {by}: not {FOLDER}, a .csv file or a regular expression: {error}") from error
    matches = [pattern.search(name) for name in names]
    missing = [name for name, match in zip(names, matches, strict=True) if match is None]
    if missing:
        raise DataError(
            f"--group-by {by}: it matches {len(names) - len(missing)} of {len(names)} names, not {some(missing)}"
        )
    return [match[1 if pattern.groups else 0] or "" for match in matches if match is not None]
