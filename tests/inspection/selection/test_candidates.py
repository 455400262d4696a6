"""Choosing among candidates and their combinations, by scores of held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.combined import CombinedModel
from fastmaf.inspection.interface import AnomalyModel, HeldOut
from fastmaf.inspection.model import Prediction
from fastmaf.inspection.selection.candidates import choose_candidate
from fastmaf.inspection.synthetic_defects.draw import SyntheticDefects
from tests.inspection.tiny import calibration_of

N = 60


class Stub:
    """A candidate, and its model, of given scores."""

    def __init__(self, name: str, size: int, scores: np.ndarray) -> None:
        self.name, self.size, self.scores = name, size, scores
        self.calibration: Calibration = calibration_of(N)
        self.about: dict[str, Any] = {}
        self.device = torch.device("cpu")
        self.map_levels = (0.0, 1.0)

    def held_out(self, sets: Sequence[Tensor]) -> HeldOut:
        assert all(images.shape == (N, 3, self.size, self.size) for images in sets)
        return HeldOut(self.scores, np.ones((len(sets), N, self.size, self.size), np.float32))

    def model(self) -> AnomalyModel:
        return self

    def predict(self, pixels: Tensor, shapes: object = None, *, nll: bool = True) -> Prediction:
        raise NotImplementedError

    def with_calibration(self, calibration: Calibration) -> AnomalyModel:
        raise NotImplementedError

    def save(self, path: object, *, card: object = None) -> None:
        raise NotImplementedError


def scores(seed: int, gain: float) -> np.ndarray:
    """Scores of good images, and of two draws that are larger by ``gain`` standard deviations."""
    noise = np.random.default_rng(seed).normal(size=(3, N))
    return noise + np.array([[0.0], [gain], [gain]])


@pytest.fixture
def images() -> tuple[Tensor, list[SyntheticDefects]]:
    pixels = torch.zeros(N, 3, 16, 16, dtype=torch.uint8)
    kinds = tuple("spot" if i % 2 else "line" for i in range(N))
    return pixels, 2 * [SyntheticDefects(pixels, torch.ones(N, 16, 16, dtype=torch.bool), kinds)]


def test_independent_candidates_are_combined(images: tuple[Tensor, list[SyntheticDefects]]) -> None:
    choice = choose_candidate([Stub("a", 8, scores(0, 1.5)), Stub("b", 16, 100 * scores(1, 1.5))], *images)
    assert choice.names == ("a", "b") and isinstance(choice.model, CombinedModel) and choice.model.size == 16
    areas = choice.figures["drawn_auroc_of_candidates"]
    assert areas["a + b"] > max(areas["a"], areas["b"]) and choice.figures["chosen"] == "a + b"
    assert choice.figures["drawn_gain"] > choice.figures["drawn_gain_error"] > 0
    assert choice.model.about["chosen"] == "a + b" and len(choice.model.calibration.scores) == N


def test_a_worse_candidate_adds_nothing(images: tuple[Tensor, list[SyntheticDefects]]) -> None:
    good, useless = Stub("good", 16, scores(0, 2.0)), Stub("useless", 8, scores(1, 0.0))
    choice = choose_candidate([useless, good], *images)
    assert choice.names == ("good",) and choice.model is good and good.about["chosen"] == "good"


def test_a_smaller_candidate_alone_takes_the_images_reduced(images: tuple[Tensor, list[SyntheticDefects]]) -> None:
    small, useless = Stub("small", 8, scores(0, 2.0)), Stub("useless", 16, scores(1, 0.0))
    choice = choose_candidate([small, useless], *images)
    assert choice.names == ("small",) and isinstance(choice.model, CombinedModel) and choice.model.size == 16


def test_the_same_scores_twice_are_not_combined(images: tuple[Tensor, list[SyntheticDefects]]) -> None:
    first, second = (Stub(name, 16, scores(0, 1.0)) for name in "ab")
    assert choose_candidate([first, second], *images).model is first


def test_names_must_differ(images: tuple[Tensor, list[SyntheticDefects]]) -> None:
    with pytest.raises(ValueError, match="of different names; found \\['a', 'a'\\]"):
        choose_candidate([Stub("a", 8, scores(0, 1)), Stub("a", 16, scores(0, 1))], *images)


def test_a_candidate_that_is_taken_in_any_case(images: tuple[Tensor, list[SyntheticDefects]]) -> None:
    good, worse = Stub("good", 16, scores(0, 2.0)), Stub("worse", 16, scores(1, 1.0))
    assert choose_candidate([good, worse], *images, first="worse").names == ("good", "worse")
    useless = Stub("useless", 16, scores(1, -1.0))
    assert choose_candidate([useless, good], *images, first="good").names == ("good",)
    with pytest.raises(ValueError, match="first must be one of .*; found 'none'"):
        choose_candidate([good], *images, first="none")


def test_a_preferred_candidate_is_replaced_only_by_a_better_one(
    images: tuple[Tensor, list[SyntheticDefects]],
) -> None:
    base = scores(0, 1.0)
    same = base + 0.01 * np.random.default_rng(1).normal(size=base.shape)
    for other in (same, 0.0 * base):
        first, second = Stub("first", 16, other), Stub("second", 16, base)
        names = choose_candidate([second, first], *images, preferred="second").names
        assert names == ("second",)
    near = Stub("near", 16, same), Stub("preferred", 16, base)
    assert "preferred" in choose_candidate(near, *images, preferred="preferred").names
    better = Stub("better", 16, scores(0, 4.0)), Stub("preferred", 16, scores(1, 0.0))
    assert choose_candidate(better, *images, preferred="preferred").names == ("better",)
