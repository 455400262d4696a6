"""PackedLayout against brute force: dense masks compared entry by entry."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmaf.kernels import PackedLayout, layout
from tests.core.helpers import many_tiles, normal


def brute_force_mask(prefix: list[int], in_features: int) -> Tensor:
    return torch.tensor(
        [[column < seen for column in range(in_features)] for seen in prefix], dtype=torch.bool
    ).reshape(len(prefix), in_features)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[list[int], int, int, int, int, int]:
    """Draws a prefix with plateaus, the input width, the group, and where to cut tiles."""
    in_features = draw(st.integers(1, 70))
    group = draw(st.integers(1, 3))
    values = draw(st.lists(st.integers(0, in_features), min_size=1, max_size=25))
    rows = sorted(value for value in values for _ in range(group))
    min_numel, max_rows = draw(st.sampled_from([1, 24, 200, 32_768])), draw(st.sampled_from([2, 6, 48, 4_096]))
    return rows, in_features, group, min_numel, max_rows, draw(st.sampled_from([1, 4, 16]))


@given(shapes())
@settings(max_examples=150)
def test_random_prefixes(shape: tuple[list[int], int, int, int, int, int]) -> None:
    prefix, in_features, group, min_numel, max_rows, alignment = shape
    with many_tiles(min_numel, max(max_rows, group), alignment):
        packing = PackedLayout(torch.tensor(prefix), in_features, group=group)
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

    # Tiles: rows and storage without gap or overlap, each wide enough for its last row, in whole groups.
    row, offset = 0, 0
    for tile in packing.tiles:
        assert tile.row_start == row and tile.row_end > row and tile.offset == offset
        assert prefix[tile.row_end - 1] <= tile.width <= in_features
        assert (tile.width == 0) == (prefix[tile.row_end - 1] == 0)
        assert tile.row_start % group == 0 and tile.row_end % group == 0
        seen = tile.of(packed)
        assert torch.equal(seen, (dense * mask)[row : tile.row_end, : tile.width])
        row, offset = tile.row_end, offset + (tile.row_end - tile.row_start) * tile.width
    assert row == len(prefix) and offset == packing.numel
    assert packing.table.tolist() == [list(tile) for tile in packing.tiles]

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
    [([0], 1), ([0, 0, 0], 5), ([5, 5, 5], 5), ([1], 1), ([0, 7], 7), ([0, 0, 12_288], 12_288)],
    ids=str,
)
def test_extreme_prefixes(prefix: list[int], in_features: int) -> None:
    packing = PackedLayout(torch.tensor(prefix), in_features)
    dense = normal(len(prefix), in_features)
    assert torch.equal(packing.unpack(packing.pack(dense)), dense * brute_force_mask(prefix, in_features))
    assert packing.visible == sum(prefix) <= packing.numel


def test_padding_of_a_strided_or_offset_weight() -> None:
    """A packed weight may be a slice of a larger buffer, as optimisers that flatten parameters make it."""
    with many_tiles():
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


@pytest.mark.parametrize("prefix, in_features, group, words", [
    ([3, 1], 5, 1, "decreas|ascending|sorted"),
    ([1, 6], 5, 1, "5"),
    ([-1, 2], 5, 1, "-1|0\\.\\."),
    ([], 5, 1, "empty"),
    ([1, 2, 3], 5, 2, "group"),
], ids=["falling", "too wide", "negative", "empty", "group"])  # fmt: skip
def test_bad_prefixes_are_refused(prefix: list[int], in_features: int, group: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PackedLayout(torch.tensor(prefix, dtype=torch.long), in_features, group=group)
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
        assert twin.tiles == packing.tiles and torch.equal(twin.mask(), packing.mask())
    assert "4 x 9" in repr(packing) and str(packing.visible) in repr(packing)


def test_small_layers_get_one_tile_and_large_ones_many() -> None:
    """Why the tests above patch the constants: else no small layer would ever be cut."""
    prefix = torch.arange(1, 41)
    assert len(PackedLayout(prefix, 40).tiles) == 1
    with many_tiles():
        assert len(PackedLayout(prefix, 40).tiles) >= 3
    assert len(PackedLayout(torch.arange(12_288).repeat_interleave(2) * 512 // 12_288, 512, group=2).tiles) > 3
    assert layout.ALIGNMENT >= 1


def test_full_size_waste_is_small() -> None:
    output = PackedLayout(torch.arange(12_288).repeat_interleave(2) * 512 // 12_288, 512, group=2)
    first = PackedLayout(torch.arange(512) * 24, 12_288)
    assert output.numel <= 1.08 * output.visible and first.numel <= 1.08 * first.visible
    assert all((tile.row_end - tile.row_start) * 1 <= layout.MAX_TILE_ROWS for tile in output.tiles)
