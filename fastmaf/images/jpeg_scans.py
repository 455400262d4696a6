"""Detection of truncated JPEG files.

libjpeg fills missing data with grey and only warns, and Pillow drops the warning, so a truncated file that ends in an
end marker appears complete. Detection: bytes appended to the data of the last scan are skipped if the data are
complete, and decoded if data are missing. The file is therefore decoded with and without appended bytes; if the pixels
differ, it is truncated. This is done for every progressive JPEG, which doubles its decoding time, and for a sequential
one if its last block is grey. A loss within that block alone (8 x 8 to 16 x 16 pixels) is not detected.

References:
    ITU-T T.81 (1992), Annex B (markers), F.2 (sequential and G.2 progressive decoding).
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image

from fastmaf.images.strips import strips

_SOS, _EOI, _DHT, _DAC, _JPG = 0xDA, 0xD9, 0xC4, 0xCC, 0xC8
_LONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length: TEM, RSTn, SOI
_AFTER_DATA = re.compile(rb"\xff[\x01-\xfe]")  # FF00 is a stuffed byte; a run of FF is fill
_BLOCK = 65536
_GREY = 128  # libjpeg's value for missing pixels


@dataclass
class Scans:
    """Structure of a JPEG file, read from its markers.

    Attributes:
        process: second byte of the start-of-frame marker.
        known: number of missing low bits of each of the 64 coefficients, by component; 99 if no scan holds any.
        count: number of scans.
        end: offset at which the data of the last scan end.
        restarts: number of restart markers in the last scan.
    """

    process: int = 0
    known: dict[int, list[int]] | None = None
    count: int = 0
    end: int = 0
    restarts: int = 0

    @property
    def is_checkable(self) -> bool:
        """Whether it is Huffman-coded; an arithmetic coder may omit zeros at the end of complete data."""
        return 0xC0 <= self.process < 0xC8 and self.count > 0

    @property
    def is_sequential(self) -> bool:
        return self.process in (0xC0, 0xC1)

    @property
    def lack_coefficients(self) -> bool:
        """Whether whole scans are missing, of a component or of low bits in a progressive file."""
        return any(bits for component in (self.known or {}).values() for bits in component)


def read_scans(stream: BinaryIO) -> Scans:
    """Reads the markers up to the end of the image; damage is left for the decoder to refuse."""
    scans = Scans()
    stream.seek(2)
    while (marker := _next_marker(stream)) not in (None, _EOI):
        if marker in _LONE:
            continue
        length = int.from_bytes(stream.read(2), "big")
        body = stream.read(max(0, length - 2))
        if 0xC0 <= (marker or 0) <= 0xCF and marker not in (_DHT, _DAC, _JPG) and len(body) > 5:
            scans.process = marker or 0
            scans.known = {body[i]: [99] * 64 for i in range(6, len(body) - 2, 3)}
        elif marker == _SOS and body:
            _note_scan(scans, body)
            scans.count += 1
            scans.end, scans.restarts = _skip_data(stream)
    return scans


def _next_marker(stream: BinaryIO) -> int | None:
    byte = stream.read(1)
    while byte and byte != b"\xff":
        byte = stream.read(1)
    while byte == b"\xff":
        byte = stream.read(1)
    return byte[0] if byte else None


def _note_scan(scans: Scans, body: bytes) -> None:
    number, (first, last, shift) = body[0], body[-3:]
    for component in body[1 : 1 + 2 * number : 2]:
        bits = (scans.known or {}).get(component)
        if bits is not None:
            if scans.is_sequential or scans.process == 0xC3:  # lossless: the three bytes mean something else
                first, last, shift = 0, 63, 0
            bits[first : last + 1] = [shift & 15] * len(bits[first : last + 1])


def _skip_data(stream: BinaryIO) -> tuple[int, int]:
    """Seeks to the marker that ends a scan's data; returns its offset and the number of restart markers before it."""
    restarts, at, rest = 0, stream.tell(), b""
    while block := stream.read(_BLOCK):
        data = rest + block
        for match in _AFTER_DATA.finditer(data):
            if 0xD0 <= data[match.start() + 1] <= 0xD7:
                restarts += 1
                continue
            end = at + match.start()
            stream.seek(end)
            return end, restarts
        rest = data[-1:] if data.endswith(b"\xff") else b""
        at += len(data) - len(rest)
    return at, restarts


def digest_with_more(stream: BinaryIO, scans: Scans, *, reduce: int = 1) -> int:
    """Returns the checksum of the pixels decoded with bytes appended to the data of the last scan."""
    random_bytes = random.Random(0).randbytes(1024).replace(b"\xff", b"\x5a")
    restart = bytes((0xFF, 0xD0 + scans.restarts % 8))  # appended data may belong to a missing segment
    return _digest_of(stream, scans, random_bytes + restart + random_bytes, reduce)


def is_cut_short(stream: BinaryIO, scans: Scans, image: Image.Image) -> bool:
    """Returns whether data of a sequential JPEG, decoded as ``image``, are missing."""
    if scans.count == 1 and not _ends_grey(image):
        return False
    reduce = 8 if min(image.size) >= 8 else 1
    return digest_with_more(stream, scans, reduce=reduce) != _digest_of(stream, scans, b"", reduce)


def digest(image: Image.Image) -> int:
    """Returns a checksum of the pixels."""
    checksum = 0
    for _, strip in strips(image):
        checksum = zlib.crc32(strip.tobytes(), checksum)
    return checksum


def _ends_grey(image: Image.Image) -> bool:
    """Returns whether the last block is uniformly grey, as libjpeg fills missing blocks."""
    if image.mode not in ("L", "RGB"):  # in CMYK, values of neighbours affect the block
        return True
    width, height = image.size
    block = image.crop(((width - 1) // 8 * 8, (height - 1) // 8 * 8, width, height))
    values = np.asarray(block).astype(np.float64)
    if image.mode == "RGB":
        values = values @ np.array([0.299, 0.587, 0.114])
    return bool((np.abs(values - _GREY) <= 2).all())


def _digest_of(stream: BinaryIO, scans: Scans, more: bytes, reduce: int) -> int:
    stream.seek(0)
    image = Image.open(stream, formats=("JPEG",))
    if reduce > 1:
        image.draft(None, (image.width // reduce, image.height // reduce))
    rest = more + b"\xff\xd9"

    def read(size: int) -> bytes:
        nonlocal rest
        if (left := scans.end - stream.tell()) > 0:
            return stream.read(min(size, left))
        part, rest = rest[:size], rest[size:]
        return part

    image.load_read = read  # type: ignore[attr-defined]  # Pillow reads JPEG data through it
    image.load()
    return digest(image)
