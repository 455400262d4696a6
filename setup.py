"""Where the packages lie, and the native library; everything else is in pyproject.toml.

The top-level folders `kernels/` and `bench/` are installed as `fastmaf.kernels` and `fastmaf.bench`. The C++ sources
in `kernels/csrc/` become `_native.so` beside the kernels: a plain library, without Python or torch, that is loaded by
ctypes. The kernels are compiled once for each instruction set; the best is chosen where the library is loaded. Without
a compiler the package is pure Python and works on the backend `torch`.

    FASTMAF_BUILD   auto (default): build it where a compiler is, else say why not; 1: build or fail; 0: no
    CXX             the compiler, GCC or Clang
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

CSRC = Path("kernels/csrc")
WORK = Path("build/native")  # objects named by the hash of all that went into them: what has not changed is not redone
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden"]
# kernels.cpp is compiled with each; the names are those of csrc/api.cpp.
INSTRUCTION_SETS = {"scalar": ["-DFASTMAF_SCALAR"], "baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma", "-mbmi2"],
        "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mbmi2"],
    }


class CannotBuild(Exception):
    """Why there is no native library; FASTMAF_BUILD=1 makes it an error."""


class Native(build_ext):
    """Compiles kernels/csrc with its own commands, since one file is compiled several times."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        mode = os.environ.get("FASTMAF_BUILD") or "auto"
        if mode not in ("0", "1", "auto"):
            raise OptionError(f"FASTMAF_BUILD is {mode!r}; expected 0, 1 or auto")
        folder = Path("kernels") if self.inplace else Path(self.build_lib, "fastmaf", "kernels")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if mode == "0":
                raise CannotBuild("FASTMAF_BUILD=0 was set")
            result = f"built: {build(folder / '_native.so')}"
        except (CannotBuild, OSError) as error:
            if mode == "1":
                raise CompileError(f"FASTMAF_BUILD=1, but the native library cannot be built: {error}") from error
            # An older library must not pass for this version's, and what has no library is a pure-Python package.
            (folder / "_native.so").unlink(missing_ok=True)
            self.distribution.ext_modules = self.extensions = []
            result = f"not built: {error}"
        (folder / "_native.txt").write_text(f"{result}\n", encoding="utf-8")
        print(f"fastmaf: native library {result}", flush=True)
        if mode == "auto" and result.startswith("not"):
            print("fastmaf: all works without it, more slowly; with a C++ compiler, `pip install .` brings it")


class Wheel(bdist_wheel):
    """A wheel is of one platform if it holds the library, and of none in particular else; never of one Python."""

    # Known only after the build: what is set before it does not count.
    root_is_pure = property(lambda self: not self.distribution.has_ext_modules(), lambda self, value: None)

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def build(target: Path) -> str:
    """Writes the library, compiled now or before; returns what it was compiled with."""
    if os.name != "posix":
        raise CannotBuild(f"it is built with GCC or Clang on Linux and macOS; this is {sys.platform}")
    cxx = compiler()
    version = call([*cxx, "--version"]).splitlines()[0]
    contents = [version, *(path.read_bytes() for path in sorted(CSRC.iterdir()))]
    kernels = [(CSRC / "kernels.cpp", [f"-DFASTMAF_ISA={isa}", *flags]) for isa, flags in INSTRUCTION_SETS.items()]
    others = [(path, []) for path in sorted(CSRC.glob("*.cpp")) if path.name != "kernels.cpp"]
    WORK.mkdir(parents=True, exist_ok=True)

    def compile_one(job: tuple[Path, list[str]]) -> Path:
        command = [*cxx, *FLAGS, *job[1], "-c", str(job[0])]
        digest = hashlib.sha256(repr([command, contents]).encode()).hexdigest()
        result = WORK / f"{job[0].stem}-{digest[:16]}.o"
        if not result.exists():
            call([*command, "-o", f"{result}.part"])
            os.replace(f"{result}.part", result)
        return result

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, [*kernels, *others]))
    for path in set(WORK.iterdir()) - set(objects):
        path.unlink()
    # Beside the old one: a process that has loaded that goes on with it.
    call([*cxx, "-shared", "-pthread", *map(str, objects), "-o", f"{target}.new"])
    os.replace(f"{target}.new", target)
    return f"{version}, {' '.join(FLAGS)}"


def compiler() -> list[str]:
    named = os.environ.get("CXX", "").strip()
    for command in [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise CannotBuild(
        f"the compiler CXX={named} is not there" if named else "no c++, g++ or clang++ is here; CXX names one"
    )


def call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it printed nothing"]
        first = next((line for line in lines if "rror:" in line), lines[-1])  # what doctor repeats
        raise CannotBuild("\n".join([f"{command[0]} failed: {first}", f"+ {shlex.join(command)}", *lines[-12:]]))
    return done.stdout


setup(
    packages=[
        *find_packages(include=["fastmaf", "fastmaf.*"]),
        "fastmaf.kernels",
        *(f"fastmaf.kernels.{name}" for name in find_packages("kernels")),
        "fastmaf.bench",
        *(f"fastmaf.bench.{name}" for name in find_packages("bench", exclude=["dev*"])),
    ],
    package_dir={"fastmaf.kernels": "kernels", "fastmaf.bench": "bench"},
    ext_modules=[Extension("fastmaf.kernels._native", sorted(map(str, CSRC.glob("*.cpp"))))],
    cmdclass={"build_ext": Native, "bdist_wheel": Wheel},
)
