"""Batch shapes of data and samples, and data given as arrays or lists: compared with the same rows in one batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastmaf
from tests.core.helpers import build, generator, normal
from tests.tolerances import F32, F64, assert_close

FEATURES = 7
METHODS = ("forward", "inverse", "log_prob", "nll_per_dim")
SHAPES = ((), (1,), (0,), (2, 3), (2, 0), (0, 2), (4, 1, 2))
DRAWS = ("sample", "rsample", "sample_and_log_prob", "rsample_and_log_prob")


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def flow_of(dtype: torch.dtype = F64, **options: Any) -> fastmaf.MAF:
    return build(FEATURES, order="random", whitening=2, dtype=dtype, **options)


def assert_equal_rows(actual: Any, expected: Any, batch: tuple[int, ...]) -> None:
    for result, rows in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert result.shape == batch + rows.shape[1:]
        assert_close("values", result.reshape(rows.shape).detach(), rows.detach())


@pytest.mark.parametrize("batch", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_values(method: str, batch: tuple[int, ...], backend: str) -> None:
    flow, rows = flow_of(), normal(math.prod(batch), FEATURES)
    assert_equal_rows(getattr(flow, method)(rows.reshape(*batch, FEATURES)), getattr(flow, method)(rows), batch)


STRIDED: dict[str, Callable[[], Tensor]] = {
    "batch axes swapped": lambda: normal(3, 2, FEATURES).transpose(0, 1),
    "features first": lambda: normal(FEATURES, 2, 3).permute(1, 2, 0),
    "every second number": lambda: normal(2, 3, 2 * FEATURES)[..., ::2],
    "expanded": lambda: normal(3, FEATURES).expand(2, 3, FEATURES),
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("method", METHODS)
def test_strides(method: str, layout: str) -> None:
    flow, x = flow_of(), STRIDED[layout]()
    kept = x.clone()
    assert_equal_rows(getattr(flow, method)(x), getattr(flow, method)(x.reshape(6, FEATURES).clone()), (2, 3))
    assert torch.equal(x, kept), "the input was written to"


@pytest.mark.parametrize("batch", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_gradients(method: str, batch: tuple[int, ...]) -> None:
    flow, rows = flow_of(), normal(math.prod(batch), FEATURES)
    gradients = []
    for shape in (batch, rows.shape[:1]):
        x = rows.reshape(*shape, FEATURES).requires_grad_()
        results = as_tuple(getattr(flow, method)(x))
        weights = [normal(result.numel(), seed=1).reshape(result.shape) for result in results]
        torch.autograd.backward(results, weights)
        assert x.grad is not None
        gradients.append([x.grad.reshape(rows.shape), *(p.grad for p in flow.parameters())])
        flow.zero_grad()
    for actual, expected in zip(*gradients, strict=True):
        assert_close("gradients", actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_without_graph_breaks(method: str) -> None:
    flow, rows = flow_of(), normal(6, FEATURES)
    compiled = torch.compile(getattr(flow, method), backend="aot_eager", fullgraph=True)
    for batch in ((2, 3), ()):
        given = rows if batch else rows[:1]
        assert_equal_rows(compiled(given.reshape(*batch, FEATURES)), getattr(flow, method)(given), batch)


@pytest.mark.parametrize("method", METHODS)
def test_vmap(method: str) -> None:
    flow, rows = flow_of(), normal(6, FEATURES)
    expected = getattr(flow, method)(rows)
    assert_equal_rows(torch.func.vmap(getattr(flow, method))(rows), expected, (6,))
    twice = torch.func.vmap(torch.func.vmap(getattr(flow, method)))
    assert_equal_rows(twice(rows.reshape(2, 3, FEATURES)), expected, (2, 3))


def test_functorch_derivatives_of_one_row() -> None:
    flow, rows = flow_of(), normal(3, FEATURES)
    x = rows.clone().requires_grad_()
    (expected,) = torch.autograd.grad(flow.log_prob(x).sum(), x)
    assert_close("gradients", torch.func.vmap(torch.func.grad(flow.log_prob))(rows), expected)
    slopes = torch.func.vmap(torch.func.jacrev(lambda row: flow(row)[0]))(rows)
    assert_close("slogdet", torch.linalg.slogdet(slopes).logabsdet, flow(rows)[1].detach())


def test_half_precision_within_autocast() -> None:
    flow, x = flow_of(F32), normal(2, 3, FEATURES, dtype=torch.bfloat16)
    expected = flow.log_prob(x.float().reshape(6, FEATURES))
    with torch.autocast("cpu"):
        assert_equal_rows(flow.log_prob(x), expected, (2, 3))
        assert_equal_rows(flow.log_prob(x.float().numpy()), expected, (2, 3))


def test_hooks_are_called_once_with_the_shape_of_the_argument() -> None:
    flow, x, shapes = flow_of(), normal(2, 3, FEATURES), []
    flow.register_forward_hook(lambda module, args, result: shapes.append((args[0].shape, result[1].shape)))
    flow(x)
    assert shapes == [((2, 3, FEATURES), (2, 3))]


def test_an_overridden_forward_is_called_once() -> None:
    class Shifted(fastmaf.Flow):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x + 1)

    flow, x = flow_of(), normal(2, 3, FEATURES)
    shifted = Shifted(FEATURES, flow._transforms())
    assert_equal_rows(shifted(x), flow((x + 1).reshape(6, FEATURES)), (2, 3))
    assert_equal_rows(shifted.log_prob(x), flow.log_prob((x + 1).reshape(6, FEATURES)), (2, 3))


def test_rows_are_named_in_row_major_order() -> None:
    flow, x = flow_of(), normal(2, 3, FEATURES)
    x[1, 1, 5] = math.nan
    with pytest.raises(ValueError, match="in 1 of 6 rows, the first in row 4, column 5"):
        flow.log_prob(x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("source", ["seed", "generator", "global"])
def test_sample_shapes(draw: str, shape: tuple[int, ...], source: str) -> None:
    flow = flow_of()

    def drawn(shape: Any) -> Any:
        if source == "global":
            torch.manual_seed(3)
            return getattr(flow, draw)(shape)
        return getattr(flow, draw)(shape, **({"seed": 3} if source == "seed" else {"generator": generator(3)}))

    actual, rows = drawn(shape), drawn(math.prod(shape))
    assert_equal_rows(actual, rows, shape)
    assert_equal_rows(drawn(torch.Size(shape)), rows, shape)
    for result in as_tuple(actual):
        assert result.requires_grad == draw.startswith("r")


def test_rows_of_a_shape_are_numbered_in_row_major_order() -> None:
    flow = flow_of()
    whole = flow.sample(8, seed=5)
    assert_close("values", flow.sample((2, 3), seed=5, start=2).reshape(6, FEATURES), whole[2:])
    assert_close("values", flow.sample(seed=5, start=7), whole[7])


@pytest.mark.parametrize("draw", DRAWS)
def test_a_sample_without_a_shape(draw: str) -> None:
    x, *log_prob = as_tuple(getattr(flow_of(), draw)())
    assert x.shape == (FEATURES,) and all(value.shape == () for value in log_prob)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize(
    ("shape", "error", "words"),
    [
        ((2, -1), ValueError, r"shape.*0 or more.*\(2, -1\)"),
        (-1, ValueError, "shape.*0 or more.*-1"),
        (1.5, TypeError, "shape must be an integer or a sequence of integers; found 1.5"),
        ("3", TypeError, "shape.*'3'"),
        (None, TypeError, "shape.*None"),
        ((2, None), TypeError, r"shape.*\(2, None\)"),
    ],
)
def test_wrong_sample_shapes_are_named(draw: str, shape: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        getattr(flow_of(), draw)(shape)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_arrays_and_lists_are_converted(method: str, dtype: torch.dtype) -> None:
    flow, x = flow_of(dtype), normal(6, FEATURES).round(decimals=2).to(dtype)
    expected = getattr(flow, method)(x)
    array = x.numpy()
    for given in (
        x.double().tolist(),
        tuple(map(tuple, x.double().tolist())),
        array,
        array.astype(np.float64),
        array.astype(">f8"),
        np.flip(array[:, ::-1], 1),
        list(x),
    ):
        assert_equal_rows(getattr(flow, method)(given), expected, (6,))
    assert_equal_rows(getattr(flow, method)(array.reshape(2, 3, FEATURES)), expected, (2, 3))
    assert_equal_rows(getattr(flow, method)(x[0].tolist()), getattr(flow, method)(x[:1]), ())
    assert as_tuple(getattr(flow, method)(array))[0].dtype == dtype


def test_integers_and_read_only_arrays_are_converted() -> None:
    flow, array = flow_of(), np.arange(2 * FEATURES).reshape(2, FEATURES)
    array.setflags(write=False)
    expected = flow.log_prob(torch.from_numpy(array.astype(np.float64)))
    assert_equal_rows(flow.log_prob(array), expected, (2,))
    assert_equal_rows(flow.log_prob(array.tolist()), expected, (2,))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("x", "words"),
    [
        (None, "found NoneType"),
        ("1, 2, 3", "found str"),
        ([["a"] * FEATURES], "found list with entries that are not numbers"),
        ([[None] * FEATURES], "found list with entries that are not numbers"),
        ([[1.0] * FEATURES, [1.0]], "found list with entries of different lengths"),
        ({1: 2}, "found dict"),
        (np.ones((2, FEATURES), complex), "found ndarray with entries that are not numbers"),
        ([torch.ones(FEATURES, requires_grad=True)], "found list: .*requires grad"),
    ],
    ids=str,
)
def test_what_is_no_array_of_numbers_is_refused(method: str, x: Any, words: str) -> None:
    name = "z" if method == "inverse" else "x"
    with pytest.raises(TypeError, match=rf"^{name} must be a tensor, a NumPy array or a nested list.*{words}"):
        getattr(flow_of(), method)(x)


@pytest.mark.parametrize("method", METHODS)
def test_arrays_and_lists_of_wrong_shapes_are_named(method: str) -> None:
    for wrong in ([1.0, 2.0], [[1.0, 2.0]], [], 1.5, np.ones((3, FEATURES, 1))):
        with pytest.raises(ValueError, match=rf"must have shape \[\.\.\., {FEATURES}\]; found \["):
            getattr(flow_of(), method)(wrong)


@pytest.mark.parametrize("build_one", [fastmaf.MAF, fastmaf.MADE], ids=str)
def test_one_hidden_layer_as_an_integer(build_one: Any) -> None:
    options = {"features": 5, "hidden_features": 8}
    shapes = [tuple(p.shape) for p in build_one(**options).parameters()]
    assert shapes == [tuple(p.shape) for p in build_one(**{**options, "hidden_features": (8,)}).parameters()]
    assert shapes == [tuple(p.shape) for p in build_one(**{**options, "hidden_features": np.int64(8)}).parameters()]
    for wrong in (0, -3, (), (4, 0)):
        with pytest.raises(
            ValueError, match=r"hidden_features must (name at least one layer|have entries of 1 or more)"
        ):
            build_one(5, hidden_features=wrong)
    for wrong in (1.5, "64", None, (4, 2.5)):
        with pytest.raises(TypeError, match="hidden_features must be an integer or a sequence of integers"):
            build_one(5, hidden_features=wrong)
