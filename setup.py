"""Where the packages lie, and the native library; everything else is in pyproject.toml.

The top-level folders `kernels/` and `bench/` are installed as `fastmaf.kernels` and `fastmaf.bench`. The C++ sources
in `kernels/csrc/` become `_native.so` beside the kernels: a plain library without Python symbols that torch loads.
Building needs torch; it is imported where that happens, so that a build without it gives the pure-Python package, which
works on the backend `torch`.

    FASTMAF_BUILD   auto (default): build it where torch and a compiler are, else say why not; 1: build or fail; 0: no
    FASTMAF_MARCH   native (default), another value of -march such as x86-64-v3, or baseline: for a portable build
    CXX             the compiler, GCC or Clang
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

CSRC = Path("kernels/csrc")
WORK = Path("build/native")  # objects named by the hash of all that went into them: what has not changed is not redone
FLAGS = ["-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden"]
COMMAND = 'pip install "setuptools>=77" && FASTMAF_BUILD=1 pip install --no-build-isolation .'
INSTRUCTION_SETS = {"__AVX512F__": "AVX-512", "__AVX2__": "AVX2", "__ARM_FEATURE_SVE": "SVE", "__ARM_NEON": "NEON"}
OPENMP_PROBE = """#include <omp.h>
extern "C" int probe() {
  int threads = 0;
#pragma omp parallel num_threads(3)
#pragma omp atomic
  ++threads;
  return 10 * omp_get_max_threads() + threads;
}
"""


class CannotBuild(Exception):
    """Why there is no native library; FASTMAF_BUILD=1 makes it an error."""


class Native(build_ext):
    """Compiles kernels/csrc with its own commands, since its files need different flags."""

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
            result = f"built for torch {build(folder / '_native.so')}"
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
            print(f"fastmaf: all works without it, more slowly; beside torch and a compiler, this brings it: {COMMAND}")


class Wheel(bdist_wheel):
    """A wheel is of one platform if it holds the library, and of none in particular else; never of one Python."""

    # Known only after the build: what is set before it does not count.
    root_is_pure = property(lambda self: not self.distribution.has_ext_modules(), lambda self, value: None)

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def build(target: Path) -> str:
    """Writes the library, compiled now or before; returns the torch version that it needs and what it consists of."""
    if os.name != "posix":
        raise CannotBuild(f"it is built with GCC or Clang on Linux and macOS; this is {sys.platform}")
    sources = sorted(CSRC.glob("*.cpp"), key=lambda path: (not is_op(path), path))  # the slowest first
    if not sources:
        raise CannotBuild(f"there are no sources in {CSRC}")
    cxx = compiler()
    arch, instructions = architecture(cxx)
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise CannotBuild(f"torch is not where pip builds, unless it is told --no-build-isolation ({error})") from error

    # OpenMP's functions stay undefined: torch has loaded a runtime of its own, and a library linked to another one
    # would run a second pool of threads beside torch's.
    link = ["-Wl,-undefined,dynamic_lookup" if sys.platform == "darwin" else "-Wl,--no-as-needed"]
    link += [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch"]
    WORK.mkdir(parents=True, exist_ok=True)
    probe = openmp_probe(cxx, link, torch.__version__)
    version = call([*cxx, "--version"]).splitlines()[0]
    openmp = "OpenMP of torch" if probe else "no OpenMP (one thread)"
    info = f"{version}, {' '.join(arch) or 'no -march'} ({instructions}), {openmp}, torch {torch.__version__}"

    common = [*FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    common += ["-fopenmp"] if probe else []
    standard = re.search(r"C\+\+ Version: 20(\d\d)", torch.__config__.show())
    # layer_ops.cpp reads the CPU's features before anything else runs: files of its kind must run on every CPU.
    ops = [*common, f"-std=c++{standard[1] if standard else 17}", *(f"-I{path}" for path in include_paths())]
    ops += [f"-DFASTMAF_BUILD_INFO={json.dumps(info)}"]  # as a C string literal
    kernels = [*common, "-std=c++17", *arch]
    headers = [path.read_bytes() for path in sorted(CSRC.glob("*.h"))]

    def compile_one(source: Path) -> Path:
        command = [*cxx, *(ops if is_op(source) else kernels), "-c", str(source)]
        parts = [command, macros(cxx, arch), source.read_bytes(), headers]
        return cached(source.stem, ".o", parts, lambda path: call([*command, "-o", path]))

    def link_and_load(path: str) -> None:
        call([*cxx, "-shared", *map(str, objects), *link, "-o", path])
        in_torch(f"torch.ops.load_library({path!r})")  # now, rather than at the first use, do missing symbols show

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, sources))
    library = cached("native", ".so", [objects, link], link_and_load)
    for path in set(WORK.iterdir()) - {*objects, library, probe}:
        path.unlink()
    # Beside the old one: a process that has loaded that goes on with it.
    shutil.copyfile(library, f"{target}.new")
    os.replace(f"{target}.new", target)
    return f"{torch.__version__}\n{info}"


def is_op(source: Path) -> bool:
    """Returns whether a source includes torch's headers."""
    return source.name.endswith("ops.cpp")


def compiler() -> list[str]:
    named = os.environ.get("CXX", "").strip()
    for command in [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise CannotBuild(
        f"the compiler CXX={named} is not there" if named else "no c++, g++ or clang++ is here; CXX names one"
    )


def architecture(cxx: list[str]) -> tuple[list[str], str]:
    """Returns the flags that choose the instruction set, and its name."""
    march = os.environ.get("FASTMAF_MARCH", "native")
    flags: list[list[str]] = [[]] if march in ("", "baseline") else [[f"-march={march}"]]
    if march == "native":
        flags += [["-mcpu=native"], []]  # Clang for ARM has known -march=native only lately
    for arch in flags:
        try:
            defined = macros(cxx, arch)
        except CannotBuild:
            continue
        if march == "native" and not arch:
            print(f"fastmaf: {cxx[0]} knows neither -march=native nor -mcpu=native, so this is a baseline build")
        return arch, next((name for macro, name in INSTRUCTION_SETS.items() if f" {macro} " in defined), "baseline")
    raise CannotBuild(f"{shlex.join(cxx)} does not work or does not take {' '.join(flags[0])} (FASTMAF_MARCH)")


def macros(cxx: list[str], arch: list[str]) -> str:
    """Returns what the compiler predefines, which tells its version and the instruction set that the flags mean."""
    return call([*cxx, *arch, "-dM", "-E", "-x", "c++", os.devnull])


def openmp_probe(cxx: list[str], link: list[str], torch_version: str) -> Path | None:
    """Returns a library that runs on the threads of torch, or None: no OpenMP here, or it fits another runtime."""

    def attempt(path: str) -> None:
        source, compiled = Path(f"{path}.cpp"), f"{path}.o"
        source.write_text(OPENMP_PROBE, encoding="ascii")
        call([*cxx, "-fPIC", "-fopenmp", "-c", str(source), "-o", compiled])
        call([*cxx, "-shared", compiled, *link, "-o", path])
        in_torch(f"torch.set_num_threads(3); import ctypes; assert ctypes.CDLL({path!r}).probe() == 33")

    try:
        return cached("openmp", ".so", [cxx, link, macros(cxx, []), torch_version], attempt)
    except CannotBuild as error:
        print(f"fastmaf: no OpenMP, so the native kernels will run on one thread: {error}")
        return None


def cached(stem: str, suffix: str, parts: list[object], make: Callable[[str], object]) -> Path:
    """Returns a file of the work folder that `make` has written, now or from the same parts before."""
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    path = WORK / f"{stem}-{digest[:16]}{suffix}"
    if not path.exists():
        make(f"{path}.part")
        os.replace(f"{path}.part", path)
    return path


def call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it printed nothing"]
        first = next((line for line in lines if "rror:" in line), lines[-1])  # what doctor repeats
        raise CannotBuild("\n".join([f"{command[0]} failed: {first}", f"+ {shlex.join(command)}", *lines[-12:]]))
    return done.stdout


def in_torch(code: str) -> None:
    """Runs code beside torch in a process of its own, which may crash."""
    call([sys.executable, "-c", f"import torch; {code}"])


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
