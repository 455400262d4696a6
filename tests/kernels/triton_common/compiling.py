"""Compiles kernels with the versions of Triton at hand, in processes of their own: this one may interpret them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Beside the installed one (""): those of the last torch with Pascal, and of the torch that most GPU machines have.
TRITONS = ("", "3.3.1", "3.6.0")


def folder(version: str) -> Path:
    """Returns where `make test-all` installs a version of Triton."""
    return Path(sys.prefix) / f"triton-{version}"


def needs_triton(version: str) -> None:
    """Skips a test where a version of Triton is missing."""
    if version and not (folder(version) / "triton").is_dir():
        pytest.skip(f"Triton {version} is not in {folder(version).name}: make test-all installs it, where it exists")


@cache
def output(module: str, *arguments: str, version: str = "") -> Any:
    """Returns the JSON that a module prints, run anew with a version of Triton; once in a session of tests."""
    needs_triton(version)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if version:
        environment["PYTHONPATH"] = str(folder(version))
    with tempfile.TemporaryDirectory() as cache_folder:
        environment |= {"TRITON_CACHE_DIR": cache_folder, "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", module, *arguments]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)
