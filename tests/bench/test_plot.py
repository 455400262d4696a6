"""The figures of the benchmark: all are there, look alike, and nothing is cut off."""

from __future__ import annotations

from pathlib import Path

import matplotlib.style
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from fastmaf.bench import look, plot, sides
from fastmaf.bench.figures import bounds
from fastmaf.bench.rows import Row
from tests.bench.figures_read import assert_readable, drawn_bars, figures_of_run, said, sides_of
from tests.bench.rows_made import ABOUT, SIDES, SWEEPS, made, odd_rows, run


@pytest.fixture
def rows() -> list[Row]:
    return list(run())


@pytest.fixture
def figures() -> dict[str, Figure]:
    return figures_of_run()


def test_files_are_the_same_whatever_the_style(rows: list[Row], tmp_path: Path) -> None:
    kept = [row for row in rows if row["unit"] == "GB" and row["sweep"] in ("", "threads")]
    paths = plot.figures(kept, ABOUT, tmp_path / "new" / "folder", "cpu")
    assert [path.name for path in paths] == ["cpu-memory.png", "cpu-scaling-threads.png"]
    with matplotlib.style.context("dark_background"):
        others = plot.figures(kept, ABOUT, tmp_path, "cpu")
    for path, other in zip(paths, others, strict=True):
        with Image.open(path) as image, Image.open(other) as dark:
            assert image.format == "PNG" and image.width == 1500
            assert image.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
            assert image.tobytes() == dark.tobytes()


def test_a_figure_without_rows_is_left_out(tmp_path: Path) -> None:
    assert plot.figures([], {}, tmp_path, "none") == []
    memory = [made("training memory", "8", "fastmaf", 1.6, 1.1, unit="GB")]
    assert [path.name for path in plot.figures(memory, {}, tmp_path, "some")] == ["some-memory.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["some-memory.png"]
    # nothing to compare fastmaf with, and no limit
    assert list(plot.drawn([made("save", "", "fastmaf", 1.0)], {})) == []


def test_every_figure_and_panel_is_there(figures: dict[str, Figure]) -> None:
    assert list(figures) == ["speedup", "limits", "memory", *(f"scaling-{sweep}" for sweep in SWEEPS)]
    panels = {name: [axes.get_title(loc="left") for axes in figure.axes] for name, figure in figures.items()}
    timed = ["Train step, batch 8", "Train step, batch 64", "One epoch of 219 images"]
    timed += [f"log_prob of {batch}" for batch in (1, 8, 64)]
    timed += ["Drawing 1 sample", "Drawing 5 samples", "Drawing 64 samples"]
    assert panels["speedup"] == [*timed, "Building the model", "Saving the model", "Loading the model"]
    assert sorted(panels["limits"]) == sorted(panels["speedup"])
    assert panels["memory"] == ["Memory of training, batch 8", "Memory to draw 5 samples"]
    swept = ["Train step, batch 8", "log_prob of 8", "Drawing 1 sample", *panels["memory"]]
    assert all(panels[f"scaling-{sweep}"] == swept for sweep in SWEEPS)


def test_a_side_looks_the_same_everywhere(figures: dict[str, Figure], rows: list[Row]) -> None:
    looks = look.styles(rows)
    for name, figure in figures.items():
        for axes in figure.axes:
            if name.startswith("scaling"):
                for line in axes.lines:
                    side = str(line.get_label()).split(":")[0]
                    if side in looks:
                        assert (line.get_color(), line.get_marker()) == looks[side]
                        assert (line.get_linewidth() > 2) == (side == "fastmaf")
            elif name != "speedup":  # whose sides are named at the left panel alone
                for y, bar in drawn_bars(axes).items():
                    assert to_hex(bar.get_facecolor()) == looks[sides_of(axes)[int(y)]].colour.lower()
    for axes in figures["memory"].axes:
        weights = {label.get_text(): label.get_fontweight() for label in axes.get_yticklabels()}
        assert [side for side, weight in weights.items() if weight == "bold"] == ["fastmaf"]


def test_unknown_sides_get_colours_of_their_own(rows: list[Row]) -> None:
    unknown = [made("sample", "1", f"library {i}", 1.0) for i in range(6)]
    looks = look.styles([*unknown, *rows])
    assert len({style.colour for style in looks.values()}) == len(looks) == len(SIDES) + 6
    assert {side: looks[side] for side in SIDES} == look.styles(rows)
    assert look.styles(unknown) == look.styles(reversed(unknown))
    assert len(look.styles(made("sample", "1", f"library {i}", 1.0) for i in range(40))) == 40


def test_beneath_stands_what_the_sides_are_and_where_it_was_measured(figures: dict[str, Figure]) -> None:
    assert set(sides.SIDES) == set(plot.SIDES_IN_WORDS)
    parts = ["Some Processor 1234", "2 threads", "torch 2.7.1", "nflows 0.14", "2026-01-31", "commit abc1234"]
    parts += ["read 34.1 GB/s", "matrix product 350 GFLOP/s, writing files 1.20 GB/s"]
    for name in ("speedup", "scaling-blocks"):
        text = said(figures[name])
        assert all(f"{side} = {plot.SIDES_IN_WORDS[side]}" in text for side in SIDES)
        assert [part for part in parts if part not in text] == []
    assert "2 threads" not in said(figures["scaling-threads"])
    assert "12,288 features" in said(figures["speedup"]) and " blocks," not in said(figures["scaling-blocks"])


def test_nothing_is_said_of_what_is_not_known() -> None:
    figure = bounds.memory([made("training memory", "8", "a side", 1.6, unit="GB", threads="")], {"torch": ""})
    assert figure is not None
    assert "Measured" not in said(figure) and "Versions" not in said(figure) and "threads" not in said(figure)


@pytest.mark.parametrize("name", ["speedup", "limits", "memory", *(f"scaling-{sweep}" for sweep in SWEEPS)])
def test_nothing_is_cut_off_or_overlaps(figures: dict[str, Figure], name: str) -> None:
    assert_readable(figures[name])


@pytest.mark.parametrize(
    "processor", ["Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz (family 6, model 143)", "WMW " * 80]
)
def test_odd_rows_are_readable_too(processor: str) -> None:
    for _, figure in plot.drawn(odd_rows(), ABOUT | {"processor": processor}):
        assert_readable(figure)


def test_the_check_of_overlaps_can_fail() -> None:
    figure = bounds.memory([made("training memory", "8", "fastmaf", 1.6, 1.1, unit="GB")], ABOUT)
    assert figure is not None
    figure.text(0.02, 0.08, "over the words beneath")
    with pytest.raises(AssertionError, match="lies on"):
        assert_readable(figure)
    figure.texts[-1].set(position=(0.95, 0.5))
    with pytest.raises(AssertionError, match="cut off"):
        assert_readable(figure)


def test_markers_of_lines_are_filled(rows: list[Row]) -> None:
    # or they could not be drawn hollow
    unknown = [made("sample", "1", f"library {i}", 1.0) for i in range(6)]
    assert all(style.marker in Line2D.filled_markers for style in look.styles([*rows, *unknown]).values())
