"""Fit, calibrate, score and export, killed at random moments of slow writes, and where files must not grow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.driven import driven

COMMANDS = ["fit", "calibrate", "recalibrate", "score", "export"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits the size of files as Linux does"),
]


def killed(what: str, command: str, *arguments: object) -> list[str]:
    if command == "export":
        pytest.importorskip("onnxruntime")
    return driven("tests.inspection.workflow.killed_runs", what, command, *arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_random_moments(data: Path, run: Path, tmp_path: Path, command: str) -> None:
    (line,) = killed("killed", command, data, run, tmp_path, 8, 1)
    assert int(line.split()[1]) >= 1, "kills must come before the end"


@pytest.mark.parametrize("command", COMMANDS)
def test_files_that_must_not_grow(data: Path, run: Path, tmp_path: Path, command: str) -> None:
    assert killed("limited", command, data, run, tmp_path, 20, 150) == ["failed"] * 2
