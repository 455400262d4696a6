"""What a fit selected, in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastmaf
from fastmaf.inspection.decisions import decisions
from fastmaf.inspection.model import InspectionModel
from fastmaf.inspection.scoring.score import TermStatistics
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings
from tests.inspection.tiny import calibration_of


def model(recipe: dict[str, Any], score: ScoreSettings | None = None, **about: Any) -> Any:
    """What ``decisions`` reads of a model."""
    about["recipe"] = {"shift_radius": 2, "shift_step": 0.5, "angles": 12, **recipe}
    statistics = TermStatistics(torch.zeros(3), torch.ones(3), 0.0)
    settings = score or ScoreSettings()
    return InspectionModel(fastmaf.Flow(3, []), settings, AnomalyMapConfig(), statistics, calibration_of(20), about)


NLL = {"none": -30.0, "shifts": -32.0, "rotations": -31.0}


@pytest.mark.parametrize(
    ("kind", "nll", "text"),
    [
        ("shifts", NLL, "shifts up to 1 px (no augmentation and rotations fit held-out images worse)"),
        ("shifts", {"shifts": -32.0, "none": -30.0}, "shifts up to 1 px (no augmentation fits held-out images worse)"),
        ("none", {**NLL, "none": -40.0}, "none (shifts and rotations fit held-out images worse)"),
        ("rotations", NLL, "rotations by multiples of 30° (as requested; held-out images are more likely with shifts)"),
    ],
)
def test_augmentation(kind: str, nll: dict[str, float], text: str) -> None:
    fitted = model({"augmentation": kind}, held_out_nll_of_augmentations=nll)
    assert decisions(fitted) == {"augmentation": text}
    explained = decisions(fitted, explain=True)["augmentation"]
    assert explained.startswith(text.partition(" (")[0]) and all(
        f"{name} {v:.0f}" in explained for name, v in nll.items()
    )


@pytest.mark.parametrize(
    ("kept", "nll", "text"),
    [
        (2, -40.0, "2 local blocks (held-out images are more likely with them)"),
        (1, -40.0, "1 local block (held-out images are more likely with it)"),
        (0, -20.0, "none (held-out images are no more likely with local blocks)"),
        (2, -20.0, "2 local blocks (as requested; held-out images are no more likely with local blocks)"),
    ],
)
def test_blocks(kept: int, nll: float, text: str) -> None:
    fitted = model({"blocks": kept}, held_out_nll_with_blocks=nll, held_out_nll_of_whitening=-30.0)
    assert decisions(fitted) == {"blocks": text}
    assert f"{nll:.0f} with them, -30 without" in decisions(fitted, explain=True)["blocks"]


def test_score_and_map() -> None:
    areas, means = {"presmooth 0": 0.8, "presmooth 0.7": 0.9}, {"150 factors": 0.7, "800 factors": 0.7}
    smoothed = model({}, ScoreSettings(presmooth_sigma=0.7), drawn_auroc=areas, drawn_maps=means)
    assert decisions(smoothed) == {
        "score": "whitened values smoothed by 0.7 px before squaring (better on synthetic defects than no smoothing)",
        "anomaly map": "150 factors (no clear gain on synthetic defects from 800 factors)",
    }
    assert "no smoothing 0.800, smoothing by 0.7 px 0.900" in decisions(smoothed, explain=True)["score"]
    references = model({}, drawn_auroc_of_references={"training": 0.9, "held-out": 0.8})
    assert decisions(references) == {
        "standardised by": "training images (better on synthetic defects than held-out images)"
    }
    first = model({}, drawn_auroc=areas)
    assert decisions(first) == {
        "score": "no smoothing before squaring (no clear gain on synthetic defects from smoothing by 0.7 px)"
    }


def test_a_requested_logit() -> None:
    fitted = model({"logit": 0.05}, held_out_nll_without_logit=-1234.0)
    assert decisions(fitted) == {"logit": "alpha 0.05, as requested"}
    assert "-1,234" in decisions(fitted, explain=True)["logit"]


def test_models_that_selected_nothing_and_those_with_other_names() -> None:
    nothing = model({})
    nothing.about.clear()
    assert decisions(nothing) == {}
    earlier = model({}, drawn_auroc={"grain 0": 0.8, "grain 0.7": 0.7})
    assert decisions(earlier) == {"score": "no smoothing before squaring"}
    assert "grain 0.7 0.700" in decisions(earlier, explain=True)["score"]


def test_the_choice_among_models() -> None:
    areas = {"64 pixels": 0.9, "128 pixels": 0.8}
    fitted = model({}, drawn_auroc_of_candidates=areas, chosen="64 pixels", skipped_sizes=[256])
    assert decisions(fitted)["model"] == (
        "64 pixels (image AUROC on synthetic defects 0.900; 128 pixels 0.800; not fitted within the budget: 256 pixels)"
    )
    figures = "64 pixels 0.900, 128 pixels 0.800; not fitted within the budget: 256 pixels"
    assert decisions(fitted, explain=True)["model"] == f"64 pixels (image AUROC on synthetic defects: {figures})"
