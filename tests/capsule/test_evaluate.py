"""Evaluating a model on a labelled test set: numbers, files, figures and notes."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmaf.capsule import evaluate as evaluation_module
from fastmaf.capsule.evaluate import HISTOGRAM_FILE, METRICS_FILE, ROC_FILE, SCORES_FILE, evaluate
from fastmaf.capsule.models import Model
from fastmaf.images.dataset import load_test, load_train, to_unit
from fastmaf.images.decode import DataError
from fastmaf.metrics import plots
from fastmaf.metrics.results import Evaluation, EvaluationError
from tests.capsule.runs import CLASSES


@pytest.fixture(autouse=True)
def undrawn() -> Iterator[None]:
    """Leaves the figures undrawn: that takes most of the time of a tiny evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nll_hist", "roc_curve"):
            patch.setattr(evaluation_module, name, lambda path, *_: path.touch())
        yield


@pytest.fixture
def evaluated(model: Model, labelled: Path, tmp_path: Path) -> Callable[..., Evaluation]:
    def call(model: Model = model, data: Path = labelled, **options: Any) -> Evaluation:
        return evaluate(model, data, tmp_path / "out", progress=False, **options)

    return call


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def held_out_nll(model: Model, data: Path) -> np.ndarray:
    images = load_train(data, size=8, progress=False)
    index = [i for i, path in enumerate(images.paths) if path.name in model.held_out]
    with torch.no_grad():
        return -model.flow.log_prob(to_unit(images.pixels[index])).double().numpy()


def test_scores_are_negative_log_likelihoods(
    model: Model, labelled: Path, evaluated: Callable[..., Evaluation], tmp_path: Path
) -> None:
    evaluation = evaluated()
    images = load_test(labelled, size=8, progress=False)
    with torch.no_grad():
        expected = -model.flow.log_prob(to_unit(images.pixels)).double()
    with open(tmp_path / "out" / SCORES_FILE, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["nll"]) for row in rows] == pytest.approx(expected.tolist(), rel=1e-6)
    assert [row["label"] for row in rows] == ["good"] * 4 + [name for name, n in CLASSES.items() for _ in range(n)]
    assert [Path(row["file"]) for row in rows] == list(images.paths)
    bits = (expected / (192 * np.log(2))).tolist()
    assert [float(row["bits_per_dim"]) for row in rows] == pytest.approx(bits, rel=1e-6)
    anomalous = [int(row["anomalous_youden"]) for row in rows]
    assert anomalous == [int(float(row["nll"]) >= evaluation.youden.threshold) for row in rows]
    assert evaluation.counts == {"good": 4, **CLASSES}
    good = expected[:4].numpy()
    pairs = [(d > g) + 0.5 * (d == g) for d in expected[4:].numpy() for g in good]
    assert evaluation.auroc == pytest.approx(np.mean(pairs), abs=1e-12)


def test_metrics_hold_both_thresholds(
    model: Model, labelled: Path, evaluated: Callable[..., Evaluation], tmp_path: Path
) -> None:
    evaluated(extra={"seconds_per_sample": 0.5})
    metrics = json.loads((tmp_path / "out" / METRICS_FILE).read_text())
    with open(tmp_path / "out" / SCORES_FILE, newline="") as file:
        assert metrics["youden"]["threshold"] in [float(row["nll"]) for row in csv.DictReader(file)]
    assert "test labels" in metrics["youden"]["how"]
    scores = held_out_nll(model, labelled)
    assert len(scores) == 3
    assert metrics["held_out"]["threshold"] == pytest.approx(scores.max(), rel=1e-6), "three images are too few for 5%"
    assert metrics["held_out"]["promised_rate"] == pytest.approx(1 / 4)
    assert set(metrics["per_class"]) == {"good", *CLASSES}
    assert len(metrics["auroc_interval"]) == 2
    assert metrics["seconds_per_sample"] == 0.5
    assert metrics["model"] == model.path.name
    for report in (metrics["youden"], metrics["held_out"]):
        assert sum(map(sum, report["confusion"])) == 9
        assert set(report["anomaly"]) == {"precision", "recall", "f1"} == set(report["normal"])


def test_the_false_alarm_rate_reaches_the_threshold(
    model: Model, labelled: Path, evaluated: Callable[..., Evaluation]
) -> None:
    scores = np.sort(held_out_nll(model, labelled))
    report = evaluated(false_alarm=0.5).held_out
    assert report is not None
    assert report.threshold == pytest.approx(scores[1], rel=1e-6)  # ceil(4 · 0.5) = the second of three
    with pytest.raises(EvaluationError, match="false_alarm"):
        evaluated(false_alarm=1.5)


def test_the_figures_are_pictures(
    evaluated: Callable[..., Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nll_hist", "roc_curve"):
        monkeypatch.setattr(evaluation_module, name, getattr(plots, name))
    evaluated()
    for name in (HISTOGRAM_FILE, ROC_FILE):
        picture = pixels(tmp_path / "out" / name)
        assert min(picture.shape[:2]) > 300
        assert len(np.unique(picture[..., 0])) > 20, "it is not blank"


def test_the_bootstrap_repeats_by_seed(evaluated: Callable[..., Evaluation]) -> None:
    assert evaluated(seed=1).auroc_interval == evaluated(seed=1).auroc_interval


def test_missing_held_out_images_are_reported(
    model: Model,
    labelled: Path,
    evaluated: Callable[..., Evaluation],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = Path(shutil.copytree(labelled, tmp_path / "data"))
    gone, *left = sorted(model.held_out)
    (other / "train" / "good" / gone).unlink()
    report = evaluated(data=other).held_out
    output = capsys.readouterr().err
    assert "1 of 3 held-out good images not found in" in output
    assert "taken from the others" in output
    assert report is not None
    assert "2 held-out good images" in report.how
    for name in left:
        (other / "train" / "good" / name).unlink()
    evaluation = evaluated(data=other)
    assert "no threshold from held-out good images" in capsys.readouterr().err
    assert evaluation.held_out is None
    assert json.loads((tmp_path / "out" / METRICS_FILE).read_text())["held_out"] is None


def test_a_test_set_without_training_images_is_evaluated(
    labelled: Path, evaluated: Callable[..., Evaluation], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "data"
    shutil.copytree(labelled / "test", other / "test")
    evaluation = evaluated(data=other)
    assert evaluation.held_out is None
    assert evaluation.auroc == evaluated().auroc
    output = capsys.readouterr().err
    assert f"no folder train/good in {other}: no threshold from held-out good images" in output
    assert (tmp_path / "out" / ROC_FILE).is_file()


def test_a_model_that_held_nothing_out_has_one_threshold(model: Model, evaluated: Callable[..., Evaluation]) -> None:
    evaluation = evaluated(model=dataclasses.replace(model, held_out=()))
    assert evaluation.held_out is None
    assert evaluation.held_out_reason == "there are no held-out good images"


@pytest.mark.parametrize(("gone", "word"), [(["good"], "good"), (list(CLASSES), "defective")])
def test_a_test_set_without_good_or_without_defects(
    labelled: Path, evaluated: Callable[..., Evaluation], tmp_path: Path, gone: list[str], word: str
) -> None:
    other = Path(shutil.copytree(labelled, tmp_path / "data"))
    for name in gone:
        shutil.rmtree(other / "test" / name)
    with pytest.raises(EvaluationError, match=f"found no {word} ones "):
        evaluated(data=other)
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_test_images_are_named_or_left_out(
    labelled: Path, evaluated: Callable[..., Evaluation], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(labelled, tmp_path / "data"))
    (other / "test" / "crack" / "001.png").write_text("no image at all")
    with pytest.raises(DataError, match=r"crack.001\.png"):
        evaluated(data=other)
    assert evaluated(data=other, skip_bad=True).counts["crack"] == 1
    assert "1 file skipped" in capsys.readouterr().err


def test_no_test_folder(labelled: Path, evaluated: Callable[..., Evaluation], tmp_path: Path) -> None:
    other = tmp_path / "data"
    shutil.copytree(labelled / "train", other / "train")
    with pytest.raises(DataError, match=r"no folder test in "):
        evaluated(data=other)


def test_scores_that_are_nan_name_the_model(
    model: Model, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_module, "nll_of", lambda flow, images, **_: np.full(len(images), np.nan))
    with pytest.raises(EvaluationError) as caught:
        evaluate(model, labelled, tmp_path / "out", progress=False)
    assert str(caught.value).startswith(f"{model.path}: ") and "scores are NaN" in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []
