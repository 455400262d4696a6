"""The figures of ``fastmaf bench``: speed-ups, nearness to the limits, memory and scaling, as PNG files.

Matplotlib's object API only: no pyplot, no display. ``bars.py``, ``bounds.py`` and ``scaling.py`` draw, each on a
``sheet.py`` with the colours and words of ``look.py``; this file writes the PNGs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure
from PIL import Image

from fastmaf.bench.figures import bars, bounds
from fastmaf.bench.figures.scaling import scaling, slope
from fastmaf.bench.look import SIDES_IN_WORDS
from fastmaf.bench.rows import Row

__all__ = ["SIDES_IN_WORDS", "drawn", "figures", "slope"]


def figures(rows: list[Row], about: dict[str, str], folder: Path, stem: str) -> list[Path]:
    """Writes every figure that the rows have something for.

    Args:
        rows: as ``run`` returns them and ``rows.read`` reads them.
        about: what they were measured on; what is missing is not said.
        folder: made if it is not there.
        stem: of the names: ``<stem>-speedup.png``, ``-limits``, ``-memory`` and ``-scaling-<sweep>``.

    Returns:
        The files, in this order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.style.context("default"):  # whatever the user's style: the figures are told apart by their colours
        for name, figure in drawn(rows, about):
            paths.append(folder / f"{stem}-{name}.png")
            figure.savefig(paths[-1])
            with Image.open(paths[-1]) as drawing:  # 128 colours are enough for it, and take a quarter of the room
                few = drawing.convert("RGB").quantize(128)
            few.save(paths[-1], optimize=True)
    return paths


def drawn(rows: list[Row], about: dict[str, str]) -> Iterator[tuple[str, Figure]]:
    """Draws the figures, each with its name."""
    for name, draw in (("speedup", bars.speedup), ("limits", bounds.limits), ("memory", bounds.memory)):
        if (figure := draw(rows, about)) is not None:
            yield name, figure
    for sweep in dict.fromkeys(row["sweep"] for row in rows if row["sweep"]):
        if (figure := scaling(rows, about, sweep)) is not None:
            yield f"scaling-{sweep}", figure
