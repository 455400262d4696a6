"""Times the parts of a flow with pytest-benchmark, on each of the CPU's backends, at batches of 1, 8 and 64.

    python -m fastmaf.bench.dev.ops -k "inverse and native" --benchmark-autosave --benchmark-compare

takes all options of pytest. ``FASTMAF_BENCH_FEATURES`` sets D. The results of each part are compared with the float64
reference before it is timed. The name of each group states the bytes or operations that the part needs and the time
that they take at the measured rates of the machine.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastmaf.bench
from fastmaf.bench import machine
from fastmaf.bench.cases import Case, log_prob, train_step
from fastmaf.bench.check import WrongResultError
from fastmaf.bench.labels import amount
from fastmaf.kernels import dispatch

BATCHES = (1, 8, 64)
FEATURES = int(os.environ.get("FASTMAF_BENCH_FEATURES", 12_288))
ROUNDS = 15
LARGEST = 1e-5  # norm-wise relative error of a float32 result

Call = Callable[[], Any]
FORWARD, STEP = log_prob(0), train_step(0)
GRADIENTS = Case("gradients", 0, (), 2, "copy", 2)  # reads a weight and writes its gradient


class Op(NamedTuple):
    """A part of a flow.

    Attributes:
        prepare: returns a call of it for a flow and a batch of x, from which its other inputs are derived.
        layers: of the first block that it uses; None for the whole flow.
        case: the bytes and operations that it needs.
    """

    prepare: Callable[[fastmaf.MAF, Tensor], Call]
    layers: Sequence[int] | None
    case: Case = FORWARD


def _block(flow: fastmaf.MAF) -> fastmaf.AffineAutoregressive:
    return next(part for part in flow.transforms if isinstance(part, fastmaf.AffineAutoregressive))


def _backward(call: Callable[[Tensor], Any], x: Tensor, parameters: list[Tensor]) -> Call:
    """Returns the backward pass for the gradients of the input and of ``parameters``."""
    x = x.detach().requires_grad_()
    outputs = _as_tuple(call(x))
    grads = [torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y) for y in outputs]
    return lambda: torch.autograd.grad(outputs, [x, *parameters], grads, retain_graph=True)


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _layer(index: int, kind: str = "forward") -> Op:
    def prepare(flow: fastmaf.MAF, x: Tensor) -> Call:
        layers = _block(flow).made.layers
        for k in range(index):
            x = layers[k](x)
        layer = layers[index].requires_grad_(kind == "gradients")
        if kind == "forward":
            return partial(layer, x)
        return _backward(layer, x, list(layer.parameters()) if kind == "gradients" else [])

    return Op(prepare, (index,), GRADIENTS if kind == "gradients" else FORWARD)


def _gradients_of_block(flow: fastmaf.MAF, x: Tensor) -> Call:
    block = _block(flow).requires_grad_()
    return _backward(block, x, list(block.parameters()))


def _step(flow: fastmaf.MAF, x: Tensor) -> Call:
    flow.requires_grad_()
    kind = fastmaf.optim.FusedAdam if x.dtype == torch.float32 else torch.optim.Adam
    step = fastmaf.TrainingStep(flow, kind(flow.parameters(), lr=1e-4, eps=1e-4))

    def call() -> Tensor:
        step(x)
        return _block(flow).made.layers[0].weight.detach()

    return call


OPS = {
    "masked_linear D to H": _layer(0),
    "masked_linear H to H": _layer(1),
    "masked_linear H to 2D": _layer(2),
    "masked_linear D to H, gradient of input": _layer(0, "gradient of input"),
    "masked_linear D to H, gradients": _layer(0, "gradients"),
    "masked_linear H to 2D, gradients": _layer(2, "gradients"),
    "block, forward": Op(lambda flow, x: partial(_block(flow), x), (0, 1, 2)),
    "block, gradients": Op(_gradients_of_block, (0, 1, 2), GRADIENTS),
    "block, inverse": Op(lambda flow, x: partial(_block(flow).inverse, x), (0, 1, 2)),
    "flow, forward": Op(lambda flow, x: partial(flow, x), None),
    "flow, inverse": Op(lambda flow, x: partial(flow.inverse, x), None),
    "flow, training step": Op(_step, None, STEP),
}


@cache
def published_flow() -> fastmaf.MAF:
    """Returns a flow of the published run's size, in natural order."""
    return fastmaf.MAF(FEATURES, 7, (512, 512), order="natural", log_scale_bound=5.0, soft_bound=False, seed=0)


def present() -> list[str]:
    """Returns the available backends of the CPU, fastest first."""
    return [name for name in ("native", "torch") if all(dispatch.missing(op, name) is None for op in dispatch.OPS)]


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
    results = prepared(OPS[name], flow, batch, backend, torch.float32)()
    truths = prepared(OPS[name], flow, batch, "torch", torch.float64)()
    pairs = zip(_as_tuple(results), _as_tuple(truths), strict=True)
    errors = [float((y.detach().double() - truth).norm() / truth.norm().clamp_min(1e-30)) for y, truth in pairs]
    for error in errors:
        if not error < LARGEST:  # NaN as well
            raise WrongResultError(f"{name} of {backend!r} is off by a relative {error:.1e}")
    return max(errors)


rates = cache(machine.limits)
# Larger than any cache: the other layers of a flow would empty them between two calls.
large = cache(partial(torch.ones, 32 * 2**20))


@pytest.mark.parametrize("backend", present())
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", OPS)
def test_op(benchmark: BenchmarkFixture, name: str, batch: int, backend: str) -> None:
    op, flow = OPS[name], published_flow()
    error = check(name, flow, batch, backend)
    layers = _block(flow).made.layers
    weights = flow.visible_weights if op.layers is None else sum(layers[i].layout.visible for i in op.layers)
    limit, must_move = op.case._replace(batch=batch).limit(weights, 4, rates())
    benchmark.group = f"{name}, batch {batch}: at least {amount(limit, 's')} ({must_move})"
    benchmark.extra_info |= {"limit_s": limit, "error": error}
    call = prepared(op, flow, batch, backend, torch.float32)
    benchmark.pedantic(call, setup=lambda: (large().sum(), None)[1], rounds=ROUNDS, warmup_rounds=1)


def main() -> None:
    """Runs pytest on this file."""
    # In a checkout pytest would import the folder under its own name.
    sys.modules["bench"], sys.modules["bench.dev"] = fastmaf.bench, sys.modules["fastmaf.bench.dev"]
    raise SystemExit(pytest.main([__file__, *sys.argv[1:]]))


if __name__ == "__main__":
    main()
