"""Normalizing flows: ``Flow``, any sequence of transforms, and ``MAF``."""

from __future__ import annotations

from fastmaf.flows.base import Flow
from fastmaf.flows.maf import MAF, interleave_permutations

__all__ = ["MAF", "Flow", "interleave_permutations"]
