"""Local features of a texture: responses of principal-component filters and their local energies, at several scales.

An image becomes a pyramid; each level has half the side of the one before it. On a level, the K filters are the
principal components of small patches of good images, scaled to unit variance. The features of a location are the K
responses and the logarithms of the K responses' squares, averaged around it: the responses hold lines, spots and edges,
the energies hold contrast, orientation and scale of the texture. Intensities are taken as logarithms. Locations within
4 pixels of a level's border, whose features depend on how the image is continued beyond it, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from fastmaf.images.dataset import to_grey
from fastmaf.inspection.texture.light import Light, log_intensity

LEVELS = 4
PATCH = 5
SMALLEST = 16
"""Side of the smallest level of a pyramid, in pixels."""
LONGEST = 512
"""Longest side of an image in pixels, unless a model was fitted to larger ones; larger ones are reduced."""

BORDER = 2
"""Locations along each side of a level that are left out: the reach of a filter and of the averaged energies."""

STRIDE = 2
"""Pixels of a level between neighbouring locations."""

_FILTERS = {1: 12, 3: 16}  # by channels
_SIGMA = 2.0  # pixels of a level: of the average of squared responses
_REACH = round(3 * _SIGMA)  # pixels, of the same
_LEAST_ENERGY = 0.02  # of a mean of 1: noise of 8 bits must not dominate the logarithm
_LEAST_VARIANCE = 1e-5  # of a component, on [0, 1] data: about that of rounding to 8 bits


@dataclass(frozen=True, eq=False)
class TextureFilters:
    """The filters of each level, as one convolution per level.

    Attributes:
        weight: float32 ``[levels, K, channels * patch²]``.
        bias: float32 ``[levels, K]``.
        light: of the good images; None in files of earlier versions, whose filters are of the intensities themselves
            and include the border.
    """

    weight: Tensor
    bias: Tensor
    light: Light | None

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.weight.shape[2] // PATCH**2

    @property
    def features(self) -> int:
        """D, the number of features of a location: 2 K."""
        return 2 * self.weight.shape[1]

    @property
    def border(self) -> int:
        """Number of locations along each side of a level that have no features."""
        return 0 if self.light is None else BORDER

    def to(self, device: torch.device | str) -> TextureFilters:
        """Returns the same filters on another device."""
        light = None if self.light is None else Light(self.light.mean.to(device), self.light.deviation.to(device))
        return TextureFilters(self.weight.to(device), self.bias.to(device), light)

    @classmethod
    def fit(cls, images: Sequence[Tensor], patches: int = 100_000, seed: int = 0) -> TextureFilters:
        """Returns filters fitted to good images, float32 ``[channels, h, w]``, each of any size.

        Args:
            images: the images.
            patches: number of random patches per level, at most.
            seed: of the patches.
        """
        generator = torch.Generator().manual_seed(seed)
        channels = images[0].shape[0]
        size, count = channels * PATCH**2, _FILTERS[channels]
        total = torch.zeros(LEVELS, size, dtype=torch.float64)
        square = torch.zeros(LEVELS, size, size, dtype=torch.float64)
        number = torch.zeros(LEVELS, dtype=torch.float64)
        of_image = max(16, patches // len(images))
        for image in images:
            for level, x in enumerate(pyramid(log_intensity(image))):
                windows = x.unfold(1, PATCH, 1).unfold(2, PATCH, 1).flatten(3)  # [channels, h, w, patch²]
                at = torch.randint(windows.shape[1] * windows.shape[2], (of_image,), generator=generator)
                rows = windows[:, at // windows.shape[2], at % windows.shape[2]].transpose(0, 1).flatten(1).double()
                total[level] += rows.sum(dim=0)
                square[level] += rows.T @ rows
                number[level] += len(rows)
        weights, biases = [], []
        for level in range(LEVELS):
            if not number[level]:  # no image is large enough: the level is never used
                weights.append(torch.zeros(count, size, dtype=torch.float64))
                biases.append(torch.zeros(count, dtype=torch.float64))
                continue
            mean = total[level] / number[level]
            variance, axes = torch.linalg.eigh(square[level] / number[level] - torch.outer(mean, mean))
            variance, axes = variance.flip(0)[:count], axes.flip(1)[:, :count]
            weights.append((axes / (variance.clamp_min(0) + _LEAST_VARIANCE).sqrt()).T)
            biases.append(-(weights[-1] @ mean))
        return cls(
            torch.stack(weights).float(),
            torch.stack(biases).float(),
            Light.fit(log_intensity(image) for image in images),
        )

    def __call__(self, image: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields features and contexts of each level of an image ``[channels, h, w]``.

        Features are float32 ``[D, h_l, w_l]``, contexts ``[h_l * w_l, CONTEXT]``, or None without ``light``.
        """
        image = image if self.light is None else log_intensity(image)
        for level, x in enumerate(pyramid(image)):
            features = torch.cat([self._features(x, level, *rows) for rows in _strips(*x.shape[1:])], dim=1)
            if self.light is None:
                yield features, None
                continue
            features = features[:, BORDER:-BORDER, BORDER:-BORDER]
            yield features, self.light.contexts(image, features.shape[1:])

    def _features(self, x: Tensor, level: int, first: int, last: int) -> Tensor:
        """Returns the features of the rows from ``first`` to before ``last`` of a level ``[channels, h, w]``."""
        weight = self.weight[level].unflatten(1, (self.channels, PATCH, PATCH))
        edge = PATCH // 2
        above, below = max(first - _REACH, 0), min(last + _REACH, x.shape[1])
        padded = pad(x[None], (edge,) * 4, mode="reflect")[:, :, above : below + 2 * edge]
        responses = conv2d(padded, weight, self.bias[level])
        energies = (_blurred(responses.square()) + _LEAST_ENERGY).log()
        return torch.cat([responses, energies], dim=1)[0, :, first - above : last - above : STRIDE, ::STRIDE]


def to_texture(pixels: Tensor, shape: tuple[int, int] | None, channels: int, longest: int = LONGEST) -> Tensor:
    """Returns a square image at its own aspect ratio and scale, float32 ``[channels, h, w]`` on [0, 1].

    Args:
        pixels: uint8 ``[3, s, s]``.
        shape: (height, width) that the image had before it became square; None: it is square.
        channels: 1 converts to grey.
        longest: side in pixels that larger images are reduced to.
    """
    image = (to_grey(pixels[None]) if channels == 1 else pixels[None]).float() / 255
    height, width = shape or tuple(pixels.shape[1:])
    scale = min(1.0, longest / max(height, width))
    target = tuple(max(SMALLEST, round(scale * side)) for side in (height, width))
    if target != tuple(pixels.shape[1:]):
        image = interpolate(image, target, mode="bilinear", align_corners=False, antialias=True)
    return image[0]


def _strips(height: int, width: int) -> list[tuple[int, int]]:
    """Returns the rows of strips of about ``LONGEST``² pixels, one after the other: they bound the memory."""
    rows = max(LONGEST**2 // width // STRIDE, 1) * STRIDE
    return [(first, min(first + rows, height)) for first in range(0, height, rows)]


def pyramid(image: Tensor) -> Iterator[Tensor]:
    """Yields an image ``[channels, h, w]`` and its reductions by 2, at most ``LEVELS`` of them in all."""
    kernel = torch.tensor([1.0, 3.0, 3.0, 1.0], device=image.device) / 8
    weight = torch.outer(kernel, kernel).expand(image.shape[0], 1, 4, 4)
    for level in range(LEVELS):
        if level:
            if min(image.shape[1:]) < 2 * SMALLEST:
                return
            padded = pad(image[None], (1, 1, 1, 1), mode="replicate")
            image = conv2d(padded, weight, stride=2, groups=image.shape[0])[0]
        yield image


def _blurred(x: Tensor) -> Tensor:
    """Returns ``[1, K, h, w]`` smoothed by a Gaussian, with repeated edges."""
    reach = _REACH
    kernel = torch.exp(-torch.arange(-reach, reach + 1, device=x.device).square() / (2 * _SIGMA**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    x = conv2d(pad(x, (reach, reach, 0, 0), mode="replicate"), kernel[:, :, None, :], groups=x.shape[1])
    return conv2d(pad(x, (0, 0, reach, reach), mode="replicate"), kernel[:, :, :, None], groups=x.shape[1])
