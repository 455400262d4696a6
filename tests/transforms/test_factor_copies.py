"""Augmented samples, given as mixtures of a basis, and the limit on decomposed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmaf.transforms import factor_analysis
from fastmaf.transforms.factor_analysis import Augment, FactorModel, fit_factors
from tests.core.factors import World, close, nll, shifted
from tests.core.helpers import generator, normal
from tests.tolerances import F64, error

pytestmark = pytest.mark.usefixtures("one_thread")


def weights_of(copies: int, basis: int, seed: int = 0) -> Tensor:
    actual = torch.rand(copies, basis, generator=generator(seed), dtype=F64)
    return actual / actual.sum(dim=1, keepdim=True)


def mixed(weights: Tensor) -> tuple[Augment, Augment]:
    """Returns an augmentation by mixtures, and the same with each copy written out."""
    copies = len(weights)
    return (
        lambda x: (shifted(x), weights.to(x.dtype)),
        lambda x: (torch.einsum("cp,npd->ncd", weights.to(x.dtype), shifted(x)), torch.eye(copies, dtype=x.dtype)),
    )


@pytest.mark.parametrize("copies", [1, 2, 3, 7])
@pytest.mark.parametrize("n, features", [(40, 90), (200, 12)])
def test_mixtures_are_the_copies_that_they_stand_for(copies: int, n: int, features: int) -> None:
    by_mixtures, by_copies = mixed(weights_of(copies, 3))
    x = World(features, 3).draw(n)
    close(fit_factors(x, 3, augment=by_mixtures), fit_factors(x, 3, augment=by_copies))


@given(copies=st.integers(1, 6), n=st.integers(6, 40), seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_mixtures_of_any_weights(copies: int, n: int, seed: int) -> None:
    """Weights may be negative, as those of bicubic shifts are."""
    weights = normal(copies, 3, seed=seed)
    weights[:, 0] = 1 - weights[:, 1:].sum(dim=1)
    by_mixtures, by_copies = mixed(weights)
    x = World(30, 3, seed=seed).draw(n, seed=seed)
    close(fit_factors(x, 2, augment=by_mixtures), fit_factors(x, 2, augment=by_copies), 1e-6)


def test_one_copy_is_no_augmentation() -> None:
    x = World(50, 3).draw(45)
    alone = fit_factors(x, 3, augment=lambda x: (x[:, None], torch.ones(1, 1, dtype=x.dtype)))
    close(alone, fit_factors(x, 3))
    # Weights that leave out all of the basis but the samples themselves.
    picked = torch.tensor([[1.0, 0, 0]], dtype=F64)
    close(fit_factors(x, 3, augment=lambda x: (shifted(x), picked)), fit_factors(x, 3))


def test_copies_are_explained_and_their_mean_is_the_mean() -> None:
    direction = torch.linalg.vector_norm(normal(60, seed=77)).reciprocal() * normal(60, seed=77)

    def augment(x: Tensor) -> tuple[Tensor, Tensor]:
        """Copies that are brighter in one direction, by 0, 25 and 50."""
        return torch.stack((x, x + 50 * direction), dim=1), torch.tensor([[1, 0], [0.5, 0.5], [0, 1]], dtype=x.dtype)

    x = World(60, 1).draw(50)
    plain, actual = fit_factors(x, 2), fit_factors(x, 2, augment=augment)
    assert error(actual.mean, x.mean(dim=0) + 25 * direction) < 1e-12

    def explained(of: FactorModel) -> float:
        y = direction / of.scale
        return float((y @ of.factors).square().sum() / y.square().sum())

    assert explained(plain) < 0.5 < 0.9 < explained(actual)


def test_augment_is_asked_for_every_sample_once() -> None:
    seen: list[Tensor] = []

    def augment(x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(x)
        return shifted(x), torch.eye(3, dtype=x.dtype)

    x = World(30, 2).draw(77)
    fit_factors(x, 2, augment=augment)
    assert torch.equal(torch.cat(seen), x)


AUGMENTS: list[Augment | None] = [None, lambda x: (shifted(x), torch.eye(3, dtype=x.dtype))]


@pytest.mark.parametrize("augment", AUGMENTS, ids=["plain", "augmented"])
def test_more_rows_than_are_decomposed(augment: Augment | None, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(40, 3)
    x, new = world.draw(300), world.draw(600, seed=1)
    whole = fit_factors(x, 3, augment=augment)
    monkeypatch.setattr(factor_analysis, "_MAX_ROWS", 180)
    one, again, other = (fit_factors(x, 3, augment=augment, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.factors, other.factors) and not torch.equal(one.factors, whole.factors)
    assert torch.equal(one.mean, whole.mean), "the mean is of all samples"
    for actual in (one, other):
        assert nll(actual, new) < nll(whole, new) + 0.1


def test_no_more_rows_than_it_says_are_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    eigh = torch.linalg.eigh

    def counted(matrix: Tensor) -> Any:
        sizes.append(len(matrix))
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    monkeypatch.setattr(factor_analysis, "_MAX_ROWS", 100)
    x = World(150, 2).draw(300)
    for augment in AUGMENTS:
        fit_factors(x, 2, augment=augment)
    assert 90 <= max(sizes) <= 100
