"""A library in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import psutil

from fastmaf.bench.check import WrongResultError
from fastmaf.bench.libraries import LIBRARIES, Size
from fastmaf.bench.server import Server


class LibraryError(RuntimeError):
    """A library could not be built or run."""


class Worker:
    """A library in a process of its own.

    Between requests the process is suspended: idle threads of one library would otherwise spin while another is timed.

    Args:
        name: of the library.
        size, seed: of its flow.
        threads: that it may use; None for the default of torch.
        device: cpu or cuda.
        timeout: seconds after which a request fails.

    Raises:
        ImportError: the library is not installed.
        LibraryError: it cannot be built.
    """

    def __init__(
        self,
        name: str,
        size: Size,
        seed: int,
        threads: int | None = None,
        device: str = "cpu",
        timeout: float = 900.0,
    ) -> None:
        self.name, self.timeout = name, timeout
        self.alive = True  # as of the last request
        entry = LIBRARIES[name]
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start)
        try:
            with _environment(dict(entry.environment)):  # the first request starts the process
                self.process = psutil.Process(self._pool.submit(os.getpid).result(timeout))
            self.build_seconds: list[float] = self.ask("build", entry, size, seed, threads, device)
        except BaseException:
            self.close()
            raise

    def ask(self, request: str, *arguments: Any) -> Any:
        """Returns the result of a method of ``Server``.

        Raises:
            ImportError: the library is not installed.
            WrongResultError: the check failed.
            LibraryError: the request failed otherwise.
        """
        try:
            self.process.resume()
            return self._pool.submit(_serve, request, *arguments).result(self.timeout)
        except (ImportError, WrongResultError):
            raise
        except FutureTimeoutError as error:
            self.close(patience=0.0)
            raise LibraryError(f"{self.name} did not answer within {self.timeout:.0f} s") from error
        except (BrokenProcessPool, psutil.Error) as error:
            self.close()
            raise LibraryError(f"the process of {self.name} ended; the memory may not have sufficed") from error
        except Exception as error:
            raise LibraryError(f"{type(error).__name__}: {error}") from error
        finally:
            with contextlib.suppress(psutil.Error):
                self.process.suspend()

    def close(self, patience: float = 5.0) -> None:
        """Ends the process, by force if it is still busy after ``patience`` seconds."""
        self.alive = False
        timer = threading.Timer(patience, self._kill)
        timer.start()
        with contextlib.suppress(psutil.Error, AttributeError):
            self.process.resume()
        self._pool.shutdown()
        timer.cancel()

    def _kill(self) -> None:
        with contextlib.suppress(psutil.Error, AttributeError):
            self.process.kill()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


_servers: list[Server] = []  # of this process: none or one


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks, which ends this one
    if sys.platform == "linux":  # where that process is killed, this one ends too, even while it is suspended
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _serve(request: str, *arguments: Any) -> Any:
    if request == "build":
        _servers.append(Server(*arguments))
        return _servers[0].build_seconds
    return getattr(_servers[0], request)(*arguments)
