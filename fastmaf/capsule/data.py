"""Reading a folder of inspection images into one uint8 tensor.

Layout: ``root/train/good``, ``root/test/<class>`` and, optional and not read here, ``root/ground_truth/<class>``.
Every image is decoded once, turned to RGB, resized as torchvision's ``Resize`` does on a PIL image (bilinear with
antialiasing, straight to a square) and kept as uint8. Whatever had to be done to an image that is not plain 8-bit
RGB is said in ``ImageSet.notes``; a file that cannot be read stops the load with its name, or is skipped on demand.
"""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

__all__ = [
    "MAX_PIXELS",
    "SUFFIXES",
    "DataError",
    "ImageSet",
    "load_image",
    "load_test",
    "load_train",
    "to_images",
    "to_unit",
]

FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
"""The only decoders Pillow may try: fewer parsers for a hostile or mislabelled file to reach."""

MAX_PIXELS = 64_000_000
"""Largest width x height that is decoded; Pillow's own bomb warning starts at 89,478,485."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
"""Files with these suffixes, in any case, are taken for images; all others and hidden ones are left aside."""

_log = logging.getLogger(__name__)

_EXPECTED = """expected:
  <folder>/train/good/*.png          normal images to train on
  <folder>/test/good/*.png           normal images to test on
  <folder>/test/<defect class>/*.png defective images to test on
  <folder>/ground_truth/<defect class>/*.png  masks (optional)"""

# {images} becomes "image" or "images", {its} becomes "its" or "their".
_NOTES = {
    "grey": "{n} grey {images} read as RGB",
    "grey16": "{n} 16-bit grey {images} scaled to 8 bits (value / 257)",
    "grey12": "{n} 12-bit grey {images} scaled to 8 bits (value / 4095 * 255)",
    "dim16": "{n} 16-bit {images} with no value above 4095: too dark if the camera wrote 12-bit values",
    "int32": "{n} 32-bit grey {images} read as 16-bit (no value above 65535) and scaled to 8 bits",
    "float": "{n} floating-point grey {images} scaled from 0..1 to 8 bits",
    "colour16": "{n} 16-bit colour {images} read at 8 bits (the high byte of each value)",
    "palette": "{n} palette {images} read as RGB",
    "alpha": "{n} {images} with an alpha channel composited on white",
    "cmyk": "{n} CMYK {images} converted to RGB (no colour profile applied)",
    "mode": "{n} {images} in another colour space converted to RGB",
    "exif": "{n} {images} turned by {its} EXIF orientation",
    "frames": "{n} {images} with several frames or pages: only the first one read",
}


class DataError(ValueError):
    """A data folder or an image file that cannot be used; the message names it and what was expected and found."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one split, decoded.

    Attributes:
        pixels: uint8 [n, 3, size, size], channels R, G, B, rows from the top.
        paths: The file of each image.
        labels: The class folder of each image: "good", "crack", ...
        notes: What was done to images that were not plain 8-bit RGB, and what was left aside, one sentence a kind.
        skipped: (file, reason) of each file that could not be read, under ``skip_bad``.
    """

    pixels: Tensor
    paths: tuple[Path, ...]
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()
    skipped: tuple[tuple[Path, str], ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def size(self) -> int:
        """Side of the square images, in pixels."""
        return int(self.pixels.shape[-1])

    @property
    def features(self) -> int:
        """Numbers in one flattened image: 3 * size * size."""
        return 3 * self.size * self.size

    def subset(self, index: Sequence[int]) -> ImageSet:
        """The images at these positions, in this order; notes and skipped files stay those of the whole set."""
        where = [int(i) for i in index]
        pixels = self.pixels[torch.tensor(where, dtype=torch.long)]
        paths, labels = tuple(self.paths[i] for i in where), tuple(self.labels[i] for i in where)
        return replace(self, pixels=pixels, paths=paths, labels=labels)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 [n, 3, s, s] -> float32 [n, 3*s*s] in [0, 1], flattened in C, H, W order (pixel / 255, as ToTensor)."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels: expected uint8 [n, 3, s, s], found {pixels.dtype} {list(pixels.shape)}")
    return pixels.to(torch.float32).div_(255.0).flatten(1)


def to_images(x: Tensor, size: int) -> Tensor:
    """Turn float [n, 3*size*size] in C, H, W order into uint8 [n, size, size, 3], clamped to [0, 1] and rounded.

    The inverse of ``to_unit`` up to the axis order, bit for bit. NaN becomes 0.
    """
    if x.ndim != 2 or x.shape[1] != 3 * size * size:
        raise ValueError(f"x: expected [n, {3 * size * size}] for images of {size} pixels, found {list(x.shape)}")
    scaled = x.detach().nan_to_num(nan=0.0).clamp(0.0, 1.0).mul(255.0).round()
    return scaled.to(torch.uint8).reshape(-1, 3, size, size).permute(0, 2, 3, 1).contiguous()


def load_image(path: str | Path, size: int) -> tuple[Tensor, list[str]]:
    """One file -> (uint8 [3, size, size], notes in words).

    Raises:
        DataError: The file is missing, truncated, no PNG, JPEG, BMP or TIFF, too large, or of a range without a white.
    """
    pixels, kinds = _decode(Path(path).expanduser(), size)
    return torch.from_numpy(pixels), _sentences(Counter(kinds))


def load_train(root: str | Path, *, size: int = 64, skip_bad: bool = False, progress: bool = True) -> ImageSet:
    """The normal images to train on, ``root/train/good``.

    Args:
        root: The data set's folder.
        size: Side of the square that every image is resized to, in pixels.
        skip_bad: Record, log and pass over files that cannot be read instead of stopping at the first.
        progress: Show a progress bar.

    Raises:
        DataError: The folder is missing or holds no image, or a file cannot be read.
    """
    root = Path(root).expanduser()
    folder = _find(root, "train/good")
    files, ignored = _images_in(folder)
    if not files:
        raise DataError(f"no image in {folder}{_others(folder)}\n{_EXPECTED}\n{_tree(root)}")
    return _load([("good", file) for file in files], "train", [], ignored, size, skip_bad, progress)


def load_test(root: str | Path, *, size: int = 64, skip_bad: bool = False, progress: bool = True) -> ImageSet:
    """The test images, ``root/test/<class>``: "good" first, then the defect classes by name.

    A set without "good" or without a defect class is loaded as it is. Arguments and errors as ``load_train``.
    """
    root = Path(root).expanduser()
    test = _find(root, "test")
    loose, ignored = _images_in(test)
    notes = [f"{_count(len(loose), 'image')} directly in test/ left aside: not in a class folder"] if loose else []
    found: list[tuple[str, Path]] = []
    for folder in sorted(_folders_in(test), key=lambda folder: (folder.name != "good", folder.name)):
        files, others = _images_in(folder)
        ignored += others
        found += [(folder.name, file) for file in files]
        if not files:
            notes.append(f"class folder test/{folder.name} holds no image")
    if not found:
        where = f"; the {_count(len(loose), 'image')} directly in it belong in test/<class>" if loose else ""
        raise DataError(f"no test class with an image in {test}{where}\n{_EXPECTED}\n{_tree(root)}")
    return _load(found, "test", notes, ignored, size, skip_bad, progress)


def _find(root: Path, wanted: str) -> Path:
    """The folder ``root/wanted``, or a DataError that shows what is there instead and proposes the likely path."""
    folder = root.joinpath(*wanted.split("/"))
    if folder.is_dir():
        return folder
    if root.is_dir():
        what = f"no folder {wanted} in {root}"
    elif root.exists():
        what = f"{root} is a file, expected a folder: unpack an archive first"
    else:
        what = f"no such folder: {root}"
    hints = "".join(f"\ndid you mean {path}{why}?" for path, why in _proposals(root, wanted))
    raise DataError(f"{what}{hints}\n{_EXPECTED}\n{_tree(root)}")


def _proposals(root: Path, wanted: str) -> list[tuple[Path, str]]:
    """(path, why) of the folders that were probably meant, the surest kind only."""
    whole = root.resolve()
    for above in list(whole.parents)[:3]:
        inside = whole.relative_to(above).parts[0] in ("train", "test", "ground_truth")
        if inside and (above / wanted).is_dir():
            return [(above, f" (the folder above: it holds {wanted})")]
    children = _folders_in(root)
    below = [f for f in [*children, *(g for f in children for g in _folders_in(f))] if (f / wanted).is_dir()]
    if below:
        return [(path, f" (it holds {wanted})") for path in below[:3]]
    if not root.is_dir():
        return [(path, "") for path in _nearest(root.name, _folders_in(root.parent))]
    at = root
    for part in wanted.split("/"):
        if not (at / part).is_dir():
            near = [(path, f" (expected the name {part})") for path in _nearest(part, _folders_in(at))]
            loose = len(_images_in(at)[0])
            return near or [(at / part, f" as the place of the {_count(loose, 'image')} in {at.name}/")] * (loose > 0)
        at = at / part
    return []


def _nearest(name: str, folders: list[Path]) -> list[Path]:
    by_name = {folder.name.lower(): folder for folder in folders}
    return [by_name[close] for close in difflib.get_close_matches(name.lower(), list(by_name), n=3, cutoff=0.7)]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # missing or not readable: shown as holding nothing
        return []


def _folders_in(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if not entry.name.startswith(".") and entry.is_dir()]


def _images_in(folder: Path) -> tuple[list[Path], int]:
    """(image files by name, number of files left aside); hidden ones include the ._x.png that macOS leaves."""
    files = [entry for entry in _entries(folder) if not entry.is_dir()]
    images = [file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
    return images, len(files) - len(images)


def _others(folder: Path) -> str:
    suffixes = Counter(entry.suffix.lower() or entry.name for entry in _entries(folder) if not entry.is_dir())
    if not suffixes:
        return ": it is empty"
    listed = ", ".join(f"{n} x {suffix}" for suffix, n in suffixes.most_common(5))
    return f": found {listed}; read are {' '.join(SUFFIXES)}"


def _tree(root: Path, limit: int = 24) -> str:
    """What is there, two levels deep, with the number of images directly in each folder."""
    if not root.is_dir():
        return f"found: nothing at {root}" if not root.exists() else f"found: the file {root}"
    folders = [root, *(f for child in _folders_in(root) for f in (child, *_folders_in(child)))]
    names = [f"{root}", *(f"{folder.relative_to(root).as_posix()}/" for folder in folders[1:])]
    lines = [f"  {n}  {_count(len(_images_in(f)[0]), 'image')}" for n, f in zip(names, folders, strict=True)]
    if len(lines) > limit:
        lines[limit:] = [f"  ... and {len(lines) - limit} more folders"]
    return "\n".join(["found:", *lines])


def _load(
    files: list[tuple[str, Path]], what: str, notes: list[str], ignored: int, size: int, skip_bad: bool, progress: bool
) -> ImageSet:
    kinds: Counter[str] = Counter()
    pixels: list[np.ndarray] = []
    kept: list[tuple[str, Path]] = []
    skipped: list[tuple[Path, str]] = []
    for label, file in tqdm(files, desc=f"reading {what} images", unit="image", disable=not progress, leave=False):
        try:
            image, found = _decode(file, size)
        except DataError as error:
            if not skip_bad:
                raise
            skipped.append((file, str(error)))
            _log.warning("skipped: %s", error)
            continue
        pixels.append(image)
        kept.append((label, file))
        kinds.update(found)
    if not pixels:
        raise DataError(f"none of the {len(files)} {what} images could be read; the first one:\n{skipped[0][1]}")
    said = [*_sentences(kinds), *notes]
    if ignored:
        said.append(f"{_count(ignored, 'file')} left aside (hidden, or without an image's suffix)")
    if skipped:
        said.append(f"{_count(len(skipped), 'file')} skipped: could not be read")
    return ImageSet(
        pixels=torch.from_numpy(np.stack(pixels)),
        paths=tuple(file for _, file in kept),
        labels=tuple(label for label, _ in kept),
        notes=tuple(said),
        skipped=tuple(skipped),
    )


def _decode(path: Path, size: int) -> tuple[np.ndarray, list[str]]:
    """(uint8 [3, size, size], kinds of note)."""
    if size < 1:
        raise ValueError(f"size: expected at least 1 pixel, found {size}")
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    # Another library in the process may have switched this on; half an image must not pass for a whole one.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    start = b""
    try:
        with open(path, "rb") as stream:
            start = stream.read(26)
            stream.seek(0)
            image, kinds = _read_rgb(stream, start, path)
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    except DataError:
        raise
    except UnidentifiedImageError:
        found = f"a file that starts with {start[:12]!r}" if start else "an empty file"
        raise DataError(
            f"{path}: no image that can be read, or one cut short; expected {', '.join(FORMATS)}, found {found}"
        ) from None
    except Exception as error:  # a damaged file makes Pillow raise almost anything, from SyntaxError to struct.error
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)), kinds


def _read_rgb(stream: BinaryIO, start: bytes, path: Path) -> tuple[Image.Image, list[str]]:
    kinds: list[str] = []
    image: Image.Image = Image.open(stream, formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{path}: {width} x {height} = {width * height:,} pixels; at most {MAX_PIXELS:,} are decoded")
    if getattr(image, "n_frames", 1) > 1:
        kinds.append("frames")
    # Asked before the decoding: Pillow turns a TIFF while it loads it and drops the tag.
    if image.getexif().get(0x0112, 1) in range(2, 9):
        kinds.append("exif")
    image.load()
    bits = _bits(image, start)
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGB", "RGBA", "RGBX", "RGBa", "LA", "La", "CMYK") and bits > 8:
        # Pillow holds no 16-bit colour: it keeps each value's high byte, which neither clips nor is more than one
        # grey level from value / 257, and is exact where 8-bit values were widened (times 256 or 257).
        kinds.append("colour16")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(image, bits, path, kinds).convert("RGB"), kinds
    if image.mode in ("P", "PA"):
        kinds.append("palette")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        kinds.append("alpha")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode in ("1", "L"):
        kinds.append("grey")
    elif image.mode == "CMYK":
        kinds.append("cmyk")
    elif image.mode not in ("RGB", "RGBX", "P"):
        kinds.append("mode")
    return image.convert("RGB"), kinds


def _bits(image: Image.Image, start: bytes) -> int:
    """Bits of one value in the file, which Pillow's mode does not tell."""
    if image.format == "PNG":
        return start[24]  # IHDR: after the signature (8), length and name (8), width and height (8)
    tags = getattr(image, "tag_v2", None)
    found = tags.get(258, 8) if tags is not None else 8
    return int(max(found) if isinstance(found, tuple) else found)


def _scaled(image: Image.Image, bits: int, path: Path, kinds: list[str]) -> Image.Image:
    """Grey of more than 8 bits -> mode L, scaled: ``convert("RGB")`` would clip everything above 255 to white."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        kind, white = "float", 1.0
    elif bits == 12:
        kind, white = "grey12", 4095.0
    else:
        kind, white = "grey16" if bits == 16 else "int32", 65535.0
    # Also refused: NaN, signed values, and 32-bit files that may as well hold 8-bit values.
    if not (low >= 0.0 and high <= white) or (kind == "int32" and high <= 255):
        found = f"{'floating-point' if kind == 'float' else f'{bits}-bit'} grey from {low:g} to {high:g}"
        raise DataError(f"{path}: {found}, whose white is unknown: save it with 8 or 16 bits, unsigned")
    kinds += [kind] + ["dim16"] * (white == 65535.0 and 255 < high <= 4095)
    return Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8))


def _sentences(kinds: Counter[str]) -> list[str]:
    forms = {True: {"images": "image", "its": "its"}, False: {"images": "images", "its": "their"}}
    return [text.format(n=kinds[kind], **forms[kinds[kind] == 1]) for kind, text in _NOTES.items() if kinds[kind]]


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
