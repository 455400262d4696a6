"""Strided, sliced and expanded inputs; errors for wrong shapes, dtypes and devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastmaf
from tests.core.helpers import blocks_of, build, normal
from tests.tolerances import assert_close

FEATURES = 13

VIEWS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: normal(FEATURES, 6).t(),
    "column slice": lambda: normal(6, 3 * FEATURES)[:, FEATURES : 2 * FEATURES],
    "strided columns": lambda: normal(6, 2 * FEATURES)[:, ::2],
    "strided rows": lambda: normal(18, FEATURES)[::3],
    "expanded rows": lambda: normal(1, FEATURES).expand(6, FEATURES),
    "expanded columns": lambda: normal(6, 1).expand(6, FEATURES),
    "storage offset": lambda: normal(200)[7 : 7 + 6 * FEATURES].view(6, FEATURES),
    "flipped": lambda: normal(6, FEATURES).flip(1),
    "three-dimensional slice": lambda: normal(6, FEATURES, 2)[..., 1],
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(view: str) -> None:
    flow, x = build(FEATURES, hidden_features=(17, 9), order="random"), VIEWS[view]()
    kept = x.clone()
    plain = x.clone(memory_format=torch.contiguous_format)
    for method in ("forward", "inverse"):
        for actual, expected in zip(getattr(flow, method)(x), getattr(flow, method)(plain), strict=True):
            assert_close("values", actual, expected, f"{method} of {view}")
    assert_close("values", flow.nll_per_dim(x), flow.nll_per_dim(plain))
    assert torch.equal(x, kept), "the input was written to"


@pytest.mark.parametrize("view", VIEWS)
def test_strided_gradients(view: str) -> None:
    """Both the input and the gradients that come back may be strided or expanded."""
    flow = build(FEATURES)
    x = VIEWS[view]()
    gradients = []
    for data in (x.detach().requires_grad_(), x.clone(memory_format=torch.contiguous_format).requires_grad_()):
        flow.zero_grad()
        z, ladj = flow(data)
        torch.autograd.backward((z, ladj), (VIEWS[view](), torch.ones(1, dtype=torch.float64).expand(6)))
        gradients.append([data.grad, *(p.grad.clone() for p in flow.parameters() if p.grad is not None)])
    for actual, expected in zip(*gradients, strict=True):
        assert_close("gradients", actual, expected)


def test_rows_are_independent_of_their_batch() -> None:
    flow, x = build(FEATURES, degrees="random"), normal(9, FEATURES)
    for method in ("forward", "inverse"):
        whole = getattr(flow, method)(x)[0]
        for rows in (slice(0, 1), slice(3, 8), slice(2, 9, 3)):
            assert_close("values", getattr(flow, method)(x[rows])[0], whole[rows])


def test_masked_linear_takes_leading_dimensions() -> None:
    layer = blocks_of(build(FEATURES))[0].made.layers[0]
    x = normal(2, 3, 4, FEATURES)
    y = layer(x)
    assert y.shape == (2, 3, 4, 7)
    expected = torch.relu(x @ layer.dense_weight().T + layer.bias)
    assert_close("values", y, expected)
    assert layer(x[0, 0, 0]).shape == (7,)
    assert_close("values", layer(x[0, 0, 0]), expected[0, 0, 0])
    assert layer(x[:, :0]).shape == (2, 0, 4, 7)
    assert_close("values", layer(x.transpose(0, 2)), expected.transpose(0, 2))


def test_masked_linear_by_hand() -> None:
    for activation in ("identity", "relu"):
        for strict in (False, True):
            degrees_in, degrees_out = torch.tensor([1, 2, 2, 4]), torch.tensor([0, 1, 2, 3, 4, 4])
            layer = fastmaf.MaskedLinear(
                degrees_in, degrees_out, strict=strict, activation=activation, dtype=torch.float64
            )
            weight, bias, x = normal(6, 4, seed=1), normal(6, seed=2), normal(5, 4, seed=3)
            layer.load_dense_(weight, bias)
            sees = degrees_in < degrees_out[:, None] if strict else degrees_in <= degrees_out[:, None]
            expected = x @ (weight * sees).T + bias
            assert_close("values", layer(x), expected.relu() if activation == "relu" else expected)
            assert torch.equal(layer.dense_weight(), weight * sees)


def test_made_parameters_by_hand() -> None:
    """Its outputs are [N, D, outputs_per_feature]; two of them are shift and raw log-scale."""
    flow = build(FEATURES, blocks=1, order="natural", log_scale_bound=5.0, soft_bound=False)
    block, x = blocks_of(flow)[0], normal(4, FEATURES)
    out = block.made(x)
    assert out.shape == (4, FEATURES, 2)
    shift, log_scale = out[..., 0], out[..., 1].clamp(-5, 5)
    assert_close("values", flow(x)[0], (x - shift) * torch.exp(-log_scale))
    assert_close("values", flow(x)[1], -log_scale.sum(dim=1))
    three = fastmaf.MADE(FEATURES, (8,), outputs_per_feature=3, dtype=torch.float64)
    assert three(x).shape == (4, FEATURES, 3)


METHODS = ("forward", "inverse", "log_prob", "nll_per_dim")


@pytest.mark.parametrize("method", METHODS)
def test_wrong_shapes_are_named(method: str) -> None:
    flow = build(FEATURES)
    call = getattr(flow, method)
    for wrong, actual in (
        ((4, 12), "12"),
        ((4, 14), "14"),
        ((12,), "12"),
        ((2, 13, 3), "2, 13, 3"),
    ):
        with pytest.raises(ValueError, match="13") as caught:
            call(normal(*wrong))
        assert caught.match(actual)


@pytest.mark.parametrize("method", METHODS)
def test_wrong_dtypes_are_named(method: str) -> None:
    flow = build(FEATURES)
    for dtype in (torch.float32, torch.float16, torch.int64, torch.uint8):
        with pytest.raises((ValueError, TypeError), match="float64") as caught:
            getattr(flow, method)(torch.ones(4, FEATURES).to(dtype))
        assert caught.match(str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("method", METHODS)
def test_wrong_devices_are_named(method: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match="meta") as caught:
        getattr(build(FEATURES), method)(torch.ones(4, FEATURES, dtype=torch.float64, device="meta"))
    assert caught.match("cpu")


def test_layers_and_blocks_check_too() -> None:
    block = blocks_of(build(FEATURES))[0]
    x = normal(4, FEATURES)
    for call in (block, block.inverse, block.made, block.made.hidden[0]):
        for wrong in (x[:, :-1], torch.cat((x, x), dim=1), x.float()):
            with pytest.raises((ValueError, TypeError, RuntimeError)):
                call(wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_runs(dtype: torch.dtype) -> None:
    """The torch backend takes any float dtype; its result is that of float64 to the precision of the dtype."""
    flow = build(FEATURES, scale=0.5)
    x = normal(4, FEATURES)
    expected = flow(x)[0].detach()
    actual = flow.to(dtype)(x.to(dtype))[0].detach()
    assert actual.dtype == dtype
    assert float((actual.double() - expected).norm() / expected.norm()) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_row_stays_one_row(value: float) -> None:
    """NaN in one sample reaches no other sample: packed panels are shared by rows of the weight, not by samples."""
    flow, x = build(FEATURES, validate_args=False), normal(5, FEATURES)
    bad = x.clone()
    bad[2, 0] = value
    good = [0, 1, 3, 4]
    assert_close("values", flow.log_prob(bad)[good], flow.log_prob(x)[good])
    assert not torch.isfinite(flow.log_prob(bad)[2])


@pytest.mark.parametrize("name, value", [
    ("features", 2.0), ("features", "2"), ("blocks", 2.5), ("blocks", "2"), ("levels", 1.5), ("seed", "a"),
    ("seed", 1.5),
])  # fmt: skip
def test_numbers_that_are_not_integers_are_named(name: str, value: object) -> None:
    options: dict[str, Any] = {"features": 3, "blocks": 2, "hidden_features": 4, name: value}
    with pytest.raises(TypeError, match=f"{name} must be an integer; found {value!r}"):
        fastmaf.MAF(**options)


def test_features_below_one_are_named() -> None:
    for build_one in (fastmaf.MAF, fastmaf.MADE):
        with pytest.raises(ValueError, match="features must be at least 1; found -1"):
            build_one(features=-1, hidden_features=4)


def test_seeds_and_starts_are_integers_of_any_type() -> None:
    flow = build(3)
    expected = flow.sample(2, seed=5, start=1)
    for five, one in ((np.int64(5), np.uint8(1)), (torch.tensor(5), torch.tensor(1))):
        assert torch.equal(flow.sample(2, seed=five, start=one), expected)
    for options in ({"seed": 1.5}, {"seed": 1, "start": 1.5}):
        with pytest.raises(TypeError, match="must be an integer; found 1.5"):
            flow.sample(2, **options)


def test_a_permutation_may_be_a_list() -> None:
    permutation = fastmaf.Permutation([2, 0, 1])
    assert permutation(torch.tensor([[10.0, 11.0, 12.0]]))[0].tolist() == [[12.0, 10.0, 11.0]]
    for wrong in ([0, 0, 1], [1, 2, 3], [0.0, 1.0], []):
        with pytest.raises(ValueError, match="permutation must be"):
            fastmaf.Permutation(wrong)
