"""Rows of scored images, with the NLL and without."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmaf.images.decode import load_frame
from fastmaf.inspection.interface import maps_of, scores_of
from fastmaf.inspection.model import load_inspection
from fastmaf.inspection.workflow.journal import ResumeError
from fastmaf.inspection.workflow.score import score_images
from tests.inspection.tiny import silent


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (folder := tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        values = rng.integers(100, 150, (20, 24, 3)) + rng.integers(-40, 40)
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def scored(run: Path, images: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {"workers": 0, "progress": False, "stdout": io.StringIO(), "say": silent, **options}
    score_images(run, [str(images)], out=out, **settings)
    with open(out, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file)) if out.suffix == ".csv" else [json.loads(line) for line in file]


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.endswith("_ms")}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_nll_is_filled_in_where_it_is_asked_for(run: Path, images: Path, tmp_path: Path, suffix: str) -> None:
    model = load_inspection(run / "model.safetensors")
    plain = scored(run, images, tmp_path / f"plain{suffix}")
    full = scored(run, images, tmp_path / f"full{suffix}", nll=True)
    pictured = scored(run, images, tmp_path / f"pictured{suffix}", maps=tmp_path / "maps")
    empty = "" if suffix == ".csv" else None
    assert len(plain) > 1 and [row["nll"] for row in plain + pictured] == [empty] * (2 * len(plain))
    for row, other in zip(plain, pictured, strict=True):
        assert without_times(row) == without_times(other)
    for row, with_nll in zip(plain, full, strict=True):
        assert {**without_times(row), "nll": None} == {**without_times(with_nll), "nll": None}
        expected = model.predict(load_frame(Path(with_nll["file"]), model.size).pixels[None])
        assert float(with_nll["nll"]) == expected.nll[0] and float(with_nll["score"]) == expected.scores[0]


def test_a_run_with_nll_does_not_continue_one_without(run: Path, images: Path, tmp_path: Path) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    (images / "~damaged.png").write_bytes(b"no image")  # the last, which is reported
    out = tmp_path / "out.csv"
    for i in range(64):  # whole batches before it
        (images / f"copy{i:02d}.png").write_bytes((images / "0.png").read_bytes())
    with pytest.raises(KeyboardInterrupt):
        scored(run, images, out, say=interrupt)
    with pytest.raises(ResumeError, match="--nll: expected none, found given"):
        scored(run, images, out, nll=True, resume=True)
    assert len(scored(run, images, out, resume=True)) > 64


def test_blocks_are_evaluated_only_for_the_nll(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_inspection(run / "model.safetensors")
    pixels = torch.randint(0, 256, (3, 3, model.size, model.size), dtype=torch.uint8)
    expected = model.predict(pixels)
    assert model.float64_flow.after and not model.settings.needs_nll

    def refuse(*_: Any) -> None:
        raise AssertionError("a block was evaluated")

    monkeypatch.setattr(type(model.float64_flow.after[0]), "forward", refuse)
    found = model.predict(pixels, nll=False)
    assert (found.scores == expected.scores).all() and (found.anomaly_maps == expected.anomaly_maps).all()
    assert torch.from_numpy(found.nll).isnan().all()
    assert (scores_of(model, pixels) == expected.scores).all()
    assert (maps_of(model, pixels) == expected.anomaly_maps).all()
    with pytest.raises(AssertionError, match="block"):
        model.predict(pixels)
