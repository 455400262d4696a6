"""The angle and the place at which an object lies: each image is turned to the pose that good images have in common.

An object that lies at any angle fills a whitening with the directions of its turns, and little is left to find a defect
by. If its angle can be told from the image, the image is turned first, and everything else sees objects in one pose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from fastmaf.images.dataset import to_grey
from fastmaf.images.reduce import reduced
from fastmaf.inspection.texture.alignment import ALIGNED, alignment

ANGLES = 360
"""Number of angles that are compared."""

RADII = 26
"""Number of radii of a polar image."""

SIDE = 64
"""Side of the images that angles are told from, at most."""

STEPS = 8
"""Steps per compared angle, to which an angle is rounded: it does not depend on the batch then."""

ROUNDING = 2.0**12
"""Steps per half side, to which the middle of an object is rounded, for the same reason."""

LIGHT = 0.25
"""Part of the largest difference from the border that is taken for light on the background."""

FLAT = 1e-6
"""Grey levels of a polar image that are rounding errors: an image of one colour has the angle 0."""

TINY = torch.finfo(torch.float64).tiny

_FIRST = 4  # radius in pixels of images of SIDE: smaller circles hold few pixels
_ROUNDS = 12  # of turning all images to their mean, at most
_BATCH = 64
_FEWEST, _COMPARED = 20, 300  # good images
_MOST_IN_CORNERS = 0.25  # of the mean square of fine structure; it is 1 for a texture


@dataclass(frozen=True, eq=False)
class Pose:
    """The common pose of good images.

    The angle of an image is that at which the correlation of its polar image with ``reference`` is largest.

    Attributes:
        reference: mean polar image of the good images in the common pose, float64 ``[ANGLES, radii]``.
        moves: whether objects are moved to the middle of the image, too, and turned about their own; else about that of
            the image. The middle of an object is the mean position of what differs from the border.

    References:
        Reddy and Chatterji 1996, An FFT-based technique for translation, rotation, and scale-invariant image
        registration.
    """

    reference: Tensor
    moves: bool

    @classmethod
    @torch.no_grad()
    def of(cls, pixels: Tensor, moves: bool) -> Pose:
        """Returns the pose that good images have in common: that of the first one, refined by all.

        Args:
            pixels: uint8 ``[n, 3, s, s]``, n >= 1.
            moves: see the attribute.
        """
        small = reduced(pixels, min(SIDE, pixels.shape[-1]))
        polar = _polar(small, _middles(small, moves))
        transformed = torch.fft.rfft(polar, dim=1)
        reference, before = polar[0], torch.full((len(polar),), -1)
        for _ in range(_ROUNDS):
            turns = _correlation(transformed, reference).argmax(dim=1)
            if torch.equal(turns, before):
                break
            index = (torch.arange(ANGLES) + turns[:, None]) % ANGLES
            reference = polar.gather(1, index[:, :, None].expand_as(polar)).mean(dim=0)
            before = turns
        return cls(reference, moves)

    @torch.no_grad()
    def places(self, pixels: Tensor) -> Tensor:
        """Returns where the object of each image ``[n, 3, s, s]`` lies, float64 ``[n, 3]``.

        Its angle in degrees, and its middle: right of and below that of the image, in halves of the side.
        """
        found = []
        for part in pixels.split(_BATCH) if len(pixels) else ():  # there is no transform of nothing
            small = reduced(part, min(SIDE, part.shape[-1]))
            middles = _middles(small, self.moves)
            polar = _polar(small, middles)
            correlation = _correlation(torch.fft.rfft(polar, dim=1), self.reference)
            best = correlation.argmax(dim=1, keepdim=True)
            left, peak, right = (correlation.gather(1, (best + k) % ANGLES)[:, 0] for k in (-1, 0, 1))
            # The vertex of the parabola through the largest value and its neighbours.
            bend = (2 * peak - left - right).clamp_min(TINY)
            vertex = best[:, 0] + ((right - left) / (2 * bend)).clamp(-0.5, 0.5)
            angles = (vertex * STEPS).round() / STEPS * (360 / ANGLES) % 360
            angles = torch.where(polar.abs().amax(dim=(1, 2)) > FLAT, angles, 0)
            found.append(torch.cat([angles[:, None], middles], dim=1))
        return torch.cat([torch.empty(0, 3, dtype=torch.float64), *found])


def turned(pixels: Tensor, places: Tensor) -> Tensor:
    """Returns images, uint8 ``[n, 3, s, s]``, with the object of each turned back, in the middle.

    What comes into view has the median colour of the image's border.

    Args:
        pixels: the images, uint8 ``[n, 3, s, s]``.
        places: of their objects, see ``Pose.places``.
    """
    images = [_turned_one(image, place) for image, place in zip(pixels, places.tolist(), strict=True)]
    return torch.stack(images) if images else pixels


def _turned_one(image: Tensor, place: list[float]) -> Tensor:
    x = image[None].float()
    ground = _border(x).median(dim=-1).values[..., None, None]
    return (_sampled(x - ground, _matrix(place)[:2]) + ground).round_().clamp_(0, 255).to(torch.uint8)[0]


def maps_turned_back(maps: np.ndarray, places: Tensor) -> np.ndarray:
    """Returns maps, float32 ``[n, s, s]``, of turned images, turned back; 0 where nothing was seen."""
    back = [
        _sampled(torch.from_numpy(one)[None, None], torch.linalg.inv(_matrix(place))[:2])[0, 0]
        for one, place in zip(maps, places.tolist(), strict=True)
    ]
    return torch.stack(back).numpy() if back else maps


def _matrix(place: list[float]) -> Tensor:
    """Returns the affine map ``[3, 3]`` from a place in the turned image to that in the image, float64."""
    angle, right, below = place
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return torch.tensor([[cos, -sin, right], [sin, cos, below], [0.0, 0.0, 1.0]], dtype=torch.float64)


def _sampled(x: Tensor, matrix: Tensor) -> Tensor:
    """Returns an image ``[1, c, s, s]`` seen through an affine map ``[2, 3]``, 0 outside."""
    grid = affine_grid(matrix[None].to(x.dtype), [1, 1, *x.shape[2:]], align_corners=False)
    return grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _border(x: Tensor) -> Tensor:
    return torch.cat([x[..., 0], x[..., -1], x[..., 0, :], x[..., -1, :]], dim=-1)


def _middles(small: Tensor, moves: bool) -> Tensor:
    """Returns the middle of the object in each image, float64 ``[n, 2]``, rounded; zeros without ``moves``."""
    if not moves:
        return torch.zeros(len(small), 2, dtype=torch.float64)
    x = to_grey(small).double()[:, 0]
    difference = (x - _border(x).median(dim=-1).values[:, None, None]).abs()
    # What differs little is light on the background.
    weight = (difference - LIGHT * difference.amax(dim=(1, 2), keepdim=True)).clamp_min(0)
    total = weight.sum(dim=(1, 2)).clamp_min(TINY)
    side = small.shape[-1]
    at = pixel_centres(side)
    right, below = (weight.sum(dim=axis) @ at / total for axis in (1, 2))
    return (torch.stack([right, below], dim=1) * ROUNDING).round() / ROUNDING


def pixel_centres(side: int) -> Tensor:
    """Returns the places of pixels along a side, in halves of it from the middle, float64 ``[side]``."""
    return (2 * torch.arange(side, dtype=torch.float64) + 1) / side - 1


def polar_grid() -> Tensor:
    """Returns the places of a polar image, right of and below the middle, float64 ``[ANGLES, RADII, 2]``."""
    radii = torch.arange(_FIRST, _FIRST + RADII, dtype=torch.float64) / (SIDE / 2)
    angles = torch.arange(ANGLES, dtype=torch.float64) * (2 * math.pi / ANGLES)
    return torch.stack([radii * torch.cos(angles)[:, None], radii * torch.sin(angles)[:, None]], dim=-1)


def _polar(small: Tensor, middles: Tensor) -> Tensor:
    """Returns polar images about the middles, float64 ``[n, ANGLES, radii]``, less their means."""
    x, grid = to_grey(small).double(), polar_grid()
    polar = grid_sample(x, grid + middles[:, None, None], align_corners=False, padding_mode="border")[:, 0]
    return polar - polar.mean(dim=(1, 2), keepdim=True)


def _correlation(transformed: Tensor, reference: Tensor) -> Tensor:
    """Returns the correlation ``[n, ANGLES]`` of polar images, transformed along the angle, with another one."""
    product = (transformed * torch.fft.rfft(reference, dim=0).conj()).sum(dim=2)
    return torch.fft.irfft(product, n=ANGLES, dim=1)


class CommonPose(NamedTuple):
    """The pose that good images have in common, and the evidence for it."""

    pose: Pose
    reason: str


@torch.no_grad()
def common_pose(pixels: Tensor) -> CommonPose | None:
    """Returns the pose of good images that show the same thing at different angles, None of others.

    They do if the mean image explains less than ``ALIGNED`` of the fine structure as they are, and more once they are
    turned; and if there is next to nothing in the corners, which are turned out of view. Textures fill them, and
    stripes are in the same pose in whatever image.

    Args:
        pixels: uint8 ``[n, 3, s, s]``, of at least 20 images; fewer say little. Of many, some hundreds are compared.
    """
    if len(pixels) < _FEWEST:
        return None
    if len(pixels) > _COMPARED:
        pixels = pixels[torch.linspace(0, len(pixels) - 1, _COMPARED).long()]
    small = reduced(pixels, min(SIDE, pixels.shape[-1]))
    before = alignment(small)
    if before >= ALIGNED or not has_plain_corners(small):
        return None
    found = []
    for moves in (False, True):
        pose = Pose.of(pixels, moves)
        found.append((alignment(reduced(turned(pixels, pose.places(pixels)), small.shape[-1])), pose))
    share, pose = max(found, key=lambda pair: pair[0])
    if share < ALIGNED:
        return None
    text = f"the mean image explains {share:.0%} of the fine structure of the others once they are turned to one pose"
    return CommonPose(pose, f"{text}, {max(before, 0.0):.0%} before")


def has_plain_corners(small: Tensor) -> bool:
    """Returns whether there is next to nothing outside the inscribed circle of images, uint8 ``[n, 3, s, s]``."""
    return _in_corners(small) <= _MOST_IN_CORNERS


def _in_corners(small: Tensor) -> float:
    """Returns the mean square of the fine structure outside the inscribed circle over that of the image, 0 to 4.7."""
    x = to_grey(small).double()
    fine = (x[:, :, 1:-1, 1:-1] - avg_pool2d(x, 3, stride=1))[:, 0].square()
    at = torch.linspace(-1, 1, fine.shape[-1], dtype=torch.float64)
    outside = at[:, None].square() + at.square() > 1
    # The median over the images: noise is in every one, dust in the corner of a few.
    shares = fine[:, outside].mean(dim=1) / fine.mean(dim=(1, 2)).clamp_min(TINY)
    return float(shares.median())
