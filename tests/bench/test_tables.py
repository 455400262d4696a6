"""The tables for the terminal and for README.md state the numbers of the rows, and amounts in words."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastmaf.bench.labels import amount, case_in_words, digits, libraries_of, percent, size_in_words
from fastmaf.bench.libraries import LIBRARIES
from fastmaf.bench.rows import Row
from fastmaf.bench.tables import growth, machine, memory, position, slope, small, speed, table
from tests.bench.example_rows import ABOUT, example_run, row

ROWS = list(example_run())


def cells(markdown: str, start: str) -> list[str]:
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_text_table_groups_rows_by_case_and_size() -> None:
    blocks = table(ROWS).split("\n\n")
    assert len(blocks) == len(
        {(r["sweep"], r["case"], r["batch"], r["features"], r["levels"], r["threads"]) for r in ROWS}
    )
    head, columns, fast, torch_backend, *_ = blocks[0].splitlines()
    assert head == "log_prob 1   [D = 12,288, hidden 512x512, 7 blocks, 2 threads]   limit 125 ms (268 MB)"
    lines = [" ".join(line.split()) for line in (columns, fast, torch_backend)]
    assert lines == [
        "library median 20–80% of limit × fastmaf error note",
        "fastmaf 250 ms 237 ms – 262 ms 50% 1.00 × 1.1e-07",
        "fastmaf (torch) 500 ms 475 ms – 525 ms 25% 2.00 × 1.1e-07",
    ]
    titles = [block.partition("   limit")[0] for block in blocks]
    assert "features: log_prob 8   [D = 768, hidden 512x512, 7 blocks, 2 threads]" in titles
    assert "levels: log_prob 8   [D = 12,288, hidden 512x512, 7 blocks, 16 levels, 2 threads]" in titles
    assert "threads: log_prob 8   [D = 12,288, hidden 512x512, 7 blocks, 1 thread]" in titles


def test_the_table_of_times_has_fastmaf_s_times_and_multiples() -> None:
    markdown = speed(ROWS, ABOUT)
    assert cells(markdown, " |") == ["", "fastmaf", "limit", "% of limit", "fastmaf (torch)", "naive", "nflows"]
    assert cells(markdown, "log_prob of 8") == [
        "log_prob of 8", "**250 ms**", "125 ms: 268 MB", "50%", "2.00×", "8.00×", "16.0×",
    ]  # fmt: skip
    assert cells(markdown, "Drawing 1 sample")[-3:] == ["2.00×", "8.00×†", "16.0×†"], "extrapolated"
    without = [r for r in ROWS if (r["case"], r["library"]) != ("log_prob", "naive")]
    assert cells(speed(without, ABOUT), "log_prob of 8")[-3:] == ["2.00×", "–", "16.0×"]


def _small_rows() -> list[Row]:
    """Returns two sizes; at the second the naive model is fastest and one peer was not timed."""
    multiples = {"fastmaf": 1.0, "naive": 0.5, "nflows": 4.0, "zuko": 3.0}
    rows = []
    for features, names in (("64", multiples), ("6", ["fastmaf", "naive", "nflows"])):
        for case in ("sample", "log_prob"):
            for name in names:
                size = {"features": features, "hidden_features": "64x64", "blocks": "5", "sweep": "small"}
                times = {"times_fastmaf": f"{multiples[name]:g}"}
                rows.append(row(case, "256", name, 1e-3 * multiples[name], 2e-6, **size, **times))
    return rows


def test_small_flows_are_compared_with_the_best_peer() -> None:
    markdown = small([*ROWS, *_small_rows()], ABOUT)
    assert len(markdown.splitlines()) == 2 + 4
    assert cells(markdown, " |") == ["", "fastmaf", "best peer", "peer / fastmaf", "naive", "nflows", "zuko"]
    assert cells(markdown, "log_prob of 256, D = 64") == [
        "log_prob of 256, D = 64, hidden 64x64, 5 blocks",
        "1.00 ms", "3.00 ms (zuko)", "3.00×", "0.50×", "4.00×", "3.00×",
    ]  # fmt: skip
    assert cells(markdown, "Drawing 256 samples, D = 6,")[1:] == [
        "1.00 ms", "4.00 ms (nflows)", "4.00×", "0.50×", "4.00×", "–",
    ]  # fmt: skip
    assert markdown.index("D = 6,") < markdown.index("D = 64,")
    alone = [r for r in _small_rows() if r["library"] == "fastmaf"]
    assert cells(small(alone, ABOUT), "log_prob of 256, D = 6,")[1:] == ["1.00 ms", "–", "–"]
    assert "no small flows" in small(ROWS, ABOUT)


def test_small_flows_have_their_own_table_in_the_terminal() -> None:
    text = table([*ROWS, *_small_rows()])
    assert text.startswith(table(ROWS) + "\n\nsmall flows: ")
    head, columns, *lines = text.removeprefix(table(ROWS) + "\n\n").splitlines()
    assert columns.split()[:3] == ["fastmaf", "best", "peer"] and len(lines) == 4
    assert " ".join(lines[0].split()).endswith("5 blocks 1.00 ms 4.00 ms (nflows) 4.00× 0.50× 4.00× –")
    assert table(_small_rows()).startswith(head)


def test_the_table_of_memory_has_what_must_be_held() -> None:
    assert cells(memory(ROWS, ABOUT), "Memory of training") == [
        "Memory of training, batch 8", "0.25 GB", "0.50 GB", "2.00 GB", "4.00 GB", "0.12 GB",
    ]  # fmt: skip


def test_the_table_of_sweeps_has_both_ends_and_the_slope() -> None:
    markdown = growth(ROWS, ABOUT)
    assert cells(markdown, "log_prob of 8, D ")[:2] == [
        "log_prob of 8, D 768 → 12,288", "15.6 ms → 250 ms, slope 1.00",
    ]  # fmt: skip
    assert "levels 16 → 512" in cells(markdown, "log_prob of 8, levels")[0]
    assert cells(markdown, "log_prob of 8, threads")[1] == "250 ms → 250 ms, slope 0.00"
    assert "†" in cells(markdown, "Drawing 1 sample, D ")[-1]


def test_the_machine_is_described_in_sentences() -> None:
    assert machine(ROWS, ABOUT) == (
        f"Measured on {ABOUT['processor']}, with 2 threads, on 2026-01-31. Versions: fastmaf 0.1.0, commit abc1234, "
        "torch 2.7.1, python 3.11.7, nflows 0.14, zuko 1.6.0. Rates of the machine: read 34.1 GB/s, copy 28.2 GB/s, "
        "fused Adam 46.0 GB/s, matrix product 350 GFLOP/s, writing files 1.20 GB/s, reading files 5.90 GB/s."
    )
    assert machine([], {}) == ""


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 2.0])
def test_the_slope_of_a_power_law_is_its_exponent(power: float) -> None:
    rows = [row("sample", "1", "naive", 3e-3 * x**power, sweep="blocks", blocks=str(x)) for x in (16, 32, 100, 4096)]
    assert slope(rows) == pytest.approx(power, abs=1e-4)
    assert math.isnan(slope(rows[:1])) and math.isnan(slope([rows[0], rows[0]])), "it takes two points"


def test_the_slope_is_a_least_squares_fit() -> None:
    u, v = np.log([1, 2, 5, 20]), np.log([0.3, 0.2, 3.0, 5.0])
    rows = [
        row("sample", "1", "naive", math.exp(b), sweep="blocks", blocks=f"{math.exp(a):.0f}")
        for a, b in zip(u, v, strict=True)
    ]
    assert slope(rows) == pytest.approx(np.cov(u, v)[0, 1] / np.var(u, ddof=1), rel=1e-3)


def test_the_position_of_a_row_in_its_sweep() -> None:
    assert position(row("sample", "1", "fastmaf", 1.0, sweep="levels")) == 512, "a level per hidden unit"
    assert position(row("sample", "1", "fastmaf", 1.0, sweep="levels", levels="16")) == 16
    assert position(row("sample", "1", "fastmaf", 1.0, sweep="hidden_features", hidden_features="64x32")) == 64


def test_libraries_have_an_order_and_a_colour_each() -> None:
    unknown = [row("sample", "1", f"library {i}", 1.0) for i in range(2)]
    names = ["fastmaf", "fastmaf (torch)", "naive", "nflows", "library 0", "library 1"]
    assert libraries_of([*unknown, *ROWS]) == names
    assert len({entry.colour for entry in LIBRARIES.values()}) == len(LIBRARIES)


@pytest.mark.parametrize(
    ("number", "unit", "words"),
    [
        (0.0, "s", "0.00 µs"),
        (1.5e-7, "s", "0.15 µs"),
        (9.996e-6, "s", "10.0 µs"),
        (1e-3, "s", "1.00 ms"),
        (0.0321, "s", "32.1 ms"),
        (59.99, "s", "60.0 s"),
        (1_670.0, "s", "1,670 s"),
        (0.0312, "GB", "31.2 MB"),
        (0.1, "GB", "0.10 GB"),
        (12.0, "GB", "12.0 GB"),
    ],
)
def test_amounts_in_words(number: float, unit: str, words: str) -> None:
    assert amount(number, unit) == words


def test_numbers_cases_and_sizes_in_words() -> None:
    assert [digits(x) for x in (0.00412, 0.5, 9.994, 42.0, 99.96, 86_016.0)] == [
        "0.0041", "0.50", "9.99", "42.0", "100", "86,016",
    ]  # fmt: skip
    assert [percent(x) for x in (0.5, 0.0123)] == ["50%", "1.2%"]
    assert case_in_words("sampling memory", "5") == "Memory to draw 5 samples"
    assert case_in_words("something else", "5") == "something else, batch 5"
    swept = [r for r in ROWS if r["sweep"] == "features"]
    assert size_in_words(swept) == "hidden 512x512, 7 blocks, 2 threads"
    assert size_in_words([ROWS[0] | {"blocks": "1"}]) == "D = 12,288, hidden 512x512, 1 block, 2 threads"
