"""``torchrun -m fastmaf capsule train``: processes that share every batch, against one that has it whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import distributed

from tests.capsule.runs import ROOT, rows, tensors_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package"),
]
SETTINGS = [
    "--size",
    "8",
    "--blocks",
    "2",
    "--hidden",
    "16,16",
    "--epochs",
    "3",
    "--batch-size",
    "3",
    "--lr",
    "1e-3",
    "--holdout",
    "0.2",
    "--device",
    "cpu",
]
# A program of one of the processes, of which one kills itself in its second epoch, once.
FAILING = """
    import os, signal, time
    from pathlib import Path
    from fastmaf.capsule import training_run
    from fastmaf.cli import main

    training_run._SECONDS_BETWEEN_CHECKPOINTS = -1.0
    epoch = training_run.TrainingRun._epoch

    def until_killed(self, number, *rest):
        begun = Path(os.environ["BEGUN"])
        if os.environ["RANK"] == "0":
            begun.write_text(begun.read_text() + f"{number} ")
        killed = begun.with_name("killed")
        if number == 2 and os.environ["RANK"] == "1" and not killed.exists():
            killed.touch()
            while begun.read_text() != "1 2 ":  # the first process has written its checkpoint before
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return epoch(self, number, *rest)

    training_run.TrainingRun._epoch = until_killed
    main()
"""


def train(processes: int, data: Path, out: Path, program: tuple[str, ...] = ("-m", "fastmaf")) -> str:
    """Runs ``capsule train``; returns what all processes print."""
    # Restarts: gloo may fail to connect where the machine is busy.
    together = ["-m", "torch.distributed.run", "--standalone", "--max-restarts=3", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(together if processes > 1 else ()), *program]
    command += ["capsule", "train", "--data", str(data), "--out", str(out), *SETTINGS, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_alike(out: Path, other: Path) -> None:
    for row, expected in zip(rows(out), rows(other), strict=True):
        assert float(row["nll"]) == pytest.approx(float(expected["nll"]), rel=1e-5)
        assert float(row["val_nll"]) == pytest.approx(float(expected["val_nll"]), rel=1e-5)
    ours, theirs = tensors_of(out), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if value.is_floating_point():
            assert (value - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


def test_the_run_of_one_process(data: Path, tmp_path: Path) -> None:
    """Batches of three, which two processes cannot halve, and of which one of four has nothing."""
    train(1, data, tmp_path / "1")
    for processes in (2, 4):
        printed = train(processes, data, tmp_path / str(processes))
        assert json.loads(printed)["epochs"] == 3, "one process prints"
        assert_alike(tmp_path / str(processes), tmp_path / "1")
        assert sorted(path.name for path in (tmp_path / str(processes)).iterdir()) == sorted(
            path.name for path in (tmp_path / "1").iterdir()
        )


def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (program := tmp_path / "program.py").write_text(textwrap.dedent(FAILING))
    (begun := tmp_path / "begun").touch()
    monkeypatch.setenv("BEGUN", str(begun))
    train(2, data, tmp_path / "ended", program=(str(program),))
    assert begun.read_text() == "1 2 2 3 ", "it went on after the first epoch"
    train(2, data, tmp_path / "whole")
    ours, expected = tensors_of(tmp_path / "ended"), tensors_of(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())
