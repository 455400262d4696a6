"""FusedAdam where torch.optim.Adam is expected: hooks, scalers, schedules, copies, processes; minimize the same."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fastmaf
from fastmaf import Guards, TrainingStep
from fastmaf.training.fused_adam import FusedAdam
from tests.core.helpers import blocks_of
from tests.training.test_fused_adam import D, assert_same, assert_same_state, batch, loss_of, pair

Run = Callable[[Any, Any, Tensor], object]


def backward_and_step(flow: nn.Module, optimizer: Any, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def minimize(flow: nn.Module, optimizer: Any, loss: Tensor) -> None:
    assert optimizer.minimize(loss)


def minimize_clipped(flow: nn.Module, optimizer: Any, loss: Tensor) -> None:
    assert optimizer.minimize(loss, 1e9)


WAYS: list[Run] = [backward_and_step, minimize, minimize_clipped]
every_way = pytest.mark.parametrize("take", WAYS, ids=lambda take: take.__name__)


def compare(take: Run, prepare: Callable[[Any, Any], Any] = lambda flow, optimizer: None, **options: Any) -> None:
    """Trains one flow with FusedAdam, a copy with torch's Adam, and compares flows and states in float64."""
    flow, plain = pair()
    options = {"lr": 1e-2, **options}
    fused, adam = FusedAdam(flow.parameters(), **options), torch.optim.Adam(plain.parameters(), **options)
    results = [prepare(flow, fused), prepare(plain, adam)]
    for i in range(4):
        take(flow, fused, loss_of(flow, i))
        backward_and_step(plain, adam, loss_of(plain, i))
        for result in results:
            if callable(result):
                result()
    assert_same(flow, plain)
    assert_same_state(fused, adam)


@every_way
def test_step_hooks_are_called_once(take: Run) -> None:
    """They see what they see with Adam: the gradients, and the parameters before and after."""
    seen: dict[int, list[Tensor]] = {}

    def prepare(flow: Any, optimizer: Any) -> None:
        weight = next(flow.parameters())
        own = seen[id(optimizer)] = []
        hooks = (optimizer.register_step_pre_hook, optimizer.register_step_post_hook)
        for register in hooks:
            register(lambda *_: own.append(torch.stack([weight.detach().clone(), weight.grad])))

    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # torch wraps the step of a class when it is first used
    compare(take, prepare)
    own, others = seen.values()
    assert len(own) == len(others) == 8
    for found, expected in zip(own, others, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


@every_way
def test_global_step_hooks_are_called_once(take: Run) -> None:
    called: list[str] = []
    flow, _ = pair()
    optimizer = FusedAdam(flow.parameters())
    handles = [
        register_optimizer_step_pre_hook(lambda *_: called.append("before")),
        register_optimizer_step_post_hook(lambda *_: called.append("after")),
    ]
    try:
        take(flow, optimizer, loss_of(flow, 0))
        TrainingStep(flow, optimizer, Guards(max_grad_norm=1.0))(batch(1))
    finally:
        for handle in handles:
            handle.remove()
    assert called == ["before", "after"] * 2


@every_way
def test_hooks_on_gradients(take: Run) -> None:
    called: dict[int, int] = {}

    def prepare(flow: Any, optimizer: Any) -> None:
        def double(parameter: Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad *= 2
            called[id(flow)] += 1

        called[id(flow)] = 0
        weights = [p for name, p in flow.named_parameters() if name.endswith("weight")]
        weights[0].register_hook(lambda grad: grad.sign())
        weights[1].register_post_accumulate_grad_hook(double)
        blocks_of(flow)[0].made.output.bias.register_hook(lambda grad: 3 * grad)

    compare(take, prepare, eps=1.0)
    assert list(called.values()) == [4, 4]


@every_way
@pytest.mark.parametrize("options", [
    {"amsgrad": True}, {"amsgrad": True, "weight_decay": 0.1}, {"foreach": True}, {"fused": True}, {"fused": False},
    {"lr": torch.tensor(1e-2, dtype=torch.float64)}, {"foreach": False, "maximize": True},
], ids=str)  # fmt: skip
def test_every_option_of_adam(options: dict[str, Any], take: Run) -> None:
    compare(take, **options)


@every_way
def test_amsgrad_in_one_group(take: Run) -> None:
    flow, plain = pair()
    results = []
    for model, kind in ((flow, FusedAdam), (plain, torch.optim.Adam)):
        first, *rest = model.parameters()
        optimizer = kind([{"params": [first], "amsgrad": True}, {"params": rest}], lr=1e-2)
        results.append(optimizer)
        backward_and_step(model, optimizer, 100 * loss_of(model, 0))
        optimizer.zero_grad()
    fused, adam = results
    for i in range(3):
        take(flow, fused, loss_of(flow, i))
        backward_and_step(plain, adam, loss_of(plain, i))
    assert_same(flow, plain)
    assert_same_state(fused, adam)
    assert "max_exp_avg_sq" in fused.state[next(flow.parameters())]


@every_way
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}], ids=str)
def test_states_of_adam_with_other_options_are_gone_on_from(options: dict[str, Any], take: Run) -> None:
    flow, plain = pair()
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2, **options)
    backward_and_step(plain, adam, loss_of(plain, 0))
    flow.load_state_dict(plain.state_dict())
    fused = FusedAdam(flow.parameters())
    fused.load_state_dict(copy.deepcopy(adam.state_dict()))
    for i in range(1, 3):
        take(flow, fused, loss_of(flow, i))
        backward_and_step(plain, adam, loss_of(plain, i))
    back = torch.optim.Adam(flow.parameters())
    back.load_state_dict(copy.deepcopy(fused.state_dict()))
    backward_and_step(flow, back, loss_of(flow, 3))
    backward_and_step(plain, adam, loss_of(plain, 3))
    assert_same(flow, plain)
    assert_same_state(back, adam)


def test_a_state_of_other_shapes_is_refused() -> None:
    flow, plain = pair()
    adam = torch.optim.Adam(plain.parameters())
    backward_and_step(plain, adam, loss_of(plain, 0))
    state, fused = copy.deepcopy(adam.state_dict()), FusedAdam(flow.parameters())
    state["state"][0]["exp_avg_sq"] = state["state"][0]["exp_avg_sq"][1:]
    with pytest.raises(ValueError, match=r"exp_avg_sq of parameter 0: expected shape \(\d+,\); found \(\d+,\)"):
        fused.load_state_dict(state)
    assert not fused.state, "nothing was loaded"


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_way
@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value)), saved], ids=["deepcopy", "pickle", "save"]
)
def test_copies_of_flow_and_optimiser_go_on(twin: Callable[[Any], Any], take: Run) -> None:
    flow, plain = pair()
    fused, adam = FusedAdam(flow.parameters(), lr=1e-2), torch.optim.Adam(plain.parameters(), lr=1e-2)
    take(flow, fused, loss_of(flow, 0))
    left = copy.deepcopy(flow)
    other, optimizer = twin((flow, fused))
    assert all(p is q for p, q in zip(other.parameters(), optimizer.param_groups[0]["params"], strict=True))
    for i in range(1, 3):
        take(other, optimizer, loss_of(other, i))
    for i in range(3):
        backward_and_step(plain, adam, loss_of(plain, i))
    assert_same(other, plain)
    assert_same_state(optimizer, adam)
    assert all(torch.equal(a, b) for a, b in zip(flow.parameters(), left.parameters(), strict=True))


@every_way
def test_averages_of_weights(take: Run) -> None:
    averages: list[Any] = []

    def prepare(flow: Any, optimizer: Any) -> Callable[[], None]:
        of = [
            torch.optim.swa_utils.AveragedModel(flow),
            torch.optim.swa_utils.AveragedModel(flow, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)),
        ]
        averages.append(of)
        return lambda: [average.update_parameters(flow) for average in of] and None

    compare(take, prepare)
    for own, other in zip(*averages, strict=True):
        assert_same(own.module, other.module)
        assert torch.isfinite(own.module.log_prob(batch(0))).all()


@every_way
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-1, total_steps=4),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)], [2]
        ),
    ],
    ids=["OneCycleLR", "StepLR", "SequentialLR"],
)
def test_schedules_see_one_step(schedule: Callable[[Any], Any], take: Run) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Detected call of")
        compare(take, lambda flow, optimizer: schedule(optimizer).step)


def test_a_scaler_with_weight_decay_gives_the_numbers_of_adam() -> None:
    flow, plain = pair()
    for model, kind in ((flow, FusedAdam), (plain, torch.optim.Adam)):
        optimizer, scaler = kind(model.parameters(), lr=1e-2, weight_decay=0.1), torch.amp.GradScaler("cpu")
        for i in range(5):
            optimizer.zero_grad()
            loss = loss_of(model, i) * (float("inf") if i == 2 else 1.0)  # a step that is to be skipped
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            assert float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)) < 1e3 or i == 2
            scaler.step(optimizer)
            scaler.update()
        assert float(scaler.get_scale()) == 2.0**15
    assert_same(flow, plain)


@every_way
def test_parametrised_weights_and_other_dtypes(take: Run) -> None:
    """What the optimiser holds is then not what the ops read."""

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    flow, plain = pair()
    models = []
    for own in (flow, plain):
        parametrize.register_parametrization(blocks_of(own)[0].made.hidden[0], "weight", Doubled())
        model = nn.ModuleList([own, nn.Linear(D, D, bias=False)])
        nn.init.eye_(model[1].weight)
        models.append(model.train())
        model[1].bfloat16()
    # Kernels round bfloat16 in their own ways: both use torch's fused one.
    fused = FusedAdam(models[0].parameters(), lr=1e-2)
    adam = torch.optim.Adam(models[1].parameters(), lr=1e-2, fused=True)
    for i in range(3):
        for (own, linear), optimizer in zip(models, (fused, adam), strict=True):
            loss = -own.log_prob(linear(batch(i).bfloat16()).double()).mean()
            (take if optimizer is fused else backward_and_step)(own, optimizer, loss)
    assert_same(models[0], models[1])


class NLL(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flow = fastmaf.MAF(6, 2, (16, 16), order="natural", seed=0, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(x).mean()


def all_data(i: int) -> Tensor:
    return torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(i))


def one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed = torch.distributed
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(NLL())
    optimizer = FusedAdam(model.parameters(), lr=1e-2)
    refused = False
    for i in range(5):
        x = all_data(i)[4 * rank : 4 * rank + 4]
        backward_and_step(model, optimizer, model(x))
        optimizer.zero_grad()
        try:
            optimizer.minimize(model(x))
        except RuntimeError as error:
            refused = "2 processes" in str(error) and "loss.backward()" in str(error)
    torch.save((model.module.state_dict(), refused), f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two_processes, (str(tmp_path),), nprocs=2)
    alone = NLL()
    adam = torch.optim.Adam(alone.parameters(), lr=1e-2)
    for i in range(5):
        backward_and_step(alone, adam, alone(all_data(i)))
    (first, refused), (second, refused_too) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert refused and refused_too, "minimize exchanges no gradients"
    expected = copy.deepcopy(alone)
    expected.load_state_dict(first)
    assert_same(expected, alone)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_steps_and_minimize_in_turn_on_a_gpu() -> None:
    """Their counters lie on the GPU, where torch's fused kernels count."""
    flow = fastmaf.MAF(D, 2, (7, 5), seed=0).cuda()
    plain = copy.deepcopy(flow).double()
    options: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2}
    fused, adam = FusedAdam(flow.parameters(), **options), torch.optim.Adam(plain.parameters(), **options)
    for i in range(9):
        x = batch(i, dtype=torch.float32).cuda()
        fused.zero_grad()
        WAYS[i % 3](flow, fused, -flow.log_prob(x).mean())
        with fastmaf.use_backend("torch"):
            backward_and_step(plain, adam, -plain.log_prob(x.double()).mean())
        if i == 5:
            fused.load_state_dict(copy.deepcopy(fused.state_dict()))
    assert_same(flow, plain, tolerance=1e-4)
    assert all(float(state["step"]) == 9 and state["step"].is_cuda for state in fused.state.values())
