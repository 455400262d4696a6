"""Fixtures of the tests of training."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastmaf
from fastmaf.training import graph_keys, graphed_step
from tests.training.graph_helpers import RunAgain, needs_gpu


@pytest.fixture
def triton() -> Iterator[None]:
    with fastmaf.use_backend("triton"):
        yield


@pytest.fixture
def run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one makes its class's step call hooks
    step = torch.optim.Adam.step

    @functools.wraps(step)  # with torch's mark that hooks are called
    def refuse(optimizer: Any, closure: Any = None) -> Any:
        assert not RunAgain.running, "torch's own step cannot be captured"
        return step(optimizer, closure)

    monkeypatch.setattr(fastmaf.optim.FusedAdam, "step", refuse)
    monkeypatch.setattr(graphed_step, "record", RunAgain)
    monkeypatch.setattr(graph_keys, "can_replay", lambda flow: True)


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
)
def device(request: pytest.FixtureRequest) -> str:
    """For tests of which steps are replayed, which the CPU shows as well as a GPU."""
    request.getfixturevalue("triton")
    if request.param == "cpu":
        request.getfixturevalue("run_again")
    return str(request.param)
