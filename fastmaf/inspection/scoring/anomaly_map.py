"""The anomaly map: where an image is anomalous. It is shown, saved and evaluated pixel by pixel.

It differs from the score map. To decide whether *any* part of an image is unusual, each term is standardised by its own
spread; but where the edge of an object varies from image to image, that hides a defect on the edge, and many factors
explain away the inside of a large defect. The residual of a few factors, in a unit common to all pixels, shows both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmaf.inspection.scoring.float64_flow import FlowValues, Whitening64
from fastmaf.inspection.scoring.score import smoothed
from fastmaf.inspection.scoring.settings import AnomalyMapConfig


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
