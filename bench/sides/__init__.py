"""The sides of a benchmark: the ways of running a masked autoregressive flow, one file per library."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from fastmaf.bench.sides.side import Side, Size

__all__ = ["SIDES", "Entry", "Side", "Size", "side_class"]


class Entry(NamedTuple):
    """Where a side is defined, which package it needs beside fastmaf's own, the bytes that its weights take, the
    only device that it is for, and variables of its process's environment.
    """

    module: str
    name: str
    package: str | None = None
    weight_bytes: int = 4
    device: str | None = None
    environment: tuple[tuple[str, str], ...] = ()


# glibc hands blocks of many MB back to the system when they are freed, and takes new pages, zeroed by the system, for
# the next ones; libraries that multiply mask × weight on each pass spend a part of their time on that.
KEEP_MEMORY = (("MALLOC_MMAP_THRESHOLD_", str(2**30)), ("MALLOC_TRIM_THRESHOLD_", str(2**33)))

SIDES = {
    "fastmaf": Entry("own", "Fastmaf"),
    "fastmaf, no graphs": Entry("own", "NoGraphs", device="cuda"),
    "fastmaf (reference)": Entry("own", "Reference"),
    "fastmaf, bfloat16": Entry("own", "BFloat16", weight_bytes=2),
    "naive": Entry("dense", "Naive"),
    "naive, memory kept": Entry("dense", "NaiveKept", environment=KEEP_MEMORY),
    "naive, compiled": Entry("dense", "NaiveCompiled"),
    "dense": Entry("dense", "Dense"),
    "dense, compiled": Entry("dense", "DenseCompiled"),
    "nflows": Entry("nflows_side", "Nflows", "nflows"),
    "zuko": Entry("zuko_side", "Zuko", "zuko"),
    "normflows": Entry("normflows_side", "Normflows", "normflows"),
    "flowjax": Entry("flowjax_side", "Flowjax", "flowjax", device="cpu"),
}


def side_class(name: str) -> type[Side]:
    """Returns the class of a side; importing it imports its library.

    Raises:
        ImportError: the library is not installed.
    """
    entry = SIDES[name]
    try:
        module = importlib.import_module(f"fastmaf.bench.sides.{entry.module}")
    except ModuleNotFoundError as error:
        if entry.package is None:
            raise
        raise ImportError(
            f"{entry.package} is not installed ({error}); pip install 'fastmaf[bench]' brings it"
        ) from error
    found: type[Side] = getattr(module, entry.name)
    return found
