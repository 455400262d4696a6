"""A model whose scores are no numbers: the error names its file, and the image where images are scored one by one."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fastmaf.inspection.calibration import CalibrationError
from fastmaf.inspection.model import InspectionModel
from fastmaf.inspection.workflow.calibrate import recalibrate
from fastmaf.inspection.workflow.evaluate import evaluate
from fastmaf.inspection.workflow.score import score
from fastmaf.training.checkpoints import MODEL_FILE
from tests.inspection.tiny import silent

QUIET: Any = {"progress": False, "say": silent}


@pytest.mark.parametrize("command", ["score", "recalibrate", "eval"])
def test_scores_that_are_nan(
    data: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    scores = InspectionModel._scores
    monkeypatch.setattr(InspectionModel, "_scores", lambda self, values: _nan(scores(self, values)))
    good = data / "test" / "good"
    calls: dict[str, Callable[[], object]] = {
        "score": lambda: score(run, [str(good)], out=tmp_path / "scores.csv", stdout=io.StringIO(), **QUIET),
        "recalibrate": lambda: recalibrate(run, [str(good)], 0.2, **QUIET),
        "eval": lambda: evaluate(run, data, tmp_path, **QUIET),
    }
    before = (run / MODEL_FILE).read_bytes()
    with pytest.raises(CalibrationError) as caught:
        calls[command]()
    assert str(caught.value).startswith(f"{run / MODEL_FILE}: ") and "NaN" in str(caught.value)
    if command == "score":
        assert f"the score of {sorted(good.iterdir())[0]} is NaN" in str(caught.value)
    assert (run / MODEL_FILE).read_bytes() == before
    assert not (tmp_path / "scores.csv").exists()


def _nan(scores: Tensor) -> Tensor:
    return scores * float("nan")
