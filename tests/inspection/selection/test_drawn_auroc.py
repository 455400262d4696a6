"""Image AUROCs on synthetic defects and their resamples."""

from __future__ import annotations

import numpy as np
import pytest

from fastmaf.inspection.selection.drawn_auroc import kind_aurocs, resampled_means
from fastmaf.inspection.synthetic_defects.draw import KINDS
from fastmaf.metrics.auroc import auroc


def _of(normal: np.ndarray, defect: np.ndarray) -> float:
    return auroc(np.concatenate([normal, defect]), np.arange(len(normal) + len(defect)) >= len(normal))


@pytest.mark.parametrize(("n", "draws"), [(40, 1), (9, 1), (15, 3)])
def test_resampled_means_are_those_of_resampled_scores(n: int, draws: int) -> None:
    rng = np.random.default_rng(3)
    normal, defect = rng.normal(size=n).round(1), rng.normal(1, 1, n * draws).round(1)  # with ties
    kinds = rng.choice(KINDS[:4], n * draws)
    same, expected = np.random.default_rng(0), []
    for _ in range(30):
        index = same.integers(0, n, n)
        rows = np.concatenate([draw * n + index for draw in range(draws)])
        areas = [_of(normal[index], defect[rows][kinds[rows] == kind]) for kind in KINDS if (kinds[rows] == kind).any()]
        expected.append(np.mean(areas))
    np.testing.assert_allclose(resampled_means(normal, defect, kinds, 30), expected, rtol=1e-12)


def test_every_kind_has_its_auroc() -> None:
    normal, defect = np.array([0.0, 1.0]), np.array([2.0, 0.5])
    assert kind_aurocs(normal, defect, np.array(KINDS[:2])) == {KINDS[0]: 1.0, KINDS[1]: 0.5}
