"""The check that comes before any time: a side against its twin of the same weights, which shares no code with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaf.bench.sides.side import LEARNING_RATE, Side


class WrongResultError(AssertionError):
    """A side whose results are not those of its twin: nothing of it is timed."""


LARGEST = {
    "log_prob": 3e-6,  # relative to the twin's; right sides of 12,288 dimensions and 7 blocks are within 2e-7
    "inverse": 1e-4,  # of z, which is of the order of 1: two roundings of every layer
    # How far three steps moved each log-density, relative to the twin's steps: about 3e-4. Adam's first step moves
    # every weight by the rate, whatever its gradient is, so weights whose gradient is all but zero may go either way.
    "train step": 1e-2,
}
PASSES = 64  # enough that some of the dimensions they make final depend on hidden units
WHOLE = 4096  # passes of a sample up to which a side that takes them draws whole ones for the check
SCALES = (1.0, 2.0, 0.5)  # of the steps' batches: different ones, which an optimiser has to weigh
BATCHES: Mapping[str, Sequence[int]] = {"log_prob": (8,), "train step": (8,), "sample": (2,)}


def check(side: Side, seed: int, batches: Mapping[str, Sequence[int]] = BATCHES) -> dict[str, float]:
    """Returns the errors of a side by what was compared.

    Args:
        side: whose training steps change it.
        seed: of the inputs.
        batches: of each case that will be timed.

    Raises:
        WrongResultError: one of them is larger than it may be.
    """
    twin: Any = side.twin()
    twin.validate_args = False  # a side's NaN is a wrong result, not a wrong argument
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> Tensor:
        # Unlike images: those are so much alike, being positive, that a step on others moves the log-densities as far.
        return torch.randn(n, side.size.features, generator=generator).to(side.device)

    errors = {"log_prob": 0.0}
    x = draw(8)
    with torch.no_grad():
        before: Tensor = twin.log_prob(x)
        own_before = side.log_prob(x)
        for n in {8, *batches.get("log_prob", ())}:
            given = x if n == 8 else draw(n)
            expected = twin.log_prob(given)
            error = float(((side.log_prob(given) - expected) / expected).abs().max())
            errors["log_prob"] = max(errors["log_prob"], error) if error == error else error
            _refuse(errors)
        errors["inverse"] = _inverse_error(side, twin, draw(2))
        _refuse(errors)
        for n in batches.get("sample", ()):
            _check_samples(side, twin, n)
    if side.trains:
        steps = [n for n in batches.get("train step", ())] or [8]
        given_batches = [scale * draw(steps[i % len(steps)]) for i, scale in enumerate(SCALES)]
        side.new_optimizer()
        optimizer = torch.optim.Adam(twin.parameters(), lr=LEARNING_RATE)
        for given in given_batches:
            side.train_step(given)
            optimizer.zero_grad()
            (-twin.log_prob(given).mean()).backward()
            optimizer.step()
        with torch.no_grad():
            moved, should = side.log_prob(x) - own_before, twin.log_prob(x) - before
        errors["train step"] = float((moved - should).norm() / should.norm())
    _refuse(errors)
    return errors


def _refuse(errors: dict[str, float]) -> None:
    for what, error in errors.items():
        if not error < LARGEST[what]:
            raise WrongResultError(f"{what} is off by {error:.1e}, more than {LARGEST[what]:.0e}")


def _inverse_error(side: Side, twin: Any, z: Tensor) -> float:
    if not side.inverts_by_passes:
        return float((twin(side.inverse(z))[0] - z).abs().max())
    count = min(PASSES, side.size.features)
    back = twin.last(side.passes(z, count))[0]
    return float((back - z)[:, :count].abs().max())


def _check_samples(side: Side, twin: Any, n: int) -> None:
    """Refuses samples whose z, by the twin, are not standard normal: mean and variance are within six deviations."""
    if side.inverts_by_passes and side.size.features * side.size.blocks > WHOLE:
        return
    z = twin(side.sample(n))[0]
    off = max(abs(float(z.mean())), abs(float(z.var(correction=0)) - 1) / 2**0.5) * z.numel() ** 0.5
    if tuple(z.shape) != (n, side.size.features) or not off < 6:
        raise WrongResultError(f"{n} samples, of shape {tuple(z.shape)}, are not normal in z by {off:.1f} deviations")
