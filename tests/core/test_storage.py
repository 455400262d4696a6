"""Stored weights, and allocations during construction."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastmaf
from fastmaf import degrees as degree_rules
from fastmaf.kernels import PackedLayout, flow_args
from fastmaf.kernels.flow.torch import inverse
from tests.core.helpers import blocks_of, build, layers_of, normal

FEATURES, HIDDEN = 12_288, (512, 512)


def layouts(hidden_degrees: list[torch.Tensor]) -> list[PackedLayout]:
    """Returns the three layouts of one block of the reference size, without any weights."""
    inputs = degree_rules.input_degrees(FEATURES)
    below = [inputs, *hidden_degrees]
    above = [*hidden_degrees, inputs.repeat_interleave(2)]
    return [
        PackedLayout(degree_rules.prefix(b, a, strict=k == 2), b.numel())
        for k, (b, a) in enumerate(zip(below, above, strict=True))
    ]


@pytest.mark.parametrize("kind", ["spread", "random", "cyclic"])
def test_storage_at_reference_size(kind: Any) -> None:
    for seed in range(1 if kind != "random" else 7):
        drawn = degree_rules.hidden_degrees(kind, FEATURES, HIDDEN, generator=torch.Generator().manual_seed(seed))
        block = layouts(drawn)
        stored, visible = sum(layout.numel for layout in block), sum(layout.visible for layout in block)
        assert visible <= stored <= 1.07 * visible, (
            f"{kind}, seed {seed}: stores {stored / visible:.4f} x the visible weights"
        )


class Allocations(TorchDispatchMode):
    """Records the largest tensor that any torch call returns, in numbers, but for views of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("init", ["linear", "identity"])
@pytest.mark.parametrize("kind", ["spread", "random"])
def test_a_reference_block_holds_its_staircases_and_no_more(kind: str, init: str) -> None:
    with Allocations() as seen:
        flow = build(
            FEATURES, blocks=1, hidden_features=HIDDEN, degrees=kind, init=init, widths="own", dtype=torch.float32
        )
    weights = sum(layer.layout.numel for layer in layers_of(flow).values())
    biases = 512 + 512 + 2 * FEATURES
    assert flow.stored_weights == weights <= 1.07 * flow.visible_weights
    assert sum(p.numel() for p in flow.parameters()) == weights + biases
    assert sum(b.numel() for b in flow.buffers()) <= 8 * FEATURES, "buffers grow faster than D: is a mask among them?"
    # The output layer's dense weight or mask would have 2 * 12,288 * 512 entries; its staircase is half of that.
    assert seen.largest <= 0.6 * 2 * FEATURES * 512, f"construction made a tensor of {seen.largest} entries"


def test_the_recorder_of_allocations_sees_a_dense_mask() -> None:
    with Allocations() as seen:
        _ = torch.arange(100)[:, None] > torch.arange(70)
    assert seen.largest == 7000


PROBE = """
import resource, sys, warnings
import fastmaf
unit = 1 if sys.platform == "darwin" else 1024
fastmaf.MAF(64, 1, (8, 8), seed=0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
flow = fastmaf.MAF(12_288, 1, (512, 512), seed=0)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
print(peak, sum(p.numel() * p.element_size() for p in flow.parameters()))
"""


def test_construction_takes_little_memory() -> None:
    """A D x D object would take 604 MB in float32 and 151 MB as booleans, the dense output mask alone 13 to 50 MB."""
    pytest.importorskip("resource", reason="peak memory is read with getrusage")
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    peak, packed = map(int, done.stdout.split())
    assert peak <= 1.6 * packed, f"construction peaked at {peak / 1e6:.0f} MB for {packed / 1e6:.0f} MB of parameters"


def test_adam_state_follows_the_packed_parameters() -> None:
    flow = build(601, blocks=1, hidden_features=(200, 150), widths="own", dtype=torch.float32)
    optimizer = torch.optim.Adam(flow.parameters())
    (-flow.log_prob(normal(4, 601, dtype=torch.float32)).mean()).backward()
    optimizer.step()
    state = [t for per in optimizer.state.values() for t in per.values() if t.dim() > 0]
    biases = 200 + 150 + 2 * 601
    assert sum(t.numel() for t in state) == 2 * (flow.stored_weights + biases)
    assert flow.stored_weights < 601 * 200 + 200 * 150 + 150 * 1202


def test_samples_at_reference_size_make_nothing_dense() -> None:
    flow = build(FEATURES, blocks=1, hidden_features=HIDDEN, widths="own", dtype=torch.float32)
    args = flow_args([blocks_of(flow)[0].block()], [None, None])
    with torch.no_grad(), Allocations() as seen:
        x, _ = inverse(torch.randn(2, FEATURES), args)
    assert torch.isfinite(x).all()
    assert seen.largest <= 4 * 2 * FEATURES


def test_construction_on_meta_needs_no_weights() -> None:
    flow = build(64, device="meta", dtype=torch.float32)
    assert all(p.is_meta for p in flow.parameters())
    assert isinstance(flow, fastmaf.MAF) and flow.stored_weights > 0
