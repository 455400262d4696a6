"""Bars are as long as the numbers of the rows, and say them."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from fastmaf.bench import look
from fastmaf.bench.figures import bars, bounds
from fastmaf.bench.rows import Row
from tests.bench.figures_read import drawn_bars, end, figures_of_run, legend_of, panel, row_of, sides_of, written
from tests.bench.rows_made import ABOUT, SIDES, made, odd_rows, run


@pytest.fixture
def rows() -> list[Row]:
    return list(run())


@pytest.fixture
def figures() -> dict[str, Figure]:
    return figures_of_run()


@pytest.mark.parametrize(
    ("case", "batch", "title"),
    [
        ("train step", "8", "Train step, batch 8"),
        ("log_prob", "64", "log_prob of 64"),
        ("sample", "1", "Drawing 1 sample"),
    ],
)
def test_speedup_bars_are_the_ratios(
    figures: dict[str, Figure], rows: list[Row], case: str, batch: str, title: str
) -> None:
    first = panel(figures["speedup"], title.replace("of 64", "of 1"))  # the sides are named at the left
    axes = panel(figures["speedup"], title)
    assert axes.get_xscale() == "log"
    assert [
        line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "-" and line.get_marker() == "None"
    ] == [1]
    seen, texts = drawn_bars(axes), written(axes)
    for y, side in enumerate(sides_of(first)):
        row = row_of(rows, case, batch, side)
        ratio = float(row["times_fastmaf"])
        if side == "fastmaf":
            assert texts[y] == f"1× = {look.amount(float(row['median']), 's')}" and y not in seen
            continue
        assert (seen[y].get_x(), end(seen[y])) == (1, pytest.approx(ratio))
        assert texts[y] == f"{look.number(ratio)}×"
        assert (
            bool(seen[y].get_hatch()) == ("extrapolated" in row["note"]) == (case == "sample" and "fastmaf" not in side)
        )
        low, high = axes.get_xlim()
        assert low < min(ratio, 1) <= max(ratio, 1) < high
    left_out = {"train step": "bfloat16", "sample": "compiled"}.get(case, "nothing")
    assert sides_of(first) == [side for side in SIDES if left_out not in side]


def test_faster_sides_point_the_other_way() -> None:
    figure = bars.speedup(odd_rows(), {})
    assert figure is not None
    axes = panel(figure, "log_prob of 8")
    seen = next(iter(drawn_bars(axes).values()))
    assert (seen.get_x(), end(seen)) == (1, pytest.approx(0.3))
    (text,) = [text for text in axes.texts if text.get_text() == "0.30×"]
    assert text.get_horizontalalignment() == "right"
    assert "1,000,000×" in written(panel(figure, "Drawing 1 sample")).values()


def test_a_side_that_was_not_measured_gets_a_dash(figures: dict[str, Figure]) -> None:
    texts = written(panel(figures["speedup"], "One epoch of 219 images"))
    assert list(texts.values()).count("–") == 2 and "1.60×" in texts.values()


def test_the_legend_speaks_of_hatching_only_where_there_is_some(figures: dict[str, Figure], rows: list[Row]) -> None:
    assert "hatched: extrapolated" in legend_of(figures["speedup"])
    plain = bars.speedup([row for row in rows if not row["note"]], ABOUT)
    assert plain is not None and "hatched" not in legend_of(plain)
    assert not any(bar.get_hatch() for axes in plain.axes for bar in drawn_bars(axes).values())


def test_limits_are_shares_of_what_the_machine_can_do(figures: dict[str, Figure], rows: list[Row]) -> None:
    axes = panel(figures["limits"], "log_prob of 8")
    # fastmaf's sides, and the one of the others that comes nearest
    assert sides_of(axes) == ["fastmaf", "fastmaf (reference)", "fastmaf, bfloat16", "dense, compiled"]
    (line,) = axes.lines
    assert set(line.get_xdata()) == {100} and line.get_linestyle() == "--"
    seen, texts = drawn_bars(axes), written(axes)
    for y, side in enumerate(sides_of(axes)):
        row = row_of(rows, "log_prob", "8", side)
        share = float(row["fraction_of_limit"])
        assert end(seen[y]) == pytest.approx(100 * share)
        assert texts[y] == f"{look.percent(share)}, {look.amount(float(row['median']), 's')}"
    for other in figures["limits"].axes:
        bottom, top = other.get_ylim()
        assert all(top < bar.get_y() and bar.get_y() + bar.get_height() < bottom for bar in drawn_bars(other).values())
    limit = look.amount(float(row_of(rows, "log_prob", "8", "fastmaf")["limit"]), "s")
    assert f"needs 268 MB: {limit} at best" in [text.get_text() for text in axes.texts]


def test_memory_stands_beside_what_must_be_held(figures: dict[str, Figure], rows: list[Row]) -> None:
    axes = panel(figures["memory"], "Memory of training, batch 8")
    limit = float(row_of(rows, "training memory", "8", "fastmaf")["limit"])
    (line,) = axes.lines
    assert set(line.get_xdata()) == {limit} and line.get_linestyle() == "--"
    seen, texts = drawn_bars(axes), written(axes)
    for y, side in enumerate(sides_of(axes)):
        median = float(row_of(rows, "training memory", "8", side)["median"])
        assert end(seen[y]) == median and texts[y] == look.amount(median, "GB")
    assert len(seen) == 10 and f"{look.amount(limit, 'GB')} must be held" in [t.get_text() for t in axes.texts]


def test_what_other_bytes_bound_a_side_stands_beside_it() -> None:
    found = [made("log_prob", "1", "fastmaf", 0.02, 0.01), made("log_prob", "1", "fastmaf, bfloat16", 0.01, 0.005)]
    figure = bounds.limits([found[0], found[1] | {"must_move": "134 MB"}], {})
    assert figure is not None
    assert written(figure.axes[0]) == {0: "50 %, 20.0 ms", 1: "50 %, 10.0 ms (limit 5.00 ms)"}


def test_panels_of_one_case_stand_side_by_side() -> None:
    keys = [("a", "1"), ("a", "2"), ("b", ""), ("c", "1"), ("c", "2"), ("c", "3"), ("c", "4"), ("d", ""), ("e", "")]
    assert bars.grid(keys, 3) == [
        [("a", "1"), ("a", "2"), ("b", "")],
        [("c", "1"), ("c", "2"), ("c", "3")],
        [("c", "4"), ("d", ""), ("e", "")],
    ]
    assert bars.grid(keys[2:3], 3) == [[("b", "")]]
