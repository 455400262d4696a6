"""How the tests run the command and what they expect of an error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Fastmaf = Callable[..., Done]


def fastmaf_process(*arguments: object, **environment: str) -> Done:
    """Runs the command in a process of its own."""
    command = [sys.executable, "-m", "fastmaf", *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    return Done(done.returncode, done.stdout, done.stderr)


def assert_one_error(done: Done, *words: str) -> None:
    """One line "error: ..." and what belongs to it, no traceback, a code that is not 0."""
    assert done.code != 0
    assert "Traceback" not in done.out + done.err
    assert len(re.findall(r"^error: \S", done.err, re.MULTILINE | re.IGNORECASE)) == 1, done.err
    for word in words:
        assert word in done.err, f"{word!r} is not in {done.err!r}"
