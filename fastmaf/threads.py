"""Independent pieces of work on several threads, each of which computes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

_T = TypeVar("_T")
_R = TypeVar("_R")


def map_on_threads(function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """Returns the results of a function for each item, as many at a time as torch has threads.

    Each piece is computed by one thread. Threads that share every operation wait for each other in each of them, and
    most of the time so beside other processes; and their results depend on their number. The function runs without
    gradients.

    Args:
        function: on tensors of the CPU.
        items: in any number.

    Example:
        >>> from fastmaf.threads import map_on_threads
        >>> map_on_threads(lambda n: n * n, [1, 2, 3])
        [1, 4, 9]
    """

    def alone(item: _T) -> _R:
        torch.set_num_threads(1)
        with torch.no_grad():
            return function(item)

    threads = torch.get_num_threads()
    workers = min(threads, len(items))
    try:
        if workers < 2:
            return [alone(item) for item in items]
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(alone, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)


@contextmanager
def beside(function: Callable[[], _R]) -> Iterator[Callable[[], _R]]:
    """Computes a function on another thread during a block, and yields a function that waits for its result.

    The block computes on one of torch's threads, as is best for many small operations, the function on the others and
    without gradients. If torch has one thread only, the function is called when its result is first asked for. An
    exception in the block is raised when the function has finished.

    Args:
        function: independent of the block.

    Example:
        >>> from fastmaf.threads import beside
        >>> with beside(lambda: 2 + 3) as result:
        ...     other = 2 * 3
        >>> other, result()
        (6, 5)
    """
    threads = torch.get_num_threads()

    def without_gradients() -> _R:
        with torch.no_grad():
            return function()

    def on_others() -> _R:
        torch.get_num_threads()  # a thread's first call of torch sets its number to that of the process
        torch.set_num_threads(threads - 1)
        return without_gradients()

    if threads < 2:
        yield cache(without_gradients)
        return
    try:
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(on_others)
            torch.set_num_threads(1)
            yield future.result
    finally:
        torch.set_num_threads(threads)
