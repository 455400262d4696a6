"""Flows that are converted to nflows and zuko, and back again."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastmaf
from fastmaf import AffineMap, NotConvertibleError, SplineMap
from tests.core.helpers import build, generator
from tests.tolerances import F32, F64

nflows = pytest.importorskip("nflows.flows")
zuko = pytest.importorskip("zuko")
pytest.importorskip("normflows")
from nflows import distributions, transforms  # noqa: E402

# After these: of a module that skips itself a part would be imported.
from tests.convert.sources import close, float64, seeded, trained  # noqa: E402

__all__ = ["float64"]  # a fixture


def block(data: st.DataObject, features: int, library: str) -> fastmaf.Transform:
    """Returns a block that the library can express, with random degrees, widths and numbers."""
    widths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    seed = data.draw(st.integers(0, 1000))
    spline = data.draw(st.sampled_from([None, None, SplineMap(3, -2.5, 2.5, squash=library == "zuko")]))
    scale, options = ("softplus", {"epsilon": 1e-2}) if library == "nflows" else ("soft_clip", {"limit": 3.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastmaf.ConnectivityWarning)
        made = fastmaf.MADE(
            features,
            widths,
            degrees=data.draw(st.sampled_from(["spread", "random", "cyclic"])),
            outputs_per_feature=2 if spline is None else spline.outputs,
            activation=data.draw(st.sampled_from(["relu", "relu", "identity"])),
            generator=generator(seed),
        )
    if spline is not None:
        return fastmaf.MonotonicRQS(made, spline)
    return fastmaf.AffineAutoregressive(made, affine_map=AffineMap.of("scale_first", scale, **options))


def random_flow(data: st.DataObject, library: str) -> fastmaf.Flow:
    features = data.draw(st.sampled_from([1, 2, 3, 7, 33, 64]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    kinds: dict[str, Callable[[], fastmaf.Transform]] = {
        "block": lambda: block(data, features, library),
        "permutation": lambda: fastmaf.Permutation(torch.randperm(features)),
        "affine": lambda: fastmaf.ElementwiseAffine(torch.randn(features), 2 * torch.randn(features)),
    }
    drawn = data.draw(st.lists(st.sampled_from(list(kinds)), min_size=1, max_size=5))
    return fastmaf.Flow(features, [kinds[kind]() for kind in [*drawn, "block"]])


def trained_flow(data: st.DataObject, library: str) -> tuple[fastmaf.Flow, Tensor]:
    flow = random_flow(data, library)
    x = torch.randn(9, flow.features)
    trained(flow, lambda: -flow.log_prob(x).mean())
    return flow, x


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_nflows(data: st.DataObject) -> None:
    flow, x = trained_flow(data, "nflows")
    there = fastmaf.to_nflows(flow)
    back: Any = fastmaf.accelerate(there)
    for model in (there, back):
        close(model.log_prob(x), flow.log_prob(x))  # type: ignore[operator]
        close(model.transform_to_noise(x), flow(x)[0])  # type: ignore[operator]
        close(seeded(lambda m=model: m.sample(3)), seeded(lambda: flow.sample(3)))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_zuko(data: st.DataObject) -> None:
    flow, x = trained_flow(data, "zuko")
    there = fastmaf.to_zuko(flow)
    back: Any = fastmaf.accelerate(there)
    for model in (there, back):
        close(model().log_prob(x), flow.log_prob(x))
        close(seeded(lambda m=model: m().sample((3,))), seeded(lambda: flow.sample(3)))
    close(there().transform(x), flow(x)[0])


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_round_trips_of_nflows(data: st.DataObject) -> None:
    """Their own residual networks, random masks, normalisations and orders come back as what they compute."""
    features, layers = data.draw(st.sampled_from([1, 2, 5, 40])), []
    for _ in range(data.draw(st.integers(1, 3))):
        residual = data.draw(st.booleans())
        options = {
            "num_blocks": data.draw(st.integers(0, 2)),
            "use_residual_blocks": residual,
            "random_mask": not residual and data.draw(st.booleans()),
            "use_batch_norm": data.draw(st.booleans()),
        }
        layers.append(transforms.RandomPermutation(features))
        layers.append(
            transforms.MaskedAffineAutoregressiveTransform(features, data.draw(st.integers(1, 24)), **options)
        )
        layers.append(data.draw(st.sampled_from([transforms.BatchNorm, transforms.ActNorm]))(features))
    source = nflows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([features]))
    x = torch.randn(9, features)
    trained(source, lambda: -source.log_prob(x).mean())
    first = fastmaf.accelerate(source)
    back: Any = fastmaf.accelerate(fastmaf.to_nflows(first))
    close(back.log_prob(x), source.log_prob(x))
    close(back.transform_to_noise(x), source.transform_to_noise(x))
    close(seeded(lambda: back.sample(3)), seeded(lambda: source.sample(3)))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_round_trips_of_zuko(data: st.DataObject) -> None:
    features = data.draw(st.sampled_from([1, 2, 5, 40]))
    context = data.draw(st.sampled_from([0, 1, 5])) if features > 1 else 0
    options: dict[str, Any] = {}
    if features > 1:
        widths = data.draw(st.lists(st.integers(1, 24), min_size=1, max_size=3))
        passes, residual = data.draw(st.sampled_from([None, 2, 3])), data.draw(st.booleans())
        options = {"hidden_features": widths, "passes": passes, "residual": residual}
    kind = data.draw(st.sampled_from([zuko.flows.MAF, zuko.flows.NSF])) if features > 1 else zuko.flows.MAF
    source = kind(features, context, transforms=2, randperm=data.draw(st.booleans()), **options)
    x, c = torch.randn(9, features), torch.randn(9, context) if context else None
    trained(source, lambda: -source(c).log_prob(x).mean())
    back = fastmaf.accelerate(fastmaf.to_zuko(fastmaf.accelerate(source)))
    close(back(c).log_prob(x), source(c).log_prob(x))
    close(seeded(lambda: back(c).sample((3,))), seeded(lambda: source(c).sample((3,))))


@pytest.mark.parametrize("library", ["nflows", "zuko"])
def test_inverse_autoregressive_blocks(library: str) -> None:
    scale = ("softplus", {"epsilon": 1e-3}) if library == "nflows" else ("soft_clip", {"limit": 2.0})
    affine_map = AffineMap.of("scale_first", scale[0], **scale[1])
    inner = fastmaf.AffineAutoregressive(fastmaf.MADE(4, 9, generator=generator()), affine_map=affine_map)
    flow = fastmaf.Flow(4, [fastmaf.Permutation([2, 0, 3, 1]), fastmaf.Inverted(inner)])
    x = torch.randn(6, 4)
    there: Any = fastmaf.to_nflows(flow) if library == "nflows" else fastmaf.to_zuko(flow)
    close(there.log_prob(x) if library == "nflows" else there().log_prob(x), flow.log_prob(x))


@pytest.mark.parametrize("library", ["nflows", "zuko"])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_what_comes_out_is_as_what_went_in(library: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(F32)
    source = nflows.MaskedAutoregressiveFlow(5, 8, 2, 1) if library == "nflows" else zuko.flows.MAF(5, transforms=2)
    flow = fastmaf.accelerate(source.to(dtype)).eval()
    state, convert = copy.deepcopy(flow.state_dict()), fastmaf.to_nflows if library == "nflows" else fastmaf.to_zuko
    there = convert(flow)
    assert {p.dtype for p in there.parameters()} == {dtype} and not there.training
    assert all(p.requires_grad for p in there.parameters())
    assert not any(p.requires_grad for p in convert(copy.deepcopy(flow).requires_grad_(False)).parameters())
    assert convert(flow.train()).training
    with torch.no_grad():
        for p in there.parameters():
            p.add_(1.0)
    assert all(torch.equal(value, state[name]) for name, value in flow.state_dict().items()), "memory is shared"


def soft_clipped(**options: Any) -> fastmaf.AffineAutoregressive:
    affine_map = AffineMap.of("scale_first", "soft_clip", limit=2.0)
    return fastmaf.AffineAutoregressive(fastmaf.MADE(4, 9, **options), affine_map=affine_map)


def softplus(**options: Any) -> fastmaf.AffineAutoregressive:
    affine_map = AffineMap.of("scale_first", "softplus", epsilon=1e-3)
    return fastmaf.AffineAutoregressive(fastmaf.MADE(4, 9, **options), affine_map=affine_map)


def hooked(block: fastmaf.AffineAutoregressive) -> fastmaf.AffineAutoregressive:
    block.made.hidden[0].register_forward_hook(lambda *_: None)
    return block


def parametrized(block: fastmaf.AffineAutoregressive) -> fastmaf.AffineAutoregressive:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(block.made.hidden[0], "weight", Doubled())
    return block


class OtherBase(fastmaf.Flow):
    def _base_log_prob(self, z: Tensor) -> Tensor:
        return -z.abs().sum(1)


def refused() -> Iterator[tuple[str, str, Callable[[], Any], str]]:
    def of(*parts: fastmaf.Transform) -> fastmaf.Flow:
        return fastmaf.Flow(4, parts)

    whitening, logit = fastmaf.GaussianWhitening(4, 1), fastmaf.Logit(4)
    for library, block in (("nflows", softplus), ("zuko", soft_clipped)):
        yield library, "map", lambda: build(4), "affine map"
        yield library, "leak", lambda block=block: of(block(strict=False)), "leaky"
        yield library, "whitening", lambda: of(whitening), "GaussianWhitening"
        yield library, "logit", lambda: of(logit), "Logit"
        yield library, "hook", lambda block=block: of(hooked(block())), "hooks"
        yield library, "parametrized", lambda block=block: of(parametrized(block())), "no plain MaskedLinear"
        yield library, "base", lambda block=block: OtherBase(4, [block()]), "another base"
        yield library, "nothing", lambda: nn.Linear(2, 2), "Linear"
    yield "nflows", "zuko's", lambda: of(soft_clipped()), "soft_clip"
    yield "zuko", "nflows'", lambda: of(softplus()), "softplus"
    free = AffineMap.of("scale_first", "soft_clip")
    yield "zuko", "free", lambda: of(fastmaf.AffineAutoregressive(fastmaf.MADE(4, 9), affine_map=free)), "limit inf"
    spline = SplineMap(3, -1.0, 2.0)
    yield "zuko", "spline", lambda: of(fastmaf.MonotonicRQS(net(spline), spline)), "of this spline"
    yield "nflows", "spline", lambda: of(fastmaf.MonotonicRQS(net(spline), spline)), "of this spline"
    source = zuko.flows.MAF(4, 2)
    yield "nflows", "context", lambda: fastmaf.accelerate(source), "context"
    of_nflows = transforms.MaskedAffineAutoregressiveTransform(4, 8, context_features=2)
    flow = nflows.Flow(of_nflows, distributions.StandardNormal([4]))
    yield "zuko", "context", lambda: fastmaf.accelerate(flow), "a function of it"


def net(spline: SplineMap) -> fastmaf.MADE:
    return fastmaf.MADE(4, 9, outputs_per_feature=spline.outputs)


@pytest.mark.parametrize(
    ("library", "make", "reason"), [pytest.param(a, c, d, id=f"{a} {b}") for a, b, c, d in refused()]
)
def test_refused_by_name(library: str, make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(NotConvertibleError, match=reason):
        (fastmaf.to_nflows if library == "nflows" else fastmaf.to_zuko)(make())


@pytest.mark.parametrize("library", ["nflows", "zuko"])
def test_missing_libraries_are_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{library}.transforms", None)  # as if it were not installed
    convert, block = (fastmaf.to_nflows, softplus()) if library == "nflows" else (fastmaf.to_zuko, soft_clipped())
    with pytest.raises(ImportError, match=f"pip install {library}"):
        convert(fastmaf.Flow(4, [block]))
