"""What is random in a training run, as tensors of its state: torch's generators and the order of the data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastmaf.io.safe_json import shown
from fastmaf.io.tensor_file import CheckpointError
from fastmaf.training.processes import Processes

RANDOM = "rng/"
"""Prefix of the names of the generators' states."""

ORDER = "data_order"
"""Name of the order of an unfinished epoch, int64 ``[n]``."""


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's global generators of the CPU and of ``device`` within it, and restores them afterwards.

    What a run draws from them, such as dropout, then depends on its seed alone, and nothing of it is left behind.
    """
    generators = _generators(device)
    before = {name: generator.get_state() for name, generator in generators.items()}
    for generator in generators.values():
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for name, generator in generators.items():
            generator.set_state(before[name])


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Returns the states of the generators of the CPU and of ``device``, uint8, by name."""
    return {name: generator.get_state() for name, generator in _generators(device).items()}


def restore_random_state(tensors: Mapping[str, Tensor], device: torch.device, file: Path) -> None:
    """Sets the generators of the CPU and of ``device`` to states that ``random_state`` returned.

    A generator without a state stays as it is: one of a device that the run did not use before.

    Raises:
        CheckpointError: a state is none of this generator; the message names ``file``.
    """
    for name, generator in _generators(device).items():
        if (state := tensors.get(name)) is None:
            continue
        expected = generator.get_state()
        found = f"found {shown(tuple(state.shape))} {state.dtype}"
        if state.dtype != expected.dtype or state.shape != expected.shape:
            raise CheckpointError(f"{file}: tensor {name}: expected {tuple(expected.shape)} {expected.dtype}; {found}")
        try:
            generator.set_state(state)
        except RuntimeError as error:
            generator.set_state(expected)
            raise CheckpointError(f"{file}: tensor {name}: no state of a generator: {error}") from None


def random_states(device: torch.device, together: Processes) -> dict[str, Tensor]:
    """Returns ``random_state`` of all processes; names are as those of one, and ``rng/1/cpu`` of the second process."""
    states = {name: together.stack(state) for name, state in random_state(device).items()}
    return {_of_rank(name, rank): state for name, found in states.items() for rank, state in enumerate(found)}


def restore_random_states(
    tensors: Mapping[str, Tensor], device: torch.device, together: Processes, seed: int, step: int, file: Path
) -> None:
    """Sets the generators of this process to what ``random_states`` returned for it.

    Another number of processes cannot continue the same streams: each then begins a new one, which depends on ``seed``,
    ``step``, its rank and their number alone. Without any state, nothing changes.

    Raises:
        CheckpointError: a state is none of this generator; the message names ``file``.
    """
    before = sum(name.startswith(RANDOM) and name.endswith("/cpu") for name in tensors)
    if before == together.size:
        names = {_of_rank(name, together.rank): name for name in _generators(device)}
        own = {names[name]: state for name, state in tensors.items() if name in names}
        restore_random_state(own, device, file)
    elif before:
        stream = hashlib.sha256(f"{seed} {step} {together.rank} of {together.size}".encode()).digest()
        for generator in _generators(device).values():
            generator.manual_seed(int.from_bytes(stream[:7], "little"))


def _of_rank(name: str, rank: int) -> str:
    return f"{RANDOM}{rank}/{name.removeprefix(RANDOM)}" if rank else name


def order_in(tensors: Mapping[str, Tensor], n: int, file: Path) -> Tensor | None:
    """Returns the order of ``n`` data in an unfinished epoch, or None if there is none.

    Raises:
        CheckpointError: it is no order of so many; the message names ``file``.
    """
    order = tensors.get(ORDER)
    if order is None:
        return None
    if order.dtype != torch.int64 or order.shape != (n,) or not torch.equal(order.sort().values, torch.arange(n)):
        raise CheckpointError(
            f"{file}: tensor {ORDER}: expected each of 0..{n - 1} once, int64 ({n},); found "
            f"{shown(tuple(order.shape))} {order.dtype}"
        )
    return order


def _generators(device: torch.device) -> dict[str, torch.Generator]:
    found = {f"{RANDOM}cpu": torch.default_generator}
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        found[f"{RANDOM}cuda"] = torch.cuda.default_generators[index]
    return found
