"""What a fit tells its user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastmaf.inspection.fit import Fitted
from fastmaf.inspection.workflow.fit_result import FitResult


@pytest.fixture
def result(fitted: tuple[torch.Tensor, Fitted]) -> FitResult:
    return FitResult(fitted[1], images=24, out=Path("a run"))


def test_short_and_explained_form(result: FitResult) -> None:
    about, calibration = result.fitted.model.about, result.fitted.model.calibration
    short, explained = result.describe().splitlines(), result.describe(explain=True)
    assert short[0].startswith(f"24 good images at 16 x 16 pixels; held-out NLL {about['held_out_nll']:,.0f} nats")
    assert calibration.describe() in "\n".join(short) and calibration.describe(explain=True) in explained
    assert f"whitening alone {about['held_out_nll_of_whitening']:,.0f}" in explained and "(3 folds)" in explained
    assert "whitening alone" not in short[0]
    for line in (short[-1], explained.splitlines()[-1]):
        assert str(Path("a run") / "model.safetensors") in line and str(Path("a run") / "report.html") in line
        assert line.endswith('next: fastmaf inspect score "a run" NEW_IMAGES')


def test_summary_is_json(result: FitResult) -> None:
    summary, model = result.summary(), result.fitted.model
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["images"] == 24 and summary["held_out_nll"] == model.about["held_out_nll"]
    assert summary["calibration"] == model.calibration.summary()
    assert summary["score"]["sigma"] == model.settings.sigma
    assert summary["anomaly_map"]["factors"] == model.map_config.factors
    assert summary["files"]["model"] == str(Path("a run") / "model.safetensors")
    assert summary["seconds"]["total"] == sum(result.fitted.seconds.values())
