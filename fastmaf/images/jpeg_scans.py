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
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile

from fastmaf.images.strips import strips

_SOS, _EOI = 0xDA, 0xD9
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers that start a frame, without DHT, JPG and DAC
_LONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length: TEM, RSTn, SOI
_AFTER_DATA = re.compile(rb"\xff[\x01-\xfe]")  # FF00 is a stuffed byte; a run of FF is fill
_BLOCK = 65536
_GREY = 128  # libjpeg's value for missing pixels


class CutShortError(OSError):
    """The image data end before the last pixel."""


@dataclass
class _Scans:
    """Structure of a JPEG file, read from its markers.

    Attributes:
        process: second byte of the start-of-frame marker.
        missing: number of missing low bits of each of the 64 coefficients, by component; 99 if no scan holds any.
        count: number of scans.
        end: offset at which the data of the last scan end.
        restarts: number of restart markers in the last scan.
    """

    process: int = 0
    missing: dict[int, list[int]] = field(default_factory=dict)
    count: int = 0
    end: int = 0
    restarts: int = 0

    @property
    def is_sequential(self) -> bool:
        return self.process in (0xC0, 0xC1)


def load(image: ImageFile.ImageFile, stream: BinaryIO) -> None:
    """Decodes all pixels of a JPEG that was opened from a stream.

    Raises:
        CutShortError: data are missing.
    """
    position, scans = stream.tell(), _read_scans(stream)
    lacks_scans = any(any(bits) for bits in scans.missing.values())  # of a component, or of low bits
    # An arithmetic coder may omit zeros at the end of complete data.
    is_checkable = 0xC0 <= scans.process < 0xC8 and scans.count > 0
    is_progressive = is_checkable and not scans.is_sequential and not lacks_scans
    # Decoded before the image itself, so that both are never in memory together.
    with_more = _digest_with_more(stream, scans) if is_progressive else 0
    stream.seek(position)
    image.load_read = stream.read  # type: ignore[attr-defined]  # Pillow's own may append a missing end marker
    image.load()
    if is_checkable and (
        lacks_scans
        or (is_progressive and _digest(image) != with_more)
        or (scans.is_sequential and _is_cut_short(stream, scans, image))
    ):
        raise CutShortError("the image data end before the last pixels")


def _read_scans(stream: BinaryIO) -> _Scans:
    """Reads the markers up to the end of the image; damage is left for the decoder to refuse."""
    scans = _Scans()
    stream.seek(2)
    while (marker := _next_marker(stream)) not in (None, _EOI):
        if marker in _LONE:
            continue
        length = int.from_bytes(stream.read(2), "big")
        body = stream.read(max(0, length - 2))
        if marker in _FRAMES and len(body) > 5:
            scans.process = marker
            scans.missing = {body[i]: [99] * 64 for i in range(6, len(body) - 2, 3)}
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


def _note_scan(scans: _Scans, body: bytes) -> None:
    number, (first, last, shift) = body[0], body[-3:]
    for component in body[1 : 1 + 2 * number : 2]:
        bits = scans.missing.get(component)
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


def _digest_with_more(stream: BinaryIO, scans: _Scans, *, reduce: int = 1) -> int:
    """Returns the checksum of the pixels decoded with bytes appended to the data of the last scan."""
    random_bytes = random.Random(0).randbytes(1024).replace(b"\xff", b"\x5a")
    restart = bytes((0xFF, 0xD0 + scans.restarts % 8))  # appended data may belong to a missing segment
    return _digest_of(stream, scans, random_bytes + restart + random_bytes, reduce)


def _is_cut_short(stream: BinaryIO, scans: _Scans, image: Image.Image) -> bool:
    """Returns whether data of a sequential JPEG, decoded as ``image``, are missing."""
    if scans.count == 1 and not _ends_grey(image):
        return False
    reduce = 8 if min(image.size) >= 8 else 1
    return _digest_with_more(stream, scans, reduce=reduce) != _digest_of(stream, scans, b"", reduce)


def _digest(image: Image.Image) -> int:
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


def _digest_of(stream: BinaryIO, scans: _Scans, more: bytes, reduce: int) -> int:
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
    return _digest(image)
