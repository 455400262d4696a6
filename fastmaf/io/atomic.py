"""Atomic writing: files appear complete or not at all.

New files are written into a staging folder, ``.fastmaf-<random>.tmp``, next to their target, flushed to disk and then
renamed. A staging folder is locked while its process lives; the leftovers of a killed process are removed by the next
one that writes there.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from fastmaf.io.locks import try_lock

STDOUT = "standard output"
"""Name of the stream in errors."""

_PREFIX, _SUFFIX, _LOCK = ".fastmaf-", ".tmp", "lock"
_swept: set[str] = set()  # folders that this process has already swept


@contextmanager
def written_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a binary file that replaces ``path`` when the block ends without an error.

    Readers see either the old or the new content. The folder of ``path`` is created if it is missing. Links are
    followed: the file that they lead to is replaced.

    Raises:
        OSError: the file cannot be written; the error names ``path``, and the old content is kept.
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
    """Converts errors of writing, by any library, to an OSError that names ``path``.

    Errors that name another file, outside of staging folders, pass unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and not any(map(_is_staging, Path(os.fsdecode(error.filename)).parts)):
            raise
        if error.errno is None:  # Pillow's, about an encoder
            raise OSError(f"{os.fspath(path)}: cannot be written: {error}") from error
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), os.fspath(path)) from error


@contextmanager
def errors_of_staged(staged: Path, folder: Path) -> Iterator[None]:
    """Makes errors of writing files in the staging folder ``staged`` name their targets in ``folder``."""
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
    """Yields a new hidden folder inside ``folder``, and removes it with its content afterwards.

    ``folder`` is created if it is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (key := os.path.realpath(folder)) not in _swept:
        sweep(folder)
        _swept.add(key)
    lock = None
    while lock is None:
        staged = folder / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        os.mkdir(staged)
        with suppress(FileNotFoundError):  # swept by another process before it was locked
            lock = try_lock(staged / _LOCK)
    try:
        yield staged
    finally:
        lock.release(partial(shutil.rmtree, staged, ignore_errors=True))


def sweep(folder: str | os.PathLike[str]) -> None:
    """Removes the staging folders of killed processes from ``folder``; those of living ones are locked.

    On file systems without locks, nothing is removed.
    """
    for left in Path(folder).glob(f"{_PREFIX}*{_SUFFIX}"):
        if left.is_symlink() or not left.is_dir():
            continue
        with suppress(OSError):  # already removed, or another user's
            lock = try_lock(left / _LOCK)
            if lock is not None and lock.enforced:
                lock.release(partial(shutil.rmtree, left, ignore_errors=True))
            elif lock is not None:
                lock.release()


def replace(source: Path, target: Path) -> None:
    """Renames a file that is already flushed to disk, and flushes its new name."""
    os.replace(source, target)
    sync_folder(target.parent)


def sync_file(path: Path) -> None:
    """Flushes the content of a file to disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to disk, where the system supports it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems refuse it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def previous(path: Path) -> Path:
    """Returns the path at which ``keep_previous`` keeps a file, such as ``model.previous.safetensors``."""
    return path.with_suffix(f".previous{path.suffix}")


def keep_previous(path: Path) -> None:
    """Keeps a file, if it exists, at ``previous(path)`` as well: as a hard link if possible, else as a copy."""
    if not path.is_file():
        return
    source = os.path.realpath(path)  # links are followed on replacing
    with write_errors(previous(path)), staging(path.parent) as folder:
        kept = folder / path.name
        try:
            os.link(source, kept)
        except OSError:
            shutil.copyfile(source, kept)
            sync_file(kept)
        replace(kept, previous(path))
