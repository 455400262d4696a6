"""New images in a folder, found by listing it again and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from fastmaf.images.listing import confined, files_in, is_image, is_link_out, walk
from fastmaf.images.read_ahead import Stamp, stamp_of
from fastmaf.io.marks import is_output
from fastmaf.io.regular import is_regular

_PATIENCE = 10.0
"""Seconds for which a file that cannot be read may stay unchanged before it is given up."""


class Arrivals:
    """The image files of a folder, and of the folders below it, that are complete and have not been scored.

    A file is tried when its size and time of change are those of the listing before. One that cannot be read may be
    incomplete all the same, as copying over a network pauses: it is tried again once it has changed, or for the last
    time after ten seconds.

    Args:
        folder: the folder.
        scored: the stamp of each file that was scored, by its name; read at each listing.
        clock: returns seconds; for tests.
    """

    def __init__(self, folder: Path, scored: dict[str, Stamp], clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._scored, self._clock = folder, scored, clock
        self._listed: dict[Path, Stamp] = {}
        self._refused: dict[Path, tuple[Stamp, float]] = {}
        self._given_up: dict[Path, Stamp] = {}

    def ready(self) -> list[Path]:
        """Lists the folder, and returns the files to be read now, in the order of their last change."""
        with confined(self._folder):
            found = [file for below in walk(self._folder) for file in files_in(below)]
            listed = {file: stamp_of(file) for file in found if is_image(file) and not is_link_out(file)}
        before, self._listed = self._listed, listed
        ready = [file for file, stamp in listed.items() if before.get(file) == stamp and self._is_due(file, stamp)]
        return sorted(ready, key=lambda file: (listed[file][1], file))

    def _is_due(self, file: Path, stamp: Stamp) -> bool:
        if stamp in (self._scored.get(str(file)), self._given_up.get(file)) or stamp[0] < 0:
            return False
        refused, since = self._refused.get(file, (None, 0.0))
        if refused == stamp:
            return self._clock() - since >= _PATIENCE
        if is_output(file) or not is_regular(file):
            self._given_up[file] = stamp
            return False
        return True

    def refuse(self, file: Path) -> bool:
        """Notes that a file could not be read; returns whether it is given up."""
        stamp = self._listed[file]
        refused, since = self._refused.get(file, (None, 0.0))
        if refused == stamp and self._clock() - since >= _PATIENCE:
            del self._refused[file]
            self._given_up[file] = stamp
            return True
        if refused != stamp:
            self._refused[file] = stamp, self._clock()
        return False
