"""Blocks with a context by the ops of whole blocks, against their layers one by one in float64."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.kernels import composite, dispatch
from fastmaf.kernels.dispatch import use_backend
from fastmaf.kernels.flow import terms
from tests.core.helpers import generator, normal
from tests.tolerances import F32, F64, error

SHAPES: dict[str, dict[str, Any]] = {
    "one": {"features": 1, "hidden_features": 3},
    "small": {"features": 7, "hidden_features": (11, 9), "degrees": "random"},
    "wide": {"features": 90, "hidden_features": (33, 70, 20), "degrees": "random"},
    "large steps": {"features": 300, "hidden_features": (300, 300), "levels": 2},
    "narrow layers": {"features": 600, "hidden_features": (40, 40)},
    "identity": {"features": 20, "hidden_features": (30, 30), "activation": "identity"},
}


@pytest.fixture(autouse=True)
def native() -> Any:
    if (reason := dispatch.missing("flow", "native")) is not None:
        pytest.skip(reason)
    with use_backend("native"):
        yield


def block(name: str) -> fastmaf.AffineAutoregressive:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastmaf.ConnectivityWarning)
        made = fastmaf.MADE(**SHAPES[name], context_features=3, generator=generator(2), dtype=F64)
    return fastmaf.AffineAutoregressive(made, log_scale_bound=1.0, soft_bound=True).requires_grad_(False)


def by_layers(of: fastmaf.AffineAutoregressive, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    z, log_slopes = of.map_forward(x, of.made(x, context))
    return z, log_slopes.sum(1)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype, most", [(F64, 1e-12), (F32, 1e-5)])
def test_both_directions(name: str, dtype: torch.dtype, most: float) -> None:
    exact = block(name)
    own = block(name).to(dtype)
    # Narrow tiles of one sample and more, wide ones, also not full, and a second chunk.
    for batch in (0, 1, 2, 5, 8, 9, 16, 33, 131):
        x, context = normal(batch, exact.features, seed=batch), normal(batch, 3, seed=1)
        z, ladj = by_layers(exact, x, context)
        found = own(x.to(dtype), context.to(dtype))
        assert error(found[0], z) < most and error(found[1], ladj) < most, f"batch {batch}"
        back = own.inverse(z.to(dtype), context.to(dtype))
        assert error(back[0], x) < 10 * most and error(back[1], -ladj) < 10 * most, f"batch {batch}"


def test_it_is_the_op_of_whole_blocks_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    of, x, context = block("small"), normal(4, 7), normal(4, 3, seed=1)
    expected = of(x, context)[0], of.inverse(x, context)[0]
    called: list[tuple[str, bool]] = []
    for name in ("forward", "inverse"):
        function = getattr(dispatch.implementation("flow", x), name)

        def counted(*args: Any, name: str = name, function: Any = function, **options: Any) -> Any:
            called.append((name, bool(options.get("terms"))))
            return function(*args, **options)

        monkeypatch.setattr(dispatch.implementation("flow", x), name, counted)
    assert torch.equal(of(x, context)[0], expected[0]) and torch.equal(of.inverse(x, context)[0], expected[1])
    one = context[:1].expand(4, 3)
    of(x, one), of.inverse(x, one)  # a single context changes the biases
    of.requires_grad_(True)
    of.inverse(x, context)  # its steps record no gradients
    assert called == [
        ("forward", True),
        ("inverse", True),
        ("forward", False),
        ("inverse", False),
        ("inverse", True),
    ]


def test_what_no_op_computes_runs_by_layers() -> None:
    x, context = normal(4, 7), normal(4, 3, seed=1)
    for options in ({"activation": "tanh"}, {"residual": True, "hidden_features": (9, 9, 9)}):
        made = fastmaf.MADE(**{**SHAPES["small"], **options}, context_features=3, generator=generator(2), dtype=F64)
        of = fastmaf.AffineAutoregressive(made).requires_grad_(False)
        assert terms.forward_with_terms(x, made.network(context), of._map) is None
        z, _ = of(x, context)
        assert torch.equal(z, by_layers(of, x, context)[0])
        assert error(of.inverse(z, context)[0], x) < 1e-12


def test_weights_stored_in_fewer_bits() -> None:
    flow = fastmaf.MAF(20, 2, (30, 30), context_features=3, seed=0)
    x, context = normal(9, 20, dtype=F32), normal(9, 3, seed=1, dtype=F32)
    for stored in (torch.bfloat16, torch.float8_e4m3fn):
        frozen = flow.to_inference(stored)
        z, _ = frozen(x, context)
        with use_backend("torch"):
            assert error(z, frozen(x, context)[0]) < 1e-5
            expected = frozen.inverse(z, context)[0]
        assert error(frozen.inverse(z, context)[0], expected) < 1e-5


def test_gradients_of_weights_and_context_beside_the_native_steps() -> None:
    of = block("wide").requires_grad_(True)
    leaves = [normal(5, 90, seed=1).requires_grad_(), normal(5, 3, seed=2).requires_grad_()]
    results = []
    for inverse in (of.inverse, lambda z, c: composite.network_inverse(z, of.made.network(c), of.map_inverse)):
        x, ladj = inverse(*leaves)
        loss = x.sin().sum() + ladj.square().sum()
        results.append(torch.autograd.grad(loss, [*leaves, *of.parameters()]))
    for found, expected in zip(*results, strict=True):
        assert error(found, expected) < 1e-10


def test_terms_that_do_not_fit_are_refused() -> None:
    of, x = block("small"), normal(4, 7)
    network = of.made.network(normal(5, 3))
    with pytest.raises(ValueError, match="terms"):
        terms.forward_with_terms(x, network, of._map)
