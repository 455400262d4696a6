"""Cases, sizes, machines and numbers in words, and the order of the libraries."""

from __future__ import annotations

from collections.abc import Iterable

from fastmaf.bench.libraries import LIBRARIES
from fastmaf.bench.rows import Row

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
# What a sweep varies.
SWEEPS = {
    "features": "D",
    "hidden_features": "units of a hidden layer",
    "blocks": "blocks",
    "levels": "levels",
    "threads": "threads",
}
_SIZE = {
    "features": "D = {}",
    "hidden_features": "hidden {}",
    "blocks": "{} blocks",
    "levels": "{} levels",
    "threads": "{} threads",
}
# The measured rates of a machine: in words, and their unit.
RATES = {
    "read_gb_per_s": ("read", "GB/s"),
    "copy_gb_per_s": ("copy", "GB/s"),
    "adam_gb_per_s": ("fused Adam", "GB/s"),
    "sgemm_gflop_per_s": ("matrix product", "GFLOP/s"),
    "write_file_gb_per_s": ("writing files", "GB/s"),
    "read_file_gb_per_s": ("reading files", "GB/s"),
}


def libraries_of(rows: Iterable[Row]) -> list[str]:
    """Returns the names of the libraries that occur, in the order of ``LIBRARIES``; unknown ones come last."""
    names = {row["library"] for row in rows}
    return [*(name for name in LIBRARIES if name in names), *sorted(names - set(LIBRARIES))]


def case_rank(case: str, batch: str) -> tuple[int, str, int]:
    """Orders cases by importance, and their batches by size."""
    names = list(_CASES)
    return names.index(case) if case in names else len(names), case, int(batch or 0)


def case_in_words(case: str, batch: str) -> str:
    """Returns the title of a case."""
    words = _CASES.get(case, f"{case}, batch {{}}" if batch else case).format(batch)
    return words.removesuffix("s") if words.endswith(" 1 samples") else words


def size_in_words(rows: Iterable[Row]) -> str:
    """Returns the size of the flow, as far as all rows have it in common."""
    rows, parts = list(rows), []
    for column, words in _SIZE.items():
        values = {row[column] for row in rows} - {""}
        if len(values) == 1:
            text = values.pop()
            words = words.removesuffix("s") if text == "1" else words
            parts.append(words.format(f"{int(text):,}" if text.isdigit() else text))
    return ", ".join(parts)


def digits(number: float) -> str:
    """Returns a number with about three significant digits."""
    if 0 < number < 0.095:
        return f"{number:.2g}"
    return f"{number:,.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def amount(number: float, unit: str) -> str:
    """Returns a time or memory with its unit."""
    if unit == "GB":
        return f"{digits(number)} GB" if number >= 0.0995 else f"{digits(1e3 * number)} MB"
    name, scale = ("s", 1.0) if number >= 1 else ("ms", 1e-3) if number >= 1e-3 else ("µs", 1e-6)
    return f"{digits(number / scale)} {name}"


def percent(fraction: float) -> str:
    """Returns a share in percent, small ones with two digits."""
    return f"{100 * fraction:.0f}%" if fraction >= 0.095 else f"{100 * fraction:.2g}%"


def machine_in_words(about: dict[str, str]) -> list[str]:
    """Returns what a run was measured on, in sentences that leave out what is unknown."""
    place = "card" if about.get("card") else "processor"
    words = {place: "on {}", "torch_threads": "with {} threads", "cache_mb": "a cache of {} MB"}
    words |= {"huge_pages": "huge pages: {}", "date": "on {}"}
    parts = [text.format(about[name]) for name, text in words.items() if about.get(name)]
    names = ("fastmaf", "commit", "torch", "python", "cuda", *LIBRARIES)
    versions = [f"{name} {about[name]}" for name in dict.fromkeys(names) if about.get(name)]
    rates = [f"{name} {digits(float(about[key]))} {unit}" for key, (name, unit) in RATES.items() if about.get(key)]
    sentences = (("Measured", parts), ("Versions:", versions), ("Rates of the machine:", rates))
    return [f"{start} {', '.join(words)}." for start, words in sentences if words]
