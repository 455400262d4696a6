"""The rows of a run of ``fastmaf inspect score`` while it lasts, kept if it is interrupted.

A journal is a file of JSON lines beside the output: first what the run does, by which ``--resume`` knows it again, then
one line per scored image. What a killed process left of its last line is removed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmaf.images.read_ahead import Stamp
from fastmaf.inspection.workflow.rows import COLUMNS, ImageRow
from fastmaf.io.atomic import write_errors
from fastmaf.io.outputs import Kind, Output

_KEY = "fastmaf inspect score"


class ResumeError(ValueError):
    """An interrupted run had another model or other arguments; nothing was changed."""


@dataclass(frozen=True)
class Record:
    """A row, the kinds of conversion that its image needed, and the stamp of its file when it was read."""

    row: ImageRow
    kinds: tuple[str, ...]
    stamp: Stamp

    def to_line(self) -> bytes:
        """Returns the line of a journal."""
        return json.dumps({**vars(self.row), "kinds": self.kinds, "stamp": self.stamp}).encode() + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> Record:
        """Returns the record of a line; a ValueError, KeyError or TypeError if it is none."""
        values = json.loads(line)
        size, changed = values["stamp"]
        return cls(ImageRow(**{name: values[name] for name in COLUMNS}), tuple(values["kinds"]), (size, changed))


def digest_of(names: Iterable[str]) -> str:
    """Returns a digest of names in their order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
    return digest.hexdigest()


def digest_of_file(path: Path) -> str:
    """Returns a digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


class Journal:
    """The journal of a run, open for writing.

    Args:
        path: the file; created, or continued.
        run: what the run does: names and values, plain JSON types.
        resume: continue the journal at ``path`` if there is one, instead of replacing it.

    Attributes:
        stamps: the stamp of each file that has a row, by its name.

    Raises:
        ResumeError: the journal is one of another run.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], *, resume: bool) -> None:
        self.path, self.stamps = path, dict[str, Stamp]()
        self._offsets: dict[str, int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        continued = resume and _run_of(path) is not None
        if continued:
            _check_same(path, run)
        with write_errors(path):
            self._file = open(path, "rb+" if continued else "wb+")  # noqa: SIM115 - until ``close``
            if continued:
                self._file.readline()
                self._read(self._file.tell())
            else:
                self._file.write(json.dumps({_KEY: run}).encode() + b"\n")
                self._file.flush()

    def _read(self, start: int) -> None:
        """Reads the records from an offset on, and removes what follows the last whole one."""
        self._file.seek(start)
        for line in self._file:
            try:
                record = Record.of_line(line)
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            self._note(record, start)
            start += len(line)
        self._file.seek(start)
        self._file.truncate()

    def _note(self, record: Record, offset: int) -> None:
        self.stamps[record.row.file], self._offsets[record.row.file] = record.stamp, offset

    def add(self, records: Iterable[Record]) -> None:
        """Writes records at once."""
        with write_errors(self.path):
            for record in records:
                self._note(record, self._file.tell())
                self._file.write(record.to_line())
            self._file.flush()

    def forget(self, name: str) -> None:
        """Leaves out the record of a file, which is to be scored again."""
        self.stamps.pop(name, None)
        self._offsets.pop(name, None)

    def records(self, files: Iterable[str]) -> Iterator[Record]:
        """Yields the latest record of each of these files that has one, in their order."""
        end = self._file.tell()
        for name in files:
            if name in self._offsets:
                self._file.seek(self._offsets[name])
                yield Record.of_line(self._file.readline())
        self._file.seek(end)

    def content(self) -> bytes:
        """Returns the lines of the latest record of each file."""
        return b"".join(record.to_line() for record in self.records(list(self._offsets)))

    def append(self, content: bytes) -> None:
        """Appends the lines of another journal."""
        start = self._file.seek(0, os.SEEK_END)
        with write_errors(self.path):
            self._file.write(content)
            self._file.flush()
        self._read(start)

    def close(self, *, remove: bool = False) -> None:
        """Closes the file; one without records, or with ``remove``, is removed."""
        self._file.close()
        if remove or not self.stamps:
            self.path.unlink(missing_ok=True)


def journal_output(path: Path) -> Output:
    """Returns a journal as an output of a command."""
    return Output(path, Kind("the rows of an interrupted run", _is_journal))


def _is_journal(path: Path) -> bool:
    """Returns whether a file begins as a journal does; one whose first line was cut off by a full disk is one, too."""
    start = f'{{"{_KEY}": '.encode()
    try:
        with open(path, "rb") as file:
            found = file.read(len(start))
    except OSError:
        return False
    return start.startswith(found)


def _run_of(path: Path) -> dict[str, Any] | None:
    """Returns what the run of a journal does, or None if there is no journal."""
    try:
        with open(path, "rb") as file:
            run = json.loads(file.readline(1 << 20))[_KEY]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return run if isinstance(run, dict) else None


def _check_same(path: Path, run: Mapping[str, Any]) -> None:
    before = _run_of(path) or {}
    given = json.loads(json.dumps(dict(run)))
    for name in given:
        if before.get(name) != given[name]:
            raise ResumeError(
                f"{path} is of a run with another {name}: expected {_short(before.get(name))}, found "
                f"{_short(given[name])}. Without --resume the run starts again"
            )


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
