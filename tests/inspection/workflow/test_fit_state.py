"""A state of an interrupted fit that replaces another: one of both is complete at any moment."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastmaf
from fastmaf.inspection.fit_stages import Stage, Stages
from fastmaf.inspection.out_of_fold import OutOfFoldModels
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.workflow import fit_state
from fastmaf.inspection.workflow.fit_state import STATE_FOLDER, has_state, load_state, remove_state, save_state
from tests.driven import driven
from tests.inspection.workflow.killed_states import NEW, OLD, RUN, equal


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT as in a terminal, also where the test runner was started with it switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_while_a_state_is_replaced(tmp_path: Path) -> None:
    *found, last = driven("tests.inspection.workflow.killed_states", tmp_path, 20, 3)
    assert len(found) == 20 and set(found) <= {"old", "new"} and found.count("old") > 2
    assert int(last.split()[1]) > 5, "many kills must come before the end"


@pytest.mark.parametrize("write", range(4))
@pytest.mark.parametrize("fault", ["ctrl-c", "full"])
def test_a_state_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, interrupts: None, monkeypatch: pytest.MonkeyPatch, fault: str, write: int
) -> None:
    """Three files of flows and ``state.json``. The first Ctrl-C waits, the second does not."""
    save_state(tmp_path, RUN, OLD)
    before = {path.name: path.read_bytes() for path in (tmp_path / STATE_FOLDER).iterdir()}
    calls = iter(range(10))

    def broken(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == write:
                if fault == "full":
                    raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(fastmaf.Flow, "save", broken(fastmaf.Flow.save))
        patch.setattr(fit_state, "written_atomically", broken(fit_state.written_atomically))
        with pytest.raises(KeyboardInterrupt if fault == "ctrl-c" else OSError):
            save_state(tmp_path, RUN, NEW)
    assert {path.name: path.read_bytes() for path in (tmp_path / STATE_FOLDER).iterdir()} == before
    assert equal(load_state(tmp_path, RUN), OLD)


def test_one_ctrl_c_waits_for_the_state(tmp_path: Path, interrupts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    save = fastmaf.Flow.save

    def interrupted(*args: Any, **kwargs: Any) -> None:
        if not list(tmp_path.rglob("stage-*")):
            signal.raise_signal(signal.SIGINT)
        save(*args, **kwargs)

    monkeypatch.setattr(fastmaf.Flow, "save", interrupted)
    save_state(tmp_path, RUN, NEW)
    assert equal(load_state(tmp_path, RUN), NEW)


def test_a_state_of_an_earlier_version_is_read_and_replaced(tmp_path: Path) -> None:
    save_state(tmp_path, RUN, OLD)
    folder = tmp_path / STATE_FOLDER
    state = json.loads((folder / "state.json").read_text())
    files = state.pop("files")
    (folder / "state.json").write_text(json.dumps(state))
    for path in folder.glob("stage-*"):
        path.rename(folder / path.name.replace(f"{files}-", ""))
    (folder / "stage-photos.safetensors").write_text("of the user")
    assert equal(load_state(tmp_path, RUN), OLD)
    save_state(tmp_path, RUN, NEW)
    assert equal(load_state(tmp_path, RUN), NEW) and len(list(folder.iterdir())) == 5
    remove_state(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["stage-photos.safetensors"] and not has_state(tmp_path)


@pytest.mark.parametrize("files", ["../../secret", "ABCDEF01", "0" * 9])
def test_names_of_files_lead_nowhere_else(tmp_path: Path, files: str) -> None:
    save_state(tmp_path, RUN, OLD)
    state = tmp_path / STATE_FOLDER / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "files": files}))
    with pytest.raises(fastmaf.CheckpointError, match="expected eight hexadecimal digits"):
        load_state(tmp_path, RUN)


def _whitened() -> tuple[Recipe, Stages]:
    recipe = Recipe(size=2, folds=2)
    flow = fastmaf.Flow(recipe.features, [fastmaf.GaussianWhitening(recipe.features, 1)])
    blocks = fastmaf.Flow(recipe.features, [fastmaf.LocalAutoregressive((3, 2, 2), patch=1, kernel=1, hidden=2)])
    whitenings = Stage((flow, flow, flow), {"augmentation": "none", "figures": {}})
    done = {
        "2 pixels, whitenings": whitenings,
        "2 pixels, blocks": Stage((blocks,), {"kept": 1, "log": [], "figures": {}}),
    }
    return recipe, Stages(done)


@pytest.mark.parametrize(
    ("stage", "record"),
    [
        (0, {}),
        (0, {"augmentation": "auto", "figures": {}}),
        (0, {"augmentation": ["none"], "figures": {}}),
        (0, {"augmentation": "none", "figures": 3}),
        (1, {"log": [], "figures": {}}),
        (1, {"kept": 2, "log": [], "figures": {}}),
        (1, {"kept": "1", "log": [], "figures": {}}),
        (1, {"kept": 1, "log": [1], "figures": {}}),
        (1, {"kept": 1, "log": None, "figures": {}}),
    ],
)
def test_records_of_stages_are_checked(tmp_path: Path, stage: int, record: Any) -> None:
    recipe, stages = _whitened()
    models = OutOfFoldModels([torch.tensor([0]), torch.tensor([1])], [stages.done["2 pixels, whitenings"].flows[0]] * 2)
    save_state(tmp_path, RUN, stages)
    loaded = load_state(tmp_path, RUN)
    assert loaded.whitenings(recipe) is not None and loaded.blocks(recipe, models) is not None

    file = tmp_path / STATE_FOLDER / "state.json"
    state = json.loads(file.read_text())
    state["stages"][stage]["record"] = record
    file.write_text(json.dumps(state))
    loaded = load_state(tmp_path, RUN)
    with pytest.raises(fastmaf.CheckpointError, match="state.json"):
        _ = loaded.whitenings(recipe), loaded.blocks(recipe, models)


@pytest.mark.parametrize("other", ["features", "kind", "folds"])
def test_blocks_of_another_model_are_refused(tmp_path: Path, other: str) -> None:
    recipe, stages = _whitened()
    whitening, blocks = (stages.done[f"2 pixels, {name}"].flows[0] for name in ("whitenings", "blocks"))
    models = OutOfFoldModels([torch.tensor([0]), torch.tensor([1])], [whitening] * 2)
    larger = fastmaf.Flow(27, [fastmaf.LocalAutoregressive((3, 3, 3), patch=1, kernel=1, hidden=2)])
    flows = {"features": (larger,), "kind": (whitening,), "folds": (blocks, blocks)}[other]
    stages.done["2 pixels, blocks"] = stages.done["2 pixels, blocks"]._replace(flows=flows)
    save_state(tmp_path, RUN, stages)
    with pytest.raises(fastmaf.CheckpointError, match="state.json: expected"):
        load_state(tmp_path, RUN).blocks(recipe, models)


def test_a_state_that_is_no_object_hides_no_other_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / STATE_FOLDER
    folder.mkdir()
    (folder / "state.json").write_text("[]")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    monkeypatch.setattr(fastmaf.Flow, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_state(tmp_path, RUN, NEW)
