"""``Flow.to_inference``: an exact flow with bfloat16 weights, half the bytes and nearly the same density."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from tests.core.helpers import build, correlated, generator, layers_of, normal, shared_widths, train
from tests.tolerances import F32, TOLERANCES, assert_close

pytestmark = pytest.mark.usefixtures("backend")

D = 37


def flow_of(**options: Any) -> fastmaf.MAF:
    return build(D, **{"dtype": F32, "hidden_features": (29, 31), "degrees": "random", "scale": 1.5, **options})


def rounded(flow: fastmaf.Flow) -> fastmaf.Flow:
    """Returns a float32 flow whose weights are those of ``to_inference``."""
    twin = copy.deepcopy(flow)
    with torch.no_grad():
        for layer in layers_of(twin).values():
            layer.weight.copy_(layer.weight.bfloat16())
    return twin


def weight_bytes(flow: fastmaf.Flow) -> int:
    return sum(layer.weight.numel() * layer.weight.element_size() for layer in layers_of(flow).values())


@pytest.mark.parametrize("order", ["natural", "alternate", "random"])
def test_it_is_the_flow_of_the_rounded_weights(order: str) -> None:
    flow, x, z = flow_of(order=order), normal(9, D, dtype=F32), normal(9, D, seed=1, dtype=F32)
    before = {name: t.clone() for name, t in flow.state_dict().items()}
    small, twin = flow.to_inference(), rounded(flow)
    assert 2 * weight_bytes(small) == weight_bytes(flow)
    assert type(small) is type(flow) and not small.training
    assert not any(p.requires_grad for p in small.parameters())
    with torch.no_grad():
        for actual, expected in zip((small.log_prob(x), *small(x)), (twin.log_prob(x), *twin(x)), strict=True):
            assert actual.dtype == F32
            assert_close("values", actual, expected)
        assert_close("values", small.nll_per_dim(x), twin.nll_per_dim(x))
        for actual, expected in zip(small.inverse(z), twin.inverse(z), strict=True):
            assert_close("inverse", actual, expected)
        assert_close("inverse", small.sample(5, generator=generator()), twin.sample(5, generator=generator()))
    assert small.sample(5, generator=generator()).dtype == F32
    assert all(torch.equal(t, before[name]) for name, t in flow.state_dict().items()), "the original was changed"
    assert all(p.requires_grad for p in flow.parameters())
    with torch.no_grad():
        small(x)
        for parameter in flow.parameters():
            parameter.zero_()
    assert_close("values", small.log_prob(x), twin.log_prob(x), "shares memory with the original")


def test_round_trip() -> None:
    small, x = flow_of().to_inference(), normal(65, D, dtype=F32)
    with torch.no_grad():
        z, ladj = small(x)
        back, ladj_back = small.inverse(z)
        there, _ = small(small.inverse(x)[0])
    assert_close("round_trip", back, x)
    assert_close("round_trip", there, x)
    assert_close("round_trip", ladj_back, -ladj)
    x, log_prob = small.sample_and_log_prob(7, generator=generator())
    assert_close("values", log_prob, small.log_prob(x))


def test_gradients_with_respect_to_x() -> None:
    flow = flow_of()
    grads = []
    for model in (flow.to_inference(), rounded(flow)):
        x, z = (normal(9, D, seed=s, dtype=F32).requires_grad_() for s in (2, 3))
        loss = model.log_prob(x).sum() + model.inverse(z)[0].square().sum()
        grads.append(torch.autograd.grad(loss, (x, z)))
    for actual, expected in zip(*grads, strict=True):
        assert_close("gradients", actual, expected)


def test_save_and_load(tmp_path: Path) -> None:
    flow, x = flow_of(order="random"), normal(5, D, dtype=F32)
    small, path = flow.to_inference(), tmp_path / "small.safetensors"
    small.save(path)
    flow.save(tmp_path / "full.safetensors")
    assert path.stat().st_size < (tmp_path / "full.safetensors").stat().st_size
    with shared_widths():
        again = fastmaf.load(path)
    for layer in layers_of(again).values():
        assert layer.weight.dtype == torch.bfloat16 and layer.bias.dtype == F32
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert torch.equal(again.log_prob(x), small.log_prob(x))
    assert torch.equal(again.inverse(x)[0], small.inverse(x)[0])
    assert torch.equal(again.sample(3, generator=generator()), small.sample(3, generator=generator()))
    again.save(tmp_path / "again.safetensors")
    fastmaf.load(tmp_path / "again.safetensors")  # with other widths than it was saved with


def test_a_frozen_copy_in_the_own_dtype() -> None:
    for dtype in (F32, torch.float64):
        flow, x = flow_of(dtype=dtype), normal(5, D, dtype=dtype)
        frozen = flow.to_inference(dtype)
        assert not any(p.requires_grad for p in frozen.parameters())
        assert torch.equal(frozen.log_prob(x), flow.log_prob(x))
        assert weight_bytes(frozen) == weight_bytes(flow)


@pytest.mark.parametrize("dtype_of_flow, dtype", [
    (F32, torch.float16), (F32, torch.float64), (F32, torch.int8), (torch.float64, torch.bfloat16),
    (torch.float64, F32),
])  # fmt: skip
def test_other_dtypes_are_refused(dtype_of_flow: torch.dtype, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=str(dtype)):
        flow_of(dtype=dtype_of_flow).to_inference(dtype)


def test_other_inputs_are_refused() -> None:
    small = flow_of().to_inference()
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match="float32"):
            small.log_prob(torch.zeros(2, D, dtype=dtype))


def test_a_copy_of_the_copy() -> None:
    small, x = flow_of().to_inference(), normal(5, D, dtype=F32)
    for twin in (copy.deepcopy(small), small.to_inference()):
        assert weight_bytes(twin) == weight_bytes(small)
        assert torch.equal(twin.log_prob(x), small.log_prob(x))


@pytest.mark.slow
def test_what_it_costs_on_a_trained_model() -> None:
    """Measured on both backends: -1.9e-4 nats/dim in the mean, 7e-3 at most in 512 samples; the bounds leave room."""
    flow = build(61, blocks=3, hidden_features=(48, 32), dtype=F32)
    train(flow, correlated(2048, 61, dtype=F32))
    x: Tensor = correlated(512, 61, seed=1, dtype=F32)
    with torch.no_grad():
        full, small = flow.log_prob(x), flow.to_inference().log_prob(x)
        z = normal(64, 61, seed=2, dtype=F32)
        worst = float((flow.to_inference()(flow.to_inference().inverse(z)[0])[0] - z).abs().max() / z.abs().max())
    mean, largest = float((small - full).mean()) / 61, float((small - full).abs().max()) / 61
    print(f"bfloat16 weights: {mean:+.2e} nats/dim in the mean, {largest:.2e} at most; full {full.mean() / 61:.3f}")
    assert abs(mean) <= 1e-3
    assert largest <= 5e-2
    assert worst <= TOLERANCES["round_trip"][F32]
