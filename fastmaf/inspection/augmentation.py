"""Copies of images for the whitening to explain: shifts by parts of a pixel, and rotations.

Copies are made from an image of twice the size, moved and then averaged over 2 x 2 pixels, as the camera would have
seen the object at another place. Copies of the small image itself, interpolated, are blurred: they are mixtures of
shifts by whole pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, pad

Augment: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images ``[n, ...]`` -> a basis ``[n, p, C h w]`` and weights ``[copies, p]``."""


def shifts(size: int | tuple[int, int], radius: int = 2, step: float = 0.5, *, zoom: int = 1) -> Augment:
    """Shifts images by up to ``radius`` steps along each axis: (2 radius + 1)² copies.

    Positions between the pixels of the given image are interpolated bilinearly, so that every copy is a mixture of
    shifts by its whole pixels. Those form the basis. Edges are repeated.

    Args:
        size: height and width of the copies in pixels, or the side of square ones.
        radius: largest shift in steps; 0 for the images alone.
        step: in pixels of the copies.
        zoom: images are given at this multiple of ``size``, and copies averaged over ``zoom`` x ``zoom`` pixels.

    Returns:
        The augmentation. It takes images ``[n, C, zoom h, zoom w]``, or such rows, uint8 or on [0, 1].
    """
    shape = _shape(size)
    if min(shape) < 1 or radius < 0 or not step > 0:
        raise ValueError(f"size must be at least 1, radius at least 0, step positive; found {size}, {radius}, {step}")
    whole = math.ceil(radius * step * zoom)
    offsets = step * zoom * torch.arange(-radius, radius + 1, dtype=torch.float64)
    axis = (1 - (offsets[:, None] - torch.arange(-whole, whole + 1)).abs()).clamp_min(0).float()
    weights = torch.kron(axis, axis)

    def augment(x: Tensor) -> tuple[Tensor, Tensor]:
        height, width = (zoom * side for side in shape)
        images = _planes(x, (height, width))
        if whole:
            images = pad(images, (whole,) * 4, mode="replicate")
        # The mean of each window, whose corner steps through the pixels of the larger image.
        means = _window_means(images, zoom)
        steps = range(2 * whole + 1)
        basis = [means[:, :, i : i + height : zoom, j : j + width : zoom] for i in steps for j in steps]
        return torch.stack(basis, dim=1).flatten(2), weights.to(means)

    return augment


def rotations(size: int | tuple[int, int], angles: int = 12, *, zoom: int = 1, blur: float = 0.0) -> Augment:
    """Rotates images counter-clockwise about their centre by multiples of 360° / ``angles``.

    For objects that lie at any angle. Interpolation is bilinear, in the given image; edges are repeated. The weights
    are an identity matrix. Other arguments and the result as ``shifts``.

    Args:
        size, zoom: as ``shifts``.
        angles: number of copies.
        blur: share of each neighbour's value in a pixel of the given images, first; see ``matching_blur``.
    """
    height, width = shape = _shape(size)
    if min(shape) < 1 or angles < 1:
        raise ValueError(f"size and angles must be at least 1; found {size} and {angles}")
    turns = torch.arange(angles) * (2 * math.pi / angles)
    # Of coordinates on [-1, 1], whose unit is half of the width or of the height.
    across, down = -turns.sin() * (height / width), turns.sin() * (width / height)
    rows = torch.stack([turns.cos(), across, 0 * turns, down, turns.cos(), 0 * turns], dim=1)

    def augment(x: Tensor) -> tuple[Tensor, Tensor]:
        images, basis = blurred(_planes(x, (zoom * height, zoom * width)), blur), []
        for turn in rows.to(images).split(1):
            grid = affine_grid(turn.unflatten(1, (2, 3)), [1, *images.shape[1:]], align_corners=False)
            grid = grid.expand(len(x), -1, -1, -1)
            rotated = grid_sample(images, grid, padding_mode="border", align_corners=False)
            basis.append(_window_means(rotated, zoom, zoom))
        return torch.stack(basis, dim=1).flatten(2), torch.eye(angles).to(images)

    return augment


def _shape(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _window_means(images: Tensor, side: int, step: int = 1) -> Tensor:
    """Returns the means of the windows of ``side`` x ``side`` pixels, in a tenth of the time of ``avg_pool2d``."""
    for dim in (2, 3) if side > 1 else ():
        ends = images.shape[dim] - side + 1
        windows = [images.movedim(dim, -1)[..., start : start + ends : step].movedim(-1, dim) for start in range(side)]
        images = sum(windows[2:], windows[0] + windows[1])
    return images / side**2 if side > 1 else images


def _planes(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns images ``[n, C, h, w]``, floating point; 8-bit values on [0, 1]."""
    images = x.reshape(len(x), -1, *shape)
    return images if images.is_floating_point() else images / 255


def blurred(images: Tensor, share: float) -> Tensor:
    """Returns images ``[n, C, h, w]`` in which each pixel has this share of each neighbour, along rows and columns."""
    if not share:
        return images
    for dim in (2, 3):
        side = images.shape[dim]
        padded = pad(images, (0, 0, 1, 1) if dim == 2 else (1, 1, 0, 0), mode="replicate")
        images = (1 - 2 * share) * images + share * (padded.narrow(dim, 0, side) + padded.narrow(dim, 2, side))
    return images


def matching_blur(x: Tensor, double: Tensor, images: int = 32) -> float:
    """Returns the blur with which averages of 2 x 2 pixels of the larger images are most like the images themselves.

    Reduction filters differ in their width: Pillow's is wider than an average of 2 x 2 pixels. Neighbouring shifts of
    a sharper image can be mixed to the image itself, rotations by many degrees cannot. By least squares, to first order
    in the share.

    Args:
        x: images ``[n, C h w]`` on [0, 1].
        double: the same at twice the size, uint8 ``[n, C, 2 h, 2 w]``.
        images: number of images that are compared.
    """
    index = torch.linspace(0, len(x) - 1, min(images, len(x))).round().long()
    large = double[index] / 255
    small = x[index].view(*large.shape[:2], large.shape[2] // 2, -1)
    plain = avg_pool2d(large, 2)
    change = (avg_pool2d(blurred(large, 0.1), 2) - plain) / 0.1
    energy = float(change.square().sum())
    return min(max(float(((small - plain) * change).sum()) / energy, 0.0), 0.25) if energy else 0.0
