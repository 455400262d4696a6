"""Evaluations as CSV, JSON and text."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from fastmaf.metrics.evaluate import evaluate_scores
from fastmaf.metrics.result_files import format_table, to_json, write_metrics, write_scores
from fastmaf.metrics.results import Evaluation, EvaluationError


def published_confusion() -> Evaluation:
    """Scores of only two values that give the published run's confusion matrix [[12, 11], [8, 101]]."""
    nll = np.array([0.0] * 12 + [1.0] * 11 + [0.0] * 8 + [1.0] * 101)
    return evaluate_scores(nll, ["good"] * 23 + ["crack"] * 60 + ["poke"] * 49, bootstrap=50)


def test_scores_file(tmp_path: Path) -> None:
    nll = np.array([-41545.123456789, -40000.1, 1.9e6])
    labels = ["good", "crack, deep", "poke"]
    paths: list[str | Path] = [Path("test/good/000.png"), "test/crack, deep/ä 1.png", "test/poke/\udcff.png"]
    e = evaluate_scores(nll, labels, held_out_nll=np.full(19, -40000.1), features=12288)
    target = tmp_path / "new" / "scores.csv"
    write_scores(target, paths, labels, nll, e, 12288)
    with open(target, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "label", "nll", "bits_per_dim", "anomalous_youden", "anomalous_held_out"]
    assert [row["file"] for row in rows] == [str(p) for p in paths] and [row["label"] for row in rows] == labels
    assert [float(row["nll"]) for row in rows] == nll.tolist()
    assert float(rows[0]["bits_per_dim"]) == pytest.approx(-41545.123456789 / 12288 / math.log(2))
    assert [row["anomalous_youden"] for row in rows] == ["0", "1", "1"]
    assert [row["anomalous_held_out"] for row in rows] == ["0", "0", "1"]
    without = evaluate_scores(nll, labels)
    write_scores(target, paths, labels, nll, without, 12288)
    assert all(line.endswith(",") for line in target.read_bytes().decode("utf-8", "replace").splitlines()[1:])
    with pytest.raises(EvaluationError, match="3 scores and 2 files"):
        write_scores(target, paths[:2], labels, nll, e, 12288)
    assert [p.name for p in target.parent.iterdir()] == ["scores.csv"]


def test_metrics_file_holds_everything_and_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    e = published_confusion()
    target = tmp_path / "metrics.json"
    extra = {"model": Path("m.safetensors"), "seconds": np.float32(1.5), "worst": math.nan, "settings": {"lr": 1e-4}}
    write_metrics(target, e, extra)
    content = json.loads(target.read_text())
    assert content["youden"]["confusion"] == [[12, 11], [8, 101]]
    assert content["youden"]["anomaly"]["recall"] == pytest.approx(101 / 109)
    assert content["counts"] == {"good": 23, "crack": 60, "poke": 49} and content["n_anomalous"] == 109
    assert content["auroc"] == e.auroc and content["roc"]["thresholds"] == ["inf", 1.0, 0.0]
    assert content["model"] == "m.safetensors" and content["seconds"] == 1.5 and content["worst"] is None
    assert content["settings"] == {"lr": 1e-4} and content == to_json(e, extra)
    assert json.loads(json.dumps(to_json(e))) == to_json(e)
    with pytest.raises(EvaluationError, match="auroc"):
        write_metrics(target, e, {"auroc": 1})

    def fail(*_: object) -> None:
        raise OSError("no space left")

    before = target.read_bytes()
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_metrics(target, e, {"n": 2})
    assert target.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_table_shows_the_numbers_and_fits_a_terminal() -> None:
    rng = np.random.default_rng(0)
    nll = np.concatenate([rng.normal(-41545, 1602, 23), rng.normal(-39000, 2e3, 108), [1.9e6]])
    labels = ["good"] * 23 + ["crack"] * 54 + ["faulty_imprint"] * 55
    e = evaluate_scores(nll, labels, held_out_nll=nll[:23] + 10, features=12288)
    text = format_table(e)
    assert all(len(line) <= 110 for line in text.splitlines())
    interval = e.auroc_interval
    assert interval is not None and f"AUROC {e.auroc:.4f}" in text and f"{interval[0]:.3f} to {interval[1]:.3f}" in text
    for report in (e.youden, e.held_out):
        assert report is not None
        assert f"accuracy {report.accuracy:.3f}" in text and f"{report.threshold:,.2f}" in text
        assert " ".join(report.how.split()) in " ".join(text.split())
    assert "faulty_imprint" in text and f"{e.per_class['good'].mean:,.0f}" in text
