"""Detection of PNG files with missing rows.

Pillow accepts a compressed stream that ends early but correctly, and leaves the missing rows zero.
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
    """Returns whether rows are missing; counts them only if the last rows of the decoded ``image`` are zero."""
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
    """Returns (columns, rows) of each pass."""
    if not interlaced:
        return [(width, height)]
    return [(len(range(x, width, dx)), len(range(y, height, dy))) for x, dx, y, dy in _PASSES]


def _inflated(stream: BinaryIO, enough: int) -> int:
    """Returns the number of bytes that the IDAT chunks inflate to, counted up to about ``enough``."""
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
