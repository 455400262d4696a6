"""Training with the defaults of ``MAF`` and plain Adam: no run diverges."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastmaf
from tests.core.helpers import blocks_of, generator, normal

WINDOW, STEPS, TRAINING = 10, 200, 2000


def bent() -> Tensor:
    """D = 2: a parabola with noise."""
    x = normal(3000, 2, seed=1)
    x[:, 1] = x[:, 0] ** 2 + 0.2 * x[:, 1]
    return x


def heavy_tailed() -> Tensor:
    """D = 6: a random walk times a random scale, Student's t with 3 degrees of freedom."""
    return normal(3000, 6, seed=2).cumsum(dim=1) / normal(3000, 3, seed=3).square().mean(dim=1, keepdim=True).sqrt()


def near_copies() -> Tensor:
    """D = 63: mixtures of 8 causes, a third of them exponentiated, the last 8 nearly the first 8.

    Standardised, it has outliers of 77 standard deviations. Log-scales within ±5 in every block make their density
    vanish: the held-out NLL is then 10⁶ nats per dimension and more.
    """
    x = normal(3000, 8, seed=4) @ normal(8, 63, seed=5) / math.sqrt(8)
    x[:, ::3] = (2 * x[:, ::3]).exp()
    x[:, -8:] = x[:, :8]
    return x + 0.05 * normal(3000, 63, seed=6)


def run(flow: fastmaf.Flow, x: Tensor, seed: int) -> tuple[float, float]:
    """Trains with plain Adam; returns the held-out NLL and the largest rise of the mean loss of a window of steps above
    the lowest one before it, both in nats per dimension.
    """
    optimizer, rows, losses = torch.optim.Adam(flow.parameters(), lr=1e-3), generator(seed), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = -flow.log_prob(x[torch.randint(TRAINING, (64,), generator=rows)]).mean() / flow.features
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    means = [statistics.fmean(losses[i : i + WINDOW]) for i in range(0, STEPS, WINDOW)]
    with torch.no_grad():
        nll = -float(flow.log_prob(x[TRAINING:]).mean()) / flow.features
    return nll, max(mean - min(means[:i]) for i, mean in enumerate(means) if i)


@pytest.mark.parametrize("draw, seed", [(bent, 1), (heavy_tailed, 1), (near_copies, 1), (near_copies, 2)])
def test_the_defaults_train_stably_with_plain_adam(draw: Callable[[], Tensor], seed: int) -> None:
    """The loss never rises by half a nat per dimension, and ends below that of the diagonal Gaussian."""
    x = draw()
    x = (x - x[:TRAINING].mean(dim=0)) / x[:TRAINING].std(dim=0)
    nll, rise = run(fastmaf.MAF(x.shape[1], hidden_features=(32, 32), seed=seed), x.float(), seed)
    assert nll < float(0.5 * x[TRAINING:].square().mean()) + 0.5 * math.log(2 * math.pi)
    assert rise < 0.5


@pytest.mark.parametrize("blocks, bound", [(1, 7.0), (2, 3.5), (7, 1.0), (20, 1.0)])
def test_the_default_bound_depends_on_the_number_of_blocks(blocks: int, bound: float) -> None:
    actual = [(block.log_scale_bound, block.soft_bound) for block in blocks_of(fastmaf.MAF(3, blocks, (4,)))]
    assert actual == [(bound, True)] * blocks


def test_no_bound_is_neither_hard_nor_soft() -> None:
    block = blocks_of(fastmaf.MAF(3, 1, (4,), log_scale_bound=None))[0]
    assert block.log_scale_bound is None and not block.soft_bound
