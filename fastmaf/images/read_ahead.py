"""Reading images ahead in processes of their own, while those before them are worked on.

The processes are spawned, and import Pillow and numpy only, not torch: they start within a fraction of a second, and
have no threads that could compete with those of the caller.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

from fastmaf.images.decoded_image import DecodedImage, read_image
from fastmaf.images.image_file import DataError

_T = TypeVar("_T")
_R = TypeVar("_R")

BATCH = 32
"""Images of one batch; fewer if they are large."""

_PIXELS = 2**23  # of the squares of one batch


class Unreadable(NamedTuple):
    """A file that cannot be read, and why."""

    path: Path
    reason: str


Stamp: TypeAlias = tuple[int, int]
"""Size in bytes and time of the last change in ns of a file, by which a changed file is recognised."""


class ReadImage(NamedTuple):
    """An image, and the stamp of its file before it was read."""

    image: DecodedImage
    stamp: Stamp


Read: TypeAlias = ReadImage | Unreadable
"""What reading one file gives."""


def stamp_of(path: Path) -> Stamp:
    """Returns the stamp of a file; (-1, -1) if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


class ReaderEndedError(OSError):
    """A process that reads images was killed, or ran out of memory."""


def processors() -> int:
    """Returns the number of processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def batches_of(files: Sequence[Path], size: int = BATCH) -> Iterator[Sequence[Path]]:
    """Yields the files in batches, in their order."""
    return (files[i : i + size] for i in range(0, len(files), size))


def in_order(submit: Callable[[_T], Future[_R]], items: Iterable[_T], ahead: int) -> Generator[_R, None, None]:
    """Yields the result of each item in order, while up to ``ahead`` later ones are being worked on.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> with ThreadPoolExecutor(2) as pool:
        ...     list(in_order(lambda item: pool.submit(abs, item), [-1, 2, -3], ahead=1))
        [1, 2, 3]
    """
    waiting: deque[Future[_R]] = deque()
    try:
        for item in items:
            waiting.append(submit(item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class ReadAhead:
    """Reads image files in batches, in order; many files in several processes.

    Args:
        size: side of the square that each image is resized to, in pixels.
        keep_full: keep each image at full resolution, too; then a batch is one image, as these may be large.
        processes: number of processes; 0 to read in this one, as is done with few files, too.

    Raises:
        ReaderEndedError: from ``read``.
    """

    def __init__(self, size: int, *, keep_full: bool = False, processes: int) -> None:
        self._read = partial(read_batch, size=size, keep_full=keep_full)
        self._batch, self._processes = 1 if keep_full else min(BATCH, max(1, _PIXELS // size**2)), processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def read(self, files: Sequence[Path]) -> Iterator[list[Read]]:
        """Yields the images of each batch of files; nothing is read before the first is requested."""
        if self._processes == 0 or len(files) <= 2 * BATCH:
            yield from map(self._read, batches_of(files, self._batch))
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._processes, context, initializer=_follow_the_parent)
        try:
            yield from in_order(self._submit, batches_of(files, self._batch), ahead=2 * self._processes)
        except BrokenProcessPool as error:
            raise ReaderEndedError(
                "a process that read images ended unexpectedly: it was killed, or out of memory"
            ) from error

    def _submit(self, files: Sequence[Path]) -> Future[list[Read]]:
        assert self._pool is not None
        with _interrupts_blocked():  # the processes that this starts inherit it
            return self._pool.submit(self._read, files)


def read_batch(files: Sequence[Path], size: int, keep_full: bool) -> list[Read]:
    """Reads files one after the other; those that cannot be read are results, too."""
    results: list[Read] = []
    for file in files:
        try:
            stamp = stamp_of(file)
            results.append(ReadImage(read_image(file, size, keep_full=keep_full), stamp))
        except DataError as error:
            results.append(Unreadable(file, str(error)))
    return results


def _follow_the_parent() -> None:
    """Leaves Ctrl-C to the parent process, and ends this process where the parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Delays Ctrl-C until the end of the block; a process started within does not see it while it is starting."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
