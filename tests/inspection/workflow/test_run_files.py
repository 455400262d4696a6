"""The files of an inspection run: replaced together when all are written, by one command at a time."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fastmaf.capsule.config import TrainConfig
from fastmaf.cli.app import app
from fastmaf.images.decode import DataError
from fastmaf.inspection.fold_models import FOLDS_FOLDER, load_fold_models
from fastmaf.inspection.model import load_inspection
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.report import build
from fastmaf.inspection.report.content import REPORT_FILE
from fastmaf.inspection.workflow import calibrate as calibrating
from fastmaf.inspection.workflow import fit as fitting
from fastmaf.inspection.workflow import load as loading
from fastmaf.inspection.workflow.calibrate import calibrate, recalibrate
from fastmaf.inspection.workflow.choose import choose
from fastmaf.inspection.workflow.fit import fit
from fastmaf.io.locks import InUseError, run_lock
from fastmaf.io.run_folder import DoesNotFitError
from fastmaf.io.tensor_file import read_tensors, write_tensors
from fastmaf.training.checkpoints import MODEL_FILE, STATE_FILE
from tests.faults import hidden
from tests.inspection.tiny import A_REPORT, TINY, silent
from tests.inspection.workflow.faulty_runs import FILES, PREVIOUS

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run_copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder."""
    return Path(shutil.copytree(run, tmp_path / "run_copy"))


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT as in a terminal, also where the test runner was started with it switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "a handler was left behind"
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def fitted_already(fitted: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits in no time, and writes a report of a line."""
    monkeypatch.setattr(fitting, "fit_model", lambda *args, **kwargs: fitted[1])
    monkeypatch.setattr(build, "training_report", lambda path, *args, **kwargs: path.write_text(A_REPORT))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("fault", ["killed", "full"])
def test_a_fault_at_any_operation_leaves_the_old_model_or_the_new_one(
    data: Path, run: Path, tmp_path: Path, fault: str
) -> None:
    """The driver checks each, and that the next run leaves nothing of it behind."""
    command = [sys.executable, "-m", "tests.inspection.workflow.faulty_runs", fault, str(data), str(run), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words.count("killed" if fault == "killed" else "failed") > 20
    assert words.count("old") > 10 and words.count("new") > 1


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_report_that_cannot_be_written_changes_nothing(
    data: Path, run_copy: Path, fitted_already: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run_copy)
    monkeypatch.setattr(build, "training_report", full)
    with pytest.raises(OSError, match="No space left"):
        fit(data, run_copy, TINY, progress=False, say=silent)
    assert contents(run_copy) == before and hidden(run_copy) == []


def test_the_previous_run_is_kept(data: Path, run_copy: Path, fitted_already: None) -> None:
    before = contents(run_copy)
    fit(data, run_copy, TINY, keep_folds=True, progress=False, say=silent)
    after = contents(run_copy)
    assert {after[name] for name in PREVIOUS} == set(before.values())
    assert {name for name in after if "/" in name} == {f"{FOLDS_FOLDER}/fold-{k}.safetensors" for k in (1, 2, 3)}
    assert len(load_fold_models(run_copy, load_inspection(run_copy))) == 3
    fit(data, run_copy, TINY, progress=False, say=silent)
    assert {path.name for path in run_copy.iterdir()} == FILES | PREVIOUS, (
        "the models of the folds are gone with theirs"
    )


def test_folds_that_are_not_all_there_are_no_ensemble(data: Path, run_copy: Path, fitted_already: None) -> None:
    fit(data, run_copy, TINY, keep_folds=True, progress=False, say=silent)
    (run_copy / FOLDS_FOLDER / "fold-2.safetensors").unlink()
    assert load_fold_models(run_copy, load_inspection(run_copy)) == []


def test_an_interrupted_fit_leaves_everything_as_it_was(
    data: Path, run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    before = contents(run_copy)
    monkeypatch.setattr(fitting, "fit_model", interrupted)
    for out in (run_copy, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            fit(data, out, TINY, progress=False, say=silent)
    assert contents(run_copy) == before and sorted(os.listdir(tmp_path)) == ["run_copy"]


@pytest.mark.parametrize("place", ["report", "replace"])
def test_ctrl_c_while_writing(
    data: Path, run_copy: Path, fitted_already: None, interrupts: None, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Before the first file is replaced nothing changes; from then on all are."""
    before = contents(run_copy)
    if place == "report":
        monkeypatch.setattr(build, "training_report", lambda *args, **kw: signal.raise_signal(signal.SIGINT))
    else:
        monkeypatch.setattr(fitting, "replace", interrupting(fitting.replace))
    with pytest.raises(KeyboardInterrupt):
        fit(data, run_copy, TINY, progress=False, say=silent)
    if place == "report":
        assert contents(run_copy) == before
    else:
        assert (run_copy / REPORT_FILE).read_text() == A_REPORT
        assert all(contents(run_copy)[name] != before[name] for name in (MODEL_FILE, REPORT_FILE))
    assert hidden(run_copy) == []


def interrupting(function: Callable[..., None]) -> Callable[..., None]:
    calls: list[object] = []

    def once(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        function(*args)

    return once


def test_an_unfinished_run_of_the_other_recipe_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    from fastmaf.capsule import train as other

    config = TrainConfig(size=8, blocks=1, hidden_features=(8,), epochs=1, batch_size=16)
    other.train(data, tmp_path, config, progress=False)
    state = tmp_path / STATE_FILE
    tensors, metadata = read_tensors(state)
    metadata["state"] = metadata["state"].replace('"epochs": 1', '"epochs": 5')
    write_tensors(tensors, state, metadata)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds an unfinished run \(1 of 5 epochs\)"):
        fit(data, tmp_path, TINY, progress=False, say=silent)
    assert contents(tmp_path) == before


def test_the_state_of_a_finished_run_of_the_other_recipe_goes(data: Path, run_copy: Path, fitted_already: None) -> None:
    from fastmaf.capsule import train as other

    config = TrainConfig(size=8, blocks=1, hidden_features=(8,), epochs=1, batch_size=16)
    other.train(data, run_copy / "sub", config, progress=False)
    fit(data, run_copy / "sub", TINY, progress=False, say=silent)
    assert not (run_copy / "sub" / STATE_FILE).exists() and load_inspection(run_copy / "sub").size == 16


def test_what_is_wrong_with_out_is_noticed_before_the_images_are_read(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_train", lambda *args, **kwargs: pytest.fail("the work has begun"))
    (tmp_path / "file").write_text("notes")
    (tmp_path / "run" / REPORT_FILE).mkdir(parents=True)
    with pytest.raises(NotADirectoryError, match="found the file .*file"):
        fit(data, tmp_path / "file" / "run", TINY, progress=False, say=silent)
    with pytest.raises(IsADirectoryError, match=REPORT_FILE):
        fit(data, tmp_path / "run", TINY, progress=False, say=silent)


def test_too_small_a_disk_is_noticed_before_the_fit(
    data: Path, run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 bytes for each of 10 factors of 768 dimensions, once, or four times with the models of three folds."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fitting, "fit_model", lambda *args, **kwargs: pytest.fail("the fit has begun"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4 * 10 * 768 - 1))
    with pytest.raises(DoesNotFitError, match="0.0 MB"):
        fit(data, tmp_path / "run", TINY, progress=False, say=silent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4 * 4 * 10 * 768 - 1))
    with pytest.raises(DoesNotFitError, match="0.1 MB"):
        fit(data, tmp_path / "run", TINY, keep_folds=True, progress=False, say=silent)
    assert sorted(os.listdir(tmp_path)) == ["run_copy"]
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=(run_copy / MODEL_FILE).stat().st_size - 1)
    )
    before = contents(run_copy)
    for call in (
        lambda: calibrate(run_copy, 0.2),
        lambda: recalibrate(run_copy, [str(data / "test/good")], 0.2, progress=False),
    ):
        with pytest.raises(DoesNotFitError):
            call()
    assert contents(run_copy) == before


def test_one_command_at_a_time(data: Path, run_copy: Path) -> None:
    good = [str(data / "test" / "good")]
    before = contents(run_copy)
    calls: list[Callable[[], object]] = [
        lambda: fit(data, run_copy, TINY, progress=False, say=silent),
        lambda: calibrate(run_copy, 0.2),
        lambda: calibrate(run_copy / MODEL_FILE, 0.2),
        lambda: recalibrate(run_copy, good, 0.2, progress=False, say=silent),
    ]
    with run_lock(run_copy / MODEL_FILE, "training"):
        for call in calls:
            with pytest.raises(InUseError, match=f"is in use: this process {os.getpid()} on .*, training since"):
                call()
    assert contents(run_copy) == before
    calibrate(run_copy, 0.2)
    assert load_inspection(run_copy).calibration.false_alarm == 0.2 and hidden(run_copy) == []


def test_no_calibration_is_lost_to_one_that_began_earlier(
    data: Path, run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While new images are scored, another thread changes the rate: it is refused, not overwritten afterwards."""
    refused: list[InUseError] = []
    read = calibrating.read_images

    def meanwhile(*args: Any, **kwargs: Any) -> Any:
        def other() -> None:
            with pytest.raises(InUseError) as caught:
                calibrate(run_copy, 0.3)
            refused.append(caught.value)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return read(*args, **kwargs)

    monkeypatch.setattr(calibrating, "read_images", meanwhile)
    recalibrate(run_copy, [str(data / "test" / "good")], 0.2, progress=False, say=silent)
    assert "recalibrating since" in str(refused[0])
    assert load_inspection(run_copy).calibration.how == "split"


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_calibration_that_cannot_be_written_changes_nothing(
    data: Path, run_copy: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    before = contents(run_copy)
    with monkeypatch.context() as patch:
        patch.setattr(os, operation, full)
        with pytest.raises(OSError, match="No space left"):
            calibrate(run_copy, 0.2)
        with pytest.raises(OSError, match="No space left"):
            recalibrate(run_copy, [str(data / "test" / "good")], 0.2, progress=False, say=silent)
    assert contents(run_copy) == before and hidden(run_copy) == []


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_too_few_images_are_counted_before_the_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    folder = pictures(tmp_path / "images", n)
    monkeypatch.setattr(fitting, "fit_model", lambda *args, **kwargs: pytest.fail("the fit has begun"))
    (folder / "damaged.png").write_bytes(b"")
    out = tmp_path / "run"
    arguments = ["--data", str(folder), "--size", "8", "--skip-bad", "--quiet"]
    for command in (["train", "--recipe", "inspection", "--out", str(out)], ["choose"]):
        done = CliRunner().invoke(app, [*command, *arguments])
        assert isinstance(done.exception, DataError)
        text = str(done.exception)
        assert f"{folder}: expected at least 5 good images" in text
        assert f"found {n} good image{'s' * (n > 1)}, and 1 file that cannot be read" in text
        assert "--data" in text and "fold" not in text.replace("folder", "")
    assert not out.exists()


@pytest.mark.slow
def test_as_many_images_as_are_needed(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "images", 5)
    arguments = ["train", "--recipe", "inspection", "--out", str(tmp_path / "run"), "--data", str(folder)]
    done = CliRunner().invoke(app, [*arguments, "--size", "8", "--quiet"])
    assert done.exit_code == 0 and "5 good images" in done.output
    result = fit(folder, tmp_path / "run", Recipe(size=8, folds=24), progress=False, say=silent)
    assert result.fitted.model.calibration.folds == 5  # at most one fold an image
    with pytest.raises(DataError, match="expected at least 5 good images"):
        choose(pictures(tmp_path / "few", 2), size=8, progress=False)


def pictures(folder: Path, n: int) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(random.integers(100, 150, (16, 16, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    return folder
