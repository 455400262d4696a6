"""Simple models as flows, whose score a fit takes if it finds synthetic defects better than that of the whitening."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import to_unit
from fastmaf.inspection.out_of_fold import OutOfFoldModels, drop_fold, joined_folds
from fastmaf.inspection.recipe import QUANTISATION
from fastmaf.inspection.scoring.settings import ScoreSettings
from fastmaf.inspection.selection.ranking import DrawnSets, ScoreCandidate, rank_scores

_COMPONENTS = 100
_UNLIMITED = 1e12  # variance along a component: what it explains does not count


def pixel_gaussian(x: Tensor) -> fastmaf.Flow:
    """Returns an independent Gaussian for each value of images ``[n, D]``, with at least the noise of 8 bits."""
    whitening = fastmaf.GaussianWhitening(x.shape[1], 0)
    variance = x.double().var(dim=0, correction=0).clamp_min(QUANTISATION)
    whitening.mean.copy_(x.double().mean(dim=0))
    whitening.scale.copy_(variance.sqrt())
    return fastmaf.Flow(x.shape[1], [whitening]).eval()


def pca_residual(x: Tensor) -> fastmaf.Flow:
    """Returns a flow whose z is the residual of images ``[n, D]`` after 100 principal components, in levels of 8 bits.

    Its NLL is half of the squared norm of z, plus a constant. Components are taken from the Gram matrix of the images,
    which squares their standard deviations: those of less than 1e-6 of the largest are omitted.
    """
    mean = x.mean(dim=0, dtype=torch.float64)
    centred = x - mean
    energy, vectors = (values.flip(-1) for values in torch.linalg.eigh(centred @ centred.T))
    used = int((energy[:_COMPONENTS] > 1e-12 * energy[0].clamp_min(torch.finfo(torch.float64).tiny)).sum())
    basis = centred.T @ (vectors[:, :used] * energy[:used].rsqrt())
    whitening = fastmaf.GaussianWhitening(x.shape[1], used)
    whitening.mean.copy_(mean)
    whitening.scale.fill_(1 / 255)
    whitening.factors.copy_(basis / torch.linalg.vector_norm(basis, dim=0))
    whitening.variance.fill_(_UNLIMITED)
    return fastmaf.Flow(x.shape[1], [whitening]).eval()


BASELINES: dict[str, tuple[Callable[[Tensor], fastmaf.Flow], ScoreSettings]] = {
    "per-pixel Gaussian": (pixel_gaussian, ScoreSettings("nll", "flow")),
    f"PCA residual ({_COMPONENTS})": (pca_residual, ScoreSettings("nll", "flow")),
    "PCA standardised map": (pca_residual, ScoreSettings("map maximum", "whitened", sigma=2.0, reference="held-out")),
}
"""The flow and the score of each; the names are those of ``fastmaf.inspection.baselines``."""


@dataclass(frozen=True, eq=False)
class BaselineModel:
    """A baseline that finds synthetic defects better.

    Attributes:
        name: as in ``BASELINES``.
        flow: fitted to all images.
        models: fitted without each fold.
        score: how its images are scored.
    """

    name: str
    flow: fastmaf.Flow
    models: OutOfFoldModels
    score: ScoreSettings

    def refitted(self, pixels: Tensor, models: OutOfFoldModels) -> BaselineModel:
        """Returns the same baseline, fitted to other images, uint8 ``[n, 3, h, w]``, and without the folds of these."""
        make, x = BASELINES[self.name][0], to_unit(pixels, models.channels)
        of_folds = models.with_flows([make(drop_fold(x, fold)) for fold in models.folds])
        return BaselineModel(self.name, make(x), of_folds, self.score)


def better_baseline(
    pixels: Tensor, models: OutOfFoldModels, chosen: ScoreCandidate, margin: float, drawn_sets: DrawnSets
) -> tuple[BaselineModel | None, dict[str, float]]:
    """Returns the best baseline if it beats the chosen score, and the image AUROC of each on synthetic defects.

    For the comparison, folds are joined into at most 4.

    Args:
        pixels: the good images, uint8 ``[n, 3, h, w]``.
        models: the models of the folds.
        chosen: the score that would be used.
        margin: a baseline must be better by more than this.
        drawn_sets: the images with synthetic defects that ``chosen`` was ranked on.
    """
    x, found, folds = to_unit(pixels, models.channels), dict[str, float](), joined_folds(models.folds)
    fitted: dict[Callable[[Tensor], fastmaf.Flow], OutOfFoldModels] = {}
    for name, (make, settings) in BASELINES.items():
        if make not in fitted:
            fitted[make] = models.with_flows([make(drop_fold(x, fold)) for fold in folds], folds)
        (ranked,) = rank_scores(
            pixels, fitted[make], candidates=[settings], progress=False, errors=False, drawn_sets=drawn_sets
        )
        found[name] = ranked.image_auroc
    name = max(found, key=lambda other: found[other])
    if not found[name] > chosen.image_auroc + margin:
        return None, found
    make, settings = BASELINES[name]
    of_folds = models.with_flows([make(drop_fold(x, fold)) for fold in models.folds])
    return BaselineModel(name, make(x), of_folds, settings), found
