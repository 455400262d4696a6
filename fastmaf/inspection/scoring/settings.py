"""Settings of the score and of the anomaly map; importing them does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from fastmaf.io.schema import Number, OneOf, Record, SchemaError, Whole

Source: TypeAlias = Literal["pixels", "whitened", "flow"]
Reference: TypeAlias = Literal["training", "held-out"]
Kind: TypeAlias = Literal["nll", "typicality", "map maximum", "map top"]

_LEAST = 1e-6
_LARGEST = 4096  # pixels: the widest Gaussian
_DEVIATION = Number(low=_LEAST, high=_LARGEST)
_WITHIN_FLOAT32 = Number(low=1e-30, high=1e30)

SCORE_SETTINGS = Record(
    {
        "kind": OneOf(get_args(Kind)),
        "source": OneOf(get_args(Source)),
        "presmooth_sigma": Number(low=0, high=_LARGEST),
        "sigma": _DEVIATION,
        "clip": _WITHIN_FLOAT32,
        "top": Number(above=0, high=1),
    },
    {"reference": OneOf(get_args(Reference)), "level_power": Number(low=0, high=1)},
)
ANOMALY_MAP_CONFIG = Record(
    {"factors": Whole(), "power": Number(low=0, high=1), "sigma": _DEVIATION, "rms": _WITHIN_FLOAT32}
)


def check_fields(settings: Any, schema: Record, where: str) -> None:
    """Replaces NumPy's numbers among the fields of a frozen dataclass by Python's, and checks all against a schema."""
    values = {name: getattr(settings, name) for name in schema.known}
    for name, value in values.items():
        if isinstance(value, np.generic):
            values[name] = value.item()
            object.__setattr__(settings, name, values[name])
    schema.check(values, where)


@dataclass(frozen=True)
class ScoreSettings:
    """How an image is scored.

    Attributes:
        kind: ``"nll"``, ``"typicality"`` (distance of the NLL from the mean NLL of good images), ``"map maximum"``,
            or ``"map top"`` (mean of the largest values of the score map).
        source: the terms of the score map: ``"pixels"``, the length √(Σ_c z_c²) of the whitened colours of each pixel;
            ``"whitened"``, ½z² of each colour; or ``"flow"``, each dimension's share of the NLL of the whole flow. A
            length has a lighter tail than a square, over good images: with the same rate of false alarms, more
            defects are above the threshold.
        presmooth_sigma: standard deviation, in pixels, of the Gaussian that smooths the whitened z of each colour
            before it is squared; 0 for none. The sign of a defect's residual is shared by neighbouring pixels, that of
            noise is not. Ignored for ``"flow"``.
        sigma: standard deviation, in pixels, of the Gaussian that smooths the score map.
        clip: largest absolute standardised value of one term.
        top: share of the score map's pixels that ``"map top"`` averages.
        reference: the good images whose mean and deviation standardise each term: ``"training"``, those that the flow
            was fitted to, on the scale of held-out ones (see ``TermStatistics.on_scale_of``), or ``"held-out"``.
            Statistics of held-out images come from models of other folds, which have seen the image that is scored:
            its scores are too high, and so is the threshold. Those of few training images say little about new ones.
        level_power: lengths of pixels are divided by this power of their mean over the image. Otherwise good images
            with more noise everywhere would have the highest scores. With 1, an image that is anomalous everywhere
            would score like a good one. 0 for no division; ignored for the other sources.

    Raises:
        SchemaError: a setting has another type or is out of range.
    """

    kind: Kind = "map top"
    source: Source = "pixels"
    presmooth_sigma: float = 0.0
    sigma: float = 1.5
    clip: float = 10.0
    top: float = 0.005
    reference: Reference = "training"
    level_power: float = 0.5

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles of versions without the power are of lengths that were not divided.
        self.__dict__.update({"level_power": 0.0} | state)

    def __post_init__(self) -> None:
        check_fields(self, SCORE_SETTINGS, "score")
        if 0 < self.presmooth_sigma < _LEAST:
            expected = f"expected 0 or at least {_LEAST:g}"
            raise SchemaError(f"score.presmooth_sigma: {expected}; found {self.presmooth_sigma}")

    @property
    def needs_nll(self) -> bool:
        """Whether the score is computed from the NLL instead of the score map."""
        return self.kind in ("nll", "typicality")

    @property
    def uses_training(self) -> bool:
        """Whether statistics of images that the flow was fitted to standardise the terms."""
        return self.reference == "training" and not self.needs_nll


@dataclass(frozen=True)
class AnomalyMapConfig:
    """How the anomaly map is computed.

    Attributes:
        factors: the map is the residual after this many of the whitening's largest factors.
        power: residuals are in noise standard deviations times this power of them: 0 for deviations, 1 for the unit of
            x.
        sigma: standard deviation, in pixels, of the Gaussian that smooths the squared residual.
        rms: root mean square of the map over unseen good images; the map's unit.

    Raises:
        SchemaError: a setting has another type or is out of range.
    """

    factors: int = 150
    power: float = 0.5
    sigma: float = 1.0
    rms: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, ANOMALY_MAP_CONFIG, "anomaly map")
