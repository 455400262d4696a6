"""From a folder of good images to verdicts: files and commands."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fastmaf
from fastmaf.cli.app import app
from fastmaf.images.decode import DataError
from fastmaf.inspection.decisions import decisions
from fastmaf.inspection.model import is_inspection_model, load_inspection
from fastmaf.inspection.workflow.calibrate import calibrate, recalibrate
from fastmaf.inspection.workflow.choose import choose
from fastmaf.inspection.workflow.evaluate import evaluate
from fastmaf.inspection.workflow.score import score
from tests.inspection.tiny import silent


@pytest.fixture
def model_copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the model file that a test may change."""
    path = tmp_path / "copy.safetensors"
    path.write_bytes((run / "model.safetensors").read_bytes())
    return path


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_fit_leaves_model_log_and_report(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {"model.safetensors", "training_log.csv", "report.html"}
    assert is_inspection_model(run)
    model = load_inspection(run)
    assert model.size == 16 and model.calibration.n == 24 and model.calibration.folds == 3
    assert len((run / "training_log.csv").read_text().splitlines()) == 2  # steps 1 and, were there more, every tenth
    assert isinstance(model.flow.transforms[0], fastmaf.GaussianWhitening)
    assert isinstance(model.flow.transforms[1], fastmaf.LocalAutoregressive)
    report, explained = (run / "report.html").read_text("utf-8"), decisions(model, explain=True)
    assert {"augmentation", "blocks"} <= set(explained) and all(text in report for text in explained.values())
    assert "about twice the rate, 10%" in report, "with the assumptions of the threshold"


def test_calibrate_changes_the_threshold_alone(model_copy: Path) -> None:
    before = load_inspection(model_copy)
    messages: list[str] = []
    calibrate(model_copy, 0.2, say=messages.append)
    after = load_inspection(model_copy)
    changed = f"from {before.calibration.threshold:.6g} to {after.calibration.threshold:.6g}"
    assert messages == [f"threshold changed {changed}"]
    calibrate(model_copy, 0.2, say=messages.append)
    assert len(messages) == 1, "the same threshold is no change"
    assert after.calibration.false_alarm == 0.2 and after.calibration.threshold < before.calibration.threshold
    assert np.array_equal(after.calibration.scores, before.calibration.scores)
    assert all(torch.equal(a, b) for a, b in zip(after.flow.buffers(), before.flow.buffers(), strict=True))


def test_recalibrate_takes_scores_of_new_images(model_copy: Path, data: Path) -> None:
    calibration = recalibrate(model_copy, [str(data / "test" / "good")], 0.2, progress=False, say=silent)
    after = load_inspection(model_copy)
    assert calibration.how == after.calibration.how == "split" and after.calibration.n == 4
    assert calibration.source == after.calibration.source and str(data)[:20] in calibration.describe(explain=True)
    assert calibration.created == after.calibration.created and calibration.created is not None


def test_scores_as_csv_and_json_lines(run: Path, data: Path, tmp_path: Path) -> None:
    files = [str(data / "test" / "crack"), str(data / "test" / "good" / "*.png")]
    text, lines = io.StringIO(), io.StringIO()
    overlays, maps = tmp_path / "overlays", tmp_path / "maps"
    options = {"progress": False, "say": silent}
    assert score(run, files, overlays=overlays, maps=maps, stdout=text, **options) == 0
    assert score(run, files, json_lines=True, stdout=lines, **options) == 0
    rows, objects = rows_of(text.getvalue()), [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [row["file"] for row in rows] == [record["file"] for record in objects] and len(rows) == 7
    model = load_inspection(run)
    for row, record in zip(rows, objects, strict=True):
        assert float(row["score"]) == record["score"] and row["verdict"] == record["verdict"]
        assert (record["score"] > model.calibration.threshold) == (record["verdict"] == "anomalous")
        assert record["p_value"] == model.calibration.p_values(np.array([record["score"]]))[0]
    assert len(list(overlays.iterdir())) == len(list(maps.iterdir())) == 7, "one name in two folders"


def test_damaged_files_are_named_and_passed_over(run: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "schlecht ä.png").write_bytes(b"no image")
    messages: list[str] = []
    out = tmp_path / "scores.csv"
    files = [str(tmp_path / "schlecht ä.png"), str(data / "test" / "good")]
    assert score(run, files, out=out, progress=False, stdout=io.StringIO(), say=messages.append) == 1
    assert messages[0].startswith(f"skipped: {files[0]}: ")
    threshold = load_inspection(run).calibration.threshold
    assert messages[-1].startswith(f"4 images scored at the threshold {threshold:.6g}: ")
    assert messages[-1].endswith(f"; 1 file could not be read: {files[0]}")
    assert len(rows_of(out.read_text("utf-8"))) == 4
    with pytest.raises(ValueError, match="csv or .jsonl"):
        score(run, files, out=tmp_path / "scores.txt", progress=False, stdout=io.StringIO(), say=silent)


def _odd(folder: Path) -> Path:
    """Three images, each of which is changed in another way on being read."""
    folder.mkdir()
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(values.astype(np.uint16)).save(folder / "dark.png")
    Image.fromarray(values.astype(np.uint16) * 257).save(folder / "scaled.png")
    Image.fromarray(np.dstack([values] * 4)).save(folder / "alpha.png")
    return folder


def test_every_command_says_how_images_were_changed_on_being_read(run: Path, model_copy: Path, tmp_path: Path) -> None:
    odd = _odd(tmp_path / "odd")
    expected = [
        "2 16-bit grey images scaled to 8 bits (value / 257)",
        "1 almost black image of more than 8 bits (no value above 255, or 1/255 of white): "
        "save 8-bit values with 8 bits",
        "1 image with an alpha channel composited on white",
    ]
    messages: list[str] = []
    score(run, [str(odd)], progress=False, stdout=io.StringIO(), say=messages.append)
    assert messages[:-1] == expected
    messages = []
    recalibrate(model_copy, [str(odd)], 0.2, progress=False, say=messages.append)
    assert messages[:-1] == expected and messages[-1].startswith("threshold changed from")
    messages = []
    with pytest.raises(DataError, match="3 good images"):  # said before it is refused
        choose(odd, size=16, progress=False, say=messages.append)
    assert [text for text in messages if text in expected] == expected


def test_evaluation_writes_scores_metrics_and_report(run: Path, data: Path, tmp_path: Path) -> None:
    result = evaluate(run, data, tmp_path, progress=False)
    lines = result.rows
    assert {path.name for path in tmp_path.iterdir()} == {"scores.csv", "metrics.json", "report.html"}
    assert [line.default for line in lines].count(True) == 1 and {line.kind for line in lines} == {"score", "baseline"}
    rows = rows_of((tmp_path / "scores.csv").read_text("utf-8"))
    assert [row["label"] for row in rows].count("good") == 4 and len(rows) == 10
    good = np.array([float(row["score"]) for row in rows if row["label"] == "good"])
    defects = np.array([float(row["score"]) for row in rows if row["label"] != "good"])
    assert lines[0].auroc == pytest.approx((defects[:, None] > good).mean())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["classes"]["squeeze"]["images"] == 3 and len(metrics["scores"]) == len(lines)
    assert {row["kind"] for row in metrics["scores"]} == {"score", "control"}, "the file's names"
    with_maps = [line for line in lines if line.pixel_auroc is not None]
    assert {line.name for line in with_maps} >= {lines[0].name, "PCA residual (100)"}
    assert lines[0].pixel_difference is None and all(line.pixel_difference is not None for line in with_maps[1:])
    assert metrics == json.loads(json.dumps(result.to_json(), allow_nan=False))


@pytest.mark.slow
def test_the_commands(run: Path, model_copy: Path, data: Path, tmp_path: Path) -> None:
    invoke = CliRunner().invoke
    (tmp_path / "bad.png").write_bytes(b"")
    done = invoke(app, ["calibrate", "--model", str(model_copy), "--false-alarm", "0.1"])
    assert done.exit_code == 0 and "lowest of the 24 held-out scores" in done.output
    done = invoke(app, ["score", str(model_copy), str(tmp_path / "bad.png"), str(data / "test" / "good"), "--quiet"])
    assert done.exit_code == 2 and "bad.png" in done.output
    done = invoke(
        app, ["eval", "--model", str(model_copy), "--data", str(data), "--out", str(tmp_path / "e"), "--quiet"]
    )
    assert done.exit_code == 0 and (tmp_path / "e" / "report.html").is_file()
    assert "PCA residual" in done.stdout and "scores.csv, metrics.json, report.html" in done.stdout
    assert "PCA residual" not in done.stderr
    done = invoke(app, ["train", "--recipe", "inspection", "--data", str(data), "--out", str(tmp_path), "--lr", "1"])
    assert done.exit_code != 0 and "--lr" in done.output
    flags = ["--keep-folds", "--dequantize", "--logit", "0.1", "--size", "8", "--quiet"]
    done = invoke(app, ["train", "--recipe", "inspection", "--data", str(data), "--out", str(tmp_path / "r"), *flags])
    about = load_inspection(tmp_path / "r").about
    assert done.exit_code == 0 and len(list((tmp_path / "r" / "folds").iterdir())) == 10
    assert (about["recipe"]["dequantize"], about["recipe"]["logit"]) == (True, 0.1)
    bits = about["held_out_nll"] / (192 * math.log(2)) + math.log2(255)
    assert f"at most {bits:.3f} bits/dim of 8-bit data" in done.output and "augmentation: " in done.output
    done = invoke(app, ["train", "--data", str(data), "--out", str(tmp_path), "--logit", "0.1"])
    assert done.exit_code != 0 and "--logit" in done.output
    done = invoke(app, ["eval", "--model", str(model_copy), "--data", str(data), "--false-alarm", "0.2"])
    assert done.exit_code != 0 and "--false-alarm" in done.output
    done = invoke(
        app, ["train", "--recipe", "inspection", "--data", str(data), "--out", str(tmp_path), "--device", "cpu"]
    )
    assert done.exit_code != 0 and "--device" in done.output


@pytest.mark.slow
def test_choose_ranks_scores_and_maps(data: Path) -> None:
    selection = choose(data, size=8, draws=1, progress=False)
    text = selection.describe()
    assert text.count("(default)") == 2 and "no test image is read" in text
    ranking = json.loads(json.dumps(selection.to_json(), allow_nan=False))
    assert ranking["images"] == 24 and [entry["default"] for entry in ranking["scores"]].count(True) == 1
    assert [entry["mean"] for entry in ranking["maps"]] == [candidate.mean for candidate in selection.maps]
