"""Training killed at 30 random moments, during slow writes too, on a full disk, and without permission.

Each time the last good model loads and the run reaches the result of an uninterrupted one; ``test_faults.py`` goes
through every operation on files instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.capsule.runs import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits the size of files as Linux does"),
]


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user can enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def driven(*arguments: object, prefix: tuple[str, ...] = ()) -> list[str]:
    command = [*prefix, sys.executable, "-m", "tests.capsule.killed_runs", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_killed_at_30_random_moments(data: Path, tmp_path: Path) -> None:
    lines = driven("killed", data, tmp_path, 30, 0)
    assert len(lines) == 31 and set(lines[:-1]) <= {"old", "new"}
    assert int(lines[-1].split()[1]) >= 10, "many kills must come before the end"


def test_a_full_disk(data: Path, tmp_path: Path) -> None:
    space = ("unshare", "--user", "--map-root-user", "--mount")
    probe = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*space, *probe], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here; test_files_that_must_not_grow has the same faults")
    lines = driven("full", data, tmp_path, prefix=space)
    assert len(lines) == 16 and "failed old" in lines and "failed new" in lines


def test_files_that_must_not_grow(data: Path, tmp_path: Path) -> None:
    assert driven("limited", data, tmp_path) == ["failed old"] * 4 + ["failed new"]


def test_permission_that_is_revoked(data: Path, shared: Path) -> None:
    images = Path(shutil.copytree(data, shared / "data"))
    images.chmod(0o755)
    assert driven("revoked", images, shared) == ["failed old", "failed new", "failed new"]
