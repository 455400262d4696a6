"""What any score has to beat: controls that are fitted to the same normals and published beside it."""

from __future__ import annotations

import math
from io import BytesIO
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmaf.images.dataset import to_unit
from fastmaf.inspection.calibration import k_fold
from fastmaf.inspection.recipe import QUANTISATION
from fastmaf.inspection.scores import ScoreSettings, TermStatistics, maps_of

_STANDARDISED = ScoreSettings("map maximum", sigma=2.0, clip=10.0)
_FOLDS = 5


class Control(Protocol):
    """A score that is cheap to come by. ``name`` stands in tables."""

    name: str

    def fit(self, pixels: Tensor) -> Control:
        """Fits to normal images, uint8 [n, 3, s, s], n >= 2, and returns itself."""
        ...

    def score(self, pixels: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns anomaly scores, float64 [n], and maps, float32 [n, s, s], if it has any, of images as in ``fit``."""
        ...


def controls() -> list[Control]:
    """Returns one of each, not fitted."""
    return [PixelGaussian(), PCAResidual(), PCAResidual(standardised=True), PNGSize()]


class PixelGaussian:
    """An independent Gaussian for each of an image's dimensions; the score is the NLL in nats, on [0, 1] data.

    No variance is below that of rounding to 8 bits. The map is the NLL's terms, summed over colours.
    """

    name = "per-pixel Gaussian"

    def fit(self, pixels: Tensor) -> PixelGaussian:
        """See ``Control``."""
        x = _normals(pixels)
        self.mean, self.variance = x.mean(dim=0), x.var(dim=0, correction=0).clamp_min(QUANTISATION)
        return self

    def score(self, pixels: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """See ``Control``."""
        x = _images(pixels, len(self.mean))
        terms = 0.5 * ((x - self.mean).square() / self.variance + (2 * math.pi * self.variance).log())
        return terms.sum(dim=1).numpy(), _over_colours(terms)


class PCAResidual:
    """What the principal components of the normals leave of an image, as a squared norm, on [0, 1] data.

    The map is the squared residual, summed over colours. Where it is standardised, each dimension's squared residual is
    taken in deviations from its mean over normals whose fold did not find the components, clipped at ±10, summed over
    colours and smoothed by 2 pixels, and the score is the map's maximum.

    Args:
        components: how many; fewer where there are fewer normals.
        standardised: see above.
    """

    def __init__(self, components: int = 100, *, standardised: bool = False) -> None:
        if components < 1:
            raise ValueError(f"components must be at least 1; found {components}")
        self.components, self.standardised = components, standardised
        self.name = "PCA standardised map" if standardised else f"PCA residual ({components})"

    def fit(self, pixels: Tensor) -> PCAResidual:
        """See ``Control``."""
        x = _normals(pixels)
        self.mean, self.basis = _principal(x, self.components)
        if self.standardised:
            held_out = torch.empty_like(x)
            for fold in k_fold(len(x), min(_FOLDS, len(x)), 0):
                others = torch.ones(len(x), dtype=torch.bool)
                others[fold] = False
                held_out[fold] = _residual(x[fold], *_principal(x[others], self.components))
            self.statistics = TermStatistics.of(held_out, held_out.sum(dim=1))
        return self

    def score(self, pixels: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """See ``Control``."""
        terms = _residual(_images(pixels, len(self.mean)), self.mean, self.basis)
        if not self.standardised:
            return terms.sum(dim=1).numpy(), _over_colours(terms)
        maps = maps_of(terms, self.statistics, _STANDARDISED, pixels.shape[-1])
        return maps.flatten(1).amax(dim=1).numpy(), maps.float().numpy()


class PNGSize:
    """How many bytes an image takes as a PNG, compressed as far as Pillow does; it has no map and learns nothing."""

    name = "PNG size"

    def fit(self, pixels: Tensor) -> PNGSize:
        """See ``Control``."""
        _normals(pixels)
        return self

    def score(self, pixels: Tensor) -> tuple[np.ndarray, None]:
        """See ``Control``."""
        sizes = []
        for image in pixels.permute(0, 2, 3, 1).numpy():
            file = BytesIO()
            Image.fromarray(image).save(file, format="PNG", compress_level=9)
            sizes.append(float(file.tell()))
        return np.array(sizes), None


def _normals(pixels: Tensor) -> Tensor:
    x = to_unit(pixels).double()
    if len(x) < 2:
        raise ValueError(f"pixels: a control is fitted to at least 2 normal images; found {len(x)}")
    return x


def _images(pixels: Tensor, features: int) -> Tensor:
    x = to_unit(pixels).double()
    if x.shape[1] != features:
        size = math.isqrt(features // 3)
        raise ValueError(f"pixels: expected images of {size} pixels a side, as fitted; found {pixels.shape[-1]}")
    return x


def _over_colours(terms: Tensor) -> np.ndarray:
    size = math.isqrt(terms.shape[1] // 3)
    return terms.unflatten(1, (3, size, size)).sum(dim=1).float().numpy()


def _principal(x: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Returns mean [D] and components [r, D] of samples [n, D], fewer than asked for where x has a lower rank."""
    mean = x.mean(dim=0)
    axes, triangle = torch.linalg.qr((x - mean).T)  # leaves an n x n problem: an eighth of the time at 219 x 12,288
    left, deviation, _ = torch.linalg.svd(triangle, full_matrices=False)
    # Beyond the rank the vectors are arbitrary: whatever they explained of a new image would be chance.
    rank = int((deviation > max(x.shape) * torch.finfo(x.dtype).eps * deviation[0]).sum())
    return mean, (axes @ left[:, : min(components, rank)]).T


def _residual(x: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """Returns the squared residual [n, D]."""
    centred = x - mean
    return (centred - centred @ basis.T @ basis).square()
