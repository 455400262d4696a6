"""Invented rows of a benchmark: single ones, and a whole run."""

from __future__ import annotations

from collections.abc import Iterator

from fastmaf.bench.rows import COLUMNS, Row

ABOUT = {
    "date": "2026-01-31",
    "commit": "abc1234",
    "processor": "Some Processor 1234 (family 25, model 1), 2 cores",
    "torch_threads": "2",
    "fastmaf": "0.1.0",
    "torch": "2.7.1",
    "python": "3.11.7",
    "nflows": "0.14",
    "zuko": "1.6.0",
    "read_gb_per_s": "34.1",
    "copy_gb_per_s": "28.2",
    "adam_gb_per_s": "46",
    "sgemm_gflop_per_s": "350",
    "write_file_gb_per_s": "1.2",
    "read_file_gb_per_s": "5.9",
}
MULTIPLES = {"fastmaf": 1.0, "fastmaf (torch)": 2.0, "naive": 8.0, "nflows": 16.0}  # of fastmaf's time
SWEPT = {"features": ("768", "3072", "12288"), "levels": ("16", "64", ""), "threads": ("1", "2")}
CASES = (("log_prob", "1"), ("log_prob", "8"), ("train step", "8"), ("sample", "1"), ("training memory", "8"))


def row(case: str, batch: str, library: str, median: float, limit: float | None = None, **others: str) -> Row:
    """Returns a row whose percentiles are five percent around its median."""
    columns = dict.fromkeys(COLUMNS, "")
    columns |= {"case": case, "batch": batch, "library": library, "unit": "s", "repeats": "9"}
    columns |= {"features": "12288", "hidden_features": "512x512", "blocks": "7", "threads": "2", "error": "1.1e-07"}
    columns |= {"median": f"{median:.6g}", "p20": f"{0.95 * median:.6g}", "p80": f"{1.05 * median:.6g}"}
    if limit is not None:
        columns |= {"limit": f"{limit:.6g}", "fraction_of_limit": f"{limit / median:.4g}", "must_move": "268 MB"}
    return columns | others


def example_run() -> Iterator[Row]:
    """Yields the rows of some cases and sweeps; times and memory grow with D."""
    sizes = [{"sweep": ""}, *({"sweep": name, name: value} for name, values in SWEPT.items() for value in values)]
    for size in sizes:
        scale = float(size.get("features", "12288")) / 12_288
        for case, batch in CASES:
            for library, multiple in MULTIPLES.items():
                others = {"unit": "GB"} if case.endswith("memory") else {"times_fastmaf": f"{multiple:g}"}
                if case == "sample" and not library.startswith("fastmaf"):
                    others["note"] = "extrapolated: 17 of 86,016 passes"
                yield row(case, batch, library, 0.25 * multiple * scale, 0.125 * scale, **others, **size)
