"""Times a flow alone and beside a busy process per core: ``python -m fastmaf.bench.dev.neighbour``.

The neighbours do nothing but compute, once with the flow's own priority and once with a lower one (nice 10), and are
started anew for each turn. A machine that is fairly shared gives the flow half of it beside equals; waiting for threads
that are not running costs more. The target is at most 2.5 times the undisturbed time in every case.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

import fastmaf
from fastmaf.bench.labels import amount
from fastmaf.bench.machine import clock
from fastmaf.bench.tables import aligned

TARGET = 2.5
LOWER = 10
WARM_UP = 0.3  # seconds until all neighbours compute
# Ends with its parent, also where that is killed, and leaves Ctrl-C to it. Windows has no os.nice.
BUSY = """import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
parent = os.getppid()
getattr(os, "nice", int)(int(sys.argv[1]))
while os.getppid() == parent:
    sum(range(100_000))
"""

Call = Callable[[], object]


@contextlib.contextmanager
def neighbours(count: int, nice: int = 0) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Runs ``count`` busy processes, and ends them however the block is left."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            started.append(subprocess.Popen([sys.executable, "-c", BUSY, str(nice)]))
        time.sleep(WARM_UP if count else 0.0)
        yield started
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


def calls(flow: fastmaf.Flow, batches: Sequence[int] = (1, 8)) -> dict[str, Call]:
    """Returns the cases: densities, one sample, and a training step of the last batch size."""
    x = torch.rand(max(batches), flow.features, generator=torch.Generator().manual_seed(0))
    step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-6))
    log_prob = torch.no_grad()(flow.log_prob)
    cases: dict[str, Call] = {f"log_prob {n}": partial(log_prob, x[:n]) for n in batches}
    return cases | {"sample 1": partial(flow.sample, 1), f"train step {len(x)}": partial(step, x)}


def measure(cases: dict[str, Call], count: int, rounds: int, seconds: float) -> list[dict[str, list[float]]]:
    """Returns the times of each case alone, beside ``count`` equal neighbours, and beside those of lower priority."""
    timed = clock("cpu")
    for call in cases.values():
        call()
    times: list[dict[str, list[float]]] = [{name: [] for name in cases} for _ in range(3)]
    for _ in range(rounds):
        for found, (busy, nice) in zip(times, ((0, 0), (count, 0), (count, LOWER)), strict=True):
            with neighbours(busy, nice):
                for name, call in cases.items():
                    end = time.monotonic() + seconds
                    found[name].append(timed(call))
                    while time.monotonic() < end:
                        found[name].append(timed(call))
    return times


def table(times: list[dict[str, list[float]]]) -> str:
    """Returns the medians, and their ratios to the undisturbed ones beside the target."""
    lines = [["", "alone", "beside equals", "ratio", f"beside nice {LOWER}", "ratio", f"target {TARGET}"]]
    for name in times[0]:
        alone, *beside = (statistics.median(found[name]) for found in times)
        ratios = [median / alone for median in beside]
        cells = [cell for m, ratio in zip(beside, ratios, strict=True) for cell in (amount(m, "s"), f"{ratio:.2f}")]
        lines.append([name, amount(alone, "s"), *cells, "met" if max(ratios) <= TARGET else "missed"])
    return "\n".join(aligned(lines, (0, 6)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=12_288)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 512])
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--neighbours", type=int, default=os.cpu_count() or 1, help="busy processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="per case and turn")
    options = parser.parse_args(arguments)
    flow = fastmaf.MAF(options.features, options.blocks, options.hidden, order="natural", seed=0)
    print(f"{flow.features:,} features, {options.neighbours} neighbours, {torch.get_num_threads()} threads")
    with contextlib.suppress(KeyboardInterrupt):
        print(table(measure(calls(flow), options.neighbours, options.rounds, options.seconds)))


if __name__ == "__main__":
    main()
