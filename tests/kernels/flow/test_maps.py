"""Flows of every element-wise map, in both directions, against dense arithmetic and autograd."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from fastmaf import MADE
from fastmaf.kernels import AffineMap, FlowArgs, composite, flow_args, flow_forward, flow_inverse
from fastmaf.kernels.affine_output.affine_map import (
    CLAMP,
    SCALE_FIRST,
    SHIFT_FIRST,
    SIGMOID,
    SOFT_CLIP,
    SOFTPLUS,
    TANH,
)
from fastmaf.kernels.flow.args import Block
from fastmaf.kernels.flow.torch import plan
from tests.core.helpers import generator, jacobian, normal, shared_widths
from tests.tolerances import assert_close

D = 7
SCALES = {
    "clamp": (CLAMP, 0.3, 0.0),
    "free": (CLAMP, math.inf, 0.0),
    "tanh": (TANH, 0.5, 0.0),
    "softplus": (SOFTPLUS, math.inf, 1e-3),
    "softplus, no epsilon": (SOFTPLUS, math.inf, 0.0),
    "sigmoid": (SIGMOID, 2.0, 1e-3),
    "sigmoid, no epsilon": (SIGMOID, -1.0, 0.0),
    "soft clip": (SOFT_CLIP, 0.7, 0.0),
}
MAPS = {
    f"{form}, {name}": AffineMap(number, *numbers)
    for form, number in (("shift first", SHIFT_FIRST), ("scale first", SCALE_FIRST))
    for name, numbers in SCALES.items()
}
EVERY_MAP = pytest.mark.parametrize("name", MAPS)


@pytest.fixture(autouse=True)
def several_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the torch backend from taking all steps of so small a block together."""
    monkeypatch.setattr(plan, "_SMALL", 0)


def made_of(seed: int = 0) -> MADE:
    with shared_widths():
        made = MADE(D, (40, 35), degrees="random", generator=generator(seed), dtype=torch.float64)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.5)
    return made.requires_grad_(False)


def args_of(affine_map: AffineMap, blocks: int = 2) -> FlowArgs:
    result = []
    for seed in range(blocks):
        made = made_of(seed)
        weights, biases, prefixes, panels, *_ = zip(*[layer.args() for layer in made.layers], strict=True)
        result.append(Block(weights, biases, prefixes, panels, made.schedule, "relu", affine_map))
    return flow_args(result, [None, *[torch.arange(D).flip(0)] * blocks])


def dense(x: Tensor, affine_map: AffineMap, blocks: int = 2) -> tuple[Tensor, Tensor]:
    ladj = x.new_zeros(len(x))
    for seed in range(blocks):
        made = made_of(seed)
        h = x
        for layer in made.hidden:
            h = torch.relu(h @ layer.dense_weight().t() + layer.bias)
        shift, raw = (h @ made.output.dense_weight().t() + made.output.bias).unflatten(1, (-1, 2)).unbind(2)
        scale = torch.exp(affine_map.log_scale(raw))
        x = (x - shift) / scale if affine_map.form == SHIFT_FIRST else x * scale + shift
        ladj = ladj + affine_map.sign * scale.log().sum(1)
        x = x.flip(1)
    return x, ladj


@EVERY_MAP
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_values_against_dense_arithmetic(backend: str, name: str, batch: int) -> None:
    args, x = args_of(MAPS[name]), normal(batch, D)
    z, ladj = flow_forward(x, args)
    expected, expected_ladj = dense(x, MAPS[name])
    # Together: the terms of a log-determinant may cancel.
    assert_close("values", torch.cat((z, ladj[:, None]), 1), torch.cat((expected, expected_ladj[:, None]), 1))
    back, ladj_back = flow_inverse(z, args.inverted())
    assert_close("inverse", torch.cat((back, ladj_back[:, None]), 1), torch.cat((x, -ladj[:, None]), 1))


@EVERY_MAP
def test_the_log_determinant_is_that_of_the_jacobian(backend: str, name: str) -> None:
    args, x = args_of(MAPS[name]), normal(1, D)
    for function in (partial(flow_forward, args=args), partial(flow_inverse, args=args.inverted())):
        slopes = jacobian(lambda v, function=function: function(v)[0], x[0])
        sign, expected = torch.linalg.slogdet(slopes)
        assert abs(float(sign)) == 1.0
        assert_close("slogdet", function(x)[1][0], expected)


@EVERY_MAP
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients(backend: str, name: str, inverse: bool) -> None:
    args = args_of(MAPS[name], blocks=1)
    args, op = (args.inverted(), flow_inverse) if inverse else (args, flow_forward)
    tensors = (normal(2, D), *args.parameters)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    grads = torch.autograd.grad(_loss(op(leaves[0], args.with_parameters(leaves[1:]))), leaves)
    again = [tensor.clone().requires_grad_() for tensor in tensors]
    function = composite.flow_inverse if inverse else composite.flow_forward
    expected = torch.autograd.grad(_loss(function(again[0], args.with_parameters(again[1:]))), again)
    for found, truth in zip(grads, expected, strict=True):
        assert_close("gradients", found, truth)
    assert torch.autograd.gradcheck(lambda v: op(v, args), normal(2, D).requires_grad_())
    bias = args.biases[-1].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda b: op(tensors[0], args._replace(biases=[*args.biases[:-1], b])), bias, fast_mode=True
    )


def _loss(result: tuple[Tensor, Tensor]) -> Tensor:
    return result[0].sin().sum() + result[1].square().sum()


@EVERY_MAP
def test_other_derivatives(name: str) -> None:
    """Forward mode, and second derivatives, which are those of the composite ops."""
    args, x = args_of(MAPS[name], blocks=1), normal(1, D)
    for op, of in ((flow_forward, args), (flow_inverse, args.inverted())):
        slopes = torch.func.jacfwd(lambda v, op=op, of=of: op(v[None], of)[0][0])(x[0])
        assert_close("gradients", slopes, jacobian(lambda v, op=op, of=of: op(v, of)[0], x[0]))
        assert torch.autograd.gradgradcheck(lambda v, op=op, of=of: op(v, of), x.clone().requires_grad_())


@pytest.mark.parametrize("form", [SHIFT_FIRST, SCALE_FIRST])
@pytest.mark.parametrize("scale", [CLAMP, SOFTPLUS, SIGMOID, TANH, SOFT_CLIP])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_log_scales_far_out_leave_finite_numbers(backend: str, form: int, scale: int, sign: float) -> None:
    """Raw log-scales of ±1e4 in one dimension: values and gradients are finite where the mathematics is."""
    affine_map = AffineMap(form, scale, 3.0, 1e-3)
    args = args_of(affine_map, blocks=1)
    args.biases[-1][5] = sign * 1e4
    leaves = [tensor.clone().requires_grad_() for tensor in (normal(3, D), *args.parameters)]
    results = flow_forward(leaves[0], args.with_parameters(leaves[1:]))
    back = flow_inverse(results[0].detach(), args.inverted())
    grads = torch.autograd.grad(_loss(results), leaves)
    for tensor in (*results, *back, *grads):
        assert torch.isfinite(tensor).all()
