"""Errors in one of several processes, of which all others learn, in place of waiting for it.

The rule for code of several processes: what they compute together follows on a *round*, to which each brings up to two
numbers, or its error. A process that fails joins the round that the others come to next, whichever that is; then all
of them end with an error that names it. Between a round and the end of what is computed together, nothing of one
process alone may fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

_NUMBERS = 2  # of each round: a process that failed does not know how many the others bring
_LONGEST = 2000  # bytes of an error that the others are told


class ProcessFailedError(RuntimeError):
    """One of the processes that work together has failed: the message names it, and its error.

    All of them raise it, the one that failed from its own error. Where all have failed, each raises its own.

    Example:
        >>> issubclass(fastmaf.ProcessFailedError, RuntimeError)
        True
    """


def agree(group: Any, device: torch.device, *numbers: float) -> list[float]:
    """Returns the sums of up to two numbers over the processes of a group: a round, to which all of them must come.

    Args:
        group: of ``torch.distributed``.
        device: of the tensors that are exchanged.
        *numbers: of this process.

    Raises:
        ProcessFailedError: a process has failed, or its connection broke.
    """
    return _round(group, device, numbers, None)[: len(numbers)]


def fail(group: Any, device: torch.device, error: Exception) -> None:
    """Joins the next round of the other processes with an error, which the caller raises afterwards.

    Raises:
        ProcessFailedError: not all of the processes have failed. Nothing is exchanged if ``error`` is such an error:
            the others know it.
    """
    if not isinstance(error, ProcessFailedError):
        _round(group, device, (), error)


def _round(group: Any, device: torch.device, numbers: Sequence[float], error: Exception | None) -> list[float]:
    padded = [float(error is not None), *numbers, *[0.0] * (_NUMBERS - len(numbers))]
    with connected():
        sums = torch.tensor(padded, dtype=torch.float64, device=device)
        distributed.all_reduce(sums, group=group)
        failed, *found = sums.tolist()
        if not failed:
            return found
        size = distributed.get_world_size(group)
        text = b"" if error is None else f"{type(error).__name__}: {error}".encode()[:_LONGEST]
        row = torch.frombuffer(bytearray(text.ljust(_LONGEST, b"\0")), dtype=torch.uint8).to(device)
        rows = [torch.empty_like(row) for _ in range(size)]
        distributed.all_gather(rows, row, group=group)
    if failed < size:
        texts = [bytes(row.cpu().numpy()).rstrip(b"\0").decode(errors="replace") for row in rows]
        rank = next(rank for rank, text in enumerate(texts) if text)
        raise ProcessFailedError(f"process {rank} of {size} failed: {texts[rank]}") from error
    return found


@contextmanager
def connected() -> Iterator[None]:
    """Raises ProcessFailedError in place of what ``torch.distributed`` raises where the connection to a process broke.

    Such an error is of no use to the others: each finds its connections broken by itself.
    """
    try:
        yield
    except ProcessFailedError:
        raise
    except RuntimeError as error:
        raise ProcessFailedError(
            f"the connection to another process broke; its own output shows why it ended: {error}"
        ) from error
