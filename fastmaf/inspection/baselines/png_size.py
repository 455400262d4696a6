"""The size of an image as a PNG file."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image
from torch import Tensor

from fastmaf.inspection.baselines.base import normal_images


class PNGSize:
    """The size in bytes of an image as a PNG at Pillow's highest compression; it has no maps and learns nothing."""

    name = "PNG size"

    def fit(self, pixels: Tensor) -> PNGSize:
        """See ``Baseline``."""
        normal_images(pixels)
        return self

    def score(self, pixels: Tensor) -> tuple[np.ndarray, None]:
        """See ``Baseline``."""
        sizes = []
        for image in pixels.permute(0, 2, 3, 1).numpy():
            file = BytesIO()
            Image.fromarray(image).save(file, format="PNG", compress_level=9)
            sizes.append(float(file.tell()))
        return np.array(sizes), None
