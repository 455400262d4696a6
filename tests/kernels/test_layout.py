"""PackedLayout against brute force: dense masks compared entry by entry."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmaf.kernels import PackedLayout, layout
from tests.core.helpers import normal, shared_widths
from tests.tolerances import F64


def brute_force_mask(prefix: list[int], in_features: int) -> Tensor:
    return torch.tensor(
        [[column < seen for column in range(in_features)] for seen in prefix], dtype=torch.bool
    ).reshape(len(prefix), in_features)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Draws a prefix with plateaus, the input width, and how many widths large layers have."""
    in_features = draw(st.integers(1, 70))
    values = draw(st.lists(st.integers(0, in_features), min_size=1, max_size=25))
    repeats = draw(st.integers(1, 6))
    rows = sorted(value for value in values for _ in range(repeats))
    return rows, in_features, draw(st.sampled_from([1, 2, 3, 64]))


@given(shapes())
@settings(max_examples=150)
def test_random_prefixes(shape: tuple[list[int], int, int]) -> None:
    prefix, in_features, widths = shape
    with shared_widths(widths):
        packing = PackedLayout(torch.tensor(prefix), in_features)
    mask = brute_force_mask(prefix, in_features)
    assert torch.equal(packing.mask(), mask)
    assert packing.visible == int(mask.sum()) == sum(prefix)
    assert packing.out_features == len(prefix) and packing.in_features == in_features

    dense = normal(len(prefix), in_features) + 10.0  # nowhere zero
    packed = packing.pack(dense)
    assert packed.shape == (packing.numel,) and packed.dtype == dense.dtype
    assert torch.equal(packing.unpack(packed), dense * mask)
    assert int((packed != 0).sum()) == packing.visible
    assert torch.equal(packing.pack(torch.where(mask, dense, torch.nan)), packed), "what the mask hides came through"
    out = torch.full((packing.numel,), torch.nan, dtype=F64)
    assert packing.pack(torch.where(mask, dense, torch.nan), out=out) is out and torch.equal(out, packed.to(F64))

    # Each number at its place: panels of 16 rows one after another, column by column.
    start = 0
    for panel in range(-(-len(prefix) // 16)):
        rows = range(16 * panel, min(16 * panel + 16, len(prefix)))
        width = int(packing.panels[panel + 1] - packing.panels[panel])
        assert int(packing.panels[panel]) * 16 == start and prefix[rows[-1]] <= width <= in_features
        columns = packed[start : start + 16 * width].view(width, 16)
        assert torch.equal(columns[:, : len(rows)], (dense * mask)[rows.start : rows.stop, :width].t())
        assert not columns[:, len(rows) :].any(), "rows that the layer does not have hold numbers"
        start += 16 * width
    assert start == packing.numel

    # Runs: all panels in order, of equal width within a run and of another one in the next.
    assert [panel for run in packing.runs for panel in range(run.start, run.end)] == [*range(len(packing.panels) - 1)]
    assert all(a.width < b.width for a, b in itertools.pairwise(packing.runs))
    for run in packing.runs:
        assert run.offset == 16 * int(packing.panels[run.start])
        assert (packing.panels.diff()[run.start : run.end] == run.width).all()
        rows_of_run = run.rows(len(prefix))
        flat = run.of(packed).mT.flatten(0, 1)
        assert torch.equal(flat[: rows_of_run.stop - rows_of_run.start], (dense * mask)[rows_of_run, : run.width])

    # Padding: every number of it, and no other, counts and is cleared.
    assert packing.padding_is_zero(packed)
    where = (packed == 0).nonzero()[:, 0]
    assert where.numel() == packing.numel - packing.visible
    for place in (where[:1], where[-1:]):
        if place.numel():
            dirty = packed.clone()
            dirty[place] = 1e-30
            assert not packing.padding_is_zero(dirty)
    noise = torch.full((packing.numel,), 3.0, dtype=torch.float64)
    returned = packing.zero_padding_(noise)
    assert returned is noise or returned.data_ptr() == noise.data_ptr()
    assert torch.equal(noise, torch.where(packed == 0, 0.0, 3.0).double())


@pytest.mark.parametrize(
    "prefix, in_features",
    [
        ([0], 1),
        ([0] * 33, 5),
        ([0, 0, 0], 5),
        ([0] * 16 + [3], 5),
        ([4] * 16, 4),
        ([5, 5, 5], 5),
        ([1], 1),
        ([0, 7], 7),
        ([0, 0, 12_288], 12_288),
    ],
    ids=str,
)
def test_extreme_prefixes(prefix: list[int], in_features: int) -> None:
    packing = PackedLayout(torch.tensor(prefix), in_features)
    dense = normal(len(prefix), in_features)
    assert torch.equal(packing.unpack(packing.pack(dense)), dense * brute_force_mask(prefix, in_features))
    assert packing.visible == sum(prefix) <= packing.numel


def test_padding_of_a_strided_or_offset_weight() -> None:
    """A packed weight may be a slice of a larger buffer, as optimisers that flatten parameters make it."""
    packing = PackedLayout(torch.tensor([1, 4, 9, 20, 33]), 33)
    packed = packing.pack(normal(5, 33))
    buffer = torch.full((packing.numel + 10,), 9.0, dtype=torch.float64)
    buffer[7 : 7 + packing.numel] = packed
    view = buffer[7 : 7 + packing.numel]
    assert torch.equal(packing.unpack(view), packing.unpack(packed))
    assert packing.padding_is_zero(view)
    packing.zero_padding_(buffer[3 : 3 + packing.numel])
    assert torch.equal(buffer[:3], torch.full((3,), 9.0, dtype=torch.float64))


def test_nan_in_the_padding_is_not_zero() -> None:
    packing = PackedLayout(torch.tensor([1, 4, 9, 20]), 33)
    packed = packing.pack(normal(4, 33))
    packed[(packed == 0).nonzero()[0, 0]] = float("nan")
    assert not packing.padding_is_zero(packed)


@pytest.mark.parametrize("prefix, in_features, words", [
    ([3, 1], 5, "decreas|ascending|sorted"),
    ([1, 6], 5, "5"),
    ([-1, 2], 5, "-1|0\\.\\."),
    ([], 5, "empty"),
], ids=["falling", "too wide", "negative", "empty"])  # fmt: skip
def test_bad_prefixes_are_refused(prefix: list[int], in_features: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PackedLayout(torch.tensor(prefix, dtype=torch.long), in_features)
    with pytest.raises(ValueError, match="prefix"):
        PackedLayout(torch.ones(2, 2, dtype=torch.long), 5)


def test_wrong_shapes_are_named() -> None:
    packing = PackedLayout(torch.tensor([1, 4]), 5)
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(5, 2\)"):
        packing.pack(torch.zeros(5, 2))
    for call in (packing.unpack, packing.check_storage):
        with pytest.raises(ValueError, match=rf"{packing.numel}.*{packing.numel + 1}"):
            call(torch.zeros(packing.numel + 1))
        with pytest.raises(ValueError, match=str(packing.numel)):
            call(torch.zeros(1, packing.numel))


def test_a_callers_prefix_is_not_shared() -> None:
    prefix = torch.tensor([1, 4])
    packing = PackedLayout(prefix, 5)
    before = packing.pack(torch.ones(2, 5))
    prefix[0] = 3
    assert torch.equal(packing.pack(torch.ones(2, 5)), before)


def test_copies_and_text() -> None:
    packing = PackedLayout(torch.tensor([1, 4, 4, 9]), 9)
    for twin in (copy.deepcopy(packing), pickle.loads(pickle.dumps(packing))):
        assert torch.equal(twin.panels, packing.panels) and torch.equal(twin.mask(), packing.mask())
    assert "4 x 9" in repr(packing) and str(packing.visible) in repr(packing)


def test_a_number_is_where_the_description_says() -> None:
    """Row 17, column 3, of a layer whose first panel is 5 wide: lane 1 of the second panel."""
    prefix = [2] * 10 + [5] * 6 + [7, 9, 9]
    packing = PackedLayout(torch.tensor(prefix), 12)
    assert packing.panels.tolist() == [0, 5, 14] and packing.numel == 16 * 14
    dense = torch.arange(19 * 12, dtype=torch.float64).view(19, 12) + 1
    packed = packing.pack(dense)
    assert packed[16 * (5 + 3) + 1] == dense[17, 3] and packed[16 * 4 + 10] == dense[10, 4]
    assert packed[16 * 4 + 9] == 0, "row 9 sees two columns"
    assert packed[16 * (5 + 8)] == 0 and packed[16 * (5 + 8) + 1] == dense[17, 8]
    assert not packed[16 * 5 :].view(9, 16)[:, 3:].any(), "the layer ends with row 18"


def test_panels_share_a_width_only_in_large_layers() -> None:
    """Why the tests patch the number of widths: else no small layer would ever have a run of several panels."""
    assert len(PackedLayout(torch.arange(1, 41), 40).runs) == 3
    with shared_widths(1):
        assert [(run.start, run.end, run.width) for run in PackedLayout(torch.arange(1, 41), 40).runs] == [(0, 3, 40)]
    output = PackedLayout(torch.arange(12_288).repeat_interleave(2) * 512 // 12_288, 512)
    assert 1 < len(output.runs) <= 2 * layout.WIDTHS < len(output.panels)


def test_full_size_waste_is_small() -> None:
    output = PackedLayout(torch.arange(12_288).repeat_interleave(2) * 512 // 12_288, 512)
    first, second = PackedLayout(torch.arange(512) * 24, 12_288), PackedLayout(torch.arange(512), 512)
    assert output.numel <= 1.07 * output.visible and first.numel <= 1.07 * first.visible
    assert second.numel <= 1.07 * second.visible


def test_padding_stays_zero_where_it_is_cleared_by_indices() -> None:
    prefix = torch.tensor([0, 0, 3, 3, 8] * 5).sort().values
    packing = PackedLayout(prefix, 8)
    packed = packing.pack(normal(25, 8))
    cleared = layout.zero_padding(torch.where(packed == 0, torch.nan, packed), prefix, packing.panels)
    assert torch.equal(cleared, packed)
