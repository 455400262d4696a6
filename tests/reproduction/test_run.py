"""Both recipes at a tiny size: their files, the comparison, interruptions, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fastmaf.capsule import training_run
from fastmaf.capsule.published import PUBLISHED_NLL
from fastmaf.images.dataset import to_images, to_unit
from fastmaf.inspection.model import load_inspection
from fastmaf.io.locks import InUseError, run_lock
from fastmaf.io.outputs import OutputError
from fastmaf.reproduction import Reproduction, inspection_run, run
from fastmaf.reproduction.run import reproduce as reproduce_with
from fastmaf.training.checkpoints import MODEL_FILE
from tests.capsule.runs import at_batch, same
from tests.reproduction.tiny import RECIPE, TINY, draw_tiny

# Random degrees at a tiny size leave gaps, and a warning is issued.
pytestmark = pytest.mark.filterwarnings("ignore::fastmaf.ConnectivityWarning")
PICTURES = ("nll_curve.png", "nll_hist_good_defect.png", "roc_curve.png", "samples.png")
INSPECTION = ("model.safetensors", "training_log.csv", "scores.csv", "metrics.json", "report.html", "samples.png")
TEXTS = ("report.html", "train_log.csv", "scores.csv", "metrics.json", "comparison.txt", "model.safetensors")

reproduce = functools.partial(reproduce_with, recipe=RECIPE, progress=False)


def line(table: str, start: str) -> list[str]:
    """Returns the cells of the line with this beginning."""
    (text,) = [row for row in table.splitlines() if row.strip().startswith(start)]
    return re.split(r"\s{2,}", text.strip())


def test_every_file_of_both_recipes_is_there(ten_epochs: tuple[Path, Reproduction, str]) -> None:
    out, _, _ = ten_epochs
    assert {*PICTURES, *TEXTS, "samples", "inspection"} <= {path.name for path in out.iterdir()}
    ours = out / "inspection"
    assert {*INSPECTION, "samples"} == {path.name for path in ours.iterdir()}
    for folder in (out, ours):
        assert [path.name for path in sorted((folder / "samples").iterdir())] == [f"{i:03d}.png" for i in range(5)]
        for path in [folder / "samples.png", *(folder / "samples").iterdir()]:
            with Image.open(path) as image:
                image.load()
                assert image.format == "PNG"
        with open(folder / "scores.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == 8
    model = load_inspection(ours)
    assert (model.size, model.calibration.n) == (8, 8)


def test_the_samples_are_those_of_the_inspection_model(ten_epochs: tuple[Path, Reproduction, str]) -> None:
    out, _, _ = ten_epochs
    with torch.no_grad():
        x = load_inspection(out / "inspection").flow.sample(5, seed=0)
    with Image.open(out / "inspection" / "samples" / "004.png") as image:
        assert torch.equal(torch.from_numpy(np.array(image)), to_images(x, 8)[4])


def test_the_table_compares_three_runs(ten_epochs: tuple[Path, Reproduction, str]) -> None:
    out, result, messages = ten_epochs
    table = (out / "comparison.txt").read_text(encoding="utf-8")
    assert table == result.table + "\n"
    names, sources, *_ = (re.split(r"\s{2,}", row.strip()) for row in table.splitlines())
    assert names == ["published run", "this run", "fastmaf's recipe"]
    assert sources == ["(GTX 1050 Ti)", "(synthetic)", "(synthetic)"]
    log, ours = result.training.log, result.inspection
    assert ours is not None
    assert line(table, "NLL, epoch 1 ")[1:] == ["8,003", f"{log[0]['nll']:,.0f}", "–"]
    assert line(table, "NLL, epoch 10 ")[1:] == ["-29,277", f"{log[9]['nll']:,.0f}", "–"]
    assert "epoch 50" not in table
    assert line(table, "seconds to train")[1:] == [
        "2,780 (100)", f"{sum(row['seconds'] for row in log):,.0f} (10)", f"{ours.seconds:.0f}",
    ]  # fmt: skip
    assert line(table, "seconds an epoch")[1] == "27.8"
    sampling = line(table, "seconds a sample")
    assert sampling[1] == "266.8"
    assert float(sampling[2]) < 10 and sampling[3] == f"{ours.seconds_per_sample:.3f}"
    auroc = line(table, "image AUROC")
    assert auroc[1] == "0.785"
    assert auroc[2].startswith(f"{result.evaluation.auroc:.3f} (")
    assert auroc[3].startswith(f"{ours.test.default.auroc:.3f} ({ours.test.default.interval[0]:.3f}–")
    assert line(table, "pixel AUROC")[1:] == ["–", "–", f"{ours.test.default.pixel_auroc:.3f}"]
    youden, held_out = table.split("at the threshold from held-out good images:")
    precision, recall, f1 = result.evaluation.youden.anomaly
    ours_f1 = f"{f1:.2f} ({precision:.2f}, {recall:.2f})"
    assert line(youden, "F1 of defects")[1:3] == ["0.91 (0.90, 0.93)", ours_f1]
    assert line(youden, "false alarms")[1] == "48%"
    assert line(held_out, "false alarms")[1:3] == ["–", "–"]
    assert "No good images were held out of the training of this run." in table
    assert f"published recipe: image AUROC {result.evaluation.auroc:.3f}" in messages


def test_the_threshold_of_the_recipe_is_that_of_its_model(ten_epochs: tuple[Path, Reproduction, str]) -> None:
    out, result, _ = ten_epochs
    ours, model = result.inspection, load_inspection(out / "inspection")
    assert ours is not None and ours.evaluation.held_out is not None
    assert ours.evaluation.held_out.threshold == model.calibration.threshold
    with open(out / "inspection" / "scores.csv", newline="") as file:
        rows = [(row["label"] == "good", row["verdict"] == "anomalous") for row in csv.DictReader(file)]
    alarms = [alarm for good, alarm in rows if good]
    rate = f"{sum(alarms) / len(alarms):.0%}"
    assert line(result.table.split("held-out good images:")[1], "false alarms")[3].startswith(f"{rate} (")


def test_the_metrics_contain_the_settings(ten_epochs: tuple[Path, Reproduction, str]) -> None:
    out, result, _ = ten_epochs
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["train_config"]["degrees"] == "random"
    assert metrics["train_config"]["hidden_features"] == [16, 16]
    assert result.seconds_per_sample is not None
    assert metrics["seconds_per_sample"] == result.seconds_per_sample > 0
    assert metrics["held_out"] is None


def test_the_published_curve_is_as_recorded() -> None:
    assert {e: round(v) for e, v in PUBLISHED_NLL.items() if e in (1, 10, 50, 100)} == {
        1: 8003, 10: -29277, 50: -39320, 100: -42192,
    }  # fmt: skip


@pytest.mark.slow
def test_without_data_the_synthetic_set_is_drawn_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ten_epochs: tuple[Path, Reproduction, str]
) -> None:
    monkeypatch.setattr(run, "draw_dataset", draw_tiny)
    messages: list[str] = []
    config = dataclasses.replace(TINY, holdout=0.25)
    result = reproduce(tmp_path, config, say=messages.append)
    assert (tmp_path / "demo-data" / "train" / "good" / "000.png").is_file()
    assert {*PICTURES, *TEXTS, "samples"} <= {path.name for path in tmp_path.iterdir()}
    assert "synthetic capsules" in messages[0]
    assert "(synthetic)" in result.table.splitlines()[1]
    assert result.evaluation.held_out is not None
    heading = "at the threshold from held-out good images:"
    assert line(result.table, heading.rstrip(":")) == [heading]
    assert len(re.findall(r"^  F1 of defects ", result.table, re.MULTILINE)) == 2
    # A resumed run draws the same images again.
    result = reproduce(tmp_path, dataclasses.replace(config, epochs=2), resume=True, say=messages.append)
    assert [row["epoch"] for row in result.training.log] == [1, 2]
    assert "epoch 2" in result.table


def test_leaky_masks_are_compared_without_samples(data: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    config = dataclasses.replace(TINY, masks="published")
    result = reproduce(tmp_path, config, data=data, say=messages.append)
    assert result.seconds_per_sample is None
    assert line(result.table, "seconds a sample")[1:3] == ["266.8", "refused"]
    assert any(text.startswith("no samples: ") and "leaky output mask" in text for text in messages)
    assert not (tmp_path / "samples").exists()
    assert (tmp_path / "roc_curve.png").is_file()
    assert (tmp_path / "inspection" / "samples.png").is_file()


def test_images_that_do_not_suit_the_inspection_recipe(data: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    config, why = dataclasses.replace(TINY, size=9), "size must be a multiple of patch = 2"
    result = reproduce(tmp_path, config, data=data, recipe=None, say=messages.append)
    assert result.inspection is None
    assert any(text.startswith("the inspection recipe was left out: ") and why in text for text in messages)
    assert line(result.table, "image AUROC")[3] == "–"
    assert "not shown" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "inspection").exists()


@pytest.mark.parametrize(
    "name",
    [
        "samples/003.png", "samples.png", "scores.csv", "roc_curve.png", "comparison.txt", "report.html",
        "inspection/model.safetensors", "inspection/report.html", "inspection/samples/003.png",
    ],
)  # fmt: skip
def test_files_of_others_are_kept_and_nothing_begins(tmp_path: Path, name: str) -> None:
    target = tmp_path / "out" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"mine")
    with pytest.raises(OutputError, match=Path(name).name):
        reproduce(tmp_path / "out", TINY)
    assert not (tmp_path / "out" / "demo-data").exists() and target.read_bytes() == b"mine"


def test_a_folder_in_use_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    with run_lock(tmp_path / MODEL_FILE, "training"), pytest.raises(InUseError):
        reproduce(tmp_path, TINY)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_training_ends_the_whole_run_with_a_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupting(pixels: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return to_unit(pixels)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(training_run, "to_unit", interrupting)
    try:
        messages: list[str] = []
        assert reproduce(tmp_path, TINY, data=data, say=messages.append) is None
        assert "--resume" in messages[-1]
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / "metrics.json").exists()
    monkeypatch.undo()
    result = reproduce(tmp_path, TINY, data=data, resume=True, say=lambda text: None)
    assert len(result.training.log) == 1
    assert torch.isfinite(torch.tensor(result.evaluation.auroc))


def test_ctrl_c_in_the_inspection_recipe_keeps_the_published_part(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection_run, "fit", interrupted)
    messages: list[str] = []
    assert reproduce(tmp_path, TINY, data=data, say=messages.append) is None
    assert "--resume" in messages[-1]
    assert (tmp_path / "metrics.json").is_file() and not (tmp_path / "comparison.txt").exists()
    monkeypatch.undo()
    before = load_file(tmp_path / MODEL_FILE)
    result = reproduce(tmp_path, TINY, data=data, resume=True, say=lambda text: None)
    assert same(load_file(tmp_path / MODEL_FILE), before), "it is not trained again"
    assert result.inspection is not None and (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("batch", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_a_resumed_run_equals_an_unbroken_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupts: None, undrawn: None, batch: int
) -> None:
    config = dataclasses.replace(TINY, epochs=2, holdout=0.2)
    options = {"data": data, "say": lambda text: None}
    assert reproduce(tmp_path / "whole", config, **options) is not None
    with monkeypatch.context() as patch:
        at_batch(patch, batch, ctrl_c)
        assert reproduce(tmp_path / "broken", config, **options) is None
    assert not (tmp_path / "broken" / "comparison.txt").exists()
    assert reproduce(tmp_path / "broken", config, resume=True, **options) is not None
    for name in (MODEL_FILE, "inspection/model.safetensors"):
        assert same(*(load_file(tmp_path / run / name) for run in ("whole", "broken")))
    names = [{path.name for path in (tmp_path / run).iterdir()} for run in ("broken", "whole")]
    assert names[0] == names[1]


def ctrl_c(x: Tensor) -> Tensor:
    signal.raise_signal(signal.SIGINT)
    return x
