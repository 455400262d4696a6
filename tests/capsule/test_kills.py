"""Training killed at 30 random moments, during slow writes too, on a full disk, and without permission.

Each time the last good model loads and the run reaches the result of an uninterrupted one; ``test_faults.py`` goes
through every operation on files instead.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.driven import SPACE, driven, need_mounts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits the size of files as Linux does"),
]


RUNS = "tests.capsule.killed_runs"


def test_killed_at_30_random_moments(data: Path, tmp_path: Path) -> None:
    lines = driven(RUNS, "killed", data, tmp_path, 30, 0)
    assert len(lines) == 31 and set(lines[:-1]) <= {"old", "new"}
    assert int(lines[-1].split()[1]) >= 10, "many kills must come before the end"


def test_a_full_disk(data: Path, tmp_path: Path) -> None:
    need_mounts(tmp_path, "test_files_that_must_not_grow")
    lines = driven(RUNS, "full", data, tmp_path, prefix=SPACE)
    assert len(lines) == 16 and "failed old" in lines and "failed new" in lines


def test_files_that_must_not_grow(data: Path, tmp_path: Path) -> None:
    assert driven(RUNS, "limited", data, tmp_path) == ["failed old"] * 4 + ["failed new"]


def test_permission_that_is_revoked(data: Path, shared: Path) -> None:
    images = Path(shutil.copytree(data, shared / "data"))
    images.chmod(0o755)
    assert driven(RUNS, "revoked", images, shared) == ["failed old", "failed new", "failed new"]
