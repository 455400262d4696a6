"""Listing the images in folders, with notes on files that are ignored.

Links that lead out of the folder that was asked for are not followed, unless the user asks for it: a folder from
elsewhere may hold a link to anything that its reader may open.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from pathlib import Path

from fastmaf.io.marks import is_output
from fastmaf.io.regular import is_regular, kind_of
from fastmaf.io.wording import count

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
"""Suffixes of image files, in any case; other files and hidden ones are ignored."""

_NOT_READ = (
    ".avif", ".dng", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".pgm", ".ppm", ".raw", ".tga",
)  # fmt: skip
_SYSTEM = ("__macosx", "@eadir")  # folders of attributes and thumbnails, from macOS and Synology


_root: ContextVar[str | None] = ContextVar("root", default=None)
_follows_links: ContextVar[bool] = ContextVar("follows_links", default=False)


@contextmanager
def confined(root: Path) -> Iterator[None]:
    """Within it, folders are listed without links that lead out of ``root``, except within ``following_links``."""
    token = _root.set(os.path.realpath(root))
    try:
        yield
    finally:
        _root.reset(token)


@contextmanager
def following_links(follow: bool = True) -> Iterator[None]:
    """Within it, links in data folders are followed wherever they lead.

    Example:
        >>> from fastmaf.images.dataset import load_train
        >>> from fastmaf.images.listing import following_links
        >>> def load_linked(folder):
        ...     with following_links():
        ...         return load_train(folder)
    """
    token = _follows_links.set(follow)
    try:
        yield
    finally:
        _follows_links.reset(token)


def leads_out(path: Path) -> bool:
    """Returns whether a path leads out of the root that listing is confined to, and must not be followed."""
    root = _root.get()
    if root is None or _follows_links.get():
        return False
    real = os.path.realpath(path)
    return real != root and not real.startswith(root.rstrip(os.sep) + os.sep)


def is_link_out(entry: Path) -> bool:
    """Returns whether an entry of a folder within the root is a link that leads out of it, and must not be followed."""
    return os.path.islink(entry) and leads_out(entry)


def nearest(name: str, among: Iterable[Path]) -> list[Path]:
    """Returns up to three of these paths whose name is similar to ``name``, the most similar first."""
    by_name = {path.name.lower(): path for path in among}
    return [by_name[close] for close in difflib.get_close_matches(name.lower(), list(by_name), n=3, cutoff=0.7)]


def entries(folder: Path) -> list[Path]:
    """Lists all entries of a folder by name."""
    try:
        return sorted(folder.iterdir())
    except OSError:  # missing or not readable
        return []


def folders_in(folder: Path) -> list[Path]:
    """Lists the folders in a folder by name, except hidden ones, system folders and links that lead out."""
    shown = (e for e in entries(folder) if not e.name.startswith(".") and e.name.lower() not in _SYSTEM)
    return [entry for entry in shown if os.path.isdir(entry) and not is_link_out(entry)]


def files_in(folder: Path) -> list[Path]:
    """Lists everything in a folder that is not a folder that may be entered, by name."""
    return [entry for entry in entries(folder) if not os.path.isdir(entry) or is_link_out(entry)]


def is_image(path: Path) -> bool:
    """Returns whether the name is that of an image; hidden files, such as ._x.png from macOS, are not."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def images_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns the image files in a folder and the files left aside, by name.

    Pictures that fastmaf wrote as results, image names that are not regular files and links that lead out are left
    aside as well.
    """
    images: list[Path] = []
    aside: list[Path] = []
    for file in files_in(folder):
        usable = is_image(file) and not is_link_out(file) and is_regular(file) and not is_output(file)
        (images if usable else aside).append(file)
    return images, aside


def images_below(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Returns image files in a folder and all below it, files left aside, and folders that cannot be opened."""
    folders = list(walk(folder))
    images, aside = zip(*map(images_in, folders), strict=True)
    closed = [below for below in folders if os.path.isdir(below) and not os.access(below, os.R_OK | os.X_OK)]
    return sorted(chain.from_iterable(images)), sorted(chain.from_iterable(aside)), closed


def walk(folder: Path) -> Iterator[Path]:
    """Yields the folder and all below it, except hidden ones, each once, even with links in a loop."""
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        at = waiting.pop()
        real = os.path.realpath(at)
        if real not in seen:
            seen.add(real)
            yield at
            waiting += reversed(folders_in(at))


def contents(files: Iterable[Path]) -> str:
    """Describes the kinds of these files, for an error message."""
    suffixes = Counter(kind_for_people(file) for file in files)
    if not suffixes:
        return "it is empty"
    listed = ", ".join(f"{n} x {suffix}" for suffix, n in suffixes.most_common(5))
    return f"found {listed} (supported: {' '.join(SUFFIXES)})"


def kind_for_people(file: Path) -> str:
    """Returns the kind of a file: its suffix, or why a file with an image's name is not an image."""
    if is_link_out(file):
        return "a link that leads out of the folder"
    if is_image(file):
        if not is_regular(file):
            return kind_of(file)
        return "a picture written by fastmaf" if is_output(file) else file.suffix.lower()
    return file.name if file.name.startswith(".") else file.suffix.lower() or file.name


def is_unread_image(file: Path) -> bool:
    """Returns whether the name is that of an image in an unsupported format."""
    return file.suffix.lower() in _NOT_READ and not file.name.startswith(".")


def links_out_note(links: Sequence[Path]) -> list[str]:
    """Returns a note on links that lead out of the folder that was asked for; none without any."""
    if not links:
        return []
    first = f"{links[0]} leads to {os.path.realpath(links[0])}"
    return [f"{count(len(links), 'link')} out of the folder skipped ({first}); --follow-links reads them"]


def left_aside(files: Collection[Path], closed: Sequence[Path] = ()) -> list[str]:
    """Returns notes on files that were left aside and on folders that cannot be opened."""
    links, files = [file for file in files if is_link_out(file)], [file for file in files if not is_link_out(file)]
    odd = [file for file in files if is_image(file) and not is_regular(file)]
    written = [file for file in files if is_image(file) and is_regular(file)]
    others = Counter(file.suffix.lower() for file in files if is_unread_image(file))
    notes = links_out_note(links)
    if odd:
        first = f"{odd[0].name} is {kind_of(odd[0])}"
        notes.append(f"{count(len(odd), 'path')} skipped: named like images, but not regular files ({first})")
    if written:
        where = Counter(f"{file.parent}" for file in written)
        places = ", ".join(f"{n} in {folder}" for folder, n in sorted(where.items())[:3])
        notes.append(
            f"{count(len(written), 'picture')} written by fastmaf skipped: {places}" + ", ..." * (len(where) > 3)
        )
    for suffix, n in sorted(others.items()):
        notes.append(f"{count(n, f'{suffix} file')} skipped: not supported; convert to PNG")
    if rest := len(files) - len(odd) - len(written) - others.total():
        notes.append(f"{count(rest, 'file')} skipped: hidden, or not named like an image")
    if closed:
        notes.append(
            f"{count(len(closed), 'folder')} could not be opened (no permission): {', '.join(map(str, closed))}"
        )
    return notes
