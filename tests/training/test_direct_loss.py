"""Losses and gradients without autograd's graph: the same numbers, and autograd wherever it makes a difference."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmaf
from fastmaf.training.direct_loss import DirectLoss


def trained(features: int, hidden: tuple[int, ...] = (9, 7), dtype: torch.dtype = torch.float32) -> fastmaf.MAF:
    """Returns a flow of alternating order after some steps on data that depend on each other."""
    flow = fastmaf.MAF(features, 3, hidden, seed=0, dtype=dtype)
    step = fastmaf.TrainingStep(flow, torch.optim.Adam(flow.parameters(), lr=1e-2))
    for seed in range(8):
        step(draw(16, features, seed, dtype))
    for parameter in flow.parameters():
        parameter.grad = None
    return flow


def draw(n: int, features: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed), dtype=dtype).cumsum(dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("features", "hidden"), [(1, (3,)), (2, (9, 7)), (6, (64, 64)), (19, (5,))])
@pytest.mark.parametrize("n", [1, 3, 17])
def test_the_loss_and_its_gradients_are_those_of_autograd(
    backend: str, features: int, hidden: tuple[int, ...], n: int, dtype: torch.dtype
) -> None:
    flow, x = trained(features, hidden, dtype), draw(n, features, 99, dtype)
    direct = DirectLoss.of(flow, x)
    assert direct is not None and not direct.value.requires_grad
    direct.backward()
    parameters = list(flow.parameters())
    loss = -flow.log_prob(x).mean()
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(direct.value, loss.detach(), **close)
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grad, **close)


def test_rows_of_any_strides_are_taken() -> None:
    flow, x = trained(5), draw(12, 10, 7)[::2, ::2]
    assert not x.is_contiguous()
    strided, contiguous = DirectLoss.of(flow, x), DirectLoss.of(flow, x.contiguous())
    assert strided is not None and contiguous is not None and torch.equal(strided.value, contiguous.value)


class OwnDensity(fastmaf.MAF):
    def log_prob(self, x: Any) -> Tensor:
        return 2 * super().log_prob(x)


def _share(flow: fastmaf.MAF) -> None:
    blocks = [part for part in flow.transforms if isinstance(part, fastmaf.AffineAutoregressive)]
    blocks[1].made = blocks[0].made


NEED_AUTOGRAD: dict[str, Callable[[fastmaf.MAF], Any]] = {
    "a hook of the flow": lambda flow: flow.register_forward_hook(lambda *_: None),
    "a hook of a block": lambda flow: flow.transforms[0].register_forward_hook(lambda *_: None),
    "a hook of a gradient": lambda flow: next(flow.parameters()).register_hook(lambda grad: grad),
    "a hook after a gradient": lambda flow: next(flow.parameters()).register_post_accumulate_grad_hook(lambda p: None),
    "a frozen parameter": lambda flow: next(flow.parameters()).requires_grad_(False),
    "a gradient that waits": lambda flow: next(flow.parameters()).sum().backward(),
    "shared parameters": _share,
    "another forward": lambda flow: setattr(flow, "forward", flow.forward),
    "another transform": lambda flow: flow.transforms.insert(0, fastmaf.Logit(4)),
    "another density": lambda flow: setattr(flow, "__class__", OwnDensity),
    "a computed weight": lambda flow: nn.utils.parametrize.register_parametrization(
        flow.transforms[0].made.layers[0], "bias", nn.Identity()
    ),
}


@pytest.mark.parametrize("change", NEED_AUTOGRAD)
def test_a_flow_that_needs_autograd_is_left_to_it(change: str) -> None:
    flow, x = trained(4), draw(5, 4).sigmoid()
    assert DirectLoss.of(flow, x) is not None
    NEED_AUTOGRAD[change](flow)
    assert DirectLoss.of(flow, x) is None


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, torch.autograd.detect_anomaly, lambda: torch.autocast("cpu")],
    ids=["no_grad", "inference", "anomaly", "autocast"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_mode_is_left_to_autograd(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
    flow, x = trained(4), draw(5, 4)
    with context():
        assert DirectLoss.of(flow, x) is None


def test_inputs_that_require_gradients_and_empty_batches_are_left_to_autograd() -> None:
    flow, x = trained(4), draw(5, 4)
    assert DirectLoss.of(flow, x.requires_grad_()) is None
    assert DirectLoss.of(flow, draw(0, 4)) is None
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., 4\]"):
        DirectLoss.of(flow, draw(5, 3))


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_steps_are_those_of_autograd_and_torch_s_adam(backend: str, max_grad_norm: float | None) -> None:
    flow = trained(6, (64, 64))
    other = copy.deepcopy(flow)
    guards = fastmaf.Guards(max_grad_norm=max_grad_norm)
    steps = [
        fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-3), guards),
        fastmaf.TrainingStep(other, torch.optim.Adam(other.parameters(), lr=1e-3), guards),
    ]
    for seed, n in enumerate((256, 1, 3, 256, 31)):
        reports = [step(draw(n, 6, 50 + seed)) for step in steps]
        assert reports[0].nll == pytest.approx(reports[1].nll, rel=1e-5)
    for a, b in zip(flow.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    flow = trained(4)
    before = copy.deepcopy(flow.state_dict())
    step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters()))
    with pytest.raises(fastmaf.NonFiniteLossError, match="the NLL of a batch became nan at step 1"):
        step(torch.full((3, 4), torch.nan))
    assert all(torch.equal(tensor, before[name]) for name, tensor in flow.state_dict().items())


def test_hooks_of_gradients_have_their_effect_in_a_step() -> None:
    flow = trained(4)
    bias = flow.transforms[0].made.layers[0].bias  # type: ignore[union-attr]
    bias.register_hook(torch.zeros_like)
    before = bias.detach().clone()
    fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2))(draw(5, 4))
    assert torch.equal(bias, before)
