"""The score and the map that a fit settles on by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastmaf.inspection import settle
from fastmaf.inspection.choose import choose
from fastmaf.inspection.choose_location import choose_location
from fastmaf.inspection.fit import Fitted, fit
from fastmaf.inspection.location import Location
from fastmaf.inspection.scores import ScoreSettings
from fastmaf.inspection.settle import LOCATIONS, SCORES, settled
from tests.inspection.tiny import TINY

OPEN = replace(TINY, score=None, location=None)


def test_what_a_recipe_says_is_kept(fitted: tuple[torch.Tensor, Fitted]) -> None:
    score, location = ScoreSettings("nll"), Location(3, 1.0)
    found = settled(replace(TINY, score=score, location=location), fitted[0], fitted[1].cross)
    assert found == (score, location, {})


@pytest.mark.parametrize("margin", [-10.0, 10.0])
def test_another_is_taken_only_where_it_is_better_by_a_margin(
    fitted: tuple[torch.Tensor, Fitted], margin: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a margin below zero the best is taken, with one that nothing reaches the first."""
    pixels, cross = fitted[0], fitted[1].cross
    # Worse ones first, so that there is something to be better than.
    scores, places = (ScoreSettings(grain=9.0), ScoreSettings()), (Location(0, sigma=9.0), Location())
    monkeypatch.setattr(settle, "SCORES", scores)
    monkeypatch.setattr(settle, "LOCATIONS", places)
    monkeypatch.setattr(settle, "_ERRORS", 1000 * margin)
    monkeypatch.setattr(settle, "_GAIN", margin)
    score, location, said = settled(OPEN, pixels, cross)
    judged = {c.settings: c.image_auroc for c in choose(pixels, cross, candidates=scores, draws=1, progress=False)}
    seen = {p.location: p.mean for p in choose_location(pixels, cross, candidates=places, draws=1, progress=False)}
    assert judged[scores[1]] > judged[scores[0]] and seen[places[1]] > seen[places[0]]
    assert (score, location) == ((scores[1], places[1]) if margin < 0 else (scores[0], places[0]))
    assert list(said["drawn_auroc"].values()) == [judged[one] for one in scores]
    assert list(said["drawn_maps"].values()) == [seen[one] for one in places]


def test_a_fit_settles_and_says_so() -> None:
    pixels = torch.randint(0, 256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    model = fit(pixels, OPEN, progress=False).model
    assert model.settings in SCORES and replace(model.location, usual=1.0) in LOCATIONS
    assert set(model.about["drawn_auroc"]) == {"grain 0", "grain 0.7"}
    assert set(model.about["drawn_maps"]) == {"150 factors", "800 factors"}
    assert model.about["recipe"]["score"]["grain"] == model.settings.grain
    assert model.about["recipe"]["location"]["factors"] == model.location.factors


def test_the_first_ones_are_the_defaults() -> None:
    assert SCORES[0] == ScoreSettings() and LOCATIONS[0] == Location()
