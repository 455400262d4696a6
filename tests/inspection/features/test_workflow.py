"""``fastmaf inspect fit --features``, with the architecture of the pretrained network and random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastmaf.cli.app import app
from fastmaf.inspection.decisions import decisions
from fastmaf.inspection.features import efficientnet_lite
from fastmaf.inspection.features.extractor import Extractor
from fastmaf.inspection.model import load_inspection
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.workflow.fit import fit
from tests.inspection.features.conftest import random_network
from tests.inspection.tiny import silent


def test_unknown_features_are_refused_before_any_work(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", "fit", "--data", str(tmp_path), "--features", "resnet"])
    assert result.exit_code == 2 and "features must be 'efficientnet-lite0'" in result.output


def test_a_run_with_features(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Extractor(random_network(), efficientnet_lite.NAME, 64)
    monkeypatch.setattr("fastmaf.inspection.workflow.fit.extractor_of", lambda name: small)
    recipe = Recipe(8, 4, "none", blocks=0, folds=3)
    result = fit(data, tmp_path / "run", recipe, features="efficientnet-lite0", progress=False, say=silent)
    model = load_inspection(tmp_path / "run")
    assert model.size == 64 and "efficientnet-lite0" in model.about["chosen"]
    names = [name for name in decisions(model) if name.endswith("features")]
    assert len(names) == 1 and "176 channels of efficientnet-lite0 at 4 x 4" in decisions(model)[names[0]]
    text = result.describe(explain=True)
    assert "image AUROC on synthetic defects: per location" in text
    assert json.loads(json.dumps(result.summary()))["size"] == 64
    assert "efficientnet-lite0" in (tmp_path / "run" / "report.html").read_text("utf-8")
