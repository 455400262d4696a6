"""Folders and files with odd names through whole commands: every row, every picture, nothing that a terminal obeys."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastmaf
from fastmaf.capsule.evaluate import evaluate as judge
from fastmaf.capsule.models import Model
from fastmaf.images.names import from_cell
from fastmaf.inspection.workflow.evaluate import evaluate as inspect
from tests.images.pictures import capsule_set, picture

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere allow fewer names")

CLASSES = (b"lat\xfcn", b"=cmd|' C calc'!A0", b"\x1b[2Jred", b"a\rb", b"-x", b"$\\frac$", b"@\xff")


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A test set whose defect classes have odd names, one image each, named like its class."""
    root = capsule_set(tmp_path / "set")
    for i, name in enumerate(CLASSES):
        folder = os.path.join(os.fsencode(root / "test"), name)
        os.mkdir(folder)
        values = np.random.default_rng(i).integers(0, 256, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(values).save(picture(root / "x.png"))
        os.rename(os.fsencode(root / "x.png"), os.path.join(folder, name + b".png"))
    return root


def labels_of(path: Path) -> list[str]:
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(text.splitlines()) == len(rows) + 1
    assert not any(row[key][0] in "=+-@\t\r" for row in rows for key in ("file", "label"))
    assert all(os.path.exists(from_cell(row["file"])) for row in rows)
    return [from_cell(row["label"]) for row in rows]


def test_eval_of_the_reference_recipe(odd: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = Model(fastmaf.MAF(48, 1, (8,), seed=0), 4, tmp_path / "model.safetensors", ())
    evaluation = judge(model, odd, tmp_path / "out", progress=False)
    assert {os.fsdecode(name) for name in CLASSES} < set(evaluation.counts)
    assert sorted(set(labels_of(tmp_path / "out" / "scores.csv"))) == sorted(evaluation.counts)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    assert set(metrics["per_class"]) == set(evaluation.counts)
    for name in ("nll_hist_good_defect.png", "roc_curve.png"):
        with Image.open(tmp_path / "out" / name) as image:
            image.load()
    from fastmaf.metrics.result_files import format_table

    assert "\x1b" not in format_table(evaluation) and r"lat\xfcn" in format_table(evaluation)
    assert "\x1b" not in "".join(capfd.readouterr())


def test_eval_of_the_inspection_recipe(odd: Path, tmp_path: Path) -> None:
    for i in range(6):
        values = np.random.default_rng(i).integers(100, 150, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(values).save(odd / "train" / "good" / f"{i:03d}.png")
    detector = fastmaf.Detector(size=8, steps=2).fit(sorted((odd / "train" / "good").glob("*.png")))
    detector.save(tmp_path / "model.safetensors")
    told = inspect(tmp_path / "model.safetensors", odd, tmp_path / "out", progress=False).describe()
    assert {os.fsdecode(name) for name in CLASSES} < set(labels_of(tmp_path / "out" / "scores.csv"))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    assert {os.fsdecode(name) for name in CLASSES} < set(metrics["classes"])
    assert r"lat\xfcn" in (tmp_path / "out" / "report.html").read_text("utf-8")
    assert r"lat\xfcn: " in told and "\x1b" not in told
