"""The common pose of objects at any angle: finding it, turning images to it, and the models that do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmaf.images.reduce import reduced
from fastmaf.inspection.pose import ANGLES, RADII, Pose, common_pose, maps_turned_back, turned
from fastmaf.inspection.texture.alignment import ALIGNED, alignment
from tests.inspection.texture.conftest import grain
from tests.inspection.turned_objects import SIDE, objects


def difference(first: Tensor, second: Tensor) -> Tensor:
    """The difference of angles in degrees, from -180 to 180."""
    return (first - second + 180) % 360 - 180


def stripes(n: int, waves: int) -> Tensor:
    generator = torch.Generator().manual_seed(waves)
    at = torch.arange(64, dtype=torch.float64) / 64
    phase, tilt = (
        2 * math.pi * torch.rand(n, 1, 1, generator=generator),
        0.05 * torch.randn(n, 1, 1, generator=generator),
    )
    values = 128 + 60 * torch.sin(2 * math.pi * waves * (at + tilt * at[:, None]) + phase)
    values = values + 8 * torch.randn(n, 64, 64, generator=generator)
    return values.clamp(0, 255).to(torch.uint8)[:, None].repeat(1, 3, 1, 1)


@pytest.mark.parametrize("moves", [False, True])
def test_angles_are_found_up_to_a_common_one(moves: bool) -> None:
    angles = torch.linspace(0, 350, 24, dtype=torch.float64)
    shifts = torch.randn(24, 2, generator=torch.Generator().manual_seed(1)) * (0.05 if moves else 0.0)
    pixels = objects(angles, shifts)
    pose = Pose.of(pixels, moves)
    assert pose.reference.shape == (ANGLES, RADII) and pose.reference.dtype == torch.float64
    places = pose.places(pixels)
    offset = difference(places[:, 0], angles)
    assert difference(offset, offset[:1]).abs().max() < 3
    if moves:  # the middle of the object is always the same point of it
        (x, y), turn = (places[:, 1:] - shifts).T, torch.deg2rad(angles)
        middle = torch.stack([x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()])
        assert (middle - middle.mean(dim=1, keepdim=True)).abs().max() < 0.02
    else:
        assert (places[:, 1:] == 0).all()


def test_turned_images_show_the_same() -> None:
    pixels = objects(torch.linspace(0, 350, 24, dtype=torch.float64), torch.zeros(24, 2))
    pose = Pose.of(pixels, moves=False)
    assert alignment(pixels) < ALIGNED < 0.6 < alignment(turned(pixels, pose.places(pixels)))


def test_places_do_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(2)
    pixels = objects(360 * torch.rand(30, generator=generator, dtype=torch.float64), torch.zeros(30, 2))
    for moves in (False, True):
        pose = Pose.of(pixels, moves)
        alone = torch.cat([pose.places(image[None]) for image in pixels])
        assert torch.equal(pose.places(pixels), alone)
    assert pose.places(pixels[:0]).shape == (0, 3) and turned(pixels[:0], pose.places(pixels[:0])).shape[0] == 0


@pytest.mark.parametrize("angle", [0.0, 37.0, 90.0, 200.0])
def test_a_map_is_turned_back_to_where_the_defect_is(angle: float) -> None:
    pixels = torch.full((1, 3, SIDE, SIDE), 200, dtype=torch.uint8)
    row, column = 20, 33
    pixels[0, :, row - 2 : row + 3, column - 2 : column + 3] = 0
    places = torch.tensor([[angle, 0.08, -0.05]], dtype=torch.float64)
    seen = turned(pixels, places)
    found = maps_turned_back((200.0 - seen[:, 0].float()).numpy(), places)[0]
    weights = found / found.sum()
    at = np.arange(SIDE)
    assert math.isclose((weights.sum(axis=1) * at).sum(), row, abs_tol=0.3)
    assert math.isclose((weights.sum(axis=0) * at).sum(), column, abs_tol=0.3)
    if angle == 90.0:  # counter-clockwise: what was above is at the left
        dark = (seen[0, 0] < 100).nonzero().double().mean(dim=0)
        assert dark[1] < SIDE / 2


def test_what_comes_into_view_has_the_colour_of_the_border() -> None:
    pixels = (
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8) + torch.tensor([10, 120, 250], dtype=torch.uint8)[:, None, None]
    )
    assert torch.equal(turned(pixels, torch.tensor([[45.0, 0.3, 0.1]])), pixels)


def test_a_common_pose_is_found_for_turned_objects_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    angles = 360 * torch.rand(24, generator=generator, dtype=torch.float64)
    shifts = 0.05 * torch.randn(24, 2, generator=generator)
    for moved in (torch.zeros(24, 2), shifts):
        found = common_pose(objects(angles, moved))
        assert found is not None and "once they are turned to one pose" in found.reason
    assert found is not None and found.pose.moves, "objects that are not in the middle are moved there"
    assert common_pose(objects(torch.zeros(24, dtype=torch.float64), torch.zeros(24, 2))) is None, "in one pose already"
    assert common_pose(objects(angles, shifts)[:19]) is None, "too few"
    assert common_pose(grain(24, 0)) is None, "a texture"
    for waves in (4, 8, 12):
        assert common_pose(stripes(24, waves)) is None, "stripes, which are in one pose in any image"
    speck = grain(24, 1)
    for image, (row, column) in zip(speck, torch.randint(8, 56, (24, 2), generator=generator).tolist(), strict=True):
        image[:, row - 3 : row + 3, column - 3 : column + 3] = 255
    assert common_pose(speck) is None, "a speck on a texture"
    noise = torch.randint(0, 256, (24, 3, 64, 64), dtype=torch.uint8, generator=generator)
    assert common_pose(noise) is None and common_pose(torch.full_like(noise, 7)) is None
    assert common_pose(reduced(objects(angles, shifts), 16)) is not None, "of small images, too"
