"""The kinds of synthetic defects: each function takes a canvas and returns the changed image.

All lengths are in pixels of a 64-pixel image; ``Canvas.length`` and ``Canvas.unit`` convert them to pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from scipy.ndimage import gaussian_filter

from fastmaf.inspection.synthetic_defects.canvas import Array, Canvas

Points: TypeAlias = list[tuple[float, float]]


def _line(canvas: Canvas, y: float, x: float, heading: float, length: float, wander: float) -> Points:
    """Returns the points (y, x) of a line whose heading changes at random."""
    step = 2.0 * canvas.unit
    points = [(y, x)]
    for _ in range(max(2, round(length / step))):
        heading += wander * float(canvas.rng.standard_normal())
        y, x = y + step * float(np.sin(heading)), x + step * float(np.cos(heading))
        points.append((y, x))
    return points


def scratch(canvas: Canvas) -> Array:
    """One to three thin parallel lines, fading at their ends and in between."""
    rng, (y, x) = canvas.rng, canvas.place()
    heading, length = float(rng.uniform(0, 2 * np.pi)), canvas.length(5, 30)
    add, covered = canvas.colour(y, x), np.zeros(canvas.shape, dtype=np.float32)
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        turn, extent = heading + 0.08 * float(rng.standard_normal()), length * float(rng.uniform(0.6, 1.0))
        aside = canvas.unit * rng.normal(0, 1.5, 2)
        start = y + aside[0] - extent / 2 * float(np.sin(turn)), x + aside[1] - extent / 2 * float(np.cos(turn))
        points = _line(canvas, *start, turn, extent, 0.06)
        n = len(points) - 1
        fade = np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 0.5 * rng.uniform(0.4, 1.0, n)
        width = canvas.length(0.8, 2.0)
        covered = np.maximum(covered, canvas.stroke(points, [width] * n, fade.tolist()))
    return canvas.image + covered[..., None] * add


def crack(canvas: Canvas) -> Array:
    """A jagged dark line that tapers, with up to two branches."""
    rng, (y, x) = canvas.rng, canvas.place()
    heading, length, width = float(rng.uniform(0, 2 * np.pi)), canvas.length(5, 26), canvas.length(0.8, 1.8)
    points = _line(canvas, y, x, heading, length, 0.55)
    lines = [(points, width)]
    for _ in range(int(rng.integers(0, 3))):
        turn = heading + float(rng.choice([-1, 1]) * rng.uniform(0.5, 1.2))
        from_ = points[int(rng.integers(1, len(points)))]
        lines.append((_line(canvas, *from_, turn, length * float(rng.uniform(0.2, 0.5)), 0.5), 0.7 * width))
    covered = np.zeros(canvas.shape, dtype=np.float32)
    for line, widest in lines:
        widths = np.linspace(widest, 0.5 * widest, len(line) - 1)
        covered = np.maximum(covered, canvas.stroke(line, widths.tolist(), [1.0] * len(widths)))
    return canvas.image + covered[..., None] * canvas.colour(y, x, sign=-1)


def spot(canvas: Canvas) -> Array:
    """A small pit or particle, often with a rim of opposite brightness; sometimes two."""
    rng, (y, x) = canvas.rng, canvas.place()
    add, changed = canvas.colour(y, x), canvas.image
    rim = 0.5 * float(rng.random()) if rng.random() < 0.5 else 0.0
    radius = canvas.length(0.75, 2.5)
    for _ in range(1 + int(rng.random() < 0.3)):
        pit = canvas.blob(y, x, radius, soft=canvas.unit)
        around = canvas.blob(y, x, radius + canvas.unit, soft=canvas.unit) * (1 - pit)
        changed = changed + (pit - rim * around)[..., None] * add
        y += 3 * radius * float(rng.uniform(-1, 1))
        x += 3 * radius * float(rng.uniform(-1, 1))
        radius /= 2
    return changed


def stain(canvas: Canvas) -> Array:
    """A wide, faint, tinted, uneven patch."""
    rng, (y, x) = canvas.rng, canvas.place()
    add = 0.4 * canvas.colour(y, x, tint=0.6)
    covered = canvas.blob(y, x, canvas.length(3.5, 11), soft=canvas.length(1, 4))
    uneven = gaussian_filter(rng.standard_normal(canvas.shape), 2 * canvas.unit) * 2 * canvas.unit
    return canvas.image + (covered * (1 + 0.4 * uneven))[..., None] * add


def erased(canvas: Canvas) -> Array:
    """Worn-off print or relief: a patch filled, fully or partly, from its surroundings."""
    rng, (y, x) = canvas.rng, canvas.place_on_structure()
    covered = canvas.blob(y, x, canvas.length(1.5, 6), soft=canvas.unit)
    known = 1 - (covered > 0.02)
    wide = canvas.length(2, 6)
    weight = gaussian_filter(known.astype(np.float32), wide)[..., None]
    filled = gaussian_filter(canvas.image * known[..., None], (wide, wide, 0)) / np.maximum(weight, 1e-6)
    if rng.random() < 0.5:  # one colour: the median around the patch
        near = canvas.blob(y, x, canvas.length(8, 10), soft=0.0, rough=0.0) > 0.5
        ring = canvas.image[near & (known > 0)]
        filled = np.broadcast_to(np.median(ring, axis=0), filled.shape) if len(ring) else filled
    share = min(1.0, canvas.boost * float(rng.uniform(0.1, 1.0)))
    return canvas.image + share * covered[..., None] * (filled - canvas.image)


def pasted(canvas: Canvas) -> Array:
    """A patch from another position in a good image."""
    rng, (y, x) = canvas.rng, canvas.place()
    covered = canvas.blob(y, x, canvas.length(1.25, 6), soft=canvas.unit)
    y0, x0 = Canvas(canvas.donor, canvas.donor, rng, 1.0).place()
    shift = int(y) - int(y0), int(x) - int(x0)
    rows = np.clip(np.arange(canvas.shape[0]) - shift[0], 0, canvas.shape[0] - 1)
    columns = np.clip(np.arange(canvas.shape[1]) - shift[1], 0, canvas.shape[1] - 1)
    share = min(1.0, canvas.boost * float(rng.uniform(0.1, 1.0)))
    return canvas.image + share * covered[..., None] * (canvas.donor[rows][:, columns] - canvas.image)


def smear(canvas: Canvas) -> Array:
    """A patch that is displaced, smeared or doubled."""
    rng, (y, x) = canvas.rng, canvas.place_on_structure()
    covered = canvas.blob(y, x, canvas.length(2.5, 8), soft=2 * canvas.unit)[..., None]
    heading, far = float(rng.uniform(0, 2 * np.pi)), canvas.length(0.7, 4) * canvas.boost
    dy, dx = np.full(canvas.shape, far * np.sin(heading)), np.full(canvas.shape, far * np.cos(heading))
    how, share = rng.random(), 1.0
    if 0.35 <= how < 0.65:
        changed = np.mean([canvas.warped(k / 4 * dy, k / 4 * dx) for k in range(5)], axis=0)
    else:
        changed = canvas.warped(dy, dx)
        share = 1.0 if how < 0.35 else float(rng.uniform(0.25, 0.7))
    return canvas.image + share * covered * (changed - canvas.image)


def dent(canvas: Canvas) -> Array:
    """A smooth displacement of the outline inwards or outwards, or a pinched or spread region."""
    rng = canvas.rng
    form = gaussian_filter(canvas.object.astype(np.float32), 1.5 * canvas.unit, mode="nearest")
    gy, gx = np.gradient(form)
    steep = np.hypot(gy, gx)
    y, x = canvas.place(np.where(steep > 0.3 * steep.max(), steep, 0) if steep.max() > 0 else canvas.contrast)
    wide, far = canvas.length(2.5, 9), canvas.length(0.5, 4) * canvas.boost
    rows, columns = np.mgrid[: canvas.shape[0], : canvas.shape[1]] + 0.5
    bump = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * wide**2))
    if rng.random() < 0.7:
        at = canvas.pixel(y, x)
        heading = float(np.arctan2(gy[at], gx[at])) + 0.3 * float(rng.standard_normal())
        far = far if rng.random() < 0.7 else -far  # the gradient points into the object
        dy, dx = far * np.sin(heading) * bump, far * np.cos(heading) * bump
    else:
        far = (far if rng.random() < 0.5 else -far) / wide
        dy, dx = far * (rows - y) * bump, far * (columns - x) * bump
    return canvas.warped(dy, dx)


def rough(canvas: Canvas) -> Array:
    """A patch of noise, like a rough or dusty surface."""
    rng, (y, x) = canvas.rng, canvas.place()
    strength = 0.3 * float(np.abs(canvas.colour(y, x)).max())  # its peaks are three times as high
    covered = canvas.blob(y, x, canvas.length(2, 8), soft=2 * canvas.unit)
    noise = gaussian_filter(rng.standard_normal(canvas.shape), canvas.length(0.35, 1.2))
    noise = noise / max(float(noise.std()), 1e-6)
    return canvas.image + strength * (covered * noise)[..., None]


BRUSHES: Mapping[str, Callable[[Canvas], Array]] = MappingProxyType(
    {brush.__name__: brush for brush in (scratch, crack, spot, stain, erased, pasted, smear, dent, rough)}
)
