"""What ``fastmaf score MODEL PATH...`` is given, files, folders, patterns or a list, as files that are read in turn."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from fastmaf.images.dataset import DataError, Frame, load_frame
from fastmaf.images.listing import (
    closed_of,
    contents,
    count,
    folders_in,
    images_below,
    images_in,
    is_image,
    left_aside,
    walk,
)
from fastmaf.inspection.patterns import hints, is_pattern, matches
from fastmaf.io.marks import is_output


@dataclass(frozen=True)
class Inputs:
    """Files to score, in the order in which they were given, and what to say about them.

    Attributes:
        files: Each once, however often it was given.
        notes: What was left aside, one sentence a kind.
    """

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be read.

    Attributes:
        path: The file.
        reason: Why, in words that name it.
    """

    path: Path
    reason: str


def expand(arguments: Sequence[str | Path], *, stdin: TextIO | None = None, recursive: bool = True) -> Inputs:
    """The files that a command's arguments stand for.

    Args:
        arguments: Each an image file of whatever suffix (the decoder decides); a folder, for the images in it, sorted;
            a pattern with ``*``, ``?``, ``[...]`` or ``**`` (any number of folders), for the shells that expand none,
            unless a file has that very name; or ``-`` for a list of files and folders, one a line, in UTF-8. A file of
            that list that is not there is left for ``read_each`` to name, unless none is. Hidden files, and files
            without an image's suffix that are not named, are left aside; hidden folders are not entered.
        stdin: Where the list comes from; by default the process's standard input.
        recursive: Take the images in the folders below a folder, too. No link leads into a loop.

    Raises:
        DataError: An argument stands for nothing; names what comes nearest.
    """
    found = _Found(recursive)
    for argument in arguments:
        if str(argument) == "-":
            found.add_list(_lines(sys.stdin if stdin is None else stdin))
        else:
            found.add_argument(str(argument))
    if not found.files and found.aside:
        raise DataError(f"nothing to read: {'; '.join(left_aside(found.aside))}")
    if not found.files:
        raise DataError("no path: expected image files, folders, patterns such as 'parts/*.png', or - for a list")
    notes = left_aside(found.aside, list(found.closed))
    if found.again:
        notes.append(f"{count(found.again, 'file')} given again left out")
    return Inputs(tuple(found.files.values()), tuple(notes))


def read_each(
    files: Iterable[Path], size: int, *, skip: bool = True, keep_full: bool = False
) -> Iterator[Frame | Unreadable]:
    """Reads one file after the other, each when it is asked for.

    Args:
        files: The image files.
        size: Side of the square that each is resized to, in pixels.
        skip: Yield an ``Unreadable`` in the place of a file that cannot be read; else its DataError is raised.
        keep_full: Keep each image at full resolution, too (``Frame.full``).

    Yields:
        One thing for each file, in order.
    """
    for file in files:
        try:
            read: Frame | Unreadable = load_frame(file, size, keep_full=keep_full)
        except DataError as error:
            if not skip:
                raise
            read = Unreadable(file, str(error))
        yield read


class _Found:
    """Collects files, and what is to be said about them."""

    def __init__(self, recursive: bool) -> None:
        self.recursive = recursive
        self.files: dict[str, Path] = {}  # by _file
        self.again = 0
        self.aside: dict[Path, None] = {}
        self.closed: dict[Path, None] = {}

    def add_argument(self, argument: str) -> None:
        if not argument:
            raise DataError("an empty path: write . for the folder that you are in")
        path = Path(argument)
        if argument.startswith("~") and not os.path.lexists(path):
            path = Path(os.path.expanduser(argument))
        if os.path.lexists(path):
            self.add_existing(path)
        elif is_pattern(argument):
            self.add_matches(path)
        else:
            raise DataError(f"no such file or folder: {path}{hints(path)}")

    def add_existing(self, path: Path) -> None:
        if not os.path.isdir(path):
            return self.add_named(path)
        images = self.images_below(path)
        if not images:
            raise DataError(f"no image in {path}: {self.why_none(path)}")
        self.add(images)

    def add_list(self, lines: list[str]) -> None:
        there = [line for line in lines if os.path.lexists(line)]
        if not there:
            if not lines:
                raise DataError("no path on standard input: expected a list of files, one a line")
            first = Path(lines[0])
            raise DataError(f"standard input: none of its {count(len(lines), 'path')} exists: {first}{hints(first)}")
        for path in map(Path, lines):
            if os.path.isdir(path):
                self.add_existing(path)
            else:
                self.add_named(path)

    def add_matches(self, pattern: Path) -> None:
        matching = list(matches(pattern))
        if not matching:
            raise DataError(f"nothing matches {pattern}{hints(pattern)}")
        named = pattern.suffix and not is_pattern(pattern.suffix)  # *.dat means those files, * does not
        images: list[Path] = []
        for path in matching:
            if os.path.isdir(path):
                images += self.images_below(path)
            elif (named or is_image(path)) and not is_output(path):
                images.append(path)
            else:
                self.aside[path] = None
        if not images:
            files = [path for path in matching if not os.path.isdir(path)]
            found = contents(files) if files else f"{count(len(matching), 'folder')} without one"
            raise DataError(f"no image matches {pattern}: {found}")
        once: dict[str, Path] = {}  # "a/**" comes to a file in more than one way
        for path in images:
            once.setdefault(_file(path), path)
        self.add(once.values())

    def add_named(self, path: Path) -> None:
        if is_output(path):
            self.aside[path] = None
        else:
            self.add([path])

    def add(self, paths: Iterable[Path]) -> None:
        for path in paths:
            file = _file(path)
            self.again += file in self.files
            self.files.setdefault(file, path)

    def images_below(self, folder: Path) -> list[Path]:
        images, others, closed = images_below(folder) if self.recursive else (*images_in(folder), closed_of([folder]))
        self.aside.update(dict.fromkeys(others))
        self.closed.update(dict.fromkeys(closed))
        return images

    def why_none(self, folder: Path) -> str:
        if folder in self.closed:
            return "it cannot be opened"
        if not self.recursive and folders_in(folder):
            return f"{count(len(folders_in(folder)), 'folder')} in it not searched"
        return contents(file for below in walk(folder) for file in images_in(below)[1])


def _file(path: Path) -> str:
    """The file that a path leads to when all links are followed."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # no possible name, such as one with a zero byte: left for the reader to name
        return str(path)


def _lines(stream: TextIO | None) -> list[str]:
    """The lines that are not blank; names that are no UTF-8 come out as the bytes that they are."""
    if stream is None:
        raise DataError("no standard input to read a list of files from")
    binary = getattr(stream, "buffer", None)
    text = stream.read() if binary is None else binary.read().decode("utf-8", "surrogateescape")
    # Not splitlines(): names may hold its rarer line breaks. PowerShell starts a list with a byte order mark.
    return [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
