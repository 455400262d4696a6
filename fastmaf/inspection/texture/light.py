"""What the density of a location is conditioned on: the light of its image, and its position.

Under another exposure the features of a whole image are others, and near the border a surface is often darker or lit at
an angle. A density that knows neither must count both as usual; a conditional one need not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

CONTEXT = 6
"""Numbers that a location is described by: brightness and contrast of its image, and four of its position."""

_DARK = 8 / 255  # added to intensities before the logarithm: noise of dark pixels must not dominate
_NEIGHBOURS = 9  # pixels along each side of the square whose mean is subtracted for the contrast
_CLIP = 3.0  # standard deviations: a MAF says little about light that it has not seen


@dataclass(frozen=True, eq=False)
class Light:
    """Mean and standard deviation over good images of the brightness and the contrast of an image, float32 ``[2]``."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def fit(cls, images: Iterable[Tensor]) -> Light:
        """Returns the statistics of good images, logarithms of intensities ``[channels, h, w]``."""
        values = torch.stack([_brightness_and_contrast(image) for image in images])
        return cls(values.mean(dim=0), values.std(dim=0, correction=0).clamp_min(1e-3))

    def contexts(self, image: Tensor, shape: Sequence[int]) -> Tensor:
        """Returns the context of each location of a grid ``[h, w]`` on an image, float32 ``[h * w, CONTEXT]``.

        With the row u and the column v on [-1, 1], these are the standardised brightness and contrast of the image, u,
        v, u⁴ and v⁴.
        """
        standard = (_brightness_and_contrast(image) - self.mean) / self.deviation
        axes = [torch.linspace(-1, 1, n, device=image.device) if n > 1 else image.new_zeros(1) for n in shape]
        places = torch.cartesian_prod(*axes)
        light = standard.clamp(-_CLIP, _CLIP).expand(len(places), 2)
        return torch.cat([light, places, places**4], dim=1)


def log_intensity(image: Tensor) -> Tensor:
    """Returns logarithms of intensities on [0, 1], from about -1.75 to 0: other light is added, not multiplied."""
    return ((image + _DARK) / (1 + _DARK)).log() / 2


def _brightness_and_contrast(image: Tensor) -> Tensor:
    """Returns the mean of an image, and the logarithm of the deviation of its fine structure, float32 ``[2]``."""
    grey = image.mean(dim=0, keepdim=True)
    around = avg_pool2d(grey, _NEIGHBOURS, stride=1, padding=_NEIGHBOURS // 2, count_include_pad=False)
    return torch.stack([grey.mean(), (grey - around).std(correction=0).clamp_min(1e-4).log()])
