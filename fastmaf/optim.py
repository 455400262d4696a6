"""Optimisers: ``fastmaf.optim.FusedAdam``."""

from __future__ import annotations

from fastmaf.training.fused_adam import FusedAdam

__all__ = ["FusedAdam"]
