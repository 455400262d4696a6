"""Ctrl-C in a fit, and going on with --resume: nothing half-written, and the same model as without the interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fastmaf
from fastmaf.inspection import fit as fit_module
from fastmaf.inspection.model import load_inspection
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.workflow.fit import fit
from fastmaf.inspection.workflow.fit_result import FitResult
from fastmaf.inspection.workflow.fit_state import STATE_FOLDER, has_state
from fastmaf.training.checkpoints import MODEL_FILE
from tests.inspection.tiny import TINY, silent

ROOT = Path(__file__).parents[3]
AUTO = replace(TINY, blocks="auto", augmentation="none", steps=20)
pytestmark = pytest.mark.filterwarnings("ignore:blocks=1 do not make")


def interrupt(step: int, values: Mapping[str, float]) -> None:
    """A callback: Ctrl-C at the first step of the blocks."""
    raise KeyboardInterrupt


def run(data: Path, out: Path, recipe: Recipe = TINY, **options: Any) -> FitResult:
    return fit(data, out, recipe, **{"progress": False, "say": silent, **options})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def same_model(one: Path, other: Path) -> None:
    first, second = load_file(one / MODEL_FILE), load_file(other / MODEL_FILE)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    about = [dict(load_inspection(folder).about) for folder in (one, other)]
    for each in about:
        for name in ("created", "seconds"):
            each.pop(name)
    assert about[0] == about[1]


@pytest.mark.parametrize("recipe", [TINY, AUTO], ids=["blocks asked for", "auto"])
@pytest.mark.parametrize("when", ["blocks", "scores"])
def test_a_resumed_fit_gives_the_model_of_an_uninterrupted_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe, when: str
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(data, whole, recipe)
    messages: list[str] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if when == "scores":
            patch.setattr(fit_module, "select_score_and_map", lambda *_: interrupt(0, {}))
            run(data, parts, recipe, say=messages.append)
        else:
            run(data, parts, recipe, callbacks=[interrupt], say=messages.append)
    stages = "16 pixels, whitenings" + ", 16 pixels, blocks" * (when == "scores")
    assert messages[-1].startswith(f"interrupted; kept for --resume: {stages}.")
    assert names(parts) == {STATE_FOLDER} and has_state(parts)
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "select_augmentation", lambda *_: pytest.fail("computed again"))
        if when == "scores":
            patch.setattr(fit_module, "select_blocks", lambda *_, **__: pytest.fail("computed again"))
        run(data, parts, recipe, resume=True, say=messages.append)
    assert f"continuing after {stages}" in messages
    assert names(parts) == names(whole) and not has_state(parts)
    same_model(whole, parts)


def test_a_fit_may_be_interrupted_again_and_fold_models_are_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(data, whole, keep_folds=True)
    with pytest.raises(KeyboardInterrupt):
        run(data, parts, keep_folds=True, callbacks=[interrupt])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit_module, "out_of_fold_results", lambda *_: interrupt(0, {}))
        run(data, parts, keep_folds=True, resume=True)
    run(data, parts, keep_folds=True, resume=True)
    same_model(whole, parts)
    for file in (whole / "folds").iterdir():
        assert file.read_bytes() == (parts / "folds" / file.name).read_bytes()


def test_interrupted_before_anything_is_finished(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit_module, "select_augmentation", lambda *_: interrupt(0, {}))
        run(data, tmp_path / "out", say=messages.append)
    assert messages[-1] == f"interrupted before anything was finished: {tmp_path / 'out'} is as it was"
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="expected a fit that was interrupted; found no"):
        run(data, tmp_path / "out", resume=True)


def test_an_earlier_model_stays_and_a_new_fit_removes_the_state(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path)
    before, files = (tmp_path / MODEL_FILE).read_bytes(), names(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, replace(TINY, seed=1), callbacks=[interrupt])
    assert (tmp_path / MODEL_FILE).read_bytes() == before and names(tmp_path) == files | {STATE_FOLDER}
    (tmp_path / STATE_FOLDER / "mine.txt").write_text("not of the fit")
    messages: list[str] = []
    run(data, tmp_path, say=messages.append)
    assert any("which --resume would continue; this one begins anew" in message for message in messages)
    assert names(tmp_path / STATE_FOLDER) == {"mine.txt"}, "files of others are kept"


def test_other_settings_and_images_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "out", callbacks=[interrupt])
    other = tmp_path / "other"
    other.mkdir()
    for file in sorted((data / "train" / "good").iterdir()):
        (other / file.name).write_bytes(file.read_bytes())
    first = min(other.iterdir())
    Image.open(first).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(first)
    for change, message in (
        ({"recipe": replace(TINY, rank=9)}, r"rank was 10, now 9\."),
        ({"recipe": replace(TINY, seed=3, logit=0.1)}, "logit was None, now 0.1; seed was 0, now 3"),
        ({"keep_folds": True}, "keep_folds was False, now True"),
        ({"group_by": r"(\d)\."}, "the groups are others"),
        ({"data": other}, "the images are others"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(**{"data": data, "out": tmp_path / "out", "recipe": TINY, "progress": False, "say": silent, **change},
                resume=True)  # type: ignore[arg-type]  # fmt: skip
    assert has_state(tmp_path / "out"), "the state stays"


@pytest.mark.parametrize("damage", ["state", "missing", "cut"])
def test_a_damaged_state_is_refused(data: Path, tmp_path: Path, damage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, callbacks=[interrupt])
    folder = tmp_path / STATE_FOLDER
    if damage == "state":
        (folder / "state.json").write_text(json.dumps({"run": {}, "stages": [{"name": "x"}]}))
    elif damage == "missing":
        next(folder.glob("stage-*-0-1.safetensors")).unlink()
    else:
        (file,) = folder.glob("stage-*-0-1.safetensors")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(fastmaf.CheckpointError, match=STATE_FOLDER):
        run(data, tmp_path, resume=True)


def test_sizes_go_on_where_they_were(data: Path, tmp_path: Path) -> None:
    from fastmaf.images.dataset import load_train
    from fastmaf.inspection.fit_stages import Stages
    from fastmaf.inspection.sizes import fit_sizes

    pixels = load_train(data, size=16, progress=False).pixels
    options: dict[str, Any] = {"recipe": replace(AUTO, blocks=0), "budget": 1e6, "progress": False}
    stages = Stages()
    whole = fit_sizes(pixels, (8, 16), stages=stages, **options)
    assert list(stages.done) == [f"{size} pixels, {stage}" for size in (8, 16) for stage in ("whitenings", "blocks")]
    del stages.done["16 pixels, blocks"], stages.done["16 pixels, whitenings"]
    again = fit_sizes(pixels, (8, 16), stages=stages, **options)
    assert (again.model.predict(pixels).scores == whole.model.predict(pixels).scores).all()


@pytest.mark.skipif(os.name == "nt", reason="signals of Windows are others")
@pytest.mark.slow  # a process of its own, with larger images
def test_a_signal_at_any_moment_leaves_a_folder_that_can_be_resumed(data: Path, tmp_path: Path) -> None:
    out, command = tmp_path / "out", [sys.executable, "-m", "fastmaf", "inspect", "fit"]
    command += ["--data", str(data), "--size", "32", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for delay in (0.0, 1.0, 3.0):
        resume = ["--resume"] if has_state(out) else []
        process = subprocess.Popen([*command, *resume], env=environment, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for line in process.stderr:
            if "fitting" in line or "continuing" in line:
                break
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
        assert process.wait(120) in (0, 130, -signal.SIGINT) and "Traceback" not in error
        if process.returncode == 0:
            break
        left = names(out) if out.exists() else set()
        if MODEL_FILE in left:  # everything was written, and the process about to end
            assert not has_state(out)
            break
        assert left == ({STATE_FOLDER} if has_state(out) else set())
        assert ("kept for --resume" in error) == has_state(out) or "as it was" in error
    if process.returncode:
        resume = ["--resume"] if has_state(out) else []
        assert subprocess.run([*command, *resume], env=environment, capture_output=True).returncode == 0
    assert not has_state(out) and (out / MODEL_FILE).exists()
