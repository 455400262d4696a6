"""Groups, images in series, and scores that do not look like those of the calibration."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastmaf
from fastmaf.images.dataset import to_unit
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.decisions import decisions
from fastmaf.inspection.exchangeability import describe_groups, drift, order_matters
from fastmaf.inspection.fit import fit
from fastmaf.inspection.out_of_fold import group_folds
from tests.inspection.tiny import FIXED, calibration_of, waves


def series(groups: int, each: int, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Images of parts that each have a pattern of their own."""
    rng = np.random.default_rng(seed)
    patterns = rng.normal(0, 25, (groups, 1, 3, 16, 16))
    pixels = 128 + patterns + rng.normal(0, 3, (groups, each, 3, 16, 16))
    labels = [f"part {g}" for g in range(groups) for _ in range(each)]
    return torch.from_numpy(np.clip(pixels, 0, 255).astype(np.uint8)).flatten(0, 1), labels


def test_folds_hold_whole_groups_of_similar_size() -> None:
    labels = [f"g{i % 7}" for i in range(70)]
    folds = group_folds(labels, 5)
    assert sorted(np.concatenate(folds).tolist()) == list(range(70)) and len(folds) == 5
    for fold in folds:
        inside = {labels[i] for i in fold}
        assert inside.isdisjoint({label for i, label in enumerate(labels) if i not in fold})
        assert 10 <= len(fold) <= 20
    assert len(group_folds(["a", "b", "a"], 5)) == 2
    with pytest.raises(ValueError, match="at least two groups; found 1"):
        group_folds(["a"] * 9, 3)


def test_images_in_series_are_noticed_and_others_not() -> None:
    pixels, _ = series(6, 10)
    x = to_unit(pixels)
    assert "neighbouring images are alike" in str(order_matters(x, 5, 0))
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    assert order_matters(x[shuffled], 5, 0) is None
    assert order_matters(to_unit(waves(60)), 5, 0) is None
    assert order_matters(x[:19], 5, 0) is None, "too few to tell"


def test_a_threshold_of_groups_is_for_images_of_new_groups() -> None:
    """Random folds see every part: their threshold is far too low for a new one."""
    (pixels, labels), (new, _) = series(8, 8), series(4, 8, seed=9)
    recipe = replace(FIXED, blocks=0, augmentation="none")
    with pytest.warns(UserWarning, match="--group-by"):
        random = fit(pixels, recipe, progress=False).model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grouped = fit(pixels, recipe, groups=labels, progress=False).model
    alarms = [float(model.calibration.is_anomalous(model.scores(new)).mean()) for model in (random, grouped)]
    assert alarms[0] > 0.5 and alarms[1] < 0.3
    assert "8 groups" in decisions(grouped)["groups"] and "groups" not in decisions(random)
    assert grouped.calibration.folds == 8  # as many as there are groups
    with pytest.raises(ValueError, match="group of each of 64 images; found 63"):
        fit(pixels, recipe, groups=labels[1:], progress=False)


def test_the_guarantee_of_groups_names_their_number() -> None:
    scores = np.arange(1.0, 41)
    calibration = Calibration(scores, 0.05, None, "k-fold", 5)
    few = describe_groups(["a"] * 20 + ["b"] * 20, scores, calibration)
    assert few == (
        "held out by 2 groups: false alarms from 0% to 5% of a group; at most 5% cannot be guaranteed for new groups "
        "(this needs 19 groups, 2 available)"
    )
    many = describe_groups([str(i // 2) for i in range(40)], scores, calibration)
    assert "from 0% to 50% of a group; the rate is on average over new groups" in many and "20 available" in many


def test_drift_is_reported_for_higher_scores_only() -> None:
    calibration, rng = calibration_of(200), np.random.default_rng(0)
    alike = [drift(calibration, rng.uniform(0, 201, 60)) for _ in range(30)]
    assert alike == [None] * 30
    scores = rng.uniform(60, 260, 100)
    above = int((scores > calibration.threshold).sum())
    text = str(drift(calibration, scores))
    assert f"{above} of 100 images above the threshold, 5 expected of good ones" in text
    assert "recalibrate" in text and "do not look like the calibration images" in text
    assert drift(calibration, rng.uniform(0, 100, 60)) is None
    assert drift(calibration, np.full(19, 1e3)) is None and drift(calibration, np.full(20, 1e3)) is not None
    assert drift(calibration_of(19), np.full(50, 1e3)) is None


def test_a_detector_takes_groups() -> None:
    pixels, labels = series(4, 6)
    images = pixels.permute(0, 2, 3, 1).contiguous()
    with pytest.warns(UserWarning) as caught:
        detector = fastmaf.Detector(size=16, blocks=0, folds=3).fit(images, groups=labels)
    assert [str(warning.message) for warning in caught] == ["a false-alarm rate of 0.05 needs 19 groups; found 4"]
    assert "4 groups" in decisions(detector.model_)["groups"]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="groups are for images"):
        fastmaf.Detector().fit(np.zeros((5, 2)), groups=list("aabbc"))
