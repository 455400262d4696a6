"""Training runs that end early: that they resume to the bit, and that nothing is lost."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import fastmaf
from fastmaf.capsule.config import GUARDED, TrainConfig
from fastmaf.capsule.models import load_model
from fastmaf.capsule.sample import sample
from fastmaf.capsule.training_run import CURVE_FILE, LOG_FILE, TrainingStoppedError
from fastmaf.io import tensor_file
from fastmaf.io.tensor_file import read_tensors, write_tensors
from fastmaf.io.wording import count
from fastmaf.training import checkpoints
from fastmaf.training.checkpoints import MODEL_FILE, STATE_FILE, load_state, training_of
from tests.capsule.runs import ROOT, STEPS, TINY, at_batch, epoch, rows, run, same, tensors_of, with_, without_seconds

pytestmark = [pytest.mark.usefixtures("undrawn"), pytest.mark.filterwarnings("ignore::fastmaf.ConnectivityWarning")]


@pytest.mark.parametrize("changes", [{}, {**GUARDED, "order": "alternate", "warmup_steps": 6}])
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    run(data, tmp_path / "whole", with_(epochs=4, **changes))
    run(data, tmp_path / "halves", with_(epochs=2, **changes))
    assert not same(tensors_of(tmp_path / "halves"), tensors_of(tmp_path / "whole"))
    result = run(data, tmp_path / "halves", with_(epochs=4, **changes), resume=True)
    assert [row["epoch"] for row in result.log] == [1, 2, 3, 4]
    assert same(tensors_of(tmp_path / "halves"), tensors_of(tmp_path / "whole"))
    assert without_seconds(tmp_path / "halves") == without_seconds(tmp_path / "whole")
    moments = [load_state(tmp_path / name)[0] for name in ("halves", "whole")]
    assert moments[0]
    assert same(*moments)


def test_resuming_a_finished_run_changes_nothing(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path)
    before, log = tensors_of(tmp_path), rows(tmp_path)
    result = run(data, tmp_path, resume=True)
    assert len(result.log) == 2
    assert same(tensors_of(tmp_path), before)
    assert rows(tmp_path) == log


@pytest.mark.parametrize("missing", [MODEL_FILE, STATE_FILE, "both"])
def test_nothing_to_resume(data: Path, finished: Path, tmp_path: Path, missing: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in (MODEL_FILE, STATE_FILE):
        if missing in (name, "both"):
            (out / name).unlink()
    named = MODEL_FILE if missing == "both" else missing
    with pytest.raises(FileNotFoundError, match=rf"nothing to resume in .*expected .*{named} is not there"):
        run(data, out, resume=True)


def test_a_checkpoint_whose_files_do_not_belong_together_is_refused(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, with_(epochs=1))
    older = (tmp_path / STATE_FILE).read_bytes()
    run(data, tmp_path, with_(epochs=3), resume=True)
    (tmp_path / STATE_FILE).write_bytes(older)
    with pytest.raises(fastmaf.CheckpointError, match=r"does not belong to .* from step \d+: one of them was replaced"):
        run(data, tmp_path, with_(epochs=3), resume=True)
    assert load_model(tmp_path).flow.features == 192, "the model remains usable"


@pytest.mark.parametrize("name", [MODEL_FILE, STATE_FILE])
def test_a_damaged_checkpoint_is_named(data: Path, finished: Path, tmp_path: Path, name: str) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    content = (out / name).read_bytes()
    (out / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(fastmaf.CheckpointError, match=rf"{name} is not a safetensors file, or is damaged"):
        run(data, out, resume=True)


class Crash(Exception):
    """The process ends here, as far as the files are concerned."""


@pytest.mark.parametrize("at", range(5))
def test_a_crash_while_saving_leaves_the_checkpoint_before_or_the_one_after(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """A save is: write and move the next state, write and move the model, move the state. Each fails in turn, half
    done.
    """
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    before, calls = tensors_of(out), 0
    write, move = tensor_file.save_file, os.replace

    def crash_at(number: int) -> bool:
        nonlocal calls
        calls += 1
        return calls - 1 == number

    def write_half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if crash_at(at):
            path.write_bytes(b"half a file")
            raise Crash
        write(tensors, path, metadata)

    def move_not(source: Path, target: Path) -> None:
        if Path(target).suffix == ".safetensors" and crash_at(at):
            raise Crash
        move(source, target)

    monkeypatch.setattr(tensor_file, "save_file", write_half)
    monkeypatch.setattr(os, "replace", move_not)
    with pytest.raises(Crash):
        run(data, out, with_(epochs=3), resume=True)
    monkeypatch.undo()
    assert [p.name for p in out.iterdir() if p.name.endswith(".tmp")] == []
    load_model(out)
    assert same(tensors_of(out), before) is (at < 4)
    assert load_state(out)[1]["steps"] == training_of(out / MODEL_FILE)["steps"]
    assert len(run(data, out, with_(epochs=3), resume=True).log) == 3


def test_an_unfinished_run_is_not_overwritten(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupts: None
) -> None:
    interrupt_in_epoch_3(monkeypatch)
    assert run(data, tmp_path, with_(epochs=5)).interrupted
    monkeypatch.undo()
    before = tensors_of(tmp_path)
    with pytest.raises(ValueError, match=r"unfinished run \(2 of 5 epochs\): continue it with --resume"):
        run(data, tmp_path, with_(epochs=5))
    assert same(tensors_of(tmp_path), before)


def test_a_finished_run_may_be_repeated(data: Path, finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    run(data, out, with_(seed=3, epochs=1))
    assert len(rows(out)) == 1


def test_a_state_without_its_model_does_not_prevent_a_new_run(data: Path, finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    (out / MODEL_FILE).unlink()
    assert len(run(data, out).log) == 2


def interrupt_in_epoch_3(monkeypatch: pytest.MonkeyPatch, times: int = 1) -> None:
    def interrupt(x: Tensor) -> Tensor:
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return x

    at_batch(monkeypatch, epoch(3), interrupt)


def test_ctrl_c_keeps_a_model_that_can_be_used_and_resumed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_in_epoch_3(monkeypatch)
    result = run(data, tmp_path, with_(epochs=4))
    monkeypatch.undo()
    assert result.interrupted
    assert [row["epoch"] for row in result.log] == [1, 2]
    assert len(rows(tmp_path)) == 2
    assert "stopping after this step" in capsys.readouterr().err
    assert same(load_model(tmp_path).flow.state_dict(), result.flow.state_dict())
    assert (tmp_path / CURVE_FILE).is_file()
    assert len(run(data, tmp_path, with_(epochs=4), resume=True).log) == 4


def test_ctrl_c_in_the_first_epoch_keeps_a_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupts: None
) -> None:
    def interrupt(x: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return x

    at_batch(monkeypatch, 1, interrupt)
    result = run(data, tmp_path)
    monkeypatch.undo()
    assert result.interrupted
    assert result.log == []
    assert not same(tensors_of(tmp_path), TINY.build().state_dict()), "the one step that was taken is in it"
    assert len(run(data, tmp_path, resume=True).log) == 2


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupts: None, every_epoch: None
) -> None:
    run(data, tmp_path / "two", with_(epochs=2))
    interrupt_in_epoch_3(monkeypatch, times=2)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "stopped", with_(epochs=4))
    assert same(tensors_of(tmp_path / "stopped"), tensors_of(tmp_path / "two"))


def test_resuming_before_any_step_was_taken(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every step skipped, the optimiser has no state yet."""
    monkeypatch.setattr(fastmaf.optim.FusedAdam, "minimize", lambda *args, **options: False)
    run(data, tmp_path, with_(epochs=1, max_grad_norm=1.0))
    assert rows(tmp_path)[0]["skipped_steps"] == str(STEPS)
    monkeypatch.undo()
    assert len(run(data, tmp_path, with_(max_grad_norm=1.0), resume=True).log) == 2


def test_only_safetensors_are_read_and_the_state_is_json(finished: Path) -> None:
    """Nothing executable in a checkpoint: the state is JSON in a safetensors file's metadata."""
    moments, state = load_state(finished)
    assert json.loads(json.dumps(state)) == state
    assert {name.rsplit("/", 1)[1] for name in moments} == {"step", "exp_avg", "exp_avg_sq", "cpu"}
    assert checkpoints.load_state(finished, tensors=False) == ({}, state)


KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    import fastmaf
    from fastmaf.capsule import training_run
    from fastmaf.capsule.config import TrainConfig
    from fastmaf.capsule.train import train
    from fastmaf.training.checkpoints import MODEL_FILE, load_state

    torch.set_num_threads(1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.Adam([parameter], fused=True).step()  # imports what takes a second, once for all children
    training_run._SECONDS_BETWEEN_CHECKPOINTS = -1.0
    training_run._SECONDS_BETWEEN_CURVES = 1e9
    data, out, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    config = TrainConfig(size=8, blocks=2, hidden_features=(64, 64), epochs=10**6, batch_size=8, holdout=0.2)
    last = 0
    for i in range(rounds):
        child = os.fork()
        if child == 0:
            train(data, out / str(i), config, progress=False)
        while not (out / str(i) / MODEL_FILE).exists():
            time.sleep(0.001)
        time.sleep(random.random() * 0.2)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        flow = fastmaf.load(out / str(i) / MODEL_FILE)
        assert all(bool(torch.isfinite(p).all()) for p in flow.parameters())
        try:
            done = load_state(out / str(i))[1]["epochs_done"]
            print("whole", done)
        except (fastmaf.CheckpointError, FileNotFoundError) as error:
            assert "does not belong to" in str(error) or "nothing to resume" in str(error), error
            print("between", error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_a_model_that_loads(data: Path, tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(textwrap.dedent(KILLED))
    command = [sys.executable, str(driver), str(data), str(tmp_path), "5"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_on_the_command_line(data: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "run", ("--size", "8", "--blocks", "2", "--hidden", "16,16", "--batch-size", "4")
    command = [sys.executable, "-m", "fastmaf", "capsule", "train", "--data", str(data), "--out", str(out), *settings]
    with open(tmp_path / "out.txt", "w") as stdout, open(tmp_path / "err.txt", "w") as bar:
        process = subprocess.Popen(
            [*command, "--epochs", "1000000"], cwd=ROOT, env=environment(), stdout=stdout, stderr=bar
        )
        try:
            give_up = time.monotonic() + 60
            while not (out / LOG_FILE).exists() and process.poll() is None and time.monotonic() < give_up:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            code = process.wait(timeout=60)
        finally:
            process.kill()
    text, progress = (tmp_path / "out.txt").read_text(), (tmp_path / "err.txt").read_text()
    assert code == 130, progress
    assert "Traceback" not in progress
    assert "stopping after this step" in progress
    done = len(rows(out))
    assert f"stopped after {count(done, 'whole epoch')}; --resume continues\nmodel: {out / MODEL_FILE}" in text
    assert "NLL" in text
    assert "bits/dim" in text
    files = sample(load_model(out), out, 1, progress=False).files
    assert files[0].is_file()
    # The same settings as on the command line, three epochs more.
    config = TrainConfig(size=8, blocks=2, hidden_features=(16, 16), batch_size=4, epochs=done + 3)
    before = without_seconds(out)
    assert len(run(data, out, config, resume=True).log) == done + 3
    assert without_seconds(out)[:done] == before


def test_a_new_run_keeps_the_previous_model(data: Path, finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    model, log = (out / MODEL_FILE).read_bytes(), (out / "train_log.csv").read_bytes()
    run(data, out, with_(epochs=1, seed=5))
    assert (out / "model.previous.safetensors").read_bytes() == model
    assert (out / "train_log.previous.csv").read_bytes() == log
    assert (out / MODEL_FILE).read_bytes() != model
    assert load_state(out)[1]["epochs_done"] == 1


def test_a_run_that_fails_before_its_first_checkpoint_leaves_an_earlier_one_alone(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    at_batch(monkeypatch, 1, lambda x: x * math.nan)
    with pytest.raises(TrainingStoppedError, match="the model of an earlier run in .* is untouched"):
        run(data, out)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_a_state_of_the_same_epoch_but_another_step_is_not_taken(data: Path, finished: Path, tmp_path: Path) -> None:
    """Ctrl-C saves in the middle of an epoch: the number of whole epochs does not tell two checkpoints apart."""
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    tensors, metadata = read_tensors(out / STATE_FILE)
    state = json.loads(metadata["state"])
    write_tensors(tensors, out / STATE_FILE, {"state": json.dumps({**state, "steps": state["steps"] - 1})})
    with pytest.raises(fastmaf.CheckpointError, match="does not belong to"):
        run(data, out, with_(epochs=3), resume=True)
