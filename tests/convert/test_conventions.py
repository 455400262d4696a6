"""Methods of converted flows: those of the libraries that they come from, with the same results."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastmaf
from tests.tolerances import F32, F64

nflows = pytest.importorskip("nflows.flows")
zuko = pytest.importorskip("zuko")
normflows = pytest.importorskip("normflows")
from nflows import distributions, transforms  # noqa: E402


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(F32)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.requires_grad == expected.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def perturbed(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module.eval()


def of_nflows(context: int | None = None, base: Any = None) -> Any:
    layers = [
        transforms.PointwiseAffineTransform(torch.randn(4), torch.rand(4) + 0.5),
        transforms.MaskedAffineAutoregressiveTransform(4, 9, context_features=context),
        transforms.PointwiseAffineTransform(0.5, 2),
        transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            4, 9, tails="linear", context_features=context
        ),
    ]
    base = distributions.StandardNormal([4]) if base is None else base
    return perturbed(nflows.Flow(transforms.CompositeTransform(layers), base))


def of_normflows(**options: Any) -> Any:
    affine, spline = normflows.flows.MaskedAffineAutoregressive, normflows.flows.AutoregressiveRationalQuadraticSpline
    layers = [affine(4, 9), normflows.flows.Reverse(affine(4, 9)), spline(4, 1, 9)]
    return perturbed(normflows.NormalizingFlow(normflows.distributions.DiagGaussian(4), layers, **options))


@pytest.mark.parametrize("context", [None, 2])
def test_samples_of_nflows_are_differentiable(context: int | None) -> None:
    source = of_nflows(context)
    flow, c = fastmaf.from_nflows(source), None if context is None else torch.randn(3, context, requires_grad=True)
    found = []
    for one in (flow, source):
        torch.manual_seed(1)
        x, log_prob = one.sample_and_log_prob(5, c)
        torch.manual_seed(1)
        close(one.sample(5, c), x)
        (x.square().mean() + log_prob.mean()).backward()
        found.append((x, log_prob, None if c is None else c.grad))
        if c is not None:
            c.grad = None
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b)
    assert all(parameter.grad is not None for parameter in flow.parameters() if parameter.requires_grad)


def test_arguments_of_nflows() -> None:
    source = of_nflows(2)
    flow, c = fastmaf.from_nflows(source), torch.randn(3, 2)
    found = []
    for one in (flow, source):
        torch.manual_seed(1)
        found.append(one.sample(4, context=c.numpy(), batch_size=2))
        for wrong in ({"num_samples": 0}, {"num_samples": 1.5}, {"num_samples": 3, "batch_size": 0}):
            with pytest.raises(TypeError, match="positive integer"):
                one.sample(context=c, **wrong)
        with pytest.raises(ValueError, match=r"3|equal"):
            one.log_prob(torch.randn(2, 4), context=c)
        with pytest.raises(RuntimeError):
            one(torch.randn(3, 4))
    close(*found)
    close(flow.log_prob(torch.zeros(3, 4).numpy(), context=c.numpy()), source.log_prob(torch.zeros(3, 4), context=c))


def test_a_report_without_the_context_is_refused() -> None:
    flow = fastmaf.from_zuko(zuko.flows.MAF(4, 2, transforms=2))
    with pytest.raises(ValueError, match="trained with a context; expected one, found None"):
        flow.parity_report(torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"expected a tensor \[N, 4\]; found \[4\]"):
        flow.parity_report(torch.randn(4), torch.randn(2))


def test_the_noise_of_trained_bases() -> None:
    x = torch.randn(5, 4)
    source = of_nflows(base=distributions.DiagonalNormal([4]))
    flow = fastmaf.from_nflows(source)
    close(flow.transform_to_noise(x), source.transform_to_noise(x))
    close(flow.log_prob(x), source.log_prob(x))
    source, c = zuko.flows.MAF(4, 2, transforms=2), torch.randn(5, 2)
    source.base = zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.randn(4), torch.rand(4) + 1)
    for one in (source, zuko.flows.NSF(4, transforms=2), zuko.flows.MAF(4, transforms=1)):
        flow, c = fastmaf.from_zuko(one), c if one is source else None
        for line in flow.parity_report(x, c):
            assert line.worst < (1e-9 if line.dtype == F64 else 1e-3), line
        t, expected = flow(c).transform, one(c).transform
        z = t(x)
        close(z, expected(x))
        close(t.inv(z), expected.inv(z))
        close(t.log_abs_det_jacobian(x, z), expected.log_abs_det_jacobian(x, z))
        for found, wanted in zip(t.inv.call_and_ladj(z), expected.inv.call_and_ladj(z), strict=True):
            close(found, wanted)
        close(t.inv.inv(x), z)
        close(flow.transform(c)(x), z)
        close(flow(c).base.log_prob(z), one(c).base.log_prob(z))
        assert flow(c).base.batch_shape == one(c).base.batch_shape
        log_prob = flow(c).base.log_prob(z) + t.log_abs_det_jacobian(x, z)
        torch.testing.assert_close(log_prob, flow(c).log_prob(x))


def test_transforms_of_zuko_broadcast_contexts() -> None:
    source = zuko.flows.MAF(4, 2, transforms=2)
    flow = fastmaf.from_zuko(source)
    for of_x, of_c in (((), ()), ((6,), ()), ((3, 6), (6,))):
        x, c = torch.randn(*of_x, 4), torch.randn(*of_c, 2)
        t, expected = flow(c).transform, source(c).transform
        close(t(x), expected(x))
        close(t.log_abs_det_jacobian(x, t(x)), expected.log_abs_det_jacobian(x, t(x)))
    jacobian = torch.autograd.functional.jacobian(t, x[0])
    assert jacobian.shape == (6, 4, 6, 4) and bool(jacobian.isfinite().all())


def test_files_of_normflows_conventions(tmp_path: Path) -> None:
    flow, x = fastmaf.from_normflows(of_normflows()), torch.randn(6, 4)
    flow.save(tmp_path / "flow")
    other = copy.deepcopy(flow)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert not torch.equal(other.log_prob(x), flow.log_prob(x))
    other.load(tmp_path / "flow")
    assert torch.equal(other.log_prob(x), flow.log_prob(x))
    torch.save(flow.state_dict(), tmp_path / "pickled")
    with pytest.raises(fastmaf.CheckpointError, match="pickled"):
        flow.load(tmp_path / "pickled")


def test_methods_of_normflows() -> None:
    target = normflows.distributions.DiagGaussian(4)
    source = of_normflows(p=target)
    flow, x = fastmaf.from_normflows(source), torch.randn(6, 4)
    close(flow.inverse(x), source.inverse(x))
    close(flow(x), source(x))
    close(flow.forward_kld(x), source.forward_kld(x))
    for method in ("forward_and_log_det", "inverse_and_log_det"):
        for found, expected in zip(getattr(flow, method)(x), getattr(source, method)(x), strict=True):
            close(found, expected)

    def both(method: str, **options: Any) -> list[Any]:
        results = []
        for one in (flow, source):
            torch.manual_seed(1)
            results.append(getattr(one, method)(**options))
        return results

    for found, expected in zip(*both("sample", num_samples=5), strict=True):
        close(found, expected)
    for score_fn in (True, False):
        losses = both("reverse_kld", num_samples=7, beta=0.7, score_fn=score_fn)
        close(*losses)
        grads = []
        for loss in losses:
            target.zero_grad()
            loss.backward()
            grads.append(target.loc.grad)
        torch.testing.assert_close(*grads)
    for alpha, dreg in ((2, False), (0.5, True)):
        close(*both("reverse_alpha_div", num_samples=7, alpha=alpha, dreg=dreg))
    assert all(parameter.requires_grad for parameter in flow.parameters())
    with pytest.raises(ValueError, match="made without p"):
        fastmaf.from_normflows(of_normflows()).reverse_kld()


def test_gradients_of_reverse_kld() -> None:
    """With respect to the base, which both libraries hold as a mean and a logarithm of scales."""
    for score_fn in (True, False):
        source = of_normflows(p=normflows.distributions.DiagGaussian(4))
        flow = fastmaf.from_normflows(source)
        for one in (flow, source):
            torch.manual_seed(1)
            one.reverse_kld(9, score_fn=score_fn).backward()
        last = flow.flow.transforms[-1]
        # The mean is -shift exp(-log_scale), and the base's log-scale is -log_scale.
        scale = (-last.log_scale).exp().detach()
        of_mean, of_log_scale = source.q0.loc.grad[0], source.q0.log_scale.grad[0]
        grads = [-of_mean * scale, of_mean * last.shift * scale - of_log_scale]
        torch.testing.assert_close(last.shift.grad, grads[0])
        torch.testing.assert_close(last.log_scale.grad, grads[1])


def test_nflows_ignores_contexts_where_no_network_is() -> None:
    layers = [transforms.RandomPermutation(4), transforms.PointwiseAffineTransform(0.5, 2.0)]
    source = nflows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([4]))
    flow, c = fastmaf.from_nflows(source), torch.randn(3, 2)
    close(flow.log_prob(torch.ones(3, 4), c), source.log_prob(torch.ones(3, 4), c))
    samples = []
    for one in (flow, source):
        torch.manual_seed(1)
        samples.append(one.sample(5, c))
    close(*samples)
    with pytest.raises(ValueError, match="no context"):
        fastmaf.from_nflows(of_nflows()).log_prob(torch.ones(3, 4), c)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [zuko.flows.MAF, zuko.flows.NSF])
def test_half_precision(make: Any, dtype: torch.dtype) -> None:
    """Sources of few bits are converted as they are, and agree to their rounding."""
    source, x = make(4, transforms=2).to(dtype), torch.randn(20, 4).to(dtype)
    with torch.no_grad():
        found, expected = fastmaf.from_zuko(source)().log_prob(x), source().log_prob(x)
    assert found.dtype == dtype
    assert float((found - expected).double().norm() / expected.double().norm()) < 8 * torch.finfo(dtype).eps


def converted() -> Iterator[tuple[str, Any, Any]]:
    yield "nflows", of_nflows, lambda flow, x: flow.log_prob(x)
    yield "zuko", lambda: zuko.flows.MAF(4, transforms=2), lambda flow, x: flow().log_prob(x)
    yield "normflows", of_normflows, lambda flow, x: flow.log_prob(x)


@pytest.mark.parametrize("make, log_prob", [pytest.param(*rest, id=name) for name, *rest in converted()])
def test_modules(make: Any, log_prob: Any) -> None:
    """Copies, pickles, state dicts, dtypes and modes."""
    flow, other, x = fastmaf.accelerate(make()), fastmaf.accelerate(make()), torch.randn(5, 4)
    expected = log_prob(flow, x)
    assert not torch.allclose(log_prob(other, x), expected)
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    for same in (copy.deepcopy(flow), torch.load(file, weights_only=False), flow.train(), flow.eval()):
        assert torch.equal(log_prob(same, x), expected)
    other = copy.deepcopy(flow)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(flow.state_dict())
    assert torch.equal(log_prob(other, x), expected)
    small = copy.deepcopy(flow).float()
    torch.testing.assert_close(log_prob(small, x.float()), expected.float(), rtol=1e-3, atol=1e-3)
    expected.mean().backward()
    assert all(parameter.grad is not None for parameter in flow.parameters() if parameter.requires_grad)
    assert repr(flow)


@pytest.mark.parametrize("activation", [functional.relu, functional.silu])
def test_training_of_converted_conditional_flows(backend: str, activation: Any) -> None:
    """Gradients of a context and an embedding net are those of the source, on every backend."""
    of = transforms.MaskedAffineAutoregressiveTransform
    layers = [of(3, 8, context_features=2, activation=activation) for _ in range(2)]
    source = nflows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([3]), nn.Linear(4, 2))
    x, c = torch.randn(5, 3), torch.randn(5, 4, requires_grad=True)
    flow = fastmaf.accelerate(source)
    losses = [-one.log_prob(x, c).mean() for one in (flow, source)]  # type: ignore[operator]
    weights = flow.get_parameter("embedding_net.weight"), source.get_parameter("_embedding_net.weight")
    grads = [torch.autograd.grad(loss, (c, of_net)) for loss, of_net in zip(losses, weights, strict=True)]
    for found, expected in zip(*grads, strict=True):
        close(found, expected)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        loss = -flow.log_prob(x, c.detach()).mean()  # type: ignore[operator]
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < float(losses[0].detach()) - 0.05
