"""Finds launch parameters for a GPU: times alternatives to its entry in ``launch_table.TABLES``.

    python -m fastmaf.bench.dev.tune [--entry few] [--precision tf32x3]

One entry is varied at a time, at the size of the published run: first tile and warps, then stages, then programs, each
with the best values so far. The results of an alternative are compared with the present ones before it is timed, as
replays of a CUDA graph, which need no Python. Worker processes compile the alternatives first. Nothing is changed:
faster parameters are printed as a line for the table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

import fastmaf
from fastmaf.bench import machine
from fastmaf.bench.check import WrongResultError
from fastmaf.capsule.config import TrainConfig
from fastmaf.kernels.triton_common.launch_table import TABLES, Table, family
from fastmaf.training.cuda_graphs import _stream, record
from fastmaf.training.graphed_step import CapturedUpdates

# The batch at which an entry is tuned, and the tiles (rows, columns) to try.
BATCH = {"lanes": 1, "few": 8, "dot": 64, "backward": 8, "backward_many": 64, "inverse": 1}
TILES: dict[str, tuple[tuple[int, int], ...]] = {
    "lanes": ((8, 256), (8, 512), (16, 128), (16, 256), (16, 512), (32, 128), (32, 256)),
    "few": ((8, 64), (8, 128), (16, 32), (16, 64), (16, 128), (32, 32)),
    "dot": ((16, 64), (16, 128), (32, 32), (32, 64), (64, 32), (64, 64), (128, 32)),
    "backward": ((16, 32), (16, 64), (16, 128), (32, 32), (32, 64)),
    "backward_many": ((16, 32), (16, 64), (16, 128), (32, 32), (32, 64)),
}
WARPS, STAGES, PROGRAMS = (2, 4, 8), (1, 2, 3, 4), (2, 4, 6, 8, 16, 32)
MOST_ERROR = 1e-5  # norm-wise relative difference from the present results


class Trial(NamedTuple):
    """A call that depends on one entry of the table.

    Attributes:
        run: returns a result that must not change.
        prepare: returns the call to be timed: if possible the replay of ``run``, recorded as a CUDA graph.
    """

    run: Callable[[], Tensor]
    prepare: Callable[[], Callable[[], object]]


def trial(flow: fastmaf.MAF, entry: str) -> Trial:
    """Returns the call that is timed for an entry."""
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(0)
    x = torch.rand(BATCH[entry], flow.features, generator=generator, device=device)
    if entry == "inverse":
        sample = torch.no_grad()(lambda: flow.inverse(x)[0])
        return Trial(sample, lambda: sample)
    if not entry.startswith("backward"):
        score = torch.no_grad()(lambda: flow.log_prob(x))
        return Trial(score, lambda: record(lambda: (score(), None)[1], device).replay)
    # With betas of 0 the first moment is the gradient.
    optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=0.0, betas=(0.0, 0.0))
    weight = next(flow.parameters())

    def backward() -> Tensor:
        optimizer.minimize(-flow.log_prob(x).mean(), check_finite=False)  # the check would wait for the GPU
        moment: Tensor = optimizer.state[weight]["exp_avg"]
        return moment.clone()

    def recorded() -> Callable[[], object]:
        updates = CapturedUpdates(optimizer)
        graph = record(lambda: updates.minimize(-flow.log_prob(x).mean()), device)
        updates.advance()
        return graph.replay

    return Trial(backward, recorded)


def alternatives(entry: str, best: Table, stage: int) -> list[Table]:
    """Returns tables that differ from the best so far in one entry: its tile, its stages or its programs."""
    if entry == "inverse":
        grid = product((4, 8, 16), (4096, 8192, 16384)) if stage == 0 else ()
        return [best._replace(inverse_warps=warps, inverse_numbers=numbers) for warps, numbers in grid]
    launch = getattr(best, entry)
    if stage == 0:
        launches = [launch._replace(rows=r, columns=c, warps=w) for (r, c), w in product(TILES[entry], WARPS)]
    elif stage == 1:
        launches = [] if entry in ("lanes", "few") else [launch._replace(stages=stages) for stages in STAGES]
    else:
        launches = [launch._replace(programs_per_sm=programs) for programs in PROGRAMS]
    return [best._replace(**{entry: changed}) for changed in launches if changed != launch]


@cache
def model(blocks: int) -> fastmaf.MAF:
    """Returns the flow whose kernels are tuned."""
    return TrainConfig(blocks=blocks).build("cuda")


def compile_trial(options: argparse.Namespace, key: int, entry: str, table: Table) -> None:
    """Runs a trial once, in a worker process, to fill Triton's cache."""
    fastmaf.use_precision(options.precision)
    TABLES[key] = table
    try:
        trial(model(options.blocks), entry).run()
    except Exception:  # too large for the card: reported when it is timed
        torch.cuda.empty_cache()


def seconds(trial: Trial, expected: Tensor, repeats: int = 15) -> float:
    """Returns the median time of a call, once its result has been compared with what is expected.

    Raises:
        WrongResultError: the results differ.
    """
    error = float((trial.run() - expected).norm() / expected.norm())
    if not error < MOST_ERROR:  # NaN as well
        raise WrongResultError(f"off by a relative {error:.1e}")
    call = trial.prepare()
    return statistics.median(machine.cuda_seconds_once(call) for _ in range(repeats))


def tune(options: argparse.Namespace, key: int, entry: str, pool: ProcessPoolExecutor) -> None:
    """Prints the fastest parameters of an entry."""
    present = best = TABLES[key]
    flow = model(options.blocks)
    expected = trial(flow, entry).run().clone()
    fastest = seconds(trial(flow, entry), expected)
    print(f"\n{entry}, batch {BATCH[entry]}: now {fastest * 1e3:.4f} ms, {line(entry, present)}", flush=True)
    try:
        for stage in range(3):
            tables = alternatives(entry, best, stage)
            list(pool.map(partial(compile_trial, options, key, entry), tables))
            for table in tables:
                TABLES[key] = table
                try:
                    elapsed = seconds(trial(flow, entry), expected)
                except Exception as problem:
                    print(f"  {type(problem).__name__}: {problem}: {line(entry, table)}")
                    continue
                if elapsed < fastest:
                    fastest, best = elapsed, table
                    print(f"  {elapsed * 1e3:.4f} ms  {line(entry, table)}", flush=True)
    finally:
        TABLES[key] = present
    if best is not present:
        card, versions = torch.cuda.get_device_name(), f"torch {torch.__version__}"
        print(f"{key}: {line(entry, best)},  # {fastest * 1e3:.4f} ms: {card}, {versions}, {time.strftime('%Y-%m-%d')}")


def line(entry: str, table: Table) -> str:
    """Returns an entry as written in the table."""
    if entry == "inverse":
        return f"inverse_warps={table.inverse_warps}, inverse_numbers={table.inverse_numbers}"
    return f"{entry}={getattr(table, entry)}"


def main() -> None:
    """Prints the fastest parameters of each entry beside the present ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entry", action="append", choices=list(BATCH), help="default: all")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--precision", default="ieee")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no NVIDIA GPU was found, or torch was built without CUDA")
    fastmaf.use_precision(options.precision)
    major, minor = torch.cuda.get_device_capability()
    key = family(10 * major + minor)
    print(f"{torch.cuda.get_device_name()}: the table of {key}, precision {options.precision}")
    # Everything on the stream on which graphs are recorded: autograd runs backward on the stream of forward.
    on_stream = torch.cuda.stream(_stream(torch.device("cuda", torch.cuda.current_device())))
    with on_stream, ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        for entry in options.entry or BATCH:
            tune(options, key, entry, pool)


if __name__ == "__main__":
    main()
