"""Times a flow with and without single parts of its GPU kernels' design, in turn, in one process.

    python -m fastmaf.bench.dev.parts [--parts panels lanes moments overlap]

    panels     samples take their steps in groups, and all multiprocessors form the products ahead of a group;
               without, a program takes its samples through all steps (``level_inverse``)
    lanes      densities of two to eight samples take no matrix products; without, they do
    moments    a step of Adam loads moments beside the weights; without, after the gradient's products
    overlap    kernels start before those ahead of them have ended, and prefetch; without, one after the other

Each case is the replay of a CUDA graph. Its results with and without the part are compared before it is timed; the exit
code is 1 where they differ.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

import fastmaf
from fastmaf.bench import machine
from fastmaf.bench.dev import level_inverse, one
from fastmaf.kernels.masked_linear import triton as linear
from fastmaf.kernels.masked_linear import triton_backward
from fastmaf.kernels.triton_common import launch_table

# The package has a function of that name.
_inverse = importlib.import_module("fastmaf.kernels.flow.triton.inverse")
_folder = tempfile.TemporaryDirectory()  # to the end of the process: Triton reads a kernel's source when it compiles it
MOST_ERROR = 1e-4  # norm-wise relative difference of both results
BACKWARD = "_masked_linear_bwd_kernel"
# Lines of that kernel: the loads of the moments, and the step that uses them.
_LOADS = """        if WEIGHT == "adam":
            m = tl.load(exp_avg_ptr + at, mask=stored, other=0.0)
            v = tl.load(exp_avg_sq_ptr + at, mask=stored, other=0.0)
"""
_STEP = """            if WEIGHT == "adam":
                w, m, v = triton_step.step("""


class Part(NamedTuple):
    """A part of the design.

    Attributes:
        cases: ops and batches that are timed.
        without: a ``with`` block in which kernels are launched without the part.
    """

    cases: tuple[tuple[str, int], ...]
    without: Callable[[], AbstractContextManager[None]]


@contextmanager
def _replaced(module: ModuleType, name: str, value: Callable[[], object]) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value())
    try:
        yield
    finally:
        setattr(module, name, before)


def late_source() -> str:
    """Returns the source of the backward kernel's module with the moments loaded where they are used.

    Raises:
        ValueError: the kernel has other lines than this module knows.
    """
    source = Path(triton_backward.__file__).read_text(encoding="utf-8")
    if source.count(_LOADS) != 1 or source.count(_STEP) != 1:
        raise ValueError(f"{BACKWARD} has changed: its loads of the moments are not those in {__file__}")
    condition, *loads = _LOADS.splitlines(keepends=True)
    late = _STEP.replace(f"    {condition}", f"    {condition}" + textwrap.indent("".join(loads), "    "))
    return source.replace(_LOADS, "").replace(_STEP, late)


@cache
def late_kernel() -> Any:
    """Returns the backward kernel with the moments loaded where they are used."""
    file = Path(_folder.name) / "late.py"
    file.write_text(late_source(), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("fastmaf_bench_late", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, BACKWARD)


PARTS = {
    "panels": Part(
        (("sample", 1), ("sample", 64)),
        partial(_replaced, _inverse, "_inverse_block", lambda: level_inverse.inverse_block),
    ),
    "lanes": Part((("log_prob", 8),), partial(_replaced, linear, "MOST_LANES", lambda: 1)),
    "moments": Part(
        (("train step", 8), ("train step", 64)), partial(_replaced, triton_backward, BACKWARD, late_kernel)
    ),
    "overlap": Part(
        (("log_prob", 1), ("log_prob", 8), ("train step", 8), ("sample", 1)),
        partial(_replaced, launch_table, "EARLY", lambda: range(0)),
    ),
}


def prepared(
    options: argparse.Namespace, case: tuple[str, int], switch: Callable[[], AbstractContextManager[None]]
) -> tuple[Tensor, Callable[[], object]]:
    """Returns the result of a case, and the call that is timed, in a flow of its own."""

    def run() -> Tensor:
        with switch():
            return op.run()

    op = one.op(one.flow_of(options), *case)
    result = run().detach().clone()
    if options.device != "cuda":
        return result, run
    with switch():
        return result, op.captured()


def compare(options: argparse.Namespace, name: str, case: tuple[str, int]) -> bool:
    """Times a case with and without a part, prints both, and returns whether their results agree."""
    results, calls = zip(*(prepared(options, case, one) for one in (nullcontext, PARTS[name].without)), strict=True)
    expected, found = (result.double() for result in results)
    error = float((found - expected).norm() / expected.norm())
    label = f"{name}: {case[0]} {case[1]}"
    if not error <= MOST_ERROR:
        print(f"WRONG {label}: without the part results differ by a relative {error:.1e}", flush=True)
        return False
    clock = machine.clock(options.device)
    pairs = [[clock(call) for call in calls] for _ in range(options.repeats + 2)][2:]
    both = [statistics.median(times) * 1e3 for times in zip(*pairs, strict=True)]
    ratios = sorted(a / b for a, b in pairs)
    print(
        f"{label}: {both[0]:.4g} ms, without {both[1]:.4g} ms, ratio {statistics.median(ratios):.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f} in {len(pairs)} pairs), results differ by {error:.1e}",
        flush=True,
    )
    return True


def main() -> int:
    """Prints a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one.add_size(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], help="the cases of these alone")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    with fastmaf.use_backend("triton"):
        cases = [(name, case) for name in options.parts for case in PARTS[name].cases if case[1] in options.batches]
        return int(not all([compare(options, *case) for case in cases]))


if __name__ == "__main__":
    sys.exit(main())
