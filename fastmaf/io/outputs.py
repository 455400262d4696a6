"""Checks of the files that a command will write, before its work begins: no file of the user is ever replaced.

A command lists every file that it will write as an ``Output`` and calls ``check_outputs``. An output may be neither a
file that the command reads nor another of its outputs. An existing file is replaced only if it is empty, or if its
content shows that the same command wrote it.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fastmaf.io.marks import role_of
from fastmaf.io.tensor_file import CheckpointError, read_tensors

_Key: TypeAlias = tuple[object, ...]
_LARGEST = 1 << 26  # bytes of a file that are read to tell whose it is; no JSON file written here has as many


class OutputError(ValueError):
    """A command would replace a foreign file or write two outputs to one file; nothing was written."""


@dataclass(frozen=True)
class Kind:
    """A kind of file that fastmaf writes.

    Attributes:
        name: name with its article, for messages.
        is_own: returns whether fastmaf wrote a file, by its content.
    """

    name: str
    is_own: Callable[[Path], bool]


@dataclass(frozen=True)
class Output:
    """A file that will be written, and its kind."""

    path: Path
    kind: Kind


def picture(role: str, name: str) -> Kind:
    """Returns the kind of pictures with a role; see ``fastmaf.io.marks``."""
    return Kind(name, lambda path: role_of(path) == role)


def table(name: str, *headers: Sequence[str]) -> Kind:
    """Returns the kind of CSV files whose first line is one of these headers."""
    lines = {",".join(header).encode() for header in headers}
    return Kind(name, lambda path: _first_line(path) in lines)


def json_file(name: str, *keys: Iterable[str]) -> Kind:
    """Returns the kind of JSON files that hold one object with all keys of one of these sets."""
    wanted = [set(some) for some in keys]
    return Kind(name, lambda path: any(some <= _keys(_content(path)) for some in wanted))


def json_lines(name: str, keys: Iterable[str]) -> Kind:
    """Returns the kind of JSON-lines files whose first object has exactly these keys."""
    wanted = set(keys)
    return Kind(name, lambda path: _keys(_first_line(path)) == wanted)


def text_file(name: str, *signs: str) -> Kind:
    """Returns the kind of text files with one of these strings in their first 4096 bytes."""
    encoded = [sign.encode() for sign in signs]
    return Kind(name, lambda path: any(sign in _content(path, 4096) for sign in encoded))


def model(name: str, *keys: str) -> Kind:
    """Returns the kind of safetensors files with one of these keys in their metadata; by default of all models."""
    known = set(keys or ("fastmaf", "inspection"))
    return Kind(name, lambda path: not known.isdisjoint(_metadata(path)))


def check_outputs(outputs: Iterable[Output], inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Checks that outputs replace neither inputs, nor each other, nor files that the command did not write.

    Args:
        outputs: all files that will be written.
        inputs: files that will be read.

    Raises:
        OutputError: an output is an input, another output or a folder of one, or would replace a foreign file.
        OSError: a folder cannot be written to.
    """
    read = {_key(path) for path in inputs}
    written: dict[_Key, Output] = {}
    folders: dict[str, Path] = {}
    for output in outputs:
        key = _key(output.path)
        if key in read:
            raise OutputError(
                f"{output.path}: {output.kind.name} would replace a file that is to be read: name another place for it"
            )
        if key in written:
            other = written[key]
            raise OutputError(
                f"{output.path}: {output.kind.name} would replace {other.kind.name}, {other.path}, which this command "
                "writes, too: name another place for one of them"
            )
        written[key] = output
        _check_replaced(output)
        folders.setdefault(os.path.dirname(os.path.realpath(output.path)), output.path.parent)
    for folder, given in folders.items():
        for above in (folder, *map(str, Path(folder).parents)):
            if (file := written.get(_key(above))) is not None:
                raise OutputError(f"{given}: expected a folder to write to, found the place of {file.kind.name}")
        _check_folder(Path(folder))


def _check_replaced(output: Output) -> None:
    path = output.path
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder; expected a place for {output.kind.name}")
    if not os.path.exists(path):
        return
    if not os.path.isfile(path):
        raise OutputError(f"{path}: expected a place for {output.kind.name}, found a device, a pipe or a socket")
    if os.path.getsize(path) and not output.kind.is_own(path):
        raise OutputError(
            f"{path} is there already, and is not {output.kind.name} that this command wrote: nothing was written. "
            "Move it away, or name another place"
        )


def _check_folder(folder: Path) -> None:
    """Checks that a folder exists or can be created, and can be written to."""
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not os.path.isdir(existing):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
    if not os.access(existing, os.W_OK | os.X_OK):
        read_only = hasattr(os, "statvfs") and os.statvfs(existing).f_flag & os.ST_RDONLY
        code = errno.EROFS if read_only else errno.EACCES
        raise OSError(code, os.strerror(code), str(existing))


def _key(path: str | os.PathLike[str]) -> _Key:
    """Returns a key that is equal for paths that lead to one place, whether or not the file exists."""
    whole = Path(os.path.realpath(path))
    above = next((folder for folder in whole.parents if os.path.exists(folder)), None)
    if above is None:  # on a drive that does not exist
        return (whole,)
    status, names = above.stat(), whole.relative_to(above).parts
    return status.st_dev, status.st_ino, *(map(str.casefold, names) if _folds_case(above) else names)


def _folds_case(folder: Path) -> bool:
    """Returns whether the file system ignores the case of names, as those of Windows and macOS do."""
    for path in (folder, *folder.parents):
        swapped = path.parent / path.name.swapcase()
        if swapped != path:
            return os.path.exists(swapped) and os.path.samefile(path, swapped)
    return False


def _content(path: Path, size: int = _LARGEST) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError:
        return b""


def _first_line(path: Path) -> bytes:
    return _content(path, 65536).split(b"\n", 1)[0].rstrip(b"\r")


def _keys(content: bytes) -> set[str]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        return set()
    return set(parsed) if isinstance(parsed, dict) else set()


def _metadata(path: Path) -> dict[str, str]:
    try:
        return read_tensors(path, tensors=False)[1]
    except (OSError, CheckpointError):
        return {}
