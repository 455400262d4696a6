"""Rows of a benchmark, made up: single ones, and a whole run that looks like a real one."""

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
# of a pass, of a train step, of building and of memory, as multiples of fastmaf's
SIDES = {
    "fastmaf": (1.0, 1.0, 1.0, 1.0),
    "fastmaf (reference)": (2.1, 1.6, 1.0, 1.05),
    "fastmaf, bfloat16": (0.62, 0.0, 1.4, 0.0),
    "naive": (8.7, 8.1, 9.1, 3.9),
    "naive, compiled": (7.9, 5.2, 9.2, 3.1),
    "dense": (2.0, 3.3, 9.4, 2.1),
    "dense, compiled": (1.9, 3.1, 9.5, 2.1),
    "nflows": (17.0, 11.0, 12.0, 3.6),
    "zuko": (14.0, 8.0, 1500.0, 3.9),
    "normflows": (18.0, 11.5, 12.3, 3.7),
    "flowjax": (6.0, 4.4, 30.0, 2.9),
}
SWEEPS = {
    "features": ("768", "3072", "12288", "49152"),
    "hidden_features": ("128x128", "256x256", "512x512", "1024x1024", "2048x2048", "4096x4096"),
    "blocks": ("1", "2", "5", "10", "20"),
    "levels": ("16", "32", "64", "128", "256", "512"),
    "threads": ("1", "2"),
}


def made(case: str, batch: str, side: str, median: float, limit: float | None = None, **others: str) -> Row:
    """Returns a row of a case, whose percentiles lie five percent around its median."""
    row = dict.fromkeys(COLUMNS, "")
    row |= {"case": case, "batch": batch, "side": side, "unit": "s", "repeats": "9"}
    row |= {"features": "12288", "hidden_features": "512x512", "blocks": "7", "threads": "2"}
    row |= {"median": f"{median:.6g}", "p20": f"{0.95 * median:.6g}", "p80": f"{1.05 * median:.6g}"}
    if limit is not None:
        row |= {"limit": f"{limit:.6g}", "fraction_of_limit": f"{limit / median:.4g}", "must_move": "268 MB"}
    return row | others


def compared(rows: list[Row]) -> list[Row]:
    """Fills in how many times longer than fastmaf each row of one case took."""
    own = {row["batch"]: float(row["median"]) for row in rows if row["side"] == "fastmaf"}
    return [row | {"times_fastmaf": f"{float(row['median']) / own[row['batch']]:.4g}"} for row in rows]


def case(name: str, batch: str, **size: str) -> list[Row]:
    """Returns the rows of all sides that are measured in a case."""
    full = {"features": "12288", "hidden_features": "512x512", "blocks": "7", "levels": "", "threads": "2"} | size
    features, hidden = int(full["features"]), int(full["hidden_features"].split("x")[0])
    levels, blocks = int(full["levels"] or hidden), int(full["blocks"])
    gb = 4e-9 * blocks * (1.5 * features * hidden + hidden**2)
    cores, many = int(full["threads"]), int(batch or 1)
    found = []
    for side, (one, train, build, held) in SIDES.items():
        unit, note, limit, own = "s", "", gb / 34, side.startswith("fastmaf")
        if name == "log_prob":
            factor, median = one, gb / 22 * 3 / (1 + cores) * (1 + many / 30) + 3e-4 * blocks
        elif name in ("train step", "epoch"):
            steps, rows = (1.0, many) if name == "train step" else (many / 8, 8)
            limit = steps * 7 * gb / 46
            factor, median = train, steps * (gb / 3 * (1 + rows / 60) * 3 / (1 + cores) + 2e-3)
        elif name == "sample":
            factor, median = one, gb / 20 * (1 + many / 40) + 2e-5 * levels * blocks
            if not own:
                median, note = 0.7 * features * (gb / 34 + 1e-4), "extrapolated: 17 of 86016 passes"
        elif name.endswith("memory"):
            unit, limit = "GB", 3 * gb if name == "training memory" else gb
            factor, median = held, 1.3 * limit + 0.2
        else:
            factor, median = build, gb / 2 + 0.01
        if factor and not ("compiled" in side and name not in ("log_prob", "train step", "training memory")):
            found.append(made(name, batch, side, factor * median, limit, **{"unit": unit, "note": note} | full))
    return compared(found)


def run() -> Iterator[Row]:
    """Yields the rows of every case and sweep."""
    batches = {"train step": ("8", "64"), "epoch": ("219",), "log_prob": ("1", "8", "64"), "sample": ("1", "5", "64")}
    batches |= {"training memory": ("8",), "sampling memory": ("5",), "build": ("",), "save": ("",), "load": ("",)}
    for name, sizes in batches.items():
        for batch in sizes:
            yield from case(name, batch)
    for sweep, values in SWEEPS.items():
        for value in values:
            for name, batch in (("log_prob", "8"), ("train step", "8"), ("sample", "1"), ("training memory", "8")):
                yield from case(name, batch, sweep=sweep, **{sweep: value})
            yield from case("sampling memory", "5", sweep=sweep, **{sweep: value})


def odd_rows() -> list[Row]:
    """Few sides, unknown ones, the smallest and largest ratios, and rows that lack what they may lack."""
    sample = [
        made("sample", "1", "fastmaf", 0.02, 0.008),
        made("sample", "1", "naive", 20000, note="extrapolated: 17 of 86016 passes"),
        made("sample", "1", "dense, compiled", 0.006, 0.008),
        made("sample", "1", "a library of a long name", 1.0),
        made("sample", "1", "another", 0.02),
    ]
    other = [made("log_prob", "8", "fastmaf", 0.01, 0.008), made("log_prob", "8", "dense", 0.003, 0.008)]
    alone = [made("save", "", "fastmaf", 0.2, p20="", p80=""), made("an unknown case", "3", "fastmaf", 0.2, 0.1)]
    held = [made("training memory", "8", "fastmaf", 0.012, unit="GB")]
    levels = [made("sample", "1", "fastmaf", 0.02, 0.008, sweep="levels")]
    return [*compared(sample), *compared(other), *alone, *held, *levels]
