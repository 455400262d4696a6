"""Writes the tables of README.md and docs/guides/benchmarks.md from a CSV: ``python -m fastmaf.bench.dev.readme``.

They stand between ``<!-- bench NAME -->`` and ``<!-- end -->``. The figures beside the CSV are drawn again, too.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from fastmaf.bench import figures
from fastmaf.bench.rows import Row, read
from fastmaf.bench.tables import MARKDOWN

ROOT = Path(__file__).resolve().parents[2]


def rendered(text: str, rows: list[Row], about: dict[str, str]) -> str:
    """Returns a text with its tables replaced.

    Raises:
        ValueError: a marker names none of ``MARKDOWN``.
    """

    def table(match: re.Match[str]) -> str:
        if match[2] not in MARKDOWN:
            raise ValueError(f"there is no table {match[2]!r}; expected one of {', '.join(MARKDOWN)}")
        return f"{match[1]}{MARKDOWN[match[2]](rows, about)}\n{match[3]}"

    return re.sub(r"(<!-- bench (\w+) -->\n).*?(<!-- end -->)", table, text, flags=re.DOTALL)


def main() -> None:
    """Writes the tables and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=ROOT / "bench" / "results" / "cpu.csv")
    path: Path = parser.parse_args().csv
    rows, about = read(path)
    for page in (ROOT / "README.md", ROOT / "docs" / "guides" / "benchmarks.md"):
        page.write_text(rendered(page.read_text(encoding="utf-8"), rows, about), encoding="utf-8", newline="\n")
    figures.write(rows, about, path.parent, path.stem)


if __name__ == "__main__":
    main()
