"""Why the native library cannot be used here, and the command that brings it; no library is needed for these tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastmaf.kernels import native_library


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the folder of the package, in which nothing lies yet."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    monkeypatch.setattr(native_library, "_FOLDER", folder)
    return folder


def built(folder: Path, torch_version: str = torch.__version__) -> Path:
    """Puts what a build leaves there; the library itself is no library."""
    (folder / "_native.txt").write_text(f"built for torch {torch_version}\ng++ 12\n", encoding="utf-8")
    (folder / "_native.so").write_bytes(b"not a library")
    return folder / "_native.so"


def refusal() -> str:
    with pytest.raises(ImportError) as caught:
        native_library.load()
    with pytest.raises(ImportError):
        native_library.build_info()
    return str(caught.value)


def test_not_built(folder: Path) -> None:
    assert refusal() == f"the native library was not built; to build it: {native_library.command()}"


def test_not_built_and_the_build_said_why(folder: Path) -> None:
    (folder / "_native.txt").write_text("not built: c++ failed: a.cpp:1: error: b\n+ c++ -c a.cpp\n", encoding="utf-8")
    assert refusal().startswith("the native library was not built (c++ failed: a.cpp:1: error: b); to build it: ")


def test_built_for_another_torch_is_not_even_loaded(folder: Path) -> None:
    built(folder, "2.7.1+cu126")
    assert refusal().startswith(
        f"the native library was built for torch 2.7.1+cu126; this is torch {torch.__version__};"
    )


def test_without_a_note_it_is_not_loaded(folder: Path) -> None:
    built(folder)
    (folder / "_native.txt").unlink()
    assert "built for torch of an unknown version" in refusal()


def test_it_cannot_be_loaded(folder: Path) -> None:
    library = built(folder)
    assert refusal().startswith(f"{library} cannot be loaded: ")
    assert refusal().count(str(library)) > 1  # the loader's own words follow, which name it again


def test_it_is_older_than_its_sources(folder: Path) -> None:
    library = built(folder)
    (folder / "csrc").mkdir()
    (folder / "csrc" / "ops.cpp").touch()
    os.utime(library, (0, 0))
    assert refusal().startswith("the native library is older than its sources; to build it: ")


@pytest.mark.parametrize("lacking", ["", "avx512f"])
def test_the_cpu_is_asked_and_the_library_loaded_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    library = built(folder)
    loaded: list[Path] = []
    ops = SimpleNamespace(missing_cpu_features=lambda: lacking, build_info=lambda: "g++ 12")
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(torch.ops, "fastmaf_native", ops, raising=False)
    if lacking:
        assert refusal().startswith("the native library was built for CPUs with avx512f, which this one lacks; ")
    else:
        assert native_library.build_info() == "g++ 12"
        native_library.load()
        assert loaded == [library]


def test_the_command_fits_the_installation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install = 'pip install "setuptools>=77" && FASTMAF_BUILD=1 pip install --no-build-isolation'
    assert native_library.command() == f"in a checkout of fastmaf: {install} ."
    (folder / "csrc").mkdir()
    assert native_library.command() == f"in {folder.parent}: {install} -e ."
    monkeypatch.setattr(sys, "prefix", str(folder.parent / ".venv"))
    assert native_library.command() == "make native"
