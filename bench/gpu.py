"""Times fastmaf on an NVIDIA GPU beside the naive model, a clever dense one, a compiled one and nflows.

    python -m bench.gpu

Correctness comes first: the Triton kernels against the float64 reference, then every side that holds the same function
against them. Then times, sides interleaved, each beside the time in which the bytes that must move or the operations
that must be done could be, at the rates measured in the same run.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor

import fastmaf
from bench import machine
from bench.run import RESULTS, Row, WrongResultError, interleaved, naive_sampling, rows_of, table, write
from bench.sides import Side, fast_side, masked_once_side, naive_side, nflows_side
from fastmaf.reference import NaiveMAF

TRAIN, SCORE, SAMPLE = (8, 64), (1, 8, 64, 256), (1, 5, 128)


class Bound:
    """What a case must at least take on this GPU.

    Args:
        weights: visible ones.
        limits: as ``machine.cuda_limits`` measures them.
    """

    def __init__(self, weights: int, limits: dict[str, float]) -> None:
        self.weights = weights
        self.bytes_per_s, self.flop_per_s = limits["copy_gb_per_s"] * 1e9, limits["sgemm_gflop_per_s"] * 1e9

    def __call__(self, batch: int, streams: int, products: int) -> tuple[str, float]:
        """Returns the bound in words and in seconds: weights pass ``streams`` times, and ``products`` are formed."""
        moved, done = 4 * self.weights * streams, 2 * self.weights * batch * products
        if moved / self.bytes_per_s >= done / self.flop_per_s:
            return f"{moved / 1e6:.0f} MB", moved / self.bytes_per_s
        return f"{done / 1e9:.1f} GFLOP", done / self.flop_per_s


def check(flow: fastmaf.MAF, sides: list[Side], x: Tensor) -> None:
    """Holds the kernels against float64, a step of training too, and the other sides against the kernels."""
    with fastmaf.use_backend("reference"):
        truth = copy.deepcopy(flow).double()
        expected = truth.log_prob(x.double())
        (-expected.mean()).backward()
    own = copy.deepcopy(flow)  # whose gradients no optimiser takes
    found = own.log_prob(x)
    (-found.mean()).backward()
    pairs = [("log_prob", found.detach(), expected.detach())]
    for (name, mine), theirs in zip(own.named_parameters(), truth.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        pairs.append((f"gradient of {name}", mine.grad, theirs.grad))
    for name, value, wanted in pairs:
        error = float((value.double() - wanted).norm() / wanted.norm())
        if not error < 1e-5:
            raise WrongResultError(f"{name} is off by a relative {error:.1e}")
    with torch.no_grad():
        z, _ = flow(x)
        error = float((flow.inverse(z)[0] - x).abs().max())
        if not error < 1e-3:
            raise WrongResultError(f"inverse(forward(x)) is off by {error:.1e}")
        for side in sides:
            for _ in range(2):  # the second call of a shape may be replayed
                error = float((side.log_prob(x) - expected).norm() / expected.norm())
                if not error < 1e-4:
                    raise WrongResultError(f"log_prob of {side.name!r} is off by a relative {error:.1e}")


def run(features: int, blocks: int, hidden: int, repeats: int) -> tuple[list[Row], dict[str, str]]:
    """Runs every case and returns its rows, and what they were measured on."""
    device = torch.device("cuda")
    limits = machine.cuda_limits()
    about = machine.describe() | {k: f"{v:.4g}" for k, v in limits.items()}
    about |= {"card": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "triton": triton.__version__}
    about |= {"features": str(features), "blocks": str(blocks), "hidden_features": f"{hidden}x{hidden}"}
    flow = fastmaf.MAF(features, blocks, (hidden, hidden), order="natural", seed=0, device=device)
    naive = flow.to_naive()
    x = torch.rand(max(*TRAIN, *SCORE), features, generator=torch.Generator().manual_seed(0)).to(device)
    fast = fast_side(flow, graphs=True)
    same = [fast, eager_side(flow), naive_side(naive), masked_once_side(naive), naive_side(naive, compiled=True)]
    check(flow, same, x[:8])
    bound = Bound(flow.visible_weights, limits)
    rows: list[Row] = []
    peer = peers(features, blocks, hidden, device)
    with torch.no_grad():
        for batch in SCORE:
            calls: dict[str, Callable[[], object]] = {s.name: partial(s.log_prob, x[:batch]) for s in (*same, *peer)}
            rows += rows_of("log_prob", batch, timed(calls, repeats), *bound(batch, 1, 1))
        for batch in SAMPLE:
            times = timed({"fastmaf": partial(flow.sample, batch)}, max(3, repeats // 4))
            notes = {"fastmaf": f"{levels(flow)} dependent levels"}
            if batch == 1:
                times["naive"], notes["naive"] = naive_sampling(naive, features, blocks, machine.cuda_seconds_once)
            rows += rows_of("sample", batch, times, *bound(batch, 1, 1), notes)
    for batch in TRAIN:
        # Each on a copy of its own: an optimiser that fuses takes its flow's gradients for itself.
        training = [fast_side(copy.deepcopy(flow), graphs=True), eager_side(copy.deepcopy(flow))]
        training += [naive_side(copy.deepcopy(naive)), masked_once_side(naive)]
        training += [naive_side(copy.deepcopy(naive), compiled=True), *peer]
        calls = {side.name: partial(side.train_step, x[:batch]) for side in training}
        # Forward reads a weight; the pass back with Adam reads and writes it and both moments.
        rows += rows_of("train step", batch, timed(calls, repeats), *bound(batch, 7, 3))
    rows += memory_rows(flow, naive, x[:8])
    return rows, about


def eager_side(flow: fastmaf.MAF) -> Side:
    """Returns fastmaf without CUDA graphs."""
    side = fast_side(flow)
    side.name = "fastmaf, no graphs"
    return side


def peers(features: int, blocks: int, hidden: int, device: torch.device) -> list[Side]:
    """Returns the other libraries that are installed."""
    try:
        return [nflows_side(features, blocks, hidden, device)]
    except ImportError:
        print("nflows is not installed: pip install nflows brings that side")
        return []


def timed(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Times calls on the GPU, interleaved, after warm-ups that compile and record whatever is to be."""
    for call in calls.values():
        for _ in range(4):
            call()
    return interleaved(calls, dict.fromkeys(calls, repeats), machine.cuda_seconds_once)


def levels(flow: fastmaf.MAF) -> int:
    """Returns the dependent steps of a sample."""
    return sum(len(made.schedule) for made in flow._mades())


def memory_rows(flow: fastmaf.MAF, naive: NaiveMAF, x: Tensor) -> list[Row]:
    """Measures the peak memory of three training steps, and holds fastmaf's against what it says beforehand."""
    rows: list[Row] = []
    for name, model in (("fastmaf", flow), ("naive", naive)):
        own = copy.deepcopy(model).to(x.device)
        before = torch.cuda.memory_allocated() - sum(t.nbytes for t in (*own.parameters(), *own.buffers()))
        side = fast_side(own) if isinstance(own, fastmaf.MAF) else naive_side(own)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            side.train_step(x)
        peak = torch.cuda.max_memory_allocated() - before
        note = f"{peak / 1e9:.3f} GB"
        if isinstance(own, fastmaf.MAF):
            note += f"; memory_estimate says {fastmaf.memory_estimate(own, len(x)) / 1e9:.3f} GB"
        rows.append({"case": "training memory", "batch": str(len(x)), "side": name, "note": note})
    return rows


def verdicts(rows: list[Row]) -> list[str]:
    """Returns the ratios that the project is judged by, from the rows."""

    def median(case: str, batch: int, side: str) -> float:
        found = [float(r["median_s"]) for r in rows if (r["case"], r["batch"], r["side"]) == (case, str(batch), side)]
        return found[0] if found else float("nan")

    lines = []
    for case, batch in (("train step", 8), ("log_prob", 64), ("sample", 1)):
        own = median(case, batch, "fastmaf")
        others = {r["side"] for r in rows if r["case"] == case} - {"fastmaf", "fastmaf, no graphs", "naive"}
        best = min((t for o in others if (t := median(case, batch, o)) == t), default=float("nan"))
        naive = median(case, batch, "naive")
        plain = median(case, batch, "fastmaf, no graphs")
        line = f"{case} {batch}: {own * 1e3:.3f} ms, {naive / own:.1f} × naive, {best / own:.1f} × the best peer"
        lines.append(f"{line}; without graphs {naive / plain:.1f} and {best / plain:.1f} ×")
    spread = [float(r["median_s"]) * 1e3 for r in rows if r["case"] == "sample" and r["side"] == "fastmaf"]
    lines.append(f"samples: {min(spread):.1f} to {max(spread):.1f} ms, median {statistics.median(spread):.1f}")
    return lines


def main() -> None:
    """Parses the command line, runs, prints and writes."""
    parser = argparse.ArgumentParser(description="Times fastmaf on an NVIDIA GPU beside dense models and nflows.")
    parser.add_argument("--features", type=int, default=12288)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=512, help="units of each of a block's two hidden layers")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--csv", type=Path, help="where to write; default bench/results/gpu-<card>.csv")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no NVIDIA GPU is here, or this torch is built without CUDA; python -m bench.pascal needs none")
    rows, about = run(asked.features, asked.blocks, asked.hidden, asked.repeats)
    print("\n".join(f"{k}: {v}" for k, v in about.items()), table(rows), "\n".join(verdicts(rows)), sep="\n\n")
    path = asked.csv or RESULTS / f"gpu-{about['card'].lower().replace(' ', '-')}.csv"
    write(rows, about, path)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
