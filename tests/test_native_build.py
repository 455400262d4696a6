"""setup.py with values of FASTMAF_BUILD, without a compiler and with a broken source, on a tree of a few small files.

The sources are small, as the real ones take minutes to compile; all else is as in a real build.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["numpy"] = None  # any import of them raises ImportError
sys.argv[0] = "setup.py"
exec(open("setup.py").read())
"""
# kernels.cpp is compiled for each instruction set.
SOURCES = {
    "api.cpp": '#include "api.h"\n#define EXPORT extern "C" __attribute__((visibility("default")))\n'
    "EXPORT int answer() { return scalar::one() + baseline::one(); }\n",
    "kernels.cpp": '#include "api.h"\nint FASTMAF_ISA::one() { return 21; }\n',
    "exports.map": "{ global: answer; local: *; };\n",
    "api.h": "".join(f"namespace {isa} {{ int one(); }}\n" for isa in ("scalar", "baseline", "avx2", "avx512")),
}
needs_compiler = pytest.mark.skipif(
    os.name != "posix" or not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "fastmaf").mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "fastmaf" / "__init__.py").write_text('__version__ = "1.0"\n', encoding="utf-8")
    csrc = tree / "kernels" / "csrc"
    csrc.mkdir(parents=True)
    for folder in ("kernels", "bench"):
        (tree / folder).mkdir(exist_ok=True)
        (tree / folder / "__init__.py").touch()
    for name, text in SOURCES.items():
        (csrc / name).write_text(text, encoding="utf-8")
    return tree


def python(tree: Path, *args: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "CXX" and not name.startswith("FASTMAF_")}
    return subprocess.run(
        [sys.executable, *args], cwd=tree, env={**env, **settings}, capture_output=True, text=True, check=False
    )


def make_wheel(tree: Path, **settings: str) -> tuple[str, set[str], str]:
    """Returns the wheel's name, its files other than Python and metadata, and the output of the build."""
    shutil.rmtree(tree / "dist", ignore_errors=True)
    done = python(tree, "setup.py", "-q", "bdist_wheel", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith(".py")}
    return path.name, names, done.stdout


def test_0_builds_a_pure_package(tree: Path) -> None:
    name, files, output = make_wheel(tree, FASTMAF_BUILD="0")
    assert name == "fastmaf-1.0-py3-none-any.whl"
    assert files == {"fastmaf/kernels/_native.txt"}
    assert output == "fastmaf: native library not built: FASTMAF_BUILD=0 was set\n"


def test_1_without_a_compiler_fails_and_reports_it(tree: Path) -> None:
    done = python(tree, "setup.py", "-q", "bdist_wheel", FASTMAF_BUILD="1", CXX="/nonexistent/c++ -v")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: FASTMAF_BUILD=1, but the native library cannot be built: ")
    assert last.endswith(" there is no compiler CXX=/nonexistent/c++ -v")
    assert not (tree / "dist").exists()


@pytest.mark.parametrize("settings", [{}, {"FASTMAF_BUILD": ""}, {"FASTMAF_BUILD": "auto"}])
def test_auto_without_a_compiler_builds_a_pure_package_and_reports_it(tree: Path, settings: dict[str, str]) -> None:
    name, files, output = make_wheel(tree, CXX="/nonexistent", **settings)
    assert name == "fastmaf-1.0-py3-none-any.whl"
    assert files == {"fastmaf/kernels/_native.txt"}
    assert output == "fastmaf: native library not built: there is no compiler CXX=/nonexistent\n"


@pytest.mark.skipif(os.name != "posix", reason="needs the commands false and true")
@pytest.mark.parametrize(
    ("cxx", "reason"),
    [
        ("false", "false failed: no error message, exit status 1"),
        ("true", "No such file or directory"),  # succeeds, but writes nothing
        ("c++ '", "No closing quotation"),
    ],
)
def test_auto_with_a_compiler_that_does_not_work_builds_a_pure_package(tree: Path, cxx: str, reason: str) -> None:
    name, files, output = make_wheel(tree, CXX=cxx)
    assert name == "fastmaf-1.0-py3-none-any.whl"
    assert files == {"fastmaf/kernels/_native.txt"}
    first = output.splitlines()[0]
    assert first.startswith("fastmaf: native library not built: ") and reason in first


@needs_compiler
def test_the_build_needs_neither_torch_nor_numpy_nor_an_option(tree: Path) -> None:
    """So that pip may build where nothing else is installed."""
    (tree / "setup_alone.py").write_text(WITHOUT_TORCH, encoding="utf-8")
    done = python(tree, "setup_alone.py", "-q", "bdist_wheel")
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "dist").iterdir()
    assert path.name.startswith("fastmaf-1.0-py3-none-") and not path.name.endswith("-any.whl")
    with zipfile.ZipFile(path) as archive:
        assert {"fastmaf/kernels/_native.so", "fastmaf/kernels/_native.txt"} <= set(archive.namelist())
        archive.extract("fastmaf/kernels/_native.so", tree)
    assert ctypes.CDLL(str(tree / "fastmaf" / "kernels" / "_native.so")).answer() == 42


def test_a_tree_without_sources_is_a_pure_package(tree: Path) -> None:
    shutil.rmtree(tree / "kernels" / "csrc")
    name, _, output = make_wheel(tree)
    assert name == "fastmaf-1.0-py3-none-any.whl"
    assert "kernels/csrc" in output.splitlines()[0]


def test_another_value_is_named(tree: Path) -> None:
    done = python(tree, "setup.py", "-q", "build_ext", FASTMAF_BUILD="yes")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: FASTMAF_BUILD is 'yes'; expected 0, 1 or auto"


@needs_compiler
@pytest.mark.slow
def test_a_build_what_it_repeats_and_how_it_ends_when_a_source_breaks(tree: Path) -> None:
    def compiled() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (tree / "build" / "native").rglob("*.o")}

    name, files, output = make_wheel(tree, FASTMAF_BUILD="1")
    assert name.startswith("fastmaf-1.0-py3-none-")
    assert not name.endswith("-any.whl")
    assert files == {"fastmaf/kernels/_native.so", "fastmaf/kernels/_native.txt"}
    assert output.startswith("fastmaf: native library built: ") and "-O3" in output
    first = compiled()
    sets = 4 if platform.machine().lower() in ("x86_64", "amd64") else 2
    assert sorted(first) == sorted(["api.o", *[f"{isa}.o" for isa in ("scalar", "baseline", "avx2", "avx512")[:sets]]])

    # In place, as for an editable install: the same library, nothing compiled.
    done = python(tree, "setup.py", "-q", "build_ext", "--inplace", FASTMAF_BUILD="1")
    assert done.returncode == 0, done.stderr
    assert compiled() == first
    library = tree / "kernels" / "_native.so"
    assert library.is_file()

    (tree / "kernels" / "csrc" / "api.cpp").write_text("int answer() { return nothing; }\n", encoding="utf-8")
    done = python(tree, "setup.py", "-q", "build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    assert "failed: kernels/csrc/api.cpp:1:" in done.stdout.splitlines()[0]
    assert "nothing" in (tree / "kernels" / "_native.txt").read_text(encoding="utf-8")
    assert not library.exists()  # it was made from other sources
    name, files, _ = make_wheel(tree)
    assert name == "fastmaf-1.0-py3-none-any.whl"
    assert files == {"fastmaf/kernels/_native.txt"}
