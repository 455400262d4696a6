"""The Python examples of README and the documentation, as a reader would paste them one after the other."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import compiler

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if "```python" in page.read_text("utf-8")
)
SLOW = ("docs/guides/tools.md",)  # it compiles
NUMBER = re.compile(r"-?\d+(\.\d+)?")
OPTIONAL = ("accelerate", "lightning")  # no test dependencies, as they bring many packages
# A block of Python, and the output that is shown for it.
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n\n(?:<!--[^\n]*-->\n)?```text\n(.*?)```)?", re.DOTALL)


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] if p in SLOW else []) for p in PAGES])
def test_the_examples_of_a_page_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their numbers depend on the machine, the text around them does not."""
    monkeypatch.chdir(tmp_path)  # for the files that they write
    names: dict[str, object] = {}
    for i, (block, shown) in enumerate(EXAMPLE.findall((ROOT / page).read_text("utf-8"))):
        code = compile(block, f"{page}, example {i + 1}", "exec")
        if "Detector(" in block:  # the reader's own images; the tests of Detector fit some
            continue
        if "torch.compile(" in block and not compiler.FOUND:
            continue
        if any(f"import {name}\n" in block and find_spec(name) is None for name in OPTIONAL):
            continue
        exec(code, names)
        printed = capsys.readouterr().out
        if shown:
            assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
