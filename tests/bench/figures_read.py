"""The figures of a made-up run, and what is read off a figure: panels, bars, texts, and whether any is cut off."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from fastmaf.bench import plot
from fastmaf.bench.rows import Row
from tests.bench.rows_made import ABOUT, run


@functools.cache
def figures_of_run() -> dict[str, Figure]:
    """Draws a whole run once for all tests."""
    return dict(plot.drawn(list(run()), ABOUT))


def panel(figure: Figure, title: str) -> Axes:
    (found,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    return found


def sides_of(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def drawn_bars(axes: Axes) -> dict[float, Rectangle]:
    """The bars of a panel by the middle of their height."""
    found = [patch for container in axes.containers for patch in container]
    return {round(patch.get_y() + patch.get_height() / 2): patch for patch in found}


def written(axes: Axes) -> dict[float, str]:
    """What is written beside bars, by height."""
    return {text.xy[1]: text.get_text() for text in axes.texts if text.xycoords == "data"}


def end(bar: Rectangle) -> float:
    return bar.get_x() + bar.get_width()


def row_of(rows: Iterable[Row], case: str, batch: str, side: str, sweep: str = "") -> Row:
    (found,) = [r for r in rows if (r["sweep"], r["case"], r["batch"], r["side"]) == (sweep, case, batch, side)]
    return found


def said(figure: Figure) -> str:
    """All that stands above and beneath the panels, as one line."""
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def legend_of(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.legends[0].get_texts())


def shown_texts(figure: Figure) -> list[Text]:
    """All that is written, tick labels out of sight left out."""
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        legend = axes.get_legend()
        found += [*axes.texts, *(legend.get_texts() if legend else [])]
        found += [axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in found if text.get_text().strip() and text.get_visible()]


def assert_readable(figure: Figure) -> None:
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    width, height = figure.bbox.width, figure.bbox.height
    boxes = [(text.get_text(), Text.get_window_extent(text, renderer)) for text in shown_texts(figure)]
    for text, box in boxes:
        assert box.x0 > 5 and box.y0 > 5 and box.x1 < width - 5 and box.y1 < height - 5, f"{text!r} is cut off"
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        across, along = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 0 or along <= 2, f"{one!r} lies on {other!r}"  # lines of a list may touch
    for text in shown_texts(figure):
        assert text.get_fontsize() >= 8, text.get_text()
