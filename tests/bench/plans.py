"""What the tests of the bench share: tiny plans, limits that need no measuring, sides that are wrong or come to an end,
and counts of the work that a call does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastmaf.bench.cases import BUILD, FILES, MEMORY, SAMPLE, SCORE, TRAIN, Case, Plan, Sweep, epoch
from fastmaf.bench.sides import SIDES, Entry, Side, Size
from fastmaf.bench.sides.dense import Naive
from fastmaf.degrees import hidden_degrees, input_degrees
from fastmaf.naive import NaiveMADE

LIMITS = {
    "read_gb_per_s": 30.0,
    "copy_gb_per_s": 20.0,
    "adam_gb_per_s": 40.0,
    "sgemm_gflop_per_s": 300.0,
    "launch_us": 2.0,
}
FILE_LIMITS = {"write_file_gb_per_s": 1.0, "read_file_gb_per_s": 2.0}
VARIABLE = "FASTMAF_TEST_ENVIRONMENT"  # that a side can ask for
TINY = Size(48, (16, 16), 2)  # 48 = 3 · 4²: images of 4 × 4 pixels, so that the capsule workflow's epoch fits


class WrongDensity(Naive):
    """Its densities are off by a thousandth."""

    def log_prob(self, x: Tensor) -> Tensor:
        return super().log_prob(x) * 1.001


class Raising(Naive):
    """Cannot sample."""

    def passes(self, z: Tensor, count: int) -> Tensor:
        raise ArithmeticError("no samples today")

    sample = passes  # type: ignore[assignment]


class Dying(Naive):
    """Its process ends in the middle of a training step."""

    def train_step(self, x: Tensor) -> None:
        os._exit(3)


class Hanging(Naive):
    """Never comes back from a density."""

    def log_prob(self, x: Tensor) -> Tensor:
        time.sleep(600)
        return super().log_prob(x)


class Unbuildable(Naive):
    """Cannot be built, and says in what environment."""

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        raise ValueError(f"no such size, {VARIABLE} = {os.environ.get(VARIABLE)}")


MADE: dict[str, type[Side]] = {
    "wrong": WrongDensity,
    "raising": Raising,
    "dying": Dying,
    "hanging": Hanging,
    "unbuildable": Unbuildable,
}


def serve(connection: Connection, *arguments: Any) -> None:
    """Serves a side in its process, as ``worker._serve`` does, with the sides above beside the real ones.

    Patches do not reach a process that is spawned. This function does, as what it is to run.
    """
    from fastmaf.bench import worker

    register(SIDES)
    real = worker.side_class
    worker.side_class = lambda name: MADE[name] if name in MADE else real(name)  # type: ignore[assignment]
    worker._serve(connection, *arguments)


def register(sides: dict[str, Entry]) -> None:
    """Enters the sides above, and one whose library does not exist."""
    sides |= {name: Entry("made", name, environment=((VARIABLE, name),)) for name in MADE}
    sides["absent"] = Entry("absent_side", "Absent", "absent")


@contextmanager
def made_sides() -> Iterator[pytest.MonkeyPatch]:
    """Lets runs take the sides above, in processes of their own."""
    from fastmaf.bench import worker

    with pytest.MonkeyPatch.context() as patch:
        for name, entry in entries().items():
            patch.setitem(SIDES, name, entry)
        patch.setattr(worker, "_serve", serve)
        yield patch


def entries() -> dict[str, Entry]:
    """Returns what ``register`` enters."""
    found: dict[str, Entry] = {}
    register(found)
    return found


def known_limits(patch: pytest.MonkeyPatch) -> None:
    """Puts known numbers in the place of measured ones, which take seconds."""
    from fastmaf.bench import machine

    patch.setattr(machine, "limits", lambda: dict(LIMITS))
    patch.setattr(machine, "file_limits", lambda: dict(FILE_LIMITS))


def every_case(images: int = 4) -> tuple[Case, ...]:
    """Returns one of each kind of case."""
    return (BUILD, SCORE[1], SAMPLE[0], TRAIN[0], *MEMORY, *FILES, epoch(images))


def plan_of(
    sides: tuple[str, ...],
    cases: tuple[Case, ...],
    sweeps: tuple[Sweep, ...] = (),
    *,
    size: Size = TINY,
    rounds: int = 2,
    seconds: float = 0.001,
) -> Plan:
    """Returns a plan in which all sides do all cases."""
    return Plan("tiny", size, sides, tuple(with_sides(case, sides) for case in cases), (4, 64), rounds, seconds, sweeps)


def with_sides(case: Case, sides: tuple[str, ...]) -> Case:
    """Returns a case that sides of these names do too."""
    return case._replace(sides=tuple(dict.fromkeys((*case.sides, *sides))))


def visible_weights(size: Size) -> int:
    """Counts what the masks let through, by comparing degrees."""
    hidden = hidden_degrees("spread", size.features, size.hidden)
    widths = (size.features, *size.hidden, 2 * size.features)
    weights = [torch.zeros(out, into) for into, out in zip(widths, widths[1:], strict=False)]
    block = NaiveMADE(input_degrees(size.features), hidden, weights, [torch.zeros(len(w)) for w in weights])
    return size.blocks * sum(int(block.get_buffer(f"mask_{k}").sum()) for k in range(len(weights)))


class Linears(TorchFunctionMode):
    """Counts the calls of ``linear``, and notes how many rows each was given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear:
            self.rows.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


class Namespaces(TorchDispatchMode):
    """Notes the namespaces of the operators that are called: aten is torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.found.add(func.namespace)
        return func(*args, **(kwargs or {}))


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch to one thread: where other work goes on, several wait for each other longer than tiny layers take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def uniform(n: int, features: int, seed: int) -> Tensor:
    """Draws images."""
    return torch.rand(n, features, generator=torch.Generator().manual_seed(seed))


def normal(n: int, features: int, seed: int) -> Tensor:
    """Draws base points."""
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed))
