"""A library that is built and ready to be checked and timed, in the process of a worker."""

from __future__ import annotations

import gc
import importlib
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastmaf.bench import machine
from fastmaf.bench.check import WrongResultError, check
from fastmaf.bench.libraries import Entry, Library, Size, library_class
from fastmaf.images.dataset import load_train, to_unit


class Timed(NamedTuple):
    """The times of some calls in seconds, a note, and the share of the processors that other processes took."""

    seconds: list[float]
    note: str = ""
    others: float = 0.0


class _Call(NamedTuple):
    """A prepared case: what is timed, the factor for its time, a note, and whether it is short."""

    call: Callable[[], object]
    factor: float = 1.0
    note: str = ""
    short: bool = False


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
        self._clock, self._peak = machine.clock(device), machine.peak(device)
        self._seed, self._baseline = seed, self._peak()

        def build() -> None:
            self.library = make(size, seed, device)

        # The first build allocates memory that was never used before; where it is fast, two more follow.
        self.build_seconds = [self._clock(build)]
        self._build_peak = self._peak()
        while len(self.build_seconds) < 3 and sum(self.build_seconds) < 4:
            del self.library
            gc.collect()
            self.build_seconds.append(self._clock(build))
        machine.reset_peak(device)
        self._calls: dict[tuple[str, int], _Call] = {}

    def _draw(self, n: int, seed: int = 0) -> Tensor:
        x = torch.rand(n, self.library.size.features, generator=torch.Generator().manual_seed(seed))
        return x.to(self.library.device)

    def memory(self, case: str, batch: int) -> float | None:
        """Returns the peak memory of a case in bytes, less what imports took; None where it is unknown.

        Sampling has to be measured before training, whose moments stay allocated.
        """
        if case == "training memory":
            self.library.new_optimizer()
            for i in range(3):
                self.library.train_step(self._draw(batch, i))
        elif case == "sampling memory" and self.library.inverts_by_passes:
            self.library.passes(self._draw(batch), 8)  # every pass takes as much as the first
        elif case == "sampling memory":
            self.library.sample(batch)
        peak = self._build_peak if case == "build memory" else self._peak()
        return None if peak is None or self._baseline is None else peak - self._baseline

    def check(self, seed: int, batches: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """Returns the errors of the library, or raises WrongResultError."""
        return check(self.library, seed, batches)

    def prepare(self, case: str, batch: int, seconds: float, folder: str) -> float:
        """Prepares a case and returns the time of its first call, which warms up, compiles and allocates.

        Args:
            seconds: that will be spent at a time.
            folder: for saved weights.
        """
        library, x, path = self.library, self._draw(batch, self._seed + batch), Path(folder, "weights.safetensors")
        if case == "train step":
            library.new_optimizer()
        elif case == "load":
            library.save(path)
            expected = library.log_prob(self._draw(8))
            if library.trains:  # changes the weights that loading has to restore
                library.new_optimizer()
                library.train_step(self._draw(8))
        prepared = {
            "log_prob": lambda: _Call(partial(library.log_prob, x)),
            "train step": lambda: _Call(partial(library.train_step, x)),
            "sample": lambda: self._sampling(batch, seconds),
            "save": lambda: _Call(partial(library.save, path)),
            "load": lambda: _Call(
                partial(library.load, path), note="into an existing model" if library.loads_into_itself else "builds it"
            ),
        }[case]()
        first = self._clock(prepared.call)
        if case == "load" and not torch.equal(expected, library.log_prob(self._draw(8))):
            raise WrongResultError("loaded weights give other densities than the saved ones")
        self._calls[case, batch] = prepared
        return first

    def _sampling(self, batch: int, seconds: float) -> _Call:
        """Draws whole samples if that takes less than ten times ``seconds``, else extrapolates from some passes."""
        whole = _Call(partial(self.library.sample, batch))
        if not self.library.inverts_by_passes:
            return whole
        size, z, few = self.library.size, self._draw(batch), 4
        total = size.features * size.blocks
        self.library.passes(z, few)
        seconds_of_one = self._clock(lambda: self.library.passes(z, few)) / few
        if seconds_of_one * total < 10 * seconds:
            return whole
        count = max(few, min(size.features, math.ceil(seconds / seconds_of_one)))
        call = partial(self.library.passes, z, count)
        return _Call(call, total / count, f"extrapolated: {count:,} of {total:,} passes")

    def time(self, case: str, batch: int, seconds: float) -> Timed:
        """Repeats a prepared case for about so many seconds, at least once."""
        prepared = self._calls[case, batch]
        if prepared.short:
            prepared.call()  # another process has used the caches
        times: list[float] = []
        busy = machine.Busy()
        while not times or sum(times) < seconds:
            times.append(self._clock(prepared.call))
        self._calls[case, batch] = prepared._replace(short=min(times) < seconds)
        return Timed([prepared.factor * t for t in times], prepared.note, busy.others())

    def epoch(self, folder: str, batch: int, most: float) -> Timed:
        """Times an epoch: reading and decoding the training images, then a step for each batch.

        Steps after the first ``most`` seconds are extrapolated.
        """
        side = round((self.library.size.features / 3) ** 0.5)
        self.library.new_optimizer()
        self.library.train_step(self._draw(batch))
        start = time.perf_counter()
        images = load_train(folder, size=side, progress=False).pixels
        decode = time.perf_counter() - start
        batches, times = torch.randperm(len(images)).split(batch), []
        for index in batches:
            x = images[index]
            times.append(self._clock(lambda x=x: self.library.train_step(to_unit(x).to(self.library.device))))  # type: ignore[misc]
            if sum(times) > most:
                break
        note = f"decoding {decode:.2f} s"
        if len(times) < len(batches):
            note += f", extrapolated: {len(times)} of {len(batches)} steps"
        return Timed([decode + sum(times) / len(times) * len(batches)], note)
