"""Processes that train one model together, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from fastmaf.training.failures import agree, connected, fail


class Processes(NamedTuple):
    """This process among those that work together.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        group: of ``torch.distributed``; None for a single process.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, index: Tensor) -> Tensor:
        """Returns this process's share of the numbers of a batch, in their order."""
        return index.tensor_split(self.size)[self.rank]

    @property
    def device(self) -> torch.device:
        """Where tensors lie that the processes exchange."""
        return torch.device("cuda" if distributed.get_backend(self.group) == "nccl" else "cpu")

    def any(self, found: bool) -> bool:
        """Returns whether something is true in one of the processes, all of which must ask.

        Raises:
            ProcessFailedError: another process has failed.
        """
        return self.any_of(found)[0]

    def any_of(self, *found: bool) -> list[bool]:
        """Returns what ``any`` returns for each of up to two things."""
        return list(found) if self.group is None else [count > 0 for count in agree(self.group, self.device, *found)]

    def check(self) -> None:
        """Raises ProcessFailedError if another process has failed; before what all of them compute together."""
        self.any_of()

    def stack(self, tensor: Tensor) -> list[Tensor]:
        """Returns the tensors of all processes, of one shape and dtype, by rank; see ``check``."""
        if self.group is None:
            return [tensor]
        found = [torch.empty_like(tensor, device=self.device) for _ in range(self.size)]
        with connected():
            distributed.all_gather(found, tensor.to(self.device), group=self.group)
        return [part.to(tensor.device) for part in found]


def is_first() -> bool:
    """Returns whether this process is the first of those that ``torchrun`` started, or alone."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """Returns the number of processes that ``torchrun`` started on all machines, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_size() -> int:
    """Returns the number of processes that ``torchrun`` started on this machine, this one included."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def was_restarted() -> bool:
    """Returns whether ``torchrun`` has started the processes again, after one of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def started_together(device: torch.device) -> Iterator[Processes]:
    """Yields the processes that ``torchrun`` has started, connected by gloo on CPUs and by nccl on GPUs.

    None of them ends well before all do: an error in one is told to the others as soon as these call
    ``Processes.any`` or ``check``, or take a training step.

    Raises:
        ProcessFailedError: one of the processes has failed, but not all.
        RuntimeError: this torch has no ``torch.distributed``.
    """
    if world_size() == 1 or "RANK" not in os.environ:
        yield Processes()
        return
    if not distributed.is_available():
        raise RuntimeError(f"{world_size()} processes were started, but this torch cannot connect them")
    mine = not distributed.is_initialized()
    if mine:
        store, rank, size = next(distributed.rendezvous("env://"))  # type: ignore[attr-defined]
        # The store may be that of the processes that torchrun had started before, whose addresses are still there.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = distributed.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    together = Processes(distributed.get_rank(), distributed.get_world_size(), distributed.group.WORLD)
    try:
        try:
            yield together
        except Exception as error:
            fail(together.group, together.device, error)
            raise
        together.check()
    finally:
        if mine:
            distributed.destroy_process_group()


def device_of(device: str) -> torch.device:
    """Returns the device of this process: of ``"cuda"``, the GPU that ``torchrun`` counts for it."""
    found = torch.device(device)
    if found.type == "cuda" and found.index is None and "LOCAL_RANK" in os.environ:
        found = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(found)
    return found
