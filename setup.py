"""Where the packages lie, and the native library; everything else is in pyproject.toml.

The top-level folders `kernels/` and `bench/` are installed as `fastmaf.kernels` and `fastmaf.bench`. The C++ sources
in `kernels/csrc/` become `_native.so` or `_native.dll`: a plain library, without Python or torch, for ctypes. It holds
the kernels once for each instruction set. Without a compiler the package is pure Python: the backend `torch` alone.

    FASTMAF_BUILD   auto (default): build it where a compiler is, else say why not; 1: build or fail; 0: no
    CXX             the compiler, GCC, Clang or zig, with options; the library is for the platform it compiles for
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command import bdist_wheel, build_ext
from setuptools.errors import CompileError, OptionError

CSRC = Path("kernels/csrc")
FLAGS = ["-std=c++17", "-O3", "-pthread", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden"]
# kernels.cpp is compiled with each; the names are those of csrc/api.cpp.
ISAS = {"scalar": "-DFASTMAF_SCALAR", "baseline": ""}
X86 = {"avx2": "-mavx2 -mfma -mbmi2", "avx512": "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma -mbmi2"}


class Native(build_ext.build_ext):
    """Compiles kernels/csrc with its own commands, since one file is compiled several times."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + (".dll" if os.name == "nt" else ".so")

    def run(self) -> None:
        mode = os.environ.get("FASTMAF_BUILD") or "auto"
        if mode not in ("0", "1", "auto"):
            raise OptionError(f"FASTMAF_BUILD is {mode!r}; expected 0, 1 or auto")
        folder = Path("kernels") if self.inplace else Path(self.build_lib, "fastmaf", "kernels")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            result = "not built: FASTMAF_BUILD=0 was set" if mode == "0" else f"built: {build(folder)}"
        except (CompileError, OSError) as error:
            if mode == "1":
                raise CompileError(f"FASTMAF_BUILD=1, but the native library cannot be built: {error}") from error
            result = f"not built: {error}"
        if result.startswith("not"):  # an older library must not pass for this version's
            for path in folder.glob("_native.*"):
                path.unlink()
            self.distribution.ext_modules = self.extensions = []  # a pure-Python package
        (folder / "_native.txt").write_text(f"{result}\n", encoding="utf-8")
        print(f"fastmaf: native library {result}", flush=True)


class Wheel(bdist_wheel.bdist_wheel):
    """Of one platform if it holds the library, which is known after the build, else of none; never of one Python."""

    root_is_pure = property(lambda self: not self.distribution.has_ext_modules(), lambda self, value: None)

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def build(folder: Path) -> str:
    """Writes the library; returns what it was compiled with. Objects that are newer than all sources are kept."""
    try:
        named = shlex.split(os.environ.get("CXX", "").replace(os.sep, "/"))  # a backslash would quote
    except ValueError as error:
        raise CompileError(f"CXX={os.environ['CXX']}: {error}") from error
    cxx = next((c for c in ([named] if named else [["c++"], ["g++"], ["clang++"]]) if shutil.which(c[0])), None)
    if cxx is None:
        raise CompileError(f"there is no compiler {f'CXX={shlex.join(named)}' if named else 'c++, g++ or clang++'}")
    version = (call([*cxx, "--version"]).splitlines() or ["unknown version"])[0]
    macros = call([*cxx, "-dM", "-E", "-x", "c++", os.devnull])  # they tell the system that it compiles for
    x86, windows, linux = (f"#define {name} 1" in macros for name in ("__x86_64__", "_WIN32", "__linux__"))
    command = [*cxx, *FLAGS, *([] if windows else ["-fPIC"])]
    work = Path("build/native", re.sub(r"[^\w.]+", "-", f"{' '.join(cxx)} {version}")[-120:].strip("-"))
    work.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in [Path(__file__), *CSRC.iterdir()])

    def compiled(stem: str, source: Path, options: str = "") -> str:
        target = work / f"{stem}.o"
        if not target.exists() or target.stat().st_mtime < newest:
            part = f"{target}.{os.getpid()}"  # its own, beside another build of the same tree
            call([*command, *options.split(), "-c", str(source), "-o", part])
            os.replace(part, target)
        return str(target)

    isas = (ISAS | X86 if x86 else ISAS).items()
    jobs = [(isa, CSRC / "kernels.cpp", f"-DFASTMAF_ISA={isa} {options}") for isa, options in isas]
    jobs += [(path.stem, path, "") for path in sorted(CSRC.glob("*.cpp")) if path.stem != "kernels"]
    with ThreadPoolExecutor(4) as pool:
        objects = list(pool.map(lambda job: compiled(*job), jobs))
    options = [f"-Wl,--version-script={CSRC / 'exports.map'}"] if linux else []
    options += ["-static"] if windows and "zig" not in f"{cxx} {version}" else []  # which would make an archive
    target = folder / ("_native.dll" if windows else "_native.so")
    call([*cxx, "-shared", "-pthread", *objects, *options, "-o", new := f"{target}.{os.getpid()}"])
    os.replace(new, target)  # a process that has loaded the old one goes on with it
    return f"{version}, {' '.join(FLAGS)}"


def call(command: list[str]) -> str:
    if (done := subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)).returncode:
        lines = (done.stderr.strip() or f"no error message, exit status {done.returncode}").splitlines()
        first = next((line for line in lines if "rror:" in line), lines[-1])  # what doctor repeats
        shown = [*(done.stdout.splitlines() if command[-1] == "--version" else []), *lines][-12:]
        raise CompileError("\n".join([f"{command[0]} failed: {first}", f"+ {shlex.join(command)}", *shown]))
    return done.stdout


setup(
    packages=[
        *find_packages(include=["fastmaf", "fastmaf.*"]),
        *("fastmaf.kernels", *(f"fastmaf.kernels.{name}" for name in find_packages("kernels"))),
        *("fastmaf.bench", *(f"fastmaf.bench.{name}" for name in find_packages("bench", exclude=["dev*"]))),
    ],
    package_dir={"fastmaf.kernels": "kernels", "fastmaf.bench": "bench"},
    ext_modules=[Extension("fastmaf.kernels._native", sorted(map(str, CSRC.glob("*.cpp"))))],
    cmdclass={"build_ext": Native, "bdist_wheel": Wheel},
)
