"""Flows in plain torch: the truth that the other backends are held against."""

from __future__ import annotations

from fastmaf.kernels.flow.torch.forward import UPDATES_BIASES, adam_, backward, forward
from fastmaf.kernels.flow.torch.inverse import inverse
from fastmaf.kernels.flow.torch.inverse_backward import inverse_backward

__all__ = ["UPDATES_BIASES", "adam_", "backward", "forward", "inverse", "inverse_backward"]
