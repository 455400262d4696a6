"""The warning of blocks that are trained layer by layer: when, once, and silenced."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.kernels import dispatch
from fastmaf.transforms import fallback

C = 2


def spline_flow() -> fastmaf.Flow:
    spline = fastmaf.SplineMap(bins=3)
    return fastmaf.Flow(5, [fastmaf.MonotonicRQS(fastmaf.MADE(5, 8, outputs_per_feature=spline.outputs), spline)])


def maf(**options: object) -> fastmaf.MAF:
    return fastmaf.MAF(5, 2, (8, 8, 8), **options)  # type: ignore[arg-type]


BY_LAYERS: dict[str, Callable[[], fastmaf.Flow]] = {
    "residual blocks": lambda: maf(residual=True),
    "a context": lambda: maf(context_features=C),
    "the activation 'silu'": lambda: maf(activation="silu"),
    "several activations": lambda: maf(activation=("relu", "identity", "relu")),
    "dropout": lambda: maf(dropout=0.5),
    "splines": spline_flow,
    "residual blocks and a context and the activation 'gelu', 'tanh'": lambda: maf(
        residual=True, context_features=C, activation=("tanh", "gelu", "identity")
    ),
}


@pytest.fixture(autouse=True)
def not_given_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_given", False)


@pytest.fixture
def native() -> Iterator[None]:
    if dispatch.missing("flow", "native") is not None:
        pytest.skip("without the native library, all blocks run layer by layer")
    with fastmaf.use_backend("native"):
        yield


def messages(call: Callable[[], object]) -> list[str]:
    """Returns the texts of the warnings of a call, whatever filters are set."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if w.category is fastmaf.FallbackWarning]


def context(flow: fastmaf.Flow, n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, C),) if flow.context_features else ()


def train(flow: fastmaf.Flow, n: int = 6) -> None:
    flow.log_prob(torch.randn(n, 5), *context(flow, n)).sum().backward()


@pytest.mark.usefixtures("native")
class TestWarning:
    @pytest.mark.parametrize("reason", BY_LAYERS)
    def test_once_and_with_the_reason(self, reason: str) -> None:
        flow = BY_LAYERS[reason]()
        (message,) = messages(lambda: [train(flow) for _ in range(3)])
        assert message.startswith(f"blocks with {reason} are trained layer by layer")
        assert "'native'" in message
        assert not messages(lambda: [train(make()) for make in BY_LAYERS.values()])

    def test_of_every_way_to_train(self, monkeypatch: pytest.MonkeyPatch) -> None:
        flow = maf(residual=True)
        posterior = fastmaf.IAF(5, 1, (8, 8, 8), residual=True)
        step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-3))
        calls: dict[str, Callable[[], object]] = {
            "nll_per_dim": lambda: flow.nll_per_dim(torch.randn(6, 5)).sum().backward(),
            "rsample": lambda: flow.rsample(6).sum().backward(),
            "an inverted block": lambda: posterior.log_prob(torch.randn(6, 5)).sum().backward(),
            "TrainingStep": lambda: step(torch.randn(6, 5)),
            "distribution": lambda: flow.distribution().log_prob(torch.randn(6, 5)).sum().backward(),
        }
        for name, call in calls.items():
            monkeypatch.setattr(fallback, "_given", False)
            assert len(messages(call)) == 1, name

    @pytest.mark.parametrize("reason", BY_LAYERS)
    def test_not_where_nothing_is_trained(self, reason: str) -> None:
        flow = BY_LAYERS[reason]()
        x, given = torch.randn(6, 5), context(flow, 6)

        def without_gradients() -> None:
            with torch.no_grad():
                flow.log_prob(x, *given)
                flow.nll_per_dim(x, *given)
            flow.sample(6, *(g[0] for g in given))

        assert not messages(without_gradients)
        flow.eval()
        assert not messages(lambda: flow.log_prob(x, *given).sum().backward())
        flow.train().requires_grad_(False)
        assert not messages(lambda: flow.log_prob(x, *given))

    def test_not_of_blocks_that_run_as_one_op(self) -> None:
        for flow in (maf(), maf(activation="identity"), maf(normalization="act")):
            assert not messages(lambda flow=flow: train(flow))
            assert not messages(lambda flow=flow: flow.nll_per_dim(torch.randn(6, 5)).sum().backward())

    def test_silenced_by_its_category(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", category=fastmaf.FallbackWarning)
            train(maf(residual=True))
        assert not caught

    def test_left_out_for_models_of_the_library(self) -> None:
        with fallback.without_warning():
            assert not messages(lambda: train(maf(residual=True)))
            with ThreadPoolExecutor(1) as pool:
                other = pool.submit(messages, lambda: train(maf(residual=True))).result()
        assert len(other) == 1

    def test_as_an_error_it_is_raised_by_each_call(self) -> None:
        flow = maf(residual=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", fastmaf.FallbackWarning)
            for _ in range(2):
                with pytest.raises(fastmaf.FallbackWarning, match="residual blocks"):
                    train(flow)


def test_not_with_a_backend_that_has_no_op_of_whole_blocks() -> None:
    with fastmaf.use_backend("torch"):
        assert not messages(lambda: train(maf(residual=True)))
