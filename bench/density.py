"""Trains masked autoregressive flows of several libraries with equal settings, and compares their held-out densities.

    python -m fastmaf.bench.density [--data moons digits] [--models fastmaf zuko] [--seeds 5] [--out density.csv]
        [--pictures FOLDER]

The flows of a data set have the same number of blocks and hidden units, and take the same batches in the same order in
the same number of steps of ``torch.optim.Adam``. Each has its library's defaults otherwise. Nothing is selected with
the held-out rows. Models take turns within each seed, so that their times can be compared; samples of the first seed
are timed. ``--pictures`` draws samples of the first seed side by side.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import matplotlib.pyplot as plt
import numpy
import torch
from nflows.flows.autoregressive import MaskedAutoregressiveFlow
from torch import Tensor, nn

import fastmaf
from fastmaf.bench import stability
from fastmaf.bench.libraries import LIBRARIES, Size, library_class
from fastmaf.bench.machine import describe

Row: TypeAlias = list[object]
Samples: TypeAlias = dict[str, Tensor]  # by model
SAMPLES = 36  # drawn for the time
SHOWN = 2000  # points of a scatter plot
GRID = 6  # images on a side of a sheet


class DataSet(NamedTuple):
    """A data set, the sizes of the flows, and how they are trained."""

    draw: Callable[[], Tensor]
    blocks: int
    hidden: int
    batch: int
    steps: int
    lr: float = 1e-3


class Model(NamedTuple):
    """An untrained flow: what has parameters, its log-density, and how samples are drawn."""

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]


def moons() -> Tensor:
    """Two moons, D = 2, standardised."""
    x = stability.moons()
    return (x - x.mean(0)) / x.std(0)


def tabular() -> Tensor:
    """D = 43: eight latent causes of two classes, heavy-tailed noise, some columns skewed; standardised."""
    random = numpy.random.default_rng(1)
    rows, causes, columns = 8000, 8, 43
    latent = random.standard_normal((rows, causes)) + 1.5 * (random.random((rows, 1)) < 0.28)
    x = latent @ random.standard_normal((causes, columns)) / math.sqrt(causes)
    x += 0.3 * random.standard_t(8, x.shape)
    x[:, 14:28] = numpy.exp(0.4 * x[:, 14:28])
    return torch.from_numpy((x - x.mean(0)) / x.std(0)).float()


DATA = {
    "moons": DataSet(moons, blocks=5, hidden=64, batch=128, steps=600),
    "power": DataSet(stability.power, blocks=5, hidden=64, batch=128, steps=600),
    "tabular": DataSet(tabular, blocks=5, hidden=128, batch=128, steps=400),
    "digits": DataSet(stability.digits, blocks=5, hidden=128, batch=64, steps=120),
}


FASTMAF: dict[str, dict[str, Any]] = {
    "fastmaf": {},
    "fastmaf, mirrored": {"init": "mirrored"},
    "fastmaf, residual": {"residual": True},  # one block, of two layers more, as "nflows, residual" has
}


def residual_nflows(size: Size) -> nn.Module:
    """Returns nflows' flow with its default, residual blocks: one of two layers."""
    return MaskedAutoregressiveFlow(size.features, size.one_width("nflows"), size.blocks, len(size.hidden) - 1)


def build(name: str, size: Size, seed: int) -> Model:
    """Returns a library's flow with that library's defaults."""
    torch.manual_seed(seed)
    if name in FASTMAF:
        options = FASTMAF[name]
        hidden = size.hidden[:1] * 3 if "residual" in options else size.hidden
        flow = fastmaf.MAF(size.features, size.blocks, hidden, validate_args=False, **options)
        return Model(flow, flow.log_prob, flow.sample)
    if name == "nflows, residual":
        module: Any = residual_nflows(size)
        return Model(module, module.log_prob, module.sample)
    library: Any = library_class(LIBRARIES[name])(size, seed)
    return Model(library.model, library.density, library.sample)


MODELS = (*FASTMAF, "zuko", "nflows", "nflows, residual")


class Run(NamedTuple):
    """The result of a run: held-out NLL in nats, and the seconds of the training."""

    nll: float
    seconds: float


def train(model: Model, data: DataSet, x: Tensor, seed: int, steps: int) -> Run:
    """Trains a flow on three rows of four and scores the others."""
    rows, held_out = stability.split(x)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.module.parameters(), lr=data.lr, fused=True)
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -model.log_prob(rows[torch.randint(len(rows), (data.batch,), generator=order)]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        nll = -torch.cat([model.log_prob(part).double() for part in held_out.split(500)]).mean()
    return Run(float(nll), seconds)


COLUMNS = ("data", "features", "blocks", "hidden", "steps", "batch", "lr", "model", "seeds", "mean_nll", "std_nll",
           "min_nll", "max_nll", "training_time", "sampling_time", "about")  # fmt: skip


def measured(key: str, models: Sequence[str], seeds: int, steps: int | None) -> Iterator[tuple[list[Row], Samples]]:
    """Yields, after each seed, a row for each model and samples of the first seed.

    Times are multiples of those of the first model.
    """
    data = DATA[key]
    x, steps = data.draw(), steps or data.steps
    size = Size(x.shape[1], (data.hidden, data.hidden), data.blocks)
    runs: dict[str, list[Run]] = {name: [] for name in models}
    sampling: dict[str, float] = {}
    samples = {"data": stability.split(x)[1][:SHOWN]}
    for seed in range(seeds):
        for name in models:
            model = build(name, size, seed)
            runs[name].append(train(model, data, x, seed, steps))
            if seed == 0:
                sampling[name], samples[name] = _sample(model, SHOWN if size.features == 2 else 0)
        about = (key, size.features, data.blocks, data.hidden, steps, data.batch, data.lr)
        yield [[*about, name, *_numbers(runs, sampling, name, models[0])] for name in models], samples


@torch.no_grad()
def _sample(model: Model, shown: int) -> tuple[float, Tensor]:
    model.sample(1)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        drawn = model.sample(SAMPLES)
        times.append(time.perf_counter() - start)
    return min(times), model.sample(shown) if shown else drawn


def _numbers(runs: dict[str, list[Run]], sampling: dict[str, float], name: str, first: str) -> tuple[object, ...]:
    nlls = [run.nll for run in runs[name]]
    spread = f"{statistics.stdev(nlls):.2g}" if len(nlls) > 1 else ""
    ratio = statistics.median(run.seconds / other.seconds for run, other in zip(runs[name], runs[first], strict=True))
    found = f"{statistics.fmean(nlls):.6g}", spread, f"{min(nlls):.6g}", f"{max(nlls):.6g}"
    return len(nlls), *found, f"{ratio:.3g}", f"{sampling[name] / sampling[first]:.3g}"


def draw(key: str, samples: dict[str, Tensor], folder: Path) -> None:
    """Writes a picture of the samples of each model beside the data."""
    if key not in ("moons", "digits"):
        return
    figure, axes = plt.subplots(1, len(samples), figsize=(2.4 * len(samples), 2.7), layout="constrained")
    for axis, (name, x) in zip(axes, samples.items(), strict=True):
        if key == "moons":
            axis.plot(*x.T.numpy(), ".", markersize=1, color="#D55E00" if name in FASTMAF else "#444444")
            axis.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
        else:
            images = x[: GRID**2].clamp(0, 1).reshape(GRID, GRID, 28, 28)
            axis.imshow(images.permute(0, 2, 1, 3).reshape(28 * GRID, 28 * GRID), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_title(name, fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"density-{key}.png", dpi=72)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="data sets")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="times are those of the first"
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each model")
    parser.add_argument("--steps", type=int, help="steps of each run, where not those of the data set")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--pictures", type=Path, help="folder for pictures of samples")
    options = parser.parse_args(arguments)
    about = "; ".join(f"{name} {value}" for name, value in describe().items())
    finished: list[Row] = []
    for key in options.data:
        rows: list[Row] = []
        samples: Samples = {}
        for rows, samples in measured(key, options.models, options.seeds, options.steps):
            if options.out:  # after each seed: a run that is stopped leaves what it has measured
                with open(options.out, "w", newline="") as stream:
                    csv.writer(stream, lineterminator="\n").writerows(
                        [COLUMNS, *finished, *[[*row, about] for row in rows]]
                    )
            if options.pictures and rows[0][COLUMNS.index("seeds")] == 1:
                draw(key, samples, options.pictures)
        for row in rows:
            finished.append([*row, about])
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
