"""Helpers of the benchmark's tests: a tiny plan, known rates of the machine, and libraries that fail."""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch import Tensor

from fastmaf.bench import machine
from fastmaf.bench.cases import BUILD, FILES, MEMORY, Group, Plan, epoch, log_prob, sample, train_step
from fastmaf.bench.libraries import LIBRARIES, Entry, Library, Size, library_class
from fastmaf.bench.libraries.dense import Naive

FILE_RATES = {"write_file_gb_per_s": 1.0, "read_file_gb_per_s": 2.0}
RATES = {
    "read_gb_per_s": 30.0,
    "copy_gb_per_s": 20.0,
    "adam_gb_per_s": 40.0,
    "sgemm_gflop_per_s": 300.0,
    "launch_us": 2.0,
    "cache_mb": 32.0,
}
TINY = Size(48, (16, 16), 2)  # 48 = 3 · 4²: an epoch of images of 4 × 4 pixels


class WrongDensity(Naive):
    """Its densities are off by a thousandth."""

    def log_prob(self, x: Tensor) -> Tensor:
        return super().log_prob(x) * 1.001


class Raising(Naive):
    """Cannot sample."""

    def inverse(self, z: Tensor, passes: int) -> Tensor:
        raise ArithmeticError("no samples today")


class Dying(Naive):
    """Its process ends in a training step."""

    def train_step(self, x: Tensor) -> None:
        os._exit(3)


class Hanging(Naive):
    """Does not return a density."""

    def log_prob(self, x: Tensor) -> Tensor:
        time.sleep(600)
        return super().log_prob(x)


FAILING = {
    "wrong": Entry(__name__, "WrongDensity", "", ""),
    "raising": Entry(__name__, "Raising", "", ""),
    "dying": Entry(__name__, "Dying", "", ""),
    "hanging": Entry(__name__, "Hanging", "", ""),
    "absent": Entry("absent_module", "Absent", "", "", "absent"),
}


def register_failing(patch: pytest.MonkeyPatch) -> None:
    """Adds the failing libraries to the registry."""
    for name, entry in FAILING.items():
        patch.setitem(LIBRARIES, name, entry)


def set_rates(patch: pytest.MonkeyPatch) -> None:
    """Replaces the measured rates, which takes seconds, by known ones."""
    patch.setattr(machine, "limits", lambda: RATES)
    patch.setattr(machine, "file_limits", lambda: FILE_RATES)


def tiny_plan(*libraries: str) -> Plan:
    """Returns a plan of one case of each kind for all of ``libraries``."""
    cases = (BUILD, log_prob(8), sample(1), train_step(8), *MEMORY, *FILES, epoch(4))
    cases = tuple(case._replace(libraries=libraries) for case in cases)
    return Plan("tiny", (Group("", TINY, None, libraries, cases),), pixels=64, rounds=2, seconds=1e-4)


def build(name: str, size: Size, seed: int) -> Library:
    """Builds a library, or skips the test if it is not installed."""
    if LIBRARIES[name].package is not None:
        pytest.importorskip(LIBRARIES[name].package or "")
    return library_class(LIBRARIES[name])(size, seed)


def uniform(n: int, features: int, seed: int) -> Tensor:
    return torch.rand(n, features, generator=torch.Generator().manual_seed(seed))


def normal(n: int, features: int, seed: int) -> Tensor:
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed))
