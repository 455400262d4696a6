"""The Triton kernels at the size of the reference model, on a GPU alone."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.training.fused_adam import FusedAdam
from tests.core.helpers import build, layers_of, normal, padding_of
from tests.kernels.cases import needs
from tests.tolerances import F32, F64, assert_close, error

pytestmark = [
    pytest.mark.gpu,
    needs("triton"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

D = 12_288


@functools.cache
def model() -> fastmaf.MAF:
    flow = build(D, blocks=2, hidden_features=(512, 512), widths="own", degrees="random", dtype=F32, scale=1.0)
    return flow.to("cuda")


@functools.cache
def truth() -> fastmaf.MAF:
    return copy.deepcopy(model()).double()


def batch_of(n: int, seed: int = 0) -> Tensor:
    return normal(n, D, seed=seed, dtype=F32).to("cuda")


@pytest.mark.parametrize("n", [1, 8, 64])
def test_log_prob(n: int) -> None:
    x = batch_of(n)
    with torch.no_grad():
        with fastmaf.use_backend("triton"):
            found = (*model()(x), model().log_prob(x))
        with fastmaf.use_backend("torch"):
            expected = (*truth()(x.double()), truth().log_prob(x.double()))
    for one, other in zip(found, expected, strict=True):
        assert_close("values", one, other)


@pytest.mark.parametrize("n", [1, 5, 128, 1500])  # 1,500: two runs of the launches
def test_sample(n: int) -> None:
    z = batch_of(n, seed=1)
    with torch.no_grad():
        with fastmaf.use_backend("triton"):
            found = model().inverse(z)
            assert_close("round_trip", model()(found[0])[0], z)
        with fastmaf.use_backend("torch"):
            expected = truth().inverse(z.double())
    for one, other in zip(found, expected, strict=True):
        assert_close("inverse", one, other)


def test_a_step_of_fused_adam() -> None:
    flow, plain, x = copy.deepcopy(model()), copy.deepcopy(truth()), batch_of(8, seed=2)
    # An eps well above what rounding makes of gradients that are zero.
    options = {"lr": 1e-3, "eps": 1e-4}
    with fastmaf.use_backend("triton"):
        optimizer = FusedAdam(flow.parameters(), **options)
        optimizer.minimize(-flow.log_prob(x).mean() / D)
    with fastmaf.use_backend("torch"):
        (-plain.log_prob(x.double()).mean() / D).backward()
        torch.optim.Adam(plain.parameters(), **options).step()
    for (name, own), other, before in zip(
        flow.named_parameters(), plain.parameters(), truth().parameters(), strict=True
    ):
        # A weight of 0.01 to 0.04 in float32 holds a change of some 1e-3 to 1e-6 of it.
        assert error(own.to(F64) - before, other.detach() - before) <= 1e-3, name
    for layer in layers_of(flow).values():
        assert not layer.weight.detach().cpu()[padding_of(layer)].any()


def test_the_same_every_time() -> None:
    x, z = batch_of(8), batch_of(5, seed=1)
    first: list[Tensor] | None = None
    with fastmaf.use_backend("triton"):
        for _ in range(20):
            loss = -model().log_prob(x).mean()
            grads = torch.autograd.grad(loss, list(model().parameters()))
            with torch.no_grad():
                found = [loss, *grads, *model().inverse(z)]
            first = first or found
            assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
