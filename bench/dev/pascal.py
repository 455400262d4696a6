"""Predicts the times of a card that was not available, the 4 GB GTX 1050 Ti: a model, no measurement.

    python -m fastmaf.bench.dev.pascal

Each kernel that the library would launch on it (``resources.recorded``) takes the time of the bytes that it must move
or of its multiply-adds, whichever is longer, at the rates below; launches and the dependent steps of sampling are
added. The rates are those of the card's data sheet, times the shares that such kernels reach on other cards.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

import fastmaf
from fastmaf.bench.dev.resources import arguments, published_flow, recorded
from fastmaf.kernels.triton_common.device import Launched, cdiv, power_of_two


class Card(NamedTuple):
    """A card's rates.

    Attributes:
        name, arch, sms: name, compute capability and number of multiprocessors.
        bytes_per_s: a kernel's memory traffic.
        multiply_adds_per_s: a kernel's, in float32.
        launch_s: from one kernel of a graph to the next.
        step_s: one dependent phase of the level inverse: a load from the second-level cache, a sum across threads, a
            barrier.
        sm_bytes_per_s: memory traffic of one multiprocessor.
    """

    name: str
    arch: int
    sms: int
    bytes_per_s: float
    multiply_adds_per_s: float
    launch_s: float
    step_s: float
    sm_bytes_per_s: float


# Data sheet: 112 GB/s, and 768 multiply-adds a cycle at 1.39 GHz; 85% and 50% of them. A launch takes 5 µs with old
# drivers, a phase of a step 1,300 cycles. One of the six multiprocessors reaches a quarter of the memory's rate.
GTX_1050_TI = Card("GTX 1050 Ti", 61, 6, 0.85 * 112e9, 0.5 * 768 * 1.39e9, 5e-6, 1e-6, 28e9)


def seconds(launches: list[Launched], card: Card) -> float:
    """Returns the predicted time of launches other than the level inverse's."""
    return sum(max(_work(launched, card), 1e-6) + card.launch_s for launched in launches)


def _work(launched: Launched, card: Card) -> float:
    """Returns the seconds that the bytes or the multiply-adds of a launch take."""
    args = arguments(launched)
    updated = {"w_ptr", "exp_avg_ptr", "exp_avg_sq_ptr"} if args.get("WEIGHT") == "adam" else set()
    tensors = {name: value for name, value in args.items() if isinstance(value, torch.Tensor)}
    moved = sum(tensor.nbytes * (2 if name in updated else 1) for name, tensor in tensors.items())
    multiply_adds = 0
    if (weight := tensors.get("w_ptr")) is not None:
        products = (bool(args["NEED_X"]) + (args["WEIGHT"] != "none")) if "NEED_X" in args else 1
        samples = cdiv(args["n"], args["BLOCK_N"]) * args["BLOCK_N"]  # whole tiles of samples are multiplied
        multiply_adds = weight.numel() * samples * products
    return max(moved / card.bytes_per_s, multiply_adds / card.multiply_adds_per_s)


def sample_seconds(flow: fastmaf.MAF, n: int, card: Card) -> float:
    """Returns the predicted time of drawing ``n`` samples in one call."""
    per_program = power_of_two(cdiv(n, card.sms), 1, 16)
    rounds = cdiv(n, per_program * card.sms)
    busy = min(card.sms, cdiv(n, per_program))
    stream = 4 * flow.stored_weights / min(card.sm_bytes_per_s, card.bytes_per_s / busy)
    phases = sum(len(made.schedule) * len(made.layers) for made in flow._mades())
    return rounds * (stream + phases * card.step_s)


def train_step(flow: fastmaf.MAF, batch: int) -> None:
    """Takes a training step whose kernels are recorded: the tensors have no values."""
    optimizer = fastmaf.optim.FusedAdam(flow.parameters())
    optimizer.minimize(flow.log_prob(torch.zeros(batch, flow.features)).sum(), check_finite=False)


def main(card: Card = GTX_1050_TI) -> None:
    """Prints the predictions for the published run's model."""
    flow = published_flow(blocks=7)
    steps = {n: seconds(recorded(card.arch, partial(train_step, flow, n)), card) for n in (8, 64)}
    times = {f"train step, batch {n}": step for n, step in steps.items()}
    times["epoch of 219 images, batch 8"] = 28 * steps[8]
    log_prob = torch.no_grad()(flow.log_prob)
    for n in (1, 8, 64):
        launches = recorded(card.arch, partial(log_prob, torch.zeros(n, flow.features)))
        times[f"log_prob, batch {n}"] = seconds(launches, card)
    times |= {f"{n} samples": sample_seconds(flow, n, card) for n in (1, 5, 64)}
    print(f"A MODEL of the {card.name}, not a measurement: {card.bytes_per_s / 1e9:.0f} GB/s, ", end="")
    print(f"{2 * card.multiply_adds_per_s / 1e12:.1f} TFLOP/s, {card.launch_s * 1e6:.0f} µs per launch\n")
    for case, time in times.items():
        print(f"{case:<32}{time * 1e3:10.1f} ms")


if __name__ == "__main__":
    main()
