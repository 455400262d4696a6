"""500 damaged files of models and images in a process with little memory; ``make fuzz`` reads 20,000."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
def test_every_damaged_file_is_refused_or_computes() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fuzz.run", "500", "0"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    (summary,) = done.stdout.splitlines()
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (\w+ \w+),", summary)}
    assert sum(counts.values()) == 500, summary
    assert counts.keys() == {"images loaded", "images refused", "models loaded", "models refused"}
    assert all(n > 5 for n in counts.values()), "the mutations do not damage, or are all noticed at once"
