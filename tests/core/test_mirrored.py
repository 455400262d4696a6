"""``init="mirrored"``: pairs of opposite units, within the masks, from which a network starts linear."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fastmaf
from fastmaf.nn import MADE
from tests.core.helpers import blocks_of, generator, normal, train


def made(features: int, *hidden: int, degrees: object = "spread") -> MADE:
    options = {"init": "mirrored", "generator": generator(), "dtype": torch.float64}
    return MADE(features, hidden, degrees=degrees, **options)  # type: ignore[arg-type]


def test_pairs_of_one_degree_start_linear() -> None:
    degrees = [2 * (torch.arange(units) // 2) + 1 for units in (16, 12)]
    network, x, y = made(17, 16, 12, degrees=degrees), normal(5, 17), normal(5, 17, seed=1)
    zero = torch.zeros_like(x)
    difference = network(x + y) - network(x) - network(y) + network(zero)
    assert difference.abs().max() < 1e-12 < network(x).abs().max()


@pytest.mark.parametrize("hidden", [(1,), (8,), (9, 7), (6, 11, 5)], ids=str)
def test_units_are_opposite_where_both_may_see(hidden: tuple[int, ...]) -> None:
    network = made(13, *hidden)
    for layer in network.hidden:
        weight, even = layer.dense_weight(), layer.out_features // 2 * 2
        assert torch.equal(weight[1:even:2], -weight[0:even:2]) and bool(weight.any(dim=1).all())
        assert torch.equal(layer.bias[1:even:2], -layer.bias[0:even:2])
    output = network.output.dense_weight()
    assert output.abs().max() <= 2 / math.sqrt(13) / math.sqrt(hidden[-1])


def test_wide_layers_are_not_mirrored() -> None:
    weight = made(2, 9).hidden[0].dense_weight()
    assert not torch.equal(weight[1:8:2], -weight[0:8:2])


@pytest.mark.parametrize("features, hidden", [(1, (3,)), (2, (5, 4)), (7, (9, 6)), (31, (16, 17))], ids=str)
def test_flows_are_autoregressive_and_invert_once_trained(features: int, hidden: tuple[int, ...]) -> None:
    flow = fastmaf.MAF(features, 2, hidden, order="natural", init="mirrored", dtype=torch.float64, seed=0)
    train(flow, normal(64, features, seed=1), steps=5)
    x = normal(3, features)
    jacobian = torch.autograd.functional.jacobian(lambda row: flow(row)[0], x[0])
    assert torch.equal(jacobian, jacobian.tril())
    assert torch.allclose(flow.inverse(flow(x)[0])[0], x, rtol=0, atol=1e-10)
    assert all(layer.layout.padding_is_zero(layer.weight.detach()) for b in blocks_of(flow) for layer in b.made.layers)


def test_seeds_repeat_and_nothing_is_drawn_on_meta() -> None:
    first, second = (fastmaf.MAF(5, 2, (6,), init="mirrored", seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(p.is_meta for p in fastmaf.MAF(5, 2, (6,), init="mirrored", device="meta").parameters())


@pytest.mark.parametrize("options", [{"activation": "elu"}, {"residual": True}, {"context_features": 2}])
def test_other_networks_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="plain ReLU networks"):
        fastmaf.MADE(4, (8, 8, 8), init="mirrored", **options)
