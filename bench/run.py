"""Times fastmaf beside the naive model and a clever dense one: ``python -m bench.run``.

Correctness comes first: sides whose log_prob or samples differ are not timed. Sides are interleaved; medians with the
20th and 80th percentile are printed, beside the time in which the bytes that must move could move on this machine.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import fastmaf
from bench import machine, memory
from bench.sides import (
    Side,
    bfloat16_side,
    blocks_of,
    fast_side,
    masked_gradients_side,
    masked_once_side,
    naive_side,
    reference_side,
    torch_adam_side,
)
from fastmaf.reference import NaiveMAF

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "case",
    "batch",
    "side",
    "median_s",
    "p20_s",
    "p80_s",
    "must_move",
    "limit_s",
    "fraction_of_limit",
    "times_faster",
    "note",
)

Row = dict[str, str]


class WrongResultError(AssertionError):
    """Two sides that should be the same function are not: nothing is timed."""


# Rounding the weights to bfloat16 changes the function itself, a little.
ALLOWED = {"bfloat16": 1e-3}


def check(flow: fastmaf.MAF, sides: list[Side], naive: NaiveMAF, x: torch.Tensor) -> None:
    """Holds the sides against each other: log_prob, round trip, and the first dimensions of the naive inverse."""
    with torch.no_grad():
        expected = flow.log_prob(x)
        for side in sides:
            error = float(((side.log_prob(x) - expected) / expected).abs().max())
            if not error < ALLOWED.get(side.name, 1e-4):
                raise WrongResultError(f"log_prob of {side.name!r} is off by a relative {error:.1e}")
        samples = {}
        for side in sides:
            if side.sample is not None:
                torch.manual_seed(0)
                samples[side.name] = side.sample(3)
        for name, found in samples.items():
            error = float((found - next(iter(samples.values()))).norm() / found.norm())
            if not error < 10 * ALLOWED.get(name, 1e-4):
                raise WrongResultError(f"samples of {name!r} are off by a relative {error:.1e}")
        z, _ = flow(x)
        error = float((flow.inverse(z)[0] - x).abs().max())
        if not error < 1e-3:
            raise WrongResultError(f"inverse(forward(x)) is off by {error:.1e}")
        block, order = flow.transforms[-1], naive.orders[-1]
        assert isinstance(block, fastmaf.Transform)
        passes = 16
        slow, _ = blocks_of(naive)[-1].inverse(z, order=order, passes=passes)
        error = float((slow - block.inverse(z)[0])[:, order[:passes]].abs().max())
        if not error < 1e-4:
            raise WrongResultError(f"the naive inverse's first {passes} dimensions are off by {error:.1e}")


def interleaved(
    calls: dict[str, Callable[[], object]],
    repeats: dict[str, int],
    once: Callable[[Callable[[], object]], float] = machine.seconds_once,
) -> dict[str, list[float]]:
    """Times the calls in turn with ``once``, each as often as asked, after a warm-up of each."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(max(repeats.values())):
        for name, call in calls.items():
            if i < repeats[name]:
                times[name].append(once(call))
    return times


def rows_of(
    case: str,
    batch: int,
    times: dict[str, list[float]],
    must_move: str,
    limit: float,
    notes: dict[str, str] | None = None,
) -> list[Row]:
    """Turns the times of one case into rows; every side is compared with the first.

    Args:
        must_move: the bytes or operations that bound the case, in words.
        limit: seconds in which the machine could move them.
    """
    first = statistics.median(next(iter(times.values())))
    rows = []
    for name, values in times.items():
        median = statistics.median(values)
        # inclusive: of few repeats the other method makes times that none of them took, even negative ones
        cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [median] * 4
        p20, p80 = cuts[0], cuts[3]
        rows.append(
            {
                "case": case,
                "batch": str(batch),
                "side": name,
                "median_s": f"{median:.6g}",
                "p20_s": f"{p20:.6g}",
                "p80_s": f"{p80:.6g}",
                "must_move": must_move,
                "limit_s": f"{limit:.6g}",
                "fraction_of_limit": f"{limit / median:.4g}",
                "times_faster": f"{median / first:.4g}",
                "note": (notes or {}).get(name, ""),
            }
        )
    return rows


def run(
    features: int, blocks: int, hidden: tuple[int, ...], repeats: int, with_memory: bool
) -> tuple[list[Row], dict[str, str]]:
    """Runs every case and returns its rows, and what they were measured on."""
    limits = machine.limits()
    about = machine.describe() | {k: f"{v:.4g}" for k, v in limits.items()}
    about |= {"features": str(features), "blocks": str(blocks), "hidden_features": "x".join(map(str, hidden))}
    # Natural order and the reference's clamp: the function that every side can hold without a permutation.
    flow = fastmaf.MAF(features, blocks, hidden, order="natural", seed=0)
    naive = flow.to_naive()
    x = torch.rand(64, features, generator=torch.Generator().manual_seed(0))
    fast, slow = fast_side(flow), naive_side(naive)
    inference = [fast, reference_side(flow), bfloat16_side(flow), slow, masked_once_side(naive)]
    check(flow, inference, naive, x[:8])
    weights, rate = flow.visible_weights, limits["sgemm_gflop_per_s"] * 1e9
    few = {"fastmaf": repeats, "torch Adam": max(3, repeats // 2), "bfloat16": repeats}
    few |= {"reference": max(3, repeats // 2), "naive": max(2, repeats // 4)}
    few |= {"masked once": max(3, repeats // 2), "masked gradients": max(2, repeats // 4)}
    rows: list[Row] = []

    def bound(batch: int, number_bytes: int = 4) -> tuple[str, float]:
        """What scoring or sampling must do: stream the weights once, or multiply them with the batch."""
        moved = number_bytes * weights
        stream, multiply = moved / limits["read_gb_per_s"] / 1e9, 2 * batch * weights / rate
        if stream >= multiply:
            return f"{moved / 1e6:.0f} MB read", stream
        return f"{2 * batch * weights / 1e9:.2f} GFLOP", multiply

    def bounded(found: list[Row], batch: int) -> list[Row]:
        """Gives the side whose weights take half the bytes its own bound."""
        for row in found:
            if row["side"] == "bfloat16":
                words, limit = bound(batch, 2)
                share = limit / float(row["median_s"])
                row |= {"must_move": words, "limit_s": f"{limit:.6g}", "fraction_of_limit": f"{share:.4g}"}
        return found

    with torch.no_grad():
        for batch in (1, 8, 64):
            calls: dict[str, Callable[[], object]] = {s.name: partial(s.log_prob, x[:batch]) for s in inference}
            rows += bounded(rows_of("log_prob", batch, interleaved(calls, few), *bound(batch)), batch)
        for batch in (1, 5, 64):
            calls = {s.name: partial(s.sample, batch) for s in inference if s.sample is not None}
            times, notes = interleaved(calls, few), {}
            if batch == 1:
                times["naive"], notes["naive"] = naive_sampling(naive, features, blocks)
            rows += bounded(rows_of("sample", batch, times, *bound(batch), notes), batch)
    # Forward reads a weight; one pass more reads and writes it and both moments.
    must_move = 7 * 4 * weights
    # Copies: an optimiser that fuses takes its flow's gradients for itself.
    copies = [torch_adam_side(copy.deepcopy(flow)), reference_side(copy.deepcopy(flow))]
    training = [fast, *copies, slow, inference[-1], masked_gradients_side(naive)]
    check(flow, [*copies, training[-1]], naive, x[:8])
    calls = {side.name: partial(side.train_step, x[:8]) for side in training}
    times = interleaved(calls, few)
    rows += rows_of("train step", 8, times, f"{must_move / 1e6:.0f} MB", must_move / limits["adam_gb_per_s"] / 1e9)
    if with_memory:
        del flow, naive, inference, training, copies, fast, slow, calls
        rows += memory_rows(features, blocks, hidden)
    return rows, about


def naive_sampling(
    naive: NaiveMAF,
    features: int,
    blocks: int,
    once: Callable[[Callable[[], object]], float] = machine.seconds_once,
) -> tuple[list[float], str]:
    """Times a few dimensions of one block of the naive inverse with ``once`` and extrapolates, in the open."""
    passes = min(features, 24)
    block, order = blocks_of(naive)[-1], naive.orders[-1]
    z = torch.randn(1, features).to(block.weights[0].device)

    def call() -> object:
        return block.inverse(z, order=order, passes=passes)

    call()
    times = [once(call) / (passes + 1) * features * blocks for _ in range(3)]
    return times, f"extrapolated: {passes + 1} of {features * blocks} passes"


def memory_rows(features: int, blocks: int, hidden: tuple[int, ...]) -> list[Row]:
    """Measures the peak memory of training at batch 8, each side in its own process."""
    rows = []
    for side in memory.SIDES:
        peak = memory.peak_gb(side, features=features, blocks=blocks, hidden=hidden, batch=8)
        if peak is not None:
            rows.append(
                {"case": "training memory", "batch": "8", "side": side, "note": f"{peak:.2f} GB above importing torch"}
            )
    return rows


def table(rows: list[Row]) -> str:
    """Returns the rows as text."""
    head = f"{'case':<36}{'batch':>6}  {'side':<18}{'median':>12}{'20–80 %':>24}{'must move':>14}{'limit':>10}"
    lines = [f"{head}{'of limit':>10}{'ratio':>10}  note"]
    for row in rows:
        if "median_s" not in row:
            lines.append(f"{row['case']:<36}{row['batch']:>6}  {row['side']:<18}{'':>80}  {row['note']}")
            continue
        spread = f"{_time(float(row['p20_s']))} – {_time(float(row['p80_s']))}"
        share, ratio = f"{float(row['fraction_of_limit']):.1%}", f"{float(row['times_faster']):,.1f}×"
        head = f"{row['case']:<36}{row['batch']:>6}  {row['side']:<18}{_time(float(row['median_s'])):>12}"
        bound = f"{row['must_move']:>14}{_time(float(row['limit_s'])):>10}"
        lines.append(f"{head}{spread:>24}{bound}{share:>10}{ratio:>10}  {row['note']}")
    return "\n".join(lines)


def _time(s: float) -> str:
    return f"{s:,.2f} s" if s >= 1 else f"{s * 1e3:.1f} ms"


def write(rows: list[Row], about: dict[str, str], path: Path) -> None:
    """Writes the rows as CSV, with what they were measured on in every row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *about], restval="")
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)


def main() -> None:
    """Parses the command line, runs, prints and writes."""
    parser = argparse.ArgumentParser(description="Times fastmaf beside the naive model and a clever dense one.")
    parser.add_argument("--features", type=int, default=12288)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 512])
    parser.add_argument("--repeats", type=int, default=20, help="of the fast side; slow sides get fewer")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory of training processes")
    parser.add_argument("--csv", type=Path, help="where to write; default bench/results/cpu.csv")
    asked = parser.parse_args()
    rows, about = run(asked.features, asked.blocks, tuple(asked.hidden), asked.repeats, not asked.no_memory)
    print("\n".join(f"{k}: {v}" for k, v in about.items()), table(rows), sep="\n\n")
    path = asked.csv or RESULTS / "cpu.csv"
    write(rows, about, path)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
