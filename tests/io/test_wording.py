"""Numbers in sentences."""

from __future__ import annotations

import pytest

from fastmaf.io.wording import count, ordinal, percent, some


@pytest.mark.parametrize(
    ("n", "text"),
    [
        *((1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (10, "10th"), (11, "11th"), (12, "12th"), (13, "13th")),
        *((20, "20th"), (21, "21st"), (22, "22nd"), (23, "23rd"), (101, "101st"), (111, "111th"), (112, "112th")),
        *((113, "113th"), (121, "121st"), (232, "232nd"), (1011, "1,011th"), (1001, "1,001st")),
    ],
)
def test_ordinals(n: int, text: str) -> None:
    assert ordinal(n) == text


def test_counts_shares_and_lists() -> None:
    assert [count(n, "image") for n in (0, 1, 2, 1203)] == ["0 images", "1 image", "2 images", "1,203 images"]
    assert [count(2, noun) for noun in ("batch", "epoch")] == ["2 batches", "2 epochs"]
    assert [percent(share) for share in (0.05, 12 / 244, 1.0, 0.001)] == ["5%", "4.92%", "100%", "0.1%"]
    assert some(["a"]) == "a" and some(list("abc")) == "a, b, c" and some(list("abcde")) == "a, b, c and 2 more"
