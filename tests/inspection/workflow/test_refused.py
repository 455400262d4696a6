"""Fit, calibrate, score and export on a full disk and without permission: a message, exit code 1, and nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
COMMANDS = ["fit", "calibrate", "recalibrate", "score", "export"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, mounts, and changes users as Linux does"),
]


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user can enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def driven(*arguments: object, prefix: tuple[str, ...] = ()) -> list[str]:
    if "export" in arguments:
        pytest.importorskip("onnxruntime")
    command = [*prefix, sys.executable, "-m", "tests.inspection.workflow.refused_runs", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(data: Path, run: Path, tmp_path: Path, command: str) -> None:
    space = ("unshare", "--user", "--map-root-user", "--mount")
    probe = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*space, *probe], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here; test_kills.py::test_files_that_must_not_grow is alike")
    assert driven("full", command, data, run, tmp_path, prefix=space) == ["refused"] * 3


@pytest.mark.parametrize("command", COMMANDS)
def test_permission_that_is_revoked(data: Path, run: Path, shared: Path, command: str) -> None:
    for name, source in (("data", data), ("before", run)):
        shutil.copytree(source, shared / name)
        (shared / name).chmod(0o755)
    arguments = "revoked", command, shared / "data", shared / "before", shared
    assert driven(*arguments) == ["refused"] * 2
