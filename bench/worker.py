"""A library in a process of its own, in which it is built, checked and timed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import psutil
import torch
from torch import Tensor

from fastmaf.bench import machine
from fastmaf.bench.check import WrongResultError, check
from fastmaf.bench.libraries import LIBRARIES, Entry, Library, Size, library_class
from fastmaf.images.dataset import load_train, to_unit


class LibraryError(RuntimeError):
    """A library could not be built or run."""


class Worker:
    """A library in a process of its own, and the ``Server`` in it.

    Between requests the process is suspended: idle threads of one library would otherwise spin while another is timed.
    """

    timeout = 900.0  # seconds after which a request fails

    def __init__(self, name: str, size: Size, seed: int, threads: int | None = None, device: str = "cpu") -> None:
        self.name = name
        self.alive = True  # as of the last request
        entry = LIBRARIES[name]
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start)
        try:
            with mock.patch.dict(os.environ, entry.environment):  # the first request starts the process
                self.process = psutil.Process(self._pool.submit(os.getpid).result(self.timeout))
            self.build_seconds: list[float] = self.ask("build", entry, size, seed, threads, device)
        except BaseException:
            self.close()
            raise

    def ask(self, request: str, *arguments: Any) -> Any:
        """Returns the result of a method of ``Server``.

        Besides LibraryError it raises WrongResultError, and ImportError where the library is not installed.
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
        with contextlib.suppress(psutil.Error, AttributeError):  # it has ended, or has never started
            self.process.resume()
            timer = threading.Timer(patience, self._kill)
            timer.start()
            self._pool.shutdown()
            timer.cancel()
        self._pool.shutdown()

    def _kill(self) -> None:
        with contextlib.suppress(psutil.Error):  # it may have ended in the meantime
            self.process.kill()


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


class Timed(NamedTuple):
    """The times of some calls in seconds, a note, and the share of the processors that other processes took."""

    seconds: list[float]
    note: str = ""
    others: float = 0.0


class _Call(NamedTuple):
    """What is timed, a note, and the factor for its time."""

    call: Callable[[], object]
    note: str = ""
    factor: float = 1.0


class Server:
    """A library, built and ready to be measured."""

    library: Library

    def __init__(self, entry: Entry, size: Size, seed: int, threads: int | None = None, device: str = "cpu") -> None:
        if threads is not None:
            if hasattr(os, "sched_setaffinity"):  # the only way to limit JAX
                os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
            torch.set_num_threads(threads)
        warnings.simplefilter("ignore")  # of other libraries, about themselves
        make = library_class(entry)
        # torch imports it at the first step or custom operator: 150 MB that no library should be charged with.
        importlib.import_module("torch._dynamo")
        self._clock, self._device, self._seed = machine.clock(device), device, seed
        self._imports_bytes = machine.peak_bytes(device)

        def build() -> None:
            self.library = make(size, seed, device)

        # The first build allocates memory that was never used before; where it is fast, two more follow.
        self.build_seconds = [self._clock(build)]
        self._build_bytes = machine.peak_bytes(device)
        while len(self.build_seconds) < 3 and sum(self.build_seconds) < 4:
            del self.library
            gc.collect()
            self.build_seconds.append(self._clock(build))
        machine.reset_peak(device)
        self._calls: dict[tuple[str, int], _Call] = {}

    def _draw(self, n: int, seed: int = 0) -> Tensor:
        x = torch.rand(n, self.library.size.features, generator=torch.Generator().manual_seed(seed))
        return x.to(self._device)

    def memory(self, case: str, batch: int) -> int:
        """Returns the peak memory of a case in bytes, less what imports took.

        Sampling has to be measured before training, whose moments stay allocated.
        """
        if case == "training memory":
            self.library.new_optimizer()
            for i in range(3):
                self.library.train_step(self._draw(batch, i))
        elif case == "sampling memory" and self.library.inverts_by_passes:
            self.library.inverse(self._draw(batch), min(8, self.library.size.features))  # all passes take as much
        elif case == "sampling memory":
            self.library.sample(batch)
        peak = self._build_bytes if case == "build memory" else machine.peak_bytes(self._device)
        return peak - self._imports_bytes

    def check(self, seed: int, batches: Mapping[str, Sequence[int]]) -> dict[str, float]:
        return check(self.library, seed, batches)

    def prepare(self, case: str, batch: int, seconds: float, folder: str) -> float:
        """Prepares a case to be timed for some ``seconds``; weights are saved to ``folder``.

        Returns the time of its first call, which warms up, compiles and allocates.
        """
        library, x, path = self.library, self._draw(batch, self._seed + batch), Path(folder, "weights.safetensors")
        if case == "sample":
            prepared = self._sampling(batch, seconds)
        elif case == "log_prob":
            prepared = _Call(partial(library.log_prob, x))
        elif case == "train step":
            library.new_optimizer()
            prepared = _Call(partial(library.train_step, x))
        elif case == "save":
            prepared = _Call(partial(library.save, path))
        else:  # load
            library.save(path)
            x = self._draw(8)
            expected = library.log_prob(x)
            if library.trains:  # changes the weights that loading has to restore
                library.new_optimizer()
                library.train_step(x)
            prepared = _Call(partial(library.load, path), library.loading)
        first = self._clock(prepared.call)
        if case == "load" and not torch.equal(expected, library.log_prob(x)):
            raise WrongResultError("loaded weights give other densities than the saved ones")
        self._calls[case, batch] = prepared
        return first

    def _sampling(self, batch: int, seconds: float) -> _Call:
        """Draws whole samples if that takes less than ten times ``seconds``, else extrapolates from some passes."""
        library, z = self.library, self._draw(batch)
        features, _, blocks, _ = library.size
        total, few, seconds_of_one = features * blocks, min(4, features), 0.0
        if library.inverts_by_passes:
            library.inverse(z, few)
            seconds_of_one = self._clock(partial(library.inverse, z, few)) / few
        if seconds_of_one * total < 10 * seconds:
            return _Call(partial(library.sample, batch))
        count = max(few, min(features, math.ceil(seconds / seconds_of_one)))
        note = f"extrapolated: {count:,} of {total:,} passes"
        return _Call(partial(library.inverse, z, count), note, total / count)

    def time(self, case: str, batch: int, seconds: float) -> Timed:
        """Repeats a prepared case for about so many seconds, at least once.

        Of several calls the first is left out, since another process has used the caches before it.
        """
        call, note, factor = self._calls[case, batch]
        times: list[float] = []
        process = psutil.Process()
        process.cpu_percent()  # both count from here
        psutil.cpu_percent()
        while not times or sum(times) < seconds:
            times.append(self._clock(call))
        others = psutil.cpu_percent() - process.cpu_percent() / (psutil.cpu_count() or 1)
        known = sum(times) > 0.1  # as the processors' clocks tick in hundredths of a second
        return Timed([factor * t for t in times[1:] or times], note, others / 100 if known else 0.0)

    def epoch(self, folder: str, batch: int, most: float) -> Timed:
        """Times an epoch: reading and decoding the training images, then a step for each batch.

        Steps after the first ``most`` seconds are extrapolated.
        """
        side = round((self.library.size.features / 3) ** 0.5)
        self.library.new_optimizer()
        self.library.train_step(self._draw(batch))
        start = time.perf_counter()
        images = load_train(folder, size=side, progress=False).pixels
        decode, done, steps = time.perf_counter() - start, 0, 0.0
        batches = torch.randperm(len(images)).split(batch)

        def step() -> None:
            self.library.train_step(to_unit(images[batches[done]]).to(self._device))

        while done < len(batches) and steps <= most:
            steps += self._clock(step)
            done += 1
        extrapolated = "" if done == len(batches) else f", extrapolated: {done} of {len(batches)} steps"
        return Timed([decode + steps / done * len(batches)], f"decoding {decode:.2f} s{extrapolated}")
