"""The settings of an inspection model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, TypeAlias

from fastmaf.inspection.aspect import shape_for
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings

Augmentation: TypeAlias = Literal["none", "shifts", "rotations"]
AUGMENTATIONS: tuple[Augmentation, ...] = ("none", "shifts", "rotations")

RANK = 400
"""Number of factors of a whitening for ``rank="auto"``, at least."""

_MOST_FACTORS, _MOST_OF_ROTATIONS = 600, 800  # 800 for the others take half as long again, for few nats
_MOST_VALUES = 2**24  # of more factors than RANK, of which a fit holds those of all folds: 64 MiB of each

BLOCKS = 2
"""Number of local blocks that ``blocks="auto"`` tries."""

QUANTISATION = 1 / (12 * 255**2)
"""Variance of rounding to 8 bits, on [0, 1] data: a lower bound on the noise of a pixel."""


@dataclass(frozen=True)
class Recipe:
    """All settings that determine an inspection model.

    No default was chosen on a test image; see ``fastmaf inspect choose``.

    Attributes:
        size: side of the images in pixels; that of the square of the same area for others, see ``aspect``.
        rank: factors of the whitening; fewer if the images do not support them. ``"auto"``: 600, with rotations 800, as
            turned images differ in more directions; as many as 64 MiB hold, but at least 400.
        augmentation: copies of the images that the whitening is fitted to, too: ``"shifts"``, ``"rotations"``,
            ``"none"``, or ``"auto"``, the one of the three under which held-out images are most likely.
        shift_radius, shift_step: shifts are by up to this many steps of this many pixels.
        angles: rotations are by multiples of 360° over this.
        dequantize: spread each 8-bit value evenly over its bin for fitting and for the held-out NLL, which then bounds
            that of the 8-bit data. Scores are of the values as they are.
        logit: None, or the alpha of a ``fastmaf.Logit`` before everything else.
        blocks: number of local autoregressive blocks after the whitening; every second one takes the pixels in
            reverse. ``"auto"``: two if held-out images are more likely with them, else none. A number is always kept.
        patch, kernel, hidden: of the blocks; see ``fastmaf.LocalAutoregressive``.
        steps, batch_size, lr: of Adam on the blocks, with a one-cycle schedule.
        folds: K; at most the number of images is used. Held-out scores, of models fitted to 1 - 1/K of the images, lie
            above those of the final model, on average by about 1/(K - 1) of their deviation: with few folds, the
            threshold is too careful.
        score: how an image is scored; None selects the better of two on synthetic defects, see
            ``fastmaf.inspection.selection.select``.
        map_config: how the anomaly map is computed; None selects likewise. Its ``rms`` is fitted.
        seed: of folds and blocks.
        channels: 3 for colour, 1 for grey; ``"auto"``: 1 if all images are grey, which takes a third of the work.
        aspect: height of the images over their width, to which all are resized. None: that of the good images where
            these are read from files or given to a ``Detector``, else 1; see ``fastmaf.inspection.aspect``.
        pose: ``"auto"``: objects that lie at any angle are turned to one pose, unless an augmentation is asked for; see
            ``fastmaf.inspection.posed``. ``"none"``: images are fitted as they are.
    """

    size: int = 64
    rank: int | Literal["auto"] = "auto"
    augmentation: Augmentation | Literal["auto"] = "auto"
    shift_radius: int = 2
    shift_step: float = 0.5
    angles: int = 12
    dequantize: bool = False
    logit: float | None = None
    blocks: int | Literal["auto"] = "auto"
    patch: int = 2
    kernel: int = 3
    hidden: int = 2
    steps: int = 200
    batch_size: int = 2
    lr: float = 2e-2
    folds: int = 10
    score: ScoreSettings | None = None
    map_config: AnomalyMapConfig | None = None
    seed: int = 0
    channels: int | Literal["auto"] = "auto"
    aspect: float | None = None
    pose: Literal["auto", "none"] = "auto"

    def __post_init__(self) -> None:
        for name in ("size", "angles", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; found {getattr(self, name)}")
        if self.augmentation not in ("auto", *AUGMENTATIONS):
            known = ", ".join(map(repr, AUGMENTATIONS))
            raise ValueError(f"augmentation must be 'auto' or one of {known}; found {self.augmentation!r}")
        # Dequantised values lie up to half an 8-bit step beyond 0 and 1, where the logit must be finite, too.
        least = 1 / 512 if self.dequantize else 0.0
        if self.logit is not None and not least < self.logit < 0.5:
            raise ValueError(f"logit must lie in ({least:g}, 0.5); found {self.logit}")
        if self.pose not in ("auto", "none"):
            raise ValueError(f"pose must be 'auto' or 'none'; found {self.pose!r}")
        if self.channels not in ("auto", 1, 3):
            raise ValueError(f"channels must be 'auto', 1 or 3; found {self.channels!r}")
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2; found {self.folds}")
        if self.rank != "auto" and (not isinstance(self.rank, Integral) or self.rank < 0):
            raise ValueError(f"rank must be 'auto' or at least 0; found {self.rank!r}")
        if self.blocks != "auto" and (isinstance(self.blocks, str) or self.blocks < 0):
            raise ValueError(f"blocks must be 'auto' or at least 0; found {self.blocks!r}")
        if self.most_blocks and self.size % self.patch:
            raise ValueError(f"size must be a multiple of patch = {self.patch}; found {self.size}")
        if self.aspect is not None and not 0 < self.aspect < math.inf:
            raise ValueError(f"aspect must be positive and finite; found {self.aspect}")

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the images in pixels, multiples of ``patch``."""
        return shape_for(self.size, 1.0 if self.aspect is None else self.aspect, self.patch)

    @property
    def side(self) -> int:
        """Side of the square that images are read as: the longer one of ``shape``."""
        return max(self.shape)

    @property
    def factors(self) -> int:
        """The number of factors of the whitening, if the images support them."""
        if not isinstance(self.rank, str):
            return min(self.rank, self.features)
        most = _MOST_OF_ROTATIONS if self.augmentation == "rotations" else _MOST_FACTORS
        return min(self.features, max(RANK, min(most, _MOST_VALUES // self.features)))

    @property
    def most_blocks(self) -> int:
        """The number of blocks that are trained; ``"auto"`` may drop them afterwards."""
        return BLOCKS if isinstance(self.blocks, str) else self.blocks

    @property
    def features(self) -> int:
        """D, the number of values of one image; of a colour image if ``channels`` is ``"auto"``."""
        return (3 if isinstance(self.channels, str) else self.channels) * math.prod(self.shape)
