"""What blocks add to the whitening: the change of the held-out NLL in nats, on a folder of good images.

    python -m fastmaf.bench.dev.blocks --data FOLDER

Everything is held out twice: a fold's whitening has not seen its images, and its blocks are trained on the whitened
images of the other folds, each from a whitening that has not seen that image.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import fastmaf
from fastmaf.capsule.data import load_train, to_unit
from fastmaf.inspection.blocks import fit_blocks
from fastmaf.inspection.calibration import k_fold
from fastmaf.inspection.copies import fit_whitening
from fastmaf.inspection.cross import without
from fastmaf.inspection.recipe import Recipe

DEFAULT = Recipe(copies="shifts", blocks=2)
LOCAL: dict[str, Recipe] = {
    "1 local block, the colours of a pixel alone": replace(DEFAULT, blocks=1, patch=1, kernel=1, hidden=0),
    "1 local block, linear": replace(DEFAULT, blocks=1, hidden=0),
    "1 local block": replace(DEFAULT, blocks=1),
    "2 local blocks (the recipe)": DEFAULT,
    "2 local blocks, window of 5 patches": replace(DEFAULT, kernel=5),
    "2 local blocks, 16 hidden channels a degree": replace(DEFAULT, hidden=16),
    "4 local blocks": replace(DEFAULT, blocks=4),
}
DENSE = {
    "1 dense block, 64 units": (1, (64,), 1e-4),
    "2 dense blocks, 512, 512 units": (2, (512, 512), 1e-5),
}


def dense(z: Tensor, blocks: int, hidden: tuple[int, ...], lr: float, steps: int) -> fastmaf.Flow:
    """Trains plain MAF blocks from the identity."""
    flow = fastmaf.MAF(z.shape[1], blocks, hidden, init="identity", log_scale_bound=1.0, soft_bound=True, seed=0)
    step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters(), lr=lr))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        step(z[torch.randint(len(z), (16,), generator=generator)])
    return flow


def local(z: Tensor, recipe: Recipe) -> fastmaf.Flow:
    return fastmaf.Flow(recipe.features, fit_blocks(z, recipe))


def variants() -> Iterator[tuple[str, Callable[[Tensor], fastmaf.Flow]]]:
    for name, recipe in LOCAL.items():
        yield name, partial(local, recipe=recipe)
    for name, (blocks, hidden, lr) in DENSE.items():
        yield name, partial(dense, blocks=blocks, hidden=hidden, lr=lr, steps=DEFAULT.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with good images")
    data = parser.parse_args().data
    x = to_unit(load_train(data, size=DEFAULT.size, progress=False).pixels)
    folds = k_fold(len(x), DEFAULT.folds, DEFAULT.seed)
    z, alone = torch.empty_like(x), torch.empty(len(x), dtype=torch.float64)
    for fold in folds:
        whitening = fit_whitening(without(x, fold), DEFAULT)
        z[fold] = whitening(x[fold])[0]
        alone[fold] = -fastmaf.Flow(DEFAULT.features, [whitening]).log_prob(x[fold]).double()
    normal = fastmaf.Flow(DEFAULT.features, [])
    print(f"{len(x)} images, {DEFAULT.folds} folds; whitening alone: held-out NLL {float(alone.mean()):,.0f} nats")
    print(f"{'on top of it':<44} {'parameters':>10} {'held out':>9} {'of folds':>16} {'trained on':>10} {'seconds':>8}")
    for name, train in variants():
        gains: list[float] = []
        seen: list[float] = []
        began = time.perf_counter()
        for fold in folds:
            flow = train(without(z, fold))
            with torch.no_grad():
                for part, changes in ((z[fold], gains), (without(z, fold), seen)):
                    changes.append(float((normal.log_prob(part) - flow.log_prob(part)).double().mean()))
        count = sum(parameter.numel() for parameter in flow.parameters())
        gain, spread = sum(gains) / len(gains), f"{min(gains):+,.0f} to {max(gains):+,.0f}"
        each = (time.perf_counter() - began) / len(folds)
        print(
            f"{name:<44} {count:>10,} {gain:>+9,.0f} {spread:>16} {sum(seen) / len(seen):>+10,.0f} {each:>8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
