"""Marks in the pictures that fastmaf writes, so that results are never read as data.

A PNG has a text chunk ``fastmaf`` with the role of the picture ("sample", "overlay", ...). TIFF is written only for
maps, which are recognised by their ImageDescription. Only the header of a file is read.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

KEYWORD = "fastmaf"
"""Keyword of the text chunk."""

MAP_TITLE = "anomaly map"
"""Beginning of the description of a map, in PNG and TIFF."""

SAMPLE, GRID, CURVE, HISTOGRAM, ROC = "sample", "grid", "nll curve", "nll histogram", "roc curve"
OVERLAY, MAP, DRAWN = "overlay", "map", "drawn"

_PNG = b"\x89PNG\r\n\x1a\n"
_LONGEST = 4096  # bytes of a text chunk that is read
_CHUNKS = 256
_TIFF_DESCRIPTION, _TIFF_ASCII = 270, 2


def role_of(path: str | os.PathLike[str]) -> str | None:
    """Returns the role of a picture that fastmaf wrote; None for every other file."""
    if not os.path.isfile(path):  # opening a pipe would block
        return None
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            if start == _PNG:
                return _png_role(file)
            if start[:4] in (b"II*\0", b"MM\0*"):
                return _tiff_role(file, start)
    except (OSError, struct.error):
        pass
    return None


def is_output(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file is a result of fastmaf; the images of a drawn data set are data, not results."""
    return role_of(path) not in (None, DRAWN)


def _png_role(file: BinaryIO) -> str | None:
    for _ in range(_CHUNKS):
        length, kind = struct.unpack(">I4s", file.read(8))
        if kind in (b"IDAT", b"IEND"):
            return None
        if kind == b"tEXt" and length <= _LONGEST:
            content = file.read(length)
            if len(content) < length:
                return None
            key, _, value = content.decode("latin-1").partition("\0")
            if key == KEYWORD:
                return value
            if key == "Description" and value.startswith(f"{MAP_TITLE}: "):  # a map of a version without the mark
                return MAP
            length = 0
        file.seek(length + 4, os.SEEK_CUR)
    return None


def _tiff_role(file: BinaryIO, start: bytes) -> str | None:
    order = "<" if start[:2] == b"II" else ">"
    file.seek(struct.unpack(f"{order}I", start[4:])[0])
    for _ in range(struct.unpack(f"{order}H", file.read(2))[0]):
        tag, kind, n, at = struct.unpack(f"{order}HHII", file.read(12))
        if tag == _TIFF_DESCRIPTION and kind == _TIFF_ASCII and n > len(MAP_TITLE):
            file.seek(at)
            return MAP if file.read(len(MAP_TITLE)) == MAP_TITLE.encode() else None
        if tag > _TIFF_DESCRIPTION:  # tags are sorted
            return None
    return None
