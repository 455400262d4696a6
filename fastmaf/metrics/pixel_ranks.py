"""The pixels of a labelled test set, ranked by an anomaly map, at the resolution of the masks.

Areas under curves depend on defect-free pixels only through their number between the values of defect pixels. So each
image's pixels are counted there and discarded: exact over all thresholds, and the memory is that of the defect pixels
and one image, at any resolution of the masks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from fastmaf.metrics.results import EvaluationError


def resize_map(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resizes a map [s, t] bilinearly to float64 [h, w]: half-pixel centres, repeated edges, no antialiasing.

    As ``torch.nn.functional.interpolate`` with ``align_corners=False``. Equal neighbours give exactly their value, so
    that rounding does not break ties.
    """
    out = np.asarray(values, dtype=np.float64)
    if out.ndim != 2 or out.size == 0 or min(shape) < 1:
        raise EvaluationError(f"a map [s, t] is resized to [h, w], none of them 0; found {list(out.shape)} to {shape}")
    for axis, length in enumerate(shape):
        size = out.shape[axis]
        if size != length:
            at = (np.arange(length) + 0.5) * (size / length) - 0.5
            out = np.apply_along_axis(partial(np.interp, at, np.arange(size)), axis, out)
    return out


class PixelRanks:
    """The distinct values of the K' defect pixels, and the positions of each image's defect-free pixels among them.

    K distinct values have 2K + 1 slots, in ascending order: slot 2k + 1 is value k itself, slot 2k the gap below it.

    Args:
        maps: an anomaly map [s, t] per image.
        masks: bool [h, w] per image, or None for an image without a defect.

    Attributes:
        codes: [K'] index of each defect pixel's value; image by image, in row-major order.
        image: [K'] index of each defect pixel's image.
    """

    def __init__(self, maps: Sequence[np.ndarray], masks: Sequence[np.ndarray | None]) -> None:
        if len(maps) != len(masks):
            raise EvaluationError(f"each map needs its mask, or None; found {len(maps)} maps and {len(masks)} masks")
        self.maps = maps
        self.masks = [None if mask is None else np.asarray(mask, dtype=bool) for mask in masks]
        for i, (values, mask) in enumerate(zip(maps, self.masks, strict=True)):
            if np.ndim(values) != 2 or not np.isfinite(values).all():
                found = f"found map {i} of shape {list(np.shape(values))}"
                raise EvaluationError(f"maps must be finite and have 2 axes; {found}")
            if mask is not None and mask.ndim != 2:
                raise EvaluationError(f"masks must have 2 axes; mask {i} has shape {list(mask.shape)}")
        given = [mask for mask in self.masks if mask is not None]
        if not any(mask.any() for mask in given):
            raise EvaluationError(f"pixel metrics need defects in masks; found none in {len(given)} masks")
        if len(given) == len(maps) and all(mask.all() for mask in given):
            raise EvaluationError("pixel metrics need defect-free pixels; found none in any mask")
        shapes = Counter((mask.shape[0], mask.shape[1]) for mask in given)
        self.shape = shapes.most_common(1)[0][0]
        defects = [self._resized(i)[mask] for i, mask in enumerate(self.masks) if mask is not None]
        self.values, self.codes = np.unique(np.concatenate(defects), return_inverse=True)
        counts = [0 if mask is None else int(mask.sum()) for mask in self.masks]
        self.image = np.repeat(np.arange(len(maps)), counts)

    def _resized(self, i: int) -> np.ndarray:
        mask = self.masks[i]
        return resize_map(self.maps[i], self.shape if mask is None else (mask.shape[0], mask.shape[1]))

    def spread(self, weights: np.ndarray) -> np.ndarray:
        """Returns the weights [K'] of the defect pixels, summed in their slots [2K + 1]."""
        return np.bincount(2 * self.codes + 1, weights=weights, minlength=2 * len(self.values) + 1)

    def free(self) -> Iterator[np.ndarray]:
        """Yields the number of defect-free pixels of each image in each slot, int64 [2K + 1]."""
        for i, mask in enumerate(self.masks):
            values = self._resized(i)
            values = np.sort(values.ravel() if mask is None else values[~mask])  # sorted keys are found much faster
            above = np.searchsorted(self.values, values)
            equal = self.values[np.minimum(above, len(self.values) - 1)] == values
            yield np.bincount(2 * above + equal, minlength=2 * len(self.values) + 1)

    def total(self) -> np.ndarray:
        """Returns the sum of ``free`` over the images."""
        return np.asarray(sum(self.free()))
