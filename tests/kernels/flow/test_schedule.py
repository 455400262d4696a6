"""Groups of steps of an inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmaf import degrees
from fastmaf.kernels.flow.schedule import groups, level_schedule


def schedule_of(units: list[int]) -> torch.Tensor:
    """Returns a schedule whose last hidden layer has so many finished units after each step."""
    return torch.tensor([[3 * step + 3, count] for step, count in enumerate(units)], dtype=torch.int32)


@pytest.mark.parametrize("units, expected", [
    ([0], [(0, 1)]),
    ([1, 1], [(0, 2)]),
    ([*range(1, 17), 16], [(0, 17)]),
    ([*range(1, 18), 17], [(0, 16), (16, 18)]),
    ([15, 17, 18, 31, 32, 33], [(0, 1), (1, 2), (2, 5), (5, 6)]),
    ([100, 101, 112, 113, 113], [(0, 1), (1, 3), (3, 5)]),
    ([0, 0, 16, 16, 40], [(0, 4), (4, 5)]),
], ids=str)  # fmt: skip
def test_groups(units: list[int], expected: list[tuple[int, int]]) -> None:
    assert groups(schedule_of(units)) == expected


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_groups_cover_all_steps_and_stay_within_a_panel(counts: list[int]) -> None:
    units = torch.tensor(counts).cumsum(0).tolist()
    result = groups(schedule_of(units))
    assert [step for group in result for step in range(*group)] == [*range(len(units))]
    for first, end in result:
        before = units[first - 1] if first else 0
        assert end == first + 1 or units[end - 1] <= before // 16 * 16 + 16
        # No group could have taken one step more.
        assert end == len(units) or units[end] > before // 16 * 16 + 16


@pytest.mark.parametrize("kind", ["spread", "random", "cyclic"])
def test_groups_at_reference_size_follow_the_panels(kind: str) -> None:
    drawn = degrees.hidden_degrees(kind, 12_288, (512, 512), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    schedule = level_schedule(degrees.input_degrees(12_288), drawn)
    assert len(groups(schedule)) <= (32 if kind != "random" else 80)
