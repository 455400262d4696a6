"""Score settings, term statistics and smoothing."""

from __future__ import annotations

import pytest
import torch

from fastmaf.inspection.scoring.score import TermStatistics, smoothing
from fastmaf.inspection.scoring.settings import ScoreSettings


def test_smoothing_keeps_a_constant_and_spreads_a_point() -> None:
    matrix = smoothing(9, 1.5)
    assert torch.allclose(matrix.sum(dim=1), torch.ones(9, dtype=torch.float64))
    assert 0 < float(matrix[4, 2]) < float(matrix[4, 3]) < float(matrix[4, 4])


def test_statistics_of_a_term_that_never_varied() -> None:
    terms = torch.tensor([[1.0, 0.0], [1.0, 2.0], [1.0, 4.0]])
    statistics = TermStatistics.of(terms, torch.zeros(3))
    assert statistics.deviation.tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="at least 2"):
        TermStatistics.of(terms[:1], torch.zeros(1))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"kind": "best"}, "kind: expected one of"),
        ({"sigma": 0.0}, "sigma"),
        ({"top": 2.0}, "top"),
        ({"presmooth_sigma": -1.0}, "presmooth_sigma"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreSettings(**wrong)  # type: ignore[arg-type]
