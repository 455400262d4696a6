"""Descriptions, colours and markers of the libraries, and cases, sizes, machines and numbers in words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from fastmaf.bench.rows import Row


class Label(NamedTuple):
    """What a library is, and its colour and marker in every figure."""

    description: str
    colour: str
    marker: str


# The colours of Okabe and Ito and of Paul Tol, which can be distinguished with any colour vision.
LABELS = {
    "fastmaf": Label("stores only unmasked weights", "#D55E00", "o"),
    "fastmaf, no graphs": Label("fastmaf without CUDA graphs", "#A0522D", "8"),
    "fastmaf (torch)": Label("fastmaf's plain torch backend", "#E69F00", "s"),
    "fastmaf, bfloat16": Label("fastmaf with weights stored as bfloat16", "#F0C05A", "D"),
    "naive": Label("mask × weight on every pass, as most libraries do", "#444444", "v"),
    "naive, memory kept": Label("naive, with an allocator that keeps freed memory", "#6E6E6E", "d"),
    "naive, compiled": Label("naive with torch.compile", "#9A9A9A", "^"),
    "dense": Label("weights masked once, torch's fused Adam", "#0072B2", "P"),
    "dense, compiled": Label("dense with torch.compile", "#56B4E9", "X"),
    "nflows": Label("as in its documentation", "#009E73", "<"),
    "zuko": Label("as in its documentation", "#CC79A7", ">"),
    "normflows": Label("as in its documentation, reversed for one-pass densities", "#999933", "h"),
    "flowjax": Label("as in its documentation, on JAX", "#882255", "*"),
}
_CASES = {
    "train step": "Train step, batch {}",
    "epoch": "One epoch of {} images",
    "log_prob": "log_prob of {}",
    "sample": "Drawing {} samples",
    "training memory": "Memory of training, batch {}",
    "sampling memory": "Memory to draw {} samples",
    "build memory": "Memory to build the model",
    "build": "Building the model",
    "save": "Saving the model",
    "load": "Loading the model",
}
# What a sweep varies: in tables, and in a figure's title and axis.
SWEEPS = {
    "features": ("D", "features"),
    "hidden_features": ("units of a hidden layer", "units per hidden layer"),
    "blocks": ("blocks", "blocks"),
    "levels": ("levels", "levels (dependent steps of a block)"),
    "threads": ("threads", "threads"),
}
_MACHINE = (
    ("card", "on {}"),
    ("processor", "on {}"),
    ("torch_threads", "with {} threads"),
    ("huge_pages", "huge pages: {}"),
    ("date", "on {}"),
)
_UNITS = {"gb_per_s": "GB/s", "gflop_per_s": "GFLOP/s"}
_RATES = {
    "adam": "fused Adam",
    "sgemm": "matrix product",
    "write_file": "writing files",
    "read_file": "reading files",
}


def labels(rows: Iterable[Row]) -> dict[str, Label]:
    """Returns the labels of the libraries that occur, in order; unknown libraries come last."""
    names = {row["library"] for row in rows}
    unknown = sorted(names - set(LABELS))
    markers = zip(unknown, "dpHdpH" * (1 + len(unknown) // 6), strict=False)
    known = {name: label for name, label in LABELS.items() if name in names}
    return known | {name: Label("", f"C{i % 10}", marker) for i, (name, marker) in enumerate(markers)}


def case_rank(case: str, batch: str) -> tuple[int, str, int]:
    """Orders cases by importance, and their batches by size."""
    names = list(_CASES)
    return names.index(case) if case in names else len(names), case, int(batch) if batch.isdigit() else 0


def case_in_words(case: str, batch: str) -> str:
    """Returns the title of a case."""
    default = f"{case}, batch {{}}" if batch else case
    return re.sub(r"\b1 samples", "1 sample", _CASES.get(case, default).format(batch))


def size_in_words(rows: Iterable[Row], without: str = "") -> str:
    """Returns the size of the flow that all rows have in common, without the column ``without``."""
    rows, parts = list(rows), []
    for column, words in (
        ("features", "{} features"),
        ("blocks", "{} blocks"),
        ("hidden_features", "hidden layers of {}"),
        ("levels", "{} levels"),
        ("threads", "{} threads"),
    ):
        values = {row[column] for row in rows} - {""}
        if len(values) == 1 and column != without:
            text = values.pop()
            words = words.removesuffix("s") if text == "1" else words
            parts.append(words.format(f"{int(text):,}" if text.isdigit() else text.replace("x", " and ")))
    return ", ".join(parts)


def digits(number: float) -> str:
    """Returns a number with about three significant digits."""
    if 0 < number < 0.095:
        return f"{number:.2g}"
    return f"{number:,.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def amount(number: float, unit: str) -> str:
    """Returns a time or memory with its unit."""
    units = {"s": (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)), "GB": (("GB", 0.0995), ("MB", 1e-3))}.get(unit, ())
    for name, least in units:
        if number >= least or name == units[-1][0]:
            return f"{digits(number / (1.0 if name == 'GB' else least))} {name}"
    return f"{digits(number)} {unit}"


def percent(fraction: float) -> str:
    """Returns a share in percent, small ones with two digits."""
    return f"{100 * fraction:.0f} %" if fraction >= 0.095 else f"{100 * fraction:.2g} %"


def limits_of(about: dict[str, str]) -> dict[str, float]:
    """Returns the measured rates of the machine by the name of their column."""
    rates = {name: text for name, text in about.items() if name.endswith("_per_s")}
    return {name: float(text) for name, text in rates.items() if re.fullmatch(r"[\d.]+(e[+-]?\d+)?", text)}


def limit_in_words(name: str) -> str:
    """Returns what the rate of a column is the rate of."""
    short = re.sub(r"_(gb|gflop)_per_s$", "", name)
    return _RATES.get(short, short)


def machine_in_words(about: dict[str, str]) -> list[str]:
    """Returns what a run was measured on, in sentences that leave out what is unknown."""
    parts = [
        words.format(about[name])
        for name, words in _MACHINE
        if about.get(name) and not (name == "processor" and about.get("card"))
    ]
    names = ("fastmaf", "commit", "torch", "python", "cuda", *LABELS)
    versions = [f"{name} {about[name]}" for name in dict.fromkeys(names) if about.get(name)]
    rates = [
        f"{limit_in_words(name)} {digits(rate)} {_UNITS[re.sub('.*_(?=g)', '', name)]}"
        for name, rate in limits_of(about).items()
    ]
    return [
        f"{start}{', '.join(words)}."
        for start, words in (("Measured ", parts), ("Versions: ", versions), ("Rates of the machine: ", rates))
        if words
    ]
