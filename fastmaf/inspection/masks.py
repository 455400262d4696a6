"""Where the defects of labelled test images are: the masks in ``root/ground_truth``.

The mask of ``root/test/<class>/NAME.ext`` is ``root/ground_truth/<class>/NAME_mask.png`` or ``NAME.png``, read as every
other image is; a pixel is a defect where any channel is above 127 of 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmaf.capsule.data import ImageSet
from fastmaf.capsule.decoding import load_frame
from fastmaf.capsule.results import NORMAL


@dataclass(frozen=True, eq=False)
class Masks:
    """The masks of an ``ImageSet``, in its order.

    Attributes:
        masks: bool [h, w] at the resolution of the mask's file; None for an image of class "good", which has no defect
            anywhere, and for one whose mask is missing.
        missing: the defective images without a mask.
        notes: what was unusual, one sentence a kind.
    """

    masks: tuple[np.ndarray | None, ...]
    missing: tuple[Path, ...]
    notes: tuple[str, ...]

    def usable(self, images: ImageSet) -> np.ndarray:
        """Returns which of the images pixels are judged on, bool [n]: those whose defects are known.

        All False where no mask shows a defect, as there are then no pixel metrics.
        """
        known = [mask is not None or label == NORMAL for mask, label in zip(self.masks, images.labels, strict=True)]
        return np.array(known, dtype=bool) & any(mask is not None and bool(mask.any()) for mask in self.masks)


def load_masks(root: str | Path, images: ImageSet) -> Masks:
    """Reads the masks of a test set.

    Args:
        root: the data set's folder. Without ``root/ground_truth`` every mask is missing, which the notes say.
        images: what ``load_test`` read from it.

    Raises:
        DataError: a mask cannot be read; it is named.
    """
    folder = Path(root).expanduser() / "ground_truth"
    masks: list[np.ndarray | None] = []
    missing, empty, see_through = [], [], []
    for path, label in zip(images.paths, images.labels, strict=True):
        mask = None
        if label != NORMAL:
            file = _file(folder / label, path.stem)
            if file is None:
                missing.append(path)
            else:
                mask, largest, alpha = _read(file)
                if alpha:
                    see_through.append(_name(file))
                if not mask.any():
                    empty.append(f"{_name(file)} (largest value {largest} of 255)")
        masks.append(mask)
    notes = []
    if not folder.is_dir():
        notes.append(f"no folder {folder}: where the defects are is not known")
    elif missing:
        notes.append(f"no mask in {folder} for {_some([_name(path) for path in missing])}")
    if empty:
        notes.append(f"no defect (no value above 127) in the mask of a defective image: {_some(empty)}")
    if see_through:
        notes.append(f"transparent counts as white, a defect, in masks with an alpha channel: {_some(see_through)}")
    return Masks(tuple(masks), tuple(missing), tuple(notes))


def _file(folder: Path, stem: str) -> Path | None:
    return next((file for file in (folder / f"{stem}_mask.png", folder / f"{stem}.png") if file.is_file()), None)


def _read(file: Path) -> tuple[np.ndarray, int, bool]:
    """(bool [h, w], largest value of 255, whether there is an alpha channel)."""
    frame = load_frame(file, 1, keep_full=True)
    assert frame.full is not None
    values = frame.full.amax(dim=0)
    return (values > 127).numpy(), int(values.max()), "alpha" in frame.kinds


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _some(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
