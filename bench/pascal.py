"""A model of a card that is not here, the 4 GB GTX 1050 Ti: no measurement.

    python -m fastmaf.bench.pascal

Each kernel that the library would launch on it (``triton_parts.recording``) takes as long as the bytes that it must
move, or the multiply-adds that it must do, at the rates below; launches and the dependent steps of a sample come on
top. The rates are the card's data sheet times the shares that such kernels reach elsewhere.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch

import fastmaf
from fastmaf.bench.resources import recorded
from fastmaf.kernels.triton_common.device import Launched


class Card(NamedTuple):
    """A card's rates.

    Attributes:
        name, arch, sms: which it is.
        bytes_per_s: a kernel's from and to memory.
        multiply_adds_per_s: a kernel's, in float32.
        launch_s: from one kernel of a graph to the next.
        step_s: one dependent phase of the level inverse: a load from the second-level cache, a sum across threads, a
            barrier.
        sm_bytes_per_s: what one multiprocessor can have streamed.
    """

    name: str
    arch: int
    sms: int
    bytes_per_s: float
    multiply_adds_per_s: float
    launch_s: float
    step_s: float
    sm_bytes_per_s: float


# By the data sheet 112 GB/s, and 768 multiply-adds a cycle at 1.39 GHz: 85 % and 50 % of them. 5 µs a launch is what
# old drivers take. A phase of a step: some 1,300 cycles. One SM of the six: a quarter of the memory's rate.
GTX_1050_TI = Card("GTX 1050 Ti", 61, 6, 0.85 * 112e9, 0.5 * 768 * 1.39e9, 5e-6, 1e-6, 28e9)


def seconds(launches: list[Launched], card: Card) -> float:
    """Returns the predicted time of launches other than the level inverse's."""
    return sum(max(*_work(one, card), 1e-6) + card.launch_s for one in launches)


def _work(one: Launched, card: Card) -> tuple[float, float]:
    """Returns the seconds that the bytes and the multiply-adds of a launch take."""
    tensors = [(n, t) for n, t in zip(one.kernel.arg_names, one.args, strict=False) if isinstance(t, torch.Tensor)]
    args = {**dict(zip(one.kernel.arg_names, one.args, strict=False)), **one.options}
    updated = {"w_ptr", "exp_avg_ptr", "exp_avg_sq_ptr"} if args.get("WEIGHT") == "adam" else set()
    moved = sum(t.nbytes * (2 if name in updated else 1) for name, t in tensors)
    weight = args.get("w_ptr")
    if weight is None:
        return moved / card.bytes_per_s, 0.0
    products = (bool(args["NEED_X"]) + (args["WEIGHT"] != "none")) if "NEED_X" in args else 1
    # A tile of samples is multiplied whole, however many of its rows hold one.
    tiles = -(-args["n"] // args["BLOCK_N"]) * args["BLOCK_N"]
    return moved / card.bytes_per_s, weight.numel() * tiles * products / card.multiply_adds_per_s


def sample_seconds(flow: fastmaf.MAF, n: int, card: Card) -> float:
    """Returns the predicted time of ``n`` samples in one call: streams and dependent steps, program after program."""
    per_program = min(16, 1 << max(0, -(-n // card.sms) - 1).bit_length())
    rounds = -(-n // (per_program * card.sms))
    busy = min(card.sms, -(-n // per_program))
    stream = 4 * flow.stored_weights / min(card.sm_bytes_per_s, card.bytes_per_s / busy)
    phases = sum(len(made.schedule) * len(made.layers) for made in flow._mades())
    return rounds * (stream + phases * card.step_s)


def predictions(card: Card = GTX_1050_TI) -> list[tuple[str, float]]:
    """Returns (what, seconds) for the reference model."""
    flow = fastmaf.MAF(12_288, 7, (512, 512), order="natural", init="empty", validate_args=False)
    rows = []
    for batch in (8, 64):
        step = recorded(card.arch, lambda b=batch: _train(flow, b))  # type: ignore[misc]
        rows.append((f"train step, batch {batch}", seconds(step, card)))
    rows.append(("epoch of 219 images, batch 8", 28 * rows[0][1]))
    for batch in (1, 8, 64):
        x = torch.zeros(batch, flow.features)
        with torch.no_grad():
            passes = recorded(card.arch, lambda x=x: flow.log_prob(x))  # type: ignore[misc]
        rows.append((f"log_prob, batch {batch}", seconds(passes, card)))
    rows += [(f"{n} samples", sample_seconds(flow, n, card)) for n in (1, 5, 64)]
    return rows


def _train(flow: fastmaf.MAF, batch: int) -> None:
    optimizer = fastmaf.optim.FusedAdam(flow.parameters())
    optimizer.minimize(flow.log_prob(torch.zeros(batch, flow.features)).sum(), check_finite=False)  # nothing has values


def main() -> None:
    """Prints the predictions."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    card = GTX_1050_TI
    print(f"A MODEL of the {card.name}, not a measurement: {card.bytes_per_s / 1e9:.0f} GB/s, ", end="")
    print(f"{2 * card.multiply_adds_per_s / 1e12:.1f} TFLOP/s, {card.launch_s * 1e6:.0f} µs a launch\n")
    for what, time in predictions(card):
        print(f"{what:<32}{time * 1e3:10.1f} ms")


if __name__ == "__main__":
    main()
