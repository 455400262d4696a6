"""Finds launch parameters on the GPU at hand: times alternatives to its entry in ``launch_table.TABLES``.

    python -m fastmaf.bench.tune

One parameter set at a time, the others as they stand, at the reference model's size. Each alternative's results are
held against the present ones before it is timed. Nothing is changed: what is faster is printed, to be entered by hand
with a line that says why.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

import fastmaf
from fastmaf.bench import machine
from fastmaf.kernels.launch_table import TABLES, Table, family


class Trial(NamedTuple):
    """What depends on one entry of the table.

    Attributes:
        entry: the table's field.
        batch: samples.
        run: returns what must stay the same.
    """

    entry: str
    batch: int
    run: Callable[[], Tensor]


def alternatives(entry: str, present: Table) -> Iterator[Table]:
    """Yields tables that differ from the present one in one entry."""
    if entry == "inverse":
        for warps, numbers in product((4, 8, 16), (2048, 4096, 8192, 16384)):
            yield present._replace(inverse_warps=warps, inverse_numbers=numbers)
        return
    sizes = {
        "lanes": ((8, 256), (16, 256), (16, 512), (32, 128), (32, 256)),
        "dot": ((32, 32), (64, 32), (64, 64), (128, 32), (32, 64)),
        "backward": ((16, 32), (16, 64), (32, 32), (32, 64), (16, 128)),
    }[entry.removesuffix("_many")]
    for (rows, columns), warps, stages, programs in product(sizes, (2, 4, 8), (1, 2, 3), (2, 4, 8, 16)):
        if entry == "lanes" and stages > 1:
            continue  # there is nothing to copy ahead
        launch = getattr(present, entry)
        launch = launch._replace(rows=rows, columns=columns, warps=warps, stages=stages, programs_per_sm=programs)
        yield present._replace(**{entry: launch})


def trials(flow: fastmaf.MAF) -> list[Trial]:
    """Returns what is timed, entry by entry."""
    x = torch.rand(64, flow.features, device="cuda")

    def score(n: int) -> Tensor:
        with torch.no_grad():
            return flow.log_prob(x[:n])

    # Without memory and without a step, its first moment is the gradient.
    optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=0.0, betas=(0.0, 0.0))
    weight = next(flow.parameters())

    def back(n: int) -> Tensor:
        optimizer.minimize(-flow.log_prob(x[:n]).mean(), check_finite=False)  # which would wait for the GPU
        moment: Tensor = optimizer.state[weight]["exp_avg"]
        return moment.clone()

    def sample(n: int) -> Tensor:
        return flow.sample(n, generator=torch.Generator("cuda").manual_seed(0))

    return [
        Trial("lanes", 1, lambda: score(1)),
        Trial("dot", 8, lambda: score(8)),
        Trial("dot", 64, lambda: score(64)),
        Trial("backward", 8, lambda: back(8)),
        Trial("backward_many", 64, lambda: back(64)),
        Trial("inverse", 1, lambda: sample(1)),
        Trial("inverse", 128, lambda: sample(128)),
    ]


def tune(trial: Trial, key: int, repeats: int) -> list[tuple[float, str]]:
    """Returns (seconds, parameters) of each alternative that gives the same results, fastest first."""
    present, expected, found = TABLES[key], trial.run(), []
    try:
        for table in alternatives(trial.entry, present):
            TABLES[key] = table
            try:
                error = float((trial.run() - expected).norm() / expected.norm())
            except Exception as problem:  # too large for the card, in one of several ways
                print(f"  {_parameters(trial.entry, table)}: {type(problem).__name__}")
                continue
            if not error < 1e-5:
                raise AssertionError(f"{_parameters(trial.entry, table)} is off by a relative {error:.1e}")
            times = [machine.cuda_seconds_once(trial.run) for _ in range(repeats)]
            found.append((statistics.median(times), _parameters(trial.entry, table)))
    finally:
        TABLES[key] = present
    return sorted(found)


def _parameters(entry: str, table: Table) -> str:
    if entry == "inverse":
        return f"inverse_warps={table.inverse_warps}, inverse_numbers={table.inverse_numbers}"
    return str(getattr(table, entry))


def main() -> None:
    """Prints the fastest parameters of each trial beside the present ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no NVIDIA GPU is here, or this torch is built without CUDA")
    major, minor = torch.cuda.get_device_capability()
    key = family(10 * major + minor)
    flow = fastmaf.MAF(12_288, asked.blocks, (512, 512), order="natural", seed=0, device="cuda")
    print(f"{torch.cuda.get_device_name()}: the table of {key}")
    for trial in trials(flow):
        now = statistics.median(machine.cuda_seconds_once(trial.run) for _ in range(asked.repeats + 2))
        print(f"\n{trial.entry}, batch {trial.batch}: now {now * 1e3:.3f} ms, {_parameters(trial.entry, TABLES[key])}")
        for time, parameters in tune(trial, key, asked.repeats)[:5]:
            print(f"  {time * 1e3:.3f} ms  {parameters}")


if __name__ == "__main__":
    main()
