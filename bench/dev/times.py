"""Times a flow of the published run's size on a GPU, by kernel if options.

    python -m fastmaf.bench.dev.times --out times.csv [--profile]

Each case is timed as a user calls it, with CUDA events around the call, and compared with the time that its bytes or
multiply-adds take at the rates measured in the same process. ``--profile`` adds the time of each kernel.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import fastmaf
from fastmaf.bench import machine


class Timed(NamedTuple):
    """A case: how often each visible weight must be moved and multiplied, and the call."""

    name: str
    batch: int
    moved: int
    products: int
    call: Callable[[], object]


def cases(flow: fastmaf.MAF, batches: list[int], samples: list[int]) -> list[Timed]:
    """Returns the cases."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.rand(max([*batches, 1]), flow.features, device="cuda")
    scored = fastmaf.ReplayedLogProb(flow)
    optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-6)
    step = fastmaf.TrainingStep(flow, optimizer, graphs=True)

    def sample(n: int) -> torch.Tensor:
        with torch.no_grad():
            return flow.sample(n, generator=generator)

    return [
        *(Timed("log_prob", n, 1, 1, partial(scored, x[:n])) for n in batches),
        *(Timed("train step", n, 7, 3, partial(step, x[:n])) for n in batches if 1 < n <= 64),
        *(Timed("sample", n, 1, 1, partial(sample, n)) for n in samples),
    ]


def seconds(call: Callable[[], object], budget: float) -> list[float]:
    """Returns the times of as many calls as fit in ``budget`` seconds, at least three, after three to warm up."""
    first = [machine.cuda_seconds_once(call) for _ in range(3)][-1]
    return [machine.cuda_seconds_once(call) for _ in range(max(3, min(200, int(budget / max(first, 1e-5)))))]


def kernels(call: Callable[[], object], repeats: int = 5) -> list[tuple[str, float, int]]:
    """Returns (kernel, milliseconds, launches) of one call, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    found = [
        (event.key, event.self_device_time_total / 1e3 / repeats, event.count // repeats)
        for event in profile.key_averages()
    ]
    return sorted((row for row in found if row[1] > 0), key=lambda row: -row[1])


def main() -> None:
    """Prints the table, and writes it to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=12_288)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--order", default="natural")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 1024])
    parser.add_argument("--samples", type=int, nargs="*", default=[1, 5, 64, 1024])
    parser.add_argument("--precision", default="ieee")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per case")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    fastmaf.use_precision(options.precision)
    limits, about = machine.cuda_limits(), machine.describe("cuda")
    flow = fastmaf.MAF(options.features, options.blocks, (512, 512), order=options.order, seed=0, device="cuda")
    torch.cuda.synchronize()
    print(about["card"], {name: f"{value:.4g}" for name, value in limits.items()}, f"precision {options.precision}")
    rows, weights = [], flow.visible_weights
    for case in cases(flow, options.batches, options.samples):
        torch.cuda.reset_peak_memory_stats()
        try:
            times = seconds(case.call, options.budget)
        except RuntimeError as error:  # the other cases should still be timed
            print(f"FAILED: {case.name} {case.batch}: {error}", flush=True)
            continue
        by_bytes = 4 * weights * case.moved / limits["copy_gb_per_s"] / 1e9
        by_products = 2 * weights * case.products * case.batch / limits["sgemm_gflop_per_s"] / 1e9
        limit, median = max(by_bytes, by_products), statistics.median(times)
        row = {
            "case": case.name,
            "batch": case.batch,
            "precision": options.precision,
            "median_ms": f"{median * 1e3:.4g}",
            "best_ms": f"{min(times) * 1e3:.4g}",
            "limit_ms": f"{limit * 1e3:.4g}",
            "fraction_of_limit": f"{limit / median:.3f}",
            "peak_gb": f"{torch.cuda.max_memory_allocated() / 1e9:.3f}",
            "repeats": len(times),
        }
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        rows.append(row)
        if options.profile:
            shares = kernels(case.call)
            print(f"    on the GPU {sum(share[1] for share in shares):.3f} ms")
            for name, time, launches in shares[:6]:
                print(f"    {time:8.3f} ms  {launches:4} x  {name[:90]}", flush=True)
    if options.out:
        with options.out.open("w", newline="") as file:
            file.writelines(f"# {name}: {value}\n" for name, value in {**about, **limits}.items())
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
