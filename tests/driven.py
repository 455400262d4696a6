"""Modules of tests that run in a process of their own, and small file systems for them to fill."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Before a command: it has mounts of its own, which the user may make.
SPACE = ("unshare", "--user", "--map-root-user", "--mount")


def driven(module: str, *arguments: object, prefix: tuple[str, ...] = ()) -> list[str]:
    """Runs a module with one thread, as one of many threads cannot fork, and returns the lines that it prints."""
    command = [*prefix, sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def need_mounts(folder: Path, alike: str) -> None:
    """Skips a test where no file system can be mounted on a folder; ``alike`` is the test that has such faults, too."""
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if shutil.which("unshare") is None or subprocess.run([*SPACE, *mount], capture_output=True).returncode:
        pytest.skip(f"no file system can be mounted here; {alike} has the same faults")
