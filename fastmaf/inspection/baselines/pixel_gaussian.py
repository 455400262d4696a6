"""An independent Gaussian per pixel and colour."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from fastmaf.inspection.baselines.base import images_like_fitted, normal_images, sum_over_colours
from fastmaf.inspection.recipe import QUANTISATION


class PixelGaussian:
    """An independent Gaussian for each of an image's dimensions; the score is the NLL in nats, on [0, 1] data.

    No variance is below that of rounding to 8 bits. The map is the NLL's terms, summed over colours.
    """

    name = "per-pixel Gaussian"

    def fit(self, pixels: Tensor) -> PixelGaussian:
        """See ``Baseline``."""
        x = normal_images(pixels)
        self.mean, self.variance = x.mean(dim=0), x.var(dim=0, correction=0).clamp_min(QUANTISATION)
        return self

    def score(self, pixels: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """See ``Baseline``."""
        x = images_like_fitted(pixels, len(self.mean))
        terms = 0.5 * ((x - self.mean).square() / self.variance + (2 * math.pi * self.variance).log())
        return terms.sum(dim=1).numpy(), sum_over_colours(terms)
