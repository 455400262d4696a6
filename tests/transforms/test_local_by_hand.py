"""LocalAutoregressive and its convolution against dense matrices written by hand."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

import fastmaf
from fastmaf.transforms.local import MaskedConv2d
from tests.core.helpers import generator, normal
from tests.tolerances import F32, assert_close, assert_float32, distance
from tests.transforms.local_blocks import CASE, CASES, Shape, block, degrees, features_of, places

pytestmark = pytest.mark.usefixtures("one_thread")


def dense(transform: fastmaf.LocalAutoregressive) -> dict[str, np.ndarray]:
    """Writes the block's three convolutions out as matrices over pixels and hidden units, by their definition."""
    (channels, height, width), p, hidden = transform.shape, transform.patch, transform.hidden
    groups, rows, columns = channels * p * p, height // p, width // p
    of = degrees(transform.shape, patch=p, reverse=transform.reverse)
    pixel = {(int(of[d]), i // p, j // p): d for d, (_, i, j) in enumerate(places(transform.shape))}
    half, size = transform.kernel // 2, len(pixel)
    spots = [(a, b) for a in range(rows) for b in range(columns)]
    unit = {(k, *spot): n for n, (k, spot) in enumerate((k, spot) for k in range(groups * hidden) for spot in spots)}
    weights = {name: p.detach().double().numpy() for name, p in transform.named_parameters()}
    linear, first, second = np.zeros((size, size)), np.zeros((len(unit), size)), np.zeros((2 * size, len(unit)))
    bias_first, bias_second = np.zeros(len(unit)), np.zeros(2 * size)
    for a, b in spots:
        for g in range(groups):
            output = pixel[g, a, b]
            bias_second[2 * output : 2 * output + 2] = weights["second.bias"][2 * g : 2 * g + 2]
            for k in range(g * hidden, (g + 1) * hidden):
                bias_first[unit[k, a, b]] = weights["first.bias"][k]
            for i, j in itertools.product(range(transform.kernel), repeat=2):
                other = (a + i - half, b + j - half)
                if other not in spots:
                    continue
                seen = [pixel[(m, *other)] for m in range(g + 1)]
                linear[output, seen[:g]] = weights["linear.weight"][g, :g, i, j]
                for k in range(g * hidden, (g + 1) * hidden):
                    first[unit[k, a, b], seen] = weights["first.weight"][k, : g + 1, i, j]
                units = [unit[(k, *other)] for k in range(g * hidden)]
                for which in (0, 1):
                    second[2 * output + which, units] = weights["second.weight"][2 * g + which, : len(units), i, j]
    return {"linear": linear, "first": first, "second": second, "bias_first": bias_first, "bias_second": bias_second}


NAMES = ("z", "ladj", "x", "ladj of x", "log_prob")


def by_hand(transform: fastmaf.LocalAutoregressive, x: Tensor, z: Tensor) -> dict[str, Tensor]:
    """The same with dense matrices, every step in the dtype of x; the inverse takes a whole pass for each degree."""
    matrix = {name: torch.from_numpy(value).to(x.dtype) for name, value in dense(transform).items()}
    of, bound = degrees(transform.shape, patch=transform.patch, reverse=transform.reverse), transform.log_scale_bound

    def parameters(x: Tensor) -> tuple[Tensor, Tensor]:
        units = (x @ matrix["first"].T + matrix["bias_first"]).clamp_min(0)
        shift, raw = (units @ matrix["second"].T + matrix["bias_second"]).view(len(x), -1, 2).unbind(2)
        return shift + x @ matrix["linear"].T, bound * torch.tanh(raw / bound)

    shift, log_scale = parameters(x)
    there, ladj = (x - shift) * torch.exp(-log_scale), -log_scale.sum(dim=1)
    log_prob = ladj - 0.5 * (there * there + math.log(2 * math.pi)).sum(dim=1)
    back = torch.zeros_like(z)
    for degree in range(int(of.max()) + 1):
        shift, log_scale = parameters(back)
        back = torch.where(of == degree, z * torch.exp(log_scale) + shift, back)
    return dict(zip(NAMES, (there, ladj, back, log_scale.sum(dim=1), log_prob), strict=True))


@CASE
def test_against_dense_matrices(shape: Shape, options: dict[str, Any]) -> None:
    transform, size = block(shape, **options), features_of(shape)
    x, z = normal(4, size), normal(4, size, seed=1)
    flow = fastmaf.Flow(size, [transform])
    expected = by_hand(transform, x, z)
    for name, actual in zip(NAMES, (*flow(x), *flow.inverse(z), flow.log_prob(x)), strict=True):
        assert_close("slogdet", actual.detach(), expected[name], name)
    terms = flow.nll_per_dim(x).detach()
    assert_close("values", terms.sum(dim=1), -flow.log_prob(x))
    _, log_scale = transform.forward_per_dim(x, torch.zeros_like(x))
    assert_close("slogdet", terms, 0.5 * expected["z"].square() + 0.5 * math.log(2 * math.pi) + log_scale)


@pytest.mark.parametrize("shape, options", [CASES[0], CASES[1], CASES[6], CASES[7]], ids=str)
def test_float32(shape: Shape, options: dict[str, Any]) -> None:
    """No less exact than dense matrices in float32; the truth is the same block in float64."""
    size = features_of(shape)
    errors: dict[str, list[tuple[float, float]]] = {}
    peer: dict[str, list[tuple[float, float]]] = {}
    for seed in range(6):
        single = block(shape, dtype=F32, seed=10 * seed, scale=0.15, **options)
        x, z = normal(33, size, seed=seed, dtype=F32), normal(33, size, seed=seed + 50, dtype=F32)
        results = []
        for transform, a, b in ((single, x, z), (copy.deepcopy(single).double(), x.double(), z.double())):
            flow = fastmaf.Flow(size, [transform])
            results.append(dict(zip(NAMES, (*flow(a), *flow.inverse(b), flow.log_prob(a)), strict=True)))
        (actual, truth), other = results, by_hand(single, x, z)
        for name in NAMES:
            assert actual[name].dtype == other[name].dtype == F32
            errors.setdefault(name, []).append(distance(actual[name], truth[name]))
            peer.setdefault(name, []).append(distance(other[name], truth[name]))
    assert_float32(errors, peer)


def convolution(**options: Any) -> MaskedConv2d:
    in_degrees, out_degrees = torch.tensor([0, 0, 1, 3]), torch.tensor([0, 1, 1, 2, 4])
    return MaskedConv2d(in_degrees, out_degrees, 3, generator=generator(), **options).double()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_masked_convolution_by_hand(strict: bool, bias: bool) -> None:
    layer, x = convolution(strict=strict, bias=bias), normal(2, 4, 5, 3)
    sees = torch.tensor(
        [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
        if strict
        else [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    )
    assert torch.equal(layer.mask[:, :, 0, 0].long(), sees)
    assert (layer.bias is not None) == bias
    with torch.no_grad():
        layer.weight.copy_(normal(*layer.weight.shape, seed=1))
    expected = conv2d(x, layer.weight * sees[:, :, None, None], layer.bias, padding=1)
    assert_close("values", layer(x).detach(), expected)
    for outputs in (slice(0, 2), slice(3, 5), slice(2, 2), slice(4, None)):
        assert_close("values", layer(x, outputs).detach(), expected[:, outputs])
    # Outputs see the first inputs only: the rest need not be there yet.
    assert_close("values", layer(x[:, :2], slice(0, 1)).detach(), expected[:, :1])
    assert_close("values", layer(x[:, :3], slice(0, 4)).detach(), expected[:, :4])
    if strict:
        assert_close("values", layer(x[:, :0], slice(0, 1)).detach(), expected[:, :1])


def test_masked_convolution_starts_within_its_bounds() -> None:
    layer, zero = convolution(), convolution(zero=True)
    assert not any(p.any() for p in zero.parameters())
    assert layer.weight.any() and not layer.weight[~layer.mask.expand_as(layer.weight)].any()
    for parameter in layer.parameters():
        assert float(parameter.detach().abs().max()) <= 1 / math.sqrt(4 * 9)
    assert float(layer.weight.detach().abs().max()) > 0.8 / math.sqrt(4 * 9)
