"""Choosing a backend: by name, for a while, nested; what is missing is said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastmaf
from fastmaf.kernels import backends
from tests.core.helpers import build, normal


def test_context_manager_restores() -> None:
    assert backends.chosen() is None
    with fastmaf.use_backend("reference"):
        assert backends.chosen() == "reference"
        with fastmaf.use_backend(None):
            assert backends.chosen() is None
            with fastmaf.use_backend("reference"):
                assert backends.chosen() == "reference"
            assert backends.chosen() is None
        assert backends.chosen() == "reference"
    assert backends.chosen() is None


def test_context_manager_restores_after_an_error() -> None:
    with pytest.raises(KeyError), fastmaf.use_backend("reference"):
        raise KeyError
    assert backends.chosen() is None


def test_global_setter() -> None:
    fastmaf.use_backend("reference")
    assert backends.chosen() == "reference"
    with fastmaf.use_backend(None):
        assert backends.chosen() is None
    assert backends.chosen() == "reference"
    fastmaf.use_backend(None)
    assert backends.chosen() is None


@pytest.mark.parametrize("name", ["cuda", "", "Reference", "naive"])
def test_unknown_names_are_refused(name: str) -> None:
    fastmaf.use_backend("reference")
    with pytest.raises(ValueError, match="reference.*|native") as caught:
        fastmaf.use_backend(name)
    assert repr(name) in str(caught.value)
    for known in backends.names():
        assert known in str(caught.value)
    assert backends.chosen() == "reference", "a refused name changed the choice"


@pytest.mark.parametrize("name", ["native", "triton"])
def test_missing_backends_say_what_is_missing(name: str) -> None:
    missing = [op for op in backends.OPS if backends.missing(op, name) is not None]
    if not missing:
        pytest.skip(f"the {name} backend is installed here")
    with pytest.raises(fastmaf.BackendUnavailableError, match=name) as caught:
        fastmaf.use_backend(name)
    assert any(op in str(caught.value) for op in backends.OPS), "the message does not say which op lacks it"
    assert len(str(caught.value)) > 30, "the message does not say what would help"
    assert backends.chosen() is None, "a backend that is not there was chosen"
    with pytest.raises(fastmaf.BackendUnavailableError), fastmaf.use_backend(name):
        raise AssertionError("the block ran")


def test_the_default_runs_and_is_the_reference_where_nothing_else_is() -> None:
    flow, x = build(7), normal(3, 7)
    with fastmaf.use_backend("reference"):
        expected = flow.log_prob(x)
    assert torch.allclose(flow.log_prob(x), expected)
    for op in backends.OPS:
        assert backends.why_not(op, "reference", x) is None
        name = backends.default_backend(op, x)
        assert name in backends.names() and backends.why_not(op, name, x) is None


def test_the_choice_reaches_every_op_and_every_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd runs backward passes on threads of its own: the choice must hold there too."""
    calls: list[str] = []
    real = backends.implementation

    def spy(op: str, like: torch.Tensor) -> Any:
        module = real(op, like)

        def wrap(name: str) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                calls.append(f"{op} {name} {backends.chosen()}")
                return getattr(module, name)(*arguments)

            return call

        return SimpleNamespace(forward=wrap("forward"), backward=wrap("backward"))

    for op in backends.OPS:
        # Not by its dotted path: there the op's function hides the folder of the same name.
        monkeypatch.setattr(sys.modules[f"fastmaf.kernels.{op}.op"], "implementation", spy)
    flow = build(7)
    with fastmaf.use_backend("reference"):
        flow.log_prob(normal(3, 7)).sum().backward()
        flow.nll_per_dim(normal(3, 7)).sum().backward()
        flow.rsample(2).detach()
    both_ways = ("masked_linear", "affine_output", "chain")
    expected = {f"{op} {way} reference" for op in both_ways for way in ("forward", "backward")}
    assert set(calls) == expected | {"level_inverse forward reference"}
    calls.clear()
    with fastmaf.use_backend("reference"):
        flow.rsample(2).sum().backward()
    assert "level_inverse backward reference" in calls


def test_a_backend_is_refused_tensors_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_chosen", "triton")
    with pytest.raises(fastmaf.BackendUnavailableError, match="triton.*cuda.*cpu"):
        backends.implementation("masked_linear", torch.zeros(2))
