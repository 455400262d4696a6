"""What figures and tables of the benchmark share: words for cases, sides, sizes and machines, colours, and numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from fastmaf.bench.rows import Row, digits, seconds

SIDES_IN_WORDS = {
    "fastmaf": "this library: stores only weights that masks let through",
    "fastmaf, no graphs": "fastmaf without CUDA graphs",
    "fastmaf (reference)": "fastmaf's plain torch backend",
    "fastmaf, bfloat16": "fastmaf with its weights kept in bfloat16",
    "naive": "mask × weight on every pass, as libraries do it",
    "naive, memory kept": "naive, its allocator told to keep freed memory",
    "naive, compiled": "naive through torch.compile",
    "dense": "weights masked once, torch's fused Adam",
    "dense, compiled": "dense through torch.compile",
    "nflows": "that library, as its users run it",
    "zuko": "that library, as its users run it",
    "normflows": "that library, turned round for one-pass densities",
    "flowjax": "that library on JAX, as its users run it",
}


class Style(NamedTuple):
    """How a side looks in every figure."""

    colour: str
    marker: str


# Okabe and Ito's and Paul Tol's colours, told apart with any colour vision. Fastmaf's own are the warm ones.
_STYLES = {
    "fastmaf": Style("#D55E00", "o"),
    "fastmaf, no graphs": Style("#A0522D", "8"),
    "fastmaf (reference)": Style("#E69F00", "s"),
    "fastmaf, bfloat16": Style("#F0C05A", "D"),
    "naive": Style("#444444", "v"),
    "naive, memory kept": Style("#6E6E6E", "1"),
    "naive, compiled": Style("#9A9A9A", "^"),
    "dense": Style("#0072B2", "P"),
    "dense, compiled": Style("#56B4E9", "X"),
    "nflows": Style("#009E73", "<"),
    "zuko": Style("#CC79A7", ">"),
    "normflows": Style("#999933", "h"),
    "flowjax": Style("#882255", "*"),
}
_FURTHER = (
    Style("#332288", "d"),
    Style("#117733", "p"),
    Style("#AA4499", "H"),
    Style("#661100", "d"),
    Style("#6699CC", "p"),
    Style("#44AA99", "H"),
)
_RATES = ("_gb_per_s", "_gflop_per_s")
_CASES = (
    "train step",
    "epoch",
    "log_prob",
    "sample",
    "training memory",
    "sampling memory",
    "build memory",
    "build",
    "save",
    "load",
)
_ALONE = {
    "build memory": "Memory to build the model",
    "epoch": "One epoch of training",
    "build": "Building the model",
    "save": "Saving the model",
    "load": "Loading the model",
}


def styles(rows: Iterable[Row]) -> dict[str, Style]:
    """Returns the look of every side that occurs, fastmaf first; unknown sides get further colours, in turn."""
    sides = {row["side"] for row in rows}
    unknown = sorted(sides - set(_STYLES))
    known = {side: style for side, style in _STYLES.items() if side in sides}
    return known | {side: _FURTHER[i % len(_FURTHER)] for i, side in enumerate(unknown)}


def is_fastmaf(side: str) -> bool:
    """Whether a side is fastmaf or a way of running it."""
    return side.startswith("fastmaf")


def value(row: Row, column: str) -> float | None:
    """Returns a number of a row, None where it holds none."""
    try:
        return float(row[column])
    except ValueError:
        return None


def is_extrapolated(row: Row) -> bool:
    """Whether only a part was run, and the whole reckoned from it."""
    return "extrapolated" in row["note"]


def case_rank(case: str, batch: str) -> tuple[int, str, int]:
    """Orders cases as a reader meets them, and their batches by size."""
    return _CASES.index(case) if case in _CASES else len(_CASES), case, int(batch) if batch.isdigit() else 0


def case_in_words(case: str, batch: str) -> str:
    """Returns what was measured, as a title."""
    samples = "1 sample" if batch == "1" else f"{batch} samples"
    if case == "sample":
        return f"Drawing {samples}"
    if case == "sampling memory":
        return f"Memory to draw {samples}"
    if case == "log_prob":
        return f"log_prob of {batch}"
    if case == "epoch" and batch:
        return f"One epoch of {batch} images"
    named = {"train step": "Train step", "training memory": "Memory of training"} | _ALONE
    return named.get(case, case) + (f", batch {batch}" if batch and case not in _ALONE else "")


def size_in_words(rows: Iterable[Row], but: str = "") -> str:
    """Returns the size of the flow that all the rows share, without the column ``but``."""
    words = {
        "features": "{} features",
        "blocks": "{} blocks",
        "hidden_features": "hidden layers of {}",
        "levels": "{} levels",
        "threads": "{} threads",
    }
    rows, parts = list(rows), []
    for column, word in words.items():
        found = {row[column] for row in rows} - {""}
        if len(found) == 1 and column != but:
            text = found.pop()
            text = f"{int(text):,}" if text.isdigit() else text.replace("x", " and ")
            parts.append((word.removesuffix("s") if text == "1" else word).format(text))
    return ", ".join(parts)


def number(value: float) -> str:
    """Returns a number with three digits that count."""
    return digits(float(f"{value:.3g}")) if value >= 0.095 else f"{value:.2g}"


def amount(value: float, unit: str) -> str:
    """Returns a time, or the memory, in words."""
    if unit == "GB":
        return f"{number(value)} GB" if value >= 0.0995 else f"{number(1e3 * value)} MB"
    return seconds(value) if unit == "s" else f"{number(value)} {unit}"


def percent(fraction: float) -> str:
    """Returns a share in percent, small ones with two digits."""
    return f"{100 * fraction:.0f} %" if fraction >= 0.095 else f"{100 * fraction:.2g} %"


def limits_of(about: dict[str, str]) -> dict[str, float]:
    """Returns the rates that nothing on the machine can beat, by their column."""
    found = {}
    for name, text in about.items():
        if name.endswith(_RATES) and re.fullmatch(r"[\d.]+(e[+-]?\d+)?", text):
            found[name] = float(text)
    return found


def machine_in_words(about: dict[str, str]) -> list[str]:
    """Returns what a run was measured on and with, in sentences; what is not known is left out."""
    threads = about.get("torch_threads", "")
    where = about.get("card") or about.get("processor")
    parts = [f"on {where}" if where else "", f"with {threads} thread{'s' * (threads != '1')}" if threads else ""]
    parts.append(f"on {about['date']}" if about.get("date") else "")
    versions = [f"{name} {about[name]}" for name in ("fastmaf", "torch", "python", "cuda") if about.get(name)]
    versions += [f"commit {about['commit']}"] if about.get("commit") else []
    versions += [f"{name} {about[name]}" for name in SIDES_IN_WORDS if name != "fastmaf" and about.get(name)]
    said = ["Measured " + ", ".join(filter(None, parts)) + "."] if any(parts) else []
    said += [f"Versions: {', '.join(versions)}."] if versions else []
    if rates := limits_of(about):
        units = {name: "GB/s" if name.endswith(_RATES[0]) else "GFLOP/s" for name in rates}
        named = [f"{limit_in_words(name)} {number(rate)} {units[name]}" for name, rate in rates.items()]
        said.append(f"Limits of the machine, measured in the same run: {', '.join(named)}.")
    return said


def limit_in_words(name: str) -> str:
    """Returns what the rate of a column is of."""
    short = name.removesuffix(_RATES[0]).removesuffix(_RATES[1])
    named = {
        "adam": "fused Adam",
        "sgemm": "matrix product",
        "write_file": "writing files",
        "read_file": "reading files",
    }
    return named.get(short, short)
