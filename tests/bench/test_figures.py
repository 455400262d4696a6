"""The figures show the numbers of the rows and are written as PNG files."""

from __future__ import annotations

from pathlib import Path

import matplotlib.style
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from fastmaf.bench import figures
from fastmaf.bench.libraries import LIBRARIES
from fastmaf.bench.rows import Row
from tests.bench.example_rows import ABOUT, SWEPT, example_run, row

NAMES = ["speedup", "limits", "memory", *(f"scaling-{sweep}" for sweep in SWEPT)]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(example_run())


@pytest.fixture(scope="module")
def drawn(rows: list[Row]) -> dict[str, Figure]:
    return dict(figures.draw(rows, ABOUT))


def panel(figure: Figure, title: str) -> Axes:
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    return axes


def values(rows: list[Row], case: str, batch: str, column: str) -> list[float]:
    wanted = [r for r in rows if (r["sweep"], r["case"], r["batch"]) == ("", case, batch)]
    return [float(r[column]) for r in wanted]


def test_every_figure_is_drawn_with_a_panel_for_each_case(drawn: dict[str, Figure]) -> None:
    assert list(drawn) == NAMES
    titles = {name: [axes.get_title(loc="left") for axes in figure.axes] for name, figure in drawn.items()}
    assert titles["speedup"] == ["Train step, batch 8", "log_prob of 1", "log_prob of 8", "Drawing 1 sample"]
    assert titles["memory"] == ["Memory of training, batch 8"]
    assert titles["scaling-features"] == [*titles["speedup"], *titles["memory"]]


def test_bars_are_as_long_as_the_numbers_and_in_the_colours_of_the_libraries(
    drawn: dict[str, Figure], rows: list[Row]
) -> None:
    names = ["fastmaf", "fastmaf (torch)", "naive", "nflows"]
    for figure, case, title, column, texts in (
        ("speedup", "log_prob", "log_prob of 8", "times_fastmaf", ["1.00×, 250 ms", "2.00×, 500 ms", "8.00×, 2.00 s"]),
        ("limits", "log_prob", "log_prob of 8", "fraction_of_limit", ["50%, 250 ms", "25%, 500 ms"]),
        ("memory", "training memory", "Memory of training, batch 8", "median", ["0.25 GB", "0.50 GB"]),
    ):
        axes = panel(drawn[figure], title)
        assert [label.get_text() for label in axes.get_yticklabels()][::-1] == names
        ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
        assert ends[::-1] == pytest.approx(values(rows, case, "8", column))
        assert [to_hex(bar.get_facecolor()) for bar in axes.patches][::-1] == [
            LIBRARIES[name].colour.lower() for name in names
        ]
        assert [text.get_text().strip() for text in axes.texts][::-1][: len(texts)] == texts
    (line,) = panel(drawn["memory"], "Memory of training, batch 8").lines
    assert set(line.get_xdata()) == {0.125}, "what must be held"


def test_extrapolated_bars_are_hatched_and_the_figure_says_so(drawn: dict[str, Figure]) -> None:
    hatched = [bool(bar.get_hatch()) for bar in panel(drawn["speedup"], "Drawing 1 sample").patches]
    assert hatched == [True, True, False, False]
    assert not any(bar.get_hatch() for bar in panel(drawn["speedup"], "log_prob of 8").patches)
    texts = {name: " ".join(text.get_text() for text in drawn[name].texts) for name in ("speedup", "memory")}
    for text in texts.values():
        assert "Hatched: extrapolated" in text and "D = 12,288, hidden 512x512, 7 blocks, 2 threads" in text
        assert "Some Processor 1234" in text and "commit abc1234" in text and "naive: mask × weight" in text


def test_lines_of_a_sweep_are_its_rows_with_their_slope(drawn: dict[str, Figure], rows: list[Row]) -> None:
    axes = panel(drawn["scaling-features"], "Drawing 1 sample")
    assert axes.get_xscale() == axes.get_yscale() == "log"
    lines = {str(line.get_label()): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    assert set(lines) == {f"{name}: slope 1.00" for name in ("fastmaf", "fastmaf (torch)", "naive", "nflows")}
    swept = [r for r in rows if (r["sweep"], r["case"], r["library"]) == ("features", "sample", "naive")]
    line = lines["naive: slope 1.00"]
    assert list(line.get_xdata()) == [768, 3072, 12288]
    assert list(line.get_ydata()) == [float(r["median"]) for r in swept]
    hollow = {
        to_hex(dots.get_edgecolor()[0]) for dots in axes.collections if to_hex(dots.get_facecolor()[0]) == "#ffffff"
    }
    assert hollow == {LIBRARIES["naive"].colour.lower(), LIBRARIES["nflows"].colour.lower()}, "extrapolated"


def test_files_are_written_whatever_the_style(rows: list[Row], tmp_path: Path) -> None:
    memory = [r for r in rows if r["unit"] == "GB" and r["sweep"] in ("", "threads")]
    paths = figures.write(memory, ABOUT, tmp_path / "new" / "folder", "cpu")
    assert [path.name for path in paths] == ["cpu-memory.png", "cpu-scaling-threads.png"]
    with matplotlib.style.context("dark_background"):
        others = figures.write(memory, ABOUT, tmp_path, "cpu")
    for path, other in zip(paths, others, strict=True):
        with Image.open(path) as image, Image.open(other) as dark:
            assert image.format == "PNG" and image.tobytes() == dark.tobytes()


def test_a_figure_without_rows_is_left_out(tmp_path: Path) -> None:
    assert figures.write([], {}, tmp_path, "none") == []
    assert list(figures.draw([row("save", "", "fastmaf", 1.0)], {})) == [], "nothing to compare with, and no limit"
    small = [row("log_prob", "1", name, 1.0, sweep="small") for name in ("fastmaf", "naive")]
    assert list(figures.draw(small, {})) == []


@pytest.mark.parametrize("name", ["speedup", "memory", "scaling-features"])
def test_no_text_is_cut_off(drawn: dict[str, Figure], name: str) -> None:
    figure = drawn[name]
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts if axes.get_visible())]
    for text in texts:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.y0 >= 0, text.get_text()
        assert box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height, text.get_text()
