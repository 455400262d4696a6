"""Flows by Triton kernels; the same functions as the backend ``torch``."""

from __future__ import annotations

from fastmaf.kernels.flow.torch import inverse_backward
from fastmaf.kernels.flow.triton.forward import UPDATES_BIASES, adam_, backward, forward
from fastmaf.kernels.flow.triton.inverse import inverse
from fastmaf.kernels.triton_common.device import why_not

__all__ = ["UPDATES_BIASES", "adam_", "backward", "forward", "inverse", "inverse_backward", "why_not"]
