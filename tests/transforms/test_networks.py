"""Blocks of networks with residual blocks, other activations, contexts and dropout."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastmaf
from fastmaf.kernels.activations import ACTIVATIONS
from fastmaf.transforms import Transform
from tests.core.contract import TransformContract
from tests.core.helpers import build, correlated, generator, jacobian, naive_gradients, normal, shared_widths
from tests.tolerances import F32, F64, assert_close, error

SPLINE = fastmaf.SplineMap(bins=4, low=-3.0, high=3.0)
NETWORKS: dict[str, dict[str, Any]] = {
    "residual": {"residual": True, "hidden_features": (12, 9, 12)},
    "two residual blocks": {"residual": True, "hidden_features": (12, 5, 12, 30, 12), "activation": "elu"},
    "context": {"context_features": 3},
    "silu": {"activation": "silu"},
    "linear sums": {"residual": True, "hidden_features": (12, 9, 12), "activation": ("identity", "elu", "identity")},
    "of each layer": {"activation": ("identity", "gelu")},
    "all": {"residual": True, "hidden_features": (12, 12, 12), "context_features": 2, "activation": "gelu"},
}
by_network = pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)


def made_of(features: int = 9, dtype: torch.dtype = F64, seed: int = 0, **options: Any) -> fastmaf.MADE:
    options = {"hidden_features": (12, 9), "degrees": "random", **options}
    with shared_widths():
        made = fastmaf.MADE(features, generator=generator(seed), dtype=dtype, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.5)
    return made


def splines_of(**options: Any) -> fastmaf.MonotonicRQS:
    return fastmaf.MonotonicRQS(made_of(outputs_per_feature=SPLINE.outputs, **options), SPLINE)


def contexts(options: dict[str, Any], n: int, seed: int = 5) -> list[Tensor]:
    """Returns the context ``[n, C]`` of a flow with these options, in a list; an empty one where there is none."""
    size = options.get("context_features", 0)
    return [normal(n, size, seed=seed)] if size else []


def train(flow: fastmaf.Flow, x: Tensor, context: list[Tensor], steps: int = 20) -> None:
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (-flow.log_prob(x, *context).mean()).backward()
        optimizer.step()
    optimizer.zero_grad()


class TestResidualAffine(TransformContract):
    features = 13

    def transform(self, dtype: torch.dtype = F64, seed: int = 0) -> Transform:
        made = made_of(13, dtype, seed, hidden_features=(18, 11, 18), residual=True, activation="silu")
        return fastmaf.AffineAutoregressive(made, log_scale_bound=2.0, soft_bound=True)

    def fresh(self, dtype: torch.dtype = F64) -> Transform:
        other = self.transform(dtype)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
        return other


class TestResidualSpline(TestResidualAffine):
    def transform(self, dtype: torch.dtype = F64, seed: int = 0) -> Transform:
        options: dict[str, Any] = {"hidden_features": (18, 11, 18), "residual": True, "activation": "tanh"}
        return fastmaf.MonotonicRQS(made_of(13, dtype, seed, outputs_per_feature=SPLINE.outputs, **options), SPLINE)


@by_network
def test_blocks_are_autoregressive(options: dict[str, Any], backend: str) -> None:
    """The Jacobian by autograd is triangular, its log-determinant is ladj, and both inverses invert."""
    made = made_of(**options)
    for block in (fastmaf.AffineAutoregressive(made), splines_of(**options)):
        x, context = normal(5, 9), contexts(options, 5)
        z, ladj = block(x, *context)
        for i in range(3):
            of = [part[i : i + 1] for part in context]
            slopes = jacobian(lambda row, of=of, block=block: block(row, *of)[0], x[i])
            assert torch.equal(slopes, slopes.tril())
            assert_close("slogdet", torch.linalg.slogdet(slopes)[1], ladj[i].detach())
        terms = block.forward_per_dim(x, torch.zeros_like(x), *context)[1]
        assert_close("values", -terms.sum(1).detach(), ladj)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                back, ladj_back = block.inverse(z, *context)
            assert error(back, x) < 1e-9 and error(ladj_back, -ladj) < 1e-9


def compare_with_naive(flow: fastmaf.MAF, x: Tensor, context: list[Tensor]) -> None:
    """Values, the inverse, and the gradients of x, the context and all parameters, with those of the dense model."""
    naive = flow.to_naive()
    inputs = [[tensor.clone().requires_grad_() for tensor in (x, *context)] for _ in range(2)]
    results = [model(*of) for model, of in zip((flow, naive), inputs, strict=True)]
    for found, expected in zip(*results, strict=True):
        assert_close("values", found, expected)
    for z, ladj in results:
        ((z * normal(*x.shape, seed=3)).sum() + (ladj * normal(len(x), seed=4)).sum()).backward()
    for fast, dense in zip(*inputs, strict=True):
        assert fast.grad is not None and dense.grad is not None
        assert_close("gradients", fast.grad, dense.grad)
    for name, (found, expected) in naive_gradients(flow, naive).items():
        assert_close("gradients", found, expected, name)
    with torch.no_grad():
        for found, expected in zip(flow.inverse(x, *context), naive.inverse(x, *context), strict=True):
            assert_close("inverse", found, expected)
    back, ladj = flow.inverse(flow(x, *context)[0], *context)
    assert error(back, x) < 1e-9 and error(ladj, -flow(x, *context)[1]) < 1e-9


@settings(max_examples=40)
@given(
    features=st.sampled_from([1, 2, 3, 7, 20]),
    inner=st.lists(st.integers(1, 24), max_size=2),
    width=st.integers(1, 24),
    residual=st.booleans(),
    degrees=st.sampled_from(["spread", "random", "cyclic"]),
    levels=st.sampled_from([None, 2]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    context=st.integers(0, 3),
    bound=st.sampled_from([{"log_scale_bound": 0.5, "soft_bound": False}, {"log_scale_bound": 2.0}]),
    backend=st.sampled_from(["torch", None]),
    n=st.sampled_from([0, 1, 5]),
    seed=st.integers(0, 99),
)
def test_any_network(
    features: int,
    inner: list[int],
    width: int,
    residual: bool,
    degrees: str,
    levels: int | None,
    activation: str,
    context: int,
    bound: dict[str, Any],
    backend: str | None,
    n: int,
    seed: int,
) -> None:
    hidden = [width, *(size for one in inner for size in (one, width))] if residual else [width, *inner]
    options: dict[str, Any] = {"activation": activation, "residual": residual, "context_features": context, **bound}
    options |= {"degrees": degrees, "levels": levels, "seed": seed, "order": "random"}
    flow = build(features, hidden_features=hidden, scale=1.5, **options)
    with fastmaf.use_backend(backend):
        compare_with_naive(flow, normal(n, features, seed=seed), contexts(options, n, seed))


@by_network
def test_trained_flows(options: dict[str, Any], backend: str) -> None:
    flow = build(9, **options)
    x, context = correlated(64, 9), contexts(options, 64)
    before = flow.log_prob(x, *context).mean()
    train(flow, x, context)
    assert flow.log_prob(x, *context).mean() > before
    compare_with_naive(flow, x[:7], [part[:7] for part in context])


@by_network
def test_gradients(options: dict[str, Any]) -> None:
    """First and second derivatives by finite differences: of x, the context and all parameters."""
    flow = build(3, blocks=1, **{**options, "hidden_features": options.get("hidden_features", (4, 3))})
    flow.requires_grad_()
    x, context = normal(2, 3).requires_grad_(), [part.requires_grad_() for part in contexts(options, 2)]
    names, parameters = zip(*flow.named_parameters(), strict=True)

    def log_prob(x: Tensor, *rest: Tensor) -> Tensor:
        values = dict(zip(names, rest[len(context) :], strict=True))
        result = torch.func.functional_call(flow, values, (x, *rest[: len(context)]))
        return result[0].square().sum(1) + result[1]

    # Without padding: numbers there are no parameters.
    biases = [p.detach().clone().requires_grad_() if p.dim() != 1 or "bias" in n else p.detach() for n, p in
              zip(names, parameters, strict=True)]  # fmt: skip
    assert torch.autograd.gradcheck(log_prob, (x, *context, *biases))
    assert torch.autograd.gradgradcheck(lambda *of: log_prob(*of, *biases[:0], *parameters), (x, *context), atol=1e-4)


@by_network
def test_gradients_of_samples(options: dict[str, Any]) -> None:
    """Of the noise and the context, by finite differences."""
    flow = build(3, blocks=2, **{**options, "hidden_features": options.get("hidden_features", (4, 3))})
    z, context = normal(2, 3).requires_grad_(), [part.requires_grad_() for part in contexts(options, 2)]
    assert torch.autograd.gradcheck(flow.inverse, (z, *context))
    x, log_prob = flow.rsample_and_log_prob(4, *[part[0] for part in context])
    (x.sum() + log_prob.sum()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in flow.parameters())


@by_network
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_inference_copies(options: dict[str, Any], dtype: torch.dtype) -> None:
    flow = build(9, **options, dtype=F32)
    small, x = flow.to_inference(dtype), normal(7, 9, dtype=F32)
    context = [part.float() for part in contexts(options, 7)]
    z, ladj = small(x, *context)
    back, ladj_back = small.inverse(z, *context)
    assert_close("round_trip", back, x)
    assert_close("round_trip", ladj_back, -ladj)


@by_network
def test_functorch_and_compile(options: dict[str, Any]) -> None:
    flow, x = build(5, **options), normal(4, 5)
    context = contexts(options, 4)
    expected = flow.log_prob(x, *context).detach()
    rows = torch.func.vmap(lambda row, *of: flow.log_prob(row, *of))(x, *context)
    assert_close("values", rows.detach(), expected)
    slopes = torch.func.vmap(torch.func.grad(lambda row, *of: flow.log_prob(row, *of)))(x, *context)
    leaf = x.clone().requires_grad_()
    flow.log_prob(leaf, *context).sum().backward()
    assert leaf.grad is not None
    assert_close("gradients", slopes, leaf.grad)
    back = torch.func.vmap(lambda row, *of: flow.inverse(row, *of)[0])(x, *context)
    assert_close("values", back, flow.inverse(x, *context)[0].detach())
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="eager")
    assert_close("values", compiled(x, *context).detach(), expected)


@pytest.mark.parametrize("make", [lambda: fastmaf.AffineAutoregressive(made_of(4, activation="silu")),
                                  lambda: splines_of(features=4)], ids=["affine", "spline"])  # fmt: skip
def test_inverses_compile_to_one_graph(make: Any) -> None:
    block, z = make(), normal(3, 4)
    compiled = torch.compile(lambda z: block.inverse(z)[0], fullgraph=True, backend="eager")
    assert_close("inverse", compiled(z).detach(), block.inverse(z)[0].detach())


def test_autocast_has_no_effect() -> None:
    options = NETWORKS["all"]
    flow, x = build(9, **options, dtype=F32), normal(7, 9, dtype=F32)
    context = [part.float() for part in contexts(options, 7)]
    expected, samples = flow.log_prob(x, *context), flow.inverse(x, *context)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flow.log_prob(x, *context), expected)
        assert torch.equal(flow.inverse(x, *context)[0], samples)
        made = flow._mades()[0]
        assert made(x, *context).dtype == F32


def test_padding_is_cleared_before_an_inverse_reads_it() -> None:
    block = fastmaf.AffineAutoregressive(made_of(activation="tanh"))
    z, clean = normal(3, 9), copy.deepcopy(block)
    with torch.no_grad():
        for layer in block.made.layers:
            layer.weight[layer.layout.pack(torch.ones(layer.out_features, layer.in_features)) == 0] = torch.nan
        assert torch.equal(block.inverse(z)[0], clean.inverse(z)[0])


class TestDropout:
    def flow(self, **options: Any) -> fastmaf.MAF:
        return build(9, hidden_features=(40, 30), dropout=0.5, **options)

    def test_only_in_training_mode_and_forward(self) -> None:
        flow, x = self.flow().eval(), normal(5, 9)
        expected, (back, ladj) = flow.log_prob(x), flow.inverse(x)
        plain = build(9, hidden_features=(40, 30))
        assert torch.equal(expected, plain.log_prob(x)), "a flow in evaluation mode has no dropout"
        for _ in range(2):  # the mode may change between calls
            flow.train()
            first, second = flow.log_prob(x), flow.log_prob(x)
            assert not torch.equal(first, second) and error(first, expected) > 1e-3
            assert torch.equal(flow.inverse(x)[0], back) and torch.equal(flow.inverse(x)[1], ladj)
            flow.eval()
            assert torch.equal(flow.log_prob(x), expected)

    def test_of_gradients_of_samples(self) -> None:
        """They are those of the flow in evaluation mode, by modules, too."""
        for options in ({}, {"activation": "silu"}):
            flow, z = self.flow(**options), normal(3, 9).requires_grad_()
            expected = flow.eval().inverse(z)[0]
            found = flow.train().inverse(z)[0]
            assert_close("values", found.detach(), expected.detach())
            leaves = [z, *flow.parameters()]
            gradients = [torch.autograd.grad(x.square().sum(), leaves) for x in (found, expected)]
            for one, other in zip(*gradients, strict=True):
                assert_close("gradients", one, other)
            assert flow._mades()[0].training

    def test_of_networks_of_other_classes(self) -> None:
        """An inverse leaves dropout out wherever it is, and gives it back."""

        class Wrapped(torch.nn.Module):
            def __init__(self, made: fastmaf.MADE) -> None:
                super().__init__()
                self.features, self.outputs_per_feature, self.strict = made.features, 2, True
                self.made, self.schedule, self.dropout_of_outputs = made, made.schedule, torch.nn.Dropout(0.5)

            def forward(self, x: Tensor) -> Tensor:
                result: Tensor = self.dropout_of_outputs(self.made(x))
                return result

        network = Wrapped(made_of(dropout=0.5))
        block = fastmaf.AffineAutoregressive(network)  # type: ignore[arg-type]
        x = normal(4, network.features)
        z = block.eval()(x)[0].detach()
        assert_close("inverse", block.train().inverse(z)[0], x)
        assert all(module.training for module in block.modules())

    def test_is_left_out_of_one_thread_alone(self) -> None:
        """Modules stay as they are, and calls of other threads have their dropout; functions of dropout count, too."""
        made = made_of(dropout=0.5)
        modes: set[bool] = set()
        others: list[bool] = []

        class Outer(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.features, self.outputs_per_feature, self.strict = made.features, 2, True
                self.made, self.schedule, self.channels = made, made.schedule, torch.nn.Dropout1d(0.5)

            def forward(self, x: Tensor) -> Tensor:
                modes.update(module.training for module in block.modules())
                with ThreadPoolExecutor(1) as pool:
                    first, second = pool.map(made.hidden_units, (x, x))
                others.append(torch.equal(first, second))
                result: Tensor = self.channels(torch.nn.functional.dropout(self.made(x), 0.5, self.training))
                return result

        block, x = fastmaf.AffineAutoregressive(Outer()), normal(4, made.features)  # type: ignore[arg-type]
        z = block.eval()(x)[0].detach()
        modes.clear(), others.clear()
        assert_close("inverse", block.train().inverse(z)[0], x)
        assert modes == {True}
        assert others and not any(others) and not torch.equal(made(x), made(x))

    def test_is_unbiased(self) -> None:
        made = made_of(hidden_features=(200,), dropout=0.25, activation="identity")
        x = normal(1, 9).expand(4000, 9)
        torch.manual_seed(0)
        mean = made.train()(x).mean(0).detach()
        assert error(mean, made.eval()(x[:1])[0].detach()) < 0.05

    def test_of_residual_blocks(self) -> None:
        made = made_of(hidden_features=(6, 40, 6), residual=True, dropout=0.5)
        with torch.no_grad():  # without the block there is nothing to leave out
            made.hidden[2].weight.zero_()
        x = normal(5, 9)
        assert torch.equal(made.train()(x), made.eval()(x))

    def test_training(self) -> None:
        flow, x = self.flow(dtype=F32), correlated(64, 9, dtype=F32)
        step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters(), lr=3e-3))
        losses = [step(x).nll for _ in range(60)]
        assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize("options, message", [
    ({"activation": "mish"}, "activation must be one of 'identity', 'relu', 'elu'.*found 'mish'"),
    ({"activation": ("elu",)}, r"for each of 2 hidden layers; found \('elu',\)"),
    ({"activation": torch.relu}, "activation must be one of 'identity', 'relu', 'elu'.*found <built-in"),
    ({"activation": [["relu"]]}, r"activation must be one of .*found \[\['relu'\]\]"),
    ({"dropout": "a"}, "dropout must be a probability of at least 0 and less than 1; found 'a'"),
    ({"dropout": 1.0}, "dropout must be a probability of at least 0 and less than 1; found 1.0"),
    ({"context_features": -1}, "context_features must be at least 0; found -1"),
    ({"residual": True}, r"two layers per residual block.*found \(12, 9\)"),
    ({"residual": True, "hidden_features": (4, 5, 3)}, r"found \(4, 5, 3\)"),
    ({"residual": True, "hidden_features": (2, 2, 2), "degrees": [torch.tensor([1, 2])] * 2 + [torch.tensor([1, 3])]},
     "explicit degrees of the first, third, fifth, … hidden layer must be equal"),
])  # fmt: skip
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made_of(**options)


@by_network
def test_initial_weights(options: dict[str, Any]) -> None:
    """A seed gives them, whatever the global generator has drawn; "identity" leaves x as it is."""
    torch.manual_seed(1)
    first = build(9, **options)
    torch.manual_seed(2)
    again, x = build(9, **options), normal(4, 9)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    flow = build(9, init="identity", **options)
    z, ladj = flow(x, *contexts(options, 4))
    assert torch.equal(z, x) and not ladj.any()


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_equal_activations_in_a_list_are_one(activation: str) -> None:
    one, listed = (made_of(hidden_features=(9, 7), activation=a) for a in (activation, [activation] * 2))
    x = normal(5, one.features, dtype=torch.float64)
    assert listed.activation == activation and listed.composed == one.composed
    assert torch.equal(one(x), listed(x))


def test_networks_of_earlier_versions() -> None:
    """They were pickled without the attributes that came later."""
    made = made_of()
    for name in ("residual", "context_features", "dropout"):
        del vars(made)[name]
    assert made(normal(2, 9)).shape == (2, 9, 2) and fastmaf.AffineAutoregressive(made).inverse(normal(2, 9))


@by_network
@pytest.mark.parametrize("clip", [None, 0.1])
def test_fused_adam(options: dict[str, Any], clip: float | None, backend: str) -> None:
    """``minimize`` takes the steps of torch's Adam."""
    flow, x = build(9, **options), correlated(16, 9)
    other, context = copy.deepcopy(flow), contexts(options, 16)
    fused = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2)
    adam = torch.optim.Adam(other.parameters(), lr=1e-2)
    for _ in range(3):
        fused.zero_grad()
        fused.minimize(-flow.log_prob(x, *context).mean(), clip)
        adam.zero_grad()
        (-other.log_prob(x, *context).mean()).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(other.parameters(), clip)
        adam.step()
    for (name, found), expected in zip(flow.named_parameters(), other.parameters(), strict=True):
        assert error(found.detach(), expected.detach()) < 1e-6, name


@by_network
def test_saved_numbers_are_bounded(options: dict[str, Any]) -> None:
    """What a training step saves is at most what the estimate of its memory counts, and more than half of that."""
    flow, x = build(40, **options, dtype=F64), normal(50, 40)
    own = {p.untyped_storage().data_ptr() for p in flow.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = flow.log_prob(x, *contexts(options, 50))
    counted, saved = flow._saved_numel(50) + 2 * x.numel(), sum(storages.values()) / 8
    assert counted / 2 < saved < counted and loss.requires_grad


class TestOneContext:
    """A context that all rows share is a part of the biases of a block of ReLUs, which then runs as one op."""

    def test_values_and_gradients(self, backend: str) -> None:
        flow, x = build(9, context_features=3), normal(6, 9)
        results = []
        for rows in (False, True):
            context = normal(3, seed=2).requires_grad_()
            of = context.expand(6, 3).contiguous() if rows else context
            values = [flow.log_prob(x, of), *flow(x, of), *flow.inverse(x, of), flow.nll_per_dim(x, of)]
            loss = sum((value.sin().sum() for value in values), torch.zeros(()))
            results.append([*values, *torch.autograd.grad(loss, [context, *flow.parameters()])])
        for found, expected in zip(*results, strict=True):
            assert error(found.detach(), expected.detach()) < 1e-12

    def test_it_runs_as_one_op(self) -> None:
        flow, calls = build(9, context_features=3), []
        for made in flow._mades():
            vars(made)["network"] = lambda *of: calls.append(of)  # of the inverse in steps
        flow.sample(5, normal(3))
        flow.sample((), normal(1, 3))
        assert not calls

    @pytest.mark.parametrize("clip", [None, 0.1])
    def test_fused_adam(self, clip: float | None, backend: str) -> None:
        flow, x, context = build(9, context_features=3), correlated(16, 9), normal(3)
        other = copy.deepcopy(flow)
        fused = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2)
        adam = torch.optim.Adam(other.parameters(), lr=1e-2)
        for _ in range(3):
            fused.zero_grad()
            fused.minimize(-flow.log_prob(x, context).mean(), clip)
            adam.zero_grad()
            (-other.log_prob(x, context).mean()).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(other.parameters(), clip)
            adam.step()
        for (name, found), expected in zip(flow.named_parameters(), other.parameters(), strict=True):
            assert error(found.detach(), expected.detach()) < 1e-6, name
