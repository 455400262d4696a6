"""Whole flows on the Triton backend: trained ones, mixed ones, in bfloat16, and the reference model on a GPU."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf import MADE, AffineAutoregressive, Permutation
from fastmaf.kernels import flow_inverse
from fastmaf.kernels.dispatch import implementation
from fastmaf.kernels.float8 import FLOAT8, decode
from fastmaf.kernels.triton_common import launch_table
from fastmaf.runs import Run
from tests.core.helpers import build, correlated, generator, layers_of, normal, shared_widths, train
from tests.kernels.cases import TRITON_MARKS, poisoned, set_launch
from tests.tolerances import F32, TOLERANCES, assert_close, error

pytestmark = TRITON_MARKS

D = 13


@pytest.fixture(autouse=True)
def poison(device: str) -> Iterator[None]:
    with poisoned(device):
        yield


def both(flow: fastmaf.Flow, x: Tensor, z: Tensor) -> None:
    """Compares forward and inverse, gradients of forward included, with the reference in float64."""
    truth = copy.deepcopy(flow).double()
    results = []
    for backend, model in (("triton", flow), ("torch", truth)):
        dtype = next(model.parameters()).dtype
        at = x.to(dtype).requires_grad_()
        with fastmaf.use_backend(backend):
            forward = model(at)
            (grad,) = torch.autograd.grad(model.log_prob(at).sum(), at)
            with torch.no_grad():
                bare = model(at)
                inverse = model.inverse(z.to(dtype))
        results.append((*forward, *bare, grad, *inverse))
    kinds = ["values"] * 4 + ["gradients"] + ["inverse"] * 2
    for kind, found, expected in zip(kinds, *results, strict=True):
        assert_close(kind, found, expected)


def block(depths: tuple[int, ...], bound: float | None, soft: bool, seed: int, **options: Any) -> AffineAutoregressive:
    with shared_widths():
        made = MADE(D, depths, generator=generator(seed), dtype=F32, **options)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(1.5)
    return AffineAutoregressive(made, log_scale_bound=bound, soft_bound=soft)


@pytest.mark.parametrize(
    "places, batch, most",
    [
        ((), 1, 512),
        ((1, 2), 5, 4),
        ((3,), 1, 512),
        ((0, 1, 2, 3), 1, 512),
        ((1, 3), 0, 512),
    ],
)
def test_blocks_of_all_kinds_in_one_run(
    monkeypatch: pytest.MonkeyPatch, device: str, places: tuple[int, ...], batch: int, most: int
) -> None:
    """Different depths, widths and bounds, free ones among them; permutations at some places, the last among these."""
    # Not by its dotted path: there the function hides the module of the same name.
    triton_kernel = sys.modules["fastmaf.kernels.flow.triton.inverse"]

    set_launch(monkeypatch, device, 16, 16, 1)
    monkeypatch.setattr(triton_kernel, "MOST_SAMPLES", most)
    blocks = [
        block((7, 5, 3), 0.3, False, 0, levels=3),
        block((4,), None, False, 1, levels=2),
        block((9, 6), 0.4, True, 2, degrees="random", levels=4),
    ]
    transforms: list[fastmaf.Transform] = []
    for i in range(4):
        if i in places:
            transforms.append(Permutation(torch.randperm(D, generator=generator(i))))
        transforms += blocks[i : i + 1]
    flow = fastmaf.Flow(D, transforms).to(device)
    x, z = (normal(batch, D, seed=s, dtype=F32).to(device) for s in (0, 1))
    before = x.clone(), z.clone()
    both(flow, x, z)
    assert torch.equal(x, before[0]) and torch.equal(z, before[1]), "an input was written to"


@pytest.mark.parametrize("places", [(), (0, 1)], ids=str)
@pytest.mark.parametrize("save", [False, True])
def test_results_share_no_memory(device: str, save: bool, places: tuple[int, ...]) -> None:
    """As torch demands of an op: neither with each other nor with what went in."""
    parts: list[fastmaf.Transform] = [Permutation(torch.arange(D).flip(0)) for _ in places]
    parts.insert(1, block((4,), 1.0, False, 0))
    flow, x = fastmaf.Flow(D, parts).to(device), normal(2, D, dtype=F32).to(device)
    run = Run(parts)
    with fastmaf.use_backend("triton"), torch.no_grad():
        results = [*implementation("flow", x).forward(x, run.forward.args, save), *flow_inverse(x, run.inverse().args)]
    own = [t.untyped_storage().data_ptr() for t in (x, *results, *flow.parameters()) if t.numel()]
    assert len(set(own)) == len(own)


def test_permutations_alone(device: str) -> None:
    flow = fastmaf.Flow(5, [Permutation(torch.tensor([3, 1, 4, 0, 2]))]).to(device)
    x = normal(2, 5, dtype=F32).to(device)
    with fastmaf.use_backend("triton"):
        assert torch.equal(flow.transforms[0].inverse(flow.transforms[0](x)[0])[0], x)


@functools.cache
def trained() -> fastmaf.MAF:
    flow = build(19, blocks=2, hidden_features=(12, 8), dtype=F32, levels=5)
    with fastmaf.use_backend("torch"):
        losses = train(flow, correlated(1024, 19, dtype=F32), steps=80)
    assert losses[-1] < losses[0] - 0.3, f"training did not get anywhere: {losses[0]:.2f} to {losses[-1]:.2f}"
    return flow


def test_round_trip_of_a_trained_model(device: str) -> None:
    flow = copy.deepcopy(trained()).to(device)
    x, z = correlated(3, 19, seed=7, dtype=F32).to(device), normal(3, 19, seed=8, dtype=F32).to(device)
    both(flow, x, z)
    with fastmaf.use_backend("triton"), torch.no_grad():
        there, ladj = flow(x)
        back, ladj_back = flow.inverse(there)
        assert_close("round_trip", back, x)
        assert_close("round_trip", ladj_back, -ladj)
        assert float((back - x).abs().max() / x.abs().max()) <= TOLERANCES["round_trip"][F32]
        assert_close("round_trip", flow(flow.inverse(z)[0])[0], z)


def test_samples_of_a_trained_model(device: str) -> None:
    flow = copy.deepcopy(trained()).to(device)
    noise = generator(3) if device == "cpu" else torch.Generator(device).manual_seed(3)
    with fastmaf.use_backend("triton"), torch.no_grad():
        x, log_prob = flow.sample_and_log_prob(3, generator=noise)
        assert x.shape == (3, 19)
        assert_close("values", log_prob, flow.log_prob(x))
        assert flow.sample(0).shape == (0, 19)
        assert_close("values", -flow.nll_per_dim(x).sum(1), log_prob)


def test_gradients_of_the_inverse(device: str) -> None:
    flow, z = build(D, dtype=F32, levels=3).to(device), normal(2, D, dtype=F32).to(device)
    grads = []
    for backend, model, at in (("triton", flow, z), ("torch", copy.deepcopy(flow).double(), z.double())):
        with fastmaf.use_backend(backend):
            x, ladj = model.inverse(at)
            grads.append(torch.autograd.grad(x.square().sum() + ladj.sum(), list(model.parameters())))
    for found, expected in zip(*grads, strict=True):
        assert_close("gradients", found, expected)


@pytest.mark.parametrize("dtype, batch", [
    (torch.bfloat16, 1), (torch.bfloat16, 3), (FLOAT8, 1), (FLOAT8, 8), (FLOAT8, 17),
], ids=str)  # fmt: skip
def test_weights_of_fewer_bits(device: str, dtype: torch.dtype, batch: int) -> None:
    """The flow of the rounded weights, whatever is done with it."""
    flow = build(D, dtype=F32, hidden_features=(9, 11), levels=4, scale=1.5, order="random").to(device)
    small, truth = flow.to_inference(dtype), copy.deepcopy(flow).double()
    with torch.no_grad():
        for layer, stored in zip(layers_of(truth).values(), layers_of(small).values(), strict=True):
            layer.weight.copy_(decode(stored.weight, stored.weight_scale, torch.float64))
    x, z = (normal(batch, D, seed=s, dtype=F32).to(device) for s in (0, 1))
    assert error(truth.log_prob(x.double()), copy.deepcopy(flow).double().log_prob(x.double())) > 1e-5, (
        "rounding changes nothing here"
    )
    with torch.no_grad():
        with fastmaf.use_backend("triton"):
            found = (small.log_prob(x), *small(x), *small.inverse(z), small.nll_per_dim(x))
        with fastmaf.use_backend("torch"):
            wide = x.double()
            expected = (truth.log_prob(wide), *truth(wide), *truth.inverse(z.double()), truth.nll_per_dim(wide))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == F32
        assert_close("values", one, other)
    at = x.clone().requires_grad_()
    with fastmaf.use_backend("triton"):
        (grad,) = torch.autograd.grad(small.log_prob(at).sum(), at)
    wide = x.double().requires_grad_()
    with fastmaf.use_backend("torch"):
        (expected_grad,) = torch.autograd.grad(truth.log_prob(wide).sum(), wide)
    assert_close("gradients", grad, expected_grad)


def test_inference_mode_and_training_after_it(device: str) -> None:
    """What is made once and kept must not be bound to the mode that it was made in."""
    flow, x = build(D, dtype=F32, levels=3).to(device), normal(2, D, dtype=F32).to(device)
    with fastmaf.use_backend("triton"):
        with torch.inference_mode():
            flow.log_prob(x), flow.sample(1)
        flow.log_prob(x).sum().backward()
        flow.inverse(x)[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_an_inverse_that_is_replayed() -> None:
    """It follows whatever is changed between calls, and its results stay what they were."""
    flow = build(D, dtype=F32, blocks=3, levels=6, order="random").to("cuda")

    def check(n: int, seed: int) -> None:
        z = normal(n, D, seed=seed, dtype=F32).to("cuda")
        with torch.no_grad():
            found = flow.inverse(z)
            with fastmaf.use_backend("torch"):
                expected = copy.deepcopy(flow).double().inverse(z.double())
        for one, other in zip(found, expected, strict=True):
            assert_close("inverse", one, other)

    for seed, n in enumerate([3, 3, 3, 5, 3, 5, 5]):  # eager, recorded, replayed
        check(n, seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(0.5)
    check(3, 10)
    flow.load_state_dict({key: value.clone() for key, value in flow.state_dict().items()}, assign=True)
    for seed in range(3):
        check(3, seed)
    flow.transforms[0].permutation.copy_(torch.randperm(D))  # type: ignore[union-attr, operator]
    check(3, 11)
    with torch.cuda.stream(torch.cuda.Stream()):
        for seed in range(3):
            check(3, seed)
    with torch.no_grad():
        z = normal(3, D, dtype=F32).to("cuda")
        first = flow.inverse(z)
        kept = [part.clone() for part in first]
        flow.inverse(z + 1)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True)), "overwritten by the next replay"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_threads_that_replay_one_inverse() -> None:
    """They share a stream, a graph and its memory, but no results."""
    flow = build(D, dtype=F32, blocks=3, levels=6, order="random").to("cuda")
    inputs = [normal(3, D, seed=seed, dtype=F32).to("cuda") for seed in range(8)]

    @torch.no_grad()
    def inverse(z: Tensor) -> Tensor:
        return flow.inverse(z)[0]

    expected = [inverse(z) for z in inputs]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(inverse, inputs * 50))
    assert all(torch.equal(one, other) for one, other in zip(found, expected * 50, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_replays_on_two_gpus() -> None:
    """A graph is recorded on a stream of its own GPU; one that is empty would return the results of the recording."""
    flow = build(D, dtype=F32, blocks=3, levels=6, order="random")
    for device in ("cuda:0", "cuda:1"):
        there = copy.deepcopy(flow).to(device)
        for seed in range(4):
            z = normal(3, D, seed=seed, dtype=F32)
            with torch.no_grad():
                found = there.inverse(z.to(device))[0].cpu()
                with fastmaf.use_backend("torch"):
                    expected = copy.deepcopy(flow).double().inverse(z.double())[0]
            assert_close("inverse", found, expected)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_of_several_dtypes_have_no_inverse(device: str, name: str) -> None:
    """Kernels that load addresses would read past the end of the smaller ones."""
    flow, z = build(D, dtype=F32).to(device), normal(2, D, dtype=F32).to(device)
    parameter = getattr(next(iter(layers_of(flow).values())), name)
    parameter.data = parameter.data.bfloat16()
    with (
        fastmaf.use_backend("triton"),
        torch.no_grad(),
        pytest.raises(ValueError, match="of one dtype|must be torch.float32"),
    ):
        flow.inverse(z)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("warps", [1, 4, 8])
def test_programs_of_several_samples(monkeypatch: pytest.MonkeyPatch, warps: int) -> None:
    """As on cards with few multiprocessors; a barrier that is missing shows with several warps alone."""
    set_launch(monkeypatch, "cuda", 32, 32, 1)
    solve = launch_table.Launch(16, 8, warps=warps, programs_per_sm=1)
    for key, table in launch_table.TABLES.items():
        monkeypatch.setitem(launch_table.TABLES, key, table._replace(solve=solve))
    n = 3 * torch.cuda.get_device_properties(0).multi_processor_count
    flow = block((20, 24), 1.0, True, 0, degrees="random").to("cuda")
    z = normal(n, D, dtype=F32).to("cuda")
    with torch.no_grad():
        found = flow.inverse(z)
        with fastmaf.use_backend("torch"):
            expected = copy.deepcopy(flow).double().inverse(z.double())
    for one, other in zip(found, expected, strict=True):
        assert_close("inverse", one, other)
