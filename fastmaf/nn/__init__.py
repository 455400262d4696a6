"""Masked linear layers and the MADE network, with weights in packed staircase storage."""

from __future__ import annotations

from fastmaf.nn.made import MADE
from fastmaf.nn.masked_linear import Init, MaskedLinear, zero_padding_

__all__ = ["MADE", "Init", "MaskedLinear", "zero_padding_"]
