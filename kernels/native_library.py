"""The C++ library of the `native` backend, beside this file: ``_native.so``, or ``_native.dll`` on Windows.

setup.py compiles it from ``csrc/``. It needs neither torch nor Python: its functions take pointers and the structs of
``native_args.py``. It holds the kernels for several instruction sets, of which the best that the CPU runs is chosen
when it is loaded; ``FASTMAF_ISA`` names another. setup.py writes a note beside it, ``_native.txt``: the compiler that
it was built with, or why there is none.

Its threads are its own, as many as ``torch.get_num_threads()`` says with the calling one. They sleep between calls, and
a process that is forked starts with new ones.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

_FOLDER = Path(__file__).resolve().parent
_NAME = "_native.dll" if os.name == "nt" else "_native.so"
# Of the structs and functions in csrc/, and of native_args.py.
VERSION = 6
_ERRORS = {
    1: (MemoryError, "the native kernels could not allocate their work buffers"),
    2: (RuntimeError, "the native library has other structs than this version of fastmaf"),
    3: (RuntimeError, "a permutation of the flow holds a number twice or one that is out of range"),
}


def load() -> None:
    """Loads the library, once.

    Raises:
        ImportError: it is not there, or it cannot run here; the message says why, and the command that brings it.
    """
    library()


def library() -> ctypes.CDLL:
    """Returns the library, loaded at the first call; raises as ``load`` does."""
    return _load(_FOLDER)


def check(error: int) -> None:
    """Raises what a function of the library has returned, unless it is 0."""
    if error:
        kind, text = _ERRORS.get(error, (RuntimeError, f"the native library failed with error {error}"))
        raise kind(text)


def build_info() -> str:
    """Returns the instruction set in use, with the matrix unit if there is one, and the compiler of the library.

    Raises:
        ImportError: as for ``load``.
    """
    used = library().fastmaf_used_isa().decode()
    note = (_FOLDER / "_native.txt").read_text(encoding="utf-8").strip().removeprefix("built: ")
    unit = " with AMX for bfloat16 weights" if library().fastmaf_uses_matrix_unit() else ""
    return f"{used}{unit} (of {', '.join(isas())}), {note}"


def isas() -> list[str]:
    """Returns the instruction sets of the library that this CPU runs, the best first."""
    names: list[str] = []
    while (name := library().fastmaf_isa(len(names), True)) is not None:
        names.append(name.decode())
    return names


def use_isa(name: str) -> None:
    """Chooses the instruction set of all later calls.

    Raises:
        ValueError: the library or this CPU does not have it.
    """
    if not library().fastmaf_use_isa(name.encode()):
        raise ValueError(f"the instruction set must be one of {isas()} on this CPU; found {name!r}")


def why_not(like: Tensor) -> str | None:
    """Returns why the kernels cannot serve tensors of the dtype of this one, or None when they can."""
    if like.dtype in (torch.float32, torch.float64):
        return None
    return f"the native kernels take float32 and float64 tensors; found {like.dtype}"


def command() -> str:
    """Returns the one command that builds the library for this installation."""
    root = _FOLDER.parent
    if not (_FOLDER / "csrc").is_dir():
        return "in a checkout of fastmaf: FASTMAF_BUILD=1 pip install ."
    return "make native" if Path(sys.prefix) == root / ".venv" else f"in {root}: FASTMAF_BUILD=1 pip install -e ."


@functools.cache
def _load(folder: Path) -> ctypes.CDLL:
    why = _why_not(folder)
    if why is None:
        path = folder / _NAME
        try:
            loaded = ctypes.CDLL(str(path))
            loaded.fastmaf_version.restype = ctypes.c_int64
            found = loaded.fastmaf_version()
        except (OSError, AttributeError) as error:
            why = f"{path} cannot be loaded: {error}"
        else:
            if found == VERSION:
                return _prepared(loaded)
            why = f"the native library has version {found} of its structs; this version of fastmaf needs {VERSION}"
    raise ImportError(f"{why}; to build it: {command()}")


def _prepared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the functions and chooses the instruction set."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    signatures = {
        "flow_forward": [pointer, pointer, pointer, integer, pointer, pointer, pointer, pointer, integer],
        "flow_inverse": [pointer, pointer, pointer, integer, pointer, pointer, integer],
        "flow_backward": [pointer, pointer, pointer, pointer, integer, pointer, pointer, pointer, integer],
        "linear": [integer, pointer, pointer, integer, ctypes.c_bool, pointer, integer],
        "affine": [integer, pointer, pointer, pointer, pointer, integer, pointer, pointer, pointer, integer],
        "layer_backward": [integer, pointer, pointer, pointer, integer, pointer, pointer, pointer, integer],
    }
    for name, types in signatures.items():
        getattr(loaded, f"fastmaf_{name}").argtypes = types
    loaded.fastmaf_isa.argtypes, loaded.fastmaf_isa.restype = [integer, ctypes.c_bool], ctypes.c_char_p
    loaded.fastmaf_use_isa.argtypes = [ctypes.c_char_p]
    loaded.fastmaf_used_isa.restype, loaded.fastmaf_uses_matrix_unit.restype = ctypes.c_char_p, ctypes.c_bool
    names: list[str] = []
    while (name := loaded.fastmaf_isa(len(names), True)) is not None:
        names.append(name.decode())
    wanted = os.environ.get("FASTMAF_ISA") or names[0]
    if not loaded.fastmaf_use_isa(wanted.encode()):
        why = f"FASTMAF_ISA is {wanted!r}; expected one of {', '.join(names)} on this CPU"
        # Who asks for an instruction set does not want the backend `torch`, to which the default choice falls back.
        warnings.warn(f"{why}; the native kernels are not used", RuntimeWarning, stacklevel=2)
        raise ImportError(why)
    return loaded


def _why_not(folder: Path) -> str | None:
    """Returns why the library must not be loaded, as far as files tell."""
    path, note = folder / _NAME, folder / "_native.txt"
    text = note.read_text(encoding="utf-8").rstrip() if note.is_file() else ""
    if not path.is_file():
        reason = text.partition("\n")[0].removeprefix("not built: ")
        return f"the native library was not built{f' ({reason})' if reason else ''}"
    if any(source.stat().st_mtime > path.stat().st_mtime for source in folder.glob("csrc/*")):
        return "the native library is older than its sources"
    return None
