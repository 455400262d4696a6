"""When kernels of a graph start and end, against times worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from fastmaf.kernels import dispatch

MISSING = next((why for op in dispatch.OPS if (why := dispatch.missing(op, "triton")) is not None), None)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
US = 1e-6


def stages(**changes: Any) -> Any:
    from fastmaf.bench.dev.timeline import Stages

    usual = Stages(
        early=True, before=0.5 * US, working=2 * US, ends=1 * US, memory=4 * US, streams=False, prefetched=0.0,
        grid=2, warps=1, registers=32_768, shared=0,
    )  # fmt: skip
    return usual._replace(**changes)


def timeline() -> Any:
    from fastmaf.bench.dev.cards import H100
    from fastmaf.bench.dev.timeline import Timeline

    return Timeline(H100._replace(sms=2, launch_s=1 * US))


def added(*launches: Any) -> list[float]:
    line = timeline()
    return [round(line.add(one) / US, 6) for one in launches]


def test_one_after_the_other() -> None:
    late = stages(early=False)
    assert added(late, late) == [7.5, 7.5], "a gap, what comes first, work and memory"
    assert added(late._replace(streams=True)) == [6.5], "memory beside all but what comes before and after loops"


def test_an_early_kernel_waits_half_a_launch_and_has_begun_before() -> None:
    assert added(stages(), stages()) == [7.5, 6.5]


def test_memory_works_while_a_kernel_waits() -> None:
    """It starts 1 us after the first one began, is ready 0.5 us later, and goes on at 8 us: 5.5 us of waiting."""
    assert added(stages(), stages(prefetched=3 * US)) == [7.5, 3.5]
    assert added(stages(), stages(memory=9 * US, prefetched=9 * US)) == [7.5, 6.0]


def test_a_kernel_without_places_starts_when_the_last_one_ends() -> None:
    full = stages(registers=65_536)
    assert added(full, full._replace(prefetched=3 * US)) == [7.5, 6.5]
    half = stages(registers=65_536, grid=1)
    assert added(half, full._replace(prefetched=4 * US)) == [7.5, 4.5], "half of it finds a place"


def test_no_kernel_starts_before_the_last_but_one_has_ended() -> None:
    short = stages(working=0.0, memory=0.0, ends=0.0)
    # The second ends at 8 us; the third starts at 7.5 us, where the first ended, and waits for 0.5 us until 8.5 us.
    assert added(stages(), short, stages(prefetched=3 * US)) == [7.5, 0.5, 6.0]


def test_several_waves() -> None:
    """Of four programs on two places the last begin in the middle; the next kernel starts then, not before."""
    waves = stages(grid=4, registers=65_536)
    small = stages(registers=32, prefetched=4 * US)
    assert added(waves, small)[1] == pytest.approx(0.5 + 2 + 4 - min(4, 8 - 7.5 - 0.5), abs=1e-6)
