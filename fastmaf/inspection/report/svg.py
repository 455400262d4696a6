"""A matplotlib figure as inline SVG: text stays text, colours follow the page, light or dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.figure import Figure

from fastmaf.metrics.figure_parts import BLUE, GREEN, GREY, ORANGE

INK, PAPER, SHADE = "#1A1D21", "#FEFEFE", "#EDEDED"

_NAMES = {BLUE: "blue", ORANGE: "orange", GREEN: "green", GREY: "grey", INK: "ink", PAPER: "paper", SHADE: "shade"}
"""The colours that a figure may use, and the CSS variables of the page that replace them."""

_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # the page's font: smaller, sharper, searchable
    "text.parse_math": False,  # a $ in a class name is no formula
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "legend.fontsize": 8.5,
    "axes.linewidth": 0.7,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.edgecolor"), "none"),
    "legend.facecolor": PAPER,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.7,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Sets the style in which figures of the page are drawn and saved, independent of the user's style."""
    with matplotlib.style.context(["default", _SETTINGS]), warnings.catch_warnings():
        # For example a Chinese class name: the browser has the font that matplotlib lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def inline_svg(figure: Figure, name: str, alt: str) -> str:
    """Returns ``figure`` as an <svg> element.

    Args:
        figure: drawn within ``drawing()``; call this function within it, too.
        name: unique in the page; ids of clip paths and markers are hashes that depend on it.
        alt: alternative text.
    """
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # reproducible bytes
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(text.getvalue())
    for element in root.iter():
        # HTML parsers add the namespace of <svg> themselves, and href needs none since SVG 2.
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        if "_" in attributes.get("id", ""):  # "axes_1": in every figure, and nothing refers to it
            del attributes["id"]
        element.attrib = {key: re.sub("#[0-9a-f]{6}", _variable, value) for key, value in attributes.items()}
    root.attrib = {"class": "figure", "role": "img", "aria-label": alt, "viewBox": root.attrib["viewBox"]}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _variable(colour: re.Match[str]) -> str:
    name = _NAMES.get(colour[0].upper())
    return f"var(--{name})" if name else colour[0]
