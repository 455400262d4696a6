"""Lines of a sweep go through the medians of the rows, and their slopes are those of power laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from fastmaf.bench import look, plot
from fastmaf.bench.figures import scaling
from fastmaf.bench.rows import Row
from tests.bench.figures_read import assert_readable, figures_of_run, panel
from tests.bench.rows_made import SIDES, SWEEPS, made, run


@pytest.fixture
def rows() -> list[Row]:
    return list(run())


@pytest.fixture
def figures() -> dict[str, Figure]:
    return figures_of_run()


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_slope_of_a_power_law_is_its_exponent(power: float) -> None:
    xs = [16, 32, 100, 4096]
    assert plot.slope(xs, [3e-3 * x**power for x in xs]) == pytest.approx(power, abs=1e-12)


def test_slope_is_the_least_squares_fit_of_logarithms() -> None:
    xs, ys = [1.0, 2.0, 5.0, 20.0], [0.3, 0.2, 3.0, 5.0]
    assert plot.slope(xs, ys) == pytest.approx(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def test_one_point_has_no_slope() -> None:
    assert math.isnan(plot.slope([3.0], [1.0])) and math.isnan(plot.slope([3.0, 3.0], [1.0, 2.0]))


@pytest.mark.parametrize("sweep", SWEEPS)
def test_scaling_lines_are_the_rows(figures: dict[str, Figure], rows: list[Row], sweep: str) -> None:
    axes = panel(figures[f"scaling-{sweep}"], "Drawing 1 sample")
    sides = [side for side in SIDES if "compiled" not in side]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    measured = [int(value.split("x")[0]) for value in SWEEPS[sweep]]
    assert list(axes.get_xticks()) == measured
    lines = {line.get_label().split(":")[0]: line for line in axes.lines if not line.get_label().startswith("_")}
    assert set(lines) == {*sides, "limit"} and lines["limit"].get_linestyle() == "--"
    for side in sides:
        swept = [r for r in rows if (r["sweep"], r["case"], r["side"]) == (sweep, "sample", side)]
        ys = [float(row["median"]) for row in swept]
        assert list(lines[side].get_xdata()) == measured and list(lines[side].get_ydata()) == ys
        assert lines[side].get_marker() != "None"
        fitted = plot.slope(measured, ys)
        assert float(lines[side].get_label().split("slope ")[1].replace("−", "-")) == pytest.approx(fitted, abs=0.006)
    assert list(lines["limit"].get_ydata()) == [
        float(r["limit"]) for r in rows if (r["sweep"], r["case"], r["side"]) == (sweep, "sample", "fastmaf")
    ]
    hollow = [line for line in axes.lines if line.get_label().startswith("_")]
    assert {to_hex(line.get_color()) for line in hollow} == {
        look.styles(rows)[side].colour.lower() for side in sides if not look.is_fastmaf(side)
    }
    assert all(line.get_markerfacecolor() == "white" and len(line.get_xdata()) == len(measured) for line in hollow)


def test_of_crowded_ticks_some_are_named() -> None:
    crowded = [made("log_prob", "8", "fastmaf", 0.01 * n, sweep="blocks", blocks=str(n)) for n in range(1, 31)]
    figure = scaling.scaling(crowded, {}, "blocks")
    assert figure is not None
    assert_readable(figure)
    assert list(figure.axes[0].get_xticks()) == list(range(1, 31))
    assert [t for label in figure.axes[0].get_xticklabels() if (t := label.get_text())] == [
        "1",
        "2",
        "3",
        "5",
        "8",
        "12",
        "18",
        "27",
    ]


def test_all_levels_lie_at_one_for_each_hidden_unit() -> None:
    assert scaling.varied(made("sample", "1", "fastmaf", 1.0, sweep="levels")) == 512
    assert scaling.varied(made("sample", "1", "fastmaf", 1.0, sweep="levels", levels="16")) == 16
    assert scaling.varied(made("sample", "1", "fastmaf", 1.0, sweep="hidden_features", hidden_features="64x32")) == 64
    assert scaling.varied(made("sample", "1", "fastmaf", 1.0, sweep="weather")) is None


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(1e-3, "s", "1 ms"), (0.05, "s", "50 ms"), (1e4, "s", "10,000 s"), (2e-7, "s", "0.2 µs"), (0.5, "GB", "500 MB")],
)
def test_ticks_carry_their_units(value: float, unit: str, text: str) -> None:
    assert scaling.tick(value, unit) == text
