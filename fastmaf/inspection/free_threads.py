"""Fewer threads beside busy neighbours: OpenMP's threads wait for each other, busily, wherever one has no processor."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

_SAMPLES, _SECONDS = 5, 0.02
_LOAD = Path("/proc/loadavg")


@contextmanager
def free_threads() -> Iterator[int]:
    """Limits torch to the processors that nothing else is running on, at least one, and yields the number of threads.

    With two threads on two processors beside a busy process, most of the time is spent waiting: a fit took four times
    the processor time. Where the system does not tell what is running (other than Linux), nothing is changed.
    """
    before = torch.get_num_threads()
    threads = max(1, min(before, (os.cpu_count() or before) - _others())) if before > 1 else before
    if threads != before:
        torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        if threads != before:
            torch.set_num_threads(before)


def _others() -> int:
    """Returns how many threads other than this one are running or waiting for a processor; 0 if unknown."""
    counts = []
    for _ in range(_SAMPLES):
        try:
            counts.append(int(_LOAD.read_text("ascii").split()[3].split("/")[0]) - 1)
        except (OSError, ValueError, IndexError):
            return 0
        time.sleep(_SECONDS)
    return max(0, round(median(counts)))
