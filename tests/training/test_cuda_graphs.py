"""Replayed training steps and log-densities: on a GPU the graphs themselves; on the CPU what surrounds them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmaf
from fastmaf.kernels import dispatch
from fastmaf.training import cuda_graphs as graphs
from fastmaf.training import graphed_step
from fastmaf.training.gradient_sink import Gradients
from tests.core.helpers import build, normal
from tests.tolerances import F32

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
MISSING = next((why for op in dispatch.OPS if (why := dispatch.missing(op, "triton")) is not None), None)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test for a GPU, where it runs with the Triton kernels."""
    return pytest.mark.usefixtures("triton")(needs_gpu(pytest.mark.gpu(test)))


@pytest.fixture
def triton() -> Iterator[None]:
    with fastmaf.use_backend("triton"):
        yield


class RunAgain:
    """Replaces a CUDA graph on the CPU: a replay runs the recorded code again; recording it changes nothing."""

    running = False

    def __init__(self, run: Callable[[], None], device: torch.device, pool: Any = None) -> None:
        self._run = run
        owner = run.__self__  # type: ignore[attr-defined]
        tensors = [p.detach() for p in owner._flow.parameters()]
        tensors += [v for state in owner._optimizer.state.values() for v in state.values()]
        before = [tensor.clone() for tensor in tensors]
        try:
            self.replay()
        finally:
            for tensor, value in zip(tensors, before, strict=True):
                if not torch.equal(tensor, value):  # autograd sees every write, also of the same numbers
                    tensor.copy_(value)

    def replay(self) -> None:
        RunAgain.running = True
        try:
            self._run()
        finally:
            RunAgain.running = False

    def pool(self) -> None:
        return None


@pytest.fixture
def run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one makes its class's step call hooks
    step = torch.optim.Adam.step

    @functools.wraps(step)  # with torch's mark that hooks are called
    def refuse(optimizer: Any, closure: Any = None) -> Any:
        assert not RunAgain.running, "torch's own step cannot be captured"
        return step(optimizer, closure)

    monkeypatch.setattr(fastmaf.optim.FusedAdam, "step", refuse)
    monkeypatch.setattr(graphed_step, "record", RunAgain)
    monkeypatch.setattr(graphed_step, "can_replay", lambda flow: True)


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
)
def device(request: pytest.FixtureRequest) -> str:
    """For tests of which steps are replayed, which the CPU shows as well as a GPU."""
    request.getfixturevalue("triton")
    if request.param == "cpu":
        request.getfixturevalue("run_again")
    return str(request.param)


def flow_on(device: str, **options: Any) -> fastmaf.MAF:
    return build(13, seed=3, hidden_features=(9, 11), dtype=F32, **options).to(device)


def batches(device: str, sizes: list[int]) -> list[torch.Tensor]:
    return [normal(n, 13, seed=i, dtype=F32).to(device) for i, n in enumerate(sizes)]


def train_twice(device: str, max_grad_norm: float | None, sizes: list[int]) -> None:
    """Takes eager and replayed steps from one start, with two batch sizes and a learning rate that changes.

    The batches are so small that eager steps are in factored form, too.
    """
    losses, flows, states = [], [], []
    guards = fastmaf.Guards(warmup_steps=4, max_grad_norm=max_grad_norm)
    for graphed in (False, True):
        flow = flow_on(device)
        optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2, weight_decay=0.01)
        step = fastmaf.TrainingStep(flow, optimizer, guards, graphs=graphed)
        losses.append([step(x).nll for x in batches(device, sizes)])
        flows.append(flow)
        states.append(optimizer.state_dict()["state"])
    # In a clipped step the biases are updated by torch without graphs, and by the kernel with them.
    close = {"rtol": 0.0, "atol": 0.0} if max_grad_norm is None else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(losses[0], losses[1], **close)
    for a, b in zip(flows[0].parameters(), flows[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, **close)
    for key, tensors in states[0].items():
        for name, value in tensors.items():
            torch.testing.assert_close(value.cpu(), states[1][key][name].cpu(), **close)


@on_gpu
@pytest.mark.parametrize("max_grad_norm", [None, 0.05, 1e9])
def test_replayed_steps_are_the_eager_ones(max_grad_norm: float | None) -> None:
    train_twice("cuda", max_grad_norm, [2, 2, 2, 1, 2, 1, 1, 2])


@pytest.mark.slow
@pytest.mark.usefixtures("triton", "run_again")
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_the_code_of_replayed_steps_on_the_cpu(max_grad_norm: float | None) -> None:
    """Without the faults that only a capture has, but with the counters and scalars of each replay."""
    train_twice("cpu", max_grad_norm, [2, 2, 1, 2, 1])


@pytest.mark.slow
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("clips", [False, True])
def test_nothing_is_compiled_while_a_graph_is_recorded(clips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is compiled for the alignment of its pointers too: all that a graph holds must have run before."""
    from fastmaf.bench.dev import resources
    from fastmaf.kernels.triton_common import device as triton_parts

    flow, x = flow_on("cpu", blocks=3, order="alternate"), batches("cpu", [4])[0]
    flow.validate_args = False  # kernels are recorded, not run: there are no values
    optimizer = fastmaf.optim.FusedAdam(flow.parameters())
    in_graphs: list[triton_parts.Launched] = []

    class Recorded:
        def __init__(self, run: Callable[[], None], device: torch.device, pool: Any = None) -> None:
            assert triton_parts._recorder is not None
            before = len(triton_parts._recorder.launches)
            run()
            in_graphs.extend(triton_parts._recorder.launches[before:])

        def pool(self) -> None:
            return None

    def steps() -> None:
        loss = -flow.log_prob(x).mean()
        optimizer.minimize(loss, 1.0 if clips else None, check_finite=False)
        graphed_step.GraphedStep(flow, optimizer, x, clips=clips)
        with torch.no_grad():
            flow.log_prob(x)
            graphs._GraphedLogProb(flow, x)

    def squared_norm(gradients: Gradients) -> float:
        measured(gradients)
        return 1.0  # nothing has values here

    measured = Gradients.squared_norm
    monkeypatch.setattr(Gradients, "squared_norm", squared_norm)
    monkeypatch.setattr(graphs, "record", Recorded)
    monkeypatch.setattr(graphed_step, "record", Recorded)
    launches = resources.recorded(90, steps)
    graphed = [id(one) for one in in_graphs]
    known = {repr(resources._source(one)) for one in launches if id(one) not in graphed}
    assert len(in_graphs) >= 40
    assert {repr(resources._source(one)) for one in in_graphs} - known == set()


def test_a_loaded_state_or_a_frozen_parameter_is_another_step(device: str) -> None:
    flow = flow_on(device)
    optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2)
    step = fastmaf.TrainingStep(flow, optimizer, graphs=True)
    x = batches(device, [4])[0]
    for _ in range(3):
        step(x)
    assert step._graphs is not None and step._graphs.get(x) is not None
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert step._graphs.get(x) is None, "its moments lie elsewhere"
    step(x)
    assert step._graphs.get(x) is not None
    frozen = next(flow.parameters()).requires_grad_(False)
    before = frozen.detach().clone()
    for _ in range(3):
        step(x)
    assert torch.equal(frozen, before)


@on_gpu
def test_a_skipped_step_leaves_everything() -> None:
    flow = flow_on("cuda")
    optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2)
    step = fastmaf.TrainingStep(flow, optimizer, fastmaf.Guards(max_loss_jump=1.0), graphs=True)
    for x in batches("cuda", [4, 4, 4]):
        step(x)
    before = [p.detach().clone() for p in flow.parameters()]
    counts = [float(s["step"]) for s in optimizer.state.values()]
    assert step(100 * batches("cuda", [4])[0]).skipped
    with pytest.raises(fastmaf.NonFiniteLossError):
        step(torch.full((4, 13), float("nan"), device="cuda"))
    assert all(torch.equal(a, b) for a, b in zip(flow.parameters(), before, strict=True))
    assert counts == [float(s["step"]) for s in optimizer.state.values()] == [3.0] * len(counts)
    assert not step(batches("cuda", [4])[0]).skipped


def test_a_flow_with_other_parameters_is_trained_without(device: str) -> None:
    flow = flow_on(device)
    extra = torch.nn.Parameter(torch.ones(13, device=device))
    optimizer = fastmaf.optim.FusedAdam([*flow.parameters(), extra], lr=1e-2)
    log_prob = flow.log_prob
    flow.log_prob = lambda x: log_prob(x * extra)  # type: ignore[method-assign]
    step = fastmaf.TrainingStep(flow, optimizer, graphs=True)
    x = batches(device, [4])[0]
    step(x)
    with pytest.warns(UserWarning, match="not replayed"):
        step(x)
    losses = [step(x).nll for _ in range(3)]
    assert losses[2] < losses[0], "steps taken without graphs do not train"
    assert not torch.equal(extra, torch.ones_like(extra))


@on_gpu
def test_a_clipped_step_of_parameters_that_the_kernel_cannot_take_is_taken_without() -> None:
    """The kernel walks memory in its order: of a transposed parameter that is not the gradient's."""
    flow = flow_on("cuda")
    extra = torch.nn.Parameter(torch.ones(2, 13, device="cuda").t())
    optimizer = fastmaf.optim.FusedAdam([*flow.parameters(), extra], lr=1e-2)
    log_prob = flow.log_prob
    flow.log_prob = lambda x: log_prob(x * extra[:, 0])  # type: ignore[method-assign]
    step = fastmaf.TrainingStep(flow, optimizer, fastmaf.Guards(max_grad_norm=1e9), graphs=True)
    x = batches("cuda", [4])[0]
    step(x)
    with pytest.warns(UserWarning, match="not contiguous"):
        step(x)
    assert torch.equal(extra[:, 1], torch.ones(13, device="cuda")), "no gradient reaches this column"


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
    monkeypatch.setattr(graphs, "can_replay", lambda flow: True)


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


def test_steps_follow_buffers_hooks_and_amsgrad(device: str) -> None:
    """Each of them needs a step without graphs first, and hooks never have any."""
    flow = fastmaf.MAF(13, 1, (9,), whitening=3, seed=0).to(device)
    optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2)
    step = fastmaf.TrainingStep(flow, optimizer, graphs=True)
    x = batches(device, [8])[0]
    graphed = step._graphs
    assert graphed is not None
    step(x)
    step(x)
    assert graphed.get(x) is not None
    next(t for t in flow.transforms if isinstance(t, fastmaf.GaussianWhitening)).fit_(x)
    assert graphed.get(x) is None
    step(x)
    assert graphed.get(x) is not None
    calls: list[int] = []
    handle = optimizer.register_step_post_hook(lambda *_: calls.append(1))
    assert graphed.get(x) is None
    step(x)
    handle.remove()
    handle = flow.transforms[0].register_forward_hook(lambda *_: calls.append(2))
    assert graphed.get(x) is None
    step(x)
    handle.remove()
    assert calls == [1, 2]
    assert graphed.get(x) is not None
    handle = next(flow.parameters()).register_hook(lambda grad: calls.append(3))
    assert graphed.get(x) is None
    step(x)
    handle.remove()
    assert calls == [1, 2, 3]
    optimizer.param_groups[0]["amsgrad"] = True
    assert graphed.get(x) is None


@on_gpu
def test_an_old_graph_of_autograd_is_refused_after_a_replay() -> None:
    flow = flow_on("cuda")
    step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters()), graphs=True)
    (x,) = batches("cuda", [4])
    for _ in range(2):
        step(x)
    old = flow.log_prob(x).mean()
    step(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


@on_gpu
def test_few_graphs_are_kept() -> None:
    replayed = graphs.ReplayedLogProb(flow_on("cuda"))
    for _ in range(2):
        for x in batches("cuda", [1, 2, 3, 4, 5, 6]):
            replayed(x)
    assert len(replayed._cache) == graphs._MAX_GRAPHS


def test_on_the_cpu_nothing_is_replayed() -> None:
    flow = flow_on("cpu")
    assert not graphs.can_replay(flow)
    x = normal(3, 13, dtype=F32)
    with torch.no_grad():
        assert torch.equal(graphs.ReplayedLogProb(flow)(x), flow.log_prob(x))
