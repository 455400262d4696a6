"""Everything that determines an inspection model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from fastmaf.inspection.location import Location
    from fastmaf.inspection.scores import ScoreSettings

Copies: TypeAlias = Literal["none", "shifts", "rotations"]
COPIES: tuple[Copies, ...] = ("none", "shifts", "rotations")

BLOCKS = 2
"""Local blocks that a fit tries by itself."""

QUANTISATION = 1 / (12 * 255**2)
"""Variance of rounding to 8 bits, on [0, 1] data: no pixel's noise is taken for smaller."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines an inspection model. No default was chosen by a test image; see ``fastmaf choose``.

    Attributes:
        size: side of the square images in pixels.
        rank: factors of the whitening; fewer where the images do not support them.
        copies: what the whitening explains, too: ``"shifts"``, ``"rotations"``, ``"none"``, or ``"auto"``, that of the
            three by which held-out images are likeliest.
        shift_radius, shift_step: shifts are by up to so many steps of so many pixels.
        angles: rotations are by multiples of 360° over this.
        dequantize: spread each 8-bit value evenly over its bin for fitting and for the held-out NLL, which then bounds
            that of the 8-bit data. Scores are of the values as they are.
        logit: None, or the alpha of a ``fastmaf.Logit`` before everything else.
        blocks: local autoregressive blocks after the whitening; every second one takes the pixels in reverse.
            ``"auto"``: two, where held-out images are likelier with them, else none. A number is always kept.
        patch, kernel, hidden: of the blocks; see ``fastmaf.LocalAutoregressive``.
        steps, batch_size, lr: of Adam on the blocks; the rate rises and falls once (one cycle).
        folds: K.
        score: how an image is scored; None for the better of two on drawn defects, see ``fastmaf.inspection.settle``.
        location: how the map is made of where it is anomalous, likewise; its ``usual`` is fitted.
        seed: of folds and blocks.
    """

    size: int = 64
    rank: int = 800
    copies: Copies | Literal["auto"] = "auto"
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
    batch_size: int = 16
    lr: float = 2e-2
    folds: int = 5
    score: ScoreSettings | None = None
    location: Location | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "angles", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; found {getattr(self, name)}")
        if self.copies not in ("auto", *COPIES):
            raise ValueError(f"copies must be 'auto', 'none', 'shifts' or 'rotations'; found {self.copies!r}")
        # A bin reaches half a step of 8 bits beyond 0 and 1, where the logit has to be finite, too.
        least = 1 / 512 if self.dequantize else 0.0
        if self.logit is not None and not least < self.logit < 0.5:
            raise ValueError(f"logit must lie in ({least:g}, 0.5); found {self.logit}")
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2; found {self.folds}")
        if (
            isinstance(self.blocks, str)
            and self.blocks != "auto"
            or not isinstance(self.blocks, str)
            and self.blocks < 0
        ):
            raise ValueError(f"blocks must be 'auto' or at least 0; found {self.blocks!r}")
        if self.most_blocks and self.size % self.patch:
            raise ValueError(f"size must be a multiple of patch = {self.patch}; found {self.size}")

    @property
    def most_blocks(self) -> int:
        """How many blocks are trained; those that are ``"auto"`` may be left out afterwards."""
        return BLOCKS if isinstance(self.blocks, str) else self.blocks

    @property
    def features(self) -> int:
        """D, the numbers of one image."""
        return 3 * self.size**2
