"""Simple baselines, fitted to the same normal images, that every score is compared with."""

from fastmaf.inspection.baselines.base import Baseline
from fastmaf.inspection.baselines.pca import PCAResidual
from fastmaf.inspection.baselines.pixel_gaussian import PixelGaussian
from fastmaf.inspection.baselines.png_size import PNGSize

__all__ = ["Baseline", "PCAResidual", "PNGSize", "PixelGaussian", "all_baselines"]


def all_baselines() -> list[Baseline]:
    """Returns one of each, not fitted."""
    return [PixelGaussian(), PCAResidual(), PCAResidual(standardised=True), PNGSize()]
