"""Fit, calibrate, score and export, killed at random moments of slow writes, and where files must not grow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
COMMANDS = ["fit", "calibrate", "recalibrate", "score", "export"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits the size of files as Linux does"),
]


def driven(*arguments: object) -> list[str]:
    if "export" in arguments:
        pytest.importorskip("onnxruntime")
    command = [sys.executable, "-m", "tests.inspection.workflow.killed_runs", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_random_moments(data: Path, run: Path, tmp_path: Path, command: str) -> None:
    (line,) = driven("killed", command, data, run, tmp_path, 8, 1)
    assert int(line.split()[1]) >= 1, "kills must come before the end"


@pytest.mark.parametrize("command", COMMANDS)
def test_files_that_must_not_grow(data: Path, run: Path, tmp_path: Path, command: str) -> None:
    assert driven("limited", command, data, run, tmp_path, 20, 150) == ["failed"] * 2
