"""The error of three TF32 products in place of a float32 product, as matrix units form them, on trained weights.

No GPU is needed: operands are cut to the bits that the units read, and their sums toward zero after every four terms,
which is no better than what any of them does.
"""

from __future__ import annotations

import functools
from collections import defaultdict

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.kernels.triton_common.launch_table import MOST_SUMMED, TABLES
from fastmaf.kernels.triton_common.work_lists import MOST_COLUMNS
from tests.core.helpers import correlated, layers_of, train
from tests.kernels.cases import needs
from tests.tolerances import F32, assert_float32, distance

pytestmark = [pytest.mark.slow, needs("triton")]

D, SAMPLES, DRAWS = 12_288, 16, 4


def bits(x: Tensor, rounding: int) -> Tensor:
    """Returns the first 11 bits of float32 numbers, after adding ``rounding`` to what is cut off."""
    return ((x.contiguous().view(torch.int32) + rounding) & -0x2000).view(F32)


def toward_zero(x: Tensor) -> Tensor:
    rounded = x.float()
    return torch.where(rounded.double().abs() > x.abs(), torch.nextafter(rounded, torch.zeros(())), rounded)


def units(a: Tensor, b: Tensor, sums: Tensor) -> Tensor:
    """Returns sums + a b, cut toward zero after every four terms."""
    a, b = bits(a, 0).double(), bits(b, 0).double()
    for k in range(0, a.shape[1], 4):
        sums = toward_zero(sums.double() + a[:, k : k + 4] @ b[k : k + 4])
    return sums


def three_products(a: Tensor, b: Tensor, columns: int) -> Tensor:
    """Returns a b as ``device.matmul`` forms it in tiles of so many columns."""
    total = torch.zeros(a.shape[0], b.shape[1])
    for k in range(0, a.shape[1], columns):
        x, w = a[:, k : k + columns], b[k : k + columns]
        x_high, w_high = bits(x, 0x1000), bits(w, 0x1000)
        sums = units(x - x_high, w_high, torch.zeros_like(total))
        total += units(x_high, w_high, units(x_high, w - w_high, sums))
    return total


@functools.cache
def trained() -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Returns dense weights and biases of a block trained for a few steps, and data."""
    flow = fastmaf.MAF(D, 1, (512, 512), order="natural", log_scale_bound=5.0, seed=0)
    data = correlated(SAMPLES * DRAWS, D, dtype=F32)
    train(flow, data, steps=6, lr=1e-3, batch=SAMPLES)
    layers = list(layers_of(flow).values())
    weights = [layer.layout.unpack(layer.weight.detach()) for layer in layers]
    return weights, [layer.bias.detach() for layer in layers], data


def products(draw: int) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Returns operands of the forward and backward pass, and the columns of the kernels' tiles of them."""
    weights, biases, data = trained()
    x = data[draw * SAMPLES : (draw + 1) * SAMPLES]
    h = [x]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        h.append((h[-1] @ weight.t() + bias).relu())
    g = torch.randn(SAMPLES, weights[-1].shape[0], generator=torch.Generator().manual_seed(draw))
    k, many = TABLES[80].dot.columns, 2 * TABLES[80].most_samples  # up to half as many take no matrix products
    of_many = torch.randn(many, 64, generator=torch.Generator().manual_seed(draw))
    return {
        "first layer": (x[:, :MOST_COLUMNS], weights[0][:, :MOST_COLUMNS].t()[:, 256:], k),
        "second layer": (h[1], weights[1].t(), k),
        "output layer": (h[2], weights[2][-512:].t(), k),
        "gradient of the inputs": (g[:, :4096], weights[2][:4096], 16),
        "gradient of the weights": (h[2].t().repeat(1, many // SAMPLES)[:64], of_many, MOST_SUMMED),
    }


def test_errors_are_those_of_float32() -> None:
    """At most twice those of the torch backend, which multiplies in float32."""
    own, peer = defaultdict(list), defaultdict(list)
    for draw in range(DRAWS):
        for name, (a, b, columns) in products(draw).items():
            truth = a.double() @ b.double()
            own[name].append(distance(three_products(a, b, columns), truth))
            peer[name].append(distance(a @ b, truth))
    assert_float32(own, peer)


def test_one_product_errs_more() -> None:
    """What the test above can tell."""
    own, peer = defaultdict(list), defaultdict(list)
    for draw in range(DRAWS):
        a, b, _ = products(draw)["second layer"]
        truth = a.double() @ b.double()
        own["one"].append(distance(units(a, b, torch.zeros(a.shape[0], b.shape[1])), truth))
        peer["one"].append(distance(a @ b, truth))
    with pytest.raises(AssertionError, match="errs more than"):
        assert_float32(own, peer)
