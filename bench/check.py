"""The check before any timing: a library is compared with its counterpart, which has the same weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaf.bench.libraries.base import LEARNING_RATE, Library


class WrongResultError(AssertionError):
    """The results of a library differ from those of its counterpart; it is not timed."""


LARGEST = {
    "log_prob": 3e-6,  # relative; correct libraries at 12,288 dimensions and 7 blocks are within 2e-7
    "inverse": 1e-4,  # of z, which is of the order of 1: two roundings of every layer
    # How much three steps change each log-density, relative to the counterpart's steps: about 3e-4. Adam's first step
    # changes every weight by the rate, whatever its gradient, so weights of almost zero gradient may go either way.
    "train step": 1e-2,
}
PASSES = 64  # enough that some of the dimensions that they make final depend on hidden units
MOST_PASSES = 4096  # of a whole sample, above which samples of a library that inverts by passes are not checked
SCALES = (1.0, 2.0, 0.5)  # of the batches of the training steps, so that Adam's moments matter
FEWEST_NUMBERS = 1000  # of z whose mean and variance are compared: of fewer, these are far from normal themselves
BATCHES: Mapping[str, Sequence[int]] = {"log_prob": (8,), "train step": (8,), "sample": (2,)}


def check(library: Library, seed: int, batches: Mapping[str, Sequence[int]] = BATCHES) -> dict[str, float]:
    """Returns the errors of log_prob, inverse and train step at the batch sizes that will be timed, per case.

    Raises:
        WrongResultError: one of the errors is larger than allowed.
    """
    counterpart = library.counterpart()
    counterpart.validate_args = False  # a library's NaN is a wrong result, not a wrong argument
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> Tensor:
        # Not uniform, as images are: those are so alike that a step on other images would change densities as much.
        return torch.randn(n, library.size.features, generator=generator).to(library.device)

    x = draw(8)
    with torch.no_grad():
        expected_before, before = counterpart.log_prob(x), library.log_prob(x)
        density_errors = [(before - expected_before) / expected_before]
        for n in {*batches.get("log_prob", ())} - {8}:
            batch = draw(n)
            expected = counterpart.log_prob(batch)
            density_errors.append((library.log_prob(batch) - expected) / expected)
        errors = {"log_prob": _accepted("log_prob", torch.cat(density_errors).abs().max())}
        errors["inverse"] = _accepted("inverse", _inverse_error(library, counterpart, draw(2)))
        for n in batches.get("sample", ()):
            _check_samples(library, counterpart, n)
    if library.trains:
        sizes = list(batches.get("train step", ())) or [8]
        library.new_optimizer()
        optimizer = torch.optim.Adam(counterpart.parameters(), lr=LEARNING_RATE)
        for i, scale in enumerate(SCALES):
            batch = scale * draw(sizes[i % len(sizes)])
            library.train_step(batch)
            optimizer.zero_grad()
            (-counterpart.log_prob(batch).mean()).backward()
            optimizer.step()
        with torch.no_grad():
            change, expected = library.log_prob(x) - before, counterpart.log_prob(x) - expected_before
        errors["train step"] = _accepted("train step", (change - expected).norm() / expected.norm())
    return errors


def _accepted(name: str, error: Tensor) -> float:
    if not error < LARGEST[name]:  # NaN as well
        raise WrongResultError(f"{name} is off by {error:.1e}, more than {LARGEST[name]:.0e}")
    return float(error)


def _inverse_error(library: Library, counterpart: Any, z: Tensor) -> Tensor:
    features = library.size.features
    count, inverted = (
        (min(PASSES, features), counterpart.last) if library.inverts_by_passes else (features, counterpart)
    )
    return (inverted(library.inverse(z, count))[0] - z)[:, :count].abs().max()


def _check_samples(library: Library, counterpart: Any, n: int) -> None:
    """Refuses samples whose z are not standard normal: mean and variance must be within six standard errors."""
    if library.inverts_by_passes and library.size.features * library.size.blocks > MOST_PASSES:
        return
    expected = (n, library.size.features)
    draws = [library.sample(n) for _ in range(math.ceil(FEWEST_NUMBERS / math.prod(expected)))]
    if wrong := [tuple(draw.shape) for draw in draws if tuple(draw.shape) != expected]:
        raise WrongResultError(f"{n} samples, of shape {wrong[0]}, should have shape {expected}")
    z = counterpart(torch.cat(draws))[0]
    off = max(abs(float(z.mean())), abs(float(z.var(correction=0)) - 1) / 2**0.5) * z.numel() ** 0.5
    if not off < 6:
        raise WrongResultError(
            f"{n} samples, of shape {expected}, are not normal in z: off by {off:.1f} standard errors"
        )
