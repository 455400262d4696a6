"""The models of the folds beside a model, and the score of their ensemble."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmaf.images.dataset import load_test, load_train, to_unit
from fastmaf.inspection.fit import fit
from fastmaf.inspection.fold_models import FOLDS_FOLDER, load_fold_models
from fastmaf.inspection.scoring.float64_flow import FlowValues
from fastmaf.inspection.scoring.score import score_maps, terms_of
from fastmaf.inspection.workflow.evaluate import evaluate
from fastmaf.inspection.workflow.fit import fit as fit_folder
from fastmaf.metrics.auroc import auroc
from tests.inspection.tiny import TINY, silent


@pytest.mark.slow
def test_the_ensemble_of_the_folds(data: Path, tmp_path: Path) -> None:
    fitted = fit_folder(data, tmp_path, TINY, keep_folds=True, progress=False, say=silent).fitted
    assert len(load_fold_models(tmp_path, fitted.model)) == 3
    rows = evaluate(tmp_path, data, tmp_path / "e", progress=False, say=silent).rows
    (row,) = [row for row in rows if "3 folds" in row.name]
    assert row.name == f"{rows[0].name}, 3 folds"
    images = load_test(data, size=16, progress=False)
    x, statistics = to_unit(images.pixels), fitted.model.statistics
    terms = [terms_of(FlowValues(flow, x), TINY.score) for flow in fitted.out_of_fold.flows]
    maps = torch.stack([score_maps(part, statistics, TINY.score) for part in terms]).mean(dim=0)
    scores = maps.flatten(1).amax(dim=1).numpy()  # half a percent of 256 is one pixel
    assert not np.allclose(fitted.model.predict(images.pixels).scores, scores, rtol=1e-3)
    assert row.auroc == pytest.approx(auroc(scores, np.array([label != "good" for label in images.labels])))
    # Those of another fit are not taken for this one's.
    other = fit(load_train(data, size=16, progress=False).pixels, replace(TINY, rank=5), progress=False)
    assert not load_fold_models(tmp_path, other.model) and not load_fold_models(tmp_path / FOLDS_FOLDER, fitted.model)
    fit_folder(data, tmp_path, replace(TINY, folds=2), keep_folds=True, progress=False, say=silent)
    assert len(list((tmp_path / FOLDS_FOLDER).iterdir())) == 2
    fit_folder(data, tmp_path, TINY, progress=False, say=silent)
    assert not (tmp_path / FOLDS_FOLDER).exists()
