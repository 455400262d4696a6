"""A kill or a full disk at any moment leaves a model that loads and can be resumed: the old one or the new one."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastmaf.capsule import memory_check
from fastmaf.capsule import train as training
from fastmaf.capsule.models import load_model
from fastmaf.io.locks import InUseError
from fastmaf.io.run_folder import DoesNotFitError
from fastmaf.training import checkpoints
from fastmaf.training.checkpoints import MODEL_FILE, STATE_FILE, load_state
from tests.capsule.faulty_runs import NEW
from tests.capsule.runs import ROOT, TINY, at_batch, run, same, tensors_of, with_
from tests.faults import hidden

pytestmark = [pytest.mark.usefixtures("undrawn"), pytest.mark.filterwarnings("ignore::fastmaf.ConnectivityWarning")]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("fault", ["killed", "full"])
def test_a_fault_at_any_operation_leaves_the_old_run_or_the_new_one(
    data: Path, tmp_path: Path, fault: str, one_thread: None
) -> None:
    """On one thread, as the process that forks must be: how many there are decides the last bits."""
    run(data, finished := tmp_path / "finished")
    command = [sys.executable, "-m", "tests.capsule.faulty_runs", fault, str(data), str(finished), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ended = dict(line.split() for line in done.stdout.splitlines())
    assert len(ended) > 20 and set(ended.values()) <= {"killed"} | ({"failed", "done"} if fault == "full" else set())
    whole = {}
    for config in (TINY, NEW):
        run(data, tmp_path / f"whole-{config.seed}", with_(epochs=3, seed=config.seed))
        whole[config.seed] = tensors_of(tmp_path / f"whole-{config.seed}")
    old, log = (finished / MODEL_FILE).read_bytes(), (finished / "train_log.csv").read_bytes()
    found: Counter[int] = Counter()
    for number in ended:
        out = tmp_path / number
        assert load_model(out).flow.features == 192
        _, state = load_state(out)
        seed = state["config"]["seed"]
        found[seed] += 1
        if seed == TINY.seed:
            assert (out / MODEL_FILE).read_bytes() == old
        else:
            assert (out / "model.previous.safetensors").read_bytes() == old
            assert (out / "train_log.previous.csv").read_bytes() == log
        if fault == "full":
            assert hidden(out) == []
        run(data, out, with_(epochs=3, seed=seed), resume=True)
        assert same(tensors_of(out), whole[seed])
        left = {path.name for path in out.iterdir()} - {path.name for path in finished.iterdir()}
        assert left <= {"model.previous.safetensors", "train_log.previous.csv"}
    assert set(found) == {TINY.seed, NEW.seed}, "faults before the new model was in place, and after"


def test_a_failed_checkpoint_leaves_its_room_to_others(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next state is large; it is of no use without its model."""
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(path: Path) -> None:
        assert (out / "training_state.next.safetensors").exists()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoints, "keep_previous", full)
    with pytest.raises(OSError, match="No space left"):
        run(data, out, NEW)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("place", ["run", "above"])
def test_an_out_that_is_a_file_is_noticed_before_the_images_are_read(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(training, "load_train", unreachable)
    file = tmp_path / "results"
    file.write_text("notes")
    with pytest.raises(NotADirectoryError, match=f"expected a folder to write the run to; found the file {file}"):
        run(data, file if place == "run" else file / "a" / "b")
    assert file.read_text() == "notes"


def unreachable(*args: object, **kwargs: object) -> None:
    raise AssertionError("the work has begun")


@pytest.mark.parametrize("name", [MODEL_FILE, "train_log.csv", "nll_curve.png"])
def test_a_folder_in_place_of_a_file_is_noticed_before_the_images_are_read(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(training, "load_train", unreachable)
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=name):
        run(data, tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs permissions that hold for this user")
def test_a_folder_that_cannot_be_written_is_noticed_before_the_images_are_read(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "load_train", unreachable)
    tmp_path.chmod(0o555)
    try:
        for out in (tmp_path, tmp_path / "new"):
            with pytest.raises(PermissionError):
                run(data, out)
    finally:
        tmp_path.chmod(0o755)


def test_too_small_a_disk_is_noticed_before_training(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of 4 bytes a weight, and two moments of the same size: what a checkpoint writes, but for its headers."""
    weights = sum(tensor.nbytes for tensor in tensors_of(finished).values())
    written = (finished / MODEL_FILE).stat().st_size + (finished / STATE_FILE).stat().st_size
    assert 2 * weights < memory_check.disk_needed(TINY) <= written
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=memory_check.disk_needed(TINY) - 1))
    with pytest.raises(
        DoesNotFitError, match=r"needs about 0\.\d MB of disk space in .*run, but only 0\.\d MB are free"
    ):
        run(data, tmp_path / "run")
    assert os.listdir(tmp_path) == [], "nothing was written, and the folder is gone again"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=memory_check.disk_needed(TINY)))
    run(data, tmp_path / "run")


def test_wrong_data_leave_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        run(tmp_path / "missing", tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []


def test_a_second_run_in_the_same_folder_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a run, another thread wants the folder, by another path."""
    refused: list[BaseException] = []

    def other() -> None:
        try:
            run(data, tmp_path / ".." / tmp_path.name, NEW)
        except InUseError as error:
            refused.append(error)

    def meanwhile(x: Tensor) -> Tensor:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return x

    run(data, tmp_path / "alone")
    at_batch(monkeypatch, 2, meanwhile)
    run(data, tmp_path)
    assert len(refused) == 1
    assert f"is in use: this process {os.getpid()} on " in str(refused[0]) and "training since" in str(refused[0])
    assert same(tensors_of(tmp_path), tensors_of(tmp_path / "alone"))
    assert hidden(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_after_a_kill_the_next_run_takes_the_folder_and_clears_it(data: Path, tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from fastmaf.io import tensor_file
from tests.capsule.runs import run
def killed(tensors, path, metadata):
    Path(path).write_bytes(b"half a model")
    os.kill(os.getpid(), signal.SIGKILL)
tensor_file.save_file = killed
run(Path({str(data)!r}), Path({str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(hidden(tmp_path)) == 2, "its lock, and what it was writing"
    run(data, tmp_path)
    assert hidden(tmp_path) == []
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(tmp_path).values())
