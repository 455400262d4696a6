"""A matplotlib figure as inline SVG: text stays text, colours follow the page, light or dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.figure import Figure

from fastmaf.metrics.figure_parts import BLUE, GREEN, GREY, ORANGE, PURPLE

INK, PAPER, SHADE = "#1a1d21", "#fefefe", "#ededed"

COLOURS: Mapping[str, str] = MappingProxyType(
    {
        BLUE: "--blue",
        ORANGE: "--orange",
        GREEN: "--green",
        PURPLE: "--purple",
        GREY: "--grey",
        INK: "--ink",
        PAPER: "--paper",
        SHADE: "--shade",
    }
)
"""The colours that a figure may use, and the CSS variables of the page that replace them."""

_SETTINGS: Mapping[str, Any] = MappingProxyType(
    {
        "svg.fonttype": "none",  # the page's font: smaller, sharper, searchable
        "svg.hashsalt": "fastmaf",  # reproducible bytes
        "text.parse_math": False,  # a $ in a class name is no formula
        "font.size": 9.0,
        "axes.labelsize": 9.0,
        "legend.fontsize": 8.5,
        "axes.linewidth": 0.7,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "legend.facecolor": PAPER,
        "legend.edgecolor": "none",
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
        "grid.color": GREY,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.7,
    }
)


@contextmanager
def drawing() -> Iterator[None]:
    """Sets the style in which figures of the page are drawn and saved, independent of the user's style."""
    with matplotlib.style.context(["default", dict(_SETTINGS)]), warnings.catch_warnings():
        # For example a Chinese class name: the browser has the font that matplotlib lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def inline_svg(figure: Figure, name: str, alt: str) -> str:
    """Returns ``figure`` as an <svg> element.

    Args:
        figure: drawn within ``drawing()``; call this function within it, too.
        name: unique in the page; prefix of all ids, which are shared by all figures of a page.
        alt: alternative text.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(text.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):  # a <style> would apply to the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        if "id" in attributes:
            attributes["id"] = f"{name}-{attributes['id']}"
        if "href" in attributes:
            attributes["href"] = attributes["href"].replace("#", f"#{name}-", 1)
        element.attrib = {key: _on_page(value, name) for key, value in attributes.items()}
    root.attrib = {"class": "figure", "role": "img", "aria-label": alt, "viewBox": root.attrib["viewBox"]}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """Returns the name without its namespace, which HTML parsers add for <svg>; href needs none since SVG 2."""
    return name.rpartition("}")[2]


def _on_page(value: str, name: str) -> str:
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    return re.sub("#[0-9a-f]{6}", lambda hit: _variable(hit.group()), value) if ":" in value else value


def _variable(colour: str) -> str:
    found = {key.lower(): variable for key, variable in COLOURS.items()}.get(colour)
    return colour if found is None else f"var({found})"
