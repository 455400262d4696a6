"""A whole flow in one call, there and back, is its transforms one by one; what torch.compile makes of it too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf import kernels
from fastmaf.flows import Flow
from fastmaf.kernels.block import chain
from fastmaf.transforms import AffineAutoregressive, Permutation, Transform
from tests.core.helpers import blocks_of, build, generator, normal
from tests.kernels.cases import permutations_of
from tests.tolerances import F32, F64, assert_close

pytestmark = pytest.mark.usefixtures("backend")

D = 13


class Doubling(Transform):
    """A transform that the library does not know: z = 2 x."""

    features = D

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x.new_full((x.shape[0],), D * torch.tensor(2.0).log().item())

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z / 2, z.new_full((z.shape[0],), -D * torch.tensor(2.0).log().item())


def permutation(seed: int) -> Permutation:
    return Permutation(torch.randperm(D, generator=generator(seed)))


def block(seed: int, activation: str = "relu", dtype: torch.dtype = F64, **options: Any) -> AffineAutoregressive:
    made = fastmaf.MADE(D, (9, 11), degrees="random", activation=activation, generator=generator(seed), dtype=dtype)
    return AffineAutoregressive(made, **options)


def one_by_one(flow: Flow, z: Tensor) -> tuple[Tensor, Tensor]:
    ladj = z.new_zeros(z.shape[0])
    for transform in reversed(list(flow.transforms)):
        assert isinstance(transform, Transform)
        z, term = transform.inverse(z)
        ladj = ladj + term
    return z, ladj


FLOWS: dict[str, list[Any]] = {
    "two permutations in a row": [block(0), permutation(1), permutation(2), block(3), permutation(4), permutation(5)],
    "permutations first": [permutation(1), permutation(2), block(3)],
    "permutations alone": [permutation(1), permutation(2), permutation(3)],
    "one permutation": [permutation(1)],
    "one block": [block(0)],
    "nothing": [],
    "mixed activations": [block(0), block(1, "identity"), permutation(2), block(3), block(4), block(5, "identity")],
    "mixed bounds": [block(0, log_scale_bound=0.1), block(1, log_scale_bound=None), block(2, soft_bound=True)],
    "a foreign transform": [block(0), permutation(1), Doubling(), permutation(2), block(3), block(4)],
    "a foreign transform at the ends": [Doubling(), block(0), block(1), Doubling()],
}


@pytest.mark.parametrize("batch", [0, 1, 5, 33])
@pytest.mark.parametrize("name", FLOWS)
def test_any_sequence_of_transforms(name: str, batch: int) -> None:
    flow = Flow(D, FLOWS[name])
    # Without a parameter a flow is of torch's default dtype.
    z = normal(batch, D, dtype=F64 if next(flow.parameters(), None) is not None else F32)
    kept = z.clone()
    with torch.no_grad():
        chained = flow.inverse(z)
    recorded = flow.inverse(z.clone().requires_grad_())
    for found, grad_path, expected in zip(chained, recorded, one_by_one(flow, z), strict=True):
        assert not found.requires_grad
        assert_close("inverse", found, expected)
        assert_close("inverse", grad_path, expected)
    assert torch.equal(z, kept)
    if name != "nothing":
        assert recorded[0].requires_grad
        with torch.no_grad():
            assert_close("inverse", flow(chained[0])[0], z)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("order", ["natural", "alternate", "random"])
def test_orders(order: str, dtype: torch.dtype) -> None:
    for blocks in (1, 2, 3):
        flow = build(D, blocks=blocks, order=order, degrees="random", dtype=dtype, scale=1.5)
        z = normal(9, D, dtype=dtype)
        with torch.no_grad():
            chained = flow.inverse(z)
            sliced = flow.inverse(torch.stack((z, z), dim=2)[:, :, 1])
        for found, other, view in zip(chained, flow.inverse(z), sliced, strict=True):
            assert_close("inverse", found, other)
            assert torch.equal(view, found)


def forward_one_by_one(flow: Flow, x: Tensor) -> tuple[Tensor, Tensor]:
    ladj = x.new_zeros(x.shape[0])
    for transform in flow.transforms:
        x, term = transform(x)
        ladj = ladj + term
    return x, ladj


@pytest.mark.parametrize("batch", [0, 1, 5, 33])
@pytest.mark.parametrize("name", [name for name, parts in FLOWS.items() if any(list(p.parameters()) for p in parts)])
def test_forward_and_its_gradients(name: str, batch: int) -> None:
    flow, x = Flow(D, FLOWS[name]), normal(batch, D)
    with torch.no_grad():
        quiet = flow(x)
    leaf = x.clone().requires_grad_()
    leaves = [leaf, *flow.parameters()]
    weights = normal(batch, D, seed=1), normal(batch, seed=2)
    values = [flow(leaf), forward_one_by_one(flow, leaf)]
    for found, silent, expected in zip(values[0], quiet, values[1], strict=True):
        assert_close("values", found, expected)
        assert not silent.requires_grad
        assert torch.equal(silent, found), "keeping activations changes the numbers"
    grads = [torch.autograd.grad(v, leaves, weights) for v in values]
    for found, expected in zip(*grads, strict=True):
        assert_close("gradients", found, expected)
    for k in (0, 1):  # through z alone, and through ladj alone
        found, expected = (
            torch.autograd.grad(v[k], leaves, weights[k], allow_unused=True)
            for v in (flow(leaf), forward_one_by_one(flow, leaf))
        )
        for one, other in zip(found, expected, strict=True):
            assert_close("gradients", one, torch.zeros_like(one) if other is None else other)


def test_frozen_weights_get_no_gradient() -> None:
    flow, x = build(D, blocks=3, order="random"), normal(5, D)
    twin = copy.deepcopy(flow)
    frozen = blocks_of(flow)[1].made.output.weight.requires_grad_(False)
    for one in (flow, twin):
        one.log_prob(x).sum().backward()
    assert frozen.grad is None
    for (name, found), expected in zip(flow.named_parameters(), twin.parameters(), strict=True):
        if found is not frozen:
            assert_close("gradients", found.grad, expected.grad, name)


def test_a_pass_that_kept_nothing_has_no_way_back() -> None:
    flow = build(D, blocks=2, order="natural")
    with torch.no_grad():
        z, _ = flow(normal(3, D))
    assert not z.requires_grad
    arguments = chain([b.block() for b in blocks_of(flow)], [None] * 3)
    z, _, kept = torch.ops.fastmaf.chain_forward(normal(3, D), *arguments, False)
    assert kept.numel() == 0
    with pytest.raises(RuntimeError, match="keep=False"):
        z.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("need_grad_x", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("batch", [0, 3])
def test_opcheck_forward(batch: int, keep: bool, need_grad_x: bool) -> None:
    flow = build(D, blocks=3, order=[torch.arange(D), torch.randperm(D, generator=generator()), torch.arange(D)])
    arguments = chain([b.block() for b in blocks_of(flow)], permutations_of(flow))
    if not keep:
        arguments = arguments._replace(
            weights=[w.detach() for w in arguments.weights], biases=[b.detach() for b in arguments.biases]
        )
    x = normal(batch, D).requires_grad_(keep and need_grad_x)
    torch.library.opcheck(torch.ops.fastmaf.chain_forward.default, (x, *arguments, keep))
    if keep:
        detached = [
            [t.detach() for t in part] if isinstance(part, list) and part and isinstance(part[0], Tensor) else part
            for part in arguments
        ]
        with torch.no_grad():
            _, _, kept = torch.ops.fastmaf.chain_forward(x, *detached, True)
        grads = normal(batch, D, seed=1), normal(batch, seed=2)
        torch.library.opcheck(torch.ops.fastmaf.chain_backward.default, (*grads, kept, *detached, need_grad_x))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_opcheck(batch: int) -> None:
    blocks = [block.block() for block in blocks_of(build(D, blocks=3, order="natural"))]
    none = torch.empty(0, dtype=torch.int64)
    arguments = (
        normal(batch, D),
        *(
            [t.detach() for b in blocks for t in getattr(b, what)]
            for what in ("weights", "biases", "prefixes", "tiles")
        ),
        [b.schedule for b in blocks],
        [none, torch.arange(D).flip(0), none, torch.randperm(D, generator=generator())],
        "relu",
        [5.0, 0.3, float("inf")],
        [False, True, False],
    )
    torch.library.opcheck(torch.ops.fastmaf.chain_inverse.default, arguments)


def test_what_is_no_chain_is_refused() -> None:
    z, made = normal(2, D), block(0).block()
    for blocks, permutations in (([], [None]), ([made], [None]), ([made, block(1, "identity").block()], [None] * 3)):
        with pytest.raises(ValueError, match="chain"):
            kernels.chain_inverse(z, blocks, permutations)
        with pytest.raises(ValueError, match="chain"):
            kernels.chain_forward(z, blocks, permutations)
    with pytest.raises(ValueError, match="tanh"):
        kernels.chain_inverse(z, [made._replace(activation="tanh")], [None, None])


@pytest.mark.slow
def test_compiled_without_graph_breaks() -> None:
    flow, x = build(D, blocks=2, order="random"), normal(5, D)
    names = [name for name, _ in flow.named_parameters()]
    eager = torch.autograd.grad(flow.log_prob(x).mean(), list(flow.parameters()))
    try:
        torch.compiler.reset()
        log_prob = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
        compiled = torch.autograd.grad(log_prob(x).mean(), list(flow.parameters()))
        for name, found, expected in zip(names, compiled, eager, strict=True):
            assert_close("gradients", found, expected, name)
        with torch.no_grad():
            inverse = torch.compile(flow.inverse, fullgraph=True, backend="aot_eager")
            for found, expected in zip(inverse(x), flow.inverse(x), strict=True):
                assert_close("inverse", found, expected)
    finally:
        torch.compiler.reset()
