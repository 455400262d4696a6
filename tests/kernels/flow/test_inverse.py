"""The level-scheduled inverse: exact for any weights and degrees, one step per distinct degree of the last layer."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastmaf.kernels import dispatch
from fastmaf.kernels.flow.args import flow_args
from fastmaf.kernels.flow.torch import inverse, plan
from fastmaf.transforms import AffineAutoregressive
from tests.core.helpers import blocks_of, build, normal
from tests.tolerances import TOLERANCES, assert_close, error

# A hypothesis test takes no fixture: it walks through the backends itself.
ON_CPU = [n for n in ("torch", "native") if all(dispatch.missing(op, n) is None for op in dispatch.OPS)]


class Calls(TorchDispatchMode):
    """Counts calls of torch and the numbers that its matrix products read of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.weights_read = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if func is torch.ops.aten.bmm.default or func is torch.ops.aten.addmm_.default:
            self.weights_read += args[1].numel()
        return func(*args, **(kwargs or {}))


def count(features: int, **options: Any) -> tuple[Any, Calls]:
    made = blocks_of(build(features, blocks=1, order="natural", widths="own", **options))[0].made
    with torch.no_grad(), Calls() as seen:
        inverse(normal(2, features), flow_args([AffineAutoregressive(made).block()], [None, None]))
    return made, seen


def test_steps_follow_the_levels_and_not_the_dimensions() -> None:
    """Torch calls per level stay the same while D grows fourfold: no step per dimension, no whole pass per step."""
    few, many = count(500, hidden_features=(40, 40), levels=5), count(2000, hidden_features=(40, 40), levels=5)
    assert few[0].steps == many[0].steps == 6
    assert many[1].calls <= 1.5 * few[1].calls
    more = count(500, hidden_features=(40, 40), levels=40)
    assert more[0].steps == 41
    assert more[1].calls >= 3 * few[1].calls, "the counter does not see steps"


def test_every_weight_is_read_about_once() -> None:
    """The arithmetic of one forward pass, whatever the number of levels."""
    for levels in (3, 20, None):
        made, seen = count(1500, hidden_features=(60, 50), levels=levels)
        stored = sum(layer.layout.numel for layer in made.layers)
        assert 0.5 * stored <= seen.weights_read <= 1.5 * stored, (
            f"levels {levels}: {seen.weights_read} reads for {stored} stored"
        )


DEGREES = {
    "shared": [torch.tensor([1, 4, 4, 9, 12]), torch.tensor([1, 4, 9, 9, 12])],
    "disjoint": [torch.tensor([2, 3, 6, 10]), torch.tensor([1, 5, 7, 11])],
    "last sees nothing": [torch.tensor([2, 3, 6, 10]), torch.tensor([0, 0, 0])],
    "last sees all": [torch.tensor([0, 5, 13]), torch.tensor([13, 13])],
    "first sees all": [torch.tensor([13, 13]), torch.tensor([1, 6, 12])],
    "one layer": [torch.tensor([0, 1, 6, 6, 13])],
    "a panel finished before the last groups": [torch.arange(16) // 8 + 1, torch.arange(48) // 4 + 1],
    "steps of more than a panel": [torch.arange(40) // 20 + 3, torch.arange(60) // 20 * 4 + 1],
    "three layers": [torch.tensor([0, 8, 2]), torch.tensor([11, 3]), torch.tensor([4, 4, 9, 12, 13])],
}


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("name", DEGREES)
def test_levels_are_the_distinct_degrees_of_the_last_layer_below_d_and_one_more(
    backend: str, name: str, merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not merged:
        monkeypatch.setattr(plan, "_SMALL", 0)  # else the torch backend takes all steps of so small a block together
    degrees = DEGREES[name]
    flow = build(13, degrees=degrees, hidden_features=tuple(d.numel() for d in degrees), order="natural", scale=2.0)
    last = degrees[-1].unique()
    assert blocks_of(flow)[0].made.steps == int((last < 13).sum()) + 1
    z = normal(5, 13)
    with torch.no_grad():
        x, ladj = flow.inverse(z)
        expected, expected_ladj = flow.to_naive().inverse(z)
    assert_close("inverse", x, expected)
    assert_close("inverse", ladj, expected_ladj)


@pytest.mark.parametrize("kind", ["spread", "random", "cyclic"])
def test_levels_at_reference_size(kind: str) -> None:
    """513 at most for 512 units, in place of 12,288 passes."""
    from fastmaf import degrees
    from fastmaf.kernels.flow.schedule import level_schedule

    drawn = degrees.hidden_degrees(kind, 12_288, (512, 512), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    schedule = level_schedule(degrees.input_degrees(12_288), drawn)
    assert len(schedule) == drawn[-1].unique().numel() + 1 <= 513


@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("bound", [5.0, 1.0, None])
def test_exact_for_large_log_scales(backend: str, scale: float, bound: float | None) -> None:
    """Weights far from their start: log-scales of several nats, where a fixed-point iteration would not converge."""
    flow = build(
        37,
        blocks=1,
        degrees="random",
        hidden_features=(29, 31),
        scale=scale,
        log_scale_bound=bound or 5.0,
        soft_bound=bound is None,
    )
    z = normal(7, 37)
    with torch.no_grad():
        x, ladj = flow.inverse(z)
        expected, expected_ladj = flow.to_naive().inverse(z)
        log_scales = (flow.nll_per_dim(x) - 0.5 * flow(x)[0] ** 2).abs().max()
    assert torch.isfinite(x).all()
    if scale == 10.0 and bound == 5.0:
        assert log_scales > 3.0, "the weights are not as far off as the test means them to be"
    for row, truth in zip(x, expected, strict=True):
        assert error(row, truth) <= TOLERANCES["inverse"][torch.float64] * 10
    assert_close("inverse", ladj, expected_ladj)


@given(
    features=st.integers(1, 30),
    hidden=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    widths=st.sampled_from(["own", "shared"]),
    small=st.sampled_from([0, 1000, 100_000]),
    batch=st.integers(0, 3),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=50)
def test_random_degrees_per_layer(
    features: int, hidden: list[int], widths: str, small: int, batch: int, seed: int
) -> None:
    source = torch.Generator().manual_seed(seed)
    degrees = [torch.randint(0, features + 1, (width,), generator=source) for width in hidden]
    flow = build(
        features,
        blocks=1,
        degrees=degrees,
        hidden_features=tuple(hidden),
        order="natural",
        widths=widths,
        seed=seed,
        scale=1.5,
    )
    assert blocks_of(flow)[0].made.steps == int((degrees[-1].unique() < features).sum()) + 1
    x = normal(batch, features, seed=seed)
    with torch.no_grad():
        expected, _ = flow.to_naive().inverse(x)
        for backend in ON_CPU:
            with dispatch.use_backend(backend), mock.patch.object(plan, "_SMALL", small):
                z, ladj = flow(x)
                back, ladj_back = flow.inverse(z)
                sample, _ = flow.inverse(x)
            assert_close("inverse", back, x)
            assert_close("inverse", sample, expected)
            assert_close("inverse", ladj_back, -ladj)


def test_layouts_agree(backend: str) -> None:
    """One function with panels of their own widths and with shared ones: the parameters are carried over dense."""
    z = normal(4, 137)
    options: dict[str, Any] = {"blocks": 1, "degrees": "random", "hidden_features": (79, 91)}
    flows = [build(137, widths=widths, **options) for widths in ("own", "shared")]
    with torch.no_grad():
        for source, target in zip(*(blocks_of(flow)[0].made.layers for flow in flows), strict=True):
            assert len(target.layout.runs) < len(source.layout.runs)
            target.load_dense_(source.dense_weight(), source.bias)
        own, shared = (flow.inverse(z) for flow in flows)
    for a, b in zip(own, shared, strict=True):
        assert_close("values", a, b)
