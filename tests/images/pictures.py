"""Image files for the tests."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from fastmaf.images.decode import DataError, load_image


def picture(path: Path, colour: tuple[int, int, int] = (200, 90, 40), size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)
    return path


def capsule_set(root: Path) -> Path:
    """A set of three good images and three test classes of two."""
    for i in range(3):
        picture(root / "train" / "good" / f"{i:03d}.png", (10 * i, 0, 0))
    for name in ("crack", "good", "poke"):
        for i in range(2):
            picture(root / "test" / name / f"{i:03d}.png")
    return root


def chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    path: Path, raw: bytes, size: tuple[int, int], bits: int, colour: int, *extra: bytes, interlaced: int = 0
) -> None:
    """Writes a PNG of these bytes, which are compressed; ``extra`` are chunks before them."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, interlaced))
    body = b"".join([head, *extra, chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def refused(path: Path) -> str:
    """Returns the message of the error for an image that cannot be read."""
    with pytest.raises(DataError) as caught:
        load_image(path, 4)
    assert str(path) in str(caught.value)
    return str(caught.value)
