"""``torch.export`` of densities and of samples for given noise, and ``torch.compile`` of sampling and training."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiler import needs_compiler
from tests.core.composed import EACH, Density, Samples, data, maf, padding_is_zero
from tests.core.helpers import generator
from tests.tolerances import assert_close


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def exported(model: nn.Module, strict: bool = False) -> Any:
    rows = torch.export.Dim("rows")
    return torch.export.export(model, (data(),), dynamic_shapes=({0: rows},), strict=strict)


def agree(program: Any, model: nn.Module) -> None:
    """Compares both for batches of other sizes than the one that was exported."""
    for n in (6, 1, 9):
        x = data(n, seed=n)
        assert_close("values", program.module()(x).detach(), model(x).detach(), f"{n} rows")


@EACH
def test_densities(name: str) -> None:
    model = Density(name)
    agree(exported(model), model)


@pytest.mark.parametrize("name", ["MAF", "nflows", "zuko"])
def test_samples_for_given_noise(name: str) -> None:
    model = Samples(name)
    with torch.no_grad():
        program = exported(model)
    agree(program, model)


def test_a_flow_itself_with_the_strict_exporter() -> None:
    flow, x = maf(), data(3)
    rows = torch.export.Dim("rows")
    program = torch.export.export(flow, (data(),), dynamic_shapes=({0: rows},), strict=True)
    for actual, expected in zip(program.module()(x), flow(x), strict=True):
        assert_close("values", actual.detach(), expected.detach())


@pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
def test_a_program_follows_its_weights_and_is_differentiable(backend: str) -> None:
    model, x = Density(), data(4)
    module = exported(model).module()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    state = model.state_dict()  # with the degrees, which a program holds as constants
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not missing and all(".degrees_" in name for name in unexpected)
    assert_close("values", module(x).detach(), model(x).detach())
    module(x).sum().backward()
    model(x).sum().backward()
    grads = dict(module.named_parameters())
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert_close("gradients", grads[name].grad, p.grad, name)  # type: ignore[arg-type]


def test_weights_are_not_copied_in_the_program() -> None:
    """The ops see to the padding: nothing but them reads a weight."""
    with torch.no_grad():
        program = exported(Density())
    weights = {n for n, target in program.graph_signature.inputs_to_parameters.items() if target.endswith("weight")}
    users = {user.target for node in program.graph.nodes if node.name in weights for user in node.users}
    assert users == {torch.ops.fastmaf.flow_forward.default}


def test_of_given_weights() -> None:
    """``functional_call`` within an export: nothing that the export makes is kept for later calls."""

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Density()

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            weights = {n: p + bias for n, p in self.inner.named_parameters()}
            result: Tensor = torch.func.functional_call(self.inner, weights, (x,))
            return result

    model, x, bias = Given(), data(), torch.tensor(0.01, dtype=torch.float64)
    # The strict exporter of torch 2.7, its default, ignores what functional_call is given, of any module.
    program = torch.export.export(model, (x, bias), strict=False)
    assert_close("values", program.module()(x, bias).detach(), model(x, bias).detach())


def test_saved_programs() -> None:
    model, x, file = Density(), data(5), io.BytesIO()
    torch.export.save(exported(model), file)
    file.seek(0)
    assert_close("values", torch.export.load(file).module()(x).detach(), model(x).detach())


@pytest.mark.slow
@EACH
def test_compiled_modules_are_trained(name: str) -> None:
    """Backend ``aot_eager``: the graphs are Inductor's, without its C++ compiler."""
    models, losses = [Density(name) for _ in range(2)], []
    for model in models:
        call: Any = model if model is models[0] else torch.compile(model, fullgraph=True, backend="aot_eager")
        optimizer = torch.optim.Adam(call.parameters(), lr=1e-2)
        for seed in range(3):
            optimizer.zero_grad()
            loss = -call(data(seed=seed)).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    assert_close("values", torch.stack(losses[3:]), torch.stack(losses[:3]))
    for actual, expected in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert padding_is_zero(models[1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sample", "rsample", "sample_and_log_prob"])
def test_compiled_sampling(method: str) -> None:
    flow = maf()
    draw = getattr(flow, method)
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for n in (4, 2):
        actual, expected = compiled(n, seed=3), draw(n, seed=3)
        for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (actual, expected)), strict=True):
            assert_close("values", a.detach(), b.detach())


@pytest.mark.slow
@needs_compiler
def test_inductor() -> None:
    model, x = Density(), data(4)
    actual = torch.compile(model, fullgraph=True)(x)
    assert_close("values", actual.detach(), model(x).detach())


def test_flows_are_left_as_they_were() -> None:
    flow, x = maf(), data(3)
    before, samples = flow.log_prob(x).detach(), flow.sample(2, generator=generator())
    exported(flow)
    assert torch.equal(flow.log_prob(x).detach(), before)
    assert torch.equal(flow.sample(2, generator=generator()), samples)
