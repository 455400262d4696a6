"""Synthetic defects of the drawn capsule: cracks, faulty imprints, pokes, scratches and squeezes.

A defect is a ``Change`` of one capsule, of random kind, place and severity. Lengths are in units of 1/192 of the
picture's side, as in ``fastmaf.capsule.drawing``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from fastmaf.capsule.drawing import (
    AXIS,
    HALF,
    RADIUS,
    SEAM,
    Array,
    Change,
    Grid,
    Points,
    Scene,
    background,
    compose,
)
from fastmaf.capsule.imprint import TEXELS, imprint


def _jagged(rng: np.random.Generator, u: float, v: float, heading: float, length: float, wander: float) -> Points:
    """Draws a random walk on the visible face, from (u, v) in a direction in radians."""
    points = [(u, v)]
    for _ in range(max(2, round(length / 2.5))):
        heading += rng.normal(0.0, wander)
        u, v = u + 2.5 * float(np.cos(heading)), v + 2.5 * float(np.sin(heading))
        points.append((u, v))
    return points


def _blob(rng: np.random.Generator, u: float, v: float, radius: float, rough: float) -> Points:
    """Returns a closed irregular outline."""
    turns = np.sort(rng.uniform(0, 2 * np.pi, 11))
    far = radius * np.exp(rng.normal(0, rough, 11))
    long, tilt = rng.uniform(1.0, 1.5), rng.uniform(0, np.pi)
    a, b = far * np.cos(turns) * long, far * np.sin(turns) / long
    return list(zip(u + a * np.cos(tilt) - b * np.sin(tilt), v + a * np.sin(tilt) + b * np.cos(tilt), strict=True))


def _blotches(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> Array:
    """Returns smooth noise in 0..1 with patches about ``cell`` pixels wide."""
    rows, columns = shape
    few = rng.integers(0, 256, (int(rows / cell) + 3, int(columns / cell) + 3), dtype=np.uint8)
    wide = Image.fromarray(few).resize((columns, rows), Image.Resampling.BICUBIC)
    return np.asarray(wide, dtype=np.float32) / 255.0


def _place(rng: np.random.Generator) -> tuple[float, float]:
    """Returns a random point on the visible face, away from its edge."""
    return float(rng.uniform(-68, 68)), float(rng.uniform(-0.7, 0.7)) * RADIUS


def _crack(rng: np.random.Generator, scene: Scene, grid: Grid) -> Change:
    """A broken line with branches, a chip out of the shell, or a notch in the cap's edge."""
    severity = float(rng.uniform()) ** 1.2
    kind = rng.choice(["line", "chip", "notch"], p=[0.45, 0.3, 0.25])
    u, v = _place(rng)
    change = Change()
    if kind == "notch":
        u, depth, width = SEAM, 3 + 11 * severity, 1.5 + 5 * severity
        tip = (u - depth, v + float(rng.normal(0, 2)))
        side = (u - depth * 0.5, v + width * float(rng.uniform(0.2, 0.9)))
        gap = grid.filled([(u + 0.3, v - width), tip, side, (u + 0.3, v + width)])
        change.paint.append((gap, (118, 62, 48), scene.body * 0.8))
        u, v = tip
        heading = np.pi + float(rng.normal(0, 0.5))
    else:
        heading = float(rng.uniform(0, 2 * np.pi))
    if kind == "chip":
        radius = 2.0 + 6.0 * severity
        hole = _blob(rng, u, v, radius, 0.3)
        inner = [(u + 0.75 * (a - u) + 0.5, v + 0.75 * (b - v) + 0.6) for a, b in hole]
        change.paint.append((0.85 * grid.filled(hole), (8, 7, 8), (92, 42, 32)))
        powder = grid.filled(inner) * (0.35 + 0.65 * _blotches(rng, grid.u.shape, 7))
        change.paint.append((powder, rng.choice([(172, 96, 76), (186, 180, 174)]), (222, 196, 184)))
    length = (6 + 34 * severity) * (1.0 if kind == "line" else 0.5)
    lines = [(_jagged(rng, u, v, heading, length, 0.45), 0.5 + 0.8 * severity)]
    for _ in range(int(rng.integers(0, 3))):
        at = lines[0][0][int(rng.integers(1, len(lines[0][0])))]
        turn = float(rng.choice([-1, 1]) * rng.uniform(0.5, 1.1))
        lines.append((_jagged(rng, *at, heading + turn, length * float(rng.uniform(0.2, 0.5)), 0.45), 0.5))
    strength = 0.3 + 0.65 * severity
    rim = [([(a + 0.4, b + 0.9) for a, b in points], width) for points, width in lines]
    change.paint.append((0.6 * strength * grid.strokes(rim), (92, 92, 96), (206, 152, 134)))
    change.paint.append((strength * grid.strokes(lines), rng.choice([(150, 88, 70), (150, 148, 146)]), (58, 26, 20)))
    return change


def _faulty_imprint(rng: np.random.Generator, scene: Scene, grid: Grid) -> Change:
    """The number worn off in places, smeared, printed twice, pale or missing, or printed askew."""
    severity = float(rng.uniform()) ** 1.2
    flat = imprint("500")
    tall, wide = flat.shape
    kind = rng.choice(["worn", "smeared", "double", "missing", "askew"], p=[0.45, 0.2, 0.15, 0.1, 0.1])
    where = float(rng.uniform(0.2, 0.8)) * wide
    near = np.exp(-(((np.arange(wide) - where) / (wide * (0.08 + 0.25 * severity))) ** 2)).astype(np.float32)[None, :]
    if kind == "worn":
        holes = np.clip((_blotches(rng, flat.shape, 2.2 * TEXELS) - 0.62 + 0.3 * severity) * 6, 0, 1)
        changed = flat * (1 - near * holes)
    elif kind == "smeared":
        reach = int((1 + 5 * severity) * TEXELS)
        turn = 1 if rng.uniform() < 0.5 else 0
        drag = np.mean([np.roll(flat, k, axis=turn) for k in range(0, reach + 1, 2)], axis=0)
        changed = flat + near * (drag - flat)
    elif kind == "double":
        far = (0.8 + 2.5 * severity) * TEXELS
        shift = [round(float(rng.choice([-1, 1])) * far * part) for part in rng.uniform(0.4, 1, 2)]
        changed = np.maximum(flat, (0.45 + 0.4 * severity) * np.roll(flat, shift, axis=(0, 1)))
    elif kind == "missing":
        changed = flat * (0.6 * (1 - severity))
    else:
        angle = float(rng.choice([-1, 1])) * (5 + 16 * severity)
        pad = np.pad(flat, 4 * TEXELS)
        turned = Image.fromarray((pad * 255).astype(np.uint8)).rotate(angle, Image.Resampling.BILINEAR)
        changed = np.asarray(turned, dtype=np.float32) / 255.0
    return Change(number=changed.astype(np.float32))


def _poke(rng: np.random.Generator, scene: Scene, grid: Grid) -> Change:
    """One to four small pits with a raised rim, some of them pierced to the powder."""
    severity = float(rng.uniform()) ** 1.2
    change = Change()
    u, v = _place(rng)
    for i in range(1 + int(rng.integers(0, 2 + round(2 * severity)))):
        radius = (0.9 + 2.2 * severity) * (1.0 if i == 0 else float(rng.uniform(0.3, 0.7)))
        if i:
            u, v = u + float(rng.normal(0, 4)), v + float(rng.normal(0, 3))
        strength = 0.45 + 0.5 * severity
        rim = grid.filled(_blob(rng, u + 0.3 * radius, v + 0.4 * radius, radius * 1.4, 0.25))
        pit = grid.filled(_blob(rng, u, v, radius, 0.25))
        grain = 0.3 + 0.7 * _blotches(rng, grid.u.shape, 4)
        change.paint.append((0.7 * strength * rim * grain, (112, 112, 114), (214, 160, 142)))
        change.paint.append((strength * pit, (6, 6, 7), (64, 28, 22)))
        if rng.uniform() < 0.5 * severity:
            powder = grid.filled(_blob(rng, u + 0.2, v - 0.2, radius * 0.6, 0.3))
            change.paint.append((0.9 * powder, (205, 200, 196), (232, 214, 206)))
    return change


def _scratch(rng: np.random.Generator, scene: Scene, grid: Grid) -> Change:
    """A few nearly parallel pale lines, broken along their length."""
    severity = float(rng.uniform()) ** 1.2
    u, v = _place(rng)
    heading = float(rng.choice([rng.normal(0, 0.25), rng.uniform(0, np.pi)]))
    lines: list[tuple[Points, float]] = []
    for _ in range(1 + int(rng.integers(0, 3 + round(4 * severity)))):
        length = (8 + 34 * severity) * float(rng.uniform(0.5, 1.0))
        a, b = u + float(rng.normal(0, 3)), v + float(rng.normal(0, 2.5))
        turn = heading + float(rng.normal(0, 0.08))
        back = (a - length / 2 * float(np.cos(turn)), b - length / 2 * float(np.sin(turn)))
        lines.append((_jagged(rng, *back, turn, length, 0.05), float(rng.uniform(0.33, 0.5 + 0.4 * severity))))
    broken = np.clip((_blotches(rng, grid.u.shape, 9) - 0.25) * 3, 0, 1)
    strength = 0.16 + 0.5 * severity
    return Change(paint=[(strength * grid.strokes(lines) * broken, (120, 121, 126), (226, 176, 160))])


def _squeeze(rng: np.random.Generator, scene: Scene, grid: Grid) -> Change:
    """A dent in one side, a crushed end, or a half pressed flat and wide with creases."""
    severity = float(rng.uniform()) ** 1.1
    kind = rng.choice(["dent", "end", "flat"], p=[0.45, 0.3, 0.25])
    u, v = grid.u, grid.v
    change = Change()
    if kind == "dent":
        side = 1 if rng.uniform() < 0.5 else -1
        at, width, depth = float(rng.uniform(-58, 58)), float(rng.uniform(6, 14)), 0.07 + 0.36 * severity
        factor = 1 - depth * np.exp(-(((AXIS - at) / width) ** 2))
        change.top, change.bottom = (factor, None) if side < 0 else (None, factor)
        reach = np.exp(-(np.maximum((0.95 * RADIUS - side * v) / (RADIUS * (0.3 + depth)), 0) ** 2))
        along = (u - at) / width
        slope = along * np.exp(-(along**2))
        ridge = np.exp(-(((np.abs(along) - 1.25 + 0.6 * (1 - reach)) / 0.16) ** 2)) * reach
        change.relief = (0.9 * slope - 0.35 * np.exp(-(along**2))) * reach * (0.3 + depth) + 0.5 * depth * ridge
    elif kind == "end":
        side = 1 if rng.uniform() < 0.5 else -1
        radius = 3.0 + 7.0 * severity
        turn = float(rng.uniform(-1.0, 1.0))
        out = RADIUS + radius * float(rng.uniform(0.1, 0.55))
        bu, bv = side * (HALF - RADIUS + out * float(np.cos(turn))), out * float(np.sin(turn))
        change.bites.append((bu, bv, radius))
        away = np.hypot(u - bu, v - bv) - radius
        lit = 0.5 + 0.5 * (v - bv) / (away + radius + 0.1)  # the lower lip looks up to the light
        bright, dark = np.exp(-(((away - 1.6) / 0.9) ** 2)), np.exp(-((away / 5) ** 2))
        change.relief = 0.4 * lit * bright - (0.3 - 0.25 * lit) * dark
    else:
        at, width, much = float(rng.uniform(-40, 30)), float(rng.uniform(18, 34)), 0.05 + 0.17 * severity
        factor = 1 + much * np.exp(-(((AXIS - at) / width) ** 2))
        change.top = change.bottom = factor
        change.relief = np.zeros_like(u)
        for _ in range(2 + int(rng.integers(0, 3))):  # folds: the face on one side lit, on the other in the shade
            a, b = u - (at + float(rng.normal(0, width / 2))), v - float(rng.uniform(-0.8, 0.8)) * RADIUS
            turn = float(rng.uniform(0, np.pi))
            off, on = b * np.cos(turn) - a * np.sin(turn), a * np.cos(turn) + b * np.sin(turn)
            fold = np.tanh(off / 0.6) * np.exp(-np.abs(off) / 5 - (on / (5 + 14 * severity)) ** 2)
            change.relief += (0.06 + 0.24 * severity) * fold
    if change.relief is not None:
        change.relief = change.relief.astype(np.float32)
    return change


_MAKERS: dict[str, Callable[[np.random.Generator, Scene, Grid], Change]] = {
    "crack": _crack,
    "faulty_imprint": _faulty_imprint,
    "poke": _poke,
    "scratch": _scratch,
    "squeeze": _squeeze,
}

DEFECTS = tuple(_MAKERS)


def draw_pair(rng: np.random.Generator, size: int, defect: str | None) -> tuple[Array, Array]:
    """Draws a capsule without and with a defect, float32 [size, size, 3] in grey levels, without sensor noise."""
    scene = Scene.draw(rng, size)
    grid = Grid(scene)
    ground = background(scene)
    clean = compose(scene, grid, ground, Change())
    if defect is None:
        return clean, clean
    while True:  # a defect that is not visible is drawn again
        broken = compose(scene, grid, ground, _MAKERS[defect](rng, scene, grid))
        if (np.abs(broken - clean).max(2) > 5.0).sum() >= max(2.0, 5 * (size / 192) ** 2):
            return clean, broken
