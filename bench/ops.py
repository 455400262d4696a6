"""Times every op beside what must move for it: ``python -m bench.ops``.

One block's layers at the size of the capsule run, batches 1, 8 and 64. The bound of an op is the larger of the time to
move its bytes at this machine's read (or, for Adam, fused Adam's) rate and the time of its multiply-adds at the matrix
rate, both measured in the same process. Results are checked against the reference backend in float64 first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastmaf
from bench import machine
from bench.run import RESULTS, Row, WrongResultError, rows_of, table, write
from fastmaf.kernels import backends
from fastmaf.kernels.factors import AdamNumbers

ADAM = AdamNumbers(1, 1e-4, 0.9, 0.999, 1e-8, 0.0, False, False)


Prepare = Callable[[str, torch.dtype], Callable[[], Any]]


class Op(NamedTuple):
    """One op on one layer: its call made ready by backend and dtype, what it moves and how often it multiplies."""

    name: str
    prepare: Prepare
    weights: int  # visible, of all layers that it takes
    products: int  # with the batch
    moved: int  # how often each weight's number (or moment's) is read or written
    rate: str  # the machine's limit for that


def module(op: str, backend: str) -> Any:
    """Returns a backend's module of an op, as the op would call it."""
    with fastmaf.use_backend(backend):
        return backends.implementation(op, torch.empty(0))


def ops_of(block: fastmaf.AffineAutoregressive, batch: int) -> list[Op]:
    """Returns the ops on the layers of one block, on fresh inputs."""
    made = block.made
    first, second, output = made.layers
    generator = torch.Generator().manual_seed(batch)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    x, h, grad_x, grad_h = (draw(batch, n) for n in (made.features, 512, made.features, 512))
    grad_ladj = draw(batch)

    def to(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.detach().to(dtype) for t in tensors)

    def layer_of(layer: fastmaf.MaskedLinear, dtype: torch.dtype) -> tuple[Any, ...]:
        return (*to(dtype, layer.weight, layer.bias), layer.prefix, layer.layout.table)

    def forward(layer: fastmaf.MaskedLinear, given: Tensor) -> Prepare:
        return lambda backend, dtype: partial(
            module("masked_linear", backend).forward, *to(dtype, given), *layer_of(layer, dtype), "relu"
        )

    def backward(layer: fastmaf.MaskedLinear, given: Tensor, what: str) -> Prepare:
        def call(backend: str, dtype: torch.dtype) -> Callable[[], Any]:
            own = module("masked_linear", backend)
            weight, _, prefix, table_ = layer_of(layer, dtype)
            batch_ = to(dtype, grad_h, given, h)
            if what == "inputs":
                return partial(own.grad_inputs, *batch_, weight, prefix, table_, "relu", True)
            if what == "weight":
                return partial(own.backward, *batch_, weight, prefix, table_, "relu", True)
            weight, moments = moving(layer, weight)
            step = partial(own.adam_, *batch_, weight, prefix, table_, "relu", True, *moments, ADAM, 1.0)
            return lambda: (*step(), weight)

        return call

    def affine(what: str) -> Prepare:
        def call(backend: str, dtype: torch.dtype) -> Callable[[], Any]:
            own = module("affine_output", backend)
            weight, bias, prefix, table_ = layer_of(output, dtype)
            bound = block.log_scale_bound, block.soft_bound
            if what == "forward":
                return partial(own.forward, *to(dtype, h), weight, bias, *to(dtype, x), prefix, table_, *bound)
            batch_ = to(dtype, grad_x, grad_ladj, grad_x, h, x, 0.1 * x)
            if what == "inputs":
                return partial(own.grad_inputs, *batch_, weight, prefix, table_, *bound, True)
            if what == "weight":
                return partial(own.backward, *batch_[:4], weight, *batch_[4:], prefix, table_, *bound)
            weight, moments = moving(output, weight)
            step = partial(own.adam_, *batch_, weight, prefix, table_, *bound, True, *moments, ADAM, 1.0)
            return lambda: (*step(), weight)

        return call

    def inverse(backend: str, dtype: torch.dtype) -> Callable[[], Any]:
        given = block.block()._replace(
            weights=list(to(dtype, *(layer.weight for layer in made.layers))),
            biases=list(to(dtype, *(layer.bias for layer in made.layers))),
        )
        return partial(module("level_inverse", backend).forward, *to(dtype, x), *given)

    sizes = [layer.layout.visible for layer in made.layers]
    result = [
        Op("masked_linear D → H", forward(first, x), sizes[0], 1, 1, "read_gb_per_s"),
        Op("masked_linear H → H", forward(second, h), sizes[1], 1, 1, "read_gb_per_s"),
        Op("affine_output", affine("forward"), sizes[2], 1, 1, "read_gb_per_s"),
        Op("masked_linear D → H, grad of input", backward(first, x, "inputs"), sizes[0], 1, 1, "read_gb_per_s"),
        Op("affine_output, grad of input", affine("inputs"), sizes[2], 1, 1, "read_gb_per_s"),
        Op("masked_linear D → H, grads", backward(first, x, "weight"), sizes[0], 2, 2, "copy_gb_per_s"),
        Op("affine_output, grads", affine("weight"), sizes[2], 2, 2, "copy_gb_per_s"),
        Op("masked_linear D → H, grad and Adam", backward(first, x, "adam"), sizes[0], 2, 6, "adam_gb_per_s"),
        Op("affine_output, grad and Adam", affine("adam"), sizes[2], 2, 6, "adam_gb_per_s"),
        Op("level_inverse", inverse, sum(sizes), 1, 1, "read_gb_per_s"),
    ]
    return result


# Adam writes: each call's weight and moments are kept, so that calls after the first find them where they were.
_moving: dict[tuple[int, torch.dtype], tuple[Tensor, tuple[Tensor, Tensor]]] = {}


def moving(layer: fastmaf.MaskedLinear, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns a copy of a layer's weight that may be written to, and its moments."""
    key = id(layer), weight.dtype
    if key not in _moving:
        _moving[key] = weight.clone(), (torch.zeros_like(weight), torch.zeros_like(weight))
    return _moving[key]


def check(op: Op, backend: str) -> None:
    """Holds an op's float32 results against the float64 reference."""
    _moving.clear()
    found, expected = op.prepare(backend, torch.float32)(), op.prepare("reference", torch.float64)()
    _moving.clear()
    pairs = zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, expected)), strict=True)
    for own, truth in pairs:
        error = float((own.double() - truth).norm() / truth.norm().clamp_min(1e-30))
        if not error < 1e-5:
            raise WrongResultError(f"{op.name} of {backend!r} is off by a relative {error:.1e}")


def run(features: int, repeats: int) -> tuple[list[Row], dict[str, str]]:
    """Checks and times every op, native beside reference where there is a native library."""
    limits = machine.limits()
    about = machine.describe() | {k: f"{v:.4g}" for k, v in limits.items()}
    about |= {"features": str(features), "blocks": "1", "hidden_features": "512x512"}
    flow = fastmaf.MAF(features, 1, (512, 512), order="natural", seed=0).requires_grad_(False)
    block = flow.transforms[0]
    assert isinstance(block, fastmaf.AffineAutoregressive)
    sides = [b for b in ("native", "reference") if all(backends.missing(op, b) is None for op in backends.OPS)]
    rows: list[Row] = []
    # Streams through more than any cache between two calls, as the other layers of a flow would.
    flush = torch.ones(32 * 2**20)
    for batch in (1, 8, 64):
        for op in ops_of(block, batch):
            for side in sides:
                check(op, side)
            calls = {side: op.prepare(side, torch.float32) for side in sides}
            times: dict[str, list[float]] = {side: [] for side in sides}
            for i in range(repeats + 1):
                for side in sides:
                    flush.sum()
                    taken = machine.seconds_once(calls[side])
                    if i:
                        times[side].append(taken)
            move = 4 * op.moved * op.weights / limits[op.rate] / 1e9
            multiply = 2 * op.products * batch * op.weights / limits["sgemm_gflop_per_s"] / 1e9
            words = f"{4e-6 * op.moved * op.weights:.1f} MB"
            if multiply > move:
                words = f"{2e-9 * op.products * batch * op.weights:.2f} GFLOP"
            rows += rows_of(op.name, batch, times, words, max(move, multiply))
    return rows, about


def main() -> None:
    """Parses the command line, runs, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=12288)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--csv", type=Path, help="where to write; default bench/results/cpu_ops.csv")
    asked = parser.parse_args()
    rows, about = run(asked.features, asked.repeats)
    print("\n".join(f"{k}: {v}" for k, v in about.items()), table(rows), sep="\n\n")
    shares = [float(row["fraction_of_limit"]) for row in rows if row["side"] == "native"]
    if shares:
        print(f"\nnative: {statistics.median(shares):.0%} of the limit in the median op")
    path = asked.csv or RESULTS / "cpu_ops.csv"
    write(rows, about, path)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
