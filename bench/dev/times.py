"""Times a flow of the published run's size on a GPU, by kernel if asked.

    python -m fastmaf.bench.dev.times --out times.csv [--profile]

Each case is timed as a user calls it, with CUDA events around the call, and compared with the time that its bytes or
multiply-adds take at the rates measured in the same process. ``--profile`` adds the time of each kernel.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import fastmaf
from fastmaf.bench import cases, machine

Call = Callable[[], object]


def calls(flow: fastmaf.MAF, batches: list[int], samples: list[int]) -> Iterator[tuple[cases.Case, Call]]:
    """Yields the cases."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.rand(max([*batches, 1]), flow.features, device="cuda")
    log_prob = fastmaf.ReplayedLogProb(flow)
    step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-6), graphs=True)
    sample = torch.no_grad()(flow.sample)
    yield from ((cases.log_prob(n), partial(log_prob, x[:n])) for n in batches)
    yield from ((cases.train_step(n), partial(step, x[:n])) for n in batches if 1 < n <= 64)
    yield from ((cases.sample(n), partial(sample, n, generator=generator)) for n in samples)


def seconds(call: Call, budget: float) -> list[float]:
    """Returns the times of as many calls as fit in ``budget`` seconds, at least three, after three to warm up."""
    first = [machine.cuda_seconds_once(call) for _ in range(3)][-1]
    return [machine.cuda_seconds_once(call) for _ in range(max(3, min(200, int(budget / max(first, 1e-5)))))]


def print_kernels(call: Call, repeats: int = 5) -> None:
    """Prints milliseconds and launches of the kernels of one call, the longest first."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    print(f"    on the GPU {sum(event.self_device_time_total for event in events) / 1e3 / repeats:.3f} ms")
    for event in events[:6]:
        time = event.self_device_time_total / 1e3 / repeats
        print(f"    {time:8.3f} ms  {event.count // repeats:4} x  {event.key[:90]}", flush=True)


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
    size = options.features, options.blocks, (512, 512)
    flow = fastmaf.MAF(*size, order=options.order, log_scale_bound=5.0, seed=0, soft_bound=False, device="cuda")
    print(about["card"], {name: f"{rate:.4g}" for name, rate in limits.items()}, f"precision {options.precision}")
    rows = []
    for case, call in calls(flow, options.batches, options.samples):
        torch.cuda.reset_peak_memory_stats()
        try:
            times = seconds(call, options.budget)
        except RuntimeError as error:  # the other cases should still be timed
            print(f"FAILED: {case.label}: {error}", flush=True)
            continue
        limit, median = case.limit(flow.visible_weights, 4, limits)[0], statistics.median(times)
        rows.append(
            {
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
        )
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        if options.profile:
            print_kernels(call)
    if options.out:
        with options.out.open("w", newline="") as file:
            file.writelines(f"# {name}: {value}\n" for name, value in {**about, **limits}.items())
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
