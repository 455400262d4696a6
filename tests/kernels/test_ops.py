"""The three ops: what torch asks of an op, and their values and gradients against dense arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmaf import kernels
from fastmaf.kernels import AffineArgs, AffineMap, FlowArgs, LinearArgs, bounded_map
from fastmaf.kernels.affine_output.affine_map import CLAMP, SHIFT_FIRST, SIGMOID, SOFT_CLIP, SOFTPLUS, TANH
from fastmaf.kernels.flow.schedule import level_schedule
from tests.core.helpers import blocks_of, build, normal, padding_of
from tests.kernels.cases import MAPS
from tests.tolerances import assert_close

FEATURES = 13
BOUNDED = list(bounded_map(5.0, False))


def parts(scale: float = 1.0, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Returns the MADE of one block with many tiles."""
    return blocks_of(build(FEATURES, blocks=1, order="natural", scale=scale, dtype=dtype, **options))[0].made


def linear_arguments(made: Any, batch: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Any:
    layer = made.hidden[0]
    x = normal(batch, FEATURES, dtype=dtype).requires_grad_(grad)
    weight, bias = layer.weight.detach().requires_grad_(grad), layer.bias.detach().requires_grad_(grad)
    return x, weight, bias, layer.prefix, layer.layout.panels


def affine_arguments(made: Any, batch: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Any:
    layer = made.output
    h = normal(batch, layer.layout.in_features, dtype=dtype).abs().requires_grad_(grad)
    x = normal(batch, FEATURES, seed=1, dtype=dtype).requires_grad_(grad)
    weight, bias = layer.weight.detach().requires_grad_(grad), layer.bias.detach().requires_grad_(grad)
    return h, x, weight, bias, layer.prefix, layer.layout.panels


def inverse_arguments(made: Any, batch: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Any:
    layers = made.layers
    return (
        normal(batch, FEATURES, dtype=dtype).requires_grad_(grad),
        [layer.weight.detach().requires_grad_(grad) for layer in layers],
        [layer.bias.detach().requires_grad_(grad) for layer in layers],
        [layer.prefix for layer in layers],
        [layer.layout.panels for layer in layers],
        [made.schedule],
        [torch.empty(0, dtype=torch.int64)] * 2,
        "relu",
    )


def call(op: str, arguments: Any) -> Any:
    """Calls an op with arguments as its schema takes them."""
    of_ops = {"masked_linear": (1, LinearArgs), "affine_output": (2, AffineArgs), "flow_inverse": (1, FlowArgs)}
    inputs, args = of_ops[op]
    return getattr(kernels, op)(*arguments[:inputs], args(*arguments[inputs:]))


def detached(arguments: Any) -> Any:
    return tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_opcheck_masked_linear(backend: str, batch: int, activation: str) -> None:
    arguments = (*linear_arguments(parts(), batch, grad=True), activation, 1.0)
    torch.library.opcheck(torch.ops.fastmaf.masked_linear.default, arguments)
    x, weight, bias, prefix, panels, *_ = detached(arguments)
    y = kernels.masked_linear(x, LinearArgs(weight, bias, prefix, panels, activation))
    for need_grad_x in (True, False):
        backward = (normal(*y.shape, seed=2), x, y, weight, bias, prefix, panels, activation, 1.0, need_grad_x)
        torch.library.opcheck(torch.ops.fastmaf.masked_linear_backward.default, backward)


@pytest.mark.parametrize("name", MAPS)
def test_opcheck_affine_output(backend: str, name: str) -> None:
    for batch in (0, 3):
        arguments = (*affine_arguments(parts(), batch, grad=True), list(MAPS[name]), 1.0)
        torch.library.opcheck(torch.ops.fastmaf.affine_output.default, arguments)
        h, x, *rest = detached(arguments)
        z, ladj, log_scale = kernels.affine_output(h, x, AffineArgs(*rest))
        grads = normal(batch, FEATURES, seed=2), normal(batch, seed=3), normal(batch, FEATURES, seed=4)
        backward = (*grads, h, z, log_scale, x, *rest)
        torch.library.opcheck(torch.ops.fastmaf.affine_output_backward.default, backward)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_flow_inverse(backend: str, grad: bool) -> None:
    arguments = (*inverse_arguments(parts(), 3, grad=grad), BOUNDED, [1.0] * 3)
    torch.library.opcheck(torch.ops.fastmaf.flow_inverse.default, arguments)


@pytest.mark.parametrize("parameters", [False, True])
def test_opcheck_flow_inverse_backward(backend: str, parameters: bool) -> None:
    arguments = normal(3, FEATURES, seed=2), normal(3, seed=3), *inverse_arguments(parts(), 3), BOUNDED, [1.0] * 3
    arguments = (*arguments, parameters)
    torch.library.opcheck(torch.ops.fastmaf.flow_inverse_backward.default, arguments)


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("rows, runs", [(31, [1, 1]), (79, [2, 2, 1]), (1, [1])])
def test_masked_linear_against_dense(backend: str, batch: int, activation: str, rows: int, runs: list[int]) -> None:
    made = parts(degrees="random", hidden_features=(rows, 9))
    layer = made.hidden[0]
    assert [run.end - run.start for run in layer.layout.runs] == runs
    arguments = linear_arguments(made, batch, grad=True)
    y = kernels.masked_linear(arguments[0], LinearArgs(*arguments[1:], activation))
    x, dense, bias = (t.detach().clone().requires_grad_() for t in (arguments[0], layer.dense_weight(), layer.bias))
    expected = torch.nn.functional.linear(x, dense, bias)
    expected = expected.relu() if activation == "relu" else expected
    assert_close("values", y, expected)
    upstream = normal(*y.shape, seed=3)
    y.backward(upstream)
    expected.backward(upstream)
    assert_close("gradients", arguments[0].grad, x.grad)
    assert_close("gradients", arguments[2].grad, bias.grad)
    assert dense.grad is not None
    assert_close("gradients", layer.layout.unpack(arguments[1].grad), dense.grad * layer.layout.mask())
    assert torch.equal(
        arguments[1].grad[padding_of(layer)], torch.zeros(int(padding_of(layer).sum()), dtype=torch.float64)
    )


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_affine_output_against_dense(backend: str, batch: int, name: str) -> None:
    made = parts(degrees="random", hidden_features=(9, 31), scale=2.0)
    layer, affine_map = made.output, MAPS[name]
    assert len(layer.layout.runs) > 1
    arguments = affine_arguments(made, batch, grad=True)
    results = kernels.affine_output(*arguments[:2], AffineArgs(*arguments[2:], affine_map))
    h, x, dense, bias = (
        t.detach().clone().requires_grad_() for t in (*arguments[:2], layer.dense_weight(), arguments[3])
    )
    out = torch.nn.functional.linear(h, dense, bias)
    shift, u = out[:, 0::2], out[:, 1::2]
    log_scale = naive_log_scale(affine_map, u)
    if affine_map.form == SHIFT_FIRST:
        expected = (x - shift) * torch.exp(-log_scale), -log_scale.sum(dim=1), log_scale
    else:
        expected = torch.exp(log_scale) * x + shift, log_scale.sum(dim=1), log_scale
    upstream = normal(batch, FEATURES, seed=3), normal(batch, seed=4), normal(batch, FEATURES, seed=5)
    for found, truth in zip(results, expected, strict=True):
        assert_close("values", found, truth)
    torch.autograd.backward(results, upstream)
    torch.autograd.backward(expected, upstream)
    assert dense.grad is not None
    for name, found, truth in (
        ("h", arguments[0].grad, h.grad),
        ("x", arguments[1].grad, x.grad),
        ("weight", layer.layout.unpack(arguments[2].grad), dense.grad * layer.layout.mask()),
        ("bias", arguments[3].grad, bias.grad),
    ):
        assert_close("gradients", found, truth, f"gradient of {name}")
    assert torch.equal(
        arguments[2].grad[padding_of(layer)], torch.zeros(int(padding_of(layer).sum()), dtype=torch.float64)
    )


def naive_log_scale(affine_map: AffineMap, u: Tensor) -> Tensor:
    """Returns the log-scale of moderate raw outputs, by the formulas as they stand in the literature."""
    limit, epsilon = affine_map.limit, affine_map.epsilon
    return {
        CLAMP: lambda: u.clamp(-limit, limit),
        TANH: lambda: limit * torch.tanh(u / limit),
        SOFTPLUS: lambda: torch.log(torch.log1p(torch.exp(u)) + epsilon),
        SIGMOID: lambda: torch.log(1 / (1 + torch.exp(-u - limit)) + epsilon),
        SOFT_CLIP: lambda: u / (1 + (u / limit).abs()),
    }[affine_map.scale]()  # type: ignore[index]


def test_unknown_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="tanh"):
        call("masked_linear", (*linear_arguments(parts(), 2), "tanh"))


@pytest.mark.parametrize("op", ["masked_linear", "affine_output", "flow_inverse"])
def test_fake_shapes(op: str) -> None:
    """On meta tensors, as compilers trace them: the same shapes and dtypes as the real op."""
    for dtype in (torch.float32, torch.float64):
        made = parts(dtype=dtype)
        arguments: Any
        if op == "masked_linear":
            arguments = (*linear_arguments(made, 3, dtype), "relu")
        elif op == "affine_output":
            arguments = (*affine_arguments(made, 3, dtype), BOUNDED, 1.0)
        else:
            arguments = (*inverse_arguments(made, 3, dtype), BOUNDED, [1.0] * 3)
        meta = tuple(
            a.to("meta")
            if isinstance(a, Tensor)
            else [t.to("meta") if isinstance(t, Tensor) else t for t in a]
            if isinstance(a, list)
            else a
            for a in arguments
        )
        real, fake = call(op, arguments), call(op, meta)
        for one, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (real, fake)), strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype and other.is_meta


def test_inputs_are_not_written_to(backend: str) -> None:
    made = parts()
    arguments: Any
    for op, arguments in (
        ("masked_linear", (*linear_arguments(made, 3), "relu")),
        ("affine_output", (*affine_arguments(made, 3), list(bounded_map(0.3, False)))),
        ("flow_inverse", (*inverse_arguments(made, 3), list(bounded_map(0.3, False)), [1.0] * 3)),
    ):
        tensors = [t for a in arguments for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
        before = [t.clone() for t in tensors]
        call(op, arguments)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)), op


def test_schedule_of_hand_made_degrees() -> None:
    """D = 6, last layer of degrees 0, 2, 2, 5, 6: outputs 1-2, 3-5, 6 follow degrees 0, 2, 5; none reads 6."""
    first, last = torch.tensor([1, 3, 5, 6]), torch.tensor([0, 2, 2, 5, 6])
    dims, first_units, last_units = level_schedule(torch.arange(1, 7), [first, last]).t().tolist()
    assert dims == [0, 2, 5, 6]  # after degrees 0, 2, 5 below D, and the rest
    assert last_units[:3] == [1, 3, 4], "units of the last layer finished after each step"
    assert first_units[:3] == [0, 1, 3], "units of the first layer that they read"
