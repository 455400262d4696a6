"""What is known of the padding of packed weights, and read of it at every use."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from fastmaf.kernels import padding
from fastmaf.kernels.tensor_cache import cached
from tests.core.helpers import build, layers_of


def test_no_memory_of_another_thread_s_weights_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread runs the same layers with temporary weights, while this one finds where to look at its own."""
    layers = list(layers_of(build(6)).values())
    weights = [layer.weight for layer in layers]
    prefixes, tables = [layer.prefix for layer in layers], [layer.layout.panels for layer in layers]
    find, others = padding._places, [[weight.detach().clone() for weight in weights]]

    def interrupted(*arguments: Any) -> list[tuple[int, int]]:
        if others:
            padding.keep_zero(others.pop(), prefixes, tables)
        return find(*arguments)

    monkeypatch.setattr(padding, "_places", interrupted)
    with torch.no_grad():
        weights[0].add_(0.0)  # written to: its padding is looked at anew
    tables[0].fastmaf_cache.clear()
    padding.keep_zero(weights, prefixes, tables)
    assert not others
    (known,) = cached(tables[0], ("known padding", len(weights)), list)
    assert known.holds(weights) and known.probes
    for probe in known.probes:
        at = ctypes.addressof(probe)
        assert any(w.data_ptr() <= at and at + ctypes.sizeof(probe) <= w.data_ptr() + w.nbytes for w in weights)
