"""Fitting a model to each tile of good images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import is_grey
from fastmaf.images.progress import track
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.exchangeability import describe_groups
from fastmaf.inspection.fit import FALSE_ALARM, fit
from fastmaf.inspection.out_of_fold import drop_fold
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.tiled import TiledModel
from fastmaf.inspection.tiles import stitched, stride_of, tile_of


@fastmaf.torch_defaults()
def fit_tiles(
    pixels: Tensor,
    recipe: Recipe,
    tiles: int,
    *,
    double: Tensor | None = None,
    groups: Sequence[str] | None = None,
    progress: bool = True,
) -> tuple[TiledModel, np.ndarray]:
    """Fits a model to each tile of good images; returns their ``TiledModel`` and the held-out score of each image.

    The folds of all tiles hold out the same images, so that the score of an image comes from models of its tiles none
    of which has seen it.

    Args:
        pixels: uint8 ``[n, 3, s, s]`` with s = ``tiled_size(recipe.side, tiles)``.
        recipe: the settings of each tile's model.
        tiles: number of tiles along each side.
        double, groups, progress: as of ``fastmaf.inspection.fit.fit``.

    Warns:
        UserWarning: what ``fit`` warns of, once for all tiles.
    """
    # Of all tiles together: a grey tile of colour images may have a coloured defect.
    channels = recipe.channels if recipe.channels != "auto" else 1 if is_grey(pixels) else 3
    recipe = replace(recipe, channels=channels)
    size, parts, scores, maps = recipe.side, [], [], []
    noted: list[str] = []
    for i in track(range(tiles**2), "fitting", "tile", show=progress):
        crop = None if double is None else tile_of(double, i, 2 * size, 2 * stride_of(size))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted = fit(tile_of(pixels, i, size), recipe, double=crop, groups=groups, progress=False)
        noted += [str(warning.message) for warning in caught]
        parts.append(fitted.model)
        scores.append(fitted.held_out.scores[0])
        maps.append(fitted.held_out.maps[0])
    if noted:
        warnings.warn(f"{noted[0]} (the first of {len(noted)} warnings of {tiles**2} tiles)", stacklevel=4)
    of_tiles, held_out = np.stack(scores), np.empty(len(pixels))
    for fold in fitted.out_of_fold.folds:
        mean, deviation = _standard(np.asarray(drop_fold(torch.from_numpy(of_tiles.T), fold)).T)
        held_out[fold] = ((of_tiles[:, fold] - mean[:, None]) / deviation[:, None]).max(axis=0)
    calibration = Calibration(held_out, FALSE_ALARM, None, "k-fold", len(fitted.out_of_fold.folds))
    whole = stitched(maps)
    about = {
        "images": len(pixels),
        "tile_recipe": parts[0].about["recipe"],
        "asked": parts[0].about["asked"],
        "map_levels": [float(np.quantile(whole, 0.99)), float(whole.max())],
    }
    if groups is not None:
        about["groups"] = describe_groups(groups, held_out, calibration)
    return TiledModel(tuple(parts), *_standard(of_tiles), calibration, about), held_out


def _standard(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of each row; 1 in place of a deviation of 0."""
    deviation = scores.std(axis=1)
    return scores.mean(axis=1), np.where(deviation > 0, deviation, 1.0)
