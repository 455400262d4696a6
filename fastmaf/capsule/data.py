"""Reading a folder of inspection images into one uint8 tensor.

Layout: ``root/train/good``, ``root/test/<class>`` and, optional and not read here, ``root/ground_truth/<class>``;
to train, a folder that holds nothing but normal images will do. Images are decoded as ``fastmaf.capsule.decoding`` says
and kept as uint8. Whatever had to be done to an image that is not plain 8-bit RGB is said in ``ImageSet.notes``; a file
that cannot be read stops the load with its name, or is skipped on demand.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastmaf.capsule.decoding import MAX_PIXELS, DataError, Frame, load_frame, load_image, sentences
from fastmaf.capsule.folders import (
    SUFFIXES,
    TEST,
    count,
    expected,
    find_normals,
    find_test,
    folders_in,
    images_in,
    left_aside,
    no_image_in,
    tree,
)

__all__ = [
    "MAX_PIXELS",
    "SUFFIXES",
    "DataError",
    "Frame",
    "ImageSet",
    "load_frame",
    "load_image",
    "load_test",
    "load_train",
    "to_images",
    "to_unit",
]

_log = logging.getLogger(__name__)


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


def load_train(root: str | Path, *, size: int = 64, skip_bad: bool = False, progress: bool = True) -> ImageSet:
    """The normal images to train on: ``root/train/good``, or a root that holds nothing but normal images.

    Args:
        root: The data set's folder; or one without ``train`` whose images, directly in it or in ``good``, are all
            normal. No other folder in that but ``test`` and ``ground_truth`` may hold images.
        size: Side of the square that every image is resized to, in pixels.
        skip_bad: Record, log and pass over files that cannot be read instead of stopping at the first.
        progress: Show a progress bar.

    Raises:
        DataError: The folder is missing or holds no image, or a file cannot be read.
    """
    root = Path(root).expanduser()
    folder, notes = find_normals(root)
    files, ignored = images_in(folder)
    if not files:
        raise no_image_in(folder, root)
    return _load([("good", file) for file in files], "train", notes, ignored, size, skip_bad, progress)


def load_test(root: str | Path, *, size: int = 64, skip_bad: bool = False, progress: bool = True) -> ImageSet:
    """The test images, ``root/test/<class>``: "good" first, then the defect classes by name.

    A set without "good" or without a defect class is loaded as it is. Arguments and errors as ``load_train``.
    """
    root = Path(root).expanduser()
    test = find_test(root)
    loose, ignored = images_in(test)
    notes = [f"{count(len(loose), 'image')} directly in test/ left aside: not in a class folder"] if loose else []
    found: list[tuple[str, Path]] = []
    for folder in sorted(folders_in(test), key=lambda folder: (folder.name != "good", folder.name)):
        files, others = images_in(folder)
        ignored += others
        found += [(folder.name, file) for file in files]
        if not files:
            notes.append(f"class folder test/{folder.name} holds no image")
    if not found:
        where = f"; the {count(len(loose), 'image')} directly in it belong in test/<class>" if loose else ""
        raise DataError(f"no test class with an image in {test}{where}\n{expected(TEST)}\n{tree(root)}")
    return _load(found, "test", notes, ignored, size, skip_bad, progress)


def _load(
    files: list[tuple[str, Path]],
    what: str,
    notes: list[str],
    ignored: list[Path],
    size: int,
    skip_bad: bool,
    progress: bool,
) -> ImageSet:
    kinds: Counter[str] = Counter()
    pixels: list[Tensor] = []
    kept: list[tuple[str, Path]] = []
    skipped: list[tuple[Path, str]] = []
    for label, file in tqdm(files, desc=f"reading {what} images", unit="image", disable=not progress, leave=False):
        try:
            frame = load_frame(file, size)
        except DataError as error:
            if not skip_bad:
                raise
            skipped.append((file, str(error)))
            _log.warning("skipped: %s", error)
            continue
        pixels.append(frame.pixels)
        kept.append((label, file))
        kinds.update(frame.kinds)
    if not pixels:
        raise DataError(f"none of the {len(files)} {what} images could be read; the first one:\n{skipped[0][1]}")
    said = [*sentences(kinds), *notes, *left_aside(ignored)]
    if skipped:
        said.append(f"{count(len(skipped), 'file')} skipped: could not be read")
    return ImageSet(
        pixels=torch.stack(pixels),
        paths=tuple(file for _, file in kept),
        labels=tuple(label for label, _ in kept),
        notes=tuple(said),
        skipped=tuple(skipped),
    )
