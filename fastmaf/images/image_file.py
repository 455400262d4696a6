"""Decoding one image file completely or not at all, with Pillow.

No global setting of Pillow is changed or relied on: truncated images are refused whatever
``ImageFile.LOAD_TRUNCATED_IMAGES`` is, in any thread.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageFile, UnidentifiedImageError

from fastmaf.images import jpeg_scans, png_rows
from fastmaf.images.jpeg_scans import CutShortError
from fastmaf.io.regular import NotRegularError, open_regular

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
"""The only decoders that Pillow may try, which limits the parsers that a hostile file can reach."""

MAX_PIXELS = 64_000_000
"""Largest width x height that is decoded."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_START = 30  # bytes, up to the bit depth in the header of a PNG, and to the size in that of a WebP
_KNOWN = (  # (offset, magic bytes, name) of formats that are not read
    (0, b"GIF8", "GIF"),
    (8, b"WEBP", "a damaged WebP, or this Pillow was built without WebP"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyp", "HEIF or a video"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%PDF", "PDF"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x89PNG", "a damaged PNG"),
    (0, b"\xff\xd8\xff", "a damaged JPEG"),
    (0, b"II*\0", "a damaged TIFF, or one of an unsupported kind"),
    (0, b"MM\0*", "a damaged TIFF, or one of an unsupported kind"),
    (0, b"BM", "a damaged BMP"),
)


class DataError(ValueError):
    """A data folder or an image file cannot be used."""


class TooLargeError(DataError):
    """An image has more pixels than are decoded."""


def decode(
    path: Path, content: bytes | None = None, max_pixels: int | None = None
) -> tuple[Image.Image, int, Image.Transpose | None, list[str]]:
    """Decodes the first image of a file.

    Args:
        path: the file; a leading ~ is not expanded.
        content: the bytes of the file, if they are not to be read; then ``path`` only names it in messages.
        max_pixels: largest width x height that is decoded, if another than ``MAX_PIXELS``.

    Returns:
        The image as stored, in Pillow's mode for it; the bits of one value in the file; the transposition that turns it
        upright, if any; and kinds of conversion.

    Raises:
        DataError: as ``load_frame``, except for unknown white levels.
    """
    start = b""
    try:
        with open_regular(path) if content is None else io.BytesIO(content) as stream:
            start = stream.read(_START)
            stream.seek(0)
            return _decode(stream, start, path, MAX_PIXELS if max_pixels is None else max_pixels)
    except DataError:
        raise
    except NotRegularError as error:
        raise DataError(str(error)) from None
    except UnidentifiedImageError:
        kind = next((name for at, magic, name in _KNOWN if start[at:].startswith(magic)), "none of these")
        raise DataError(
            f"{path}: not a readable image, or cut short; expected {', '.join(FORMATS[:-1])} or WebP, "
            f"found {kind if start else 'an empty file'}"
        ) from None
    except Exception as error:  # on damaged files Pillow raises anything from SyntaxError to struct.error
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def _decode(
    stream: BinaryIO, start: bytes, path: Path, max_pixels: int
) -> tuple[Image.Image, int, Image.Transpose | None, list[str]]:
    kinds: list[str] = []
    _check_size(_webp_size(start), path, max_pixels)  # Pillow allocates its pixels when it opens it
    image = Image.open(stream, formats=FORMATS)
    _check_size(image.size, path, max_pixels)
    if getattr(image, "is_animated", False):  # n_frames would read all pages of a TIFF
        kinds.append("frames")
    if is_tiff := image.format == "TIFF":  # Pillow transposes it while loading, and drops the tag
        turn = _turn(image, kinds)
    _load(image, stream)
    if not is_tiff:  # in a PNG, EXIF data may come after the pixels
        turn = _turn(image, kinds)
    if turn is not None:
        kinds.append("exif")
    return image, _bits(image, start), None if is_tiff else turn, kinds


def _check_size(size: tuple[int, int], path: Path, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise TooLargeError(f"{path}: {width} x {height} = {width * height:,} pixels; expected at most {max_pixels:,}")


def _webp_size(start: bytes) -> tuple[int, int]:
    """Returns the size that the first bytes of a WebP state; (0, 0) for another file."""
    if start[:4] != b"RIFF" or start[8:12] != b"WEBP" or len(start) < _START:
        return 0, 0
    if start[12:16] == b"VP8X":
        return 1 + int.from_bytes(start[24:27], "little"), 1 + int.from_bytes(start[27:30], "little")
    at, lossless = (21, True) if start[12:16] == b"VP8L" else (26, False)
    bits = int.from_bytes(start[at : at + 4], "little")
    if lossless:
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return bits & 0x3FFF, bits >> 16 & 0x3FFF


def _turn(image: ImageFile.ImageFile, kinds: list[str]) -> Image.Transpose | None:
    """Returns the transposition for the EXIF orientation, if any; damaged EXIF data are noted and ignored."""
    try:
        if isinstance(data := image.info.get("exif"), bytes):
            Image.Exif().load(data)  # Pillow reports damage in a JPEG only the first time
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises various errors on damaged tags
        kinds.append("bad_exif")
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _load(image: ImageFile.ImageFile, stream: BinaryIO) -> None:
    """Decodes all pixels, or raises."""
    unfinished = _make_strict(image)
    try:
        if image.format in ("JPEG", "MPO"):
            jpeg_scans.load(image, stream)
        else:
            image.load()
    except OSError as error:
        if not unfinished or error.errno is not None:  # damaged rather than cut short, or not read by the system
            raise
    if unfinished:
        raise CutShortError("the image data end before the last pixel")
    if image.format == "PNG" and png_rows.are_missing(stream, image):
        raise CutShortError("the image data end before the last row")


def _make_strict(image: ImageFile.ImageFile) -> set[_StrictDecoder]:
    """Makes the decoders of an image raise errors that Pillow can be configured to ignore.

    Not needed for compressed TIFFs, for which Pillow always raises.

    Returns:
        The decoders that have begun and have not met the end of their data: after loading, those of truncated data.
    """
    unfinished: set[_StrictDecoder] = set()
    if getattr(image, "use_load_libtiff", False):
        return unfinished
    tiles = []
    for tile in image.tile:
        codec, extents, offset, args = tile
        wrapped = (codec, unfinished, *(args if isinstance(args, tuple) else () if args is None else (args,)))
        new: Any = (_STRICT, extents, offset, wrapped)
        tiles.append(type(tile)(*new) if hasattr(tile, "_fields") else new)
    image.tile = tiles
    return unfinished


class _StrictDecoder:
    """Wraps a decoder of Pillow's to raise on errors in the data, and to tell whether it met their end.

    It does so whatever Pillow's settings are. ``cleanup`` raises nothing: Pillow calls it after any error, so that an
    error of its own would replace Ctrl-C, and call a file damaged whose reading was interrupted.
    """

    def __init__(self, mode: str, codec: str, unfinished: set[_StrictDecoder], *args: Any) -> None:
        self._decoder = Image._getdecoder(mode, codec, args, ())
        self._unfinished = unfinished
        unfinished.add(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def decode(self, data: bytes) -> tuple[int, int]:
        consumed, error = self._decoder.decode(data)
        if error < 0 or consumed < 0 or self.pulls_fd:
            self._unfinished.discard(self)
        if error < 0:
            raise OSError(f"decoder error {error}: the image data are damaged")
        return consumed, error


_STRICT = "fastmaf_strict"
Image.register_decoder(_STRICT, _StrictDecoder)  # type: ignore[arg-type]


def _bits(image: ImageFile.ImageFile, start: bytes) -> int:
    """Returns the bits of one value in the file, which Pillow's mode does not determine."""
    if image.format == "PNG":
        return start[24]  # IHDR: after the signature (8), length and name (8), width and height (8)
    tags = getattr(image, "tag_v2", None)
    bits = tags.get(258, 8) if tags is not None else 8
    return int(max(bits) if isinstance(bits, tuple) else bits)
