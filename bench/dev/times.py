"""Times a flow of the published run's size on a GPU, by kernel if asked.

    python -m fastmaf.bench.dev.times --out times.csv [--precisions ieee tf32x3] [--profile]

Each case is timed twice: as the replay of a CUDA graph, which needs no Python, and as a user calls it. Beside them are
the time that its bytes or multiply-adds take at the rates measured in the same process, and a prediction
(``--predicted``, lines such as "log_prob 8   0.140 ms"). ``--profile`` adds the time of each kernel; ``--limits``
prints the rates alone.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

import fastmaf
from fastmaf.bench import cases, machine
from fastmaf.bench.dev import one

Call = Callable[[], object]


def limits_of(device: str) -> dict[str, float]:
    """Measures the rates of a device, on a GPU also those of its matrix units in GFLOP/s."""
    if device == "cpu":
        return machine.limits()
    found, side = machine.cuda_limits(), 8192
    before = torch.backends.cuda.matmul.allow_tf32
    for name, dtype in (("tf32", torch.float32), ("bf16", torch.bfloat16)):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b, c = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(3))
        product = min(machine.cuda_seconds_once(partial(torch.mm, a, b, out=c)) for _ in range(10))
        found[f"{name}_gflop_per_s"] = 2 * side**3 / product / 1e9
    torch.backends.cuda.matmul.allow_tf32 = before
    return found


def predictions(file: Path | None) -> dict[str, float]:
    """Returns the predicted milliseconds of cases by label."""
    text = file.read_text() if file is not None and file.exists() else ""
    return {name: float(ms) for name, ms in re.findall(r"^(\w[\w ]*?) +([\d.]+) ms", text, re.MULTILINE)}


def calls(flow: fastmaf.MAF, options: argparse.Namespace) -> list[tuple[cases.Case, Call]]:
    """Returns the cases as a user calls them."""
    generator = torch.Generator(options.device).manual_seed(0)
    x = torch.rand(max([*options.batches, 1]), flow.features, device=options.device)
    log_prob = fastmaf.ReplayedLogProb(flow)
    step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-6), graphs=True)
    found: list[tuple[cases.Case, Call]] = []
    found += [(cases.log_prob(n), partial(log_prob, x[:n])) for n in options.batches]
    found += [(cases.train_step(n), partial(step, x[:n])) for n in options.batches if 1 < n <= 64]
    found += [(cases.sample(n), partial(flow.sample, n, generator=generator)) for n in options.samples]
    return found


def seconds(call: Call, device: str, budget: float) -> list[float]:
    """Returns the times of as many calls as fit in ``budget`` seconds, at least three, after three to warm up."""
    clock = machine.clock(device)
    first = [clock(call) for _ in range(3)][-1]
    return [clock(call) for _ in range(max(3, min(200, int(budget / max(first, 1e-5)))))]


def replays(op: one.Op, device: str, budget: float) -> tuple[float, str]:
    """Returns the median seconds of an op on the GPU alone, or NaN and why it cannot be captured."""
    try:
        op.run()
        replay = op.captured() if device == "cuda" else op.run
        return statistics.median(seconds(replay, device, budget)), ""
    except RuntimeError as error:
        return float("nan"), f"  not captured: {str(error).splitlines()[0]}"


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


def rows_of(precision: str, options: argparse.Namespace, limits: dict[str, float]) -> Iterator[dict[str, object]]:
    """Times all cases in one precision, prints and yields them."""
    flow, device = one.flow_of(options), options.device
    for case, call in calls(flow, options):
        machine.reset_peak(device)
        try:
            times = seconds(call, device, options.budget)
        except RuntimeError as error:  # the other cases should still be timed
            print(f"FAILED: {case.label}: {error}", flush=True)
            continue
        replay, note = replays(one.op(flow, case.name, case.batch), device, options.budget)
        limit, call_s = case.limit(flow.visible_weights, 4, limits)[0], statistics.median(times)
        best = call_s if math.isnan(replay) else replay
        row = {
            "case": case.name,
            "batch": case.batch,
            "precision": precision,
            "graph_ms": f"{replay * 1e3:.4g}",
            "predicted_ms": "nan",
            "limit_ms": f"{limit * 1e3:.4g}",
            "call_ms": f"{call_s * 1e3:.4g}",
            "best_call_ms": f"{min(times) * 1e3:.4g}",
            "fraction_of_limit": f"{limit / best:.3f}",
            "peak_gb": f"{machine.peak_bytes(device) / 1e9:.3f}",
            "repeats": len(times),
        }
        add_predictions([row], options.predicted)
        print("  ".join(f"{name} {value}" for name, value in row.items()) + note, flush=True)
        if options.profile and device == "cuda":
            print_kernels(call)
        yield row


def add_predictions(rows: list[dict[str, object]], file: Path | None) -> None:
    """Writes into the rows what has been predicted by now: the processors predict while the GPU is timed."""
    predicted = predictions(file)
    for row in rows:
        label = f"{row['case']} {row['batch']}"
        if row["precision"] == "ieee" and label in predicted:
            row["predicted_ms"] = f"{predicted[label]:.4g}"


def write(path: Path, about: Mapping[str, object], rows: list[dict[str, object]]) -> None:
    """Writes rows below lines about the machine."""
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in about.items())
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Prints the table, and writes it to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one.add_size(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 1024])
    parser.add_argument("--samples", type=int, nargs="*", default=[1, 5, 64, 1024])
    parser.add_argument("--precisions", nargs="+", default=["ieee"])
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per case, and again for its replays")
    parser.add_argument("--predicted", type=Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--limits", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    limits, about = limits_of(options.device), machine.describe(options.device)
    card = about.get("card", about["processor"])
    print(card, "  ".join(f"{name} {rate:.4g}" for name, rate in limits.items()), flush=True)
    if options.limits:
        return
    rows: list[dict[str, object]] = []
    for precision in options.precisions:
        if not one.has_precision(precision, torch.empty(0, device=options.device)):
            continue
        with fastmaf.use_backend("triton"), fastmaf.use_precision(precision):
            for row in rows_of(precision, options, limits):
                rows.append(row)
                add_predictions(rows, options.predicted)
                if options.out:  # after each: the next one may not fit into the time
                    write(options.out, {**about, **limits}, rows)


if __name__ == "__main__":
    main()
