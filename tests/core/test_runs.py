"""Whole flows as one op agree with their transforms one by one, also compiled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmaf
from fastmaf.flows import Flow
from fastmaf.kernels import AffineMap, bounded_map
from fastmaf.kernels.affine_output.affine_map import SCALE_FIRST, SOFTPLUS
from fastmaf.kernels.flow.args import flow_args
from fastmaf.transforms import AffineAutoregressive, Permutation, Transform
from tests.core.helpers import blocks_of, build, generator, normal
from tests.kernels.cases import permutations_of
from tests.tolerances import F32, F64, assert_close

pytestmark = pytest.mark.usefixtures("backend")

D = 13


class Doubling(Transform):
    """A user's transform: z = 2 x."""

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
    for actual, grad_path, expected in zip(chained, recorded, one_by_one(flow, z), strict=True):
        assert not actual.requires_grad
        assert_close("inverse", actual, expected)
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
        for actual, other, view in zip(chained, flow.inverse(z), sliced, strict=True):
            assert_close("inverse", actual, other)
            assert torch.equal(view, actual)


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
    for actual, silent, expected in zip(values[0], quiet, values[1], strict=True):
        assert_close("values", actual, expected)
        assert not silent.requires_grad
        assert torch.equal(silent, actual), "keeping activations changes the numbers"
    grads = [torch.autograd.grad(v, leaves, weights) for v in values]
    for actual, expected in zip(*grads, strict=True):
        assert_close("gradients", actual, expected)
    for k in (0, 1):  # through z alone, and through ladj alone
        actual, expected = (
            torch.autograd.grad(v[k], leaves, weights[k], allow_unused=True)
            for v in (flow(leaf), forward_one_by_one(flow, leaf))
        )
        for one, other in zip(actual, expected, strict=True):
            assert_close("gradients", one, torch.zeros_like(one) if other is None else other)


def test_frozen_weights_get_no_gradient() -> None:
    flow, x = build(D, blocks=3, order="random"), normal(5, D)
    twin = copy.deepcopy(flow)
    frozen = blocks_of(flow)[1].made.output.weight.requires_grad_(False)
    for one in (flow, twin):
        one.log_prob(x).sum().backward()
    assert frozen.grad is None
    for (name, actual), expected in zip(flow.named_parameters(), twin.parameters(), strict=True):
        if actual is not frozen:
            assert_close("gradients", actual.grad, expected.grad, name)


def test_a_pass_that_saved_nothing_has_no_backward_pass() -> None:
    flow = build(D, blocks=2, order="natural")
    with torch.no_grad():
        z, _ = flow(normal(3, D))
    assert not z.requires_grad
    arguments = flow_args([b.block() for b in blocks_of(flow)], [None] * 3)
    z, _, saved = torch.ops.fastmaf.flow_forward(normal(3, D), *arguments, False)
    assert saved.numel() == 0
    with pytest.raises(RuntimeError, match="save=False"):
        z.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("need_grad_x", [False, True])
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("batch", [0, 3])
def test_opcheck_forward(batch: int, save: bool, need_grad_x: bool) -> None:
    flow = build(D, blocks=3, order=[torch.arange(D), torch.randperm(D, generator=generator()), torch.arange(D)])
    arguments = flow_args([b.block() for b in blocks_of(flow)], permutations_of(flow))
    if not save:
        arguments = arguments.with_parameters([t.detach() for t in arguments.parameters])
    x = normal(batch, D).requires_grad_(save and need_grad_x)
    torch.library.opcheck(torch.ops.fastmaf.flow_forward.default, (x, *arguments, save))
    if save:
        detached = [
            [t.detach() for t in part] if isinstance(part, list) and part and isinstance(part[0], Tensor) else part
            for part in arguments
        ]
        with torch.no_grad():
            _, _, saved = torch.ops.fastmaf.flow_forward(x, *detached, True)
        grads = normal(batch, D, seed=1), normal(batch, seed=2)
        torch.library.opcheck(torch.ops.fastmaf.flow_backward.default, (*grads, saved, *detached, need_grad_x))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_opcheck_inverse(batch: int) -> None:
    blocks = [block.block() for block in blocks_of(build(D, blocks=3, order="natural"))]
    none = torch.empty(0, dtype=torch.int64)
    arguments = (
        normal(batch, D),
        *(
            [t.detach() for b in blocks for t in getattr(b, what)]
            for what in ("weights", "biases", "prefixes", "panels")
        ),
        [b.schedule for b in blocks],
        [none, torch.arange(D).flip(0), none, torch.randperm(D, generator=generator())],
        "relu",
        [
            number
            for affine_map in (bounded_map(5.0, False), bounded_map(0.3, True), AffineMap(SCALE_FIRST, SOFTPLUS))
            for number in affine_map
        ],
        [1.0] * 9,
    )
    torch.library.opcheck(torch.ops.fastmaf.flow_inverse.default, arguments)


def test_what_is_no_flow_is_refused() -> None:
    made = block(0).block()
    for blocks, permutations in (([], [None]), ([made], [None]), ([made, block(1, "identity").block()], [None] * 3)):
        with pytest.raises(ValueError, match="a flow needs blocks"):
            flow_args(blocks, permutations)
    with pytest.raises(ValueError, match="tanh"):
        flow_args([made._replace(activation="tanh")], [None, None])


def _reorder(flow: Flow) -> None:
    flow.transforms = nn.ModuleList(reversed(list(flow.transforms)))


def _swap(flow: Flow) -> None:
    blocks = blocks_of(flow)
    blocks[0].made, blocks[1].made = blocks[1].made, blocks[0].made


def _rewrite_permutation(flow: Flow) -> None:
    for transform in flow.transforms:
        if isinstance(transform, Permutation):
            transform.permutation.copy_(torch.randperm(D, generator=generator(9)))


def _rewrite_permutation_uncounted(flow: Flow) -> None:
    for transform in flow.transforms:
        if isinstance(transform, Permutation):
            transform.permutation.numpy()[:] = torch.randperm(D, generator=generator(9)).numpy()


def _replace_permutation_data(flow: Flow) -> None:
    for transform in flow.transforms:
        if isinstance(transform, Permutation):
            transform.permutation.data = torch.randperm(D, generator=generator(9))


def _replace_parameter(flow: Flow) -> None:
    layer = blocks_of(flow)[0].made.output
    layer.weight = nn.Parameter(2 * layer.weight.detach())


def _halved(flow: Flow) -> dict[str, Tensor]:
    return {name: 0.5 * t if t.is_floating_point() else t for name, t in flow.state_dict().items()}


def _add_hook(flow: Flow) -> None:
    blocks_of(flow)[1].made.hidden[0].register_forward_hook(lambda module, given, y: 2 * y)


def _data(flow: Flow) -> None:
    for parameter in flow.parameters():
        parameter.data = parameter.data.float()


CHANGES: dict[str, Callable[[Flow], Any]] = {
    "transforms in another order": _reorder,
    "a transform replaced": lambda flow: flow.transforms.__setitem__(0, block(7)),
    "networks swapped": _swap,
    "a permutation written to": _rewrite_permutation,
    "a permutation written to through NumPy": _rewrite_permutation_uncounted,
    "a permutation's data replaced": _replace_permutation_data,
    "a parameter replaced": _replace_parameter,
    "parameters written to": lambda flow: flow.load_state_dict(_halved(flow)),
    "parameters assigned": lambda flow: flow.load_state_dict(_halved(flow), assign=True),
    "a bound": lambda flow: setattr(blocks_of(flow)[0], "log_scale_bound", 1e-3),
    "a soft bound": lambda flow: setattr(blocks_of(flow)[0], "soft_bound", False),
    "a hook": _add_hook,
    "dtype": lambda flow: flow.float(),
    "dtype of the data": _data,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str) -> None:
    """Cached arguments are made anew after a change: the flow agrees with a copy, which has none."""
    flow, x = build(D, blocks=3, order="random", scale=1.5), normal(4, D)
    with torch.no_grad():
        for _ in range(2):
            before = flow.log_prob(x)
            flow.inverse(x)
        CHANGES[change](flow)
        twin = copy.deepcopy(flow)
        x = x.to(next(flow.parameters()).dtype)
        results = zip((flow.log_prob(x), *flow.inverse(x)), (twin.log_prob(x), *twin.inverse(x)), strict=True)
        assert all(torch.equal(actual, expected) for actual, expected in results)
        assert not torch.equal(flow.log_prob(x), before), "the change changes nothing"


def test_two_permutations_in_a_row_follow_writes_that_nothing_counts() -> None:
    orders = [torch.randperm(D, generator=generator(seed)) for seed in range(3)]
    flow = fastmaf.Flow(D, [*build(D).transforms, Permutation(orders[0]), Permutation(orders[1])])  # type: ignore[list-item]
    x = normal(4, D)
    flow(x)
    flow.transforms[-1].permutation.numpy()[:] = orders[2].numpy()
    z, _ = flow(x)
    assert torch.equal(z, copy.deepcopy(flow)(x)[0])
    assert_close("round_trip", flow.inverse(z)[0], x)


def test_a_permutation_that_is_none_is_an_error_and_reads_nothing() -> None:
    flow, x = build(D, order="random"), normal(4, D)
    flow.log_prob(x)
    permutation = next(t for t in flow.transforms if isinstance(t, Permutation)).permutation
    permutation.numpy()[0] = 10**9
    with pytest.raises((RuntimeError, IndexError)):
        flow.log_prob(x)


def test_a_first_call_on_fake_tensors_leaves_nothing_behind() -> None:
    flow, x = build(D), normal(4, D)
    expected = copy.deepcopy(flow).log_prob(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        flow.log_prob(torch.empty(4, D, dtype=torch.float64))
    assert torch.equal(flow.log_prob(x), expected)


def test_a_first_call_in_inference_mode_leaves_nothing_behind() -> None:
    flow, z = build(D, order="random"), normal(4, D).requires_grad_()
    with torch.inference_mode():
        flow.sample(3)
    x, _ = flow.inverse(z)
    (gradient,) = torch.autograd.grad(x.square().sum(), z, create_graph=True)
    gradient.sum().backward()
    twin = copy.deepcopy(flow)
    with torch.inference_mode():
        twin.log_prob(normal(4, D))
    weights = {name: 1.0 * parameter for name, parameter in twin.named_parameters()}
    torch.func.functional_call(twin, weights, (normal(4, D),))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())


def test_a_flow_that_was_pickled_without_runs() -> None:
    flow, x = build(D), normal(4, D)
    state = {name: value for name, value in vars(flow).items() if name != "_runs"}
    other = fastmaf.MAF.__new__(fastmaf.MAF)
    other.__setstate__(state)
    assert torch.equal(other.log_prob(x), flow.log_prob(x))


def test_a_hook_that_is_removed_leaves_no_trace() -> None:
    flow, x = build(D, blocks=2, order="random"), normal(4, D)
    with torch.no_grad():
        before = flow.log_prob(x)
        handle = blocks_of(flow)[0].register_forward_hook(lambda module, given, result: (result[0] + 1, result[1]))
        assert not torch.equal(flow.log_prob(x), before)
        handle.remove()
        assert torch.equal(flow.log_prob(x), before)


def test_a_pickled_flow_is_the_same_flow() -> None:
    flow, x = build(D, blocks=2, order="random"), normal(4, D)
    with torch.no_grad():
        expected = flow.log_prob(x)
        assert torch.equal(pickle.loads(pickle.dumps(flow)).log_prob(x), expected)


@pytest.mark.slow
def test_compiled_without_graph_breaks() -> None:
    flow, x = build(D, blocks=2, order="random"), normal(5, D)
    names = [name for name, _ in flow.named_parameters()]
    eager = torch.autograd.grad(flow.log_prob(x).mean(), list(flow.parameters()))
    try:
        torch.compiler.reset()
        log_prob = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
        compiled = torch.autograd.grad(log_prob(x).mean(), list(flow.parameters()))
        for name, actual, expected in zip(names, compiled, eager, strict=True):
            assert_close("gradients", actual, expected, name)
        with torch.no_grad():
            inverse = torch.compile(flow.inverse, fullgraph=True, backend="aot_eager")
            for actual, expected in zip(inverse(x), flow.inverse(x), strict=True):
                assert_close("inverse", actual, expected)
    finally:
        torch.compiler.reset()


def test_composed_blocks_stand_between_runs() -> None:
    """Their layers run as ops one by one; the blocks before and after stay runs, which are kept."""
    composed = AffineAutoregressive(
        fastmaf.MADE(D, (8, 8, 8), residual=True, generator=generator(3), dtype=F64), log_scale_bound=2.0
    )
    flow = Flow(D, [block(0), permutation(0), block(1), composed, block(2)]).requires_grad_(False)
    z = normal(4, D)
    x, ladj = flow.inverse(z)
    for found, expected in zip((x, ladj), one_by_one(flow, z), strict=True):
        assert_close("values", found, expected)
    assert_close("round_trip", flow(x)[0], z)
    before = flow._runs.of(flow._transforms())
    assert [type(part).__name__ for part in before] == ["Run", "AffineAutoregressive", "Run"]
    assert flow._runs.of(flow._transforms()) is before


def test_dropout_is_noticed() -> None:
    """Blocks with dropout are part of a run in evaluation mode alone."""
    made = fastmaf.MADE(D, (9, 11), dropout=0.5, generator=generator(0), dtype=F64)
    flow, x = Flow(D, [block(1), AffineAutoregressive(made)]), normal(4, D)
    expected = flow.eval().log_prob(x)
    assert flow._is_one_op()
    for _ in range(2):
        assert not torch.equal(flow.train().log_prob(x), expected) and not flow._is_one_op()
        assert torch.equal(flow.eval().log_prob(x), expected) and flow._is_one_op()
    made.train()
    assert not torch.equal(flow.log_prob(x), expected)
    made.dropout = 0.0
    assert torch.equal(flow.log_prob(x), expected)
