"""Runs one op of a flow of the published run's size a few times, for profilers and sanitizers.

    ncu --clock-control none --profile-from-start off python -m fastmaf.bench.dev.one "train step" 8

Kernels are compiled in a first call, before the part that ``cudaProfilerStart`` marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastmaf
from fastmaf.kernels.triton_common.device import target
from fastmaf.training.captured_updates import CapturedUpdates
from fastmaf.training.cuda_graphs import record

NAMES = ("log_prob", "train step", "sample")


class Op(NamedTuple):
    """A call of a flow.

    Attributes:
        run: makes the call as a user does, without the checks that wait for a GPU; the result depends on nothing else.
        captured: on a GPU makes the same one within a CUDA graph, and returns that graph's replay, which needs no
            Python; RuntimeError where it cannot be captured.
    """

    run: Callable[[], Tensor]
    captured: Callable[[], Callable[[], object]]


def op(flow: fastmaf.MAF, name: str, batch: int) -> Op:
    """Returns an op on a batch that is the same each time; a training step leaves the weights as they are."""
    device = next(flow.parameters()).device
    x = torch.rand(batch, flow.features, generator=torch.Generator().manual_seed(0)).to(device)
    if name != "train step":
        method = flow.log_prob if name == "log_prob" else lambda z: flow.inverse(z)[0]
        run = torch.no_grad()(lambda: method(x))
        return Op(run, lambda: record(lambda: (run(), None)[1], device).replay)
    # With betas of 0 the first moment is the gradient.
    optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=0.0, betas=(0.0, 0.0))
    weight = next(flow.parameters())

    def step() -> Tensor:
        optimizer.minimize(-flow.log_prob(x).mean(), check_finite=False)  # the check would wait for the GPU
        moment: Tensor = optimizer.state[weight]["exp_avg"]
        return moment

    def captured() -> Callable[[], object]:
        flow.zero_padding_()  # here, so that it is not captured
        updates = CapturedUpdates(optimizer)
        graph = record(lambda: updates.minimize(-flow.log_prob(x).mean()), device)
        updates.prepare()
        return graph.replay

    return Op(step, captured)


def has_precision(name: Any, like: Tensor) -> bool:
    """Returns whether the card of a tensor has a precision; prints why it has not."""
    try:
        with fastmaf.use_precision(name):
            target(like)
    except ValueError as error:
        print(f"skipped: {error}", flush=True)
        return False
    return True


def add_size(parser: argparse.ArgumentParser, blocks: int = 7) -> None:
    """Adds the options of ``flow_of``."""
    parser.add_argument("--features", type=int, default=12_288)
    parser.add_argument("--blocks", type=int, default=blocks)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--order", default="natural")
    parser.add_argument("--device", default="cuda")


def flow_of(options: argparse.Namespace) -> fastmaf.MAF:
    """Returns a flow of two hidden layers."""
    return fastmaf.MAF(
        options.features,
        options.blocks,
        (options.hidden, options.hidden),
        order=options.order,
        log_scale_bound=5.0,
        soft_bound=False,
        seed=0,
        device=options.device,
    )


def main() -> None:
    """Runs the op."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=NAMES)
    parser.add_argument("batch", type=int)
    add_size(parser)
    parser.add_argument("--precision", default="ieee")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    with fastmaf.use_backend("triton"), fastmaf.use_precision(options.precision):
        run = op(flow_of(options), options.op, options.batch).run
        run()
        if options.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        for _ in range(options.repeats):
            result = run()
        if options.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
    print(f"{options.op} {options.batch}: {options.repeats} calls, sum {float(result.double().sum()):.6g}")


if __name__ == "__main__":
    main()
