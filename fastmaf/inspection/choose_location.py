"""With which constants the map is made of where an image is anomalous: chosen on drawn defects, as the score is."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import fastmaf
from fastmaf.images.dataset import to_unit
from fastmaf.inspection.cross import CrossFit
from fastmaf.inspection.defects import draw_defects
from fastmaf.inspection.location import Location, location_maps, residuals_of
from fastmaf.inspection.metrics import au_pro, pixel_auroc

CANDIDATES: tuple[Location, ...] = tuple(
    Location(factors, power, sigma)
    for factors, power, sigma in itertools.product((50, 100, 150, 200, 400, 800), (0.0, 0.5, 1.0), (0.7, 1.0, 1.5, 2.0))
)


@dataclass(frozen=True)
class Place:
    """A way to make the map, with its pixel AUROC and AU-PRO."""

    location: Location
    pixel_auroc: float
    au_pro: float

    @property
    def mean(self) -> float:
        """Of both: what decides."""
        return (self.pixel_auroc + self.au_pro) / 2


@fastmaf.torch_defaults()
def choose_location(
    pixels: Tensor,
    cross: CrossFit,
    *,
    candidates: Iterable[Location] = CANDIDATES,
    draws: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> list[Place]:
    """Judges ways to make the map by the pixels of normals and of drawn defects; arguments as those of ``choose``.

    Returns:
        The candidates, best first.
    """
    drawn = [draw_defects(pixels, seed=seed + i) for i in range(draws)]
    sets = [to_unit(part) for part in (pixels, *(one.pixels for one in drawn))]
    masks = [*(None for _ in pixels), *(np.asarray(mask) for one in drawn for mask in one.masks)]
    result: list[Place] = []
    found, of = torch.empty(0), None
    # In the order of their residuals, of which one kind at a time is held.
    ordered = sorted(candidates, key=lambda one: (one.factors, one.power))
    for location in tqdm(ordered, desc="judging maps", unit="map", disable=not progress, leave=False):
        if of != (location.factors, location.power):
            found = cross.held_out(sets, partial(residuals_of, location=location)).flatten(0, 1).float()
            of = (location.factors, location.power)
        maps = list(location_maps(found, location).numpy())
        result.append(Place(location, pixel_auroc(maps, masks), au_pro(maps, masks)))
    return sorted(result, key=lambda one: -one.mean)


def explain_location(found: Sequence[Place], rows: int = 8) -> str:
    """Returns the comparison as text: the best candidates, the default, and what decides."""
    lines = [
        "The map of where: pixel AUROC and AU-PRO of the same images. The best mean of both decides.",
        "",
        "factors power sigma   pixel  AU-PRO    mean",
    ]
    default = Location()
    others = [one for one in found[rows:] if one.location == default]
    for one in (*found[:rows], *others):
        at = one.location
        row = f"{at.factors:>7} {at.power:>5g} {at.sigma:>5g}  {one.pixel_auroc:.4f}  {one.au_pro:.4f}  {one.mean:.4f}"
        lines.append(row + ("  (the default)" if at == default else ""))
    return "\n".join(lines)
