"""Gradients as factors on the Triton backend: Adam inside the backward pass, norms, and FusedAdam on a flow."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmaf
from fastmaf import kernels
from fastmaf.kernels.adam.op import adam_step_
from fastmaf.kernels.adam.update import AdamNumbers, Update
from fastmaf.kernels.affine_output.args import AffineArgs, AffineBatch
from fastmaf.kernels.dispatch import implementation
from fastmaf.kernels.factored_grad import FactoredGrad
from fastmaf.kernels.flow.args import FlowBatch, flow_args
from fastmaf.kernels.masked_linear.args import LinearArgs, LinearBatch
from fastmaf.training.fused_adam import FusedAdam
from tests.core.helpers import blocks_of, build, correlated, layers_of, normal, padding_of
from tests.kernels.cases import OPS, TRITON_MARKS, make, permutations_of, poisoned, set_launch
from tests.tolerances import F32, F64, assert_close, error

pytestmark = TRITON_MARKS

D = 13
# Of what Adam has added up over some steps, with an eps that keeps it from dividing rounding by rounding.
TOLERANCE = 5e-5
PLAIN = AdamNumbers(1, 1e-2, 0.9, 0.999, 1e-2, 0.0, False, False)
OPTIONS = {
    "plain": PLAIN,
    "weight decay": PLAIN._replace(weight_decay=0.1),
    "decoupled": PLAIN._replace(weight_decay=0.1, decoupled=True, beta1=0.5, beta2=0.7),
    "maximize": PLAIN._replace(maximize=True, weight_decay=0.2),
    "maximize, decoupled": PLAIN._replace(maximize=True, weight_decay=0.2, decoupled=True, beta1=0.0),
}


@pytest.fixture(autouse=True)
def poison(device: str) -> Iterator[None]:
    with poisoned(device):
        yield


def factors_of(
    kind: str, batch: int, dtype: torch.dtype, device: str, *, seed: int = 0, **options: Any
) -> FactoredGrad:
    """Returns what a backward pass of a layer works with: the same float32 numbers for every dtype."""
    case = make(kind, batch, D, **{"hidden_features": (21,), **options})
    (layer,), t = case.layers, case.tensors
    name, rest = OPS[kind]
    with kernels.use_backend("torch"):
        results = case.call(t)
    if name == "masked_linear":
        parts = [normal(*results.shape, seed=seed + 1), t["x"], results]
    else:
        z, ladj, log_scale = results
        above = (normal(*r.shape, seed=seed + i) for i, r in enumerate((z, ladj, log_scale)))
        parts = [*above, t["h"], z, log_scale, t["x"]]
    rounded = tuple(part.to(F32).to(device, dtype) for part in parts)
    weight, bias = (t[key].to(device, dtype) for key in ("weight 0", "bias 0"))
    args = weight, bias, layer.prefix.to(device), layer.layout.panels, *rest
    if name == "masked_linear":
        return FactoredGrad(name, LinearBatch(*rounded), LinearArgs(*args))
    return FactoredGrad(name, AffineBatch(*rounded), AffineArgs(*args))


def update_of(weight: Tensor, numbers: AdamNumbers) -> Update:
    return Update(torch.zeros_like(weight), torch.zeros_like(weight), numbers)


def steps(
    kind: str, batch: int, backend: str, dtype: torch.dtype, device: str, numbers: AdamNumbers, **options: Any
) -> dict[str, Tensor]:
    """Takes three steps of Adam on one layer; returns what they changed and the other gradients of the last."""
    scale, need = options.pop("scale", 1.0), options.pop("need_inputs", True)
    all_factors = [factors_of(kind, batch, dtype, device, seed=50 * i, **options) for i in range(3)]
    weight = all_factors[0].args.weight
    start, update = weight.clone(), update_of(weight, numbers)
    gradients: tuple[Tensor, ...] = ()
    with kernels.use_backend(backend):
        for i, factors in enumerate(all_factors):
            one = factors._replace(args=factors.args._replace(weight=weight), scale=scale)
            step = update._replace(numbers=numbers._replace(step=i + 1))
            gradients = one.adam_(step, need_inputs=need)
    found = {f"gradient {i}": g for i, g in enumerate(gradients)} if scale == 1.0 else {}
    return found | {"change": weight - start, "exp_avg": update.exp_avg, "exp_avg_sq": update.exp_avg_sq}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert error(found[key], value) <= TOLERANCE, f"{key}: {error(found[key], value):.1e}"


@pytest.mark.parametrize("numbers", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["relu", "affine, soft"])
def test_the_numbers_of_adam(device: str, kind: str, numbers: AdamNumbers) -> None:
    expected = steps(kind, 3, "torch", F64, device, numbers)
    assert expected["change"].any()
    close(steps(kind, 3, "triton", F32, device, numbers), expected)


@pytest.mark.parametrize(
    "need_inputs, rows, columns, programs, batch",
    [(True, 16, 16, 64, 3), (True, 32, 16, 1, 17), (False, 16, 32, 64, 17), (True, 16, 16, 2, 0)],
)
@pytest.mark.parametrize("kind", ["linear", "affine, clamp"])
def test_launch_paths(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    kind: str,
    need_inputs: bool,
    rows: int,
    columns: int,
    programs: int,
    batch: int,
) -> None:
    """In one pass, and in two, where the batch takes several tiles: the gradient of x from the old weights."""
    set_launch(monkeypatch, device, rows, columns, programs)
    numbers = OPTIONS["weight decay"]
    expected = steps(kind, batch, "torch", F64, device, numbers, need_inputs=need_inputs)
    found = steps(kind, batch, "triton", F32, device, numbers, need_inputs=need_inputs)
    close(found, expected)
    assert found["gradient 0"].numel() == (expected["gradient 0"].numel() if need_inputs else 0)


@pytest.mark.parametrize("kind", ["relu", "affine"])
def test_scaled_gradients(device: str, kind: str) -> None:
    for scale in (0.125, 3.0, -1.0):
        expected = steps(kind, 3, "torch", F64, device, PLAIN, scale=scale)
        close(steps(kind, 3, "triton", F32, device, PLAIN, scale=scale), expected)


@pytest.mark.parametrize("kind", ["relu", "affine"])
def test_scalars_read_on_the_device(device: str, kind: str) -> None:
    """As in a replayed graph: what is on the device counts, not the numbers beside it."""
    numbers = OPTIONS["maximize"]._replace(step=7)
    changed = []
    for given in (numbers, numbers._replace(step=1, lr=123.0)):
        factors = factors_of(kind, 3, F32, device)
        start = factors.args.weight.clone()
        scalars = torch.tensor(numbers.kernel_scalars(), dtype=F32, device=device)
        update = update_of(factors.args.weight, given)._replace(scalars=None if given is numbers else scalars)
        with kernels.use_backend("triton"):
            factors.adam_(update)
        changed.append(factors.args.weight - start)
    assert changed[0].any() and torch.equal(*changed)


@pytest.mark.parametrize(
    "kind, batch",
    [("linear", 0), ("linear", 17), ("relu", 1), ("relu", 3), ("affine, clamp", 0), ("affine, clamp", 17)]
    + [("affine, soft", 3), ("affine, free", 1), ("affine, softplus", 3), ("affine, sigmoid", 17)],
)
def test_gradients_without_a_step(monkeypatch: pytest.MonkeyPatch, device: str, kind: str, batch: int) -> None:
    set_launch(monkeypatch, device, 16, 16, 2)
    own, truth = (factors_of(kind, batch, dtype, device).scaled(0.5) for dtype in (F32, F64))
    before = own.args.weight.clone()
    for need_inputs in (True, False):
        with kernels.use_backend("torch"):
            expected = (*truth.grad_inputs(need_inputs), truth.grad_weight())
            norm = float(truth.squared_norm())
        with kernels.use_backend("triton"):
            found = (*own.grad_inputs(need_inputs), own.grad_weight())
            assert float(own.squared_norm()) == pytest.approx(norm, rel=5e-6, abs=0.0)
        for one, other in zip(found, expected, strict=True):
            assert_close("gradients", one, other)
    assert torch.equal(own.args.weight, before), "no step was asked for"


def test_the_padding_stays_zero(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    set_launch(monkeypatch, device, 16, 16, 2)
    for kind, batch in (("linear", 17), ("affine", 3)):
        (layer,) = make(kind, 0, D, hidden_features=(21,)).layers
        padding = padding_of(layer)
        assert padding.any(), "the test wants padding"
        found = steps(kind, batch, "triton", F32, device, OPTIONS["maximize"])
        for key in ("change", "exp_avg", "exp_avg_sq"):
            assert not found[key].cpu()[padding].any() and found[key].cpu()[~padding].any(), key


def flow_steps(
    backend: str, dtype: torch.dtype, device: str, batch: int, need_grad_x: bool, biases_too: bool
) -> dict[str, Tensor]:
    """Takes two steps of Adam on all layers of a flow; returns what they changed and the last gradients."""
    order = [torch.arange(D), torch.arange(D).flip(0)]
    flow = (
        build(D, hidden_features=(9,), order=order, dtype=F32, soft_bound=True).to(device, dtype).requires_grad_(False)
    )
    of = flow_args([block.block() for block in blocks_of(flow)], permutations_of(flow))
    tensors = [*of.weights, *of.biases]
    start, moments = [t.clone() for t in tensors], [update_of(t, PLAIN) for t in tensors]
    grad_biases: list[Tensor] = []
    for i in range(2):
        x, grad_z, grad_ladj = (normal(*s, seed=10 * i + k) for k, s in enumerate(((batch, D), (batch, D), (batch,))))
        x, grad_z, grad_ladj = (t.to(F32).to(device, dtype) for t in (x, grad_z, grad_ladj))
        # As in groups of their own: biases with other numbers than weights.
        numbers = OPTIONS["decoupled"]._replace(step=i + 1)
        updates = [update._replace(numbers=numbers) for update in moments[: len(of.weights)]]
        numbers = OPTIONS["maximize"]._replace(step=i + 1)
        bias_updates = [update._replace(numbers=numbers) for update in moments[len(of.weights) :]]
        with kernels.use_backend(backend):
            ops = implementation("flow", x)
            saved = ops.forward(x, of, True)[2]
            at_once = bias_updates if biases_too and ops.UPDATES_BIASES else None
            grad_x, grad_biases = ops.adam_(FlowBatch(grad_z, grad_ladj, saved), of, need_grad_x, updates, at_once)
            if biases_too and at_once is None:
                for bias, grad, update in zip(of.biases, grad_biases, bias_updates, strict=True):
                    adam_step_(bias, grad, update)
            elif biases_too:
                assert not any(grad.numel() for grad in grad_biases)
    found = {"gradient of x": grad_x}
    if not biases_too:
        found |= {f"gradient of bias {i}": g for i, g in enumerate(grad_biases)}
    for i, (t, before, update) in enumerate(zip(tensors, start, moments, strict=True)):
        found |= {f"change {i}": t - before, f"m {i}": update.exp_avg, f"v {i}": update.exp_avg_sq}
    return found


@pytest.mark.parametrize(
    "batch, need_grad_x, biases_too", [(3, True, False), (1, False, True), (17, True, True), (0, True, True)]
)
def test_a_whole_flow(
    monkeypatch: pytest.MonkeyPatch, device: str, batch: int, need_grad_x: bool, biases_too: bool
) -> None:
    set_launch(monkeypatch, device, 16, 16, 2)
    expected = flow_steps("torch", F64, device, batch, need_grad_x, biases_too)
    found = flow_steps("triton", F32, device, batch, need_grad_x, biases_too)
    close(found, expected)
    assert found["gradient of x"].shape == (batch if need_grad_x else 0, D)


def two_flows(device: str) -> tuple[fastmaf.MAF, fastmaf.MAF]:
    """Returns a float32 flow, and a float64 one of the same numbers."""
    flow = build(D, hidden_features=(9, 7), dtype=F32, order="random").to(device)
    return flow, copy.deepcopy(flow).double()


@pytest.mark.parametrize("way", ["minimize", "step", "clip", "accumulate"])
def test_fused_adam(device: str, way: str) -> None:
    """A flow trained on Triton against torch's Adam on the reference, in float64."""
    flow, plain = two_flows(device)
    start = copy.deepcopy(plain)
    options: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": way == "step"}
    fused, adam = FusedAdam(flow.parameters(), **options), torch.optim.Adam(plain.parameters(), **options)
    for i in range(2):
        x = correlated(5, D, seed=i).to(F32).to(device)
        more = correlated(2, D, seed=i + 50).to(F32).to(device) if way == "accumulate" else None
        with fastmaf.use_backend("torch"):
            adam.zero_grad()
            for part in (x, more):
                if part is not None:
                    (-plain.log_prob(part.double()).mean()).backward()
            if way == "clip":
                norm = float(nn.utils.clip_grad_norm_(plain.parameters(), 0.3))
                assert norm > 0.3
            adam.step()
        with fastmaf.use_backend("triton"):
            fused.zero_grad()
            if way in ("minimize", "clip"):
                assert fused.minimize(-flow.log_prob(x).mean(), 0.3 if way == "clip" else None)
            else:
                for part in (x, more):
                    if part is not None:
                        (-flow.log_prob(part).mean()).backward()
                fused.step()
    for (name, own), other, before in zip(flow.named_parameters(), plain.parameters(), start.parameters(), strict=True):
        assert error(own.double() - before, other - before) <= 1e-4, name
    for layer in layers_of(flow).values():
        padding = padding_of(layer).to(device)
        state = fused.state[layer.weight]
        for t in (layer.weight.detach(), state["exp_avg"], state["exp_avg_sq"]):
            assert t.isfinite().all() and not t[padding].any()


@pytest.mark.parametrize(
    "way, frozen",
    [("minimize", "biases"), ("minimize", "one bias"), ("minimize", "weights"), ("minimize", "first block")]
    + [("step", "biases"), ("step", "first block")],
)
def test_frozen_parameters_stay(device: str, frozen: str, way: str) -> None:
    """As in torch.optim.Adam: what requires no gradient is not updated, not even by weight decay."""
    flow, plain = two_flows(device)
    for model in (flow, plain):
        first = list(model.transforms[1].parameters())
        for name, p in model.named_parameters():
            is_bias = name.endswith("bias")
            fixed = {"biases": is_bias, "weights": not is_bias, "first block": any(p is q for q in first)}
            p.requires_grad_(not fixed.get(frozen, name.endswith("hidden.0.bias")))
    assert {p.requires_grad for p in flow.parameters()} == {True, False}
    start = copy.deepcopy(plain)
    options: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1}
    fused, adam = FusedAdam(flow.parameters(), **options), torch.optim.Adam(plain.parameters(), **options)
    x = correlated(3, D).to(F32).to(device)
    with fastmaf.use_backend("torch"):
        (-plain.log_prob(x.double()).mean()).backward()
        adam.step()
    with fastmaf.use_backend("triton"):
        if way == "minimize":
            fused.minimize(-flow.log_prob(x).mean())
        else:
            (-flow.log_prob(x).mean()).backward()
            fused.step()
    for (name, own), other, before in zip(flow.named_parameters(), plain.parameters(), start.parameters(), strict=True):
        assert error(own.double() - before, other - before) <= 1e-4, name


def test_the_same_every_time(device: str) -> None:
    first: list[Tensor] | None = None
    for _ in range(20 if device == "cuda" else 2):
        flow, _ = two_flows(device)
        optimizer = FusedAdam(flow.parameters())
        with fastmaf.use_backend("triton"):
            optimizer.minimize(-flow.log_prob(correlated(5, D, dtype=F32).to(device)).mean())
        found = [p.detach().clone() for p in flow.parameters()]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
