"""Augmented samples, given as mixtures of a basis, and the limit on decomposed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmaf.transforms import augmented_rows
from fastmaf.transforms.factor_analysis import Augment, FactorModel, fit_factors, fit_factors_of_folds
from fastmaf.transforms.leading_vectors import leading_vectors
from tests.core.factors import World, close, covariance, nll, shifted
from tests.core.helpers import generator, normal
from tests.tolerances import F32, F64, error

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


def test_augment_takes_each_sample_from_the_source() -> None:
    """The first few samples determine the components over the copies; then each is asked for once, in order."""
    seen: list[Tensor] = []

    def augment(larger: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(larger)
        return shifted(larger[:, 0] / 2), torch.eye(3, dtype=larger.dtype)

    x = World(30, 2).draw(77)
    source = torch.stack((2 * x, torch.full_like(x, 9)), dim=1)
    of_source = fit_factors(x, 2, augment=augment, source=source)
    assert torch.equal(torch.cat(seen)[-77:], source) and len(torch.cat(seen)) <= 77 + 32
    close(of_source, fit_factors(x, 2, augment=lambda x: (shifted(x), torch.eye(3, dtype=x.dtype))))


AUGMENTS: list[Augment | None] = [None, lambda x: (shifted(x), torch.eye(3, dtype=x.dtype))]


@pytest.mark.parametrize("augment", AUGMENTS, ids=["plain", "augmented"])
def test_more_rows_than_are_decomposed(augment: Augment | None, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(40, 3)
    x, new = world.draw(300), world.draw(600, seed=1)
    whole = fit_factors(x, 3, augment=augment)
    monkeypatch.setattr(augmented_rows, "_MAX_ROWS", 180)
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
    monkeypatch.setattr(augmented_rows, "_MAX_ROWS", 100)
    x = World(150, 2).draw(300)
    for augment in AUGMENTS:
        fit_factors(x, 2, augment=augment)
    assert 90 <= max(sizes) <= 100


def test_models_of_folds_have_not_seen_their_fold() -> None:
    """The model without a part is the same whatever the part holds, except for the scale of the first round."""
    x = World(80, 3).draw(40)
    parts = list(torch.arange(40).split(10))
    augment = AUGMENTS[1]
    models, whole = fit_factors_of_folds(x, 3, parts, augment=augment)
    for k, (part, model) in enumerate(zip(parts, models, strict=True)):
        others = torch.cat([other for other in parts if other is not part])
        assert error(model.mean, shifted(x[others]).mean(dim=(0, 1))) < 1e-12
        assert nll(model, x[part]) < nll(whole, x[part]) + 1
        # The factors are the leading directions of the copies of the other samples, in units of some scale.
        if k == 0:
            changed = x.clone()
            changed[part] = x[part].flip(0) * 0.97
            again = fit_factors_of_folds(changed, 3, parts, augment=augment)[0][0]
            assert error(again.mean, model.mean) < 1e-12
            assert error(covariance(again), covariance(model)) < 0.05


def test_the_model_of_all_samples_is_that_of_fit_factors() -> None:
    x, order = World(50, 3).draw(33), torch.randperm(33, generator=generator(0))
    parts = [order[i::5].sort().values for i in range(5)]
    close(fit_factors_of_folds(x, 3, parts)[1], fit_factors(x, 3))
    with pytest.raises(ValueError, match="at least 2 parts and a rank of at least 0; found 1 and 3"):
        fit_factors_of_folds(x, 3, parts[:1])


@pytest.mark.parametrize("m, rank", [(600, 12), (700, 60)])
def test_leading_vectors_of_a_large_matrix_capture_as_much_as_the_exact_ones(m: int, rank: int) -> None:
    """A spectrum as of images: it falls with a power, and one vector dominates."""
    spectrum = torch.arange(1, m + 1, dtype=F64) ** -1.5
    spectrum[0] = 1e3
    turn = torch.linalg.qr(normal(m, m)).Q
    gram = turn * spectrum @ turn.T
    for dtype, slack in ((F64, 2e-3), (F32, 3e-3)):
        values, vectors = leading_vectors(gram.to(dtype), rank)
        assert values.shape == (rank,) and vectors.shape == (m, rank)
        assert error(vectors.T @ vectors, torch.eye(rank, dtype=F64)) < (1e-10 if dtype == F64 else 1e-4)
        captured = (vectors.T @ gram @ vectors).diagonal()
        assert float(captured[1:].sum()) > (1 - slack) * float(spectrum[1:rank].sum())
        assert error(values[:4], spectrum[:4]) < 1e-3


def test_rows_of_few_components_keep_the_second_moment() -> None:
    """Of copies that are nearly linear in the shift, few rows hold 99.8 % of the variance; of others, all are used."""
    x = World(64, 2).draw(50)
    angle = torch.arange(64.0, dtype=F64) * (2 * torch.pi / 64)
    wave = x[:, :1] * angle.sin() + x[:, 1:2] * angle.cos()

    def slow(y: Tensor) -> tuple[Tensor, Tensor]:
        copies = torch.stack([y.roll(k, dims=1) for k in range(-2, 3)], dim=1)
        return copies, torch.eye(5, dtype=y.dtype)

    parts = list(torch.arange(50).split(25))
    for y, most in ((wave, 2), (x, 5)):
        rows = augmented_rows.augmented_rows(y, parts, slow, y, generator(0))
        copies = slow(y)[0].flatten(0, 1)
        centred = copies - copies.mean(dim=0)
        actual, expected = rows.values.square().sum(), centred.square().sum() / 5
        assert len(rows.values) <= 50 * most
        assert 0.99 * float(expected) < float(actual) <= float(expected) * (1 + 1e-9)
        assert error(rows.mean_without[0], slow(y[25:])[0].mean(dim=(0, 1))) < 1e-12
