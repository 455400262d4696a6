"""The process that a side has to itself: it builds the side, checks it, and times what it is asked to.

``Worker`` is its handle in the process that asks; requests are names of methods of ``Server`` and their arguments.
"""

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
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from fastmaf.bench import machine
from fastmaf.bench.check import BATCHES, WrongResultError, check
from fastmaf.bench.sides import SIDES, Side, Size, side_class
from fastmaf.images.dataset import load_train, to_unit


class Timed(NamedTuple):
    """The times of some calls in seconds, and what is to be said about them."""

    seconds: list[float]
    note: str = ""
    others: float = 0.0  # the share of the processors that other processes took meanwhile


class SideError(RuntimeError):
    """A side that could not be built or run; the message says why."""


class Worker:
    """A side in a process of its own.

    Args:
        name: of the side.
        size, seed: of its flow.
        threads: that it may use; None for as many as torch would.
        device: cpu or cuda.
        timeout: seconds after which a request is given up.

    Raises:
        ImportError: its library is not installed.
        SideError: it cannot be built.
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
        self.name, self.size, self.timeout = name, size, timeout
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, size, seed, threads, device), daemon=True)
        before = {key: os.environ.get(key) for key, _ in SIDES[name].environment}
        os.environ.update(SIDES[name].environment)
        try:
            self._process.start()
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        theirs.close()
        self._own = psutil.Process(self._process.pid)
        try:
            self.build_seconds: list[float] = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, request: str, *arguments: Any) -> Any:
        """Returns what the side's process answers.

        Until the next request it is suspended: idle threads of one library would spin in the time of another.
        """
        try:
            self._own.resume()
            self._connection.send((request, arguments))
        except (OSError, psutil.Error) as error:
            raise SideError(f"{self.name} has ended: {error}") from error
        answer = self._answer()
        with contextlib.suppress(psutil.Error):  # if it has ended, the next request will say so
            self._own.suspend()
        return answer

    def _answer(self) -> Any:
        try:
            if not self._connection.poll(self.timeout):
                self._process.kill()
                raise SideError(f"{self.name} gave no answer within {self.timeout:.0f} s")
            kind, value = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            code = self._process.exitcode
            killed = " (killed; the memory may not have sufficed)" if code == -9 else ""
            raise SideError(f"the process of {self.name} ended with exit status {code}{killed}") from error
        if kind == "missing":
            raise ImportError(value)
        if kind == "wrong":
            raise WrongResultError(value)
        if kind == "failed":
            raise SideError(f"{self.name}: {value}")
        return value

    @property
    def alive(self) -> bool:
        """Whether its process runs still."""
        return self._process.is_alive()

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(psutil.Error):
            self._own.resume()
        self._connection.close()  # upon which it ends by itself
        self._process.join(5)
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(connection: Connection, *arguments: Any) -> None:
    """Builds a side and answers requests until the other end is gone."""
    _end_with_parent()
    server: list[Server] = []

    def build() -> list[float]:
        server.append(Server(*arguments))
        return server[0].build_seconds

    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        connection.send(_answer(build))
        while server:
            request, given = connection.recv()
            connection.send(_answer(partial(getattr(server[0], request), *given)))


def _answer(call: Callable[[], Any]) -> tuple[str, Any]:
    """Returns what a call gave, or what became of it instead."""
    try:
        return "done", call()
    except ImportError as error:
        return "missing", str(error)
    except WrongResultError as error:
        return "wrong", str(error)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"


def _end_with_parent() -> None:
    """Lets the kernel end this process with the one that started it: suspended, it would not see that."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


class Server:
    """A side and what can be asked of it."""

    side: Side

    def __init__(self, name: str, size: Size, seed: int, threads: int | None, device: str) -> None:
        if threads is not None:
            if hasattr(os, "sched_setaffinity"):  # JAX has no other way of being told
                os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
            torch.set_num_threads(threads)
        warnings.simplefilter("ignore")  # what other libraries say about themselves
        make = side_class(name)
        # torch does so by itself upon the first step or custom operator: 150 MB that are no side's.
        importlib.import_module("torch._dynamo")
        self._clock, self._peak = machine.clock(device), machine.peak(device)
        self._seed, self._baseline = seed, self._peak()

        def build() -> None:
            self.side = make(size, seed, device)

        # The first one takes memory that nothing has touched before; where that was short, two more follow.
        times = [self._clock(build)]
        self._build_peak = self._peak()
        while len(times) < 3 and sum(times) < 4:
            del self.side
            gc.collect()
            times.append(self._clock(build))
        machine.reset_peak(device)
        self.build_seconds = times
        self._files = tempfile.TemporaryDirectory(prefix="fastmaf-bench-")
        self._calls: dict[tuple[str, int], _Call] = {}

    def _draw(self, n: int, seed: int = 0) -> Tensor:
        return torch.rand(n, self.side.size.features, generator=torch.Generator().manual_seed(seed)).to(
            self.side.device
        )

    def memory(self, case: str, batch: int) -> float | None:
        """Returns the peak of memory, in bytes above what importing took: of building, or of doing a case a few times.

        To be asked for sampling before training, whose moments stay. Where the peak cannot be reset, that of building
        is part of both. None where the operating system does not tell.
        """
        peak = self._build_peak
        if case == "training memory":
            self.side.new_optimizer()
            for i in range(3):
                self.side.train_step(self._draw(batch, i))
        elif case == "sampling memory" and self.side.inverts_by_passes:
            self.side.passes(self._draw(batch), 8)  # every pass takes what the first did
        elif case == "sampling memory":
            self.side.sample(batch)
        if case != "build memory":
            peak = self._peak()
        return None if peak is None or self._baseline is None else peak - self._baseline

    def check(self, seed: int, batches: Mapping[str, Sequence[int]] = BATCHES) -> dict[str, float]:
        """Holds the side against its twin at the batches of each case, and returns the errors.

        Raises:
            WrongResultError: one of them is too large.
        """
        return check(self.side, seed, batches)

    def prepare(self, case: str, batch: int, seconds: float) -> float:
        """Makes a case ready and returns the time of its first call, which warms up, compiles and allocates."""
        x, path = self._draw(batch, self._seed + batch), Path(self._files.name, "weights.safetensors")
        if case == "train step":
            self.side.new_optimizer()
        elif case == "load":
            self.side.save(path)
        calls: dict[str, Callable[[], object]] = {
            "log_prob": partial(self.side.log_prob, x),
            "train step": partial(self.side.train_step, x),
            "save": partial(self.side.save, path),
            "load": partial(self.side.load, path),
        }
        own = self._sampling(batch, seconds) if case == "sample" else _Call(calls[case], note=self._words(case))
        before = self.side.log_prob(self._draw(8)) if case == "load" else None
        if before is not None and self.side.trains:  # so that there is something to bring back
            self.side.new_optimizer()
            self.side.train_step(self._draw(8))
        first = self._clock(own.call)
        if before is not None and not torch.equal(before, self.side.log_prob(self._draw(8))):
            raise WrongResultError("what was loaded gives other densities than what was saved")
        self._calls[case, batch] = own
        return first

    def _words(self, case: str) -> str:
        """Returns what must be said about a case of this side."""
        if case != "load":
            return ""
        return "into a model that is there" if self.side.loads_into_itself else "builds the model, too"

    def _sampling(self, batch: int, seconds: float) -> _Call:
        """Draws whole samples where that takes less than ten times ``seconds``, else does some passes and
        extrapolates.
        """
        whole = _Call(partial(self.side.sample, batch))
        if not self.side.inverts_by_passes:
            return whole
        size, z, few = self.side.size, self._draw(batch), 4
        total = size.features * size.blocks
        self.side.passes(z, few)
        one = self._clock(lambda: self.side.passes(z, few)) / few
        if one * total < 10 * seconds:
            return whole
        count = max(few, min(size.features, math.ceil(seconds / one)))
        return _Call(partial(self.side.passes, z, count), total / count, f"extrapolated: {count:,} of {total:,} passes")

    def time(self, case: str, batch: int, seconds: float) -> Timed:
        """Repeats a prepared case for about so many seconds, at least once."""
        own = self._calls[case, batch]
        if own.short:
            own.call()  # another process had the caches
        times: list[float] = []
        busy = machine.Busy()
        while not times or sum(times) < seconds:
            times.append(self._clock(own.call))
        self._calls[case, batch] = own._replace(short=min(times) < seconds)
        return Timed([own.times * t for t in times], own.note, busy.others())

    def epoch(self, folder: str, pixels: int, batch: int, most: float) -> Timed:
        """Times an epoch: reading and decoding the training images, then a step for each batch.

        Steps that would come after ``most`` seconds of them are extrapolated from those that were done.
        """
        self.side.new_optimizer()
        self.side.train_step(self._draw(batch))
        began = time.perf_counter()
        images = load_train(folder, size=pixels, progress=False).pixels
        decode = time.perf_counter() - began
        order = torch.randperm(len(images)).split(batch)

        def step(index: Tensor) -> None:
            self.side.train_step(to_unit(images[index]).to(self.side.device))

        times: list[float] = []
        for index in order:
            times.append(self._clock(partial(step, index)))
            if sum(times) > most:
                break
        note = f"decoding {decode:.2f} s"
        if len(times) < len(order):
            note += f", extrapolated: {len(times)} of {len(order)} steps"
        return Timed([decode + sum(times) / len(times) * len(order)], note)


class _Call(NamedTuple):
    """What is timed, what its time is multiplied with, and what is said about that."""

    call: Callable[[], object]
    times: float = 1.0
    note: str = ""
    short: bool = False
