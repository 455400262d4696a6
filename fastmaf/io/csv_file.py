"""Tables as CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastmaf.io.atomic import written_atomically


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a CSV file atomically, in UTF-8; undecodable bytes of file names (surrogate escapes) are kept."""
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows(rows)
    with written_atomically(path) as file:
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))
