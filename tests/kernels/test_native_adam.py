"""Steps of Adam inside the native backward passes, and norms of gradients, against the gradients that they consume."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmaf.kernels import AffineArgs, AffineMap, LinearArgs
from fastmaf.kernels.adam.update import AdamNumbers, Update
from fastmaf.kernels.affine_output.args import AffineBatch
from fastmaf.kernels.flow.args import FlowBatch
from fastmaf.kernels.masked_linear.args import LinearBatch
from tests.core.helpers import blocks_of, build, normal, padding_of
from tests.kernels.cases import needs
from tests.kernels.native_calls import args_of
from tests.tolerances import F32, F64, assert_close, error

pytestmark = needs("native")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight decay": {"weight_decay": 0.3},
    "decoupled": {"weight_decay": 0.3, "decoupled": True},
    "maximize": {"maximize": True},
    "all": {"weight_decay": 0.3, "decoupled": True, "maximize": True, "eps": 1e-3},
    "no eps": {"eps": 0.0},
    "no eps, weight decay": {"eps": 0.0, "weight_decay": 0.3},
    "first step": {"step": 1},
}
BATCHES = [0, 1, 5, 64, 129, 300]


def numbers_of(**options: Any) -> AdamNumbers:
    defaults = {"step": 7, "lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    return AdamNumbers(**{**defaults, "decoupled": False, "maximize": False, **options})


def moments(weight: Tensor, padding: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    first, second = normal(len(weight), seed=seed).to(weight), normal(len(weight), seed=seed + 1).square().to(weight)
    return first.masked_fill(padding, 0), second.masked_fill(padding, 0)


def stepped(weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, n: AdamNumbers) -> list[Tensor]:
    """Returns the weight and the moments after a step, from the equations, in float64."""
    w, g, m, v = (t.to(F64) for t in (weight, grad, first, second))
    g = -g if n.maximize else g
    if n.decoupled:
        w = w * (1 - n.lr * n.weight_decay)
    else:
        g = g + n.weight_decay * w
    m, v = n.beta1 * m + (1 - n.beta1) * g, n.beta2 * v + (1 - n.beta2) * g * g
    hat_m, hat_v = m / (1 - n.beta1**n.step), v / (1 - n.beta2**n.step)
    return [w - n.lr * hat_m / (hat_v.sqrt() + n.eps), m, v]


def compare(found: list[Tensor], before: Tensor, expected: list[Tensor], padding: Tensor) -> None:
    for what, value, truth in zip(("weight", "exp_avg", "exp_avg_sq"), found, expected, strict=True):
        assert not value[padding].any(), f"the padding of {what}"
        assert_close("gradients", value[~padding], truth[~padding], what)
    # The step itself, to what the rounding of the weight leaves of it.
    step = (expected[0] - before.to(F64))[~padding]
    limit = 1e-3 if found[0].dtype == F32 else 1e-10
    assert error((found[0].to(F64) - before.to(F64))[~padding], step) < limit


def layer_call(kind: str, batch: int, dtype: torch.dtype) -> tuple[Any, Any, Any, Tensor]:
    made = blocks_of(build(37, blocks=1, hidden_features=(20, 31), degrees="random", dtype=dtype))[0].made
    layer = made.output if kind == "affine" else made.hidden[0]
    parts = [layer.weight.detach().clone(), layer.bias.detach(), layer.prefix, layer.layout.panels]
    draws = [normal(batch, 37, seed=k, dtype=dtype) for k in range(5)]
    if kind == "affine":
        h = normal(batch, 31, seed=9, dtype=dtype).relu()
        of_affine = AffineBatch(draws[0], draws[1].sum(1), draws[2], h, draws[3], draws[4].tanh(), draws[1])
        module = importlib.import_module("fastmaf.kernels.affine_output.native")
        return module, of_affine, AffineArgs(*parts, AffineMap(limit=0.7)), padding_of(layer)
    of_linear = LinearBatch(
        normal(batch, 20, seed=7, dtype=dtype), draws[0], normal(batch, 20, seed=8, dtype=dtype).relu()
    )
    module = importlib.import_module("fastmaf.kernels.masked_linear.native")
    return module, of_linear, LinearArgs(*parts, "relu"), padding_of(layer)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["linear", "affine"])
def test_steps_of_a_layer(kind: str, name: str, dtype: torch.dtype) -> None:
    for batch in BATCHES:
        for scale in (1.0, 0.25):
            module, of_batch, args, padding = layer_call(kind, batch, dtype)
            numbers, before = numbers_of(**OPTIONS[name]), args.weight.clone()
            first, second = moments(before, padding, 30)
            inputs = scale == 1
            grads = module.backward(of_batch, args, True, True)
            expected = stepped(before, scale * grads[1], first, second, numbers)
            given = module.adam_(of_batch, args, inputs, Update(first, second, numbers, scale=scale))
            compare([args.weight, first, second], before, expected, padding)
            if inputs:
                for value, truth in zip(given, (grads[0], *grads[2:]), strict=True):
                    assert torch.equal(value, truth)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_of_a_flow(name: str, dtype: torch.dtype) -> None:
    flow = build(37, order="random", hidden_features=(20, 31), degrees="random", dtype=dtype)
    module: Any = importlib.import_module("fastmaf.kernels.flow.native")
    paddings = [padding_of(layer) for block in blocks_of(flow) for layer in block.made.layers]
    numbers = [numbers_of(**OPTIONS[name]), numbers_of(**{**OPTIONS[name], "lr": 0.1})]
    for batch in BATCHES:
        args = args_of(flow)
        args = args._replace(weights=[weight.clone() for weight in args.weights])
        before = [weight.clone() for weight in args.weights]
        _, _, saved = module.forward(normal(batch, 37, dtype=dtype), args, True)
        of_batch = FlowBatch(normal(batch, 37, seed=1, dtype=dtype), normal(batch, seed=2, dtype=dtype), saved)
        grad_x, grads, biases = module.backward(of_batch, args, True)
        both = [moments(w, p, k) for k, (w, p) in enumerate(zip(before, paddings, strict=True))]
        expected = [stepped(*each, numbers[k % 2]) for k, each in enumerate(
            (w, g, *m) for w, g, m in zip(before, grads, both, strict=True)
        )]  # fmt: skip
        updates = [Update(*each, numbers[k % 2]) for k, each in enumerate(both)]
        found_x, found_biases = module.adam_(of_batch, args, True, updates, None)
        assert torch.equal(found_x, grad_x)
        assert all(torch.equal(a, b) for a, b in zip(found_biases, biases, strict=True))
        for k, weight in enumerate(args.weights):
            compare([weight, *both[k]], before[k], expected[k], paddings[k])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", ["linear", "affine"])
def test_norms(kind: str, batch: int) -> None:
    for dtype in (F64, F32):
        module, of_batch, args, _ = layer_call(kind, batch, dtype)
        grad = module.backward(of_batch, args, False, True)[1]
        found = torch.tensor(module.squared_norm(of_batch, args), dtype=F64)
        assert_close("values", found, grad.to(F64).square().sum())


def test_moments_that_have_decayed_to_denormal_numbers() -> None:
    """They may count as zero."""
    module, of_batch, args, padding = layer_call("linear", 5, F32)
    of_batch = of_batch._replace(grad_y=torch.zeros_like(of_batch.grad_y))
    before = args.weight.clone()
    first = torch.full_like(before, 1e-41).masked_fill(padding, 0)
    second = first.clone()
    module.adam_(of_batch, args, True, Update(first, second, numbers_of()))
    assert torch.equal(args.weight, before)
    for moment in (first, second):
        assert (moment >= 0).all() and (moment <= 1e-41).all() and not moment[padding].any()
