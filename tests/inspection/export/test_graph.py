"""Which blocks the graph of an export has."""

from __future__ import annotations

from typing import Any

import pytest

import fastmaf
from fastmaf.inspection.export import transforms
from fastmaf.inspection.export.graph_builder import ExportError


@pytest.mark.parametrize("options", [{"activation": "silu"}, {"residual": True}, {"context_features": 2}], ids=str)
def test_networks_other_than_plain_ones_are_refused(options: dict[str, Any]) -> None:
    block = fastmaf.AffineAutoregressive(fastmaf.MADE(4, (6, 6, 6), **options))
    with pytest.raises(ExportError, match="unless its hidden layers are plain ReLUs"):
        transforms._transformed(block, None, None)  # type: ignore[arg-type]
