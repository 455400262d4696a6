"""What is installed: a wheel, built from a copy of the tree as pip builds it, without network and without torch."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

import fastmaf

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BUILD = """
import sys
sys.modules["torch"] = None  # any import of torch raises ImportError
from setuptools import build_meta
build_meta.build_wheel(sys.argv[1])
"""


def python(*args: str, cwd: Path, build: str = "0") -> subprocess.CompletedProcess[str]:
    """Runs Python; a build leaves the native library out, which takes minutes, unless ``build`` says otherwise."""
    env = {**os.environ, "FASTMAF_BUILD": build}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources that a build reads, beside the folders that it must leave out."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree / name)  # with its age: objects that are newer are kept
    for name in ("fastmaf", "kernels", "bench", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "_native.*"))
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    done = python("-c", BUILD, str(out), cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    done = python("-c", code, str(out), cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel laid out as in site-packages."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@pytest.fixture(scope="module")
def metadata(installed: Path) -> Message:
    (path,) = installed.glob("*.dist-info/METADATA")
    return message_from_string(path.read_text(encoding="utf-8"))


def test_the_wheel_holds_every_module_once_and_nothing_else(installed: Path) -> None:
    expected = {path.relative_to(ROOT) for path in (ROOT / "fastmaf").rglob("*.py")}
    for folder in ("kernels", "bench"):
        expected |= {"fastmaf" / path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")}
    expected -= {"fastmaf" / path.relative_to(ROOT) for path in (ROOT / "bench" / "dev").iterdir()}
    assert {path.relative_to(installed) for path in installed.rglob("*.py")} == expected
    other = {path.relative_to(installed).as_posix() for path in (installed / "fastmaf").rglob("*.*")}
    # Why there is no native library, for `fastmaf doctor`.
    report = ("base.html.j2", "macros.html.j2", "report.css", "report.html.j2")
    page = {f"fastmaf/inspection/report/{name}" for name in report} | {"fastmaf/reproduction/reproduction.html.j2"}
    page |= {"fastmaf/inspection/serve/page.html"}
    found = {name for name in other if not name.endswith(".py")}
    assert found == {"fastmaf/py.typed", "fastmaf/kernels/_native.txt", *page}
    assert sorted(path.name for path in installed.iterdir() if path.suffix != ".dist-info") == ["fastmaf"]


def test_metadata(installed: Path, metadata: Message) -> None:
    assert metadata["Name"] == "fastmaf"
    assert metadata["Version"] == fastmaf.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Summary"]
    extras = {"cli", "inspection", "features", "serve", "export", "triton", "bench", "docs", "test", "dev", "wheels"}
    extras |= {"fuzz"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    needed = [one for one in metadata.get_all("Requires-Dist", []) if "extra ==" not in one]
    assert needed == ["torch>=2.7", "numpy", "safetensors"]
    tritons = [one for one in metadata.get_all("Requires-Dist", []) if 'extra == "triton"' in one]
    on = {re.split(r"[^a-z-]", one)[0]: re.findall(r'platform_system == "(\w+)"', one) for one in tritons}
    assert on == {"triton": ["Linux"], "triton-windows": ["Windows"]}
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "fastmaf = fastmaf.cli:main" in entry_points.read_text(encoding="utf-8")
    assert list(installed.glob("*.dist-info/licenses/LICENSE"))


def test_the_installed_package_imports_and_answers(installed: Path) -> None:
    names = "fastmaf.__file__, fastmaf.kernels.__file__, fastmaf.__version__"
    code = f"import fastmaf, fastmaf.kernels; print({names}, sep='\\n')"
    done = python("-c", code, cwd=installed)
    assert done.returncode == 0, done.stderr
    package, kernels, version = done.stdout.splitlines()
    assert Path(package) == installed / "fastmaf" / "__init__.py"
    assert Path(kernels) == installed / "fastmaf" / "kernels" / "__init__.py"
    assert version == fastmaf.__version__
    done = python(
        "-c", "import sys; sys.argv = ['fastmaf', '--help']; from fastmaf.cli import main; main()", cwd=installed
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    os.name != "posix" or not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)
def test_a_wheel_that_is_built_alone_brings_the_kernels(tree: Path, tmp_path: Path) -> None:
    if (ROOT / "build" / "native").is_dir():  # what is compiled already
        shutil.copytree(ROOT / "build" / "native", tree / "build" / "native")
    done = python("-c", BUILD, str(tmp_path), cwd=tree, build="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.whl")
    assert path.name.startswith(f"fastmaf-{fastmaf.__version__}-py3-none-") and not path.name.endswith("-any.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "site")
    code = "from fastmaf.kernels import native_library; print(native_library.__file__, native_library.build_info())"
    done = python("-c", code, cwd=tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site")) and "scalar" in done.stdout


def test_the_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels" / "csrc").glob("*")}
    assert {"setup.py", "pyproject.toml", *sources} <= names


def test_the_package_index_accepts_the_metadata(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    """The README is rendered, too."""
    pytest.importorskip("twine", reason="needs pip install 'fastmaf[dev]'")
    done = python("-m", "twine", "--no-color", "check", "--strict", str(wheel), str(sdist), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2, done.stdout


def test_the_version_is_the_same_everywhere(sdist: Path, wheel: Path) -> None:
    version = fastmaf.__version__
    assert sdist.name == f"fastmaf-{version}.tar.gz" and wheel.name.startswith(f"fastmaf-{version}-")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    code = (ROOT / "docs" / "conf.py").read_text("utf-8")
    assert "release = version = fastmaf.__version__\n" in code and version not in code


def test_every_declared_package_has_a_pin() -> None:
    """One for every supported Python: a single one, or a pair that a version of Python divides. Sorted by name."""
    text = (ROOT / "constraints.txt").read_text("utf-8")
    pins = re.findall(r"^([a-z0-9-]+)==[^;\s]+(?:; (.*))?$", text, re.MULTILINE)
    assert len(pins) == len([line for line in text.splitlines() if not line.startswith("#")])
    names = [name for name, _ in pins]
    assert names == sorted(names)
    markers: dict[str, list[str]] = {}
    for name, marker in pins:
        markers.setdefault(name, []).append(marker)
    for several in (found for found in markers.values() if len(found) > 1):
        newer, older = several
        assert ">=" in newer and older == newer.replace(">=", "<"), several
    project = PROJECT["project"]
    for requirement in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
        name, _, marker = requirement.partition(";")
        name = re.split(r"[^A-Za-z0-9-]", name)[0].lower()
        if name != "fastmaf":
            found = markers.get(name, [])
            every = len(found) == 2 or found == [""] or found and "python_version" in marker
            assert every, f"constraints.txt: no pin of {name} for every Python; found {found}"


def test_kernels_under_another_name_is_refused(tree: Path) -> None:
    done = python("-c", "import kernels", cwd=tree)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "fastmaf.kernels" in last
