"""Fixtures of the tests of reproductions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fastmaf.reproduction import Reproduction, reproduce
from tests.capsule.conftest import interrupts, undrawn
from tests.reproduction.tiny import RECIPE, TINY, draw_tiny

__all__ = ["interrupts", "undrawn"]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tiny(tmp_path_factory.mktemp("capsules"), progress=False)


@pytest.fixture(scope="session")
def ten_epochs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reproduction, str]:
    """The folder of a reproduction, its results and its messages; not to be changed."""
    out, messages = tmp_path_factory.mktemp("results"), list[str]()
    config = dataclasses.replace(TINY, epochs=10)
    result = reproduce(out, config, data=data, recipe=RECIPE, progress=False, say=messages.append)
    assert result is not None
    return out, result, "\n".join(messages)
