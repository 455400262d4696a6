"""Patterns of file names, for the shells that expand none, and what to say of a name that stands for nothing."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path

from fastmaf.images.listing import contents, count, entries, files_in, folders_in, nearest, walk


def is_pattern(text: str) -> bool:
    """Whether a text holds one of the signs that make it a pattern."""
    return any(sign in text for sign in "*?[")


def matches(pattern: Path) -> Iterator[Path]:
    """Whatever is there that fits a pattern, sorted: ``*``, ``?``, ``[...]``, and ``**`` for any number of folders.

    Unlike ``glob`` it goes around in no loop of links and takes a name such as "a [1]" for itself where it is there.
    """
    return _below(Path(pattern.anchor), pattern.parts[bool(pattern.anchor) :])


def _below(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    if not parts:
        yield folder
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        for below in walk(folder):
            yield from _below(below, rest or ("*",))
    elif os.path.lexists(folder / first):
        yield from _below(folder / first, rest)
    elif is_pattern(first):
        for entry in entries(folder):
            hidden = entry.name.startswith(".") and not first.startswith(".")  # as for a shell
            if fnmatch.fnmatch(entry.name, first) and not hidden:
                yield from _below(entry, rest)


def hints(path: Path) -> str:
    """What comes nearest to a path or a pattern that stands for nothing, or what is where it was looked for."""
    at, parts = Path(path.anchor), list(path.parts[bool(path.anchor) :])
    while len(parts) > 1 and os.path.lexists(at / parts[0]):
        at /= parts.pop(0)
    if not os.path.isdir(at):
        return f"\n{at} is a file"
    first, rest = parts[0], parts[1:]
    wanted = "".join(sign for sign in first if sign not in "*?[]")
    near = nearest(wanted, folders_in(at) if rest else entries(at))
    if near:
        whole = [path.joinpath(*rest) for path in near]
        there = [path for path in whole if os.path.lexists(path) or is_pattern(str(path))]
        return "".join(f"\ndid you mean {path}?" for path in there or near)
    files, folders = files_in(at), len(folders_in(at))
    inside = contents(files) if files or not folders else "no file"
    return f"\nin {at.absolute()}: {inside}" + f", {count(folders, 'folder')}" * (folders > 0)
