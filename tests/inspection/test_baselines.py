"""The baselines against scipy and scikit-learn, and on images whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import norm
from sklearn.decomposition import PCA
from torch import Tensor

from fastmaf.images.dataset import to_unit
from fastmaf.inspection.baselines import Baseline, PCAResidual, PixelGaussian, PNGSize, all_baselines
from fastmaf.inspection.out_of_fold import k_fold

SIZE = 12


def normals(n: int = 24, seed: int = 0) -> Tensor:
    """Images of three factors and a little noise."""
    rng = np.random.default_rng(seed)
    factors = np.random.default_rng(99).normal(0, 12, (3, 3 * SIZE**2))
    values = 128 + rng.normal(0, 1, (n, 3)) @ factors + rng.normal(0, 2, (n, 3 * SIZE**2))
    return torch.from_numpy(values.round().clip(0, 255).astype(np.uint8)).reshape(n, 3, SIZE, SIZE)


def with_a_spot(pixels: Tensor, row: int, column: int) -> Tensor:
    spoiled = pixels.clone()
    spoiled[:, :, row - 1 : row + 2, column - 1 : column + 2] = 255
    return spoiled


def unit(pixels: Tensor) -> np.ndarray:
    return to_unit(pixels).double().numpy()


def test_names_and_shapes() -> None:
    baselines = all_baselines()
    assert [baseline.name for baseline in baselines] == [
        "per-pixel Gaussian",
        "PCA residual (100)",
        "PCA standardised map",
        "PNG size",
    ]
    for baseline in baselines:
        assert baseline.fit(normals()) is baseline
        for n in (0, 1, 5):
            scores, maps = baseline.score(normals(n, seed=1))
            assert scores.shape == (n,) and scores.dtype == np.float64
            if baseline.name == "PNG size":
                assert maps is None
            else:
                assert maps is not None and maps.shape == (n, SIZE, SIZE) and maps.dtype == np.float32


@pytest.mark.parametrize("baseline", all_baselines(), ids=lambda baseline: baseline.name)
def test_an_image_scores_the_same_in_any_company(baseline: Baseline) -> None:
    new = normals(4, seed=1)
    together, maps = baseline.fit(normals()).score(new)
    for i in range(4):
        alone, own_maps = baseline.score(new[i : i + 1])
        assert alone[0] == pytest.approx(together[i], rel=1e-9)
        if maps is not None and own_maps is not None:
            np.testing.assert_allclose(own_maps[0], maps[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "baseline", [PixelGaussian(), PCAResidual(3), PCAResidual(3, standardised=True)], ids=lambda baseline: baseline.name
)
def test_a_spot_is_found_where_it_is(baseline: Baseline) -> None:
    baseline.fit(normals(40))
    clean = normals(6, seed=1)
    before, _ = baseline.score(clean)
    after, maps = baseline.score(with_a_spot(clean, 5, 7))
    assert (after > before).all() and maps is not None
    for anomaly_map in maps:
        row, column = np.unravel_index(anomaly_map.argmax(), anomaly_map.shape)
        assert abs(row - 5) <= 1 and abs(column - 7) <= 1


def test_gaussian_is_the_likelihood_of_independent_pixels() -> None:
    train, new = normals(), normals(5, seed=1)
    train[:, 0, 0, 0] = 200  # a pixel that never varies gets the variance of rounding
    x, y = unit(train), unit(new)
    deviation = np.maximum(x.std(0), 1 / 255 / np.sqrt(12))
    assert deviation[0] == 1 / 255 / np.sqrt(12)
    terms = -norm(x.mean(0), deviation).logpdf(y)
    scores, maps = PixelGaussian().fit(train).score(new)
    np.testing.assert_allclose(scores, terms.sum(1), rtol=1e-10)
    np.testing.assert_allclose(maps, terms.reshape(5, 3, SIZE, SIZE).sum(1), rtol=1e-5)


@pytest.mark.parametrize("components", [1, 3, 10, 23, 100])
def test_residual_against_sklearn(components: int) -> None:
    train, new = normals(), normals(5, seed=1)
    pca = PCA(min(components, 23), svd_solver="full").fit(unit(train))
    residuals = np.square(unit(new) - pca.inverse_transform(pca.transform(unit(new))))
    baseline = PCAResidual(components).fit(train)
    scores, maps = baseline.score(new)
    assert baseline.name == f"PCA residual ({components})"
    np.testing.assert_allclose(scores, residuals.sum(1), rtol=1e-8)
    np.testing.assert_allclose(maps, residuals.reshape(5, 3, SIZE, SIZE).sum(1), rtol=1e-5)
    of_train, _ = baseline.score(train)
    assert bool(of_train.max() < 1e-20) is (components >= 23)  # 24 normals have 23 directions


def test_residual_of_identical_normals_is_the_distance_to_them() -> None:
    # no direction at all: those of rounding errors would explain a part of the new image
    same, new = normals(1).repeat(7, 1, 1, 1), normals(3, seed=1)
    scores, _ = PCAResidual().fit(same).score(new)
    np.testing.assert_allclose(scores, np.square(unit(new) - unit(same)[0]).sum(1), rtol=1e-12)
    scores, _ = PCAResidual(standardised=True).fit(same).score(new)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("n", [4, 24])
def test_standardised_map_step_by_step(n: int) -> None:
    train, new = normals(n), with_a_spot(normals(4, seed=1), 6, 5)
    x, held_out = unit(train), np.empty((n, 3 * SIZE**2))

    def left(fitted: np.ndarray, of: np.ndarray) -> np.ndarray:
        pca = PCA(min(2, len(fitted) - 1), svd_solver="full").fit(fitted)
        return np.square(of - pca.inverse_transform(pca.transform(of)))

    folds = k_fold(n, min(5, n), 0)
    assert sorted(np.concatenate(folds).tolist()) == list(range(n))
    for fold in folds:
        held_out[fold] = left(np.delete(x, fold, axis=0), x[fold])
    deviation = held_out.std(0, ddof=1)
    assert deviation.min() > 1e-3 * np.median(deviation)  # below, the scores' own rule for constant terms holds
    standard = ((left(x, unit(new)) - held_out.mean(0)) / deviation).clip(-10, 10).reshape(4, 3, SIZE, SIZE).sum(1)
    assert (np.abs(standard) == 30).any() and (np.abs(standard) < 30).any()  # some are clipped in all three colours
    smooth = np.stack([gaussian_filter(plane, 2, mode="nearest") for plane in standard])
    scores, maps = PCAResidual(2, standardised=True).fit(train).score(new)
    np.testing.assert_allclose(maps, smooth, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores, smooth.max((1, 2)), rtol=1e-8)


def test_png_size_grows_with_what_there_is_to_see() -> None:
    flat = torch.full((1, 3, SIZE, SIZE), 90, dtype=torch.uint8)
    noisy = torch.randint(0, 256, (1, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    scores, maps = PNGSize().fit(normals()).score(torch.cat([flat, with_a_spot(flat, 4, 4), noisy]))
    assert maps is None and scores[0] < scores[1] < scores[2]
    assert (scores == scores.round()).all() and scores[0] > 57  # a PNG's signature, header and end
    assert scores[2] >= 3 * SIZE**2  # noise cannot be compressed


@pytest.mark.parametrize("baseline", all_baselines(), ids=lambda baseline: baseline.name)
def test_too_few_or_wrong_images_are_refused(baseline: Baseline) -> None:
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"at least 2 good images; found {n}"):
            baseline.fit(normals(n))
    with pytest.raises(ValueError, match="uint8"):
        baseline.fit(normals().float())
    baseline.fit(normals(2))
    if baseline.name != "PNG size":
        with pytest.raises(ValueError, match="12 pixels a side, as fitted; found 6"):
            baseline.score(normals(2)[:, :, :6, :6])


def test_components_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="components must be at least 1; found 0"):
        PCAResidual(0)
