"""Fitting a texture model to good images, with the models of the folds behind its statistics and its calibration.

The filters are shared by the folds: they are the principal components of patches of 5 x 5 pixels of all images, to
which one image adds next to nothing. Whitenings and blocks are fitted without each fold, on features of random
locations. Blocks are kept on a level if the features of the images that the first fold held out are more likely with
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import is_grey
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.interface import HeldOut
from fastmaf.inspection.model import Shapes
from fastmaf.inspection.scoring.float64_flow import rounded
from fastmaf.inspection.texture.candidate import (
    Flows,
    TextureCandidate,
    finished,
    fold_of_each,
    held_out_nlls,
    held_out_parts,
)
from fastmaf.inspection.texture.density import fit_blocks, fit_whitening, nll, without_blocks
from fastmaf.inspection.texture.features import LEVELS, LONGEST, TextureFilters, to_texture
from fastmaf.inspection.texture.light import CONTEXT
from fastmaf.inspection.texture.model import TextureModel, map_size_for
from fastmaf.inspection.texture.position import PositionSums
from fastmaf.inspection.texture.scoring import image_scores, part_statistics

STAGES = 2
"""Calls of ``done`` besides one for each fold."""

_ROWS = 400_000  # features of a level that the densities are fitted to
_OF_IMAGE = 1500  # of one image, at most
_LEAST_IMAGES = 2  # that a level is fitted to


@fastmaf.torch_defaults()
def fit_texture(
    pixels: Tensor,
    folds: Sequence[np.ndarray],
    *,
    shapes: Shapes | None = None,
    false_alarm: float = 0.05,
    seed: int = 0,
    done: Callable[[], object] = lambda: None,
) -> TextureCandidate:
    """Fits a texture model to good images.

    Args:
        pixels: uint8 ``[n, 3, s, s]``.
        folds: indices of the images of each fold.
        shapes: (height, width) of each image before it became square; None: all were square.
        false_alarm: the rate that the model is calibrated at.
        seed: of random locations and blocks.
        done: called after each of the ``len(folds) + STAGES`` stages.
    """
    size, channels = int(pixels.shape[-1]), 1 if is_grey(pixels) else 3
    longest, map_size = max(size, LONGEST), map_size_for(size)
    textures = _Textures(pixels, shapes, channels, longest)
    filters = TextureFilters.fit(textures, seed=seed)
    rows, contexts, owner = _sampled(filters, textures, seed)
    done()
    fold_of = fold_of_each(folds, len(pixels))
    levels = usable_levels([of_level.numpy() for of_level in owner], fold_of)
    # The first fold that holds an image of a level out decides on its blocks.
    decisive = [int(fold_of[owner[level].numpy()].min()) for level in range(levels)]
    kept, figures = [True] * levels, dict[str, Any]()
    flows: list[Flows] = []
    for k in range(len(folds)):
        of_fold = []
        for level in range(levels):
            held = torch.from_numpy(fold_of[owner[level].numpy()] == k)
            flow = _fit(rows[level][~held], contexts[level][~held], seed, blocks=kept[level])
            if k == decisive[level]:
                plain = without_blocks(flow.transforms[0])  # type: ignore[arg-type]
                values = [
                    float(nll(f, rows[level][held], contexts[level][held]).double().mean()) for f in (plain, flow)
                ]
                kept[level] = values[1] < values[0]  # False for NaN
                figures[f"level {level}"] = {"held_out_nll_of_whitening": values[0], "held_out_nll": values[1]}
                flow = flow if kept[level] else plain
            of_fold.append(flow)
        flows.append(tuple(of_fold))
        done()
    for level in range(levels):  # of the folds before the decision
        if not kept[level]:
            flows = [_plain_at(of_fold, level) for of_fold in flows]
    whole = tuple(_fit(rows[level], contexts[level], seed, blocks=kept[level]) for level in range(levels))
    nlls = held_out_nlls(filters, folds, flows, pixels, shapes, longest)
    total = sum(float(values.double().mean()) for of_image in nlls for values in of_image)
    sums = [
        [PositionSums.of(nlls[i][level] for i in fold if level < len(nlls[i])) for level in range(levels)]
        for fold in folds
    ]
    parts, anomaly_maps = held_out_parts(nlls, folds, sums, map_size, filters.border)
    mean, deviation = part_statistics(parts)
    unit = float(np.sqrt(np.square(anomaly_maps, dtype=np.float64).mean())) or 1.0
    scores = rounded(torch.from_numpy(image_scores(parts, mean, deviation))).numpy()
    anomaly_maps /= np.float32(unit)
    about = {
        "images": len(pixels),
        "images_of_folds": [len(fold) for fold in folds],
        "map_levels": [float(np.quantile(anomaly_maps, 0.99)), float(anomaly_maps.max())],
        "texture_nll": total / len(pixels),
        "texture_levels": figures,
        "texture_blocks": [f"level {level}" for level in range(levels) if kept[level]],
        "seed": seed,
    }
    calibration = Calibration(scores, false_alarm, None, "k-fold", len(folds))
    model = TextureModel(
        size, filters, whole, tuple(finished(sums)), mean, deviation, unit, calibration, about, longest
    )
    done()
    good = HeldOut(scores[None], anomaly_maps[None])
    return TextureCandidate(model, folds, flows, sums, shapes, pixels, good)


class _Textures(Sequence[Tensor]):
    """Images at their own aspect ratio, see ``to_texture``, made when they are needed, as floats take memory."""

    def __init__(self, pixels: Tensor, shapes: Shapes | None, channels: int, longest: int) -> None:
        self._pixels, self._shapes, self._how = pixels, shapes, (channels, longest)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, i: Any) -> Any:
        if i >= len(self):
            raise IndexError(i)
        return to_texture(self._pixels[i], None if self._shapes is None else self._shapes[i], *self._how)


def usable_levels(owner: Sequence[np.ndarray], fold_of: np.ndarray) -> int:
    """Returns the number of levels, from the first on, that are fitted; a level that few images are large enough for
    has no density.

    At least half of the images have it, and without any of the folds at least two. The first level is always used.

    Args:
        owner: for each level, the image that each of its features belongs to.
        fold_of: the fold of each image.
    """
    usable = 1
    for of_level in owner[1:]:
        images = np.unique(of_level)
        outside = len(images) - np.bincount(fold_of[images], minlength=1)
        if 2 * len(images) < len(fold_of) or outside.min() < _LEAST_IMAGES:
            break
        usable += 1
    return usable


def _plain_at(flows: Flows, level: int) -> Flows:
    """Returns the densities with that of one level as a Gaussian."""
    plain = without_blocks(flows[level].transforms[0])  # type: ignore[arg-type]
    return (*flows[:level], plain, *flows[level + 1 :])


def _fit(rows: Tensor, contexts: Tensor, seed: int, *, blocks: bool) -> fastmaf.Flow:
    whitening = fit_whitening(rows, seed)
    return fit_blocks(rows, contexts, whitening, seed) if blocks else without_blocks(whitening)


def _sampled(
    filters: TextureFilters, images: Sequence[Tensor], seed: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Returns features and contexts of random locations of each level, and the image that each belongs to."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(LEVELS)]
    of_image = max(1, min(_OF_IMAGE, _ROWS // len(images)))
    for i, image in enumerate(images):
        for level, (features, context) in enumerate(filters(image)):
            assert context is not None  # None in files of earlier versions only
            index = torch.randperm(len(context), generator=generator)[:of_image]
            found[level].append((features.flatten(1)[:, index].T, context[index], torch.full((len(index),), i)))
    none = torch.empty(0, filters.features), torch.empty(0, CONTEXT), torch.empty(0, dtype=torch.long)
    rows, contexts, owner = (
        [torch.cat([none[k], *(part[k] for part in of_level)]) for of_level in found] for k in range(3)
    )
    return rows, contexts, owner
