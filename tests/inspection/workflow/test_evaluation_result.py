"""The results of an evaluation in words."""

from __future__ import annotations

import json

import numpy as np

from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.evaluate import TableRow
from fastmaf.inspection.workflow.evaluation_result import EvaluationResult
from fastmaf.metrics.auroc import PairedDifference
from tests.inspection.tiny import calibration_of

LOW = PairedDifference(-0.2, -0.3, -0.1, 0.0, 2000)
ROWS = (
    TableRow("map, mean of top 0.5%", "score", 0.9, (0.8, 1.0), None, 0.95, 0.8, None, True),
    TableRow("typicality |NLL - mean|", "score", 0.7, (0.6, 0.8), LOW, None, None, None, False),
    TableRow("PCA residual (100)", "baseline", 0.85, (0.7, 0.9), LOW, 0.96, 0.7, LOW, False),
)


def test_the_table_and_the_verdicts() -> None:
    result = EvaluationResult("model.safetensors", calibration_of(99), ROWS, {"good": (23, 0), "crack": (1200, 16)})
    lines = result.describe().splitlines()
    assert lines[2].split("  ")[0] == ROWS[0].name and "(this model)" in lines[2] and lines[2].endswith("0.800")
    assert "-0.300 to -0.100" in lines[3] and "0.600 to 0.800" in lines[3]
    assert "baselines with a higher pixel AUROC than this model: PCA residual (100)" in lines
    assert not any("higher image AUROC" in line or "higher AU-PRO" in line for line in lines)
    assert lines[-3:] == [
        "verdicts at the threshold 95:",
        "good: 0 of 23 called anomalous (false alarms), 95% interval 0.0% to 14.8%",
        "crack: 16 of 1,200 found, 95% interval 0.8% to 2.2%",
    ]
    assert all(len(line) <= 100 for line in lines)


def test_columns_of_pixels_are_explained_where_there_are_any() -> None:
    without = EvaluationResult("m", calibration_of(99), ROWS[1:2] + (ROWS[0],), {"good": (1, 0)})
    assert "AU-PRO: how well" in without.describe()
    (plain,) = (TableRow("NLL", "score", 0.9, (0.8, 1.0), None, None, None, None, True),)
    assert "AU-PRO: how well" not in EvaluationResult("m", calibration_of(99), (plain,), {"good": (1, 0)}).describe()


def test_an_infinite_threshold_is_null() -> None:
    calibration = Calibration(np.array([1.0, np.inf]), 0.05, None, "split")
    content = EvaluationResult("m", calibration, ROWS, {"good": (2, 1)}).to_json()
    assert json.loads(json.dumps(content, allow_nan=False))["threshold"] is None
    assert [row["kind"] for row in content["scores"]] == ["score", "score", "control"], "the names in metrics.json"
