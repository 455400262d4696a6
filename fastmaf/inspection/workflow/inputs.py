"""The images that a command's arguments name: files, folders, patterns or a list, read one after the other."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import torch
from torch import Tensor

from fastmaf.images.decode import DataError, Frame, load_frame, sentences
from fastmaf.images.listing import confined, contents, images_below, is_image, is_link_out, left_aside, links_out_note
from fastmaf.images.progress import track
from fastmaf.inspection.workflow.path_patterns import hints, is_pattern, literal_folder, matches
from fastmaf.io.marks import is_output
from fastmaf.io.wording import count, some

Say: TypeAlias = Callable[[str], Any]
"""Receives a message for the user."""


def expand(arguments: Sequence[str | Path], *, say: Say, stdin: TextIO | None = None) -> list[Path]:
    """Returns the files that a command's arguments stand for, in their order, each once.

    Args:
        arguments: each an image file with any suffix (the decoder decides); a folder, for the images in it and in the
            folders below it, sorted; a pattern with ``*``, ``?``, ``[...]`` or ``**`` (any number of folders), for
            shells that do not expand patterns, unless a file has that very name; or ``-`` for a list of files and
            folders, one per line, in UTF-8. A missing file of that list is left for ``read_each`` to report, unless
            all are missing. Hidden files, and unnamed files without an image suffix, are ignored; hidden folders are
            not entered, and no link is followed into a loop.
        say: receives notes on ignored files, one sentence per kind.
        stdin: source of the list; by default the standard input of the process.

    Raises:
        DataError: an argument matches nothing; the message names the nearest match.
    """
    collected = _Collector()
    for argument in map(str, arguments):
        if argument == "-":
            collected.add_list(_lines(sys.stdin if stdin is None else stdin))
        else:
            collected.add_argument(argument)
    if not collected.files:
        if ignored := [*links_out_note(collected.links), *left_aside(collected.ignored)]:
            raise DataError(f"no image to read: {'; '.join(ignored)}")
        raise DataError(
            "no image named: expected image files, folders, patterns such as 'parts/*.png', or - for a list"
        )
    for note in (*links_out_note(collected.links), *left_aside(collected.ignored, list(collected.closed))):
        say(note)
    if collected.repeated:
        say(f"{count(collected.repeated, 'duplicate file')} skipped")
    return list(collected.files.values())


def read_each(
    files: Sequence[Path],
    size: int,
    *,
    keep_full: bool = False,
    skip_bad: bool = True,
    progress: bool = False,
    say: Say,
) -> Iterator[Frame]:
    """Reads files one after the other, each when it is requested.

    Args:
        files: the image files.
        size: side of the square that each is resized to, in pixels.
        keep_full: keep each image at full resolution, too (``Frame.full``).
        skip_bad: report a file that cannot be read to ``say`` and skip it, instead of raising the DataError.
    """
    for file in track(files, "reading images", "image", show=progress):
        try:
            frame = load_frame(file, size, keep_full=keep_full)
        except DataError as error:
            if not skip_bad:
                raise DataError(f"{error}; --skip-bad skips such files") from error
            say(f"skipped: {error}")
        else:
            yield frame


def read_images(
    arguments: Sequence[str], size: int, *, skip_bad: bool = False, progress: bool = True, say: Say = print
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Reads the images that arguments name; see ``expand`` and ``read_each``.

    Returns:
        The images, uint8 ``[n, 3, size, size]``, and the (height, width) of each file.

    Raises:
        DataError: an argument matches nothing, a file cannot be read and ``skip_bad`` is False, or none can be read.
    """
    files = expand(arguments, say=say)
    frames = list(read_each(files, size, skip_bad=skip_bad, progress=progress, say=say))
    if not frames:
        raise DataError(f"could not read any of {count(len(files), 'image')}: {some([str(file) for file in files])}")
    for note in sentences(Counter(kind for frame in frames for kind in frame.kinds)):
        say(note)
    return torch.stack([frame.pixels for frame in frames]), [(frame.height, frame.width) for frame in frames]


class _Collector:
    """Collects files, and notes about them."""

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}  # by resolved path
        self.repeated = 0
        self.ignored: dict[Path, None] = {}
        self.closed: dict[Path, None] = {}
        self.links: list[Path] = []  # that lead out of the folder they were found in

    def add_argument(self, argument: str) -> None:
        if not argument:
            raise DataError("an empty path: use . for the current folder")
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
        if os.path.isdir(path):
            with confined(path):
                images = self.images_below(path)
                if not images:
                    why = "it cannot be opened" if path in self.closed else contents(images_below(path)[1])
                    raise DataError(f"no image in {path}: {why}")
            self.add(images)
        elif is_output(path):
            self.ignored[path] = None
        else:
            self.add([path])

    def add_list(self, lines: list[str]) -> None:
        if not any(os.path.lexists(line) for line in lines):
            if not lines:
                raise DataError("no file name on standard input: expected one per line")
            first = Path(lines[0])
            raise DataError(f"standard input: none of its {count(len(lines), 'path')} exists: {first}{hints(first)}")
        for path in map(Path, lines):
            self.add_existing(path)

    def add_matches(self, pattern: Path) -> None:
        with confined(literal_folder(pattern)):
            self._add_matches(pattern)

    def _add_matches(self, pattern: Path) -> None:
        matching = list(matches(pattern))
        if not matching:
            raise DataError(f"nothing matches {pattern}{hints(pattern)}")
        named = pattern.suffix and not is_pattern(pattern.suffix)  # *.dat asks for those files, * does not
        images: list[Path] = []
        for path in matching:
            if is_link_out(path):
                self.links.append(path)
            elif os.path.isdir(path):
                images += self.images_below(path)
            elif (named or is_image(path)) and not is_output(path):
                images.append(path)
            else:
                self.ignored[path] = None
        if not images and not self.links:
            files = [path for path in matching if not os.path.isdir(path)]
            found = contents(files) if files else f"{count(len(matching), 'folder')} without images"
            raise DataError(f"no image matches {pattern}: {found}")
        once: dict[str, Path] = {}  # "a/**" matches a file in more than one way
        for path in images:
            once.setdefault(_resolved(path), path)
        self.add(once.values())

    def add(self, paths: Iterable[Path]) -> None:
        for path in paths:
            file = _resolved(path)
            self.repeated += file in self.files
            self.files.setdefault(file, path)

    def images_below(self, folder: Path) -> list[Path]:
        images, others, closed = images_below(folder)
        self.links += (other for other in others if is_link_out(other))
        self.ignored.update(dict.fromkeys(other for other in others if not is_link_out(other)))
        self.closed.update(dict.fromkeys(closed))
        return images


def _resolved(path: Path) -> str:
    """Returns the path with all links followed."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # an impossible name, such as one with a zero byte: left for the reader to report
        return str(path)


def _lines(stream: TextIO | None) -> list[str]:
    """Returns the lines that are not blank; names that are not valid UTF-8 keep their bytes."""
    if stream is None:
        raise DataError("no standard input to read a list of files from")
    binary = getattr(stream, "buffer", None)
    text = stream.read() if binary is None else binary.read().decode("utf-8", "surrogateescape")
    # Not splitlines(): names may hold its rarer line breaks. PowerShell starts a list with a byte order mark.
    return [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
