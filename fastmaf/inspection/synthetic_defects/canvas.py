"""An image to draw a defect onto: its object, its local contrast, and lines, blobs and displacements.

Lengths are in pixels of a 64-pixel image and scale with the square root of the area (``Canvas.unit``). Lines and blobs
are drawn at four times the resolution and averaged, for subpixel positions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import map_coordinates, uniform_filter

Array = np.ndarray
FINE = 4
WEAKEST, STRONGEST = 6.0, 80.0
"""Range of the brightness change of a line or spot, in grey levels."""


@dataclass(frozen=True, eq=False)
class Canvas:
    """One good image and its properties that drawing a defect needs.

    Attributes:
        image: float32 [h, w, 3], grey levels.
        donor: another good image, or the same one, likewise.
        rng: of this defect.
        boost: factor on the strength; above 1 if the previous attempt was not visible enough.
    """

    image: Array
    donor: Array
    rng: np.random.Generator
    boost: float

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w), in pixels."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def unit(self) -> float:
        """One pixel of a 64-pixel image, in pixels of this image."""
        return math.sqrt(math.prod(self.shape)) / 64

    @functools.cached_property
    def contrast(self) -> Array:
        """Local standard deviation of the grey levels, float32 [h, w]."""
        wide = max(3, round(5 * self.unit))
        grey = self.image.mean(axis=2)
        grey = grey - grey.mean()  # reduces cancellation
        square = uniform_filter(grey * grey, wide, mode="nearest") - uniform_filter(grey, wide, mode="nearest") ** 2
        return np.sqrt(np.maximum(square, 0))

    @functools.cached_property
    def object(self) -> Array:
        """Pixels of above-average contrast or distance from the border colour: bool [h, w], possibly empty."""
        border = np.concatenate([self.image[0], self.image[-1], self.image[:, 0], self.image[:, -1]])
        unlike = np.abs(self.image - np.median(border, axis=0)).max(axis=2)
        busy = uniform_filter(unlike, max(1, round(3 * self.unit)), mode="nearest") + self.contrast
        return busy > busy.mean()

    def place(self, weight: Array | None = None) -> tuple[float, float]:
        """Returns a random point (y, x), by weights [h, w]; by default on the object, in 10% of cases anywhere."""
        if weight is None:
            weight = self.object if self.rng.random() > 0.1 else np.zeros_like(self.contrast)
        total = np.cumsum(weight, dtype=np.float64)
        if not total[-1] > 0:
            total = np.arange(1.0, self.contrast.size + 1)
        index = int(np.searchsorted(total, self.rng.random() * total[-1], side="right"))
        y, x = divmod(min(index, self.contrast.size - 1), self.shape[1])
        return y + float(self.rng.random()), x + float(self.rng.random())

    def place_on_structure(self) -> tuple[float, float]:
        """Returns a random point on the object where it has contrast, so that a displacement is visible."""
        return self.place(np.where(self.object, self.contrast, 0))

    def pixel(self, y: float, x: float) -> tuple[int, int]:
        """Returns the indices of the pixel at a point."""
        return min(int(y), self.shape[0] - 1), min(int(x), self.shape[1] - 1)

    def length(self, low: float, high: float) -> float:
        """Returns a log-uniform random length in pixels; bounds in pixels of a 64-pixel image."""
        return self.unit * low * float((high / low) ** self.rng.random())

    def colour(self, y: float, x: float, sign: int = 0, tint: float = 0.15) -> Array:
        """Returns a random colour offset for a point, float32 [3], relative to the local contrast.

        ``sign`` (0 for random) is flipped if there is too little range left between black and white.
        """
        at = self.pixel(y, x)
        relative = float(np.exp(self.rng.uniform(np.log(0.3), np.log(4.0))))
        strength = self.boost * float(np.clip(relative * (7 + 0.6 * float(self.contrast[at])), WEAKEST, STRONGEST))
        sign = sign or (1 if self.rng.random() < 0.5 else -1)
        level = float(self.image[at].mean())
        if (255 - level if sign > 0 else level) < min(strength, 100):
            sign = -sign
        lean = 1 + tint * self.rng.standard_normal(3)
        return (sign * strength * lean / np.abs(lean).max()).astype(np.float32)

    def stroke(self, points: Sequence[tuple[float, float]], widths: Sequence[float], opacity: Sequence[float]) -> Array:
        """Returns the coverage of a line through points (y, x), float32 [h, w]; width and opacity per segment."""
        height, width = (FINE * side for side in self.shape)
        fine = np.zeros((height, width), dtype=np.float32)
        for (y0, x0), (y1, x1), wide, alpha in zip(points, points[1:], widths, opacity, strict=False):
            ay, ax, by, bx, half = (FINE * value for value in (y0, x0, y1, x1, wide / 2))
            reach = half + 1
            top, bottom = _inside(min(ay, by) - reach, max(ay, by) + reach, height)
            left, right = _inside(min(ax, bx) - reach, max(ax, bx) + reach, width)
            y, x = np.mgrid[top:bottom, left:right] + 0.5
            dy, dx = by - ay, bx - ax
            along = np.clip(((y - ay) * dy + (x - ax) * dx) / max(dy * dy + dx * dx, 1e-9), 0, 1)
            away = np.hypot(y - ay - along * dy, x - ax - along * dx)
            part = fine[top:bottom, left:right]
            np.maximum(part, alpha * np.clip(half - away + 0.5, 0, 1), out=part, casting="same_kind")
        return _reduced(fine)

    def blob(self, y: float, x: float, radius: float, soft: float, rough: float = 0.25) -> Array:
        """Returns the coverage of an irregular blob with a rim of width ``soft``, float32 [h, w]; lengths in pixels."""
        waves = [(k, rough / k * self.rng.standard_normal(), self.rng.uniform(0, 2 * np.pi)) for k in range(1, 5)]
        height, width = (FINE * side for side in self.shape)
        reach = radius * (1 + sum(abs(high) for _, high, _ in waves)) + soft
        fine = np.zeros((height, width), dtype=np.float32)
        top, bottom = _inside(FINE * (y - reach), FINE * (y + reach), height)
        left, right = _inside(FINE * (x - reach), FINE * (x + reach), width)
        rows, columns = np.mgrid[top:bottom, left:right]
        dy, dx = (rows + 0.5) / FINE - y, (columns + 0.5) / FINE - x
        turn = np.arctan2(dy, dx)
        edge = 1 + sum(high * np.cos(k * turn + phase) for k, high, phase in waves)
        away = radius * np.maximum(edge, 0.3) - np.hypot(dy, dx)
        ramp = np.clip(away / max(soft, 1 / FINE) + 0.5, 0, 1)
        fine[top:bottom, left:right] = ramp * ramp * (3 - 2 * ramp)
        return _reduced(fine)

    def warped(self, dy: Array, dx: Array) -> Array:
        """Returns the image [h, w, 3] displaced: the value at (y, x) is that at (y - dy, x - dx)."""
        rows, columns = np.mgrid[: self.shape[0], : self.shape[1]]
        at = np.stack([rows - dy, columns - dx])
        return np.stack([map_coordinates(self.image[..., c], at, order=3, mode="nearest") for c in range(3)], axis=2)


def _inside(low: float, high: float, side: int) -> tuple[int, int]:
    return min(max(int(low), 0), side), min(max(int(high) + 1, 0), side)


def _reduced(fine: Array) -> Array:
    height, width = (side // FINE for side in fine.shape)
    return fine.reshape(height, FINE, width, FINE).mean(axis=(1, 3))
