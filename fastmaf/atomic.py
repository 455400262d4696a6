"""Files that are written whole or not at all, and write errors that name the file."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

STDOUT = "standard output"
"""What errors call it."""

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors, which writes by itself, reports what the system said


@contextmanager
def written_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that replaces ``path`` only when the block ends well: readers see the old content or the new.

    A link is followed: what it points at is replaced, and the link stays.

    Raises:
        OSError: the file cannot be written; the error names ``path``, and what was there before stays.
    """
    target = Path(os.path.realpath(path))
    # Of a length of its own: a name that is as long as the file system allows must not become longer.
    temporary = target.with_name(f".{zlib.crc32(os.fsencode(target.name)):08x}.{os.getpid()}.tmp")
    with write_errors(path, temporary):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def write_errors(path: str | os.PathLike[str], *temporary: Path) -> Iterator[None]:
    """Turns what goes wrong with a write into an OSError that names ``path``, whoever wrote.

    Errors that name another file than ``path`` and its ``temporary`` files pass unchanged.
    """
    own = {None, *map(str, temporary)}
    try:
        yield
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise OSError(f"{os.fspath(path)}: cannot be written: {error}") from error
        code = int(found.group(1))
        raise OSError(code, os.strerror(code), os.fspath(path)) from error
    except OSError as error:
        if error.filename not in own:
            raise
        if error.errno is None:  # Pillow's, about an encoder
            raise OSError(f"{os.fspath(path)}: cannot be written: {error}") from error
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), os.fspath(path)) from error
