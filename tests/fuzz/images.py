"""Image files of every kind, tiny, and what is done to them; each is read, or refused by a DataError that names it."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from fastmaf.images.decode import DataError, load_frame

_EXIF = Image.Exif()
_EXIF[0x0112] = 6


def whole_images() -> dict[str, bytes]:
    """Returns a file of each kind by name."""
    values = np.random.default_rng(0).integers(0, 256, (11, 17, 4), dtype=np.uint8)
    colour = Image.fromarray(values).convert("RGB")
    grey16 = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    kinds: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("png", colour, {"exif": _EXIF}),
        ("png", Image.fromarray(values), {}),
        ("png", grey16, {}),
        ("png", colour.quantize(7), {"transparency": 0}),
        ("jpeg", colour, {"exif": _EXIF}),
        ("jpeg", colour, {"progressive": True}),
        ("jpeg", colour.convert("CMYK"), {"restart_marker_blocks": 2}),
        ("bmp", colour, {}),
        ("bmp", colour.convert("P"), {}),
        ("tiff", colour, {}),
        ("tiff", grey16, {"compression": "tiff_lzw"}),
        ("tiff", colour, {"compression": "tiff_adobe_deflate", "exif": _EXIF}),
        ("tiff", colour, {"compression": "jpeg"}),
        ("tiff", colour.convert("1"), {"compression": "group4"}),
    ]
    if features.check("webp"):
        kinds += [
            ("webp", colour, {"lossless": True, "exif": _EXIF}),
            ("webp", Image.fromarray(values), {"quality": 50}),
            ("webp", colour, {"save_all": True, "append_images": [colour.rotate(90)], "duration": 10}),
        ]
    found = {}
    for i, (kind, image, options) in enumerate(kinds):
        image.save(stream := io.BytesIO(), kind, **options)
        found[f"{i:02d}.{kind}"] = stream.getvalue()
    return found


def read(path: Path) -> bool:
    """Reads a file; returns whether that succeeded.

    Raises:
        AssertionError: what was read, or the message of the error, is not as promised.
    """
    try:
        frame = load_frame(path, 4, keep_full=True)
    except DataError as error:
        message = str(error)
        assert str(path) in message and len(message) < 1200 and message.replace("\n", " ").isprintable(), ascii(message)
        return False
    assert frame.pixels.shape == (3, 4, 4) and frame.full is not None
    assert frame.full.shape == (3, frame.height, frame.width) and frame.height * frame.width > 0
    return True


_NUMBERS = (0, 1, 2, 255, 256, 32767, 65535, 2**16, 10**5, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1)


def _number(rng: random.Random, content: bytes) -> bytes:
    """A number of two or four bytes, in either order, mostly near the start, where sizes and offsets are."""
    size, order = rng.choice((2, 4)), rng.choice("<>")
    content += bytes(max(0, size - len(content)))
    at = rng.randrange(max(1, min(len(content), rng.choice((64, 400, 10**6))) - size))
    value = struct.pack(f"{order}{'H' if size == 2 else 'I'}", rng.choice(_NUMBERS) % 2 ** (8 * size))
    return content[:at] + value + content[at + size :]


def _flipped(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 2, 8, 40))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))] + rng.choice((b"", b"", b"\xff\xd9", bytes(rng.randrange(99))))


def _without(rng: random.Random, content: bytes) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.choice((1, 2, 7, 30)) :]


def _repeated(rng: random.Random, content: bytes) -> bytes:
    start = rng.randrange(len(content))
    part = content[start : start + rng.choice((1, 4, 12, 60))]
    return content[:start] + part * rng.choice((2, 3, 1000)) + content[start:]


def _checked_chunks(rng: random.Random, content: bytes) -> bytes:
    """Changes the chunks of a PNG and makes their checksums right again, so that what is behind them is reached."""
    if not content.startswith(b"\x89PNG"):
        return _number(rng, content)
    chunks, at = [], 8
    while at + 12 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return _number(rng, content)
    i = rng.randrange(len(chunks))
    name, body = chunks[i]
    action = rng.randrange(4)
    if action == 0 and body:
        chunks[i] = name, _flipped(rng, body)
    elif action == 1 and len(body) > 4:
        chunks[i] = name, _number(rng, body)
    elif action == 2:
        chunks.insert(i, (rng.choice((b"tRNS", b"PLTE", b"IDAT", b"acTL", b"fcTL", b"iCCP", b"zTXt", b"eXIf")), body))
    else:
        chunks[i] = rng.choice((b"IDAT", b"IHDR", b"PLTE", name)), body[: rng.randrange(len(body) + 1)]
    parts = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    return content[:8] + b"".join(parts)


MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _number, _number, _flipped, _cut, _without, _repeated, _checked_chunks, _checked_chunks,
)  # fmt: skip


def mutant(rng: random.Random, contents: dict[str, bytes]) -> tuple[str, bytes]:
    """Returns the name of a file and what became of it; now and then two kinds are mixed."""
    name = rng.choice(sorted(contents))
    content = contents[name]
    if rng.random() < 0.05:
        other = contents[rng.choice(sorted(contents))]
        content = content[: rng.randrange(len(content))] + other[rng.randrange(len(other)) :]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(MUTATIONS)(rng, content) if content else b"x"
    return name, content


def mutants(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yields the name and the content of damaged files."""
    rng, contents = random.Random(seed), whole_images()
    for _ in range(count):
        yield mutant(rng, contents)
