"""Fit, calibrate, score and export on a full disk and without permission: a message, exit code 1, and nothing lost."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.driven import SPACE, driven, need_mounts

COMMANDS = ["fit", "calibrate", "recalibrate", "score", "export"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, mounts, and changes users as Linux does"),
]


def refused(what: str, command: str, *arguments: object, prefix: tuple[str, ...] = ()) -> list[str]:
    if command == "export":
        pytest.importorskip("onnxruntime")
    return driven("tests.inspection.workflow.refused_runs", what, command, *arguments, prefix=prefix)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(data: Path, run: Path, tmp_path: Path, command: str) -> None:
    need_mounts(tmp_path, "test_kills.py::test_files_that_must_not_grow")
    assert refused("full", command, data, run, tmp_path, prefix=SPACE) == ["refused"] * 3


@pytest.mark.parametrize("command", COMMANDS)
def test_permission_that_is_revoked(data: Path, run: Path, shared: Path, command: str) -> None:
    for name, source in (("data", data), ("before", run)):
        shutil.copytree(source, shared / name)
        (shared / name).chmod(0o755)
    assert refused("revoked", command, shared / "data", shared / "before", shared) == ["refused"] * 2
