"""Times every op beside what must move for it: ``python -m fastmaf.bench.ops``.

At the size of the capsule run, batches 1, 8 and 64. The limit of an op is the larger of the time to move its bytes at
this machine's read (or, for gradients and Adam, copy and fused Adam's) rate and the time of its multiply-adds at the
matrix rate, all measured in the same process. Results are checked against the torch backend in float64 first; then
the backends take turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from fastmaf.bench import machine
from fastmaf.bench.op_cases import BATCHES, BLOCKS, FEATURES, HIDDEN, Op, check, flow_of, ops_of, present
from fastmaf.bench.report import about_lines, table
from fastmaf.bench.rows import Row, row_of, write


def run(features: int, blocks: int, repeats: int) -> tuple[list[Row], dict[str, str]]:
    """Checks and times every op, native beside reference where there is a native library.

    Returns:
        The rows, and what they were measured on.

    Raises:
        WrongResultError: an op's results are not those of the float64 reference.
    """
    limits = machine.limits()
    about = machine.describe() | {name: f"{value:.4g}" for name, value in limits.items()}
    flow, rows = flow_of(features, blocks), []
    # Streams through more than any cache between two calls, as the other layers of a flow would.
    flush = torch.ones(32 * 2**20)
    for batch in BATCHES:
        for op in ops_of(flow, batch):
            errors = {side: check(op, side) for side in present()}
            calls = {side: op.prepare(side, torch.float32) for side in errors}
            times: dict[str, list[float]] = {side: [] for side in calls}
            for i in range(repeats + 1):
                for side, call in calls.items():
                    flush.sum()
                    taken = machine.seconds_once(call)
                    if i:  # the first warms up
                        times[side].append(taken)
            fast = next(iter(times.values()))
            rows += [_row(op, features, side, times[side], fast, limits, errors[side]) for side in times]
    return rows, about


def limit_of(op: Op, limits: dict[str, float]) -> tuple[float, str]:
    """Returns the least seconds that an op can take on a machine, and what takes them, in words."""
    move, multiply = op.must_move / limits[op.rate] / 1e9, op.operations / limits["sgemm_gflop_per_s"] / 1e9
    if multiply > move:
        return multiply, f"{op.operations / 1e9:.3g} GFLOP"
    return max(move, limits["launch_us"] / 1e6), f"{op.must_move / 1e6:,.4g} MB"


def _row(
    op: Op,
    features: int,
    side: str,
    times: Sequence[float],
    fast: Sequence[float],
    limits: dict[str, float],
    error: float,
) -> Row:
    limit, must_move = limit_of(op, limits)
    names = {
        "case": op.name,
        "batch": str(op.batch),
        "side": side,
        "features": str(features),
        "hidden_features": "x".join(map(str, HIDDEN)),
        "blocks": str(op.blocks),
        "unit": "s",
        "must_move": must_move,
    }
    ratio = statistics.median(times) / statistics.median(fast) if fast else None
    return row_of(names, times, ratio, limit, None, error)


def main() -> None:
    """Parses the command line, runs, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=FEATURES)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="of the flow that the chains take whole")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder to write to")
    asked = parser.parse_args()
    rows, about = run(asked.features, asked.blocks, asked.repeats)
    print(table(rows), about_lines(about), sep="\n\n")
    shares = [float(row["fraction_of_limit"]) for row in rows if row["side"] == "native"]
    if shares:
        print(f"\nnative: {statistics.median(shares):.0%} of the limit in the median op")
    path = asked.out / "cpu-ops.csv"
    write(rows, about, path)
    print(f"written to {path}, and as JSON beside it")


if __name__ == "__main__":
    main()
