"""The candidate of a fit: held-out scores, and the choice between its Gaussians."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmaf.inspection.features.candidate import PER_LOCATION, POOLED, FeatureCandidate, fit_features, fit_precomputed
from fastmaf.inspection.features.extractor import Extractor
from fastmaf.inspection.interface import Candidate
from fastmaf.inspection.synthetic_defects.draw import SyntheticDefects, draw_defects
from tests.inspection.features.conftest import TwoMaps


def test_it_is_a_candidate(candidate: FeatureCandidate, pixels: Tensor, drawn: list[SyntheticDefects]) -> None:
    as_candidate: Candidate = candidate
    assert (as_candidate.name, as_candidate.size) == ("efficientnet-lite0", 32)
    scores, maps = as_candidate.held_out([pixels, drawn[0].pixels])
    assert scores.shape == (2, 24) and maps.shape == (2, 24, 32, 32)
    assert np.square(maps[0]).mean() == pytest.approx(1, rel=1e-4)
    model = candidate.model()
    np.testing.assert_array_equal(np.sort(scores[0]), model.calibration.scores)
    assert model.calibration.how == "k-fold" and model.calibration.folds == 10
    assert scores[1].mean() > scores[0].mean()


def test_features_are_computed_once_for_the_same_images(pixels: Tensor, drawn: list[SyntheticDefects]) -> None:
    calls = 0

    class Counting(TwoMaps):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            nonlocal calls
            calls += 1
            return tuple(super().forward(x))

    candidate = fit_features(pixels, Extractor(Counting(), size=32), drawn=drawn, progress=False)
    first = candidate.held_out([pixels, drawn[0].pixels])
    assert calls == 48
    again = candidate.held_out([pixels.clone(), drawn[0].pixels])
    assert calls == 48
    other = pixels.clone()
    other[0, 0, 0, 0] ^= 1
    candidate.held_out([other])
    assert calls == 72
    np.testing.assert_array_equal(first.scores, again.scores)


def test_a_held_out_image_does_not_affect_its_own_score(pixels: Tensor) -> None:
    """Another image in its place changes its score, and its score is that of the model without its fold."""
    extractor = Extractor(TwoMaps(), size=32)
    before = fit_features(pixels, extractor, progress=False)
    fold = next(i for i, part in enumerate(before.folds) if 5 in part)
    gaussian, features = before.gaussians.folds[fold], extractor(pixels[5:6]).flatten(2)
    torch.testing.assert_close(before.good[5:6], gaussian.distances(features), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before.good[5:6], before.gaussians.whole.distances(features), rtol=1e-3)


def test_one_gaussian_for_all_locations_suits_what_has_no_position() -> None:
    """Maps whose locations are all alike: with few images, the many locations tell more than each one does."""
    generator = torch.Generator().manual_seed(0)
    alike = torch.randn(12, 8, 6, 6, generator=generator)
    assert fit_precomputed(alike).figures["features"]["gaussian"] == POOLED
    placed = alike + 5 * torch.randn(1, 8, 6, 6, generator=generator)
    assert fit_precomputed(placed).figures["features"]["gaussian"] == PER_LOCATION


def test_precomputed_features(pixels: Tensor) -> None:
    maps = TwoMaps()(pixels / 255)
    candidate = fit_precomputed([part.detach().numpy() for part in maps])
    assert candidate.name == "precomputed features"
    expected = fit_features(pixels, Extractor(TwoMaps(), size=32), progress=False)
    assert candidate.figures["held_out_nll_of_gaussians"] == pytest.approx(
        expected.figures["held_out_nll_of_gaussians"], rel=1e-3
    )
    with pytest.raises(ValueError, match="at least 3 good images; found 2"):
        fit_precomputed([part[:2] for part in maps])


def test_groups_are_held_out_whole(pixels: Tensor) -> None:
    groups = [str(i // 4) for i in range(24)]
    candidate = fit_features(pixels, Extractor(TwoMaps(), size=32), groups=groups, progress=False)
    assert sorted(len(fold) for fold in candidate.folds) == [4] * 6
    with pytest.raises(ValueError, match="of each of 24 images; found 2"):
        fit_features(pixels, Extractor(TwoMaps(), size=32), groups=["a", "b"], progress=False)


def test_a_module_that_returns_no_maps_is_refused(pixels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"features must be maps .*; found \[1, 3072\]"):
        fit_features(pixels, Extractor(nn.Flatten(), size=32), progress=False)


def test_defects_on_some_of_the_images(pixels: Tensor) -> None:
    """Scores of some images are those of the same models; only the statistics of distances are of fewer images."""
    index = np.array([0, 3, 4, 9, 10, 15, 21])
    images = pixels[torch.from_numpy(index)]
    drawn = [draw_defects(images, seed=1)]
    whole = fit_features(pixels, Extractor(TwoMaps(), size=32), drawn=drawn, index=index, progress=False)
    some = whole.subset(index, images)
    assert sorted(np.concatenate(some.folds)) == list(range(7)) and whole.subset(np.arange(24), pixels) is whole
    torch.testing.assert_close(some.good, whole.good[index])
    scores, maps = some.held_out([images, drawn[0].pixels])
    assert scores.shape == (2, 7) and maps.shape == (2, 7, 32, 32) and np.isfinite(scores).all()
