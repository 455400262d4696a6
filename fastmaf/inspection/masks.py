"""Masks of the defects in labelled test images, read from ``root/ground_truth``.

The mask of ``root/test/<class>/NAME.ext`` is ``root/ground_truth/<class>/NAME_mask.png`` or ``NAME.png``, or one with
another image suffix; that of an image in a folder below its class lies in the same folder below
``root/ground_truth/<class>``. A mask is read as every other image is; a pixel is a defect if any channel is above 127
of 255.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np

from fastmaf.images.dataset import ImageSet
from fastmaf.images.decode import DataError, load_frame
from fastmaf.images.listing import SUFFIXES, confined, images_in, leads_out
from fastmaf.io.wording import count, some
from fastmaf.metrics.results import NORMAL


@dataclass(frozen=True, eq=False)
class Masks:
    """The masks of an ``ImageSet``, in its order.

    Attributes:
        masks: bool [h, w] at the resolution of the mask's file; None for an image of class "good", which has no defect,
            and for one whose mask is missing or was skipped.
        notes: on unusual masks, one sentence per kind.
    """

    masks: tuple[np.ndarray | None, ...]
    notes: tuple[str, ...]

    def usable(self, images: ImageSet) -> np.ndarray:
        """Returns which images have known defects and can be used for pixel metrics, bool [n].

        All False if no mask shows a defect, as there are no pixel metrics then.
        """
        known = [mask is not None or label == NORMAL for mask, label in zip(self.masks, images.labels, strict=True)]
        return np.array(known, dtype=bool) & any(mask is not None and bool(mask.any()) for mask in self.masks)


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """A labelled test set.

    Attributes:
        images: the test images.
        masks: of their defects.
        normals: good images that baselines are fitted to; None if there are none.
    """

    images: ImageSet
    masks: Masks
    normals: ImageSet | None


def load_masks(root: str | Path, images: ImageSet, *, skip_bad: bool = False) -> Masks:
    """Reads the masks of a test set.

    Args:
        root: the data set's folder. Without ``root/ground_truth`` every mask is missing, which the notes state.
        images: returned by ``load_test`` for it.
        skip_bad: treat a mask that cannot be read, or does not fit its image, as missing, and add a note.

    Raises:
        DataError: a mask cannot be read, or has another aspect ratio than its image; the message names it.
    """
    root = Path(root).expanduser()
    folder = root / "ground_truth"

    @cache
    def masks_in(of_class: Path) -> dict[str, Path]:
        with confined(root):
            return {} if leads_out(of_class) else _masks_in(of_class)

    masks: list[np.ndarray | None] = []
    missing, bad, empty, transparent = [], [], [], []
    shapes = images.shapes or (None,) * len(images)
    for path, name, label, shape in zip(images.paths, images.names, images.labels, shapes, strict=True):
        masks.append(None)
        if label == NORMAL:
            continue
        available, stem = masks_in(folder / label / PurePosixPath(name).parent), PurePosixPath(name).stem
        file = available.get(f"{stem}_mask", available.get(stem))
        if file is None:
            missing.append(_name(path))
            continue
        try:
            mask, largest, alpha = _read(file, path, shape)
        except DataError as error:
            if not skip_bad:
                raise
            bad.append(str(error))
            continue
        masks[-1] = mask
        if alpha:
            transparent.append(_name(file))
        if not mask.any():
            empty.append(f"{_name(file)} (largest value {largest} of 255)")
    notes = []
    if not folder.is_dir():
        notes.append(f"no folder {folder} with masks: no pixel metrics")
    elif missing:
        notes.append(f"no mask in {folder} for {count(len(missing), 'defective image')}: {some(missing)}")
    if bad:
        notes.append(f"{count(len(bad), 'mask')} skipped: {some(bad)}")
    if empty:
        notes.append(f"no defect (value above 127) in {count(len(empty), 'mask')}: {some(empty)}")
    if transparent:
        masks_of = count(len(transparent), "mask")
        notes.append(f"transparent pixels count as defects in {masks_of} with an alpha channel: {some(transparent)}")
    return Masks(tuple(masks), tuple(notes))


def _masks_in(folder: Path) -> dict[str, Path]:
    """Returns the images in a folder by stem; of several with one stem, the first suffix in ``SUFFIXES`` wins."""
    files = sorted(images_in(folder)[0], key=lambda file: SUFFIXES.index(file.suffix.lower()), reverse=True)
    return {file.stem: file for file in files}


def _read(file: Path, image: Path, shape: tuple[int, int] | None) -> tuple[np.ndarray, int, bool]:
    """Returns (bool [h, w], largest value of 255, whether there is an alpha channel)."""
    frame = load_frame(file, 1, keep_full=True)
    assert frame.full is not None
    if shape is not None and not _same_aspect((frame.height, frame.width), shape):
        raise DataError(
            f"{file}: a mask of {frame.width} x {frame.height} pixels does not fit {_name(image)} of {shape[1]} x "
            f"{shape[0]}; expected the image's size, or the same aspect ratio"
        )
    values = frame.full.amax(dim=0)
    return (values > 127).numpy(), int(values.max()), "alpha" in frame.kinds


def _same_aspect(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Returns whether both have the same aspect ratio, up to rounding a side to whole pixels."""
    return abs(mask[0] * image[1] - mask[1] * image[0]) < max(*mask, *image)


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
