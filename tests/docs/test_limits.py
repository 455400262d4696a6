"""The page of limits: behind each promise stands a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_promise_has_a_test_that_exists() -> None:
    promises = 0
    for line in (ROOT / "docs" / "limits.md").read_text("utf-8").splitlines():
        if not line.startswith("| ") or line.startswith(("| ---", "| promised")):
            continue
        promises += 1
        *_, tests, end = line.split("|")
        named = re.findall(r"`([^`]+)`", tests)
        assert not end.strip() and named, line
        for name in named:
            file, _, function = name.partition("::")
            tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert function in functions if function else any(f.startswith("test_") for f in functions), name
    assert promises >= 20
