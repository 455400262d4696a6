"""What blocks add to the whitening: the change of the held-out NLL in nats, on a folder of good images.

    python -m fastmaf.bench.dev.blocks --data FOLDER

Everything is held out twice: a fold's whitening has not seen its images, and its blocks are trained on the whitened
images of the other folds, each from a whitening that has not seen that image.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import load_train, to_unit
from fastmaf.inspection.blocks import fit_blocks
from fastmaf.inspection.out_of_fold import drop_fold, k_fold
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.whitening import Normals, fit_whitenings

RECIPE = Recipe(augmentation="shifts", blocks=2)


def dense(z: Tensor, blocks: int, hidden: tuple[int, ...], lr: float) -> fastmaf.Flow:
    """Trains plain MAF blocks from the identity."""
    flow = fastmaf.MAF(z.shape[1], blocks, hidden, init="identity", log_scale_bound=1.0, soft_bound=True, seed=0)
    step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters(), lr=lr))
    generator = torch.Generator().manual_seed(0)
    for _ in range(RECIPE.steps):
        step(z[torch.randint(len(z), (16,), generator=generator)])
    return flow


def local(z: Tensor, **changes: int) -> fastmaf.Flow:
    """Trains the recipe's local blocks, with some of its numbers changed."""
    recipe = replace(RECIPE, **changes)  # type: ignore[arg-type]
    return fastmaf.Flow(recipe.features, fit_blocks(z, recipe))


VARIANTS: dict[str, Callable[[Tensor], fastmaf.Flow]] = {
    "1 local block, the colours of a pixel alone": partial(local, blocks=1, patch=1, kernel=1, hidden=0),
    "1 local block, linear": partial(local, blocks=1, hidden=0),
    "1 local block": partial(local, blocks=1),
    "2 local blocks (the recipe)": local,
    "2 local blocks, window of 5 patches": partial(local, kernel=5),
    "2 local blocks, 16 hidden channels a degree": partial(local, hidden=16),
    "4 local blocks": partial(local, blocks=4),
    "1 dense block, 64 units": partial(dense, blocks=1, hidden=(64,), lr=1e-4),
    "2 dense blocks, 512, 512 units": partial(dense, blocks=2, hidden=(512, 512), lr=1e-5),
}


@torch.no_grad()
def change(blocks: fastmaf.Flow, z: Tensor) -> float:
    """Returns the mean NLL of whitened images with the blocks, minus that without them."""
    normal = fastmaf.Flow(RECIPE.features, [])
    return float((normal.log_prob(z) - blocks.log_prob(z)).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with good images")
    images = load_train(parser.parse_args().data, size=RECIPE.size, double=True, progress=False)
    x = to_unit(images.pixels)
    folds = k_fold(len(x), RECIPE.folds, RECIPE.seed)
    z, alone = torch.empty_like(x), torch.empty(len(x), dtype=torch.float64)
    whitenings = fit_whitenings(Normals(x, images.double), folds, RECIPE).folds
    for fold, whitening in zip(folds, whitenings, strict=True):
        z[fold] = whitening(x[fold])[0]
        alone[fold] = -fastmaf.Flow(RECIPE.features, [whitening]).log_prob(x[fold]).double()
    print(f"{len(x)} images, {RECIPE.folds} folds; whitening alone: held-out NLL {float(alone.mean()):,.0f} nats")
    print(f"{'with blocks':<44} {'parameters':>10} {'held out':>9} {'of folds':>16} {'trained on':>10} {'seconds':>8}")
    for name, train in VARIANTS.items():
        start = time.perf_counter()
        flows = [train(drop_fold(z, fold)) for fold in folds]
        seconds = (time.perf_counter() - start) / len(folds)
        held_out = [change(flow, z[fold]) for flow, fold in zip(flows, folds, strict=True)]
        trained_on = [change(flow, drop_fold(z, fold)) for flow, fold in zip(flows, folds, strict=True)]
        count = sum(parameter.numel() for parameter in flows[0].parameters())
        spread = f"{min(held_out):+,.0f} to {max(held_out):+,.0f}"
        means = f"{statistics.mean(held_out):>+9,.0f} {spread:>16} {statistics.mean(trained_on):>+10,.0f}"
        print(f"{name:<44} {count:>10,} {means} {seconds:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
