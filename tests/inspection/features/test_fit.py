"""Pixels and features together, and the detector with features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import Tensor, nn

from fastmaf import Detector
from fastmaf.inspection.combined import CombinedModel
from fastmaf.inspection.features.extractor import Extractor
from fastmaf.inspection.features.fit import fit_with_features
from fastmaf.inspection.features.model import FeatureModel
from fastmaf.inspection.out_of_fold import k_fold
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings
from fastmaf.inspection.sizes import FittedSizes
from fastmaf.inspection.texture.fit import fit_texture
from tests.inspection.features.conftest import TwoMaps
from tests.inspection.texture.conftest import grain

RECIPE = Recipe(16, 8, "none", blocks=0, folds=3, score=ScoreSettings(), map_config=AnomalyMapConfig(factors=4))
SMALL: dict[str, Any] = {"size": 16, "rank": 8, "blocks": 0, "folds": 3}


@pytest.fixture(scope="module")
def both(pixels: Tensor) -> FittedSizes:
    return fit_with_features(pixels, (8, 16), RECIPE, Extractor(TwoMaps(), size=32), progress=False)


def test_the_features_are_used_and_pixels_are_added_where_the_sum_is_better(both: FittedSizes, pixels: Tensor) -> None:
    about = both.model.about
    areas, chosen = about["drawn_auroc_of_candidates"], about["chosen"]
    assert {"8 pixels", "16 pixels", "TwoMaps"} <= set(areas) and "TwoMaps" in chosen.split(" + ")
    assert all(areas[chosen] >= areas[name] for name in areas if name.split(" + ")[-1] == "TwoMaps" and name in chosen)
    assert both.model.size == 32 and both.model.predict(pixels[:2]).anomaly_maps.shape == (2, 32, 32)
    assert both.density.size == 8 and list(both.seconds) == ["8 pixels", "16 pixels", "TwoMaps", "choice"]


def test_sizes_are_at_most_that_of_the_features(pixels: Tensor) -> None:
    with pytest.raises(ValueError, match="at most that of the features, 32; found 64"):
        fit_with_features(pixels, (16, 64), RECIPE, Extractor(TwoMaps(), size=32), progress=False)


def test_a_texture_is_compared_with_the_features() -> None:
    texture = grain(12, 0)
    candidate = fit_texture(texture, k_fold(12, 2))
    seen: list[int] = []

    class Counted(TwoMaps):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            seen.append(len(x))
            return super().forward(x)

    given: Any = {"texture": candidate, "progress": False}
    chosen = fit_with_features(texture, (8,), RECIPE, Extractor(Counted(), size=32), **given)
    assert "Counted" in chosen.model.about["chosen"].split(" + ")
    assert {"Counted", "texture", "Counted + texture"} <= set(chosen.model.about["drawn_auroc_of_candidates"])
    assert sum(seen) == 2 * 12  # of the good images and of those with a defect, once
    result = chosen.model.predict(texture[:2], [(48, 48), (60, 40)])
    assert chosen.model.size == 48 and result.anomaly_maps.shape == (2, 48, 48)


class Pooled(nn.Module):
    """Features of images of 256 pixels that take no time."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 32)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_detector_with_a_module(pixels: Tensor, tmp_path: Path) -> None:
    images = pixels.permute(0, 2, 3, 1).numpy()
    detector = clone(Detector(features=Pooled(), **SMALL)).fit(images)
    assert isinstance(detector.model_, (FeatureModel, CombinedModel)) and detector.calibration_.n == 24
    scores = detector.anomaly_score(images[:3])
    assert np.isfinite(scores).all() and detector.anomaly_map(images[:2]).shape == (2, 256, 256)
    assert detector.offset_ == -detector.calibration_.threshold


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_detector_of_precomputed_features(pixels: Tensor) -> None:
    maps = [part.detach().numpy() for part in TwoMaps()(pixels / 255)]
    detector = Detector(features="precomputed", false_alarm=0.1).fit(maps)
    assert isinstance(detector.model_, FeatureModel) and detector.calibration_.false_alarm == 0.1
    strange = [part + 50 for part in maps]
    assert (detector.predict(strange) == -1).all() and detector.anomaly_map(maps).shape == (24, 64, 64)
    with pytest.raises(ValueError, match=r"features must be \[n, 7, 8, 8\]"):
        detector.anomaly_score(maps[0])
    with pytest.raises(ValueError, match="precomputed features cannot be saved"):
        detector.save("never")
    with pytest.raises(ValueError, match="features must be maps"):
        Detector(features="precomputed").fit(np.zeros((5, 4)))


def test_features_are_of_images() -> None:
    with pytest.raises(ValueError, match="features are of images: X holds rows"):
        Detector(features=TwoMaps()).fit(np.zeros((30, 4)))
    with pytest.raises(ValueError, match="'efficientnet-lite0' or a torch module; found 'vgg'"):
        Detector(features="vgg").fit(torch.zeros(30, 8, 8, 3, dtype=torch.uint8))
