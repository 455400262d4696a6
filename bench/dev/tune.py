"""Finds launch parameters for a GPU: times alternatives to each entry of the card's table in ``launch_table.TABLES``.

    python -m fastmaf.bench.dev.tune [--entry few] [--precision tf32x3]

One entry is varied at a time, at the size of the published run, by the first op whose launches depend on it: first tile
and warps, then stages, then programs, each with the best values so far. The results of an alternative are compared with
the present ones before it is timed, as replays of a CUDA graph, which need no Python. Worker processes compile the
alternatives first. Nothing is changed: faster parameters are printed as a line for the table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

import fastmaf
from fastmaf.bench import machine
from fastmaf.bench.check import WrongResultError
from fastmaf.bench.dev import one
from fastmaf.bench.dev.resources import published_flow
from fastmaf.kernels.triton_common import device
from fastmaf.kernels.triton_common.graphs import recording_stream
from fastmaf.kernels.triton_common.launch_table import TABLES, Launch, Table, family

# Of these, an entry is timed by the first whose launches depend on it.
OPS = (
    *(("log_prob", 1), ("log_prob", 8), ("log_prob", 64)),
    *(("train step", 8), ("train step", 64), ("sample", 1), ("sample", 64), ("log_prob", 1024)),
)
MOST_ERROR = 1e-5  # norm-wise relative difference from the present results
Work = tuple[str, int]


def launches(table: Table, key: int, card: tuple[int, int], work: Work, flow: fastmaf.MAF) -> list[object]:
    """Returns what an op would launch with a table, without the tensors."""
    present, TABLES[key] = TABLES[key], table
    try:
        with device.recording(*card) as recorded, fastmaf.use_backend("triton"):
            one.op(flow, *work).run()
    finally:
        TABLES[key] = present
    return [
        (call.kernel.fn.__name__, call.grid, [a for a in call.args if not isinstance(a, Tensor)], call.options)
        for call in recorded
    ]


def alternatives(entry: str, best: Table, stage: int) -> list[Table]:
    """Returns tables that differ from the best so far in one entry: its tile and warps, its stages or its programs.

    Each number is a power of two times the present one, and stages are few as well.
    """
    value: Any = getattr(best, entry)
    changed: Iterable[Any]
    if not isinstance(value, Launch):
        changed = [value // 4, value // 2, 2 * value, 4 * value] if stage == 0 else []
    elif stage == 0:
        sides = product(*([n // 2, n, 2 * n] for n in (value.rows, value.columns, value.warps)))
        changed = [value._replace(rows=r, columns=c, warps=w) for r, c, w in sides if r >= 16 and 1 <= w <= 16]
    elif stage == 1:
        changed = [value._replace(stages=n) for n in sorted({1, 2, 3, 4, value.stages // 2, 2 * value.stages} - {0})]
    else:
        now = value.programs_per_sm
        changed = [value._replace(programs_per_sm=n) for n in (now // 4, now // 2, 2 * now, 4 * now) if n]
    return [best._replace(**{entry: new}) for new in changed if new and new != value]


def work_of(entry: str, key: int, card: tuple[int, int], flow: fastmaf.MAF) -> Work | None:
    """Returns the first op whose launches depend on an entry; None where no op's do."""
    present = TABLES[key]
    tables = [table for stage in range(3) for table in alternatives(entry, present, stage)]
    for work in OPS:
        now = launches(present, key, card, work, flow)
        if any(launches(table, key, card, work, flow) != now for table in tables):
            return work
    return None


@cache
def model(blocks: int) -> fastmaf.MAF:
    """Returns the flow whose kernels are tuned."""
    return fastmaf.MAF(12_288, blocks, (512, 512), log_scale_bound=5.0, soft_bound=False, seed=0, device="cuda")


def compile_op(options: argparse.Namespace, key: int, work: Work, table: Table) -> None:
    """Runs an op once, in a worker process, to fill Triton's cache."""
    fastmaf.use_precision(options.precision)
    TABLES[key] = table
    try:
        one.op(model(options.blocks), *work).run()
    except Exception:  # too large for the card: reported when it is timed
        torch.cuda.empty_cache()


def replay_of(op: one.Op) -> Callable[[], object]:
    """Returns the replay of an op, or, with a word about it, the op itself where it cannot be captured."""
    try:
        return op.captured()
    except RuntimeError as error:
        print(f"  timed with Python, as it cannot be captured: {str(error).splitlines()[0]}")
        return op.run


def seconds(op: one.Op, expected: Tensor, repeats: int = 15) -> float:
    """Returns the median time of an op, once its result has been compared with what is expected.

    Raises:
        WrongResultError: the results differ.
    """
    error = float((op.run() - expected).norm() / expected.norm())
    if not error < MOST_ERROR:  # NaN as well
        raise WrongResultError(f"off by a relative {error:.1e}")
    call = replay_of(op)
    return statistics.median(machine.cuda_seconds_once(call) for _ in range(repeats))


def tune(options: argparse.Namespace, key: int, card: tuple[int, int], entry: str, pool: Any) -> None:
    """Prints the fastest parameters of an entry.

    Args:
        card: its compute capability and multiprocessors.
        pool: of processes that compile.
    """
    present = best = TABLES[key]
    recorded = published_flow(blocks=1)
    work = work_of(entry, key, card, recorded)
    if work is None:
        print(f"\n{entry}: no op of {OPS} depends on it", flush=True)
        return
    flow = model(options.blocks)
    expected = one.op(flow, *work).run().clone()
    fastest = seconds(one.op(flow, *work), expected)
    print(f"\n{entry}, {work[0]} {work[1]}: now {fastest * 1e3:.4f} ms, {line(entry, present)}", flush=True)
    try:
        for stage in range(3):
            now = launches(best, key, card, work, recorded)
            tables = [t for t in alternatives(entry, best, stage) if launches(t, key, card, work, recorded) != now]
            list(pool.map(partial(compile_op, options, key, work), tables))
            for table in tables:
                TABLES[key] = table
                try:
                    elapsed = seconds(one.op(flow, *work), expected)
                except Exception as problem:
                    print(f"  {type(problem).__name__}: {problem}: {line(entry, table)}")
                    continue
                if elapsed < fastest:
                    fastest, best = elapsed, table
                    print(f"  {elapsed * 1e3:.4f} ms  {line(entry, table)}", flush=True)
    finally:
        TABLES[key] = present
    if best is not present:
        versions = f"torch {torch.__version__}, Triton {triton.__version__}"
        about = f"{torch.cuda.get_device_name()}, {versions}, {time.strftime('%Y-%m-%d')}"
        print(f"{key}: {line(entry, best)},  # {fastest * 1e3:.4f} ms: {about}")


def line(entry: str, table: Table) -> str:
    """Returns an entry as written in the table."""
    return f"{entry}={getattr(table, entry)}"


def main() -> None:
    """Prints the fastest parameters of each entry beside the present ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entry", action="append", choices=Table._fields, help="default: all")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--precision", default="ieee")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no NVIDIA GPU was found, or torch was built without CUDA")
    fastmaf.use_precision(options.precision)
    properties = torch.cuda.get_device_properties()
    card = 10 * properties.major + properties.minor, properties.multi_processor_count
    key = family(card[0])
    print(f"{torch.cuda.get_device_name()}: the table of {key}, precision {options.precision}")
    # Everything on the stream on which graphs are recorded: autograd runs backward on the stream of forward.
    on_stream = torch.cuda.stream(recording_stream(torch.device("cuda", torch.cuda.current_device())))
    with on_stream, ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        for entry in options.entry or Table._fields:
            tune(options, key, card, entry, pool)


if __name__ == "__main__":
    main()
