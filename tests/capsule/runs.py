"""Tiny training runs: their settings, and readers of their files."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastmaf.capsule import training_run
from fastmaf.capsule.config import TrainConfig
from fastmaf.capsule.train import train
from fastmaf.capsule.train_result import TrainResult
from fastmaf.capsule.training_run import LOG_FILE
from fastmaf.images.dataset import to_unit
from fastmaf.io.tensor_file import read_tensors, write_tensors
from fastmaf.training.checkpoints import MODEL_FILE, STATE_FILE

ROOT = Path(__file__).parents[2]
IMAGES, HELD_OUT = 10, 2
CLASSES = {"crack": 2, "poke": 1, "squeeze": 2}  # defects of the labelled set
TINY = TrainConfig(size=8, blocks=2, hidden_features=(16, 16), epochs=2, batch_size=4, lr=1e-3, holdout=0.2)
STEPS = 2  # an epoch: eight images to train on, in batches of four


def run(data: Path, out: Path, config: TrainConfig = TINY, **options: Any) -> TrainResult:
    return train(data, out, config, progress=False, **options)


def with_(**changes: Any) -> TrainConfig:
    return dataclasses.replace(TINY, **changes)


def tensors_of(out: Path) -> dict[str, Tensor]:
    return load_file(out / MODEL_FILE)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / LOG_FILE, newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(out: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(out)]


def at_batch(monkeypatch: pytest.MonkeyPatch, number: int, do: Callable[[Tensor], Tensor]) -> None:
    """Applies ``do`` to the pixels in [0, 1] of the batch with this number; validation batches count too."""
    seen = 0

    def changed(pixels: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        x = to_unit(pixels)
        return do(x) if seen == number else x

    monkeypatch.setattr(training_run, "to_unit", changed)


def epoch(number: int) -> int:
    """The number of an epoch's first batch: each has its steps and one batch of validation."""
    return (number - 1) * (STEPS + 1) + 1


def as_earlier_version(out: Path) -> None:
    """Removes from a state and its model what earlier versions did not write."""
    for file, key, new in (
        (STATE_FILE, "state", ("contents", "epoch_so_far", "checkpoint")),
        (MODEL_FILE, "training", ("checkpoint",)),
    ):
        tensors, metadata = read_tensors(out / file)
        kept = {name: value for name, value in json.loads(metadata[key]).items() if name not in new}
        write_tensors(tensors, out / file, {**metadata, key: json.dumps(kept)})
