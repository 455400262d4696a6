"""What is said of images that were not plain 8-bit RGB."""

from __future__ import annotations

from collections import Counter

# {images} becomes "image" or "images", {its} becomes "its" or "their".
_NOTES = {
    "grey": "{n} grey {images} read as RGB",
    "grey16": "{n} 16-bit grey {images} scaled to 8 bits (value / 257)",
    "grey12": "{n} 12-bit grey {images} scaled to 8 bits (value / 4095 * 255)",
    "dim16": "{n} 16-bit {images} with no value above 4095: too dark if the camera wrote 12-bit values",
    "dark16": "{n} {images} of more than 8 bits with no value above 255, or 1/255 of white: almost black. If the file "
    "holds 8-bit values, save it with 8 bits",
    "int32": "{n} 32-bit grey {images} read as 16-bit (no value above 65535) and scaled to 8 bits",
    "float": "{n} floating-point grey {images} scaled from 0..1 to 8 bits",
    "colour16": "{n} 16-bit colour {images} read at 8 bits (the high byte of each value)",
    "palette": "{n} palette {images} read as RGB",
    "alpha": "{n} {images} with an alpha channel composited on white",
    "cmyk": "{n} CMYK {images} converted to RGB (no colour profile applied)",
    "mode": "{n} {images} in another colour space converted to RGB",
    "exif": "{n} {images} turned by {its} EXIF orientation",
    "bad_exif": "{n} {images} with damaged EXIF data: an orientation in them is ignored",
    "frames": "{n} {images} with several frames or pages: only the first one read",
}


def sentences(kinds: Counter[str]) -> list[str]:
    """What was done to images that were not plain 8-bit RGB, one sentence a kind."""
    forms = {True: {"images": "image", "its": "its"}, False: {"images": "images", "its": "their"}}
    return [text.format(n=kinds[kind], **forms[kinds[kind] == 1]) for kind, text in _NOTES.items() if kinds[kind]]
