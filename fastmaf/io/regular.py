"""Opening regular files only: reading a FIFO, a device or a socket could block or never end."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO (named pipe)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)
_FLAGS = os.O_RDONLY
for _name in ("O_BINARY", "O_CLOEXEC", "O_NOCTTY", "O_NONBLOCK"):  # each is missing on some system
    _FLAGS |= getattr(os, _name, 0)


class NotRegularError(OSError):
    """A path does not lead to a regular file."""


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file for reading bytes; never blocks on other kinds of files.

    The kind is checked before opening, as opening a device can have effects, and again afterwards, as the path may lead
    elsewhere by then.

    Raises:
        NotRegularError: it leads to something else, or is a broken link.
        OSError: it does not exist, or cannot be opened.
    """
    _check(path, _kind_at(path))
    descriptor = os.open(path, _FLAGS)
    try:
        _check(path, _kind(os.fstat(descriptor).st_mode))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def kind_of(path: str | os.PathLike[str]) -> str:
    """Returns the kind of file that a path leads to, such as "a socket", for messages: never raises."""
    try:
        return _kind_at(path) or "a regular file"
    except (OSError, ValueError) as error:
        return f"inaccessible: {getattr(error, 'strerror', None) or error}"


def is_regular(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path leads to a regular file; never raises."""
    return os.path.isfile(path)


def _check(path: str | os.PathLike[str], kind: str | None) -> None:
    if kind is not None:
        raise NotRegularError(f"{os.fspath(path)}: expected a regular file, found {kind}")


def _kind_at(path: str | os.PathLike[str]) -> str | None:
    """Returns the kind of file that a path leads to; None for a regular file. Opens nothing."""
    try:
        return _kind(os.stat(path).st_mode)
    except FileNotFoundError:
        if not os.path.islink(path):
            raise
        return f"a link to {os.readlink(path)!r}, which does not exist"
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return "a link in a loop of links"


def _kind(mode: int) -> str | None:
    if stat.S_ISREG(mode):
        return None
    return next((words for holds, words in _KINDS if holds(mode)), "no regular file")
