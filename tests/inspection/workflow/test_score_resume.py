"""Runs of ``fastmaf inspect score`` that were interrupted, and go on: nothing twice, nothing lost."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastmaf.inspection.workflow import scorer
from fastmaf.inspection.workflow.calibrate import calibrate
from fastmaf.inspection.workflow.journal import ResumeError
from fastmaf.inspection.workflow.rows import score_rows
from fastmaf.inspection.workflow.score import score, score_images
from fastmaf.inspection.workflow.summary import ScoreResult
from fastmaf.io.outputs import OutputError
from tests.inspection.tiny import silent

_SAME = ("file", "score", "p_value", "verdict", "nll")  # of a row, whenever the image is scored


def image(path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    values = rng.integers(100, 150, (20, 24, 3)) + rng.integers(-40, 40)
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """70 images, of which the third-last is damaged: more than two batches."""
    (folder := tmp_path / "in").mkdir()
    for i in range(70):
        image(folder / f"{i:02d}.png", i)
    (folder / "67.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def model(run: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes((run / "model.safetensors").read_bytes())
    return path


def scored(model: Path, images: Path, out: Path, say: Callable[[str], Any] = silent, **options: Any) -> ScoreResult:
    settings: dict[str, Any] = {"workers": 0, "progress": False, "stdout": io.StringIO(), **options}
    return score_images(model, [str(images)], out=out, say=say, **settings)


def rows(path: Path) -> list[tuple[str, ...]]:
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]
    return [tuple(str(line[name]) for name in _SAME) for line in lines]


def interrupt(text: str) -> None:
    """As Ctrl-C, where the damaged file is reported."""
    if text.startswith("skipped: "):
        raise KeyboardInterrupt


def interrupted(model: Path, images: Path, out: Path, **options: Any) -> Path:
    with pytest.raises(KeyboardInterrupt):
        scored(model, images, out, interrupt, **options)
    journal = out.with_name(f"{out.name}.partial")
    assert journal.is_file() and len(journal.read_bytes().splitlines()) == 1 + 64
    return journal


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are scored, as they are."""
    names: list[str] = []

    def noted(model: Any, frames: Any, **options: Any) -> Any:
        names.extend(frame.path.name for frame in frames)
        return score_rows(model, frames)

    monkeypatch.setattr(scorer, "score_rows", noted)
    return names


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_an_interrupted_run_goes_on(
    model: Path, images: Path, tmp_path: Path, predicted: list[str], suffix: str
) -> None:
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    messages: list[str] = []
    expected = scored(model, images, whole, messages.append)
    assert (expected.images, expected.unread, expected.interrupted) == (69, 1, False)
    journal = interrupted(model, images, out)
    assert not out.exists(), "it appears complete or not at all"
    predicted.clear()
    resumed: list[str] = []
    assert scored(model, images, out, resumed.append, resume=True) == expected
    assert sorted(predicted) == ["64.png", "65.png", "66.png", "68.png", "69.png"]
    assert rows(out) == rows(whole) and not journal.exists()
    assert resumed[0] == f"continuing after 64 images in {journal}"
    assert resumed[1:] == messages, "the summary is of all images"


def test_results_do_not_depend_on_the_batch_nor_on_processes(model: Path, images: Path, tmp_path: Path) -> None:
    together, ahead = tmp_path / "together.csv", tmp_path / "ahead.csv"
    scored(model, images, together)
    scored(model, images, ahead, workers=2)
    assert rows(ahead) == rows(together)
    for i, row in enumerate(rows(together)[::20]):
        scored(model, images / f"{20 * i:02d}.png", tmp_path / "alone.csv")
        assert rows(tmp_path / "alone.csv") == [row]


def test_a_torn_line_and_a_changed_file_are_scored_again(
    model: Path, images: Path, tmp_path: Path, predicted: list[str]
) -> None:
    out = tmp_path / "out.csv"
    journal = interrupted(model, images, out)
    journal.write_bytes(journal.read_bytes()[:-20])
    image(images / "05.png", 500)
    predicted.clear()
    scored(model, images, out, resume=True)
    assert sorted(predicted) == ["05.png", "63.png", "64.png", "65.png", "66.png", "68.png", "69.png"]
    scored(model, images, tmp_path / "whole.csv")
    assert rows(out) == rows(tmp_path / "whole.csv")


def test_a_damaged_file_that_was_repaired_is_read(model: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    interrupted(model, images, out)
    image(images / "67.png", 67)
    result = scored(model, images, out, resume=True)
    assert (result.images, result.unread) == (70, 0) and len(rows(out)) == 70


def test_another_model_or_other_arguments_are_refused(model: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    journal = interrupted(model, images, out)
    before = journal.read_bytes()
    with pytest.raises(ResumeError, match="another images: expected 70 images, .* found 10 images"):
        scored(model, images / "0?.png", out, resume=True)
    with pytest.raises(ResumeError, match=r"another overlays: expected none, found .*shown"):
        scored(model, images, out, resume=True, overlays=tmp_path / "shown")
    calibrate(model, 0.2, say=silent)
    with pytest.raises(ResumeError, match="another model"):
        scored(model, images, out, resume=True)
    assert journal.read_bytes() == before and not out.exists()


def test_without_resume_a_run_starts_again(model: Path, images: Path, tmp_path: Path, predicted: list[str]) -> None:
    out = tmp_path / "out.csv"
    out.write_text("")
    journal = interrupted(model, images, out)
    predicted.clear()
    messages: list[str] = []
    assert scored(model, images, out, messages.append).images == 69 == len(predicted)
    assert "--resume would have continued it" in messages[0] and not journal.exists()
    assert scored(model, images, out, resume=True).images == 69, "nothing to continue: a new run"


def test_what_a_killed_process_of_earlier_rows_leaves_is_replaced_at_the_end(
    model: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    scored(model, images, out)
    before = out.read_bytes()
    interrupted(model, images, out)
    assert out.read_bytes() == before


def test_a_foreign_file_in_the_place_of_the_journal_is_kept(model: Path, images: Path, tmp_path: Path) -> None:
    (mine := tmp_path / "out.csv.partial").write_text("mine")
    for resume in (False, True):
        with pytest.raises(OutputError, match="is not the rows of an interrupted run"):
            scored(model, images, tmp_path / "out.csv", resume=resume)
    assert mine.read_text() == "mine"


def test_a_run_without_a_row_leaves_nothing(model: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.csv"
    with pytest.raises(KeyboardInterrupt):
        scored(model, images / "67.png", out, interrupt)
    assert list(out.parent.iterdir()) == []
    with pytest.raises(ValueError, match="--out"):
        score(model, [str(images)], resume=True, stdout=io.StringIO(), say=silent)


def test_pictures_of_a_resumed_run_are_those_of_a_whole_one(model: Path, images: Path, tmp_path: Path) -> None:
    out, shown = tmp_path / "out.csv", tmp_path / "shown"
    interrupted_options = {"overlays": shown}
    with pytest.raises(KeyboardInterrupt):
        scored(model, images, out, interrupt, **interrupted_options)
    assert 0 < len(os.listdir(shown)) < 69
    scored(model, images, out, resume=True, **interrupted_options)
    assert sorted(path.stem for path in shown.iterdir()) == [f"{i:02d}" for i in range(70) if i != 67]
