"""Flows of nflows, zuko and normflows, and how those that were converted are compared with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tests.tolerances import F32, F64

nflows = pytest.importorskip("nflows.flows")
zuko = pytest.importorskip("zuko")
normflows = pytest.importorskip("normflows")

TOLERANCE = 1e-9  # relative, in float64
FEATURES, WIDTHS = st.integers(1, 64), st.integers(1, 40)
ACTIVATIONS = st.sampled_from([functional.relu, torch.relu, functional.leaky_relu])


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """nflows draws noise of the default dtype."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(F32)


def trained(flow: nn.Module, loss: Callable[[], Tensor]) -> nn.Module:
    """Takes a few steps, so that no parameter or running statistic is at its start; then evaluates."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return flow.eval()


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    assert error < TOLERANCE, f"relative error {error:.1e}"


def seeded(draw: Callable[[], Any]) -> Any:
    torch.manual_seed(7)
    with torch.no_grad():
        return draw()


def normal_flow(layer: nn.Module) -> nn.Module:
    base = normflows.distributions.DiagGaussian(4)
    return normflows.NormalizingFlow(base, [layer])  # type: ignore[no-any-return]
