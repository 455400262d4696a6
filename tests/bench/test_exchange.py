"""The bytes that processes exchange: counted, as the model of many processes has them, and within what was promised."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from torch import distributed

from fastmaf.bench.exchange import METHODS, measure, modelled, seconds_of

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "exchange.csv"


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("method", METHODS)
def test_the_model_has_the_bytes_that_are_counted(method: str) -> None:
    (counted, moments), (expected, _) = measure(2, method, 192), modelled(2, method, 192)
    assert counted.given == pytest.approx(expected.given, rel=0.02)
    assert counted.received == pytest.approx(expected.received, rel=0.02)
    assert (moments > 0) == (method != METHODS[-1])


@pytest.mark.parametrize("size", [2, 4])
def test_factors_are_a_tenth_of_the_gradients_at_the_reference_size(size: int) -> None:
    factors, ddp = (modelled(size, method, 12288)[0] for method in ("factors", METHODS[-1]))
    assert factors.received < 0.1 * ddp.received and factors.given < 0.1 * ddp.given


def test_never_more_than_gradients_and_moments_divided() -> None:
    for size in (8, 64, 512):
        factors, ddp = (modelled(size, method, 768)[0] for method in ("factors", METHODS[-1]))
        assert factors.received <= ddp.received
        assert modelled(size, "sharded", 768)[1] == modelled(size, "factors", 768)[1] // size


def test_a_step_takes_longer_with_more_bytes() -> None:
    assert seconds_of(modelled(8, "factors", 768)[0], 8) < seconds_of(modelled(8, "sharded", 768)[0], 8)


def test_the_published_rows_keep_what_is_promised() -> None:
    with open(RESULTS, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "measured" and row["method"] == "factors"]
    assert {row["workers"] for row in rows} == {"2", "4"}
    assert all(float(row["part_of_ddp"]) <= 0.1 for row in rows)
