"""Kernels that start before those ahead of them have ended: what they ask for, and that results do not change.

What they may do before they wait is proven in ``test_resources.py``, of the compiled kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.kernels.triton_common import launch_table
from tests.core.helpers import build, layers_of, normal
from tests.kernels.cases import INTERPRETED, ON_GPU, needs
from tests.tolerances import F32

pytestmark = [pytest.mark.slow, needs("triton")]


class Asked(NamedTuple):
    """Numbers that a program asks for: address of number 0, first and how many."""

    address: int
    start: int
    count: int


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked | None]:
    """Lists what interpreted programs ask for, and None where one waits."""
    from fastmaf.kernels.triton_common import overlap

    found: list[Asked | None] = []

    def value(number: Any) -> int:
        return int(number.handle.data.item()) if hasattr(number, "handle") else int(number)

    monkeypatch.setattr(overlap, "wait", lambda _: found.append(None))
    monkeypatch.setattr(
        overlap, "prefetch", lambda p, start, count, _: found.append(Asked(*map(value, (p, start, count))))
    )
    monkeypatch.setattr(overlap, "allowed", lambda: True)
    monkeypatch.setattr(launch_table, "EARLY", range(1000))
    return found


def weights_of(flow: fastmaf.Flow) -> list[Tensor]:
    return [layer.weight for layer in layers_of(flow).values()]


def of_tensors(asked: list[Asked | None], tensors: list[Tensor]) -> dict[int, Tensor]:
    """Returns how often each number of the tensors was asked for, by address; all must be theirs."""
    by_address = {tensor.data_ptr(): tensor for tensor in tensors}
    times = {address: torch.zeros(tensor.numel(), dtype=torch.int) for address, tensor in by_address.items()}
    for one in asked:
        if one is not None and one.count > 0:
            assert 0 <= one.start <= one.start + one.count <= by_address[one.address].numel()
            times[one.address][one.start : one.start + one.count] += 1
    return times


@pytest.mark.parametrize("device", [INTERPRETED])
@pytest.mark.parametrize("budget", [1 << 10, 1 << 20], ids=["a part at a time", "all at once"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pass_asks_for_every_weight_once(
    monkeypatch: pytest.MonkeyPatch, asked: list[Asked | None], device: str, budget: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(launch_table, "PREFETCHED", budget)
    flow = build(101, blocks=2, hidden_features=(75, 40), dtype=F32).to_inference(dtype=dtype)
    with fastmaf.use_backend("triton"), torch.no_grad():
        flow.log_prob(normal(3, 101, dtype=F32))
    times = of_tensors(asked, weights_of(flow))
    assert all((of_one == 1).all() for of_one in times.values())


@pytest.mark.parametrize("device", [INTERPRETED])
@pytest.mark.parametrize("budget", [1 << 10, 1 << 20], ids=["a part at a time", "all at once"])
def test_a_training_step_asks_for_weights_and_moments(
    monkeypatch: pytest.MonkeyPatch, asked: list[Asked | None], device: str, budget: int
) -> None:
    monkeypatch.setattr(launch_table, "PREFETCHED", budget)
    flow = build(101, blocks=2, hidden_features=(75, 40), dtype=F32)
    optimizer = fastmaf.optim.FusedAdam(flow.parameters())
    with fastmaf.use_backend("triton"):
        for _ in range(2):  # the first makes the moments
            asked.clear()
            optimizer.minimize(flow.log_prob(normal(3, 101, dtype=F32)).mean())
    weights = weights_of(flow)
    moments = [optimizer.state[weight][name] for weight in weights for name in ("exp_avg", "exp_avg_sq")]
    times = of_tensors(asked, [*weights, *moments])
    for tensor in moments:
        assert (times[tensor.data_ptr()] == 1).all()
    for tensor in weights:  # in the forward and in the backward pass
        assert (times[tensor.data_ptr()] == 2).all()


@pytest.mark.parametrize("device", [INTERPRETED])
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_every_program_waits_once(
    monkeypatch: pytest.MonkeyPatch, asked: list[Asked | None], device: str, batch: int
) -> None:
    from fastmaf.kernels.triton_common import device as common

    flow = build(37, blocks=2, hidden_features=(21, 40), dtype=F32)
    launch, grids = common.launch, list[int]()

    def counted(kernel: Any, grid: int, *args: Any, **options: Any) -> None:
        before = asked.count(None)
        launch(kernel, grid, *args, **options)
        assert asked.count(None) - before == grid, kernel.__name__
        grids.append(grid)

    monkeypatch.setattr(common, "launch", counted)
    with fastmaf.use_backend("triton"):
        flow.log_prob(normal(batch, 37, dtype=F32)).sum().backward()
        flow.sample(batch)
    assert len(grids) > 20
    times = of_tensors(asked, weights_of(flow))
    assert all(of_one.max() > 0 for of_one in times.values())


def test_tables_that_are_read_early_are_the_same_in_every_call() -> None:
    from fastmaf.bench.dev.early import TABLES
    from fastmaf.kernels.triton_common.device import recording

    flow = build(37, blocks=2, hidden_features=(21, 40), dtype=F32)
    flow.validate_args = False
    optimizer = fastmaf.optim.FusedAdam(flow.parameters())
    calls = []
    for _ in range(3):
        with fastmaf.use_backend("triton"), recording(90, 6) as launches:
            optimizer.minimize(flow.log_prob(torch.zeros(3, 37)).sum(), check_finite=False)
            flow.sample(3)
        calls.append(
            [
                (name, value.data_ptr())
                for one in launches
                for name, value in zip(one.kernel.arg_names, one.args, strict=False)
                if name in TABLES
            ]
        )
    assert {name for name, _ in calls[-1]} == set(TABLES)
    assert calls[1] == calls[2]


def test_only_cards_of_which_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmaf.kernels.triton_common import overlap
    from fastmaf.kernels.triton_common.device import recording

    flow = build(13, blocks=1, dtype=F32)
    for capability in (61, 75, 80, 89, 90, 100, 120):
        for switch in ("1", "0"):
            monkeypatch.setenv("FASTMAF_OVERLAP", switch)
            with fastmaf.use_backend("triton"), recording(capability, 6) as launches, torch.no_grad():
                flow(normal(3, 13, dtype=F32))
            early = capability == 90 and switch == "1" and overlap._supported()
            assert {one.options["OVERLAP"] for one in launches} == {early}
            assert {one.options.get("launch_pdl", False) for one in launches} == {early}


@pytest.mark.parametrize("device", [ON_GPU])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_results_are_those_of_kernels_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, device: str, batch: int
) -> None:
    """To the last bit, in graphs, whose kernels follow without a gap, with other numbers in each call."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("this card starts kernels one after the other")

    def results() -> list[Tensor]:
        flow = build(3000, blocks=3, hidden_features=(512, 512), dtype=F32).to(device)
        step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters()), graphs=True)
        log_prob, found = fastmaf.ReplayedLogProb(flow), list[Tensor]()
        for i in range(30):
            x = normal(batch, 3000, seed=i, dtype=F32).to(device)
            step(x)
            found.append(log_prob(x))
            with torch.no_grad():
                found.append(flow.inverse(x)[0])
        return [*found, *(parameter.detach().clone() for parameter in flow.parameters())]

    with fastmaf.use_backend("triton"):
        early = results()
        monkeypatch.setenv("FASTMAF_OVERLAP", "0")
        for one, other in zip(early, results(), strict=True):
            assert torch.equal(one, other)


def test_what_follows_from_ptx() -> None:
    """Registers that hold one of two addresses, or are compared with one, in kernels that the compiler never made."""
    from fastmaf.bench.dev import early
    from fastmaf.bench.dev.machine_code import MachineCode

    code = MachineCode([], [], [], 0)
    begin = "{\n ld.param.b64 %rd1, [kernel_param_0];\n ld.param.b64 %rd2, [kernel_param_1];\n"
    table, other = "ld.global.b32 { %r1 }, [ %rd1 + 0 ];\n", "ld.global.b32 { %r1 }, [ %rd2 + 0 ];\n"
    chosen = "mov.b64 %rd3, %rd2;\n @%p1 mov.b64 %rd3, %rd1;\n ld.global.b32 { %r1 }, [ %rd3 + 0 ];\n"
    compared = f"setp.eq.b64 %p1, %rd2, %rd1;\n setp.eq.b64 %rd2, %rd1, %rd1;\n {other}"
    for text, wrong in ((table, 0), (other, 1), (chosen, 1), (compared, 1)):
        assert early._accesses(begin + text, ["items_ptr", "x_ptr"])[1] == wrong
    assert early.faults("\n" + begin + table, code, ["items_ptr", "x_ptr"]) == 1, "it never waits"
