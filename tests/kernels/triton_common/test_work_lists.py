"""What the work of the Triton kernels is cut into: everything once, and nothing of the staircase outside it."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fastmaf.kernels import PackedLayout
from fastmaf.kernels.flow.schedule import level_schedule
from fastmaf.kernels.triton_common import work_lists
from tests.core.helpers import shared_widths

CPU = torch.device("cpu")


@st.composite
def layouts(draw: st.DrawFn) -> PackedLayout:
    """Draws layouts of one panel and of many, of equal and of different widths; rows see nothing, something or all."""
    in_features = draw(st.integers(1, 70))
    rows = draw(st.lists(st.integers(0, in_features), min_size=1, max_size=40))
    prefix = torch.tensor(sorted(rows)).repeat_interleave(draw(st.sampled_from([1, 2, 5])))
    with shared_widths(draw(st.sampled_from([1, 3, 64]))):
        return PackedLayout(prefix, in_features)


panels_of_a_block = st.sampled_from([1, 2, 4])
powers = st.sampled_from([1, 2, 4, 8, 32])
numbers_of_programs = st.sampled_from([0, 1, 2, 3, 7, 16, 1000])


def blocks_of(layout: PackedLayout, panels: int) -> list[int]:
    """Returns how many columns each block of panels has: as many as the widest of them."""
    widths = torch.tensor([run.width for run in layout.runs for _ in range(run.start, run.end)])
    return [int(block.max()) for block in widths.split(panels)]


@given(layouts(), panels_of_a_block, powers, numbers_of_programs)
def test_forward_items_cover_everything_once(
    layout: PackedLayout, panels: int, block_columns: int, programs: int
) -> None:
    block_rows = 16 * panels
    work = work_lists.forward(layout.panels, CPU, block_rows, block_columns, programs)
    covered = torch.zeros(layout.out_features, layout.in_features, dtype=torch.int64)
    ends, slots = blocks_of(layout, panels), Counter[int]()
    for block, start, end, _, before in work.items.tolist():
        assert before == layout.panels[block * panels]
        assert start % block_columns == 0, "a segment starts within a block of columns"
        assert 0 <= start <= end <= layout.in_features
        covered[block * block_rows : (block + 1) * block_rows, start:end] += 1
        slots[block] += 1
    expected = torch.zeros_like(covered)
    for block, end in enumerate(ends):
        expected[block * block_rows : (block + 1) * block_rows, :end] = 1
    assert torch.equal(covered, expected)
    assert set(slots) == set(range(len(ends))), "rows that see nothing still have a bias"
    # Each block's slots are 0, 1, 2, …, from left to right, and counted for each of its rows.
    for block in range(len(ends)):
        own = sorted((start, slot) for b, start, _, slot, _ in work.items.tolist() if b == block)
        assert [slot for _, slot in own] == list(range(len(own)))
        rows = work.counts[block * block_rows : (block + 1) * block_rows]
        assert (rows == len(own)).all()
    assert len(work.counts) >= layout.out_features and work.slots == max(slots.values())
    check_work(work, len(ends), programs, [end - start for _, start, end, *_ in work.items.tolist()], block_columns)


@given(layouts(), panels_of_a_block, powers, numbers_of_programs)
@example(PackedLayout(torch.tensor([0, 0, 0]), 5), 2, 2, 4)
def test_backward_items_cover_everything_once(
    layout: PackedLayout, panels: int, block_columns: int, programs: int
) -> None:
    work = work_lists.backward(layout.panels, CPU, layout.in_features, 16 * panels, block_columns, programs)
    with_bias = work_lists.backward(layout.panels, CPU, layout.in_features, 16 * panels, block_columns, programs, 32)
    ends = blocks_of(layout, panels)
    seen, slots = Counter[tuple[int, int]](), Counter[int]()
    for column, start, end, slot in work.items.tolist():
        assert column % block_columns == 0 and 0 <= column < layout.in_features
        assert 0 <= start <= end <= len(ends)
        seen.update((column, block) for block in range(start, end))
        slots[column] += 1
        assert slot < work.slots
    columns = range(0, layout.in_features, block_columns)
    # A chunk of columns belongs to the blocks of rows that see any of it.
    expected = {(column, block) for column in columns for block, end in enumerate(ends) if end > column}
    assert set(seen) == expected and set(seen.values()) <= {1}
    assert set(slots) == set(columns), "a column that nobody sees still has a gradient, of zero"
    for column in columns:
        own = sorted((start, slot) for c, start, _, slot in work.items.tolist() if c == column)
        assert [slot for _, slot in own] == list(range(len(own)))
        assert (work.counts[column : column + block_columns] == len(own)).all()
    assert work.counts.shape == (layout.in_features,) and work.slots == max(slots.values())
    check_work(work, len(columns), programs, [end - start for _, start, end, _ in work.items.tolist()], 1)
    # Rows of the bias are items of their own, the last.
    of_weight, of_bias = with_bias.items.split([len(work.items), len(with_bias.items) - len(work.items)])
    assert torch.equal(of_weight, work.items) and torch.equal(with_bias.counts, work.counts)
    assert (of_bias[:, 0] == -block_columns).all()
    rows = [row for _, start, end, _ in of_bias.tolist() for row in range(start, end)]
    assert rows == list(range(16 * panels * len(ends)))


def check_work(work: work_lists.Work, at_least: int, programs: int, costs: list[int], unit: int) -> None:
    """Checks types, the order, and that the work is cut into about as many items as there are programs."""
    assert work.items.dtype == work.counts.dtype == torch.int32 and work.items.is_contiguous()
    assert costs == sorted(costs, reverse=True), "the longest first"
    if at_least >= programs:
        assert len(costs) == at_least, "cut though there were enough"
    else:
        # At most one item per unit of what cannot be shared ends early: fewer than twice too many, and none too long.
        assert at_least <= len(costs) <= at_least + programs
        steps = [-(-cost // unit) for cost in costs]
        assert max(steps) <= max(1, -(-sum(steps) // programs))


@pytest.mark.parametrize("rows", [1, 8, 24])
def test_blocks_are_whole_panels(rows: int) -> None:
    with pytest.raises(ValueError, match=f"whole panels of 16; found {rows}"):
        work_lists.forward(panels(), CPU, rows, 16, 4)


def panels() -> Tensor:
    return PackedLayout(torch.tensor([0, 2, 2, 5]), 6).panels


def test_lists_are_made_once_for_each_layout_and_way_to_cut_it() -> None:
    one, other = panels(), panels()
    for make in (
        lambda panels, *cut: work_lists.forward(panels, CPU, *cut),
        lambda panels, *cut: work_lists.backward(panels, CPU, 6, *cut),
    ):
        first = make(one, 16, 4, 8)
        assert make(one, 16, 4, 8) is first
        assert make(other, 16, 4, 8) is not first
        assert len({id(make(one, *cut)) for cut in ((16, 4, 8), (32, 4, 8), (16, 4, 1), (16, 2, 8))}) == 4


def schedule() -> Tensor:
    return level_schedule(torch.arange(1, 5), [torch.tensor([1, 2, 3])])


@pytest.mark.parametrize("make", [panels, schedule])
def test_lists_die_with_what_they_were_made_for(make: Callable[[], Tensor]) -> None:
    """Else a process that builds many models keeps what belongs to all of them."""
    one = make()
    if make is panels:
        work_lists.forward(one, CPU, 16, 4, 8)
        work_lists.backward(one, CPU, 6, 16, 4, 8)
    assert torch.equal(work_lists.on_device(one, CPU), one)
    assert work_lists.on_device(one, CPU) is work_lists.on_device(one, CPU)
    assert work_lists.on_device(one, torch.device("meta")).is_meta
    kept, alive = weakref.ref(work_lists.on_device(one, CPU)), weakref.ref(one)
    assert kept() is not None
    del one
    gc.collect()
    assert alive() is None and kept() is None
