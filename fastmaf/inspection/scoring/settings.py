"""Settings of the score and of the anomaly map; importing them does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Source: TypeAlias = Literal["whitened", "flow"]
Kind: TypeAlias = Literal["nll", "typicality", "map maximum", "map top"]


@dataclass(frozen=True)
class ScoreSettings:
    """How an image is scored.

    Attributes:
        kind: ``"nll"``, ``"typicality"`` (distance of the NLL from the mean NLL of normal images), ``"map maximum"``,
            or ``"map top"`` (mean of the largest values of the score map).
        source: the terms of the score map: ``"whitened"``, ½z² after the whitening alone, or ``"flow"``, each
            dimension's share of the NLL of the whole flow.
        presmooth_sigma: standard deviation, in pixels, of the Gaussian that smooths the whitened z of each colour
            before it is squared; 0 for none. The sign of a defect's residual is shared by neighbouring pixels, that of
            noise is not. Ignored for ``"flow"``.
        sigma: standard deviation, in pixels, of the Gaussian that smooths the score map.
        clip: largest absolute standardised value of one term.
        top: share of the score map's pixels that ``"map top"`` averages.
    """

    kind: Kind = "map top"
    source: Source = "whitened"
    presmooth_sigma: float = 0.0
    sigma: float = 1.5
    clip: float = 10.0
    top: float = 0.005

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, get_args(Kind)), ("source", self.source, get_args(Source))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; found {value!r}")
        for name in ("sigma", "clip", "top"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive; found {getattr(self, name)}")
        if not 0 <= self.presmooth_sigma < math.inf:
            raise ValueError(f"presmooth_sigma must be at least 0; found {self.presmooth_sigma}")
        if self.top > 1:
            raise ValueError(f"top is a share of the score map's pixels, at most 1; found {self.top}")

    @property
    def needs_nll(self) -> bool:
        """Whether the score is computed from the NLL instead of the score map."""
        return self.kind in ("nll", "typicality")


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
