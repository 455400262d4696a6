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
from fastmaf.kernels import backends
from fastmaf.kernels.block import Block, chain
from fastmaf.kernels.factors import AdamNumbers, Update

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
    return fastmaf.MAF(features, blocks, HIDDEN, order="natural", soft_bound=False, seed=0).requires_grad_(False)


def present() -> list[str]:
    """Returns the CPU's backends that are here, fastest first."""
    return [name for name in ("native", "reference") if all(backends.missing(op, name) is None for op in backends.OPS)]


def module(op: str, backend: str) -> Any:
    """Returns a backend's module of an op, as the op would call it."""
    with fastmaf.use_backend(backend):
        return backends.implementation(op, torch.empty(0))


def ops_of(flow: fastmaf.Flow, batch: int) -> list[Op]:
    """Returns the ops on the first block's layers and on all blocks, on fresh inputs."""
    blocks = [transform for transform in flow.transforms if isinstance(transform, fastmaf.AffineAutoregressive)]
    first, second, output = blocks[0].made.layers
    given = _inputs(first, batch)
    linear, affine = partial(_linear, given), partial(_affine, blocks[0], given)
    sizes = [layer.layout.visible for layer in blocks[0].made.layers]

    def one(name: str, prepare: Prepare, weights: int, products: int = 1, moved: int = 1, rate: str = "read") -> Op:
        return Op(name, prepare, batch, 1, weights, products, moved, f"{rate}_gb_per_s")

    def whole(name: str, op: str, function: str, order: int) -> Op:
        prepare = _chain([block.block() for block in blocks[::order]], given, op, function)
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
        one("level_inverse", _inverse(blocks[0].block(), given), sum(sizes)),
        whole("chain_forward", "chain", "forward", 1),
        whole("chain_inverse", "level_inverse", "chain", -1),
    ]


def check(op: Op, backend: str) -> float:
    """Holds an op's float32 results against those of the float64 reference.

    Returns:
        The largest relative error among them, norm-wise.

    Raises:
        WrongResultError: it is too large.
    """
    results = (op.prepare(*how)() for how in ((backend, torch.float32), ("reference", torch.float64)))
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


def _layer(layer: fastmaf.MaskedLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, bias = _to(dtype, layer.weight, layer.bias)
    return weight, bias, layer.prefix, layer.layout.table


def _stepping(weight: Tensor, step: Callable[[Tensor, Update], tuple[Tensor, ...]]) -> Callable[[], Any]:
    """Returns a call that takes a step of Adam on a copy of the weight, the same one each time, and returns it too."""
    own = weight.clone()
    update = Update(torch.zeros_like(own), torch.zeros_like(own), ADAM)
    return lambda: (*step(own, update), own)


def _linear(given: _Inputs, layer: fastmaf.MaskedLinear, below: str, function: str) -> Prepare:
    def prepare(backend: str, dtype: torch.dtype) -> Callable[[], Any]:
        own = getattr(module("masked_linear", backend), function)
        weight, bias, *mask = _layer(layer, dtype)
        x, h, grad_h = _to(dtype, getattr(given, below), given.h, given.grad_h)
        if function == "forward":
            return partial(own, x, weight, bias, *mask, "relu")
        rest = (*mask, "relu", True)
        if function == "adam_":
            return _stepping(weight, lambda moving, update: own(grad_h, x, h, moving, *rest, update, 1.0))
        return partial(own, grad_h, x, h, weight, *rest)

    return prepare


def _affine(block: fastmaf.AffineAutoregressive, given: _Inputs, function: str) -> Prepare:
    def prepare(backend: str, dtype: torch.dtype) -> Callable[[], Any]:
        own = getattr(module("affine_output", backend), function)
        weight, bias, *mask = _layer(block.made.output, dtype)
        rest = (*mask, *block.block()[-2:])
        x, h, grad_z, grad_ladj = _to(dtype, given.x, given.h, given.grad_z, given.grad_ladj)
        if function == "forward":
            return partial(own, h, weight, bias, x, *rest)
        # Any z and log-scales will do: those that go with these inputs would take no other time.
        grads, made = (grad_z, grad_ladj, grad_z), (x, 0.1 * x)
        if function == "backward":
            return partial(own, *grads, h, weight, *made, *rest)
        if function == "adam_":
            return _stepping(weight, lambda moving, update: own(*grads, h, *made, moving, *rest, True, update, 1.0))
        return partial(own, *grads, h, *made, weight, *rest, True)

    return prepare


def _inverse(block: Block, given: _Inputs) -> Prepare:
    def prepare(backend: str, dtype: torch.dtype) -> Callable[[], Any]:
        own = block._replace(weights=list(_to(dtype, *block.weights)), biases=list(_to(dtype, *block.biases)))
        return partial(module("level_inverse", backend).forward, *_to(dtype, given.x), *own)

    return prepare


def _chain(blocks: list[Block], given: _Inputs, op: str, function: str) -> Prepare:
    """Makes ready the op of a whole flow without permutations."""
    flat = chain(blocks, [None] * (len(blocks) + 1))

    def prepare(backend: str, dtype: torch.dtype) -> Callable[[], Any]:
        own = getattr(module(op, backend), function)
        (x,) = _to(dtype, given.x)
        through = flat._replace(weights=list(_to(dtype, *flat.weights)), biases=list(_to(dtype, *flat.biases)))

        def call() -> Any:
            # The reference takes the ops of layers, on the backend chosen when it runs.
            with fastmaf.use_backend(backend):
                return own(x, through, False) if function == "forward" else own(x, *through)

        return call

    return prepare
