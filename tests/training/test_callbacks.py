"""Callbacks of the two trainings, and the examples of the guide where their packages are installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmaf.capsule.config import TrainConfig
from fastmaf.capsule.synthetic import draw_dataset
from fastmaf.capsule.train import train
from fastmaf.inspection.fit import Fitted, fit
from fastmaf.inspection.recipe import Recipe
from fastmaf.training.callbacks import Callback
from fastmaf.training.checkpoints import load_state

RECIPE = Recipe(size=8, rank=4, blocks=1, steps=20, folds=2, augmentation="none")
CONFIG = TrainConfig(size=8, hidden_features=(8,), blocks=1, epochs=3, batch_size=8, holdout=0.25)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_dataset(tmp_path_factory.mktemp("data"), train=16, good=1, defects={}, size=32, progress=False)


def fitted(*callbacks: Callback) -> Fitted:
    images = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return fit(images, RECIPE, callbacks=callbacks, progress=False)


@pytest.mark.filterwarnings("ignore:blocks=1 do not make")
def test_rows_of_the_blocks_training_curve_are_reported() -> None:
    rows: list[dict[str, float]] = []
    log = fitted(lambda step, values: rows.append({"step": step, **values})).log
    assert rows == log and [row["step"] for row in rows] == [1, 10, 20]


def test_epochs_are_reported_and_a_resumed_run_goes_on(root: Path, tmp_path: Path) -> None:
    rows: list[tuple[int, dict[str, float]]] = []

    def note(step: int, values: Mapping[str, float]) -> None:
        rows.append((step, dict(values)))

    result = train(root, tmp_path, CONFIG, callbacks=[note, note], progress=False)
    assert [step for step, _ in rows] == [1, 1, 2, 2, 3, 3]
    for (_, values), row in zip(rows[::2], result.log, strict=True):
        assert values == {name: value for name, value in row.items() if name != "epoch"}
        assert set(values) == {"nll", "val_nll", "bits_per_dim", "seconds", "skipped_steps"}


def test_an_error_of_a_callback_ends_the_training_after_a_checkpoint(root: Path, tmp_path: Path) -> None:
    def fail(step: int, values: Mapping[str, float]) -> None:
        if step == 2:
            raise RuntimeError("no connection")

    with pytest.raises(RuntimeError, match="no connection"):
        train(root, tmp_path, CONFIG, callbacks=[fail], progress=False)
    assert load_state(tmp_path, tensors=False)[1]["epochs_done"] == 2
    steps: list[int] = []
    train(root, tmp_path, CONFIG, resume=True, callbacks=[lambda step, values: steps.append(step)], progress=False)
    assert steps == [3]


@pytest.mark.filterwarnings("ignore:blocks=1 do not make")
@pytest.mark.slow  # imports of seconds
def test_tensorboard(tmp_path: Path) -> None:
    reading: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:

        def to_tensorboard(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        log = fitted(to_tensorboard).log
    events = reading.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("held_out_nll")] == [row["step"] for row in log]
    assert events.Scalars("nll")[-1].value == pytest.approx(log[-1]["nll"], rel=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow  # imports of seconds
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"{tmp_path.as_uri()}/runs")
    mlflow.set_experiment("fits")
    with mlflow.start_run() as run:
        log = fitted(lambda step, values: mlflow.log_metrics(dict(values), step=step)).log
    history = mlflow.tracking.MlflowClient().get_metric_history(run.info.run_id, "held_out_nll")
    assert [(each.step, each.value) for each in history] == [(row["step"], row["held_out_nll"]) for row in log]
