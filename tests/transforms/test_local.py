"""LocalAutoregressive: order and window by the Jacobian, training, arguments."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastmaf
from tests.core.contract import TransformContract
from tests.core.helpers import correlated, generator, jacobian, normal, train
from tests.tolerances import F32, F64, TOLERANCES, assert_close
from tests.transforms.local_blocks import CASE, Shape, block, degrees, features_of, within

pytestmark = pytest.mark.usefixtures("one_thread")


def conditioned(shape: Shape, options: dict[str, Any]) -> Tensor:
    """Returns which x the shift and log-scale of each dimension may depend on."""
    of = degrees(shape, **options)
    # One convolution reaches half a window, one after another twice that.
    reach = (options.get("kernel", 3) // 2) * (2 if options.get("hidden", 4) else 1)
    return (of < of[:, None]) & within(shape, reach, **options)


class TestContract(TransformContract):
    features = 36

    def transform(self, dtype: torch.dtype = F64) -> fastmaf.LocalAutoregressive:
        return block((3, 2, 6), hidden=2, dtype=dtype, scale=0.2)

    def fresh(self, dtype: torch.dtype = F64) -> fastmaf.LocalAutoregressive:
        return block((3, 2, 6), hidden=2, dtype=dtype, scale=0.2, seed=9)


class TestContractOfTheLinearBlock(TestContract):
    def transform(self, dtype: torch.dtype = F64) -> fastmaf.LocalAutoregressive:
        return block((1, 4, 9), patch=1, hidden=0, dtype=dtype, scale=0.2)

    def fresh(self, dtype: torch.dtype = F64) -> fastmaf.LocalAutoregressive:
        return block((1, 4, 9), patch=1, hidden=0, dtype=dtype, scale=0.2, seed=9)


@CASE
def test_z_depends_on_neighbours_of_smaller_degree_alone(shape: Shape, options: dict[str, Any]) -> None:
    transform, x = block(shape, **options), normal(features_of(shape))
    slopes = jacobian(lambda v: transform(v)[0], x)
    others = slopes - slopes.diagonal().diag()
    assert not (others != 0)[~conditioned(shape, options)].any(), "reads what it must not"
    # The diagonal is exp(-log_scale) alone: a leak would add d shift/dx or d log_scale/dx to it.
    _, log_scale = transform.forward_per_dim(x[None], torch.zeros(1, len(x), dtype=F64))
    assert_close("values", slopes.diagonal(), torch.exp(-log_scale[0]))
    by_degree = degrees(shape, **options).argsort(stable=True)
    ordered = slopes[by_degree][:, by_degree]
    assert torch.equal(ordered.triu(1), torch.zeros_like(ordered)), "not triangular in the order of the degrees"


@CASE
def test_z_depends_on_all_that_it_may_depend_on(shape: Shape, options: dict[str, Any]) -> None:
    """With all parameters and pixels positive no relu hides a path, and no two paths cancel."""
    transform, x = block(shape, scale=0.01, **options), normal(features_of(shape)).abs()
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.abs_()
    shift = jacobian(lambda v: v - transform(v)[0] * torch.exp(transform.forward_per_dim(v, 0 * v)[1]), x)
    log_scale = jacobian(lambda v: transform.forward_per_dim(v, 0 * v)[1], x)
    expected = conditioned(shape, options)
    assert torch.equal(shift.abs() > 1e-12, expected)
    if options.get("hidden", 4):
        assert torch.equal(log_scale != 0, expected)
    else:
        assert not log_scale.any(), "with no hidden channels the log-scale is a constant"
    later = degrees(shape, **options) > 0
    if shape[0] > 1 or options.get("patch", 2) > 1:
        assert expected.any(dim=1)[later].all() and not expected.any(dim=1)[~later].any()


def test_the_last_degree_sees_neighbours_on_all_sides() -> None:
    shape = (1, 6, 6)
    transform, of, where = block(shape, hidden=0), degrees(shape).view(6, 6), torch.arange(36).view(6, 6)
    slopes = jacobian(lambda v: transform(v)[0], normal(36))
    last = [(i, j) for i in range(1, 5) for j in range(1, 5) if of[i, j] == 3]
    assert last
    for i, j in last:
        assert (slopes[where[i, j], where[i - 1 : i + 2, j - 1 : j + 2].flatten()] != 0).all()


@CASE
def test_it_starts_as_the_identity(shape: Shape, options: dict[str, Any]) -> None:
    transform, x = fastmaf.LocalAutoregressive(shape, **options), normal(3, features_of(shape), dtype=F32)
    for function in (transform, transform.inverse):
        actual, ladj = function(x)
        assert torch.equal(actual, x) and torch.equal(ladj, torch.zeros(3))


def test_it_leaves_the_identity_when_trained() -> None:
    """Every visible parameter moves within a few steps."""
    transform = fastmaf.LocalAutoregressive((2, 4, 4), generator=generator()).double()
    before = {name: p.detach().clone() for name, p in transform.named_parameters()}
    data = correlated(256, 32)
    losses = train(fastmaf.Flow(32, [transform]), data, steps=20, lr=1e-2)
    assert losses[-1] < losses[0]
    for name, parameter in transform.named_parameters():
        layer = transform.get_submodule(name.split(".")[0])
        shown = layer.mask.expand_as(parameter) != 0 if name.endswith("weight") else torch.ones_like(parameter) != 0
        moved = parameter.detach() != before[name]
        assert not moved[~shown].any()
        if name.startswith("first"):
            moved, shown = moved[:-4], shown[:-4]  # no output sees the last degree's units: it is strictly greater
        assert float(moved[shown].double().mean()) > 0.9, name


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_round_trip_of_a_trained_block(dtype: torch.dtype) -> None:
    transform = fastmaf.LocalAutoregressive((1, 6, 8), generator=generator()).to(dtype)
    flow, x = fastmaf.Flow(48, [transform]), correlated(128, 48, seed=3, dtype=dtype)
    losses = train(flow, correlated(1024, 48, dtype=dtype), steps=80, lr=1e-2)
    assert losses[-1] < losses[0] - 0.1
    with torch.no_grad():
        z, ladj = flow(x)
        back, ladj_back = flow.inverse(z)
        assert float((back - x).abs().max() / x.abs().max()) <= TOLERANCES["round_trip"][dtype]
        assert_close("round_trip", ladj_back, -ladj)
        base = normal(128, 48, seed=4, dtype=dtype)
        assert_close("round_trip", flow(flow.inverse(base)[0])[0], base)


@CASE
def test_hidden_weights_do_not_matter(shape: Shape, options: dict[str, Any]) -> None:
    transform, x = block(shape, **options), normal(3, features_of(shape))
    results = [*transform(x), *transform.inverse(x)]
    sum(r.sin().sum() for r in results).backward()
    for name, parameter in transform.named_parameters():
        if name.endswith("weight") and parameter.numel():
            hidden = transform.get_submodule(name.split(".")[0]).mask.expand_as(parameter) == 0
            assert parameter.grad is not None
            assert not parameter.grad[hidden].any(), f"{name}: a hidden weight has a gradient"
            with torch.no_grad():
                parameter[hidden] = 1e3
    for actual, expected in zip((*transform(x), *transform.inverse(x)), results, strict=True):
        assert_close("values", actual.detach(), expected)


@pytest.mark.parametrize(
    "shape, options", [((1, 2, 4), {"hidden": 2}), ((2, 2, 3), {"patch": 1, "hidden": 0})], ids=str
)
def test_gradients_of_the_parameters(shape: Shape, options: dict[str, Any]) -> None:
    transform, x = block(shape, **options), normal(2, features_of(shape))
    names, values = zip(
        *((name, p.detach().clone().requires_grad_()) for name, p in transform.named_parameters()), strict=True
    )

    def both(*values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, values, strict=True))
        there: tuple[Tensor, Tensor] = torch.func.functional_call(transform, given, (x,))
        return *there, *torch.func.functional_call(
            Inverse(transform), {f"transform.{k}": v for k, v in given.items()}, (x,)
        )

    assert torch.autograd.gradcheck(both, values, fast_mode=True)


class Inverse(nn.Module):
    def __init__(self, transform: fastmaf.LocalAutoregressive) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(z)


def test_log_scales_stay_within_their_bound() -> None:
    transform = block((1, 4, 4), scale=50.0, log_scale_bound=0.7)
    log_scale = transform.forward_per_dim(normal(5, 16), torch.zeros(5, 16, dtype=F64))[1].detach()
    assert float(log_scale.abs().max()) <= 0.7
    assert float(log_scale.abs().max()) > 0.69, "the bound was not reached: nothing was tested"


def test_an_image_is_the_same_at_every_place() -> None:
    """Away from the borders, a shift by a patch shifts the result by a patch."""
    transform, image = block((2, 16, 16), hidden=2), torch.zeros(2, 16, 16, dtype=F64)
    image[:, 6:10, 6:10] = normal(2, 4, 4)
    background = transform(torch.zeros(1, 512, dtype=F64))[0]
    moved = image.roll((2, -2), dims=(1, 2))
    one, other = ((transform(v.view(1, -1))[0] - background).view(2, 16, 16) for v in (image, moved))
    assert_close("values", other[:, 4:14, 2:12].detach(), one.roll((2, -2), dims=(1, 2))[:, 4:14, 2:12])


def test_the_order_is_that_of_the_dither_matrix() -> None:
    for patch, channels in ((1, 3), (2, 1), (2, 3), (4, 2)):
        transform = fastmaf.LocalAutoregressive((channels, patch, patch), patch=patch)
        back = fastmaf.LocalAutoregressive((channels, patch, patch), patch=patch, reverse=True)
        expected = degrees((channels, patch, patch), patch=patch).argsort()
        assert torch.equal(transform.order, expected) and torch.equal(back.order, expected.flip(0))


def test_a_generator_makes_it_repeatable() -> None:
    one, same, other = (fastmaf.LocalAutoregressive((3, 4, 4), generator=generator(s)) for s in (0, 0, 1))
    state = torch.get_rng_state()
    fastmaf.LocalAutoregressive((3, 4, 4), generator=generator())
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        if name.startswith("first"):
            assert not torch.equal(a, c)


def test_few_weights_for_large_images() -> None:
    """The number of weights does not depend on the size of the image."""
    sizes = {
        size: sum(p.numel() for p in fastmaf.LocalAutoregressive((3, size, size)).parameters()) for size in (4, 64, 128)
    }
    assert len(set(sizes.values())) == 1 and sizes[64] < 20_000


def test_beside_whitening_and_logit_in_one_flow() -> None:
    """Whitening, logit and local blocks in one flow, compiled without graph breaks."""
    torch.compiler.reset()
    whitening = fastmaf.GaussianWhitening(24, 3, dtype=F64).fit_(normal(60, 24))
    flow = fastmaf.Flow(24, [fastmaf.Logit(24), whitening, block((1, 4, 6)), block((1, 4, 6), reverse=True, seed=5)])
    x = torch.rand(4, 24, generator=generator(), dtype=F64)
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="eager")
    assert_close("values", compiled(x).detach(), flow.log_prob(x))
    assert_close("values", flow.nll_per_dim(x).sum(dim=1).detach(), -flow.log_prob(x))
    assert_close("round_trip", flow.inverse(flow(x)[0])[0].detach(), x)
    expected = torch.linalg.slogdet(jacobian(lambda v: flow(v)[0], x[0])).logabsdet
    assert_close("slogdet", flow(x)[1][0].detach(), expected)
    torch.compiler.reset()


@given(
    channels=st.integers(1, 3),
    height=st.integers(1, 3),
    width=st.integers(1, 3),
    patch=st.sampled_from([1, 2]),
    kernel=st.sampled_from([1, 3, 5]),
    hidden=st.integers(0, 3),
    reverse=st.booleans(),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30)
def test_any_shape(
    channels: int,
    height: int,
    width: int,
    patch: int,
    kernel: int,
    hidden: int,
    reverse: bool,
    batch: int,
    seed: int,
) -> None:
    shape = (channels, height * patch, width * patch)
    options = {"patch": patch, "kernel": kernel, "hidden": hidden, "reverse": reverse}
    transform, size = block(shape, seed=seed, scale=0.2, **options), features_of(shape)
    x = normal(batch, size, seed=seed)
    with torch.no_grad():
        z, ladj = transform(x)
        assert_close("round_trip", transform.inverse(z)[0], x)
        assert_close("values", transform.inverse(z)[1], -ladj)
    slopes = jacobian(lambda v: transform(v)[0], x[0])
    assert_close("slogdet", ladj[0], torch.linalg.slogdet(slopes).logabsdet)
    seen = (slopes - slopes.diagonal().diag()) != 0
    assert not seen[~conditioned(shape, options)].any()


@pytest.mark.parametrize("shape, options, words", [
    ((4, 4), {}, r"\(channels, height, width\).*found \(4, 4\)"),
    ((1, 3, 4, 4), {}, r"\(channels, height, width\).*found \(1, 3, 4, 4\)"),
    ((0, 4, 4), {}, r"numbers from 1; found \(0, 4, 4\)"), ((3, 4, 0), {}, r"numbers from 1; found \(3, 4, 0\)"),
    ((3, -4, 4), {}, r"numbers from 1; found \(3, -4, 4\)"), ((3, 4.5, 4), {}, r"numbers from 1; found \(3, 4.5, 4\)"),
    ((3, 6, 6), {"patch": 3}, "power of two.*found 3"), ((3, 6, 6), {"patch": 0}, "power of two.*found 0"),
    ((3, 6, 6), {"patch": -2}, "power of two.*found -2"), ((3, 6, 6), {"patch": 4}, "divides.*found 4 for 6 x 6"),
    ((3, 5, 4), {"patch": 2}, "divides.*found 2 for 5 x 4"), ((3, 4, 5), {}, "divides.*found 2 for 4 x 5"),
    ((3, 4, 4), {"kernel": 2}, "kernel must be odd; found 2"), ((3, 4, 4), {"kernel": 0}, "kernel.*found 0"),
    ((3, 4, 4), {"kernel": -1}, "kernel.*found -1"), ((3, 4, 4), {"hidden": -1}, "hidden must be at least 0; found -1"),
    ((3, 4, 4), {"log_scale_bound": 0.0}, "log_scale_bound must be a positive.*found 0"),
    ((3, 4, 4), {"log_scale_bound": -1.0}, "log_scale_bound.*found -1"),
    ((3, 4, 4), {"log_scale_bound": math.inf}, "log_scale_bound.*found inf"),
    ((3, 4, 4), {"log_scale_bound": math.nan}, "log_scale_bound.*found nan"),
], ids=str)  # fmt: skip
def test_wrong_arguments_are_named(shape: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fastmaf.LocalAutoregressive(shape, **options)


def test_wrong_inputs_are_named() -> None:
    flow = fastmaf.Flow(48, [block((3, 4, 4))])
    with pytest.raises(ValueError, match=r"\[\.\.\., 48\]; found \[2, 47\]"):
        flow.log_prob(normal(2, 47))
    with pytest.raises(ValueError, match=r"\[\.\.\., 48\]; found \[2, 3, 4, 4\]"):
        flow.log_prob(normal(2, 3, 4, 4))
    with pytest.raises(ValueError, match="24 features, the flow 48"):
        fastmaf.Flow(48, [block((3, 4, 2))])


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    fastmaf.Flow(72, [block((3, 4, 6))]).save(tmp_path / "flow.safetensors")
    before = torch.get_rng_state()
    fastmaf.load(tmp_path / "flow.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
