"""The libraries that the benchmark compares: one adapter per file, and the registry ``LIBRARIES``."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from fastmaf.bench.libraries.base import Library, Size

__all__ = ["LIBRARIES", "PEERS", "Entry", "Library", "Size", "library_class"]


class Entry(NamedTuple):
    """Where the adapter of a library is defined, how it is shown, and what it needs."""

    module: str  # absolute or relative to this package
    name: str  # of the class
    description: str
    colour: str
    package: str | None = None  # to be installed besides fastmaf
    weight_bytes: int = 4  # of a stored weight
    device: str | None = None  # the only one that it supports
    environment: tuple[tuple[str, str], ...] = ()  # variables of its process


# glibc returns blocks of many MB to the system when they are freed and obtains new, zeroed pages for the next ones;
# libraries that compute mask × weight on each pass spend part of their time on that.
KEEP_MEMORY = (("MALLOC_MMAP_THRESHOLD_", str(2**30)), ("MALLOC_TRIM_THRESHOLD_", str(2**33)))
DOCUMENTED = "as in its documentation"

# The colours of Okabe and Ito and of Paul Tol, which can be distinguished with any colour vision.
LIBRARIES = {
    "fastmaf": Entry(".fastmaf_side", "Fastmaf", "stores only unmasked weights", "#D55E00"),
    "fastmaf, no graphs": Entry(".fastmaf_side", "NoGraphs", "without CUDA graphs", "#A0522D", device="cuda"),
    "fastmaf (torch)": Entry(".fastmaf_side", "TorchBackend", "fastmaf's plain torch backend", "#E69F00"),
    "fastmaf, bfloat16": Entry(".fastmaf_side", "BFloat16", "weights stored as bfloat16", "#F0C05A", weight_bytes=2),
    "naive": Entry(".dense", "Naive", "mask × weight on every pass, as most libraries do", "#444444"),
    "naive, memory kept": Entry(
        ".dense", "Naive", "with an allocator that keeps freed memory", "#6E6E6E", environment=KEEP_MEMORY
    ),
    "naive, compiled": Entry(".dense", "NaiveCompiled", "with torch.compile", "#9A9A9A"),
    "dense": Entry(".dense", "Dense", "weights masked once, torch's fused Adam", "#0072B2"),
    "dense, compiled": Entry(".dense", "DenseCompiled", "with torch.compile", "#56B4E9"),
    "nflows": Entry(".nflows_side", "Nflows", DOCUMENTED, "#009E73", "nflows"),
    "zuko": Entry(".zuko_side", "Zuko", DOCUMENTED, "#CC79A7", "zuko"),
    "normflows": Entry(
        ".normflows_side", "Normflows", f"{DOCUMENTED}, reversed for one-pass densities", "#999933", "normflows"
    ),
    "flowjax": Entry(".flowjax_side", "Flowjax", f"{DOCUMENTED}, on JAX", "#882255", "flowjax", device="cpu"),
}
PEERS = tuple(name for name, entry in LIBRARIES.items() if entry.package is not None)  # not part of fastmaf


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
