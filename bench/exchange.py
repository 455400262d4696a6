"""Bytes that processes exchange in a step of training, measured, and a model of what that costs on 8 and 64 GPUs.

    python -m fastmaf.bench.exchange [--workers 2 4] [--features 12288] [--out exchange.csv]

Measured: processes connected by gloo take one step each way, and what each gives to the collectives is counted, the
second step's alone. *Received* is what a process must receive for it, whatever the algorithm: of an all-reduce of b
bytes 2 b (n - 1) / n, of an all-gather b (n - 1), of a broadcast b unless it sends them.

Modelled, not measured: a step takes ``COMPUTE`` and, beside it or after it, the time in which the bytes arrive at the
rate of the slowest link, and ``LATENCY`` a message. Beside it is the best case: all communication hidden behind the
computation. After it is the worst: none.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn

import fastmaf
from fastmaf.optim import FusedAdam

BATCH = 8  # per process
BLOCKS, HIDDEN = 7, (512, 512)
METHODS = ("factors", "sharded", "DistributedDataParallel")
COLUMNS = (
    "kind",
    "workers",
    "method",
    "messages",
    "given_mb",
    "received_mb",
    "part_of_ddp",
    "moments_mb",
    "hidden_ms",
    "exposed_ms",
    "efficiency_hidden",
    "efficiency_exposed",
)
# Of the model. One step of batch 8 on an H200: bench/results/gpu-h200.csv.
COMPUTE = 1.32e-3
# One direction of NVLink 4, half of the 900 GB/s of the H100's data sheet, within a machine of 8; between machines one
# InfiniBand NDR adapter of 400 Gb/s for each GPU (ConnectX-7's manual). 80 % of both: an assumption.
RATES = {8: 0.8 * 450e9, 64: 0.8 * 50e9}
LATENCY = 15e-6  # a message: an assumption


class Traffic(NamedTuple):
    """What one process exchanges in a step.

    Attributes:
        messages: calls of collectives.
        given: bytes of the tensors that it gives to them.
        received: bytes that it must receive for them.
    """

    messages: int = 0
    given: float = 0.0
    received: float = 0.0

    def plus(self, given: float, received: float) -> Traffic:
        return Traffic(self.messages + 1, self.given + given, self.received + received)


class Counter:
    """Counts what this process gives to ``torch.distributed``, which it replaces for that."""

    def __init__(self, size: int, rank: int) -> None:
        self.traffic, self._size, self._rank = Traffic(), size, rank
        self.originals = {name: getattr(distributed, name) for name in ("all_reduce", "all_gather", "broadcast")}

    def __enter__(self) -> Counter:
        for name in self.originals:
            setattr(distributed, name, getattr(self, name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(distributed, name, original)

    def all_reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.reduced(tensor.nbytes)
        return self.originals["all_reduce"](tensor, *args, **kwargs)

    def reduced(self, given: int) -> None:
        self.traffic = self.traffic.plus(given, 2 * given * (self._size - 1) / self._size)

    def all_gather(self, found: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.traffic = self.traffic.plus(tensor.nbytes, tensor.nbytes * (self._size - 1))
        return self.originals["all_gather"](found, tensor, *args, **kwargs)

    def broadcast(self, tensor: Tensor, source: int, *args: Any, **kwargs: Any) -> Any:
        mine = source == self._rank
        self.traffic = self.traffic.plus(tensor.nbytes * mine, tensor.nbytes * (not mine))
        return self.originals["broadcast"](tensor, source, *args, **kwargs)


class Loss(nn.Module):
    """The loss as a module, which ``DistributedDataParallel`` wraps."""

    def __init__(self, flow: fastmaf.Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(x).mean()


def ddp_step(flow: fastmaf.Flow, counter: Counter) -> Callable[[Tensor], object]:
    """Returns a step of ``DistributedDataParallel``, whose buckets are counted as they are reduced."""

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations, and these are texts here
        counter.reduced(bucket.buffer().nbytes)
        work = counter.originals["all_reduce"](bucket.buffer(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0] / distributed.get_world_size())

    wrapped = nn.parallel.DistributedDataParallel(Loss(flow), gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, hook)
    return lambda x: wrapped(x).backward()


def measured(rank: int, size: int, method: str, features: int, folder: str) -> None:
    """Takes two steps in one of the processes, and writes what the second exchanged."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    flow = fastmaf.MAF(features, BLOCKS, HIDDEN, order="natural", seed=0)
    with Counter(size, rank) as counter:
        optimizer: FusedAdam | None = None
        if method == "DistributedDataParallel":
            step = ddp_step(flow, counter)
        else:
            optimizer = FusedAdam(flow.parameters(), process_group=distributed.group.WORLD)
            step = fastmaf.TrainingStep(flow, optimizer, shard_optimizer=method == "sharded")
        for turn in range(2):
            counter.traffic = Traffic()
            step(torch.randn(BATCH, features, generator=torch.Generator().manual_seed(turn * size + rank)))
    moments = 0
    if optimizer is not None:
        moments = sum(s[name].nbytes for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    Path(folder, f"{rank}.json").write_text(json.dumps([counter.traffic, moments]))
    distributed.destroy_process_group()


def measure(size: int, method: str, features: int) -> tuple[Traffic, int]:
    """Returns the traffic and the bytes of the moments of the process that has the most of it."""
    with tempfile.TemporaryDirectory(prefix="fastmaf-bench-") as folder:
        spawn(measured, (size, method, features, folder), nprocs=size)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
    return Traffic(*max((traffic for traffic, _ in found), key=lambda t: t[2])), max(moments for _, moments in found)


def modelled(size: int, method: str, features: int) -> tuple[Traffic, int]:
    """Returns the traffic of a step of many processes, from the rules by which the bytes are chosen."""
    flow = fastmaf.MAF(features, BLOCKS, HIDDEN, order="natural", device="meta")
    parameters = [p.numel() for p in flow.parameters()]
    weights = 4.0 * sum(parameters)
    moments = 8 * sum(parameters) // (size if method == "sharded" else 1)
    if method == "DistributedDataParallel":
        buckets = -(-weights // (25 << 20))  # of 25 MiB, torch's default
        return Traffic(int(buckets), weights, 2 * weights * (size - 1) / size), moments
    traffic, small = Traffic(messages=2), sum(parameters)  # the loss, and the largest batch
    for layer in flow._layers():
        numel = layer.layout.numel
        factors = BATCH * (layer.in_features + layer.out_features)
        small -= numel
        if size * factors < 2 * numel:  # see fastmaf.training.exchange
            traffic = traffic.plus(4.0 * factors, 4.0 * factors * (size - 1))
        else:
            traffic = traffic.plus(4.0 * numel, 8.0 * numel * (size - 1) / size)
    traffic = traffic.plus(4.0 * small, 8.0 * small * (size - 1) / size)
    if method == "sharded":
        received = weights * (size - 1) / size
        messages = traffic.messages + len(parameters) + size - 1
        traffic = Traffic(messages, traffic.given + weights / size, traffic.received + received)
    return traffic, moments


def seconds_of(traffic: Traffic, size: int) -> float:
    """Returns the modelled time of a step's communication."""
    return traffic.received / RATES[size] + LATENCY * traffic.messages


def rows(sizes: Sequence[int], features: int) -> list[list[object]]:
    """Returns the rows of the table: measured with some numbers of processes, then modelled."""
    found: list[list[object]] = []
    for kind, of, counts in (("measured", measure, sizes), ("modelled", modelled, list(RATES))):
        for size in counts:
            results = {method: of(size, method, features) for method in METHODS}
            ddp = results[METHODS[-1]][0].received
            for method, (traffic, moments) in results.items():
                part = f"{traffic.received / ddp:.4f}" if ddp else ""
                row = [kind, size, method, traffic.messages, *(f"{b / 1e6:.3f}" for b in traffic[1:]), part]
                row.append(f"{moments / 1e6:.1f}" if moments else "")
                if kind == "modelled":
                    seconds = seconds_of(traffic, size)
                    beside, after = max(COMPUTE, seconds), COMPUTE + seconds
                    row += [f"{1e3 * value:.2f}" for value in (beside, after)]
                    row += [f"{COMPUTE / value:.2f}" for value in (beside, after)]
                found.append([*row, *[""] * (len(COLUMNS) - len(row))])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, and writes it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 4], help="processes of the measured steps")
    parser.add_argument("--features", type=int, default=12288, help="dimensions")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    options = parser.parse_args(arguments)
    table: list[list[object]] = [list(COLUMNS), *rows(options.workers, options.features)]
    for i, row in enumerate(table):
        print(f"| {' | '.join(map(str, row))} |" + f"\n|{' --- |' * len(row)}" * (i == 0))
    if options.out:
        with open(options.out, "w", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows(table)


if __name__ == "__main__":
    main()
