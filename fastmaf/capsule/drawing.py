"""Drawing of a synthetic capsule: its scene, its background and its shaded surface.

Lengths are in units of 1/192 of the picture's side. Coordinates are u along the capsule's axis (to the right) and v
across (down). The outline is a pair of half-widths ``top(u)``, ``bottom(u)``. The capsule is shaded on a grid at least
twice as fine as the picture, averaged down and composited over a background with a soft shadow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fastmaf.capsule.imprint import imprint, sample

Array = np.ndarray
Points = list[tuple[float, float]]
Colour = Sequence[float] | Array  # red, green and blue in grey levels

HALF, RADIUS, SEAM = 81.0, 25.8, 2.0  # half length, radius of the body, position of the cap's edge
_LIP = 0.9  # difference of the radii of cap and body
_CAP, _BODY = (20.0, 20.0, 23.0), (150.0, 80.0, 62.0)


def _gauss(rng: np.random.Generator) -> float:
    """Draws from a normal distribution clipped at 2.5 sigma, so that no capsule leaves the picture."""
    return float(np.clip(rng.normal(), -2.5, 2.5))


@dataclass(frozen=True)
class Scene:
    """Pose, light and colours of one capsule without defects."""

    size: int
    centre: tuple[float, float]
    angle: float  # radians
    number: tuple[float, float]  # of the imprint on the body: its centre along u and around the axis (arc length)
    name: tuple[float, float]  # the same for the cap
    cap: Array
    body: Array
    light: Array  # gain of each colour channel
    tilt: tuple[float, float]  # change of the light from one side of the picture to the other, in grey levels
    gloss: tuple[float, float]  # position across (-1..1) and strength of the long highlight
    dust: tuple[tuple[float, float, float, float], ...]  # x, y, radius, grey levels

    @staticmethod
    def draw(rng: np.random.Generator, size: int) -> Scene:
        """Draws a random scene for a picture of ``size`` pixels."""
        dust = [
            (*rng.uniform(4, 188, 2).tolist(), float(rng.uniform(0.35, 0.8)), float(rng.uniform(-45, -8)))
            for _ in range(rng.poisson(2.5))
        ]
        return Scene(
            size=size,
            centre=(96.5 + 1.1 * _gauss(rng), 95.5 + 0.8 * _gauss(rng)),
            angle=float(np.deg2rad(0.8 * _gauss(rng))),
            number=(33.0 + 0.8 * _gauss(rng), 7.0 * _gauss(rng)),
            name=(-27.0 + 1.0 * _gauss(rng), float(rng.uniform(-np.pi, np.pi)) * RADIUS),
            cap=np.array(_CAP) + 1.0 * _gauss(rng),
            body=np.array(_BODY) * (1 + 0.025 * _gauss(rng)) + rng.normal(0, 1.0, 3),
            light=(1 + 0.015 * _gauss(rng)) * (1 + rng.normal(0, 0.005, 3)),
            tilt=(2.5 * _gauss(rng), 2.0 * _gauss(rng)),
            gloss=(0.05 + 0.03 * _gauss(rng), float(rng.uniform(0.7, 1.3))),
            dust=tuple(dust),
        )


@dataclass
class Change:
    """The changes of a defect to a capsule; by default none."""

    top: Array | None = None  # factor on the upper outline along AXIS
    bottom: Array | None = None
    bites: list[tuple[float, float, float]] = field(default_factory=list)  # u, v, radius cut out of the outline
    relief: Array | None = None  # added to the brightness factor, on the fine grid
    paint: list[tuple[Array, Colour, Colour]] = field(default_factory=list)  # cover (0..1), colour on cap, on body
    number: Array | None = None  # replaces the imprint's texture


AXIS = np.linspace(-HALF - 4, HALF + 4, 1361)  # steps of 1/8 unit


class Grid:
    """The fine grid over the rows of the picture that hold the capsule, in the capsule's coordinates."""

    def __init__(self, scene: Scene) -> None:
        size, (cx, cy) = scene.size, scene.centre
        self.scale = max(2, round(2 * 192 / size))
        self.step = 192.0 / (size * self.scale)
        reach = 34.0 + abs(np.sin(scene.angle)) * HALF
        self.rows = slice(max(0, int((cy - reach) * size / 192)), min(size, int((cy + reach) * size / 192) + 1))
        y = (np.arange(self.rows.start * self.scale, self.rows.stop * self.scale) + 0.5) * self.step - cy
        x = (np.arange(size * self.scale) + 0.5) * self.step - cx
        self.cos, self.sin, self.centre = float(np.cos(scene.angle)), float(np.sin(scene.angle)), (cx, cy)
        self.u = (x[None, :] * self.cos + y[:, None] * self.sin).astype(np.float32)
        self.v = (y[:, None] * self.cos - x[None, :] * self.sin).astype(np.float32)

    def down(self, fine: Array) -> Array:
        """Averages each scale x scale block of the last two axes."""
        k = self.scale
        total = np.zeros((*fine.shape[:-2], fine.shape[-2] // k, fine.shape[-1] // k), dtype=np.float32)
        for i in range(k):
            for j in range(k):
                total += fine[..., i::k, j::k]
        return total / k**2

    def strokes(self, lines: list[tuple[Points, float]]) -> Array:
        """Returns the coverage (0..1) of lines (points in u, v; width); a line of width 0 is a filled polygon."""
        canvas = Image.new("L", self.u.shape[::-1])
        pen = ImageDraw.Draw(canvas)
        for points, width in lines:
            at = [self._pixel(u, v) for u, v in points]
            if width:
                pen.line(at, fill=255, width=max(1, round(width / self.step)), joint="curve")
            else:
                pen.polygon(at, fill=255)
        soft = canvas.filter(ImageFilter.GaussianBlur(0.25 / self.step))
        return np.asarray(soft, dtype=np.float32) / 255.0

    def filled(self, outline: Points) -> Array:
        """Returns the coverage (0..1) of a polygon."""
        return self.strokes([(outline, 0.0)])

    def _pixel(self, u: float, v: float) -> tuple[float, float]:
        x, y = u * self.cos - v * self.sin + self.centre[0], u * self.sin + v * self.cos + self.centre[1]
        return x / self.step - 0.5, y / self.step - 0.5 - self.rows.start * self.scale


def compose(scene: Scene, grid: Grid, ground: Array, change: Change) -> Array:
    """Composites the capsule over its background, without sensor noise: float32 [size, size, 3]."""
    colour, cover = _capsule(scene, grid, change)
    picture = ground.copy()
    alpha = grid.down(cover)
    picture[:, grid.rows] = picture[:, grid.rows] * (1 - alpha) + grid.down(colour * cover)
    picture *= _planes(scene.light)
    wide = np.pad(picture, ((0, 0), (1, 1), (0, 0)), mode="edge")  # the lens: neighbours share a little light
    picture = 0.64 * picture + 0.18 * (wide[:, :-2] + wide[:, 2:])
    wide = np.pad(picture, ((0, 0), (0, 0), (1, 1)), mode="edge")
    picture = 0.64 * picture + 0.18 * (wide[:, :, :-2] + wide[:, :, 2:])
    return np.ascontiguousarray(picture.transpose(1, 2, 0))


def background(scene: Scene) -> Array:
    """Draws light grey paper with the capsule's soft shadow and glow: [3, size, size]."""
    size, (cx, cy) = scene.size, scene.centre
    at = ((np.arange(size) + 0.5) * 192.0 / size).astype(np.float32)
    x, y = at[None, :] - np.float32(cx), at[:, None] - np.float32(cy)
    c, s = np.float32(np.cos(scene.angle)), np.float32(np.sin(scene.angle))
    u, v = x * c + y * s, y * c - x * s
    past = np.maximum(np.abs(u) - (HALF - RADIUS), 0)
    away = np.maximum(np.hypot(past, v) - RADIUS, 0)
    above = 1 / (1 + np.exp(v / 9))
    shadow = 0.28 * np.exp(-away / 5) + (0.10 + 0.10 * above) * np.exp(-away / 15)
    level = 216 - 9 * y / 96 + scene.tilt[0] * x / 96 + scene.tilt[1] * y / 96
    level -= 5 * ((x / 96) ** 2 + (y / 96) ** 2)
    glow = np.exp(-away / 14) * (0.25 + 0.75 * above) / (1 + np.exp(-(u - SEAM - 6) / 7)) * (u < HALF + 25)
    paper = np.stack([level + 1.0, level, level + 0.8 - 2.0 * y / 96]) * (1 - shadow)
    paper += glow * _planes((16.0, -9.0, -7.0))
    for dx, dy, radius, dark in scene.dust:
        paper += dark * np.exp(-(((at[None, :] - dx) / radius) ** 2 + ((at[:, None] - dy) / radius) ** 2))
    return paper.astype(np.float32)


def _outline(radius: float) -> Array:
    """Returns the half-width along AXIS: straight sides, round ends, 0 beyond them."""
    past = np.maximum(np.abs(AXIS) - (HALF - RADIUS), 0) / RADIUS
    return radius * np.sqrt(np.maximum(1 - past**2, 0))


def _planes(colour: Colour) -> Array:
    """Converts a colour to float32 [3, 1, 1]."""
    return np.asarray(colour, dtype=np.float32)[:, None, None]


def _capsule(scene: Scene, grid: Grid, change: Change) -> tuple[Array, Array]:
    """Shades the capsule on the fine grid: colour [3, .., ..] in grey levels and coverage [.., ..] (0..1)."""
    u, v, step = grid.u, grid.v, grid.step
    widths = np.where(AXIS < SEAM, _outline(RADIUS + _LIP), _outline(RADIUS))
    top = widths if change.top is None else widths * change.top
    bottom = widths if change.bottom is None else widths * change.bottom
    half, slope = _along(u, top), _along(u, np.gradient(top, AXIS))
    if top is not bottom:
        half = np.where(v < 0, half, _along(u, bottom))
        slope = np.where(v < 0, slope, _along(u, np.gradient(bottom, AXIS)))
    cover = np.clip((half - np.abs(v)) / (step * np.sqrt(1 + slope * slope)) + 0.5, 0, 1) * (half > 0)
    for bu, bv, radius in change.bites:
        cover *= np.clip((np.hypot(u - bu, v - bv) - radius) / step + 0.5, 0, 1)

    across = np.clip(v / np.maximum(half, 1e-3), -1, 1)
    end = np.clip((np.abs(u) - (HALF - RADIUS)) / RADIUS, 0, 1)
    nv = across * np.sqrt(1 - end * end)
    nz = np.sqrt(np.maximum(1 - nv * nv - end * end, 0))
    rim = 1 - nz
    rim *= rim
    # Light from all around above: the middle is brightest, the sides fall off, the lower side a little more.
    soft = 0.66 + 0.34 * nz**0.8 - 0.05 * nv
    soft += 0.14 * _bump((nv + 0.42) / 0.20, (u - 52) / 24)
    line = _bump((nv - scene.gloss[0]) / 0.035) * scene.gloss[1]
    line *= (0.75 + 0.25 * np.sin(u / 3.1 + 9 * scene.gloss[1])) * (1 - end) ** 2
    glint = line * 7 + 14 * _bump((u + 66) / 5, (nv + 0.15) / 0.45) + 26 * end**3 + 16 * nv**6
    glint += 12 * _bump((u - SEAM + 0.7) / 0.5)  # the cap's edge, a bright hairline
    if change.relief is not None:
        soft += change.relief
        glint += 60 * change.relief
    body = _planes(scene.body) * soft + line * 15
    body += (rim * rim * 20 + end * end * 10) * _planes((0.6, 1.0, 1.0))
    body *= 1 - 0.38 * np.exp(np.minimum(SEAM - u, 0) / 1.1)  # the edge's thin shadow on the body
    cap = np.maximum(_planes(scene.cap) + glint, 3)

    arc = np.arcsin(across) * RADIUS
    number = imprint("500") if change.number is None else change.number
    ink = 0.62 * sample(number, u - scene.number[0], arc - scene.number[1])
    body += ink * (_planes((188.0, 160.0, 152.0)) * (0.55 + 0.45 * nz) - body)
    ink = 0.55 * sample(imprint("FM", 13.0, 1.2), u - scene.name[0], arc - scene.name[1])
    cap += ink * (_planes((118.0, 128.0, 132.0)) * (0.45 + 0.55 * nz) - cap)

    for covered, colour_cap, colour_body in change.paint:
        cap += covered * (_planes(colour_cap) - cap)
        body += covered * (_planes(colour_body) - body)
    cap -= body
    return body + np.clip((SEAM - u) / step + 0.5, 0, 1) * cap, cover


def _along(u: Array, curve: Array) -> Array:
    """Evaluates a curve over AXIS at the nearest points."""
    place = np.rint((u - AXIS[0]) * ((len(AXIS) - 1) / float(AXIS[-1] - AXIS[0]))).astype(np.int32)
    return curve.astype(np.float32)[np.clip(place, 0, len(AXIS) - 1)]


def _bump(a: Array, b: Array | None = None) -> Array:
    """Returns exp(-a^2 - b^2)."""
    return np.exp(-a * a if b is None else -a * a - b * b)
