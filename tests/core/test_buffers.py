"""Results follow every way of writing to buffers; constants cannot be overwritten."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import fastmaf
from fastmaf.constants import constants
from tests.core.helpers import build, generator, jacobian, normal
from tests.tolerances import F32, F64, assert_close
from tests.transforms.local_blocks import block as local_block

pytestmark = pytest.mark.usefixtures("one_thread")
D = 12


def flow(seed: int = 0, dtype: torch.dtype = F64) -> fastmaf.Flow:
    """Returns a flow with a transform of each kind; seeds change buffers and parameters, but not degrees."""
    whitening = fastmaf.GaussianWhitening(D, 4, dtype=dtype)
    whitening.fit_(normal(40, D, seed=seed, dtype=dtype) @ normal(D, D, seed=seed + 1, dtype=dtype))
    affine = build(D, blocks=1, dtype=dtype).transforms[0]
    with torch.no_grad():
        for parameter in affine.parameters():
            parameter.mul_(1 + seed)
    permutation = fastmaf.Permutation(torch.randperm(D, generator=generator(seed)))
    return fastmaf.Flow(D, [whitening, permutation, local_block((1, 2, 6), seed=seed, dtype=dtype), affine])  # type: ignore[list-item]


def check(actual: fastmaf.Flow, expected: fastmaf.Flow) -> None:
    """Compares a flow with another one, and its log-determinants with its Jacobian."""
    x = normal(3, D, dtype=expected._like().dtype)
    for method in ("log_prob", "nll_per_dim"):
        assert torch.equal(getattr(actual, method)(x), getattr(expected, method)(x)), method
    for a, b in zip((*actual(x), *actual.inverse(x)), (*expected(x), *expected.inverse(x)), strict=True):
        assert torch.equal(a, b)
    if x.dtype == F64:
        slopes = torch.linalg.slogdet(jacobian(lambda v: actual(v)[0], x[0])).logabsdet
        assert_close("slogdet", actual(x[:1])[1][0].detach(), slopes)
        assert_close("values", actual.nll_per_dim(x).sum(dim=1).detach(), -actual.log_prob(x).detach())
        assert_close("gradients", actual.inverse(actual(x)[0])[0].detach(), x)


def tensors(of: nn.Module) -> dict[str, Tensor]:
    return {**dict(of.named_parameters()), **dict(of.named_buffers())}


@torch.no_grad()
def _copied(target: nn.Module, source: nn.Module) -> None:
    for name, tensor in tensors(target).items():
        tensor.copy_(tensors(source)[name])


@torch.no_grad()
def _foreach(target: nn.Module, source: nn.Module) -> None:
    torch._foreach_copy_(list(tensors(target).values()), list(tensors(source).values()))


def _data(target: nn.Module, source: nn.Module) -> None:
    for name, tensor in tensors(target).items():
        tensor.data = tensors(source)[name].detach().clone()


def _into_data(target: nn.Module, source: nn.Module) -> None:
    for name, tensor in tensors(target).items():
        tensor.data.copy_(tensors(source)[name])  # leaves the version as it was


def _memory(target: nn.Module, source: nn.Module) -> None:
    for name, tensor in tensors(target).items():
        tensor.detach().numpy()[...] = tensors(source)[name].detach().numpy()


def _set(target: nn.Module, source: nn.Module) -> None:
    for path, tensor in source.named_buffers():
        owner, _, name = path.rpartition(".")
        setattr(target.get_submodule(owner), name, tensor.clone())
    target.load_state_dict(dict(source.named_parameters()), strict=False)


def _swapped(target: nn.Module, source: nn.Module) -> None:
    target._apply(lambda tensor: tensor)
    target.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)


WAYS: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "copy_": _copied,
    "_foreach_copy_": _foreach,
    ".data": _data,
    ".data.copy_": _into_data,
    "numpy": _memory,
    "setattr": _set,
    "load_state_dict": lambda target, source: target.load_state_dict(source.state_dict()),
    "load_state_dict(assign=True)": _swapped,
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("dtype", [F32, F64])
def test_however_buffers_are_written(way: str, dtype: torch.dtype) -> None:
    target, source = flow(0, dtype), flow(1, dtype)
    check(target, flow(0, dtype))  # whatever might be kept is kept by now
    WAYS[way](target, source)
    check(target, source)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_functional_call(dtype: torch.dtype) -> None:
    target, source, x = flow(0, dtype), flow(1, dtype), normal(3, D, dtype=dtype)
    before = target(x)
    for given in (tensors(source), source.state_dict()):
        for a, b in zip(functional_call(target, given, (x,)), source(x), strict=True):  # type: ignore[arg-type]
            assert torch.equal(a, b)
    assert torch.equal(target(x)[1], before[1])


def test_gradients_of_buffers() -> None:
    """The log-determinant is differentiable with respect to the buffers."""
    whitening, x = flow().transforms[0], normal(3, D)
    buffers = {name: b.clone().requires_grad_() for name, b in whitening.named_buffers() if name != "factors"}

    def ladj(*values: Tensor) -> Tensor:
        actual: Tensor = functional_call(whitening, dict(zip(buffers, values, strict=True)), (x,))[1]
        return actual

    assert torch.autograd.gradcheck(ladj, tuple(buffers.values()))


def test_the_log_determinant_is_a_tensor_on_the_device() -> None:
    """A CUDA graph would record a Python number as a constant."""
    whitening = flow().transforms[0]
    assert isinstance(whitening, fastmaf.GaussianWhitening)
    assert isinstance(whitening.ladj, Tensor) and whitening.ladj.dim() == 0 and whitening.ladj.dtype == F64
    assert whitening.to("meta").ladj.is_meta


@pytest.mark.parametrize("options", [{}, {"avg_fn": get_ema_avg_fn(0.999)}, {"avg_fn": get_ema_avg_fn(0.3)}], ids=str)
def test_averages_of_models(options: dict[str, Any]) -> None:
    """Averaging over buffers rounds integers down, where they are buffers: 0.999 · 7 + 0.001 · 7 may be 6.9999."""
    of = build(61, hidden_features=(47, 53), degrees="random", order="natural", dtype=F32)
    of = fastmaf.Flow(61, [fastmaf.GaussianWhitening(61, 3).fit_(normal(70, 61, dtype=F32)), *of.transforms])  # type: ignore[list-item, assignment]
    averaged = AveragedModel(of, use_buffers=True, **options)
    for _ in range(5):
        averaged.update_parameters(of)
    x = normal(4, 61, dtype=F32)
    module = averaged.module
    assert isinstance(module, fastmaf.Flow)
    assert_close("values", module.log_prob(x).detach(), of.log_prob(x).detach())
    for a, b in zip(constants(module), constants(of), strict=True):
        assert torch.equal(a, b)
    locals_ = local_block((1, 2, 6), dtype=F32)
    averaged = AveragedModel(locals_, use_buffers=True, **options)
    for _ in range(5):
        averaged.update_parameters(locals_)
    z, x = averaged(normal(4, 12, dtype=F32))[0], normal(4, 12, dtype=F32)
    assert_close("values", z.detach(), locals_(x)[0].detach())


def test_planned_without_memory_then_filled() -> None:
    """Large models are built on meta, then allocated, then loaded."""
    for whitening in (None, 3):
        make: dict[str, Any] = {"seed": 0, "order": "random", "whitening": whitening}
        of = fastmaf.MAF(D, 2, (16, 9), **make)
        if whitening:
            of.transforms[0].fit_(normal(40, D, dtype=F32))  # type: ignore[union-attr, operator]
        for assign in (False, True):
            planned = fastmaf.MAF(D, 2, (16, 9), device="meta", **make)
            actual = planned if assign else planned.to_empty(device="cpu")
            actual.load_state_dict(copy.deepcopy(of.state_dict()), assign=assign)
            check(actual, of)
    source = fastmaf.MAF(D, 2, (16, 9), seed=0, levels=3, device="meta").to_empty(device="cpu")
    with pytest.raises(ValueError, match="degrees_0 differs from this model's degrees"):
        source.load_state_dict(fastmaf.MAF(D, 2, (16, 9), seed=0).state_dict())


def test_planned_without_memory_then_initialised() -> None:
    """After ``to_empty`` and ``reset_parameters`` a flow is complete: constants are restored."""
    planned = fastmaf.MAF(D, 2, (16, 9), order="random", seed=0, device="meta", dtype=F64).to_empty(device="cpu")
    for module in planned.modules():
        if isinstance(module, fastmaf.MaskedLinear):
            module.reset_parameters(generator=generator())
    x = normal(3, D)
    assert_close("values", planned.log_prob(x).detach(), planned.to_naive().log_prob(x).detach())
    assert_close("gradients", planned.inverse(planned(x)[0])[0].detach(), x)
    with torch.device("meta"):
        local = fastmaf.LocalAutoregressive((1, 2, 6))
    local.to_empty(device="cpu").load_state_dict(local_block((1, 2, 6), dtype=F32).state_dict())
    x32 = normal(3, D, dtype=F32)
    assert torch.equal(local(x32)[0], local_block((1, 2, 6), dtype=F32)(x32)[0])


def test_emptied_then_loaded() -> None:
    target, source = flow(0), flow(1)
    target.to_empty(device="cpu").load_state_dict(source.state_dict())
    check(target, source)


def test_constants_go_where_the_module_goes() -> None:
    of = flow()
    assert not any(t.dtype in (torch.bool, torch.int32) for t in of.buffers())
    moved = copy.deepcopy(of).to("meta")
    assert all(t.is_meta for t in constants(moved)) and not any(t.is_meta for t in constants(of))
    halves = [t.dtype for t in constants(copy.deepcopy(of).to(torch.float16))]
    assert halves == [t.dtype for t in constants(of)]
    check(pickle.loads(pickle.dumps(of)), of)
    check(copy.deepcopy(of), of)


def test_the_state_dict_has_what_it_had() -> None:
    """The state_dict holds the degrees, whose values must match, and no other constants."""
    made = build(D, blocks=1).transforms[0].made
    assert isinstance(made, fastmaf.MADE)
    state = made.state_dict()
    layers = [f"{layer}.{name}" for layer in ("hidden.0", "hidden.1", "output") for name in ("weight", "bias")]
    assert sorted(state) == sorted([*layers, "degrees_0", "degrees_1"])
    assert state["degrees_0"].dtype == torch.int32 and torch.equal(state["degrees_0"], made.degrees[0])
    without = {name: t for name, t in state.items() if name != "degrees_1"}
    with pytest.raises(RuntimeError, match=r"Missing key.*degrees_1"):
        made.load_state_dict(without)
    assert made.load_state_dict(without, strict=False).missing_keys == ["degrees_1"]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*degrees_7"):
        made.load_state_dict({**state, "degrees_7": state["degrees_0"]})


def test_permutations_of_other_dimensions_are_refused_as_ever() -> None:
    of = fastmaf.Permutation(torch.tensor([2, 0, 1]))
    assert of.inverse_permutation.tolist() == [1, 2, 0]
    of.load_state_dict({"permutation": torch.tensor([1, 2, 0])})
    assert of.inverse_permutation.tolist() == [2, 0, 1]
    x = normal(2, 3)
    assert torch.equal(of.inverse(of(x)[0])[0], x)


def test_a_base_model_on_meta() -> None:
    """As in torch's documentation of ensembles: a model on meta, called with the tensors of another one."""
    target, x = flow(), normal(3, D)
    base = copy.deepcopy(target).to("meta")
    for a, b in zip(functional_call(base, tensors(target), (x,)), target(x), strict=True):
        assert torch.equal(a, b)
    class_of = {name: t[None] for name, t in tensors(target).items()}
    actual = torch.func.vmap(lambda given: functional_call(base, given, (x,)))(class_of)
    for a, b in zip(actual, target(x), strict=True):
        assert_close("values", a[0].detach(), b.detach())
