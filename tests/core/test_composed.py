"""``torch.func``, autocast, copies, state dicts and pickles, of a MAF and of converted flows."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

import fastmaf
from tests.core.composed import EACH, FLOWS, Density, Samples, data, maf, padding_is_zero
from tests.core.helpers import generator
from tests.tolerances import F32, F64, assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


@EACH
class TestTransformsOfTorchFunc:
    """On every backend they run plain PyTorch, with the same results."""

    def test_derivatives_of_densities(self, name: str, backend: str) -> None:
        model, x = Density(name), data(4).requires_grad_()
        model(x).sum().backward()
        assert x.grad is not None

        def row(v: Tensor) -> Tensor:
            result: Tensor = model(v[None])[0]
            return result

        x_ = x.detach()
        assert_close("values", vmap(row)(x_).detach(), model(x_).detach())
        for slopes in (vmap(grad(row))(x_), vmap(jacrev(row))(x_), vmap(jacfwd(row))(x_)):
            assert_close("gradients", slopes.detach(), x.grad)
        expected = torch.autograd.functional.hessian(lambda v: row(v), x_[0])
        assert_close("gradients", hessian(row)(x_[0]).detach(), expected)  # type: ignore[arg-type]

    def test_jacobian_of_samples(self, name: str, backend: str) -> None:
        model, z = Samples(name), data(1)[0]
        expected = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], z)
        assert_close("gradients", jacrev(lambda v: model(v[None])[0])(z).detach(), expected)  # type: ignore[arg-type]

    def test_gradients_of_each_sample(self, name: str, backend: str) -> None:
        model, x = Density(name), data(3)
        weights = {key: p.detach() for key, p in model.named_parameters()}

        def nll(weights: dict[str, Tensor], row: Tensor) -> Tensor:
            result: Tensor = -functional_call(model, weights, (row[None],)).sum()
            return result

        actual = vmap(grad(nll), in_dims=(None, 0))(weights, x)
        for i, row in enumerate(x):
            model.zero_grad()
            (-model(row[None]).sum()).backward()
            for key, p in model.named_parameters():
                assert p.grad is not None
                torch.testing.assert_close(actual[key][i], p.grad, rtol=1e-10, atol=1e-11)


@EACH
def test_autocast_leaves_converted_flows_in_float32(name: str, backend: str) -> None:
    for make in (Density, Samples):
        model, x = make(name, F32), data(5, F32)
        expected = model(x)
        expected.sum().backward()
        grads = [p.grad for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = model(x)
            actual.sum().backward()
        assert torch.equal(actual, expected)
        for p, expected_grad in zip(model.parameters(), grads, strict=True):
            assert p.grad is not None and expected_grad is not None and torch.equal(p.grad, expected_grad)


def by_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def by_pickle(model: nn.Module) -> nn.Module:
    result: nn.Module = pickle.loads(pickle.dumps(model))
    return result


def by_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(model)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    again.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return again


@EACH
@pytest.mark.parametrize("way", [by_deepcopy, by_pickle, by_file])
def test_copies(name: str, way: Callable[[nn.Module], nn.Module], backend: str) -> None:
    model, x = Density(name), data(5)
    before = model(x).detach()  # what a flow keeps for later calls is there
    twin = way(model)
    assert torch.equal(twin(x).detach(), before)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.01)
    assert torch.equal(model(x).detach(), before)
    assert not torch.equal(twin(x).detach(), before)


@EACH
class TestStateDicts:
    def test_of_another_dtype(self, name: str) -> None:
        source, x = Density(name, F64), data(5, F32)
        target = Density(name, F32)
        target.load_state_dict(source.state_dict())
        assert {p.dtype for p in target.parameters()} == {F32}
        assert_close("values", target(x).detach(), source(x.double()).detach())

    def test_assigned(self, name: str) -> None:
        source, x = Density(name, F64), data(5)
        target = Density(name, F32)
        target.load_state_dict(source.state_dict(), assign=True)
        assert {p.dtype for p in target.parameters()} == {F64}
        if name == "nflows":  # its normalising constant is in no state, and a flow in float32 has rounded it
            assert target.flow._log_z == pytest.approx(source.flow._log_z, rel=1e-7)
            target.flow._log_z = source.flow._log_z
        assert torch.equal(target(x).detach(), source(x).detach())

    def test_assigned_to_a_model_without_numbers(self, name: str) -> None:
        source, x = Density(name, F64), data(5)
        target = Density(name, F64).to("meta")
        target.load_state_dict(source.state_dict(), assign=True)
        assert torch.equal(target(x).detach(), source(x).detach())

    def test_mapped_into_memory(self, name: str, tmp_path: object) -> None:
        source, x, path = Density(name, F64), data(5), f"{tmp_path}/state.pt"
        torch.save(source.state_dict(), path)
        target = Density(name, F64)
        target.load_state_dict(torch.load(path, mmap=True, weights_only=True), assign=True)
        assert torch.equal(target(x).detach(), source(x).detach())


@EACH
def test_vectors_of_parameters(name: str) -> None:
    model, x = Density(name), data(5)
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    noisy = vector + 0.01  # in the padding, too
    nn.utils.vector_to_parameters(noisy, model.parameters())
    moved = model(x).detach()
    assert padding_is_zero(model)
    twin = Density(name)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.01)
    assert torch.equal(moved, twin(x).detach())
    nn.utils.vector_to_parameters(vector, model.parameters())
    assert torch.equal(model(x).detach(), Density(name)(x).detach())


class TestPickles:
    """They are torch's: what safetensors bytes would lose, a worker may need."""

    def test_parameters_stay_those_of_an_optimizer(self) -> None:
        flow, x = maf(), data()
        optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
        twin, of_twin = pickle.loads(pickle.dumps((flow, optimizer)))
        (-twin.log_prob(x).mean()).backward()
        of_twin.step()
        assert all(a is b for a, b in zip(twin.parameters(), of_twin.param_groups[0]["params"], strict=True))
        assert not torch.equal(twin.log_prob(x), flow.log_prob(x))

    def test_what_is_set_on_a_flow_is_kept(self) -> None:
        flow = maf(F32).to_inference()
        flow.validate_args, flow.note = False, "from Monday"  # type: ignore[assignment]
        twin = pickle.loads(pickle.dumps(flow))
        assert not any(p.requires_grad for p in twin.parameters()) and not twin.training
        assert twin.validate_args is False and twin.note == "from Monday" and type(twin) is fastmaf.MAF
        z = data(3, F32)
        assert torch.equal(twin.inverse(z)[0], flow.inverse(z)[0])

    @pytest.mark.slow
    def test_in_spawned_processes(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        flows = {name: make() for name, make in FLOWS.items()}
        with context.Pool(1) as pool:
            for flow in flows.values():
                expected = _samples(flow)
                assert torch.equal(pool.apply(_samples, (flow,)), expected)


def _samples(flow: nn.Module) -> Tensor:
    z = torch.randn(4, 7, generator=generator(5), dtype=F64)
    with torch.no_grad():
        result: Tensor = (flow.inverse if isinstance(flow, fastmaf.Flow) else flow.from_base)(z)[0]  # type: ignore[operator]
    return result.clone()
