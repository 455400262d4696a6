"""Choosing a backend: by name, for a while, nested; what is missing is said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastmaf
from fastmaf.kernels import dispatch
from tests.core.helpers import build, normal


def test_context_manager_restores() -> None:
    assert dispatch.chosen() is None
    with fastmaf.use_backend("torch"):
        assert dispatch.chosen() == "torch"
        with fastmaf.use_backend(None):
            assert dispatch.chosen() is None
            with fastmaf.use_backend("torch"):
                assert dispatch.chosen() == "torch"
            assert dispatch.chosen() is None
        assert dispatch.chosen() == "torch"
    assert dispatch.chosen() is None


def test_context_manager_restores_after_an_error() -> None:
    with pytest.raises(KeyError), fastmaf.use_backend("torch"):
        raise KeyError
    assert dispatch.chosen() is None


def test_global_setter() -> None:
    fastmaf.use_backend("torch")
    assert dispatch.chosen() == "torch"
    with fastmaf.use_backend(None):
        assert dispatch.chosen() is None
    assert dispatch.chosen() == "torch"
    fastmaf.use_backend(None)
    assert dispatch.chosen() is None


@pytest.mark.parametrize("name", ["cuda", "", "Torch", "naive"])
def test_unknown_names_are_refused(name: str) -> None:
    fastmaf.use_backend("torch")
    with pytest.raises(ValueError, match="reference.*|native") as caught:
        fastmaf.use_backend(name)
    assert repr(name) in str(caught.value)
    for known in dispatch.names():
        assert known in str(caught.value)
    assert dispatch.chosen() == "torch", "a refused name changed the choice"


@pytest.mark.parametrize("name", ["native", "triton"])
def test_missing_backends_say_what_is_missing(name: str) -> None:
    missing = [op for op in dispatch.OPS if dispatch.missing(op, name) is not None]
    if not missing:
        pytest.skip(f"the {name} backend is installed here")
    with pytest.raises(fastmaf.BackendUnavailableError, match=name) as caught:
        fastmaf.use_backend(name)
    assert any(op in str(caught.value) for op in dispatch.OPS), "the message does not say which op lacks it"
    assert len(str(caught.value)) > 30, "the message does not say what would help"
    assert dispatch.chosen() is None, "a backend that is not there was chosen"
    with pytest.raises(fastmaf.BackendUnavailableError), fastmaf.use_backend(name):
        raise AssertionError("the block ran")


def test_the_default_runs_and_is_torch_where_nothing_else_is() -> None:
    flow, x = build(7), normal(3, 7)
    with fastmaf.use_backend("torch"):
        expected = flow.log_prob(x)
    assert torch.allclose(flow.log_prob(x), expected)
    for op in dispatch.OPS:
        assert dispatch.why_not(op, "torch", x) is None
        name = dispatch.default_backend(op, x)
        assert name in dispatch.names() and dispatch.why_not(op, name, x) is None


def test_an_unknown_instruction_set_is_warned_of() -> None:
    code = "import fastmaf, torch; print(fastmaf.MAF(3, 2, 8).log_prob(torch.zeros(1, 3)).shape)"
    environment = {**os.environ, "FASTMAF_ISA": "AVX 3"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "FASTMAF_ISA has no effect, and plain torch runs instead" in done.stderr
    assert done.stdout == "torch.Size([1])\n"


def test_the_choice_reaches_every_op_and_every_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd runs backward passes on threads of its own: the choice must hold there too."""
    calls: list[str] = []
    real = dispatch.implementation

    def spy(op: str, like: torch.Tensor) -> Any:
        calls.append(f"{op} {dispatch.chosen()}")
        return real(op, like)

    for name in ("masked_linear.op", "affine_output.op", "flow.forward", "flow.inverse"):
        # Not by its dotted path: there the op's function hides the folder of the same name.
        monkeypatch.setattr(sys.modules[f"fastmaf.kernels.{name}"], "implementation", spy)
    flow = build(7)
    uses: dict[str, tuple[Callable[[], torch.Tensor], set[str]]] = {
        "log_prob": (lambda: flow.log_prob(normal(3, 7)), {"flow torch"}),
        "nll_per_dim": (lambda: flow.nll_per_dim(normal(3, 7)), {"masked_linear torch", "affine_output torch"}),
        "rsample": (lambda: flow.rsample(2), {"flow torch"}),
    }
    with fastmaf.use_backend("torch"):
        for name, (use, expected) in uses.items():
            calls.clear()
            result = use()
            assert set(calls) == expected, name
            calls.clear()
            result.sum().backward()
            assert set(calls) == expected, f"backward pass of {name}"


def test_the_former_name_is_explained() -> None:
    with pytest.raises(ValueError, match="'reference' is called 'torch' now"):
        fastmaf.use_backend("reference")


def test_a_backend_is_refused_tensors_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_chosen", "triton")
    with pytest.raises(fastmaf.BackendUnavailableError, match="triton.*cuda.*cpu"):
        dispatch.implementation("masked_linear", torch.zeros(2))
