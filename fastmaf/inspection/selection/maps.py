"""Ranking configurations of the anomaly map on synthetic defects."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor
from tqdm import tqdm

import fastmaf
from fastmaf.images.dataset import to_unit
from fastmaf.inspection.out_of_fold import OutOfFoldModels
from fastmaf.inspection.scoring.anomaly_map import anomaly_maps, residuals_of
from fastmaf.inspection.scoring.settings import AnomalyMapConfig
from fastmaf.inspection.synthetic_defects.draw import draw_defects
from fastmaf.metrics.aupro import au_pro, pixel_auroc

CANDIDATES: tuple[AnomalyMapConfig, ...] = tuple(
    AnomalyMapConfig(factors, power, sigma)
    for factors, power, sigma in itertools.product((50, 100, 150, 200, 400, 800), (0.0, 0.5, 1.0), (0.7, 1.0, 1.5, 2.0))
)


@dataclass(frozen=True)
class MapCandidate:
    """A configuration of the anomaly map, with its pixel AUROC and AU-PRO."""

    config: AnomalyMapConfig
    pixel_auroc: float
    au_pro: float

    @property
    def mean(self) -> float:
        """The mean of both, which decides."""
        return (self.pixel_auroc + self.au_pro) / 2


@fastmaf.torch_defaults()
def rank_maps(
    pixels: Tensor,
    models: OutOfFoldModels,
    *,
    candidates: Iterable[AnomalyMapConfig] = CANDIDATES,
    draws: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> list[MapCandidate]:
    """Ranks map configurations by the pixels of normal images and of synthetic defects; arguments as ``rank_scores``.

    Returns:
        The candidates, best first.
    """
    drawn = [draw_defects(pixels, seed=seed + i) for i in range(draws)]
    sets = [to_unit(part) for part in (pixels, *(defects.pixels for defects in drawn))]
    masks = [*(None for _ in pixels), *(np.asarray(mask) for defects in drawn for mask in defects.masks)]
    result: list[MapCandidate] = []
    # Grouped by residuals, of which only one kind is held in memory at a time.
    ordered = sorted(candidates, key=_residual_key)
    with tqdm(total=len(ordered), desc="ranking maps", unit="map", disable=not progress, leave=False) as bar:
        for _, group in itertools.groupby(ordered, key=_residual_key):
            configs = list(group)
            residuals = models.held_out(sets, partial(residuals_of, config=configs[0])).flatten(0, 1).float()
            for config in configs:
                maps = list(anomaly_maps(residuals, config).numpy())
                result.append(MapCandidate(config, pixel_auroc(maps, masks), au_pro(maps, masks)))
                bar.update()
    return sorted(result, key=lambda candidate: -candidate.mean)


def _residual_key(config: AnomalyMapConfig) -> tuple[int, float]:
    return config.factors, config.power


def describe_maps(ranked: Sequence[MapCandidate], rows: int = 8) -> str:
    """Returns the comparison as text: the best candidates and the default."""
    lines = [
        "Anomaly maps: pixel AUROC and AU-PRO on the same images. The highest mean of both decides.",
        "",
        "factors power sigma   pixel  AU-PRO    mean",
    ]
    default = AnomalyMapConfig()
    for candidate in (*ranked[:rows], *(other for other in ranked[rows:] if other.config == default)):
        c = candidate.config
        row = f"{c.factors:>7} {c.power:>5g} {c.sigma:>5g}  {candidate.pixel_auroc:.4f}  {candidate.au_pro:.4f}  "
        lines.append(f"{row}{candidate.mean:.4f}{'  (default)' if c == default else ''}")
    return "\n".join(lines)
