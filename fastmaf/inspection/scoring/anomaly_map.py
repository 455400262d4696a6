"""The anomaly map: where an image is anomalous. It is shown, saved and evaluated pixel by pixel.

It differs from the score map. To decide whether *any* part of an image is unusual, each term is standardised by its own
spread; but where the edge of an object varies from image to image, that hides a defect on the edge, and many factors
explain away the inside of a large defect. The residual of a few factors, in a unit common to all pixels, shows both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmaf.inspection.scoring.float64_flow import FlowValues, Whitening64
from fastmaf.inspection.scoring.score import smoothed


@dataclass(frozen=True)
class AnomalyMapConfig:
    """How the anomaly map is computed.

    Attributes:
        factors: the map is the residual after this many of the whitening's largest factors.
        power: residuals are in noise standard deviations times this power of them: 0 for deviations, 1 for the unit of
            x.
        sigma: standard deviation, in pixels, of the Gaussian that smooths the squared residual.
        rms: root mean square of the map over unseen normal images; the map's unit.
    """

    factors: int = 150
    power: float = 0.5
    sigma: float = 1.0
    rms: float = 1.0

    def __post_init__(self) -> None:
        if self.factors < 0:
            raise ValueError(f"factors must be at least 0; found {self.factors}")
        if not 0 <= self.power <= 1:
            raise ValueError(f"power must lie in [0, 1]; found {self.power}")
        for name in ("sigma", "rms"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive; found {getattr(self, name)}")


@torch.no_grad()
def residuals_of(values: FlowValues, config: AnomalyMapConfig) -> Tensor:
    """Returns the residuals of images after the first factors, float64 ``[n, D]``, not squared."""
    whitening = values.flow.first
    if not isinstance(whitening, Whitening64):
        return values.whitened[0]
    return whitening.unexplained(*values.projected, config.factors) * whitening.scale**config.power


def anomaly_maps(residuals: Tensor, config: AnomalyMapConfig) -> Tensor:
    """Returns the anomaly maps ``[n, s, s]`` of residuals ``[n, 3 s²]``, in units of ``config.rms``.

    A map is the square root of the smoothed squared residuals, summed over the colours.
    """
    size = math.isqrt(residuals.shape[1] // 3)
    squares = residuals.square().unflatten(1, (3, size, size)).sum(dim=1)
    return smoothed(squares, config.sigma).clamp_min(0).sqrt() / config.rms
