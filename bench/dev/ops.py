"""Times the parts of a flow with pytest-benchmark, on each of the CPU's backends, at batches of 1, 8 and 64.

    python -m fastmaf.bench.dev.ops -k "inverse and native" --benchmark-autosave --benchmark-compare

takes all options of pytest. ``FASTMAF_BENCH_FEATURES`` sets D. The results of each part are compared with the float64
reference before it is timed. The name of each group states the bytes that the part must move and the time that this
takes at the rates of the machine (with ``--benchmark-disable`` these are not measured).
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastmaf.bench
from fastmaf.bench import machine
from fastmaf.bench.check import WrongResultError
from fastmaf.bench.labels import amount
from fastmaf.kernels import backends

BATCHES = (1, 8, 64)
FEATURES = int(os.environ.get("FASTMAF_BENCH_FEATURES", 12_288))
ROUNDS = 15
LARGEST = 1e-5  # norm-wise relative error of a float32 result

Call = Callable[[], Any]


class Op(NamedTuple):
    """A part of a flow.

    Attributes:
        prepare: returns a call of it for a flow and a batch of x, from which its other inputs are derived.
        weights: returns how many visible weights it uses.
        products: how often each weight is multiplied with the batch.
        moved: how often each weight, or a number beside it, is read or written.
        rate: the machine's limit for that.
    """

    prepare: Callable[[fastmaf.MAF, Tensor], Call]
    weights: Callable[[fastmaf.MAF], int]
    products: int = 1
    moved: int = 1
    rate: str = "read"


def _block(flow: fastmaf.MAF) -> fastmaf.AffineAutoregressive:
    return next(part for part in flow.transforms if isinstance(part, fastmaf.AffineAutoregressive))


def _input(flow: fastmaf.MAF, layer: int, x: Tensor) -> Tensor:
    """Returns the input of a layer of the first block."""
    with torch.no_grad():
        for k in range(layer):
            x = _block(flow).made.layers[k](x)
    return x


def _backward(call: Callable[[Tensor], Any], x: Tensor, parameters: list[Tensor]) -> Call:
    """Returns the backward pass for the gradients of the input and of ``parameters``."""
    x = x.detach().requires_grad_()
    outputs = call(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y) for y in outputs]
    return lambda: torch.autograd.grad(outputs, [x, *parameters], grads, retain_graph=True)


def _layer(index: int, kind: str = "forward") -> Op:
    def prepare(flow: fastmaf.MAF, x: Tensor) -> Call:
        layer, x = _block(flow).made.layers[index], _input(flow, index, x)
        if kind == "forward":
            return partial(layer, x)
        layer.requires_grad_(kind == "grads")
        return _backward(layer, x, list(layer.parameters()) if kind == "grads" else [])

    def weights(flow: fastmaf.MAF) -> int:
        return _block(flow).made.layers[index].layout.visible

    # Backward reads a weight and writes its gradient.
    return Op(prepare, weights, 2, 2, "copy") if kind == "grads" else Op(prepare, weights)


def _of_block(flow: fastmaf.MAF) -> int:
    return sum(layer.layout.visible for layer in _block(flow).made.layers)


def _step(flow: fastmaf.MAF, x: Tensor) -> Call:
    flow.requires_grad_()
    kind = fastmaf.optim.FusedAdam if x.dtype == torch.float32 else torch.optim.Adam
    step = fastmaf.TrainingStep(flow, kind(flow.parameters(), lr=1e-4, eps=1e-4))

    def call() -> Tensor:
        step(x)
        return _block(flow).made.layers[0].weight.detach()

    return call


def _grads_of_block(flow: fastmaf.MAF, x: Tensor) -> Call:
    block = _block(flow).requires_grad_()
    return _backward(block, x, list(block.parameters()))


OPS = {
    "masked_linear D to H": _layer(0),
    "masked_linear H to H": _layer(1),
    "masked_linear H to 2D": _layer(2),
    "masked_linear D to H, gradient of input": _layer(0, "gradient of input"),
    "masked_linear D to H, gradients": _layer(0, "grads"),
    "masked_linear H to 2D, gradients": _layer(2, "grads"),
    "block, forward": Op(lambda flow, x: partial(_block(flow), x), _of_block),
    "block, gradients": Op(_grads_of_block, _of_block, 2, 2, "copy"),
    "block, inverse": Op(lambda flow, x: partial(_block(flow).inverse, x), _of_block),
    "flow, forward": Op(lambda flow, x: partial(flow, x), lambda flow: flow.visible_weights),
    "flow, inverse": Op(lambda flow, x: partial(flow.inverse, x), lambda flow: flow.visible_weights),
    "flow, training step": Op(_step, lambda flow: flow.visible_weights, 3, 7, "adam"),
}


@cache
def flow_of(features: int = FEATURES, blocks: int = 7) -> fastmaf.MAF:
    """Returns a flow of the published run's size, in natural order."""
    return fastmaf.MAF(features, blocks, (512, 512), order="natural", seed=0)


def present() -> list[str]:
    """Returns the available backends of the CPU, fastest first."""
    return [name for name in ("native", "reference") if all(backends.missing(op, name) is None for op in backends.OPS)]


def prepared(op: Op, flow: fastmaf.MAF, batch: int, backend: str, dtype: torch.dtype) -> Call:
    """Returns a call of an op on a backend."""
    x = torch.rand(batch, flow.features, generator=torch.Generator().manual_seed(batch)).to(dtype)
    flow = copy.deepcopy(flow).to(dtype).requires_grad_(False)
    with fastmaf.use_backend(backend):
        call = op.prepare(flow, x)

    def on_backend() -> Any:
        with fastmaf.use_backend(backend):
            return call()

    return on_backend


def check(name: str, flow: fastmaf.MAF, batch: int, backend: str) -> float:
    """Returns the largest norm-wise relative error of an op's float32 results.

    Raises:
        WrongResultError: it is too large.
    """
    found, expected = (
        prepared(OPS[name], flow, batch, *how)() for how in ((backend, torch.float32), ("reference", torch.float64))
    )
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True)
    errors = [float((y.detach().double() - truth).norm() / truth.norm().clamp_min(1e-30)) for y, truth in pairs]
    for error in errors:
        if not error < LARGEST:  # NaN as well
            raise WrongResultError(f"{name} of {backend!r} is off by a relative {error:.1e}")
    return max(errors)


@pytest.fixture(scope="session")
def limits(request: pytest.FixtureRequest) -> dict[str, float]:
    """The rates of the machine."""
    return {} if request.config.getoption("benchmark_disable") else machine.limits()


@pytest.fixture(scope="session")
def flush() -> Iterator[Callable[[], None]]:
    """Empties the caches, as the other layers of a flow would between two calls."""
    large = torch.ones(32 * 2**20)
    yield lambda: (large.sum(), None)[1]


@pytest.mark.parametrize("backend", present())
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", OPS)
def test_op(
    benchmark: BenchmarkFixture, name: str, batch: int, backend: str, limits: dict[str, float], flush: Call
) -> None:
    op, flow = OPS[name], flow_of()
    error = check(name, flow, batch, backend)
    weights = op.weights(flow)
    move, multiply = 4.0 * op.moved * weights, 2.0 * op.products * batch * weights
    benchmark.group = f"{name}, batch {batch}: {move / 1e6:,.4g} MB"
    if limits:
        times = (move / limits[f"{op.rate}_gb_per_s"] / 1e9, multiply / limits["sgemm_gflop_per_s"] / 1e9)
        benchmark.group += f", at least {amount(max(*times, limits['launch_us'] / 1e6), 's')}"
    benchmark.extra_info |= {"must_move_bytes": move, "operations": multiply, "error": error}
    call = prepared(op, flow, batch, backend, torch.float32)
    benchmark.pedantic(call, setup=flush, rounds=ROUNDS, warmup_rounds=1)


def main() -> None:
    """Runs pytest on this file."""
    # In a checkout pytest would import the folder under its own name.
    sys.modules["bench"], sys.modules["bench.dev"] = fastmaf.bench, sys.modules["fastmaf.bench.dev"]
    raise SystemExit(pytest.main([__file__, *sys.argv[1:]]))


if __name__ == "__main__":
    main()
