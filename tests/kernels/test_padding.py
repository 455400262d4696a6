"""What is known of the padding of packed weights, and read of it at every use."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from fastmaf.kernels import PackedLayout, padding
from fastmaf.kernels.tensor_cache import cached
from tests.core.helpers import build, layers_of


def test_no_memory_of_another_thread_s_weights_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread runs the same layers with temporary weights, while this one finds where to look at its own."""
    layers = list(layers_of(build(6)).values())
    weights = [layer.weight for layer in layers]
    prefixes, panels = [layer.prefix for layer in layers], [layer.layout.panels for layer in layers]
    find, others = padding._places, [[weight.detach().clone() for weight in weights]]

    def interrupted(*arguments: Any) -> list[int]:
        if others:
            padding.keep_zero(others.pop(), prefixes, panels)
        return find(*arguments)

    monkeypatch.setattr(padding, "_places", interrupted)
    with torch.no_grad():
        weights[0].add_(0.0)  # written to: its padding is looked at anew
    panels[0].__dict__.pop("fastmaf_cache", None)
    padding.keep_zero(weights, prefixes, panels)
    assert not others
    (known,) = cached(panels[0], ("known padding", len(weights)), list)
    assert known.holds(weights) and known.probes
    for probe in known.probes:
        at = ctypes.addressof(probe)
        assert any(w.data_ptr() <= at and at + ctypes.sizeof(probe) <= w.data_ptr() + w.nbytes for w in weights)


def test_what_is_found_within_a_transform_outlives_it() -> None:
    layer = next(iter(layers_of(build(6)).values()))
    layout = PackedLayout(layer.prefix, 6)
    torch.func.grad(lambda x: (x + padding.without_padding(layer.weight, layout.prefix, layout.panels).sum()).sum())(
        torch.zeros(3, dtype=torch.float64)
    )
    assert layout.padding_is_zero(padding.without_padding(layer.weight, layout.prefix, layout.panels))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_probes_lie_in_the_first_and_the_last_rows_that_have_padding(dtype: torch.dtype) -> None:
    for prefix in ([3] * 5, [0, 0, 4, 9] * 9, [1], [2] * 16, [0] * 40, [2] * 16 + [5] * 7):
        layout = PackedLayout(torch.tensor(prefix).sort().values, 9)
        weight = layout.pack(torch.ones(len(prefix), 9, dtype=dtype))
        places = padding._places(weight, layout.prefix, layout.panels)
        assert bool(places) == (layout.numel > layout.visible)
        for place in places:
            assert weight[place] == 0
            row = int(torch.searchsorted(layout.panels, place // 16, right=True) - 1) * 16 + place % 16
            hidden = [k for k in range(16 * (len(layout.panels) - 1)) if _sees(layout, k) < _width(layout, k)]
            assert row in (hidden[0], hidden[-1])


def _sees(layout: PackedLayout, row: int) -> int:
    return int(layout.prefix[row]) if row < layout.out_features else 0


def _width(layout: PackedLayout, row: int) -> int:
    return int(layout.panels.diff()[row // 16])
