"""The Python examples of the documentation, page by page, as a reader would paste them one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(
    page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md") if "```python" in page.read_text("utf-8")
)


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for the files that they write
    names: dict[str, object] = {}
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)):
        code = compile(block, f"{page}, example {i + 1}", "exec")
        if "fit(images)" not in block:  # the reader's own images; the tests of Detector fit some
            exec(code, names)
