"""Times the ops of the reference model on the GPU at hand, and says which kernels the time goes to.

    python -m fastmaf.bench.times --out times.csv [--profile]

Each case is timed as a user calls it (events around the call, Python included), and where it is replayed as a CUDA
graph also as the replay alone. Beside it stands the time in which its bytes or multiply-adds can move at the rates that
the same process measured. ``--profile`` adds the time of each kernel.
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
    """A case: how many times each visible weight must be moved and multiplied, and what runs it."""

    name: str
    batch: int
    moved: int
    products: int
    call: Callable[[], object]


def cases(flow: fastmaf.MAF, batches: list[int], samples: list[int]) -> list[Timed]:
    """Returns what is timed."""
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
    """Returns the times of as many calls as fit in ``budget`` seconds, at least three, after three that warm up."""
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
    asked = parser.parse_args()
    fastmaf.use_precision(asked.precision)
    limits, about = machine.cuda_limits(), machine.describe("cuda")
    size = (asked.features, asked.blocks, (512, 512))
    flow = fastmaf.MAF(*size, order=asked.order, soft_bound=False, seed=0, device="cuda")
    torch.cuda.synchronize()
    print(about["card"], {name: f"{value:.4g}" for name, value in limits.items()}, f"precision {asked.precision}")
    rows, weights = [], flow.visible_weights
    for case in cases(flow, asked.batches, asked.samples):
        torch.cuda.reset_peak_memory_stats()
        try:
            times = seconds(case.call, asked.budget)
        except RuntimeError as error:  # what else there is should still be timed
            print(f"FAILED: {case.name} {case.batch}: {error}", flush=True)
            continue
        by_bytes = 4 * weights * case.moved / limits["copy_gb_per_s"] / 1e9
        by_products = 2 * weights * case.products * case.batch / limits["sgemm_gflop_per_s"] / 1e9
        limit, median = max(by_bytes, by_products), statistics.median(times)
        row = {
            "case": case.name,
            "batch": case.batch,
            "precision": asked.precision,
            "median_ms": f"{median * 1e3:.4g}",
            "best_ms": f"{min(times) * 1e3:.4g}",
            "limit_ms": f"{limit * 1e3:.4g}",
            "fraction_of_limit": f"{limit / median:.3f}",
            "peak_gb": f"{torch.cuda.max_memory_allocated() / 1e9:.3f}",
            "repeats": len(times),
        }
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        rows.append(row)
        if asked.profile:
            shares = kernels(case.call)
            print(f"    on the GPU {sum(share[1] for share in shares):.3f} ms")
            for name, time, launches in shares[:6]:
                print(f"    {time:8.3f} ms  {launches:4} x  {name[:90]}", flush=True)
    if asked.out:
        with asked.out.open("w", newline="") as file:
            file.writelines(f"# {name}: {value}\n" for name, value in {**about, **limits}.items())
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
