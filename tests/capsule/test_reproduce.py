"""The published run repeated at a tiny size: its files, and the comparison of both runs."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastmaf.capsule import reproduce as reproduction
from fastmaf.capsule import training_run
from fastmaf.capsule.config import TrainConfig
from fastmaf.capsule.published import PUBLISHED_NLL
from fastmaf.capsule.reproduce import Reproduction, reproduce
from fastmaf.capsule.synthetic import draw_dataset
from fastmaf.images.dataset import to_unit

# Random degrees at a tiny size leave gaps, and a warning is issued.
pytestmark = pytest.mark.filterwarnings("ignore::fastmaf.ConnectivityWarning")
TINY = TrainConfig(
    size=8, blocks=2, hidden_features=(16, 16), epochs=1, batch_size=4, lr=1e-3, degrees="random", holdout=0.0, seed=1
)
draw_tiny = functools.partial(
    draw_dataset, train=8, good=3, defects={"crack": 2, "poke": 1, "squeeze": 2}, size=32, seed=0
)
PICTURES = ("nll_curve.png", "nll_hist_good_defect.png", "roc_curve.png", "samples.png")
TEXTS = ("train_log.csv", "scores.csv", "metrics.json", "comparison.txt", "model.safetensors")

Run = Callable[..., tuple[Reproduction, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tiny(tmp_path_factory.mktemp("capsules"), progress=False)


@pytest.fixture(scope="module")
def ten_epochs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reproduction, str]:
    out, messages = tmp_path_factory.mktemp("results"), list[str]()
    result = reproduce(out, dataclasses.replace(TINY, epochs=10), data=data, progress=False, say=messages.append)
    return out, result, "\n".join(messages)


def line(table: str, start: str) -> list[str]:
    """Returns the cells of the line with this beginning."""
    (text,) = [row for row in table.splitlines() if row.strip().startswith(start)]
    return re.split(r"\s{2,}", text.strip())


def test_every_file_of_the_published_run_is_there(ten_epochs: tuple[Path, Reproduction, str]) -> None:
    out, _, _ = ten_epochs
    assert {*PICTURES, *TEXTS, "samples"} <= {path.name for path in out.iterdir()}
    assert [path.name for path in sorted((out / "samples").iterdir())] == [f"{i:03d}.png" for i in range(5)]
    for path in [*(out / name for name in PICTURES), *(out / "samples").iterdir()]:
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
    with open(out / "scores.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 8


def test_the_table_compares_both_runs(ten_epochs: tuple[Path, Reproduction, str]) -> None:
    out, result, messages = ten_epochs
    table = (out / "comparison.txt").read_text(encoding="utf-8")
    assert table == result.table + "\n"
    assert re.split(r"\s{2,}", table.splitlines()[0].strip()) == ["published run", "this run (synthetic)"]
    log = result.training.log
    assert line(table, "NLL, epoch 1 ")[1:] == ["8,003", f"{log[0]['nll']:,.0f}"]
    assert line(table, "NLL, epoch 10 ")[1:] == ["-29,277", f"{log[9]['nll']:,.0f}"]
    assert "epoch 50" not in table
    assert line(table, "seconds an epoch")[1] == "27.8"
    assert line(table, "seconds a sample")[1] == "266.8"
    assert float(line(table, "seconds a sample")[2]) < 10
    auroc = line(table, "AUROC")
    assert auroc[1] == "0.785"
    assert auroc[2].startswith(f"{result.evaluation.auroc:.3f} (")
    assert line(table, "accuracy")[1:] == ["0.86", f"{result.evaluation.youden.accuracy:.2f}"]
    assert line(table, "P/R/F1 of defects")[1] == ".90/.93/.91"
    assert line(table, "P/R/F1 of normals")[1] == ".60/.52/.56"
    assert "none: no normals were held out" in table
    assert f"AUROC {result.evaluation.auroc:.4f}" in messages, "the evaluation is printed as well"


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
    monkeypatch.setattr(reproduction, "draw_dataset", draw_tiny)
    messages: list[str] = []
    config = dataclasses.replace(TINY, holdout=0.25)
    result = reproduce(tmp_path, config, progress=False, say=messages.append)
    assert (tmp_path / "demo-data" / "train" / "good" / "000.png").is_file()
    assert {*PICTURES, *TEXTS, "samples"} <= {path.name for path in tmp_path.iterdir()}
    assert "synthetic capsules" in messages[0]
    assert "this run (synthetic)" in result.table.splitlines()[0]
    assert result.evaluation.held_out is not None
    assert line(result.table, "at the threshold from held-out normals") == ["at the threshold from held-out normals:"]
    assert len(re.findall(r"^  accuracy ", result.table, re.MULTILINE)) == 2
    # A resumed run draws the same images again.
    result = reproduce(
        tmp_path, dataclasses.replace(config, epochs=2), resume=True, progress=False, say=messages.append
    )
    assert [row["epoch"] for row in result.training.log] == [1, 2]
    assert "epoch 2" in result.table


def test_leaky_masks_are_compared_without_samples(data: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    config = dataclasses.replace(TINY, masks="published")
    result = reproduce(tmp_path, config, data=data, progress=False, say=messages.append)
    assert result.seconds_per_sample is None
    assert line(result.table, "seconds a sample")[1:] == ["266.8", "refused"]
    assert any(text.startswith("no samples: ") and "leaky output mask" in text for text in messages)
    assert not (tmp_path / "samples").exists()
    assert (tmp_path / "roc_curve.png").is_file()


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
        assert reproduce(tmp_path, TINY, data=data, progress=False, say=messages.append) is None
        assert "--resume" in messages[-1]
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / "metrics.json").exists()
    monkeypatch.undo()
    result = reproduce(tmp_path, TINY, data=data, resume=True, progress=False, say=lambda text: None)
    assert len(result.training.log) == 1
    assert torch.isfinite(torch.tensor(result.evaluation.auroc))
