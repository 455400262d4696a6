"""``MAF(affine_map=...)``: the map of every block, its files, and what contradicts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastmaf
from fastmaf import AffineMap
from tests.core.helpers import blocks_of, normal, train

OPTIONS = ["nflows", "normflows", "zuko", AffineMap.of("shift_first", "soft_clip", limit=2.0)]


@pytest.mark.parametrize("features", [1, 2, 7])
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_trained_flows_invert_and_load(option: AffineMap | str, features: int, tmp_path: Path) -> None:
    flow = fastmaf.MAF(features, 2, (9, 8), affine_map=option, dtype=torch.float64, seed=0)
    expected = AffineMap.named(option) if isinstance(option, str) else option
    assert [block.affine_map for block in blocks_of(flow)] == [expected] * 2
    train(flow, normal(64, features, seed=1), steps=5)
    x = normal(5, features)
    z, ladj = flow(x)
    again, back = flow.inverse(z)
    assert torch.allclose(again, x, rtol=0, atol=1e-10) and torch.allclose(back, -ladj, rtol=0, atol=1e-10)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda row: flow(row)[0], row) for row in x])
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, ladj, rtol=0, atol=1e-10)
    flow.save(tmp_path / "flow.safetensors")
    loaded = fastmaf.load(tmp_path / "flow.safetensors")
    assert isinstance(loaded, fastmaf.MAF) and torch.equal(loaded.log_prob(x), flow.log_prob(x))


def test_no_map_leaves_the_bound() -> None:
    given, default = fastmaf.MAF(5, 2, (6,), affine_map=None, seed=0), fastmaf.MAF(5, 2, (6,), seed=0)
    x = normal(4, 5, dtype=torch.float32)
    assert torch.equal(given.log_prob(x), default.log_prob(x))


@pytest.mark.parametrize("other", [{"log_scale_bound": 5.0}, {"log_scale_bound": None}, {"soft_bound": False}], ids=str)
def test_a_bound_beside_a_map_is_refused(other: dict[str, Any]) -> None:
    name, value = next(iter(other.items()))
    with pytest.raises(ValueError, match=f"affine_map contains the bound.*found .*{name}={value}"):
        fastmaf.MAF(5, 2, (6,), affine_map="zuko", **other)


@pytest.mark.parametrize("wrong, error, words", [
    ("flowjax", ValueError, "'nflows', 'normflows', 'zuko'; found 'flowjax'"),
    (AffineMap(0, 1, -1.0), ValueError, "limit of log-scales must be positive; found -1"),
    (3.0, TypeError, "affine_map must be an AffineMap, the name of a library or None; found 3.0"),
], ids=str)  # fmt: skip
def test_wrong_maps_are_refused(wrong: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fastmaf.MAF(5, 2, (6,), affine_map=wrong)
