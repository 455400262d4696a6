"""A synthetic capsule data set, drawn from geometry alone, to try every command without real data.

A capsule with a defect is drawn twice, without and with it; its mask is where the two differ before sensor noise.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageFilter

from fastmaf.capsule.defects import DEFECTS, draw_pair
from fastmaf.images.image_file import DataError
from fastmaf.images.png import png_text
from fastmaf.images.progress import track
from fastmaf.io.atomic import written_atomically
from fastmaf.io.marks import DRAWN, role_of
from fastmaf.io.safe_json import parse
from fastmaf.io.schema import Anything, MapOf, Record, Whole

__all__ = ["DEFAULT_COUNTS", "DEFECTS", "MARKER", "draw_dataset"]

DEFAULT_COUNTS: Mapping[str, int] = MappingProxyType(
    {"crack": 23, "faulty_imprint": 22, "poke": 21, "scratch": 23, "squeeze": 20}
)

MARKER = "fastmaf-demo.json"
"""Marks a folder as drawn by ``draw_dataset``, with the counts, so that it may be drawn again."""

_DRAWN = Record({"counts": MapOf(Whole(high=1_000_000))}, others=Anything())


def draw_dataset(
    root: str | Path,
    *,
    train: int = 243,
    good: int = 23,
    defects: Mapping[str, int] = DEFAULT_COUNTS,
    size: int = 192,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Draws a data set with the folders train/good, test/<class> and ground_truth/<class>.

    The same seed and size give the same files. Each image has its own seed, so other counts do not change the images
    that both sets have.

    Args:
        root: a new or empty folder, or one drawn by this function, whose images are then replaced.
        train: number of good images to train on.
        good: number of good images to test on.
        defects: number of test images (and masks) of each defect class.
        size: side of the square pictures in pixels, 32 to 1024.
        seed: any non-negative integer.
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        DataError: ``root`` is a file, is not empty and was not drawn by this function, or holds a foreign picture in
            place of one to be drawn; nothing was written.
        ValueError: a defect class is unknown, a count or the seed is negative, or the size is out of range.
    """
    unknown = sorted(set(defects) - set(DEFECTS))
    if unknown:
        raise ValueError(f"defects: unknown class {', '.join(unknown)}; there are {', '.join(DEFECTS)}")
    if min(train, good, seed, *defects.values(), 0) < 0:
        raise ValueError(f"counts and seed: expected 0 or more, found {train=} {good=} {seed=} defects={dict(defects)}")
    if not 32 <= size <= 1024:
        raise ValueError(f"size: expected 32 to 1024 pixels, found {size}")
    counts = {"train/good": train, "test/good": good, **{f"test/{name}": n for name, n in sorted(defects.items())}}
    root = Path(root).expanduser()
    _claim(root, counts, {"seed": seed, "size": size})
    jobs = [(folder, i) for folder, n in counts.items() for i in range(n)]
    for folder, i in track(jobs, "drawing capsules", "image", show=progress):
        picture, mask = _picture(folder, i, size, seed)
        file, mask_file = _files(root, folder, i)
        _save(picture, file)
        if mask is not None:
            _save(mask, mask_file)
    return root


def _claim(root: Path, counts: Mapping[str, int], settings: Mapping[str, int]) -> None:
    """Checks that the folder may be written to, and removes the images of an earlier drawing."""
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file; expected a folder to draw into")
    marker = root / MARKER
    known = ["train/good", "test/good", *(f"test/{name}" for name in DEFECTS)]
    if marker.is_file():
        try:
            before = parse(marker.read_text("utf-8"), "marker")
            _DRAWN.check(before, "marker")
            old: dict[str, int] = before["counts"]
            # Earlier versions did not mark pictures: only the counts of the marker identify them.
            trusted = {} if before.get("marked") else old
        except ValueError as error:
            raise DataError(f"{marker} cannot be read ({error}); draw into a new folder") from error
        drawn = {file for folder in known for file in _drawn(root, folder, trusted.get(folder, 0))}
        planned = (file for folder, n in counts.items() for i in range(n) for file in _files(root, folder, i))
        foreign = [file for file in planned if os.path.lexists(file) and file not in drawn]
        if foreign:
            raise DataError(
                f"{foreign[0]} was not drawn by this command; nothing was written: move it away or name a new folder"
            )
        for file in drawn:
            file.unlink()
    elif root.is_dir():
        names = sorted(entry.name for entry in root.iterdir())
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise DataError(
                f"{root} is not empty (it holds {shown}) and was not drawn by this command (no {MARKER} in it); "
                "nothing was written: name a new folder"
            )
    for folder in counts:
        (root / folder).mkdir(parents=True, exist_ok=True)
        if folder.split("/")[1] in DEFECTS:
            (root / _mask_folder(folder)).mkdir(parents=True, exist_ok=True)
    what = "synthetic capsule images, drawn by fastmaf from geometry alone"
    text = json.dumps({"what": what, "counts": dict(counts), "marked": True, **settings}, indent=1) + "\n"
    with written_atomically(marker) as stream:
        stream.write(text.encode())


def _drawn(root: Path, folder: str, trusted: int) -> list[Path]:
    """Returns the files of an earlier drawing: marked ones, and those with numbers below ``trusted``."""
    named = [*(root / folder).glob("[0-9]*.png"), *(root / _mask_folder(folder)).glob("[0-9]*_mask.png")]
    old = {file for file in named for i in [file.stem.removesuffix("_mask")] if i.isdecimal() and int(i) < trusted}
    return [file for file in named if file in old or role_of(file) == DRAWN]


def _files(root: Path, folder: str, index: int) -> tuple[Path, Path]:
    """Returns the paths of a picture and its mask."""
    return root / folder / f"{index:03d}.png", root / _mask_folder(folder) / f"{index:03d}_mask.png"


def _mask_folder(folder: str) -> str:
    return folder.replace("test/", "ground_truth/")


def _save(pixels: np.ndarray, path: Path) -> None:
    with written_atomically(path) as file:
        Image.fromarray(pixels).save(file, format="PNG", compress_level=2, pnginfo=png_text(DRAWN))


def _picture(folder: str, index: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Draws a picture, uint8 [size, size, 3], and its mask, uint8 [size, size] of 0 and 255; None for good ones."""
    rng = np.random.default_rng([seed, zlib.crc32(folder.encode()), index])
    defect = folder.split("/")[1]
    clean, broken = draw_pair(rng, size, defect if defect in DEFECTS else None)
    noise = rng.normal(0.0, 1.3, clean.shape).astype(np.float32)
    picture = np.rint(broken + noise).clip(0, 255).astype(np.uint8)
    return picture, (_mask(clean, broken) if defect in DEFECTS else None)


def _mask(clean: np.ndarray, broken: np.ndarray) -> np.ndarray:
    """Marks where pictures differ by over a sixth of the largest difference (2 to 10 grey levels), plus a pixel."""
    difference = np.abs(broken - clean).max(2)
    seen = difference > np.clip(difference.max() / 6, 2.0, 10.0)
    grown = Image.fromarray(seen.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(3))
    return np.asarray(grown)
