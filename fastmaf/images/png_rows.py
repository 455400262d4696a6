"""Whether a PNG file holds the data of all its rows.

A compressed stream that ends too soon, but properly, is no error to Pillow: the rows that it lacks are left zero.
"""

from __future__ import annotations

import struct
import zlib
from typing import BinaryIO

import numpy as np
from PIL import Image

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by the colour type
_PASSES = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
_BLOCK = 65536


def are_missing(stream: BinaryIO, image: Image.Image) -> bool:
    """Whether rows are missing; ``image`` is what was decoded, and rows are counted only if its last ones are zero."""
    if image.height > 1:
        last = [image.crop((0, y, image.width, y + 1)) for y in range(image.height - 2, image.height)]
        if all(np.asarray(row).any() for row in last):
            return False
    stream.seek(8)
    _, _, width, height, bits, colour, _, _, interlaced = struct.unpack(">I4sIIBBBBB", stream.read(21))
    expected = sum(
        rows * (1 + (columns * bits * _CHANNELS[colour] + 7) // 8)
        for columns, rows in _sizes(width, height, bool(interlaced))
        if columns
    )
    stream.seek(33)
    return _inflated(stream, expected) < expected


def _sizes(width: int, height: int, interlaced: bool) -> list[tuple[int, int]]:
    """(columns, rows) of each pass."""
    if not interlaced:
        return [(width, height)]
    return [(len(range(x, width, dx)), len(range(y, height, dy))) for x, dx, y, dy in _PASSES]


def _inflated(stream: BinaryIO, enough: int) -> int:
    """Returns how many bytes the IDAT chunks unpack to, up to about ``enough``."""
    unpacker, count = zlib.decompressobj(), 0
    while len(header := stream.read(8)) == 8 and count < enough and not unpacker.eof:
        left, kind = struct.unpack(">I4s", header)
        if kind != b"IDAT":
            stream.seek(left + 4, 1)
            continue
        while left and (data := stream.read(min(left, _BLOCK))):
            left -= len(data)
            while data and not unpacker.eof:
                count += len(unpacker.decompress(data, _BLOCK))
                data = unpacker.unconsumed_tail
        stream.seek(4, 1)
    return count
