"""Why the native library cannot be used here, and the command that brings it; no library is needed for these tests."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastmaf.kernels import native_args, native_library
from tests.kernels.cases import needs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the folder of the package, in which nothing lies yet."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    monkeypatch.setattr(native_library, "_FOLDER", folder)
    return folder


def built(folder: Path) -> Path:
    """Puts what a build leaves there; the library itself is no library."""
    (folder / "_native.txt").write_text("built: g++ 12, -O3\n", encoding="utf-8")
    (folder / native_library._NAME).write_bytes(b"not a library")
    return folder / native_library._NAME


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, version: int = native_library.VERSION) -> list[str]:
    """Puts a library of two instruction sets there; returns the paths that are loaded, each time."""
    loaded, used = [], ["one"]

    def function(call: Any = lambda *_: 0) -> Any:
        return lambda *args: call(*args)  # one that takes attributes

    def use(name: bytes) -> bool:
        used.append(name.decode())
        return name in (b"one", b"two")

    def load(path: str) -> Any:
        loaded.append(path)
        names = ("flow_forward", "flow_inverse", "flow_backward", "linear", "affine", "layer_backward")
        functions = {f"fastmaf_{name}": function() for name in names}
        return SimpleNamespace(
            **functions,
            fastmaf_version=function(lambda: version),
            fastmaf_isa=function(lambda i, _: [b"one", b"two", None][i]),
            fastmaf_use_isa=function(use),
            fastmaf_used_isa=function(lambda: used[-1].encode()),
            fastmaf_uses_matrix_unit=function(lambda: used[-1] == "two"),
        )

    built(folder)
    monkeypatch.setattr(ctypes, "CDLL", load)
    return loaded


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


def test_of_other_structs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(folder, monkeypatch, version=native_library.VERSION + 1)
    version = native_library.VERSION
    found = f"the native library has version {version + 1} of its structs; this version of fastmaf needs {version}; "
    assert refusal().startswith(found)


def test_it_cannot_be_loaded(folder: Path) -> None:
    library = built(folder)
    assert refusal().startswith(f"{library} cannot be loaded: ")
    assert refusal().count(str(library)) > 1  # the loader's own words follow, which name it again


def test_it_is_older_than_its_sources(folder: Path) -> None:
    library = built(folder)
    (folder / "csrc").mkdir()
    (folder / "csrc" / "api.cpp").touch()
    os.utime(library, (0, 0))
    assert refusal().startswith("the native library is older than its sources; to build it: ")


def test_it_is_loaded_once_with_the_best_instruction_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTMAF_ISA", raising=False)
    loaded = stand_in(folder, monkeypatch)
    assert native_library.build_info() == "one (of one, two), g++ 12, -O3"
    native_library.load()
    assert native_library.library() is native_library.library()
    assert loaded == [str(folder / native_library._NAME)]


def test_the_environment_names_the_instruction_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(folder, monkeypatch)
    monkeypatch.setenv("FASTMAF_ISA", "avx9")
    with pytest.warns(RuntimeWarning, match="'avx9'; expected one of one, two on this CPU; the native kernels are not"):
        assert refusal() == "FASTMAF_ISA is 'avx9'; expected one of one, two on this CPU"
    monkeypatch.setenv("FASTMAF_ISA", "two")
    assert native_library.build_info().startswith("two with AMX for bfloat16 weights (of one, two), ")
    native_library.use_isa("one")
    assert native_library.build_info().startswith("one ")
    with pytest.raises(ValueError, match=r"must be one of \['one', 'two'\] on this CPU; found 'three'"):
        native_library.use_isa("three")


@needs("native")
def test_the_library_of_this_installation() -> None:
    """It says what this CPU runs, and refuses structs that it does not know."""
    names = native_library.isas()
    assert names[-2:] == ["baseline", "scalar"] and len(set(names)) == len(names)
    code = "from fastmaf.kernels import native_library as n; print(n.build_info().split()[0])"
    env = {**os.environ, "FASTMAF_ISA": "scalar"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "scalar"
    flow = native_args.FlowStruct(ctypes.sizeof(native_args.FlowStruct), native_library.VERSION)
    for field in ("size", "version"):
        other = native_args.FlowStruct.from_buffer_copy(flow)
        setattr(other, field, getattr(flow, field) + 1)
        for function in ("forward", "inverse"):
            call = getattr(native_library.library(), f"fastmaf_flow_{function}")
            zeros = [None] * (5 if function == "forward" else 3)
            with pytest.raises(RuntimeError, match="other structs"):
                native_library.check(call(ctypes.addressof(other), None, zeros[0], 0, *zeros[1:], 1))


def test_the_command_fits_the_installation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install = "FASTMAF_BUILD=1 pip install"
    assert native_library.command() == f"in a checkout of fastmaf: {install} ."
    (folder / "csrc").mkdir()
    assert native_library.command() == f"in {folder.parent}: {install} -e ."
    monkeypatch.setattr(sys, "prefix", str(folder.parent / ".venv"))
    assert native_library.command() == "make native"
