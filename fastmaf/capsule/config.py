"""The settings of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import fastmaf

if TYPE_CHECKING:
    import torch

# Settings that keep orders other than "natural" stable at image size, measured on the real capsule images.
GUARDED: Mapping[str, Any] = MappingProxyType(
    {
        "init": "identity",
        "soft_bound": True,
        "log_scale_bound": 1.0,
        "warmup_steps": 100,
        "max_grad_norm": 50.0,
        "max_loss_jump": 10.0,
        "lr": 2e-5,
    }
)


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run. The defaults are those of the published run, except for strict masks.

    Attributes:
        size: side of the square images in pixels; D = 3 size².
        blocks, hidden_features, degrees, order, levels, log_scale_bound, soft_bound, init: see ``fastmaf.MAF``.
        masks: ``"strict"``, or ``"published"`` for the leaky output mask of the published run. ``"reference"``, its
            name in earlier versions, is accepted and replaced by ``"published"``.
        epochs, batch_size, lr: training with Adam.
        holdout: share of the good images kept out of training, for the validation NLL and for thresholds.
        warmup_steps, max_grad_norm, max_loss_jump: see ``fastmaf.Guards``.
        seed: seed of the split, the model and the shuffling.
    """

    size: int = 64
    blocks: int = 7
    hidden_features: tuple[int, ...] = (512, 512)
    degrees: Literal["spread", "random", "cyclic"] = "spread"
    order: Literal["natural", "alternate", "random"] = "natural"
    levels: int | None = None
    masks: Literal["strict", "published", "reference"] = "strict"
    log_scale_bound: float | None = 5.0
    soft_bound: bool = False
    init: Literal["linear", "identity"] = "linear"
    epochs: int = 100
    batch_size: int = 8
    lr: float = 1e-4
    holdout: float = 0.1
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    max_loss_jump: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "blocks", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; found {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive; found {self.lr}")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout is a share of the good images, 0 <= holdout < 1; found {self.holdout}")
        if self.masks not in ("strict", "published", "reference"):
            raise ValueError(f"masks must be 'strict' or 'published'; found {self.masks!r}")
        if self.masks == "reference":
            object.__setattr__(self, "masks", "published")

    @property
    def features(self) -> int:
        """Number of values of one image, 3 size²."""
        return 3 * self.size**2

    def build(self, device: torch.device | str | None = None) -> fastmaf.MAF:
        """Builds the untrained flow, on torch's default device if ``device`` is None."""
        names = ("degrees", "order", "levels", "log_scale_bound", "soft_bound", "init", "seed")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        strict = self.masks == "strict"
        return fastmaf.MAF(self.features, self.blocks, self.hidden_features, strict=strict, device=device, **options)
