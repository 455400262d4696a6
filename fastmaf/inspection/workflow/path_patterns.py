"""Patterns of file names, for shells that do not expand them, and hints for names that match nothing."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path

from fastmaf.images.listing import contents, entries, files_in, folders_in, is_link_out, nearest, walk
from fastmaf.io.wording import count


def is_pattern(text: str) -> bool:
    """Returns whether a text holds one of the characters ``*``, ``?`` and ``[``."""
    return any(sign in text for sign in "*?[")


def literal_folder(pattern: Path) -> Path:
    """Returns the folder that all matches of a pattern lie in: what comes before the first part with a sign."""
    return next(folder for folder in (pattern, *pattern.parents) if not is_pattern(str(folder)))


def matches(pattern: Path) -> Iterator[Path]:
    """Yields paths that match a pattern, sorted: ``*``, ``?``, ``[...]``, and ``**`` for any number of folders.

    Unlike ``glob`` it follows no loop of links, and takes a name such as "a [1]" literally if it exists.
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
            hidden = entry.name.startswith(".") and not first.startswith(".")  # as in a shell
            if fnmatch.fnmatch(entry.name, first) and not hidden and not (rest and is_link_out(entry)):
                yield from _below(entry, rest)


def hints(path: Path) -> str:
    """Returns the nearest existing paths to one that matches nothing, or the contents of the folder it would be in."""
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
        existing = [path for path in whole if os.path.lexists(path) or is_pattern(str(path))]
        return "".join(f"\ndid you mean {path}?" for path in existing or near)
    files, folders = files_in(at), len(folders_in(at))
    inside = contents(files) if files or not folders else "no files"
    return f"\nin {at.absolute()}: {inside}" + f", {count(folders, 'folder')}" * (folders > 0)
