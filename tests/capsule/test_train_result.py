"""What a training run tells its user."""

from __future__ import annotations

import json
import math
from pathlib import Path

import fastmaf
from fastmaf.capsule.train_result import Row, TrainResult

ROW: Row = {"epoch": 1, "nll": -1234.5, "val_nll": None, "bits_per_dim": -9.25, "seconds": 1.5, "skipped_steps": 0}


def result(*log: Row, interrupted: bool = False) -> TrainResult:
    return TrainResult(fastmaf.MAF(2, 1, (4,)), list(log), Path("run/model.safetensors"), interrupted)


def test_a_finished_run() -> None:
    done = result(ROW, {**ROW, "val_nll": -1200.0})
    assert done.describe().splitlines() == [
        "epoch 2: NLL -1,234 nats, held-out NLL -1,200 nats, -9.250 bits/dim on [0, 1]",
        f"model: {Path('run/model.safetensors')}",
    ]
    assert done.summary() == {
        "model": str(Path("run/model.safetensors")),
        "interrupted": False,
        "epochs": 2,
        "nll": -1234.5,
        "val_nll": -1200.0,
        "bits_per_dim": -9.25,
        "seconds": 3.0,
    }


def test_an_interrupted_run() -> None:
    assert "stopped after 1 whole epoch; --resume continues" in result(ROW, interrupted=True).describe()
    stopped = result(interrupted=True)
    assert stopped.describe().startswith("stopped after 0 whole epochs")
    assert stopped.summary()["nll"] is None and stopped.summary()["epochs"] == 0


def test_numbers_that_are_not_finite_are_null() -> None:
    summary = result({**ROW, "val_nll": math.nan}).summary()
    assert json.loads(json.dumps(summary, allow_nan=False))["val_nll"] is None
