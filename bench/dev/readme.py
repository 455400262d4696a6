"""Writes the tables of the pages from bench/results: ``python -m fastmaf.bench.dev.readme``.

They stand between ``<!-- bench NAME -->`` and ``<!-- end -->`` in README.md and docs/guides/benchmarks.md. The figures
beside the CSV are drawn again, too.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

from fastmaf.bench import figures
from fastmaf.bench.labels import case_in_words, digits
from fastmaf.bench.libraries import PEERS
from fastmaf.bench.rows import Row, is_extrapolated, read
from fastmaf.bench.tables import MARKDOWN, About, by_case, markdown, median_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "guides" / "benchmarks.md")

_SUMMARY = (("sample", "1"), ("sample", "64"), ("train step", "8"), ("training memory", "8"))


def summary(rows: list[Row], about: About, detection: list[dict[str, str]]) -> str:
    """Returns the small table of README.md: fastmaf, the best other library or method, the naive or published one.

    Args:
        rows: the rows of a benchmark run.
        about: what that run was measured on.
        detection: rows with the columns of ``detection.csv``.
    """
    cases = by_case(row for row in rows if not row["sweep"])
    lines = [["", "fastmaf", "best other", "naive or published"]]
    for case in _SUMMARY:
        row_of = {row["library"]: row for row in cases.get(case, [])}
        others = [row_of[name] for name in PEERS if name in row_of]
        if "fastmaf" in row_of:
            fastmaf = row_of["fastmaf"]
            best = min(others, key=lambda row: _times(row, fastmaf), default=None)
            beside = [_beside(row, fastmaf) for row in (best, row_of.get("naive"))]
            lines.append([case_in_words(*case), f"**{median_of(fastmaf)}**", *beside])
    for found in detection:
        auroc = f"**{found['fastmaf']}** ({found['low']}–{found['high']})"
        other = f"{found['other']} ({found['other_name']})"
        lines.append([f"{found['measure']}, {found['data']}", auroc, other, found["published"]])
    machine = f"{about['processor']}, {about['torch_threads']} threads"
    versions = f"commit {about['commit']}, torch {about['torch']}, {about['date']}"
    sources = [f"{found['data']}: {found['machine']}, commit {found['commit']}, {found['date']}" for found in detection]
    return "\n".join(
        [
            markdown(lines),
            "",
            f"Times and memory: {machine}, {versions}.",
            *(f"AUROC on {source}." for source in sources),
        ]
    )


def _times(row: Row, fastmaf: Row) -> float:
    return float(row["times_fastmaf"] or float(row["median"]) / float(fastmaf["median"]))


def _beside(row: Row | None, fastmaf: Row) -> str:
    if row is None:
        return "–"
    name = "" if row["library"] == "naive" else f" ({row['library']})"
    return f"{median_of(row)}{'†' if is_extrapolated(row) else ''}, {digits(_times(row, fastmaf))}×{name}"


def rendered(text: str, tables: dict[str, str]) -> str:
    """Returns a text with its tables replaced.

    Raises:
        ValueError: a marker names none of the tables.
    """

    def table(match: re.Match[str]) -> str:
        if match[2] not in tables:
            raise ValueError(f"there is no table {match[2]!r}; expected one of {', '.join(tables)}")
        return f"{match[1]}{tables[match[2]]}\n{match[3]}"

    return re.sub(r"(<!-- bench (\w+) -->\n).*?(<!-- end -->)", table, text, flags=re.DOTALL)


def tables_of(rows: list[Row], about: About) -> dict[str, str]:
    """Returns all tables by the names of their markers."""
    with (RESULTS / "detection.csv").open(encoding="utf-8", newline="") as file:
        detection = list(csv.DictReader(file))
    return {name: table(rows, about) for name, table in MARKDOWN.items()} | {"summary": summary(rows, about, detection)}


def main() -> None:
    """Writes the tables and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS / "cpu.csv")
    path: Path = parser.parse_args().csv
    rows, about = read(path)
    for page in PAGES:
        text = rendered(page.read_text(encoding="utf-8"), tables_of(rows, about))
        page.write_text(text, encoding="utf-8", newline="\n")
    figures.write(rows, about, path.parent, path.stem)


if __name__ == "__main__":
    main()
