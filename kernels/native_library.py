"""The C++ library of the `native` backend: ``_native.so`` beside this file, compiled by setup.py from ``csrc/``.

setup.py writes a note beside it, ``_native.txt``: the torch version and the compiler that the library was built with,
or why there is none. A library of another torch version can crash when loaded, so the note is read first.

Its threads are torch's own. A process that is forked after they have run hangs at its first op of several threads, as
with torch's ops: start processes with the methods "spawn" or "forkserver", or use one thread.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch
from torch import Tensor

_FOLDER = Path(__file__).resolve().parent


def load() -> None:
    """Loads the library, once.

    Raises:
        ImportError: it is not there, or it cannot run here; the message says why, and the command that brings it.
    """
    _load(_FOLDER)


def build_info() -> str:
    """Returns the compiler, the instruction set, OpenMP and the torch version that the library was built with.

    Raises:
        ImportError: as for ``load``.
    """
    load()
    return str(torch.ops.fastmaf_native.build_info())


def why_not(like: Tensor) -> str | None:
    """Returns why the kernels cannot serve tensors of the dtype of this one, or None when they can."""
    if like.dtype in (torch.float32, torch.float64):
        return None
    return f"the native kernels take float32 and float64 tensors; found {like.dtype}"


def empty_on_huge_pages(numel: int, *, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """Returns an uninitialised tensor ``[numel]``; a large one on the CPU on huge pages, where the library is there.

    Streaming it then causes fewer page walks (5-15% less time on one machine).
    """
    like = torch.empty(0, device=device, dtype=dtype)
    # A fake tensor, as under torch.compile, has no memory.
    if type(like) is Tensor and like.device.type == "cpu":
        try:
            load()
        except ImportError:
            pass
        else:
            return torch.ops.fastmaf_native.empty_on_huge_pages(numel, like.dtype)
    return torch.empty(numel, device=device, dtype=dtype)


def command() -> str:
    """Returns the one command that builds the library for this installation."""
    root = _FOLDER.parent
    if not (_FOLDER / "csrc").is_dir():
        return f"in a checkout of fastmaf: {_pip('.')}"
    return "make native" if Path(sys.prefix) == root / ".venv" else f"in {root}: {_pip('-e .')}"


def _pip(target: str) -> str:
    return f'pip install "setuptools>=77" && FASTMAF_BUILD=1 pip install --no-build-isolation {target}'


@functools.cache
def _load(folder: Path) -> None:
    why = _why_not(folder)
    if why is None:
        library = folder / "_native.so"
        try:
            torch.ops.load_library(library)
        except OSError as error:
            why = f"{library} cannot be loaded: {error.__cause__ or error}"
        else:
            lacking = torch.ops.fastmaf_native.missing_cpu_features()
            why = lacking and f"the native library was built for CPUs with {lacking}, which this one lacks"
    if why:
        raise ImportError(f"{why}; to build it: {command()}")


def _why_not(folder: Path) -> str | None:
    """Returns why the library must not be loaded, as far as files tell."""
    library, note = folder / "_native.so", folder / "_native.txt"
    text = note.read_text(encoding="utf-8").rstrip() if note.is_file() else ""
    if not library.is_file():
        reason = text.partition("\n")[0].removeprefix("not built: ")
        return f"the native library was not built{f' ({reason})' if reason else ''}"
    built_for = text.partition("\n")[0].removeprefix("built for torch ") or "of an unknown version"
    if built_for != torch.__version__:
        return f"the native library was built for torch {built_for}; this is torch {torch.__version__}"
    if any(source.stat().st_mtime > library.stat().st_mtime for source in folder.glob("csrc/*")):
        return "the native library is older than its sources"
    return None


def library() -> ctypes.CDLL:
    """Returns the library, with its functions.

    Raises:
        ImportError: as for ``load``.
    """
    raise ImportError(f"the native library has no functions yet; to build it: {command()}")
