"""Trains masked autoregressive flows with their defaults and plain Adam, and tabulates which runs diverge.

    python -m fastmaf.bench.stability [--data moons power] [--models fastmaf zuko] [--seeds 5] [--out stability.csv]

The models of a data set have the same number of blocks and hidden units and take the same number of steps of plain
``torch.optim.Adam``. Seeds change the initial weights and the batches; the data never change. The *rise* of a run is
how far the training loss, averaged over windows of ``WINDOW`` steps, rises above the lowest window before it, in nats
per dimension. A run has *diverged* if a loss is not finite, if its rise exceeds ``JUMP``, or if its final held-out NLL
is not below that of the untrained model. The diagonal Gaussian is fitted to the training rows, for comparison.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from sklearn.datasets import load_digits, make_moons
from torch import Tensor, nn
from torch.nn.functional import interpolate

import fastmaf
from fastmaf.bench.libraries import LIBRARIES, Size, library_class
from fastmaf.capsule.synthetic import draw_dataset
from fastmaf.images.dataset import load_train, to_unit

WINDOW = 10
JUMP = 0.5
BLOCKS = 7
LogProb = Callable[[Tensor], Tensor]
MODELS = ("fastmaf", "fastmaf, former bound", "zuko", "nflows")


class DataSet(NamedTuple):
    """A data set, and the size, steps and models that it is trained with."""

    draw: Callable[[], Tensor]
    hidden: int
    batch: int
    lr: float
    steps: int
    models: tuple[str, ...] = MODELS


def moons() -> Tensor:
    """Two moons, D = 2, not standardised."""
    return torch.from_numpy(make_moons(8000, noise=0.1, random_state=0)[0]).float()


def power() -> Tensor:
    """D = 6, in the manner of POWER (household electricity): bimodal, skewed and nearly discrete, standardised."""
    random = numpy.random.default_rng(0)
    n = 8000
    active = numpy.where(random.random(n) < 0.6, 0.4, 2.0) * random.lognormal(0, 0.4, n)
    reactive = random.gamma(0.8, 0.15, n) * numpy.sqrt(active)
    voltage = 241 - 1.5 * active + 3 * random.standard_normal(n)
    heating = numpy.where(random.random(n) < 0.3 * (active > 1), 17.0, 0.0) + random.random(n)
    kitchen = numpy.where(random.random(n) < 0.08, 38.0, random.integers(0, 3, n)) + random.random(n)
    hour = random.beta(0.9, 0.7, n) + 0.1 * (active > 1.5)
    return _standardised(numpy.stack([active, reactive, voltage, heating, kitchen, hour], 1))


def miniboone() -> Tensor:
    """D = 63, in the manner of MINIBOONE: two classes, a few latent causes, heavy tails, near-copies, standardised."""
    random = numpy.random.default_rng(0)
    n, causes = 8000, 10
    latent = random.standard_normal((n, causes)) + 1.5 * (random.random((n, 1)) < 0.28)
    mixed = latent @ random.standard_normal((causes, 63)) / math.sqrt(causes)
    mixed += 0.3 * random.standard_t(8, (n, 63))
    mixed[:, 21:42] = numpy.exp(0.4 * mixed[:, 21:42])
    mixed[:, 53:] = mixed[:, :10] + 0.03 * random.standard_normal((n, 10))
    return _standardised(mixed)


def digits() -> Tensor:
    """scikit-learn's digits resized from 8×8 to 28×28, D = 784, as dequantised 8-bit pixels in [0, 1]."""
    small = torch.from_numpy(load_digits().images).float()[:, None] / 16
    levels = interpolate(small, size=(28, 28), mode="bilinear").flatten(1).mul(255).round()
    return (levels + torch.rand(levels.shape, generator=torch.Generator().manual_seed(0))) / 256


def capsules() -> Tensor:
    """Synthetic capsule images of 64×64 pixels, D = 12,288, scaled to [0, 1] as ``fastmaf capsule train`` does."""
    with tempfile.TemporaryDirectory() as folder:
        draw_dataset(folder, train=320, good=0, defects={}, size=64, progress=False)
        return to_unit(load_train(folder, size=64, progress=False).pixels)


def _standardised(x: numpy.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy((x - x.mean(0)) / x.std(0)).float()


DATA = {
    "moons": DataSet(moons, hidden=64, batch=128, lr=1e-3, steps=300),
    "power": DataSet(power, hidden=64, batch=128, lr=1e-3, steps=300),
    "miniboone": DataSet(miniboone, hidden=128, batch=128, lr=1e-3, steps=200),
    "digits": DataSet(digits, hidden=128, batch=32, lr=1e-3, steps=150),
    "capsules": DataSet(capsules, hidden=512, batch=8, lr=2e-5, steps=150, models=MODELS[:2]),
}


def build(name: str, size: Size, seed: int) -> tuple[nn.Module, LogProb]:
    """Returns a library's flow with that library's defaults, and its log-density."""
    if name in LIBRARIES and name != "fastmaf":
        library: Any = library_class(LIBRARIES[name])(size, seed)
        return library.model, library.density
    torch.manual_seed(seed)
    options: dict[str, Any] = {} if name == "fastmaf" else {"log_scale_bound": 5.0, "soft_bound": False}
    flow = fastmaf.MAF(size.features, size.blocks, size.hidden, validate_args=False, **options)
    return flow, flow.log_prob


class Run(NamedTuple):
    """The outcome of a run: held-out NLL in nats, and the rise of the training loss in nats per dimension."""

    nll: float
    rise: float
    diverged: bool


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows to train on, and one in four that is held out."""
    return torch.cat([x[k::4] for k in (1, 2, 3)]), x[::4]


def train(name: str, data: DataSet, x: Tensor, seed: int, steps: int) -> Run:
    """Trains one model and scores the held-out rows."""
    rows, held_out = split(x)
    module, log_prob = build(name, Size(x.shape[1], (data.hidden, data.hidden), BLOCKS), seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=data.lr, fused=True)
    untrained, losses = _nll(log_prob, held_out), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -log_prob(rows[torch.randint(len(rows), (data.batch,))]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            return Run(math.inf, math.inf, diverged=True)
    nll = _nll(log_prob, held_out)
    means = [statistics.fmean(losses[i : i + WINDOW]) for i in range(0, steps, WINDOW)]
    rise = max(mean - min(means[: i + 1]) for i, mean in enumerate(means)) / x.shape[1]
    return Run(nll, rise, diverged=rise > JUMP or not nll < untrained)


@torch.no_grad()
def _nll(log_prob: LogProb, x: Tensor) -> float:
    return -float(torch.cat([log_prob(part).double() for part in x.split(500)]).mean())


def gaussian_nll(x: Tensor) -> float:
    """Returns the held-out NLL in nats of a diagonal Gaussian fitted to the training rows."""
    rows, held_out = split(x.double())
    return -float(torch.distributions.Normal(rows.mean(0), rows.std(0)).log_prob(held_out).sum(1).mean())


DATA_COLUMNS = ("data", "features", "steps", "batch", "lr")
RUN_COLUMNS = ("model", "runs", "diverged", "mean_nll", "worst_nll", "worst_rise")


def rows_of(key: str, models: Sequence[str], seeds: int, steps: int | None) -> Iterator[tuple[object, ...]]:
    """Yields the rows of one data set as they are measured."""
    data = DATA[key]
    x, steps = data.draw(), steps or data.steps
    about = (key, x.shape[1], steps, data.batch, data.lr)
    yield (*about, "diagonal Gaussian", "", "", f"{gaussian_nll(x):.4g}", "", "")
    for name in models:
        if name in data.models:
            nlls, rises, diverged = zip(*(train(name, data, x, seed, steps) for seed in range(seeds)), strict=True)
            mean, worst, rise = f"{statistics.fmean(nlls):.5g}", f"{max(nlls):.5g}", f"{max(rises):.3f}"
            yield (*about, name, seeds, sum(diverged), mean, worst, rise)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="data sets")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="models, one row each")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each model")
    parser.add_argument("--steps", type=int, help="steps of each run, where not those of the data set")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    options = parser.parse_args(arguments)
    rows: list[tuple[object, ...]] = [(*DATA_COLUMNS, *RUN_COLUMNS)]
    print(f"| {' | '.join(map(str, rows[0]))} |\n|{' --- |' * len(rows[0])}")
    for key in options.data:
        for row in rows_of(key, options.models, options.seeds, options.steps):
            rows.append(row)
            print(f"| {' | '.join(map(str, row))} |", flush=True)
    if options.out:
        with open(options.out, "w", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
