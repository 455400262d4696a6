"""Simple baselines, fitted to the same good images, that every score is compared with."""

from __future__ import annotations

import math
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmaf.images.dataset import to_unit
from fastmaf.inspection.out_of_fold import drop_fold, k_fold
from fastmaf.inspection.recipe import QUANTISATION
from fastmaf.inspection.scoring.score import TermStatistics, score_maps
from fastmaf.inspection.scoring.settings import ScoreSettings

_STANDARDISED = ScoreSettings("map maximum", "whitened", sigma=2.0)
_FOLDS = 5


class Baseline:
    """A simple score. ``name`` identifies it in tables."""

    name: str

    def fit(self, pixels: Tensor) -> Baseline:
        """Fits to good images, uint8 ``[n, 3, s, s]``, n >= 2, and returns itself."""
        x = to_unit(pixels).double()
        if len(x) < 2:
            raise ValueError(f"pixels: a baseline is fitted to at least 2 good images; found {len(x)}")
        self.size = pixels.shape[-1]
        self._fit(x)
        return self

    def score(self, pixels: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns anomaly scores, float64 ``[n]``, and anomaly maps, float32 ``[n, s, s]``, or None without maps."""
        x = to_unit(pixels).double()
        if pixels.shape[-1] != self.size:
            found = f"found {pixels.shape[-1]}"
            raise ValueError(f"pixels: expected images of {self.size} pixels a side, as fitted; {found}")
        scores, maps = self._scores_and_maps(x)
        return scores.numpy(), maps.float().numpy()

    def _fit(self, x: Tensor) -> None:
        """Fits to float64 ``[n, D]`` on [0, 1]."""

    def _scores_and_maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class PixelGaussian(Baseline):
    """An independent Gaussian for each of an image's dimensions; the score is the NLL in nats, on [0, 1] data.

    No variance is below that of rounding to 8 bits. The map is the NLL's terms, summed over colours.
    """

    name = "per-pixel Gaussian"

    def _fit(self, x: Tensor) -> None:
        self.mean, self.variance = x.mean(dim=0), x.var(dim=0, correction=0).clamp_min(QUANTISATION)

    def _scores_and_maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _sums(0.5 * ((x - self.mean).square() / self.variance + (2 * math.pi * self.variance).log()))


class PCAResidual(Baseline):
    """The squared norm of an image's residual after the principal components of good images, on [0, 1] data.

    The map is the squared residual, summed over colours. If standardised, each dimension's squared residual is
    standardised by its mean and standard deviation over held-out good images (5 folds), clipped at ±10, summed over
    colours and smoothed by 2 pixels, and the score is the maximum of this map.

    Args:
        components: number of components; fewer if there are fewer good images.
        standardised: see above.
    """

    def __init__(self, components: int = 100, *, standardised: bool = False) -> None:
        if components < 1:
            raise ValueError(f"components must be at least 1; found {components}")
        self.components, self.standardised = components, standardised
        self.name = "PCA standardised map" if standardised else f"PCA residual ({components})"

    def _fit(self, x: Tensor) -> None:
        self.mean, self.basis = _principal(x, self.components)
        if self.standardised:
            held_out = torch.empty_like(x)
            for fold in k_fold(len(x), min(_FOLDS, len(x)), 0):
                held_out[fold] = _residual(x[fold], *_principal(drop_fold(x, fold), self.components))
            self.statistics = TermStatistics.of(held_out, held_out.sum(dim=1))

    def _scores_and_maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        terms = _residual(x, self.mean, self.basis)
        if not self.standardised:
            return _sums(terms)
        maps = score_maps(terms, self.statistics, _STANDARDISED)
        return maps.flatten(1).amax(dim=1), maps


class PNGSize(Baseline):
    """The size in bytes of an image as a PNG at Pillow's highest compression; it has no maps and learns nothing."""

    name = "PNG size"

    def score(self, pixels: Tensor) -> tuple[np.ndarray, None]:
        sizes = []
        for image in pixels.permute(0, 2, 3, 1).numpy():
            file = BytesIO()
            Image.fromarray(image).save(file, format="PNG", compress_level=9)
            sizes.append(float(file.tell()))
        return np.array(sizes), None


def all_baselines() -> list[Baseline]:
    """Returns one of each, not fitted."""
    return [PixelGaussian(), PCAResidual(), PCAResidual(standardised=True), PNGSize()]


def _sums(terms: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sums of terms ``[n, 3 s²]`` over each image, and over the colours of each pixel."""
    size = math.isqrt(terms.shape[1] // 3)
    return terms.sum(dim=1), terms.unflatten(1, (3, size, size)).sum(dim=1)


def _principal(x: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Returns mean [D] and components [r, D] of samples [n, D], fewer than requested if x has a lower rank."""
    from sklearn.decomposition import PCA  # slow to import

    with np.errstate(invalid="ignore"):  # the explained variance of a single sample is 0 / 0
        pca = PCA(svd_solver="full").fit(x.numpy())
    deviation = pca.singular_values_
    # Beyond the rank the components are arbitrary: what they explain of a new image would be chance.
    rank = int((deviation > max(x.shape) * np.finfo(np.float64).eps * deviation[0]).sum())
    return torch.from_numpy(pca.mean_), torch.from_numpy(pca.components_[: min(components, rank)])


def _residual(x: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """Returns the squared residual [n, D]."""
    centred = x - mean
    return (centred - centred @ basis.T @ basis).square()
