"""The ops that are timed one by one: their inputs, what must move for them, and their check against float64.

Those of a layer are timed on the layers of a flow's first block, the chains of blocks on all of it. The ops are called
below ``torch.library``, as a backend's functions: what a call of Python costs beside them is not theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastmaf
from fastmaf.bench.check import WrongResultError
from fastmaf.kernels import dispatch
from fastmaf.kernels.adam.update import AdamNumbers, Update
from fastmaf.kernels.affine_output.args import AffineArgs, AffineBatch
from fastmaf.kernels.flow.args import Block, flow_args
from fastmaf.kernels.masked_linear.args import LinearArgs, LinearBatch

ADAM = AdamNumbers(1, 1e-4, 0.9, 0.999, 1e-8, 0.0, False, False)
BATCHES = (1, 8, 64)
FEATURES, HIDDEN, BLOCKS = 12_288, (512, 512), 7  # of the capsule run
LARGEST = 1e-5  # relative error of a float32 result, norm-wise

Prepare = Callable[[str, torch.dtype], Callable[[], Any]]


class Op(NamedTuple):
    """One op with its inputs.

    Attributes:
        name: as printed.
        prepare: returns a call of it that is ready to run, by backend and dtype.
        batch: how many rows its inputs have.
        blocks: how many it takes; 1 where it takes a single layer.
        weights: visible ones, of all layers that it takes.
        products: how many times each weight is multiplied with the batch.
        moved: how many times each weight, or a number beside it, is read or written.
        rate: the machine's limit for that.
    """

    name: str
    prepare: Prepare
    batch: int
    blocks: int
    weights: int
    products: int
    moved: int
    rate: str

    @property
    def must_move(self) -> int:
        """The bytes that must be read and written."""
        return 4 * self.moved * self.weights

    @property
    def operations(self) -> int:
        """The multiplications and additions that must be done."""
        return 2 * self.products * self.batch * self.weights


def flow_of(features: int = FEATURES, blocks: int = BLOCKS) -> fastmaf.MAF:
    """Returns the flow whose ops are timed; its blocks are in natural order, as in the published run."""
    return fastmaf.MAF(features, blocks, HIDDEN, order="natural", seed=0).requires_grad_(False)


def present() -> list[str]:
    """Returns the CPU's backends that are here, fastest first."""
    return [name for name in ("native", "torch") if all(dispatch.missing(op, name) is None for op in dispatch.OPS)]


def module(op: str, backend: str) -> Any:
    """Returns a backend's module of an op, as the op would call it."""
    with fastmaf.use_backend(backend):
        return dispatch.implementation(op, torch.empty(0))


def ops_of(flow: fastmaf.Flow, batch: int) -> list[Op]:
    """Returns the ops on the first block's layers and on all blocks, on fresh inputs."""
    blocks = [transform for transform in flow.transforms if isinstance(transform, fastmaf.AffineAutoregressive)]
    first, second, output = blocks[0].made.layers
    given = _inputs(first, batch)
    linear, affine = partial(_linear, given), partial(_affine, blocks[0], given)
    sizes = [layer.layout.visible for layer in blocks[0].made.layers]

    def one(name: str, prepare: Prepare, weights: int, products: int = 1, moved: int = 1, rate: str = "read") -> Op:
        return Op(name, prepare, batch, 1, weights, products, moved, f"{rate}_gb_per_s")

    def whole(name: str, function: str, order: int) -> Op:
        prepare = _flow([block.block() for block in blocks[::order]], given, function)
        return Op(name, prepare, batch, len(blocks), flow.visible_weights, 1, 1, "read_gb_per_s")

    # The way back reads a weight and writes its gradient; with Adam it reads and writes the weight and two moments.
    grads, adam = (2, 2, "copy"), (2, 6, "adam")
    return [
        one("masked_linear D → H", linear(first, "x", "forward"), sizes[0]),
        one("masked_linear H → H", linear(second, "h", "forward"), sizes[1]),
        one("affine_output", affine("forward"), sizes[2]),
        one("masked_linear D → H, grad of input", linear(first, "x", "grad_inputs"), sizes[0]),
        one("affine_output, grad of input", affine("grad_inputs"), sizes[2]),
        one("masked_linear D → H, grads", linear(first, "x", "backward"), sizes[0], *grads),
        one("affine_output, grads", affine("backward"), sizes[2], *grads),
        one("masked_linear D → H, grad and Adam", linear(first, "x", "adam_"), sizes[0], *adam),
        one("affine_output, grad and Adam", affine("adam_"), sizes[2], *adam),
        one("flow_inverse, one block", _flow([blocks[0].block()], given, "inverse"), sum(sizes)),
        whole("flow_forward", "forward", 1),
        whole("flow_inverse", "inverse", -1),
    ]


def check(op: Op, backend: str) -> float:
    """Holds an op's float32 results against those of the float64 reference.

    Returns:
        The largest relative error among them, norm-wise.

    Raises:
        WrongResultError: it is too large.
    """
    results = (op.prepare(*how)() for how in ((backend, torch.float32), ("torch", torch.float64)))
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True)
    errors = [float((own.double() - truth).norm() / truth.norm().clamp_min(1e-30)) for own, truth in pairs]
    for error in errors:
        if not error < LARGEST:  # NaN as well
            raise WrongResultError(f"{op.name} of {backend!r} is off by a relative {error:.1e}")
    return max(errors)


class _Inputs(NamedTuple):
    """What ops are given: activations, and gradients of z, of ladj and of hidden units."""

    x: Tensor
    h: Tensor
    grad_z: Tensor
    grad_h: Tensor
    grad_ladj: Tensor


def _inputs(first: fastmaf.MaskedLinear, batch: int) -> _Inputs:
    generator = torch.Generator().manual_seed(batch)
    d, h = first.in_features, first.out_features
    return _Inputs(
        *(torch.rand(*size, generator=generator) for size in [(batch, n) for n in (d, h, d, h)] + [(batch,)])
    )


def _to(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().to(dtype) for tensor in tensors)


def _stepping(weight: Tensor, step: Callable[[Tensor, Update], tuple[Tensor, ...]]) -> Callable[[], Any]:
    """Returns a call that takes a step of Adam on a copy of the weight, the same one each time, and returns it too."""
    own = weight.clone()
    update = Update(torch.zeros_like(own), torch.zeros_like(own), ADAM)
    return lambda: (*step(own, update), own)


def _linear(given: _Inputs, layer: fastmaf.MaskedLinear, below: str, function: str) -> Prepare:
    def prepare(backend: str, dtype: torch.dtype) -> Callable[[], Any]:
        own = module("masked_linear", backend)
        weight, bias = _to(dtype, layer.weight, layer.bias)
        args = LinearArgs(weight, bias, layer.prefix, layer.layout.table, "relu")
        x, h, grad_h = _to(dtype, getattr(given, below), given.h, given.grad_h)
        return _call(own, function, (x,), LinearBatch(grad_h, x, h), args)

    return prepare


def _affine(block: fastmaf.AffineAutoregressive, given: _Inputs, function: str) -> Prepare:
    def prepare(backend: str, dtype: torch.dtype) -> Callable[[], Any]:
        own, layer, whole = module("affine_output", backend), block.made.output, block.block()
        weight, bias = _to(dtype, layer.weight, layer.bias)
        args = AffineArgs(weight, bias, layer.prefix, layer.layout.table, whole.bound, whole.soft)
        x, h, grad_z, grad_ladj = _to(dtype, given.x, given.h, given.grad_z, given.grad_ladj)
        # Any z and log-scales will do: those that go with these inputs would take no other time.
        return _call(own, function, (h, x), AffineBatch(grad_z, grad_ladj, grad_z, h, x, 0.1 * x), args)

    return prepare


def _call(own: Any, function: str, inputs: tuple[Tensor, ...], batch: Any, args: Any) -> Callable[[], Any]:
    """Returns a call of a backend's function of one layer."""
    if function == "forward":
        return partial(own.forward, *inputs, args)
    if function == "adam_":
        return _stepping(
            args.weight, lambda weight, update: own.adam_(batch, args._replace(weight=weight), True, update, 1.0)
        )
    if function == "grad_inputs":
        return lambda: _without_weight(own.backward(batch, args, True, need_weight=False))
    return partial(own.backward, batch, args, True)


def _without_weight(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return grads[0], *grads[2:]


def _flow(blocks: list[Block], given: _Inputs, function: str) -> Prepare:
    """Makes ready the op of a whole flow without permutations."""
    args = flow_args(blocks, [None] * (len(blocks) + 1))

    def prepare(backend: str, dtype: torch.dtype) -> Callable[[], Any]:
        own = getattr(module("flow", backend), function)
        (x,) = _to(dtype, given.x)
        through = args.with_parameters(_to(dtype, *args.weights), _to(dtype, *args.biases))

        def call() -> Any:
            # The torch backend takes the ops of layers, on the backend chosen when it runs.
            with fastmaf.use_backend(backend):
                return own(x, through, False) if function == "forward" else own(x, through)

        return call

    return prepare
