"""``make docs``: the documentation builds, its notebooks run, and nothing is warned of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("sphinx", "furo", "myst_nb", "sphinx_design"):
        pytest.importorskip(module, reason=f"{module} is missing; pip install 'fastmaf[docs]'")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "fastmaf" in (tmp_path / "index.html").read_text("utf-8")
