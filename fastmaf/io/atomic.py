"""Files that appear whole or not at all.

Everything new is written into a staging folder, ``.fastmaf-<random>.tmp``, beside its place, flushed to the disk and
only then renamed. A staging folder holds a lock while its process lives: what a killed process left is removed by the
next one that writes there.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from fastmaf.io.locks import FileLock, try_lock

STDOUT = "standard output"
"""What errors call it."""

_PREFIX, _SUFFIX, _LOCK = ".fastmaf-", ".tmp", "lock"
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors, which writes by itself, reports what the system said
_swept: set[str] = set()  # folders that this process has freed of leftovers


@contextmanager
def written_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a binary file that replaces ``path`` only when the block ends well: readers see the old content or the new.

    The folder of ``path`` is created if it is missing. A link is followed: what it points at is replaced.

    Raises:
        OSError: the file cannot be written; the error names ``path``, and what was there before stays.
    """
    target = Path(os.path.realpath(path))
    with write_errors(path), staging(target.parent) as folder:
        temporary = folder / target.name
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, target)


@contextmanager
def write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what goes wrong with a write into an OSError that names ``path``, whoever wrote.

    Errors that name another file than ``path`` and what is in a staging folder pass unchanged.
    """
    try:
        yield
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise OSError(f"{os.fspath(path)}: cannot be written: {error}") from error
        raise OSError(int(found[1]), os.strerror(int(found[1])), os.fspath(path)) from error
    except OSError as error:
        if error.filename is not None and not any(map(_is_staging, Path(os.fsdecode(error.filename)).parts)):
            raise
        if error.errno is None:  # Pillow's, about an encoder
            raise OSError(f"{os.fspath(path)}: cannot be written: {error}") from error
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), os.fspath(path)) from error


@contextmanager
def errors_of_staged(staged: Path, folder: Path) -> Iterator[None]:
    """Makes write errors of files in the staging folder ``staged`` name the places in ``folder`` that they are for."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and staged in (file := Path(os.fsdecode(error.filename))).parents:
            raise OSError(error.errno, error.strerror, str(folder / file.relative_to(staged))) from error
        raise


def _is_staging(name: str) -> bool:
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


@contextmanager
def staging(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new hidden folder inside ``folder``, on the same file system; it is removed with all that is left in it.

    ``folder`` is created if it is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    key = os.path.realpath(folder)
    if key not in _swept:
        sweep(folder)
        _swept.add(key)
    made, lock = _claim(folder)
    try:
        yield made
    finally:
        _discard(made, lock)


def _claim(folder: Path) -> tuple[Path, FileLock]:
    while True:
        made = folder / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        made.mkdir()
        # A process that sweeps the folder at this moment takes it for a leftover: it is made anew then.
        try:
            lock = try_lock(made / _LOCK)
        except FileNotFoundError:
            continue
        if lock is not None:
            return made, lock


def _discard(made: Path, lock: FileLock) -> None:
    if os.name == "nt":  # an open file cannot be removed there
        lock.release()
    shutil.rmtree(made, ignore_errors=True)
    if os.name != "nt":
        lock.release()


def sweep(folder: str | os.PathLike[str]) -> None:
    """Removes the staging folders that killed processes left in ``folder``; those of living ones are locked, and stay.

    Where the file system has no locks, nothing is removed.
    """
    for left in Path(folder).glob(f"{_PREFIX}*{_SUFFIX}"):
        if left.is_symlink() or not left.is_dir():
            continue
        with suppress(OSError):  # gone by itself, or another user's
            lock = try_lock(left / _LOCK)
            if lock is not None and lock.enforced:
                _discard(left, lock)
            elif lock is not None:
                lock.release()


def replace(source: Path, target: Path) -> None:
    """Renames a file whose content is on the disk already, and waits until its new name is there, too."""
    os.replace(source, target)
    sync_folder(target.parent)


def sync_file(path: Path) -> None:
    """Waits until the content of a file is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where the system can do that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems refuse it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def previous(path: Path) -> Path:
    """Returns the name under which ``keep_previous`` keeps a file: ``model.previous.safetensors``."""
    return path.with_suffix(f".previous{path.suffix}")


def keep_previous(path: Path) -> None:
    """Keeps the content of a file, if it exists, under its previous name as well; it stays in its place until replaced.

    A second name for the same file where the file system has hard links, else a copy.
    """
    if not path.is_file():
        return
    source = os.path.realpath(path)  # what a link points at is what will be replaced
    with write_errors(previous(path)), staging(path.parent) as folder:
        kept = folder / path.name
        try:
            os.link(source, kept)
        except OSError:
            shutil.copyfile(source, kept)
            sync_file(kept)
        replace(kept, previous(path))
