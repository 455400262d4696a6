"""The libraries that the benchmark compares: one adapter per file, and the registry ``LIBRARIES``."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from fastmaf.bench.libraries.base import Library, Size

__all__ = ["LIBRARIES", "Entry", "Library", "Size", "library_class"]


class Entry(NamedTuple):
    """Where the adapter of a library is defined, and what it needs.

    Attributes:
        module: name of the module, absolute or relative to this package.
        name: of the class.
        package: to be installed besides fastmaf.
        weight_bytes: size of a stored weight.
        device: the only device that it supports; None for all.
        environment: variables of its process.
    """

    module: str
    name: str
    package: str | None = None
    weight_bytes: int = 4
    device: str | None = None
    environment: tuple[tuple[str, str], ...] = ()


# glibc returns blocks of many MB to the system when they are freed and obtains new, zeroed pages for the next ones;
# libraries that compute mask × weight on each pass spend part of their time on that.
KEEP_MEMORY = (("MALLOC_MMAP_THRESHOLD_", str(2**30)), ("MALLOC_TRIM_THRESHOLD_", str(2**33)))

LIBRARIES = {
    "fastmaf": Entry(".fastmaf_side", "Fastmaf"),
    "fastmaf, no graphs": Entry(".fastmaf_side", "NoGraphs", device="cuda"),
    "fastmaf (torch)": Entry(".fastmaf_side", "TorchBackend"),
    "fastmaf, bfloat16": Entry(".fastmaf_side", "BFloat16", weight_bytes=2),
    "naive": Entry(".dense", "Naive"),
    "naive, memory kept": Entry(".dense", "Naive", environment=KEEP_MEMORY),
    "naive, compiled": Entry(".dense", "NaiveCompiled"),
    "dense": Entry(".dense", "Dense"),
    "dense, compiled": Entry(".dense", "DenseCompiled"),
    "nflows": Entry(".nflows_side", "Nflows", "nflows"),
    "zuko": Entry(".zuko_side", "Zuko", "zuko"),
    "normflows": Entry(".normflows_side", "Normflows", "normflows"),
    "flowjax": Entry(".flowjax_side", "Flowjax", "flowjax", device="cpu"),
}


def library_class(entry: Entry) -> type[Library]:
    """Imports the adapter of a library, and with it the library.

    Raises:
        ImportError: the library is not installed.
    """
    try:
        module = importlib.import_module(entry.module, __name__)
    except ModuleNotFoundError as error:
        if entry.package is None:
            raise
        raise ImportError(f"{entry.package} is not installed ({error}); run pip install 'fastmaf[bench]'") from error
    return getattr(module, entry.name)
