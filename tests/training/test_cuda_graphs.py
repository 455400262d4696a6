"""Replayed log-densities: on a GPU the graphs themselves; on the CPU what surrounds them."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmaf
from fastmaf.training import cuda_graphs as graphs
from fastmaf.training import graph_keys
from tests.core.helpers import normal
from tests.tolerances import F32
from tests.training.graph_helpers import batches, flow_on, needs_triton, on_gpu

pytestmark = needs_triton


@on_gpu
def test_replayed_log_prob() -> None:
    flow = flow_on("cuda")
    replayed = graphs.ReplayedLogProb(flow)
    for x in batches("cuda", [3, 3, 5, 3, 5, 5]):
        with torch.no_grad():
            assert torch.equal(replayed(x), flow.log_prob(x))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(0.5)
        x = batches("cuda", [3])[0]
        assert torch.equal(replayed(x), flow.log_prob(x)), "weights changed in place"
        flow.load_state_dict({k: v.clone() for k, v in flow.state_dict().items()}, assign=True)
        assert torch.equal(replayed(x), flow.log_prob(x)), "weights that lie elsewhere now"
    first = replayed(x)
    kept = first.clone()
    replayed(x + 1)
    assert torch.equal(first, kept), "a result was overwritten by the next replay"


@on_gpu
def test_scores_and_steps_are_replayed_beside_each_other() -> None:
    """A recorded score that kept an autograd graph would bind the parameters' nodes to its stream: on a GPU no training
    step could be recorded after it.
    """
    flow, x = flow_on("cuda"), batches("cuda", [3])[0]
    log_prob, recorded_gradients = flow.log_prob, []

    def watched(x: torch.Tensor) -> torch.Tensor:
        recorded_gradients.append(torch.is_grad_enabled())
        return log_prob(x)

    flow.log_prob = watched  # type: ignore[method-assign]
    replayed = graphs.ReplayedLogProb(flow)
    for _ in range(3):
        replayed(x)
    assert len(recorded_gradients) >= 3 and not any(recorded_gradients)
    step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2), graphs=True)
    losses = [step(x).nll for _ in range(3)]
    assert losses[2] < losses[0]
    torch.testing.assert_close(replayed(x), flow.log_prob(x).detach())


class Tape(TorchDispatchMode):
    """Stands in for a CUDA graph as one fails: a replay calls the recorded operators alone, on the tensors of then.

    Whatever was worked out in Python stays as it was.
    """

    def __init__(self, run: Callable[[], None], device: torch.device, pool: Any = None) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        with self:
            run()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            for to, value in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(to, torch.Tensor) and to.data_ptr() != value.data_ptr():
                    to.copy_(value)


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "record", Tape)
    monkeypatch.setattr(graph_keys, "can_replay", lambda flow: True)


def replay_thrice(replayed: fastmaf.ReplayedLogProb, x: torch.Tensor) -> list[torch.Tensor]:
    return [replayed(x) for _ in range(3)]  # as it is, recorded, replayed


def test_a_replay_follows_buffers(taped: None) -> None:
    """A whitening that is fitted anew, in place, changes numbers that were worked out in Python."""
    flow = fastmaf.MAF(13, 1, (9,), whitening=3, seed=0)
    x, replayed = normal(50, 13, dtype=F32), fastmaf.ReplayedLogProb(flow)
    (whitening,) = (t for t in flow.transforms if isinstance(t, fastmaf.GaussianWhitening))
    before = replay_thrice(replayed, x)[-1]
    for scale in (5.0, 0.2):
        whitening.fit_(scale * x)
        with torch.no_grad():
            expected = flow.log_prob(x)
        assert not torch.allclose(expected, before, atol=1.0), "the test wants another density"
        for found in replay_thrice(replayed, x):
            torch.testing.assert_close(found, expected)
    moved = flow.state_dict()
    flow.load_state_dict({k: v.clone() for k, v in moved.items()}, assign=True)
    whitening.mean.add_(1.0)
    with torch.no_grad():
        torch.testing.assert_close(replayed(x), flow.log_prob(x))


def test_a_replay_follows_a_buffer_that_was_replaced(taped: None) -> None:
    """At its new address, while the parameters stayed where they were."""
    flow = fastmaf.MAF(13, 1, (9,), whitening=3, seed=0)
    x, replayed = normal(50, 13, dtype=F32), fastmaf.ReplayedLogProb(flow)
    (whitening,) = (t for t in flow.transforms if isinstance(t, fastmaf.GaussianWhitening))
    before = replay_thrice(replayed, x)[-1]
    whitening.scale = 3.0 * whitening.scale
    with torch.no_grad():
        expected = flow.log_prob(x)
    assert not torch.allclose(expected, before, atol=1.0), "the test wants another density"
    for found in replay_thrice(replayed, x):
        torch.testing.assert_close(found, expected)


def test_a_replay_follows_modes_and_hooks(taped: None) -> None:
    class Doubled(fastmaf.Logit):
        """Behaves in its own way in training, and rounds under autocast."""

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            z = 2 * x if self.training else x @ torch.eye(13)
            return z, torch.zeros(len(x))

    flow = fastmaf.Flow(13, [Doubled(13), fastmaf.MAF(13, 1, (9,), order="natural", seed=0).transforms[0]])
    x, replayed = normal(4, 13, dtype=F32), fastmaf.ReplayedLogProb(flow)
    called: list[int] = []
    for change in (
        lambda: None,
        flow.eval,
        lambda: flow.transforms[0].register_forward_hook(lambda *_: called.append(1)),
    ):
        change()
        with torch.no_grad():
            for found in replay_thrice(replayed, x):
                assert torch.equal(found, flow.log_prob(x))
    assert len(called) == 6, "three calls and three replays"


def test_a_replay_follows_attributes_and_new_modules(taped: None) -> None:
    """Bounds are fixed in a graph, as is which transforms there are; hooks on all modules are called by none."""
    block, another = (fastmaf.MAF(13, 1, (9,), order="natural", seed=seed).transforms[0] for seed in range(2))
    flow = fastmaf.Flow(13, [logit := fastmaf.Logit(13), block])
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3)
    x, replayed = normal(4, 13, dtype=F32).sigmoid(), fastmaf.ReplayedLogProb(flow)
    called: list[int] = []

    def doubled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z, ladj = fastmaf.Logit.forward(logit, x)
        return 2 * z, ladj

    seen: list[torch.Tensor] = []
    for change in (
        lambda: None,
        lambda: setattr(block, "log_scale_bound", 0.1),
        lambda: setattr(logit, "alpha", 0.2),
        lambda: setattr(logit, "forward", doubled),
        lambda: flow.transforms.append(another),
        lambda: another.made.hidden.__setitem__(0, copy.deepcopy(another.made.hidden[0])),
        lambda: setattr(flow, "log_prob", lambda x: torch.zeros(len(x))),
    ):
        change()
        with torch.no_grad():
            expected = flow.log_prob(x)
        for found in replay_thrice(replayed, x):
            torch.testing.assert_close(found, expected)
        seen.append(expected)
    assert sum(torch.allclose(a, b) for a, b in itertools.pairwise(seen)) == 1, "all but the copy change the density"
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: called.append(1))
    del flow.log_prob
    replay_thrice(replayed, x)
    once = len(called) // 3
    handle.remove()
    assert once > 0 and len(called) == 3 * once


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda replayed: pickle.loads(pickle.dumps(replayed))])
def test_a_copy_follows_its_own_flow(taped: None, copied: Callable[[Any], Any]) -> None:
    flow, x = fastmaf.MAF(13, 1, (9,), order="natural", seed=0), normal(4, 13, dtype=F32)
    replayed = fastmaf.ReplayedLogProb(flow)
    replayed(x)
    other = copied(replayed)
    for scale in (2.0, 0.5):
        for parameter in other.flow.parameters():
            parameter.data = scale * parameter.data
        with torch.no_grad():
            expected = other.flow.log_prob(x)
        for found in replay_thrice(other, x):
            torch.testing.assert_close(found, expected)
    torch.testing.assert_close(replayed(x), flow.log_prob(x).detach())


@on_gpu
def test_few_graphs_are_kept() -> None:
    replayed = graphs.ReplayedLogProb(flow_on("cuda"))
    for _ in range(2):
        for x in batches("cuda", [1, 2, 3, 4, 5, 6]):
            replayed(x)
    assert len(replayed._cache._graphs) == graphs._MAX_GRAPHS


def test_on_the_cpu_nothing_is_replayed() -> None:
    flow = flow_on("cpu")
    assert not graph_keys.can_replay(flow)
    x = normal(3, 13, dtype=F32)
    with torch.no_grad():
        assert torch.equal(graphs.ReplayedLogProb(flow)(x), flow.log_prob(x))
