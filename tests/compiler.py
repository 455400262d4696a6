"""Whether torch.compile can compile here with its default backend."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest

FOUND = shutil.which("g++") is not None and Path(sysconfig.get_paths()["include"], "Python.h").exists()
needs_compiler = pytest.mark.skipif(not FOUND, reason="Inductor needs g++ and the headers of Python")
