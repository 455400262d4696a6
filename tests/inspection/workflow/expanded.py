"""Files and messages that ``expand`` and ``read_each`` give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastmaf.images.decode import Frame
from fastmaf.inspection.workflow import inputs


class Expanded(NamedTuple):
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def expand(arguments: Sequence[str | Path], stdin: Any = None) -> Expanded:
    notes: list[str] = []
    files = inputs.expand(arguments, say=notes.append, stdin=stdin)
    return Expanded(tuple(files), tuple(notes))


def read_all(files: Iterable[Path], size: int, *, keep_full: bool = False) -> list[Frame | str]:
    """A frame for each file, or the message on it, in order."""
    results: list[Frame | str] = []
    for frame in inputs.read_each(list(files), size, keep_full=keep_full, say=results.append):
        results.append(frame)
    return results
