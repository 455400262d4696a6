"""Fixtures of the tests of files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.io.model_files import write_all


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("files")
    return folder, write_all(folder)


@pytest.fixture
def written(whole: tuple[Path, dict[str, bytes]]) -> dict[str, bytes]:
    return whole[1]


@pytest.fixture
def folder(whole: tuple[Path, dict[str, bytes]], tmp_path: Path) -> Path:
    """Returns a folder with a file of each kind."""
    return Path(shutil.copytree(whole[0], tmp_path / "files"))
